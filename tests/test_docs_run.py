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
import torch
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
PLAN = ["mtdiffusion", "plan"]
LANGUAGES = {"toml", "sh", "python", "text", "json", "bibtex"}
"""A tag for each language: what is written under another would be neither run nor looked at."""
FOLLOWED = {*(f"docs/{name}.md" for name in (*FROM_NOTHING, "clocks")), *AFTER_DEMO}
PARSED_ONLY = {
    "CONTRIBUTING.md": {"make setup": "installs", "git stash": "of a clone that is changed"},
    "docs/benchmarks.md": {
        "mtdiffusion bench list": "hours; tests/benchmarks/test_bench.py has each of them",
        "benchmarks/gpu/run.sh": "a GPU; tests/benchmarks/test_gpu.py",
        "benchmarks/gpu/pack.sh": "downloads wheels",
    },
    "docs/configuration.md": {
        "mtdiffusion train configs/digits-demo.toml": "minutes; tests/test_cli.py trains with --set",
        "mtdiffusion train first.toml": "runs of other pages; tests/engine/test_sessions.py has each of them",
        "mtdiffusion data pack": "a configuration of the reader's; tests/plugins/datasets has it",
    },
    "docs/latent-diffusion.md": {
        "pip install": "installs",
        "out = run.sample": "test_latents_are_drawn_as_pictures_and_back",
    },
    "docs/performance.md": {"mtdiffusion bench": "measures for minutes; tests/benchmarks"},
    "docs/play.md": {"pip install": "installs, and serves until Ctrl-C; tests/engine/test_play.py"},
    "docs/plugins.md": {
        '"""A modality of one real number': "tests/test_docs.py runs it",
        "import torch\nfrom mtdiffusion_brightness": "tests/test_docs.py runs it",
        "import torch\n\nfrom mtdiffusion_registry": "tests/test_docs.py runs it",
        "from mtdiffusion_registry.testing import conformance": "tests/registry/test_conformance.py has it",
        "mtdiffusion plugins check": "the reader's packages; tests/registry/test_conformance_product.py",
        "mtdiffusion evaluate": "an example's run; tests/test_examples.py trains it",
        "mtdiffusion train speech.toml": "an example's run; tests/test_examples.py trains it",
        "import torch\nfrom torch import Tensor": "test_classes_and_measures_of_the_tutorial_for_plugins_run",
        "import torch\n\nfrom mtdiffusion_plugins.metrics": "test_classes_and_measures_of_the_tutorial_for_plugins_run",
        "pip install": "installs",
    },
    "docs/python.md": {"from mtdiffusion_registry import Registry\n\nregistry": "a class of the reader's"},
    "docs/sampling.md": {"from datasets import": "a library that is no part of the tests"},
    "docs/reliability.md": {"mtdiffusion bench": "minutes to hours; tests/reliability"},
    "docs/scaling.md": {
        "mtdiffusion bench plan": "trains for minutes; tests/benchmarks/test_planning.py",
        "torchrun": "several GPUs or machines; tests/engine/test_launchers.py",
        "mtdiffusion plan": "test_a_plan_is_made_as_the_page_says",
    },
    "docs/your-data.md": {"mtdiffusion config check": "test_a_folder_is_checked_as_the_page_says"},
}
"""Blocks of commands and Python that are parsed or compiled and not done here, by how they begin, and why."""


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


def blocks(page: Path, only: str = "") -> Iterator[Block]:
    """The blocks of a page, of one language or of all."""
    for indent, language, title, text in re.findall(
        r'^( *)```([^\s`]*)(?: title="([^"]+)")?[^\n]*\n(.*?)^ *```$', page.read_text(), re.M | re.S
    ):
        if only in ("", language):
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
        if kept_back(page, block):
            continue
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
                few = [str(FEW) if word == "100000" else word for word in few]
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


def test_a_folder_is_checked_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/your-data.md"
    data, command = (next(blocks(page, language)) for language in ("toml", "sh"))
    rng = np.random.default_rng(0)
    for split, names in (("train", ("0001", "0002")), ("test", ("9001",))):
        for field in ("image", "mask"):
            Path(f"mydata/{split}/{field}").mkdir(parents=True)
        Path(f"mydata/{split}/label.csv").write_text(
            "stem,label\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names))
        )
        for name in names:
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(f"mydata/{split}/image/{name}.jpg")
            Image.fromarray(rng.integers(0, 2, (60, 80), np.uint8)).save(f"mydata/{split}/mask/{name}.png")
    model = """
latent = { height = 12, width = 16 }
modalities.image = { kind = "image", size = [48, 64] }
modalities.mask = { kind = "mask", size = [48, 64], classes = 2 }
modalities.label = { kind = "label", classes = 2 }
backbone = { kind = "unet", channels = 8, multipliers = [1] }
"""
    Path("mydata.toml").write_text(model + data.text)
    (words,) = command.commands
    assert main(words[1:]) == 0


