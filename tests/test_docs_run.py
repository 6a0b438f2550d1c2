"""Every code block of the documents is done, page by page, in its order, as a reader would.

What runs is what the page says, with fewer samples and steps: see :func:`shortened`, :data:`LESS` and :data:`MORE`.
What takes long is left out where the page is followed fast, and done by ``make test-long``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distributions
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
from tests.pages import served

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"toml", "sh", "python", "text", "json", "bibtex"}
"""A tag for each language: what is written under another would be neither run nor looked at."""
FEW, STEPS = 24, 3

NOT_RUN = {
    "make ": "installs, or is what runs this",
    "pip install": "installs",
    "python3 -m venv": "installs",
    "source .venv/bin/activate": "of what was installed",
    "python -m build": "fetches what it builds with",
    "fresh/bin/mtdiffusion": "of what was installed",
    "benchmarks/gpu/pack.sh": "downloads wheels; tests/benchmarks/test_gpu.py packs without",
    "mtdiffusion push": "an account; tests/engine/test_hub.py has a hub of its own",
    "mtdiffusion bench reliability --docs": "writes into the clone; tests/reliability/test_reliability.py",
}
"""Commands that are not done here, by how they begin, and why. Those of mtdiffusion are parsed all the same."""
WHERE_INSTALLED = {"from datasets import": "datasets", "mtdiffusion data pack": "litdata"}
"""Blocks of libraries that no development needs, by how they begin: done where the library is installed."""
SLOW = re.compile(
    r"torchrun|benchmarks/gpu/run|mtdiffusion (play|plugins check (brightness|label)(?! --data)"
    r"|bench (plan|perf|curves|data|reading|reliability|topology|samples))"
)
"""Commands that take seconds even so."""
LESS = {
    r"training\.steps=\d+": f"training.steps={2 * STEPS}",
    r"step-\d{8}": f"step-{2 * STEPS:08}",
    r"-n 100000\b": f"-n {FEW}",
    r"--steps 200\b": f"--steps {STEPS}",
    r"--nproc_per_node 8": "--nproc_per_node 2",
    r"--nnodes 4": "--nnodes 1",
    r"HOST:29500": "localhost:0",
    r"digits/all/\*/0": "digits/all/class-conditional/0",
    r"/tmp/try": "try --only modalities",
}
"""What is done with less, or where there is one machine, by what of a command is replaced."""
CELL = "--set sampling.steps=2 evaluation.samples=8 evaluation.steps=2"
CELL += " evaluation.evaluators='[{kind=\"judge\",epochs=1}]'"
MORE = {
    r"mtdiffusion bench run \w+": CELL,
    r"mtdiffusion bench run small(?!.*--only)": "--only digits/image+label/joint/0",
    r"mtdiffusion bench run (?!.*training\.steps)": "--set training.steps=2",
    "mtdiffusion bench run smoke": "--only digits/all/joint/0",
    "mtdiffusion bench solvers": f"--samples 6 --reference {STEPS} --seeds 1 --steps 2",
    "mtdiffusion bench plan": "--rounds 1 --set backbone.channels=8 training.batch_size=8",
    "mtdiffusion bench perf": "--rounds 1 --without-memory",
    r"mtdiffusion bench perf(?!.*--only)": "--only loading",
    "mtdiffusion bench curves": "--steps 8 --batch 4",
    "mtdiffusion bench data": "--pictures 100",
    "mtdiffusion bench reading": "--pictures 100 --epochs 1",
    "mtdiffusion bench reliability": "--trials 1 --only 'training*'",
    "mtdiffusion bench topology": "--processes 2",
    "mtdiffusion bench samples": "-n 64 --shard-size 16 --compared 2",
    "torchrun": "--device cpu",
    "benchmarks/gpu/run.sh": "--device cpu --tiny",
}
"""Options that make a command small, by how it begins."""


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


def smaller(words: list[str]) -> list[str]:
    """A command with fewer samples and steps."""
    line = shlex.join(words)
    for pattern, less in LESS.items():
        line = re.sub(pattern, less, line)
    more = [options for start, options in MORE.items() if re.match(start, line)]
    return shlex.split(" ".join([line, *more]))


def do(words: list[str]) -> None:
    """Do what a command says, in the working directory."""
    if words[:2] == ["mtdiffusion", "play"]:
        (run,) = words[2:]
        with served(Path(run)) as address, urllib.request.urlopen(address) as page:
            assert page.status == 200
        return
    if words[0] == "mtdiffusion":
        assert main(words[1:]) == 0, shlex.join(words)
        return
    programs = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "git": ["git"], "cmp": ["cmp"]}
    if words[0] == "benchmarks/gpu/run.sh":  # works in its checkout, which is to stay as it is
        programs[words[0]] = [str(ROOT / words[0])]
        words = [words[0], str(Path(words[1]).absolute()), *words[2:]]
    assert words[0] in programs, f"{shlex.join(words)}: neither run nor left out"
    kit = {"PYTHON": sys.executable, "MTDIFFUSION_GPU_KIT": str(Path("kit").absolute())}
    environment = {**os.environ, **kit, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*programs[words[0]], *words[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-4000:]}"


def follow(page: Path, slow: bool = False, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Do what a page says, from above, in the working directory; what takes long, too, if ``slow``.

    Returns:
        The names that its Python has made, beside those of ``namespace``.
    """
    found = list(blocks(page))
    plots = any("plot" in words for block in found if block.language == "sh" for words in block.commands)
    namespace = {} if namespace is None else namespace
    tests: list[str] = []
    for block in found:
        if wanting(block):
            continue
        if block.language == "toml" and block.title:
            table = tomllib.loads(block.text)
            if "backbone" in table:
                table = shortened(table, sampling=not plots)
            Path(block.title).write_text(tomli_w.dumps(table))
        elif block.language == "python" and block.title:
            Path(block.title).write_text(block.text)
            tests += [block.title] * block.title.startswith("test_")
        elif block.language == "python":
            few = re.sub(r"count=\d+", f"count={FEW}", block.text)
            few = few.replace("range(len(data))", f"range({FEW})")
            few = re.sub(r"training\.steps=\d+", f"training.steps={STEPS}", few)
            exec(compile(few, str(page), "exec"), namespace)
        elif block.language == "sh":
            for words in block.commands:
                if not left_out(words) and (slow or not SLOW.match(" ".join(words))):
                    do(smaller(words))
    if tests:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", *tests]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return namespace


