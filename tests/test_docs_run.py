"""Every code block of the documents: those that a reader is to follow run, page by page, all others are checked.

What runs is what the page says, with fewer samples and steps: see :func:`shortened`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from attrs import frozen
from PIL import Image

from mtdiffusion_engine.cli import _parser, main
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_registry import Registry
from mtdiffusion_registry.config import structure

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FROM_NOTHING = ["getting-started", "task-image-mask", "task-masked-image", "task-image-label", "task-image-clip"]
"""Pages that a reader follows from above, in an empty folder; clocks, too."""
AFTER_DEMO = ["README.md", "docs/sampling.md", "docs/python.md", "docs/sharing.md"]
"""Pages that are followed where `make demo` was run."""
NOT_RUN = re.compile(r"make |pip install|python3 -m venv|mtdiffusion (bench|push|demo)|hf |tensorboard ")
"""Commands that install, take minutes or need an account. Those of mtdiffusion are parsed all the same."""
FEW, STEPS = 24, 3


@frozen
class Block:
    """A fenced block: its language, the name of the file that it is (or ""), and what is in it."""

    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line of a block of shell."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> Iterator[Block]:
    for indent, language, title, text in re.findall(
        r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^ *```$', page.read_text(), re.M | re.S
    ):
        yield Block(language, title, re.sub(f"^{indent}", "", text, flags=re.M))


def shortened(table: dict[str, Any], sampling: bool = True) -> dict[str, Any]:
    """A configuration with a smaller network, fewer steps and fewer samples; what it is made of stays."""
    table = {**table, "backbone": {**table["backbone"], "channels": 8, "multipliers": [1]}}
    table["training"] = {**table.get("training", {}), "steps": STEPS, "batch_size": 8, "held_out_every": 0}
    if sampling:
        table["sampling"] = {**table.get("sampling", {}), "steps": STEPS}
    evaluation = table.get("evaluation", {})
    few = {"samples": 6, "joint_draws": 1, "steps": 2, "bound_times": 1}
    judges = [{**judge, "epochs": 1, "train_samples": FEW} for judge in evaluation.get("evaluators", [])]
    table["evaluation"] = {**evaluation, **few, **({"evaluators": judges} if judges else {})}
    return table


def follow(page: Path) -> None:
    """Do what a page says, from above, in the working directory."""
    found = list(blocks(page))
    plots = any("plot" in words for block in found if block.language == "sh" for words in block.commands)
    namespace: dict[str, Any] = {}
    for block in found:
        if block.language == "toml" and block.title:
            table = shortened(tomllib.loads(block.text), sampling=not plots)
            Path(block.title).write_text(tomli_w.dumps(table))
        elif block.language == "python":
            few = re.sub(r"count=\d+", f"count={FEW}", block.text)
            few = few.replace("range(len(data))", f"range({FEW})")
            few = re.sub(r"training\.steps=\d+", f"training.steps={STEPS}", few)
            exec(compile(few, str(page), "exec"), namespace)
        elif block.language == "sh":
            for words in block.commands:
                if NOT_RUN.match(" ".join(words)):
                    continue
                assert words[0] == "mtdiffusion", f"{page.name}: {shlex.join(words)}: neither run nor left out"
                few = [re.sub(r"training\.steps=\d+", f"training.steps={2 * STEPS}", word) for word in words]
                assert main(few[1:]) == 0, shlex.join(words)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` makes, of a few steps: five modalities, measured and drawn."""
    folder = tmp_path_factory.mktemp("demo")
    config = folder / "scenes-demo.toml"
    table = shortened(tomllib.loads((ROOT / "configs/scenes-demo.toml").read_text()))
    config.write_text(tomli_w.dumps({**table, "data": {**table["data"], "count": FEW, "test_count": FEW}}))
    assert main(["demo", "--config", str(config), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder / "run"


@pytest.fixture
def beside_demo(demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with runs/demo and a mask of holes, the picture's size."""
    shutil.copytree(demo_run, tmp_path / "runs/demo")
    Image.fromarray(np.repeat(np.repeat(np.array([[0, 255]], np.uint8), 32, 0), 16, 1)).save(tmp_path / "holes.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FROM_NOTHING)
def test_a_page_can_be_followed_in_an_empty_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(ROOT / f"docs/{name}.md")


@pytest.mark.parametrize("name", AFTER_DEMO)
def test_a_page_can_be_followed_after_the_demo(name: str, beside_demo: Path) -> None:
    follow(ROOT / name)


def test_clocks_can_be_followed_and_draws_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(ROOT / "docs/clocks.md")
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == sorted(re.findall(r"\]\(images/([\w-]+\.png)\)", (ROOT / "docs/clocks.md").read_text()))
    for name in drawn:
        made, shown = (Image.open(at).convert("RGB") for at in (tmp_path / name, ROOT / "docs/images" / name))
        assert made.size == shown.size, name
        difference = np.abs(np.asarray(made, np.float32) - np.asarray(shown, np.float32)).mean()
        assert difference < 1, name  # of 255: other versions of Pillow set letters otherwise


def test_the_page_of_a_runs_folder_names_what_is_in_it(beside_demo: Path) -> None:
    text = (ROOT / "docs/run-folder.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \|.*\| (?:train|evaluate|gallery) \|$", text, re.M)
    run = beside_demo / "runs/demo"
    inside = {str(path.relative_to(run)) + "/" * path.is_dir() for path in run.rglob("*")}
    inside = {re.sub(r"step-\d+", "step-00001000", name) for name in inside if not name.startswith("tensorboard/e")}
    assert inside - {"checkpoints/"} == set(named) - {
        "metrics.partial.json",
        "gallery.html",
    }  # of a run cut short, and of sounds
    assert main(["sample", "runs/demo", "-n", "2", "--out", "samples"]) == 0
    listed = re.findall(r"^\| (`.*`)(?:, \.\.\.)? \|[^|]*\|$", text.partition("## A folder of samples")[2], re.M)
    for name in re.findall(r"`([^`]+)`", " ".join(listed)):
        assert (beside_demo / "samples" / name).is_file(), name


EVERY = [pytest.param(page, block, id=f"{page.name}-{i}") for page in PAGES for i, block in enumerate(blocks(page))]
SHELL = [each for each in EVERY if each.values[1].language in ("sh", "bash")]
TOML = [each for each in EVERY if each.values[1].language == "toml"]
PYTHON = [each for each in EVERY if each.values[1].language == "python"]


@pytest.mark.parametrize(("page", "block"), SHELL)
def test_every_command_of_a_block_is_one(page: Path, block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Its subcommand, options and values are those that the command line takes."""
    for words in block.commands:
        if words[0] != "mtdiffusion" or words[-1] in ("--help", "--version"):
            continue
        end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
        try:
            _parser().parse_args(words[1:end])
        except SystemExit:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize(("page", "block"), TOML)
def test_every_table_of_a_configuration_is_one(page: Path, block: Block) -> None:
    """A block that shows a part of a configuration fits into one; packages' and benchmarks' tables have tests of their
    own."""
    table = tomllib.loads(block.text)
    if not set(table) & {attribute.name for attribute in Experiment.__attrs_attrs__} or "project" in table:
        assert set(table) & {"project", "build-system", "settings"}, page.name
        return
    whole = tomllib.loads((ROOT / "configs/digits-demo.toml").read_text())
    table["modalities"] = {**whole["modalities"], **table.get("modalities", {})}
    if "brightness" in table["modalities"]:  # the tutorial's own
        del table["modalities"]["brightness"]
    structure(Registry.discover(), {**whole, **table}, Experiment, page.name)


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_every_block_of_python_is_python(page: Path, block: Block) -> None:
    compile(block.text, str(page), "exec")