def test_a_plan_is_made_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "configs/digits-demo.toml", "CONFIG.toml")
    plans = [words for b in blocks(ROOT / "docs/scaling.md", "sh") for words in b.commands if words[:2] == PLAN]
    assert plans
    for words in plans:
        assert main(words[1:]) == 0


def test_classes_and_measures_of_the_tutorial_for_plugins_run(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, _, pairs, _, distance = blocks(ROOT / "docs/plugins.md", "python")
    namespace: dict[str, Any] = {}
    exec(pairs.text, namespace)
    sounds = {0: torch.zeros(3, 4), 1: torch.arange(12.0).reshape(3, 4)}
    data = namespace["Pairs"](torch.zeros(2, 1, 8, 8), [0, 1], sounds)
    assert torch.equal(data[1]["sound"], sounds[1][0])
    assert len({tuple(data.varied(1, seed)["sound"].tolist()) for seed in range(20)}) == 3
    torch.manual_seed(0)
    exec(distance.text, {})
    assert float(capsys.readouterr().out) == pytest.approx(2, abs=1)


def test_latents_are_drawn_as_pictures_and_back(beside_demo: Path) -> None:
    """By an autoencoder of diffusers' own class, tiny and untrained."""
    pytest.importorskip("diffusers")
    from mtdiffusion_engine import load_run
    from tests.plugins.tiny_autoencoders import untrained

    untrained("AutoencoderTiny").save_pretrained("autoencoder")
    Path("latents.toml").write_text(
        """
data = { kind = "shapes", size = 16, count = 16, test_count = 8 }
latent = { height = 4, width = 4 }
modalities.image = { kind = "latent_image", size = 16, autoencoder = "autoencoder", normalisation = "data" }
modalities.label = { kind = "label", classes = 8 }
backbone = { kind = "unet", channels = 8, multipliers = [1] }
training = { steps = 2, batch_size = 4 }
sampling = { steps = 2 }
"""
    )
    assert main(["train", "latents.toml", "--out", "runs/latents", "--device", "cpu"]) == 0
    (block,) = blocks(ROOT / "docs/latent-diffusion.md", "python")
    namespace: dict[str, Any] = {"run": load_run("runs/latents", device="cpu")}
    exec(compile(block.text, "latent-diffusion.md", "exec"), namespace)
    assert namespace["pictures"].shape == (16, 3, 16, 16)
    assert namespace["latents"].shape == namespace["out"]["image"].shape


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


def kept_back(page: Path, block: Block) -> str | None:
    """Why a block is not done here; None: it is."""
    reasons = PARSED_ONLY.get(page.relative_to(ROOT).as_posix(), {})
    return next((why for start, why in reasons.items() if block.text.lstrip().startswith(start)), None)


@pytest.mark.parametrize(("page", "block"), EVERY)
def test_no_block_escapes(page: Path, block: Block) -> None:
    """It is followed with its page, run by a test of its own, or listed with the reason why it is not run."""
    assert block.language in LANGUAGES, f"{page.name}: a block of {block.language!r}; expected one of {LANGUAGES}"
    if block.language in ("sh", "python"):
        runs = page.relative_to(ROOT).as_posix() in FOLLOWED
        assert runs or kept_back(page, block), f"{page.name}: neither run nor listed:\n{block.text}"
    if block.language == "text":
        assert not re.search(r"^(?:from \w+ import|import \w+|\w+ = \w+[.(]|mtdiffusion \w)", block.text, re.M), (
            page.name
        )


def test_what_is_listed_as_not_run_is_there() -> None:
    for name, reasons in PARSED_ONLY.items():
        texts = [block.text.lstrip() for block in blocks(ROOT / name) if block.language in ("sh", "python")]
        for start, why in reasons.items():
            assert any(text.startswith(start) for text in texts), f"{name}: {start!r}"
            for test in re.findall(r"tests/\S+|test_\w+", why):
                there = (ROOT / test).exists() if "/" in test else test in globals()
                assert there, f"{name}: {start!r}: {test}"


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
