"""The documents' configurations, keys and code are those of the package."""

import re
import tomllib
from pathlib import Path

import attrs
import pytest

from mtdiffusion import LossWeights, SamplerSettings
from mtdiffusion_engine import experiment as ex
from mtdiffusion_registry import Registry
from mtdiffusion_registry.config import structure

ROOT = Path(__file__).parents[1]
REGISTRY = Registry.discover()
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()
KINDS = [
    (group, kind)
    for group in ("modality", "backbone", "dataset", "field", "weight_schedule", "evaluator")
    for kind in REGISTRY.kinds(group)
]
SECTIONS = {
    "augmentation": ex.AugmentationConfig,
    "latent": ex.LatentConfig,
    "process": ex.ProcessConfig,
    "model": ex.ModelConfig,
    "conditioning": ex.ConditioningConfig,
    "loss": LossWeights,
    "training": ex.TrainingConfig,
    "sampling": SamplerSettings,
    "evaluation": ex.EvaluationConfig,
    "plugins": ex.PluginsConfig,
}


def complete_configurations() -> list[tuple[str, dict]]:
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```toml.*?\n(.*?)^```", path.read_text(), re.M | re.S):
            table = tomllib.loads(block)
            # The tutorial's own kind is installed and trained by tests/test_docs_run.py.
            if {"data", "modalities", "latent", "backbone"} <= set(table) and "brightness" not in table["modalities"]:
                found.append((path.name, table))
    return found


def documented(text: str) -> dict[str, str]:
    """Keys of the first table in a text, and the default that stands beside each."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]*\| ([^|]*) \|", text.partition("\n\n## ")[0], re.M)
    keys: dict[str, str] = {}
    for key, default in rows:
        if key in keys:
            break
        keys[key] = default.strip().strip("`")
    return keys


def default_of(attribute: attrs.Attribute, cls: type) -> str:
    value = attribute.default
    if isinstance(value, attrs.Factory) and value.takes_self:  # type: ignore[arg-type]
        value = getattr(cls(), attribute.name)
    if value is attrs.NOTHING:
        return "required"
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        value = value.factory()
    if value is None:
        return "not set"
    if isinstance(value, tuple):
        value = list(value)
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value).replace("'", '"')


def test_there_are_complete_configurations_to_check() -> None:
    assert len(complete_configurations()) >= 9


@pytest.mark.parametrize("table", [table for _, table in complete_configurations()])
def test_a_complete_configuration_builds_a_model(table: dict) -> None:
    experiment = structure(REGISTRY, table, ex.Experiment, "document")
    assert ex.build_model(experiment).names == list(table["modalities"])


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_section_is_documented_with_its_default(section: str) -> None:
    _, _, text = CONFIGURATION.partition(f"\n## {section}\n")
    keys = documented(text)
    for attribute in attrs.fields(SECTIONS[section]):
        assert keys[attribute.name].strip('"') == default_of(attribute, SECTIONS[section]).strip('"'), attribute.name


@pytest.mark.parametrize(("group", "kind"), KINDS)
def test_every_key_of_a_kind_is_documented_with_its_default(group: str, kind: str) -> None:
    heading = next(
        match.end()
        for match in re.finditer(rf"^\*\*.*`{kind}`.*$", CONFIGURATION, re.M)
        if documented(CONFIGURATION[match.end() :]).keys()
        >= {a.name for a in attrs.fields(REGISTRY.config_class(group, kind))}
    )
    keys = documented(CONFIGURATION[heading:])
    for attribute in attrs.fields(REGISTRY.config_class(group, kind)):
        assert keys[attribute.name].strip('"') == default_of(attribute, REGISTRY.config_class(group, kind)).strip(
            '"'
        ), attribute.name


@pytest.mark.parametrize(
    "kind",
    [("task", kind) for kind in REGISTRY.kinds("task")] + [("method", kind) for kind in REGISTRY.kinds("method")],
)
def test_every_key_of_a_task_and_of_a_method_is_documented(kind: tuple[str, str]) -> None:
    if REGISTRY.origin(*kind)["distribution"] != "mtdiffusion":
        pytest.skip("not ours")
    (row,) = re.findall(rf"^\| `{kind[1]}` \| .*$", (ROOT / "docs/benchmarks.md").read_text(), re.M)
    keys = row.split(" | ")[-1]
    for attribute in attrs.fields(REGISTRY.config_class(*kind)):
        found = re.search(rf"`{attribute.name}`(?: \(([^)]*)\))?", keys)
        assert found, attribute.name
        if attribute.default is attrs.NOTHING:
            assert found[1] is None
        else:
            words = {"()": "none", "False": "false"}
            default = str(attribute.default)
            assert found[1] == words.get(default, re.sub(r"[()']", "", default)), attribute.name


def test_links_between_documents_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_each_row_of_what_data_may_look_like_is_a_test() -> None:
    rows = re.findall(r"^\| .* \| `(test_\w+)` \|$", (ROOT / "docs/your-data.md").read_text(), re.M)
    tests = "".join(path.read_text() for room in ("tests", "examples") for path in (ROOT / room).rglob("test_*.py"))
    assert len(rows) > 20
    assert [name for name in rows if f"def {name}(" not in tests] == []


def test_a_yes_of_the_comparison_leads_to_what_shows_it() -> None:
    text = (ROOT / "docs/comparison.md").read_text()
    cells = [cell.strip() for row in re.findall(r"^\|(.*)\|$", text, re.M) for cell in row.split("|")]
    assert sum(cell.startswith("[yes](") for cell in cells) > 20
    assert [cell for cell in cells if re.match(r"yes\b", cell)] == []