def left_out(words: list[str]) -> str | None:
    """Why a command is not done here; None: it is."""
    return next((why for start, why in NOT_RUN.items() if " ".join(words).startswith(start)), None)


def wanting(block: Block) -> str | None:
    """The library that a block needs and that is not installed here."""
    needs = (library for start, library in WHERE_INSTALLED.items() if block.text.lstrip().startswith(start))
    installed = {distribution.name for distribution in distributions()}  # a folder of that name on the path is not it
    return next((library for library in needs if library not in installed), None)


# --- what the pages take for granted ----------------------------------------------------------------------------------


def small_config(path: str, out: str, **data: object) -> None:
    """A configuration that ships, shortened."""
    table = shortened(tomllib.loads((ROOT / path).read_text()))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(tomli_w.dumps({**table, "data": {**table["data"], **data}}))


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` makes, of a few steps: five modalities, measured and drawn."""
    folder = tmp_path_factory.mktemp("demo")
    config = folder / "scenes-demo.toml"
    small_config("configs/scenes-demo.toml", str(config), count=FEW, test_count=FEW)
    assert main(["demo", "--config", str(config), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder / "run"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, from which Python imports; what it has imported is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def beside_demo(demo_run: Path, here: Path) -> Path:
    """A working directory with runs/demo and a mask of holes, the picture's size."""
    shutil.copytree(demo_run, here / "runs/demo")
    Image.fromarray(np.repeat(np.repeat(np.array([[0, 255]], np.uint8), 32, 0), 16, 1)).save(here / "holes.png")
    return here


def a_changed_clone() -> None:
    """A clone of a repository with a change that is not committed."""
    small_config("configs/digits-demo.toml", "configs/digits-demo.toml")
    for command in (
        "init -q",
        "config user.name reader",
        "config user.email reader@localhost",
        "add configs",
        "commit -q -m before",
    ):
        subprocess.run(["git", *command.split()], check=True)
    with Path("configs/digits-demo.toml").open("a") as file:
        file.write("# changed\n")


def brightness_beside_it() -> None:
    """The module of the page on plugins, not installed."""
    module = next(block for block in blocks(ROOT / "docs/plugins.md") if block.title == "mtdiffusion_brightness.py")
    Path(module.title).write_text(module.text)


def the_clones_configurations() -> None:
    """configs/, a folder of pictures and labels, where it was and where it has moved, and configurations of it."""
    shutil.copytree(ROOT / "configs", "configs")
    Path("mydata/image").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(FEW):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(f"mydata/image/{i:04}.png")
    Path("mydata/label.csv").write_text("stem,label\n" + "".join(f"{i:04},{i % 2}\n" for i in range(FEW)))
    shutil.copytree("mydata", "moved/mydata")
    text = """
data = { kind = "folder", root = "mydata", fields = { image = "image", label = "label" }, test_fraction = 0.25 }
latent = { height = 4, width = 4 }
modalities.image = { kind = "image", size = 16 }
modalities.label = { kind = "label", classes = 2 }
backbone = { kind = "unet", channels = 8, multipliers = [1] }
training = { steps = 2, batch_size = 4 }
sampling = { steps = 2 }
evaluation = { samples = 4, steps = 2 }
"""
    for name in ("mydata.toml", "other.toml", "CONFIG.toml"):
        Path(name).write_text(text)


def one_configuration() -> None:
    """configs/ and a configuration of the reader's."""
    shutil.copytree(ROOT / "configs", "configs")
    small_config("configs/digits-demo.toml", "CONFIG.toml")


def a_folder_of_data() -> None:
    """The folder that the page shows, and the configuration of which it shows a part."""
    data = next(blocks(ROOT / "docs/your-data.md", "toml"))
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


def a_measured_run() -> None:
    """configs/ and a run that a judge looks at, under the name that the page has for it."""
    shutil.copytree(ROOT / "configs", "configs")
    shutil.copytree("runs/demo", "RUN")


ALONE: dict[str, Callable[[], None] | None] = {
    **dict.fromkeys(f"docs/task-{name}.md" for name in ("image-mask", "masked-image", "image-label", "image-clip")),
    "docs/getting-started.md": None,
    "docs/benchmarks.md": None,
    "docs/reliability.md": None,
    "CONTRIBUTING.md": a_changed_clone,
    "docs/configuration.md": the_clones_configurations,
    "docs/scaling.md": one_configuration,
    "docs/your-data.md": a_folder_of_data,
}
"""Pages that are followed in a folder that is empty but for what is made before."""
AFTER_DEMO: dict[str, Callable[[], None] | None] = {
    "README.md": None,
    "docs/sampling.md": None,
    "docs/python.md": brightness_beside_it,
    "docs/sharing.md": None,
    "docs/play.md": None,
    "docs/performance.md": a_measured_run,
}
"""Pages that are followed where `make demo` was run."""
BY_THEMSELVES = ("docs/clocks.md", "docs/latent-diffusion.md", "docs/plugins.md")
"""Pages with a test of their own, below."""


def has_slow(name: str) -> bool:
    return any(SLOW.match(" ".join(words)) for block in blocks(ROOT / name, "sh") for words in block.commands)


def fast_and_slow(pages: Iterable[str]) -> list[Any]:
    """Each page, and each that has something slow with that, too."""
    slow = [pytest.param(name, True, marks=pytest.mark.long, id=f"{name}-slow") for name in pages if has_slow(name)]
    return [*(pytest.param(name, False, id=name) for name in pages), *slow]


@pytest.mark.parametrize(("name", "slow"), fast_and_slow(ALONE))
def test_a_page_can_be_followed_by_whoever_has_what_it_takes_for_granted(name: str, slow: bool, here: Path) -> None:
    if prepare := ALONE[name]:
        prepare()
    follow(ROOT / name, slow)


@pytest.mark.parametrize(("name", "slow"), fast_and_slow(AFTER_DEMO))
def test_a_page_can_be_followed_after_the_demo(name: str, slow: bool, beside_demo: Path) -> None:
    if prepare := AFTER_DEMO[name]:
        prepare()
    follow(ROOT / name, slow)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slow"), fast_and_slow(["docs/plugins.md"]))
def test_the_tutorial_for_plugins_can_be_followed(
    name: str, slow: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package is installed by pip, and so is that of a modality that samples badly."""
    page = ROOT / name
    package, site = here / "package", here / "site"
    package.mkdir()
    for block in blocks(page):
        if block.title in ("pyproject.toml", "mtdiffusion_brightness.py"):
            (package / block.title).write_text(block.text)
    # The build backend comes from the registry unless it is here.
    options = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *options]
    subprocess.run([*pip, "--target", site, package, ROOT / "examples/mtdiffusion-speech"], check=True)
    monkeypatch.syspath_prepend(site)
    from mtdiffusion_speech.spectrogram import write_wav

    recordings = here / "data/fsdd/recordings"
    recordings.mkdir(parents=True)
    time = torch.arange(4000) / 8000
    for digit in range(10):
        for number in (0, 5, 17):
            tone = 0.3 * torch.sin(2 * torch.pi * (300 + 200 * digit + number) * time)
            write_wav(tone, recordings / f"{digit}_reader_{number}.wav", 8000)
    small_config("examples/speech.toml", "speech.toml")
    assert main(["train", "speech.toml", "--out", "runs/speech", "--device", "cpu"]) == 0
    torch.manual_seed(0)
    made = follow(page, slow)

    from mtdiffusion_brightness import BrightnessConfig

    assert made["x"].mean().item() == pytest.approx(BrightnessConfig().mean, abs=0.01)
    assert made["x"].std().item() == pytest.approx(BrightnessConfig().std, abs=0.01)
    sounds = {0: torch.zeros(3, 4), 1: torch.arange(12.0).reshape(3, 4)}
    data = made["Pairs"](torch.zeros(2, 1, 8, 8), [0, 1], sounds)
    assert torch.equal(data[1]["sound"], sounds[1][0])
    assert len({tuple(data.varied(1, seed)["sound"].tolist()) for seed in range(20)}) == 3
    assert made["frechet_distance"](made["real"], made["generated"]) == pytest.approx(2, abs=1)


def test_latents_are_drawn_as_pictures_and_back(here: Path) -> None:
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
    run = load_run("runs/latents", device="cpu")
    made = follow(ROOT / "docs/latent-diffusion.md", namespace={"run": run})
    assert made["pictures"].shape == (16, 3, 16, 16)
    assert made["latents"].shape == made["out"]["image"].shape


def test_clocks_can_be_followed_and_draws_its_pictures(here: Path) -> None:
    follow(ROOT / "docs/clocks.md")
    drawn = sorted(path.name for path in here.glob("*.png"))
    assert drawn == sorted(re.findall(r"\]\(images/([\w-]+\.png)\)", (ROOT / "docs/clocks.md").read_text()))
    for name in drawn:
        made, shown = (Image.open(at).convert("RGB") for at in (here / name, ROOT / "docs/images" / name))
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
        "metrics-before.json",
        "metrics-damaged.json",
        "gallery.html",
    }  # of a run cut short, of one measured again in part, of one that is damaged, and of sounds
    assert main(["sample", "runs/demo", "-n", "2", "--out", "samples"]) == 0
    listed = re.findall(r"^\| (`.*`)(?:, \.\.\.)? \|[^|]*\|$", text.partition("## A folder of samples")[2], re.M)
    for name in re.findall(r"`([^`]+)`", " ".join(listed)):
        assert (beside_demo / "samples" / name).is_file(), name


EVERY = [pytest.param(page, block, id=f"{page.name}-{i}") for page in PAGES for i, block in enumerate(blocks(page))]
SHELL = [each for each in EVERY if each.values[1].language == "sh"]
TOML = [each for each in EVERY if each.values[1].language == "toml"]
PYTHON = [each for each in EVERY if each.values[1].language == "python"]


def test_no_page_with_commands_or_python_escapes() -> None:
    followed = [*ALONE, *AFTER_DEMO, *BY_THEMSELVES]
    assert len(followed) == len(set(followed))
    assert {each.values[0].relative_to(ROOT).as_posix() for each in (*SHELL, *PYTHON)} == set(followed)


@pytest.mark.parametrize(("page", "block"), EVERY)
def test_no_block_escapes(page: Path, block: Block) -> None:
    """No code is hidden under a tag that nothing runs."""
    assert block.language in LANGUAGES, f"{page.name}: a block of {block.language!r}; expected one of {LANGUAGES}"
    if block.language == "text":
        assert not re.search(r"^(?:from \w+ import|import \w+|\w+ = \w+[.(]|mtdiffusion \w)", block.text, re.M), (
            page.name
        )


def test_what_is_listed_is_in_a_page() -> None:
    """Nothing is left out, made smaller or put off that is not there, and tests that reasons name are."""
    commands = [" ".join(words) for each in SHELL for words in each.values[1].commands]
    texts = [each.values[1].text.lstrip() for each in (*SHELL, *PYTHON)]
    for start, why in NOT_RUN.items():
        assert any(command.startswith(start) for command in commands), start
        for test in re.findall(r"tests/\S+\.py", why):
            assert (ROOT / test).exists(), test
    for start in WHERE_INSTALLED:
        assert any(text.startswith(start) for text in texts), start
    for pattern in LESS:
        assert any(re.search(pattern, command) for command in commands), pattern
    for pattern in MORE:
        assert any(re.match(pattern, command) for command in commands), pattern


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
