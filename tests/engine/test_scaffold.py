"""What ``mtdiffusion plugins new`` writes can be installed, is found, and passes its own tests as it stands."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from mtdiffusion_engine.cli import LIKES, SCAFFOLDS, main
from mtdiffusion_engine.scaffold import FILES, GROUPS, LONGEST_NAME, write_package
from mtdiffusion_engine.scaffold import LIKES as TEMPLATES
from mtdiffusion_registry import API_VERSION, Registry, UserError
from mtdiffusion_registry.testing import conformance

LONGEST = "x-" + "y" * (LONGEST_NAME - 2)
SEVERAL = {
    "judged": (("modality", "dataset", "evaluator"), "vector"),
    "judged-map": (("modality", "dataset", "evaluator"), "spatial"),
    "judged-text": (("modality", "dataset", "evaluator"), "sequence"),
    "all-nine": (tuple(GROUPS), "vector"),
}
"""Packages of several kinds that are tested as a whole."""
EACH = {kind: (kind, "vector") for kind in GROUPS} | {like: ("modality", like) for like in LIKES[1:]}
"""By a name of ours: what is asked for as --kind and as --like."""


def run(*arguments: object, cwd: Path, path: Path | None = None) -> str:
    """The output of a Python module as a program, with ``path`` on the path of modules."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("MTDIFFUSION_DISABLE_PLUGINS", None)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of each of EACH, by name."""
    folder = tmp_path_factory.mktemp("packages")
    for name, (kind, like) in EACH.items():
        arguments = ["plugins", "new", f"new-{name}", "--kind", kind, "--like", like, "--out", str(folder / name)]
        assert main(arguments) == 0
    return {name: folder / name for name in EACH}


@pytest.fixture(scope="module")
def site(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed them into."""
    site = tmp_path_factory.mktemp("site")
    pip = ["pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", site]
    run(*pip, *packages.values(), cwd=site)
    return site


def test_the_kinds_of_the_command_line_are_those_of_the_templates() -> None:
    assert tuple(GROUPS) == SCAFFOLDS
    assert tuple(TEMPLATES) == LIKES


def test_each_is_found_once_it_is_installed(site: Path) -> None:
    rows = [line.split() for line in run("mtdiffusion_engine.cli", "plugins", "list", cwd=site, path=site).splitlines()]
    for name, (kind, like) in EACH.items():
        for group in (GROUPS[kind], "field") if like == "file" else (GROUPS[kind],):
            assert [group, f"new-{name}".replace("-", "_"), f"mtdiffusion-new-{name}", "0.1.0", "ok"] in rows


@pytest.mark.long
def test_each_passes_its_own_tests(packages: dict[str, Path], site: Path) -> None:
    """In one process, since the import of torch takes longer than most of them."""
    options = ["-v", "-p", "no:cacheprovider", "--import-mode=importlib"]
    out = run("pytest", *options, *(path / "tests" for path in packages.values()), cwd=site, path=site)
    for name in EACH:
        for part in ("_modality", "_field") if name == "file" else ("",):
            for test in ("test_it_keeps_the_contract", "test_it_is_found_by_its_entry_point"):
                assert f"{f'test-new-{name}'.replace('-', '_')}{part}.py::{test}" in out
    assert "SKIPPED" not in out


@pytest.mark.long
@pytest.mark.parametrize("name", EACH)
def test_each_keeps_its_contract_by_the_command_of_its_readme(name: str, packages: dict[str, Path], site: Path) -> None:
    """Without examples, as a plugin is checked that says none."""
    commands = re.findall(r"`mtdiffusion (plugins check [^`]+)`", (packages[name] / "README.md").read_text())
    assert commands
    for command in commands:
        assert " 0 failed" in run("mtdiffusion_engine.cli", *shlex.split(command), cwd=site, path=site)


@pytest.mark.parametrize("form", ["once", "repeated"])
def test_several_kinds_are_given_at_once_or_one_by_one(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ("dataset", "modality", "evaluator")
    options = ["--kind", *kinds] if form == "once" else [word for kind in kinds for word in ("--kind", kind)]
    assert main(["plugins", "new", "tide", *options, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == list(kinds)
    metadata = tomllib.loads((tmp_path / "out/pyproject.toml").read_text())
    assert metadata["project"]["description"] == 'The modality, data set and evaluator "tide" for mtdiffusion.'
    assert metadata["project"]["entry-points"]["mtdiffusion.plugins"] == {
        f"{group}.tide": f"mtdiffusion_tide.{group}" for group in ("modality", "dataset", "evaluator")
    }


PAIRS = [*itertools.combinations(GROUPS, 2), tuple(GROUPS)]


def test_any_kinds_together_are_written_clean_and_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry.discover()
    for number, kinds in enumerate(PAIRS):
        for like in LIKES if {"modality", "dataset"} <= set(kinds) else LIKES[:1]:
            name = f"pair-{number}-{like}"
            folder = write_package(name, [GROUPS[kind] for kind in kinds], tmp_path / name, registry, like)
            monkeypatch.syspath_prepend(folder / "src")
            declared = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]
            points = declared["mtdiffusion.plugins"]
            assert {GROUPS[kind] for kind in kinds} <= {point.partition(".")[0] for point in points}
            for module in points.values():
                assert import_module(module).MTDIFFUSION_API == API_VERSION
            for table in re.findall(r"```toml\n(.*?)```", (folder / "README.md").read_text(), re.S):
                tomllib.loads(table)
            assert (folder / "example.toml").is_file() == ("dataset" in kinds)
    run("ruff", "check", "--no-cache", ".", cwd=tmp_path)
    run("ruff", "format", "--no-cache", "--check", ".", cwd=tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", SEVERAL)
def test_several_kinds_fit_each_other(name: str, tmp_path: Path) -> None:
    """They pass their own tests, one of which trains the example, and keep their contracts."""
    kinds, like = SEVERAL[name]
    folder, site = tmp_path / name, tmp_path / "site"
    assert main(["plugins", "new", name, "--kind", *kinds, "--like", like, "--out", str(folder)]) == 0
    pip = ["pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", site]
    run(*pip, folder, cwd=tmp_path)
    out = run("pytest", "-v", "-p", "no:cacheprovider", "--import-mode=importlib", "tests", cwd=folder, path=site)
    assert out.count("::test_it_is_found_by_its_entry_point PASSED") == len(kinds)
    assert "::test_the_example_is_trained_and_evaluated PASSED" in out
    assert "SKIPPED" not in out
    commands = re.findall(r"`mtdiffusion (plugins check [^`]+)`", (folder / "README.md").read_text())
    assert len(commands) >= len(kinds)
    for command in commands:
        assert " 0 failed" in run("mtdiffusion_engine.cli", *shlex.split(command), cwd=folder, path=site)


def test_a_small_model_learns_what_is_made_up_for_a_map(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(packages["spatial"] / "src")
    config = import_module("mtdiffusion_new_spatial").NewSpatialConfig()
    contract = conformance(config, height=4, width=4).contract()
    checks = {check.id: check for check in contract.checks}
    for name in ("head_learns", "learns"):
        outcome = contract.outcome(checks[name])
        assert outcome.status == "ok", outcome.reason


@pytest.mark.parametrize("name", ["x", LONGEST])
def test_each_is_clean_whatever_its_name(name: str, tmp_path: Path) -> None:
    registry = Registry.discover()
    for each, (kind, like) in EACH.items():
        write_package(name, [GROUPS[kind]], tmp_path / each, registry, like)
    run("ruff", "check", "--no-cache", ".", cwd=tmp_path)
    run("ruff", "format", "--no-cache", "--check", ".", cwd=tmp_path)


def test_a_package_is_complete_and_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_package("optical-flow", ["modality"], None, Registry.discover())
    assert folder == Path("mtdiffusion-optical-flow")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    code = {"src/mtdiffusion_optical_flow/__init__.py", "tests/test_optical_flow.py"}
    assert found == {file.format(package="mtdiffusion_optical_flow") for file in FILES} | code
    metadata = tomllib.loads((folder / "pyproject.toml").read_text())
    assert metadata["project"]["name"] == "mtdiffusion-optical-flow"
    assert metadata["project"]["entry-points"]["mtdiffusion.plugins"] == {
        "modality.optical_flow": "mtdiffusion_optical_flow"
    }
    assert "class OpticalFlowConfig" in (folder / "src/mtdiffusion_optical_flow/__init__.py").read_text()
    assert "${{ matrix.python }}" in (folder / ".github/workflows/ci.yml").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / folder]


def test_a_package_may_have_plugins_of_several_groups(tmp_path: Path) -> None:
    folder = write_package("tide", ["modality"], tmp_path / "out", Registry.discover(), "file")
    metadata = tomllib.loads((folder / "pyproject.toml").read_text())
    assert metadata["project"]["entry-points"]["mtdiffusion.plugins"] == {
        "modality.tide": "mtdiffusion_tide.modality",
        "field.tide": "mtdiffusion_tide.field",
    }
    with pytest.raises(UserError, match='a field of kind "caption" already'):
        write_package("caption", ["modality"], tmp_path / "other", Registry.discover(), "file")
    with pytest.raises(UserError, match='of a modality alone, found "spatial" of a backbone'):
        write_package("tide", ["backbone"], tmp_path / "other", Registry.discover(), "spatial")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_modality_may_have_keys_after_the_one_called_field(tmp_path: Path) -> None:
    folder = write_package("depth", ["modality"], tmp_path / "out", Registry.discover())
    text = (folder / "src/mtdiffusion_depth/__init__.py").read_text()
    (declared,) = re.findall(r"^    loss_weight: float = (.*)$", text, re.M)
    last = "    field: str | None = None\n"
    assert text.count(last) == 1
    namespace: dict = {"__name__": "scaffolded"}
    exec(text.replace(last, f"{last}    more: float = {declared}\n"), namespace)
    assert namespace["DepthConfig"](more=0.5).more == 0.5


@pytest.mark.parametrize("name", ["Depth", "de pth", "3d", "../depth", "depth-", "a--b", "class", "", LONGEST + "y"])
def test_a_bad_name_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f'NAME: found "{name}", expected the name of the new kind: lower-case words'):
        write_package(name, ["modality"], tmp_path / "out", Registry.discover())
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    registry = Registry.discover()
    with pytest.raises(UserError, match='a backbone of kind "unet" already, of mtdiffusion'):
        write_package("unet", ["backbone"], tmp_path / "out", registry)
    with pytest.raises(UserError, match='there is a package "mtdiffusion_engine" already'):
        write_package("engine", ["modality"], tmp_path / "out", registry)
    assert list(tmp_path.iterdir()) == []
    write_package("unet", ["modality"], tmp_path / "out", registry)  # another group's names are not in the way


def test_a_folder_that_exists_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "new", "depth", "--kind", "modality", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mtdiffusion: error: {tmp_path}: already exists; nothing was written.")
    assert list(tmp_path.iterdir()) == []


def test_a_kind_given_twice_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["--kind", "modality", "schedule", "--kind", "schedule"]
    assert main(["plugins", "new", "depth", *kinds, "--out", str(tmp_path / "out")]) == 2
    assert '--kind: "schedule" given more than once; nothing was written' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_package("depth", ["modality"], tmp_path / "out", Registry.discover())
    assert list(tmp_path.iterdir()) == []
