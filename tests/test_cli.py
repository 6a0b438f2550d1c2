"""The command line: what it does, and what it says when something is wrong."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import frozen
from PIL import Image
from safetensors.torch import load_file

from mtdiffusion.sampler import SOLVERS as CORE_SOLVERS
from mtdiffusion_benchmarks.profile import shipped
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine import load_run
from mtdiffusion_engine.cli import SHELLS, SOLVERS, main
from mtdiffusion_engine.monitor import Monitor
from mtdiffusion_engine.trainer import Progress
from tests.engine.tiny import CONFIG
from tests.registry.fake_distributions import Install, clean_environment, install

__all__ = ["clean_environment", "install"]


@frozen
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one message of a command that could not be done."""
        assert self.code == 2, self
        assert "Traceback" not in self.err + self.out
        assert self.err.count("mtdiffusion: error: ") == 1, self.err
        return self.err.partition("mtdiffusion: error: ")[2].rstrip("\n")


Cli = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object) -> Result:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse
            assert isinstance(exit_.code, int)
            code = exit_.code
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """An 8-bit picture of 8 × 8 whose left half is white."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 255
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A run that a test may change."""
    return shutil.copytree(tiny_run, tmp_path / "copy")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# --- quick and light --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plugins", "list"], ["sample", "--help"]])
def test_it_answers_within_0_3_seconds_and_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from mtdiffusion_engine.cli import main
try:
    code = main({arguments})
except SystemExit as exit_:
    code = exit_.code
heavy = {{"torch", "numpy", "rich", "accelerate", "mtdiffusion", "mtdiffusion_plugins"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    seconds = []
    for _ in range(3):
        # Processor time: what else the machine does must not fail this test.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "mtdiffusion" in done.stdout
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3


def test_the_installed_command_works() -> None:
    command = Path(sys.executable).with_name("mtdiffusion")
    done = subprocess.run([command, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "mtdiffusion"]
    done = subprocess.run([*command, "plugins", "list"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == subprocess.run(
            [Path(sys.executable).with_name("mtdiffusion"), "plugins", "list"], capture_output=True, text=True
        ).stdout
    )
    done = subprocess.run([*command, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "mtdiffusion: error: " in done.stderr


INTERRUPTED = """
import signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off for what runs in the background

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""
"""Ctrl-C as a module is imported."""


@pytest.mark.parametrize(
    ("module", "start"),
    [
        ("mtdiffusion_engine.cli", ["-m", "mtdiffusion"]),
        ("mtdiffusion_engine.cli", ["-c", "SCRIPT"]),
        ("argparse", ["-c", "SCRIPT"]),
        pytest.param("torch", ["-c", "SCRIPT"], marks=pytest.mark.long),
    ],
)
def test_ctrl_c_while_the_command_is_imported_leaves_no_traceback(
    tmp_path: Path, tiny_config: Path, module: str, start: list[str]
) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    script = project["scripts"]["mtdiffusion"]
    place, name = script.split(":")
    # As pip writes it, whichever was installed before.
    start = [each.replace("SCRIPT", f"import sys; from {place} import {name}; sys.exit({name}())") for each in start]
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED.replace("MODULE", module))
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, *start, "config", "check", tiny_config]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "mtdiffusion: interrupted\n")


def test_a_reader_that_stops_reading_is_no_error() -> None:
    command = Path(sys.executable).with_name("mtdiffusion")
    done = subprocess.run(
        f"{command} plugins list | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        capture_output=True,
        text=True,
        executable="/bin/bash",
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "GROUP" in done.stdout


def test_no_command_shows_the_help(cli: Cli) -> None:
    result = cli()
    assert result.code == 0
    assert result.out.startswith("usage: mtdiffusion")


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "gallery", "demo", "export", "push", "play"])
def test_settings_that_a_command_takes_are_in_its_help(cli: Cli, command: str) -> None:
    assert "--set KEY=VALUE" in cli(command, "--help").out


def test_the_solvers_are_those_of_the_sampler() -> None:
    assert set(SOLVERS) == set(CORE_SOLVERS)


# --- plugins list -----------------------------------------------------------------------------------------------------


def test_plugins_are_listed_with_their_owners(cli: Cli, install: Install) -> None:
    module = install("raise RuntimeError('imported')", distribution="toy-plugin", version="1.5")
    rows = [line.split() for line in cli("plugins", "list").out.splitlines()]
    assert rows[0] == ["GROUP", "KIND", "DISTRIBUTION", "VERSION", "STATUS"]
    assert ["dataset", "toy", "toy-plugin", "1.5", "ok"] in rows
    assert [row[:3] + row[4:] for row in rows].count(["modality", "image", "mtdiffusion", "ok"]) == 1
    assert module not in sys.modules


def test_what_cannot_be_used_is_listed_with_the_reason(cli: Cli, install: Install) -> None:
    install(distribution="first")
    install(distribution="second")
    install(names=("datset.other",), distribution="third")
    out = cli("plugins", "list").out
    assert "dataset.toy of first 1.0: conflict: also declared by second 1.0" in out
    assert 'datset.other of third 1.0: broken: must be named GROUP.KIND; unknown group "datset"; did you mean' in out


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_writes_a_run(tiny_run: Path) -> None:
    assert [path.name for path in ckpt.list_checkpoints(tiny_run)] == ["step-00000008", "step-00000010"]
    run = load_run(tiny_run)
    assert (run.experiment.training.steps, run.experiment.training.ema) == (10, 0.998)
    assert "ema = 0.998" in (tiny_run / "config.toml").read_text()  # every default is written out


def test_train_shows_its_progress(cli: Cli, tiny_config: Path, tmp_path: Path) -> None:
    overrides = ("--set", "training.steps=3", "training.warmup=1", "--set", "process.curve=linear")
    result = cli("train", tiny_config, "--out", tmp_path / "run", "--device", "cpu", *overrides)
    assert result.code == 0
    assert result.out == f"trained: {tmp_path / 'run'}\n"
    assert "step 3/3" in result.err
    experiment = load_run(tmp_path / "run").experiment
    assert (experiment.training.warmup, experiment.process.curve) == (1, "linear")


def test_train_says_what_it_is_about_to_do(cli: Cli, tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--device", "cpu", "--set", "training.steps=1", "training.accumulate=2")
    lines = cli("train", tiny_config, "--out", run, *options).err.splitlines()
    parameters = sum(p.numel() for p in load_run(run).model.parameters()) / 1e6
    assert lines[:3] == [
        f"1,437 training samples; {parameters:.3g} million parameters",
        "on cpu, 1 process: 1 step of 8 samples (4 samples × 2 micro-batches)",
        f"the run is written to {run}",
    ]


def test_a_job_script_starts_and_resumes_with_one_command(cli: Cli, tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    command = ("train", tiny_config, "--out", run, "--resume", "--device", "cpu", "--set", "training.steps=2")
    first = cli(*command)
    assert first.code == 0, first.err
    assert "resuming" not in first.err
    again = cli(*command)
    assert again.code == 0
    assert "all 2 steps are trained already" in again.err
    assert f"mtdiffusion train --resume --out {run} --set training.steps=4" in again.err
    longer = cli("train", "--resume", "--out", run, "--device", "cpu", "--set", "training.steps=4")
    assert "changed since the last session: training.steps from 2 to 4" in longer.err
    assert "resuming at step 2 of 4" in longer.err
    assert ckpt.require_run(run).name == "step-00000004"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    error = cli("train", tiny_config, "--out", tmp_path / "mine", "--resume", "--device", "cpu").error
    assert "already exists; nothing was written" in error


def test_train_starts_from_another_run(cli: Cli, tiny_config: Path, tiny_run: Path, tmp_path: Path) -> None:
    options = ("--init-from", tiny_run, "--device", "cpu", "--set", "training.steps=1", "training.learning_rate=1e-9")
    error = cli("train", tiny_config, "--out", tmp_path / "run", *options, "backbone.vector=8").error
    assert "these weights do not fit this configuration (" in error
    assert list(tmp_path.iterdir()) == []
    assert cli("train", tiny_config, "--out", tmp_path / "run", *options).code == 0
    before, after = (load_file(ckpt.require_run(run) / "ema.safetensors") for run in (tiny_run, tmp_path / "run"))
    assert all(torch.allclose(x, after[key], atol=1e-6) for key, x in before.items())


@pytest.mark.parametrize("begun", [False, True])
def test_sigterm_before_the_first_step_leaves_nothing_new(
    cli: Cli, tiny_config: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.setattr(Monitor, "__enter__", lambda _: signal.raise_signal(signal.SIGTERM))
    run = copy if begun else tmp_path / "run"
    command = ("train", "--resume") if begun else ("train", tiny_config)
    result = cli(*command, "--out", run, "--device", "cpu")
    assert result.code == 143
    assert "Traceback" not in result.err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if begun:
        assert "the checkpoint of step 10 is saved" in result.err
        assert ckpt.require_run(run).name == "step-00000010"
    else:
        assert f"stopped before the first step; nothing is left in {run}" in result.err
        assert not run.exists()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(
    cli: Cli,
    tiny_config: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    run = tmp_path / "run"
    shown = Monitor.progress

    def interrupt(self: Monitor, progress: Progress) -> None:
        shown(self, progress)
        if progress.step == 6:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "progress", interrupt)
        result = cli("train", tiny_config, "--out", run, "--device", "cpu")
    assert result.code == status
    assert "Traceback" not in result.err
    assert "stopped; the checkpoint of step 6 is saved" in result.err
    assert f"Continue with: mtdiffusion train --resume --out {run}" in result.err
    result = cli("train", "--resume", "--out", run, "--device", "cpu")
    assert result.code == 0
    assert "resuming at step 6 of 10" in result.err
    for name in ("model", "ema", "optimizer"):
        whole, resumed = (load_file(ckpt.require_run(folder) / f"{name}.safetensors") for folder in (tiny_run, run))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainning.steps=5", 'unknown key "trainning"; did you mean "training"?'),
        ("training.stepz=5", 'training: unknown key "stepz"; did you mean "steps"?'),
        ("modalities.image.chanels=1", 'modalities.image: unknown key "chanels"; did you mean "channels"?'),
        ("modalities.image.kind=imagee", 'there is no modality of kind "imagee"; did you mean "image"?'),
        ("backbone.kind=unett", 'there is no backbone of kind "unett"; did you mean "unet"?'),
        ("data.kind=digit", 'there is no dataset of kind "digit"; did you mean "digits"?'),
        ("training.steps=many", 'training.steps: found "many" (str), expected an integer'),
        ("training.steps=1.5", "training.steps: found 1.5 (float), expected an integer"),
        ("training.batch_size=0", "training.batch_size: 'batch_size' must be >= 1: 0"),
        ("training.ema=1.5", "training.ema: 'ema' must be <= 1.0: 1.5"),
        ("training.precision=float16", "training.precision: found"),
        ("process.curve=cosin", "process.curve"),
        ("latent=8", "latent: found 8 (int), expected a table"),
        ("modalities={}", "modalities"),
        ('modalities.a-b={kind="label", classes=2}', "'a-b' cannot name a modality"),
        ("conditioning.subsets={lable=1.0}", "conditioning.subsets: no modality named lable"),
        (
            'conditioning.subsets={label=1.0, "label+image+mask"=2.0}',
            "conditioning.subsets: 'label+image+mask' shows all modalities whole, which leaves nothing to denoise; "
            "expected subsets that lack one at least. Remove it",
        ),
        ("loss.readout={lable=0.5}", "loss.readout: no modality named lable"),
        ("loss.readout={label=1.5}", "loss.readout: 'readout': expected a share in [0, 1], found 1.5"),
        ("modalities.image.size=9", "modalities.image: image: size 9 does not fit a latent of 8 × 8"),
        (
            "modalities.image.channels=3",
            "'image': image: expected shape [batch, 3, 8, 8], found [1, 1, 8, 8]; set channels = 1 of the modality",
        ),
        ("modalities.label.classes=5", "'label': label of 5 classes: expected values from 0 to 4, found 5"),
        ('modalities.depth={kind="mask", size=8}', "no sample has the field 'depth' that modality 'depth' reads"),
        ("training", 'override "training": expected KEY=VALUE'),
        ("training.steps.many=1", "training.steps is not a table"),
    ],
)
def test_a_configuration_that_is_wrong(
    cli: Cli, tiny_config: Path, tmp_path: Path, override: str, message: str
) -> None:
    run = tmp_path / "run"
    assert message in cli("train", tiny_config, "--out", run, "--device", "cpu", "--set", override).error
    assert not run.exists()


def test_a_configuration_that_cannot_be_read(cli: Cli, tiny_config: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "run", tmp_path / "broken.toml"
    assert "there is no such file" in cli("train", path, "--out", run).error
    path.write_text(CONFIG[: len(CONFIG) // 2] + "[")
    assert 'did you mean "broken.toml"?' in cli("train", tmp_path / "brken.toml", "--out", run).error
    assert f"{path}: not TOML: " in cli("train", path, "--out", run).error
    path.write_bytes(b"\xff\xfe")
    assert f"{path}: is UTF-16; save it as UTF-8" in cli("train", path, "--out", run).error
    path.write_bytes(b"\xff")
    assert f"{path}: not UTF-8" in cli("train", path, "--out", run).error
    path.write_text("")
    assert f'{path}: missing key "data"' in cli("train", path, "--out", run).error
    assert "expected a TOML file, found a directory" in cli("train", tmp_path, "--out", run).error
    assert "which configuration?" in cli("train", "--out", run).error
    assert "nothing to resume here" in cli("train", "--resume", "--out", run).error
    assert not run.exists()


def test_a_run_folder_that_exists_stays_as_it_is(cli: Cli, tiny_config: Path, copy: Path) -> None:
    before = contents(copy)
    error = cli("train", tiny_config, "--out", copy).error
    assert "already exists; nothing was written. It holds a run of " in error
    assert f"To go on with it: mtdiffusion train --resume --out {copy}." in error
    error = cli("train", tiny_config, "--out", copy, "--resume", "--set", "training.seed=1").error
    assert "holds another experiment (training.seed is 0, asked for 1)" in error
    assert contents(copy) == before


def test_damaged_checkpoints_are_not_resumed(cli: Cli, copy: Path) -> None:
    for name in ("optimizer.safetensors", "model.safetensors", "state.json"):
        path = ckpt.require_run(copy) / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        error = cli("train", "--resume", "--out", copy, "--device", "cpu").error
        assert str(path) in error
        assert "remove that checkpoint to fall back on the one before" in error
        path.write_bytes(whole)


NAN_PLUGIN = """
from typing import ClassVar
import torch
from attrs import frozen
from mtdiffusion import Dataset
from mtdiffusion_registry import DatasetConfig, hookimpl

MTDIFFUSION_API = 1

class Data(Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        image = torch.zeros(1, 8, 8)
        if index == 39:
            image[0, 3, 3] = torch.nan
        return {"image": image, "mask": torch.zeros(8, 8).long(), "label": torch.tensor(0)}

@frozen
class Toy(DatasetConfig):
    kind: ClassVar[str] = "toy"
    def build(self, split):
        return Data()

@hookimpl
def mtdiffusion_datasets():
    return [Toy]
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_nan_in_a_batch(cli: Cli, install: Install, tiny_config: Path, tmp_path: Path, workers: int) -> None:
    install(NAN_PLUGIN)
    overrides = ("--set", "data.kind=toy", f"training.workers={workers}", "training.checkpoint_every=0")
    error = cli("train", tiny_config, "--out", tmp_path / "run", "--device", "cpu", *overrides).error
    for split in ("train", "test"):
        assert f"- data ({split}): sample 39: modality 'image': image: expected finite values, found NaN or" in error


def test_a_plugin_that_fails_to_import(cli: Cli, install: Install, tiny_config: Path, tmp_path: Path) -> None:
    module = install("import nonsense_that_is_not_there", distribution="toy-plugin", version="1.5")
    arguments = ("train", tiny_config, "--out", tmp_path / "run", "--device", "cpu", "--set")
    error = cli(*arguments, "data.kind=toy").error
    assert f"plugin dataset.toy of toy-plugin 1.5 (module {module}): its import failed: ModuleNotFoundError" in error
    assert not (tmp_path / "run").exists()
    assert cli(*arguments, "training.steps=1").code == 0  # it is in nobody else's way


def test_two_plugins_of_one_name(cli: Cli, install: Install, tiny_config: Path, tmp_path: Path) -> None:
    install(distribution="first")
    install(distribution="second", names=("dataset.toy", "modality.image"))
    arguments = ("train", tiny_config, "--out", tmp_path / "run", "--set")
    error = cli(*arguments, "data.kind=toy").error
    assert "dataset.toy is declared by more than one plugin: second 1.0" in error
    assert "first 1.0" in error
    assert "modality.image is declared by more than one plugin" in cli(*arguments, "training.steps=1").error
    assert not (tmp_path / "run").exists()


# --- sample -----------------------------------------------------------------------------------------------------------


def test_sample_writes_what_suits_each_modality(cli: Cli, tiny_run: Path, tmp_path: Path, picture: Path) -> None:
    out = tmp_path / "deep" / "out"
    options = ("--observe", "label=3", "--observe", f"image={picture}", "--visible", f"image={picture}")
    options += ("--steps", 2, "--solver", "ddim", "--eta", 0.5, "--guidance", 2, "--draw", "--seed", 4)
    options += ("--guidance-interval", 0.25, 1)
    result = cli("sample", tiny_run, "-n", 3, *options, "--out", out, "--device", "cpu")
    assert result.code == 0, result.err
    assert str(out / "samples.png") in result.out
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    stems = ("0000", "0001", "0002")
    assert files == sorted(
        [f"{name}/{stem}.png" for name in ("image", "mask") for stem in stems]
        + ["label.csv", "request.json", "samples.png"]
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "label.csv").read_text() == "stem,value,name\n0000,3,3\n0001,3,3\n0002,3,3\n"
    for stem in stems:
        assert (np.asarray(Image.open(out / "image" / f"{stem}.png"))[:, :4] == 255).all()
    assert json.loads((out / "request.json").read_text()) == {
        "run": str(tiny_run),
        "checkpoint": "step-00000010",
        "version": version("mtdiffusion"),
        "n": 3,
        "observed": {"label": "3", "image": str(picture)},
        "visible": {"image": str(picture)},
        "strength": {},
        "generated": ["image", "mask"],
        "settings": {
            "steps": 2,
            "solver": "ddim",
            "eta": 0.5,
            "guidance": 2.0,
            "guidance_interval": [0.25, 1.0],
            "path": None,
            "conditioning": "observed",
            "draw": True,
            "compile": False,
            "precision": "float32",
        },
        "seed": 4,
        "batch_size": 256,
        "device": "cpu",
    }
    # The same request from Python gives what was written.
    observed = {"label": 3, "image": load_run(tiny_run).modality("image").parse(str(picture))}
    samples = load_run(tiny_run, device="cpu").sample(
        3,
        observed=observed,
        visible={"image": (observed["image"][0] > 0).float()},
        steps=2, solver="ddim", eta=0.5, guidance=2.0, guidance_interval=(0.25, 1.0), draw=True, seed=4,
    )  # fmt: skip
    for i, stem in enumerate(stems):
        assert np.array_equal(np.asarray(Image.open(out / "mask" / f"{stem}.png")), samples["mask"][i].numpy())


def test_sample_starts_from_something_observed_and_goes_along_a_path(
    cli: Cli, tiny_run: Path, tmp_path: Path, picture: Path
) -> None:
    options = ("--observe", f"image={picture}", "--strength", "image=0.5", "--path", "label=0.6,mask=0.3", "--steps", 4)
    assert cli("sample", tiny_run, "-n", 2, *options, "--out", tmp_path / "out", "--device", "cpu").code == 0
    request = json.loads((tmp_path / "out" / "request.json").read_text())
    assert (request["strength"], request["settings"]["path"]) == ({"image": 0.5}, {"label": 0.6, "mask": 0.3})
    assert request["generated"] == ["image", "mask", "label"]  # what one starts from does not stay
    run = load_run(tiny_run, device="cpu")
    samples = run.sample(
        2,
        observed={"image": run.modality("image").parse(str(picture))},
        strength={"image": 0.5},
        path={"label": 0.6, "mask": 0.3},
        steps=4,
    )
    for i in range(2):
        written = np.asarray(Image.open(tmp_path / "out" / "mask" / f"000{i}.png"))
        assert np.array_equal(written, samples["mask"][i].numpy())


def test_several_values_take_turns(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("sample", tiny_run, "-n", 5, "--observe", "label=3, 7", "--out", out).code == 0
    given = [line.split(",")[1] for line in (out / "label.csv").read_text().splitlines()[1:]]
    assert given == ["3", "7", "3", "7", "3"]
    for form in ((), ("--shards", "tar")):
        more = ("-n", 2, "--observe", "label=3,5,7", "--out", tmp_path / "more")
        error = cli("sample", tiny_run, *more, *form).error
        assert error.startswith("observed label: 3 values take turns, and there are only 2 samples, so that some would")
        assert error.endswith("ask for 3 samples or more (-n 3), or give fewer values")
    assert not (tmp_path / "more").exists()
    for asked, found in (("3,eleven", "eleven"), ("ten,eleven", "ten,eleven"), ("3,", "")):
        error = cli("sample", tiny_run, "--observe", f"label={asked}", "--out", tmp_path / "none").error
        assert f"label={asked}: label: expected a class from 0 to 9, found '{found}'" in error


def test_sample_generates_only_what_is_asked_for(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder will do
    result = cli("sample", tiny_run, "-n", 1, "--observe", "label=3", "--generate", "mask", "--out", out)
    assert result.code == 0
    assert sorted(path.name for path in out.iterdir()) == ["label.csv", "mask", "request.json", "samples.png"]


@pytest.mark.parametrize("command", [("sample", "-n", 1, "--out", "out"), ("evaluate",), ("gallery",)])
def test_a_run_is_used_with_other_data_and_settings_but_not_with_another_model(
    cli: Cli, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = command
    before = contents(copy)
    error = cli(name, copy, *options, "--device", "cpu", "--set", "training.seed=1", "data.seed=3").error
    assert "(training.seed is 0, asked for 1)" in error and "data.seed" not in error
    assert contents(copy) == before and not (tmp_path / "out").exists()
    asked = ("data.seed=3", "sampling.steps=2", "evaluation.samples=4", "evaluation.steps=1")
    result = cli(name, copy, *options, "--device", "cpu", "--set", *asked)
    assert result.code == 0, result.err
    assert (copy / "config.toml").read_bytes() == before[str(copy / "config.toml")]
    if name == "sample":
        assert json.loads((tmp_path / "out" / "request.json").read_text())["settings"]["steps"] == 2
    if name == "evaluate":
        assert json.loads((copy / "metrics.json").read_text())["label|image/samples"] == 4


def test_an_output_folder_that_exists_stays_as_it_is(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("sample", tiny_run, "-n", 1, "--out", out).code == 0
    before = contents(out)
    assert f"{out}: already exists; nothing was written" in cli("sample", tiny_run, "-n", 2, "--out", out).error
    file = out / "samples.png"
    assert f"{file}: already exists" in cli("sample", tiny_run, "-n", 2, "--out", file).error
    assert contents(out) == before


def test_nothing_is_left_half_written(
    cli: Cli, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtdiffusion_plugins.mask import MaskModality

    def fail(*_: object) -> Path:
        raise OSError(28, "No space left on device", "0000.png")

    monkeypatch.setattr(MaskModality, "write", fail)
    error = cli("sample", tiny_run, "-n", 1, "--out", tmp_path / "out").error
    assert error == "0000.png: No space left on device"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--observe", "lable=3"],
            'no modality named "lable"; did you mean "label"? (this model has image, mask, label)',
        ),
        (["--observe", "label"], "--observe label: expected NAME=VALUE"),
        (["--observe", "label="], "--observe label=: expected NAME=VALUE"),
        (["--observe", "label=3", "--observe", "label=4"], "--observe label=4: label is given twice"),
        (["--observe", "label=10"], "--observe label=10: label: expected a class from 0 to 9, found '10'"),
        (["--observe", "label=three"], "--observe label=three: label: expected a class from 0 to 9, found 'three'"),
        (["--observe", "image=none.png"], "none.png: no such file"),
        (["--observe", "image={folder}"], "{folder}: "),
        (["--observe", "image={text}"], "{text}: cannot be read as a picture"),
        (["--observe", "image={truncated}"], "{truncated}: "),
        (["--no-resize", "--observe", "image={small}"], "{small}: expected 8 × 8 pixels, found 5 × 4"),
        (
            ["--observe", "mask={grey}"],
            "observed mask: mask of 2 classes: expected values from 0 to 1, found [200]. Change the mask",
        ),
        (["--observe", "mask={colour}"], "{colour}: 100.0% of its pixels have a colour of no class, such as #"),
        (["--visible", "image={picture}"], "a map was given for 'image', but it is not among the observed"),
        (["--visible", "imge={picture}"], 'no modality named "imge"; did you mean "image"?'),
        (["--observe", "label=1", "--visible", "label={picture}"], "visible label: this modality has no places"),
        (
            ["--no-resize", "--observe", "image={picture}", "--visible", "image={small}"],
            "{small}: expected 8 × 8 pixels, found 5 × 4",
        ),
        (["--observe", "image={picture}", "--visible", "image={text}"], "{text}: cannot be read as a picture"),
        (["--observe", "image={picture}", "--visible", "image=none.png"], "none.png: no such file"),
        (["--strength", "image=0.4"], "strength: 0.4 was given for 'image', but it is not among the observed"),
        (["--observe", "label=1", "--strength", "label=2"], "strength['label']: expected a share of the path above 0"),
        (["--observe", "label=1", "--strength", "label=much"], "--strength label=much: expected a number, such as"),
        (["--path", "lable=0.5"], "path: no modality named lable; this model has image, mask, label"),
        (["--path", "label"], "--path label: expected NAME=VALUE"),
        (["--path", "label=early"], "--path label=early: expected a number, such as label=0.4"),
        (["--generate", "masks"], 'no modality named "masks"; did you mean "mask"?'),
        (["--steps", "0"], "argument --steps: expected a whole number, 1 or more, found '0'"),
        (["-n", "0"], "argument -n: expected a whole number, 1 or more, found '0'"),
        (["-n", "few"], "argument -n: expected a whole number, 1 or more, found 'few'"),
        (["--seed", "-1"], "argument --seed: expected a whole number, 0 or more, found '-1'"),
        (["--eta", "some"], "argument --eta: expected a number, found 'some'"),
        (["--observe", "label=3, 5"], "observed label: 2 values take turns, and there is only 1 sample"),
        (["--eta", "-1"], "sampling: 'eta' must be >= 0"),
        (["--guidance", "-1"], "sampling: 'guidance' must be >= 0"),
        (["--guidance-interval", "1", "0"], "sampling: 'guidance_interval': expected two shares of the path, 0 <= low"),
        (["--solver", "dim"], "invalid choice: 'dim'"),
        (["--solver", "dim"], 'did you mean "ddim"?'),
        (["--stpes", "3"], 'unrecognized arguments: --stpes 3; did you mean "--steps"?'),
    ],
)
def test_requests_that_cannot_be_met(
    cli: Cli, tiny_run: Path, tmp_path: Path, picture: Path, options: list[str], message: str
) -> None:
    files = {name: tmp_path / f"{name}.png" for name in ("text", "truncated", "small", "colour", "grey")}
    files["text"].write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(files["truncated"])
    files["truncated"].write_bytes(files["truncated"].read_bytes()[:2000])
    Image.fromarray(noise[:4, :5]).save(files["small"])
    Image.new("L", (8, 8), 200).save(files["grey"])
    Image.fromarray(noise[:8, :24].reshape(8, 8, 3)).save(files["colour"])
    paths = {name: str(path) for name, path in (files | {"picture": picture, "folder": tmp_path}).items()}
    before = contents(tmp_path)
    error = cli("sample", tiny_run, "-n", 1, "--out", tmp_path / "out", *(o.format(**paths) for o in options)).error
    assert message.format(**paths) in error
    assert contents(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_not_there(cli: Cli, tiny_run: Path, tiny_config: Path, tmp_path: Path) -> None:
    for command in (("sample", tiny_run), ("train", tiny_config)):
        assert "no CUDA device" in cli(*command, "--out", tmp_path / "out", "--device", "cuda").error
    assert not (tmp_path / "out").exists()


COMMANDS = (("sample", "--out", "out"), ("evaluate",), ("gallery",))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_folder_that_is_not_one(
    cli: Cli, tiny_config: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = command
    assert "expected the folder of a run, found nothing" in cli(name, "none", *options).error
    assert "expected the folder of a run, found a file" in cli(name, tiny_config, *options).error
    assert "not the folder of a run (it has no config.toml)" in cli(name, copy / "checkpoints", *options).error
    weights = ckpt.require_run(copy) / "ema.safetensors"
    config = copy / "config.toml"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert f"{weights}: damaged" in cli(name, copy, *options).error
    weights.unlink()
    assert f"{weights}: missing from the checkpoint" in cli(name, copy, *options).error
    weights.write_bytes(whole)
    text = config.read_text()
    config.write_text(text.replace("vector = 16", "vector = 8"))
    assert f"{weights}: these weights belong to another model" in cli(name, copy, *options).error
    config.write_text(text[: len(text) // 2] + "[")
    assert f"{config}: not TOML" in cli(name, copy, *options).error
    config.write_text(text)
    shutil.rmtree(copy / "checkpoints")
    assert "this run has no checkpoint yet" in cli(name, copy, *options).error
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_path_of_fewer_steps_than_are_asked_for_says_so(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    result = cli("sample", tiny_run, "-n", 1, "--steps", 1000, "--out", tmp_path / "out", "--device", "cpu")
    assert result.code == 0, result.err
    total = load_run(tiny_run).model.process.steps
    assert f"--steps 1000: {total} are taken" in result.err
    result = cli("sample", tiny_run, "-n", 1, "--steps", total, "--out", tmp_path / "other", "--device", "cpu")
    assert "are taken" not in result.err


# --- evaluate, gallery, demo ------------------------------------------------------------------------------------------


def test_evaluate_writes_and_prints_the_metrics(cli: Cli, copy: Path) -> None:
    result = cli("evaluate", copy, "--samples", 6, "--steps", 1, "--device", "cpu")
    assert result.code == 0, result.err
    metrics = json.loads((copy / "metrics.json").read_text())
    assert 0 <= metrics["label|image/accuracy"] <= 1
    assert 0 <= metrics["mask|image/miou"] <= 1
    assert metrics["label|image/samples"] == 6
    assert all(isinstance(value, int | float | str) for value in metrics.values())
    accuracy = f"accuracy={metrics['label|image/accuracy']:.4g}↑"
    for part in ("label | image", accuracy, "↑ higher is better, ↓ lower", str(copy / "metrics.json")):
        assert part in result.out
    row = result.out.partition("label | image ")[2]
    assert row.index(accuracy) < row.index("nll=") < row.index("samples=6")  # what tells most comes first
    cli("evaluate", copy, "--samples", 6, "--steps", 1, "--device", "cpu")
    assert json.loads((copy / "metrics.json").read_text()) == metrics


def test_evaluate_measures_what_is_chosen(cli: Cli, copy: Path) -> None:
    quick = ("--steps", 1, "--device", "cpu", "--samples", "all")
    result = cli("evaluate", copy, "--only", "mask|label + image", "joint", *quick)
    assert result.code == 0, result.err
    metrics = json.loads((copy / "metrics.json").read_text())
    assert {key.partition("/")[0] for key in metrics} == {"mask|image+label", "joint"}
    assert metrics["joint/samples"] == 360  # all that there are; the run says 8
    chosen = 'evaluation.conditionals=["label|image"]'
    assert cli("evaluate", copy, "--steps", 1, "--device", "cpu", "--set", chosen).code == 0
    metrics = json.loads((copy / "metrics.json").read_text())
    assert {key.partition("/")[0] for key in metrics} == {"label|image"} and metrics["label|image/samples"] == 8
    kept = json.loads((copy / "metrics-before.json").read_text())  # nothing that was measured is lost
    (of,) = kept
    assert of.startswith("step-") and {key.partition("/")[0] for key in kept[of]} == {"mask|image+label", "joint"}
    result = cli("evaluate", copy, "--only", "mask|image", *quick)
    assert "measured: step-" in result.out and str(copy / "metrics-before.json") in result.err
    assert json.loads((copy / "metrics-before.json").read_text()) == {of: kept[of] | metrics}
    before = contents(copy)
    error = cli("evaluate", copy, "--only", "label|imge").error
    assert 'cannot measure "label|imge": no modality is named imge; did you mean "image"? (there are real, ' in error
    assert "mask|image" in error
    error = cli("evaluate", copy, "--samples", "some").error
    assert "argument --samples: expected a whole number, 1 or more or \"all\", found 'some'" in error
    assert contents(copy) == before


def test_figures_of_an_earlier_state_are_not_mixed_with_those_of_a_checkpoint(cli: Cli, copy: Path) -> None:
    measure = ("evaluate", copy, "--steps", 1, "--device", "cpu", "--samples", 4, "--only")
    assert cli(*measure, "label|image").code == 0
    first = json.loads((copy / "metrics.json").read_text())
    os.utime(copy / "metrics.json", (0, 0))  # so that the checkpoint is newer, as after more steps
    assert cli(*measure, "mask|image").code == 0
    second = json.loads((copy / "metrics.json").read_text())
    assert json.loads((copy / "metrics-before.json").read_text()) == {"1970-01-01 00:00:00 UTC": first}
    (copy / "metrics-before.json").write_text(json.dumps(first))  # as version 0.2 wrote it at first, one flat object
    assert cli(*measure, "label|image").code == 0
    kept = json.loads((copy / "metrics-before.json").read_text())
    assert kept == {"earlier": first, max(kept): second} and max(kept).startswith("step-")


def test_damaged_metrics_are_told_and_kept(cli: Cli, copy: Path) -> None:
    measure = ("evaluate", copy, "--steps", 1, "--device", "cpu", "--samples", 4, "--only", "label|image")
    (copy / "metrics.json").write_text('{"label|image/accuracy": 0.5,')
    error = cli("export", copy, "--out", copy.with_name("exported")).error
    assert f"{copy / 'metrics.json'}: cannot be read" in error and "mtdiffusion evaluate" in error
    result = cli(*measure)
    assert result.code == 0
    assert "metrics.json: cannot be read (" in result.err and str(copy / "metrics-damaged.json") in result.err
    assert (copy / "metrics-damaged.json").read_text() == '{"label|image/accuracy": 0.5,'
    assert "label|image/accuracy" in json.loads((copy / "metrics.json").read_text())


def test_a_run_without_the_record_of_its_plugins_can_be_exported(cli: Cli, copy: Path) -> None:
    (copy / "plugins.json").write_text("{")
    out = copy.with_name("exported")
    assert "plugins.json: cannot be read" in (error := cli("export", copy, "--out", out).error)
    assert "remove it: the run is used as well without" in error and not out.exists()
    (copy / "plugins.json").unlink()
    assert cli("export", copy, "--out", out).code == 0
    assert cli("sample", out, "-n", 1, "--steps", 1, "--out", copy.with_name("samples")).code == 0


def test_a_gallery_is_no_folder(cli: Cli, copy: Path) -> None:
    error = cli("gallery", copy, "--out", copy.parent).error
    assert f"{copy.parent}: expected a picture's file to write, such as gallery.png, found a folder" in error


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--seed", 2**64), f"argument --seed: expected a whole number, {2**63 - 1} at most"),
        (("--guidance", "inf"), "argument --guidance: expected a finite number, found 'inf'"),
        (("--guidance", "nan"), "argument --guidance: expected a finite number, found 'nan'"),
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(
    cli: Cli, copy: Path, tmp_path: Path, arguments: tuple[object, ...], found: str
) -> None:
    result = cli("sample", copy, "-n", 1, "--out", tmp_path / "samples", *arguments)
    assert result.code == 2 and found in result.err and not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("training.learning_rate=inf", "training.learning_rate: 'learning_rate' must be < inf"),
        ("modalities.image.loss_weight=inf", "modalities.image.loss_weight: found inf, expected a finite number"),
        ("sampling.guidance=inf", "sampling.guidance: 'guidance' must be < inf"),
        ("sampling.eta=inf", "sampling.eta: 'eta' must be <= 1000000.0"),
        (
            "training.seed=99999999999999999999",
            "training.seed: found 99999999999999999999 (int), expected an integer of",
        ),
        (
            "evaluation.samples=0",
            """evaluation.samples: 'samples': expected a whole number, 1 or more, or "all", found 0""",
        ),
    ],
)
def test_numbers_of_a_configuration_that_nothing_can_be_computed_with_are_refused(
    cli: Cli, tiny_config: Path, tmp_path: Path, change: str, found: str
) -> None:
    result = cli("train", tiny_config, "--out", tmp_path / "run", "--set", change)
    assert result.code == 2 and found in result.err and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_evaluation_that_is_stopped_keeps_what_it_has_and_goes_on_with_the_rest(
    cli: Cli, copy: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    from mtdiffusion_engine import evaluation

    command = ("evaluate", copy, "--device", "cpu")
    assert cli(*command).code == 0
    whole, directions = ((copy / name).read_bytes() for name in ("metrics.json", "metrics-directions.json"))
    assert json.loads(directions)["accuracy"] == "higher"
    draw, calls = evaluation.joint_draw, []

    def interrupt(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(number)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "joint_draw", interrupt)
        result = cli(*command)
    assert result.code == status
    assert "Traceback" not in result.err
    partial = copy / "metrics.partial.json"
    missing = "joint samples, draw 2, joint samples, draw 3, the bound"
    assert f"mtdiffusion: stopped; what is measured is kept in {partial} (real data, given image, " in result.err
    assert f"missing are {missing}. The same command goes on with those" in result.err
    stored = json.loads(partial.read_text())
    assert stored["partial"] is True and ", ".join(stored["missing"]) == missing
    assert (copy / "metrics.json").read_bytes() == whole  # of the evaluation before, which was whole
    (copy / "metrics.json").unlink()
    result = cli(*command)
    assert result.code == 0
    assert "going on with an evaluation that was stopped: real data, given image, " in result.err
    assert "evaluating: given image" not in result.err and "evaluating: joint samples, draw 2" in result.err
    assert (copy / "metrics.json").read_bytes() == whole
    assert (copy / "metrics-directions.json").read_bytes() == directions
    assert not partial.exists()


def test_evaluate_and_gallery_say_how_far_they_are(cli: Cli, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtdiffusion_registry.pace.EVERY", -1.0)
    monkeypatch.setattr("mtdiffusion_registry.pace._SHARE", 0.0)  # a first batch may take as long as all that follow
    said = cli("evaluate", copy, "--device", "cpu", "--set", "evaluation.batch_size=3").err
    for what in ("given image", "joint samples, draw 1", "the bound"):
        assert re.search(rf"^evaluating: {what}: 6 of 8, 0:\d\d left$", said, re.M), said
    which = "samples [147] to [368] of 8"
    for what, steps in (("given image", 2), ("given a part of image", 2), ("joint samples, draw 1", 3)):
        assert re.search(rf"^evaluating: {what}: {which} at step 1 of {steps}, 0:\d\d left$", said, re.M), said
    said = cli("gallery", copy, "--device", "cpu").err
    assert re.search(r"^drawing the gallery: 5 of 6, ", said, re.M)
    assert re.search(r"^drawing the gallery: block 1 of 6 at step 1 of 3, ", said, re.M)
    said = cli("sample", copy, "-n", 4, "--steps", 3, "--out", copy / "samples", "--device", "cpu").err
    assert re.findall(r"^sampling: (.*), 0:\d\d left$", said, re.M) == [f"4 samples at step {k} of 3" for k in (1, 2)]
    several = ("--shards", "tar", "--shard-size", 2, "--steps", 2)
    said = cli("sample", copy, "-n", 4, *several, "--out", copy / "shards", "--device", "cpu").err
    assert re.findall(r"^sampling: (.*) at step 1 of 2, 0:\d\d left$", said, re.M) == [
        "samples 1 to 2 of 4",
        "samples 3 to 4 of 4",
    ]


def test_a_log_has_each_line_once(cli: Cli, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal, though a library sets up the root logger, as open_clip does when it makes a model."""

    def print_it(record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)

    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", print_it)
    logging.getLogger().addHandler(handler)
    try:
        quick = cli("evaluate", copy, "--device", "cpu").err.splitlines()
        monkeypatch.setattr("mtdiffusion_registry.pace.EVERY", -1.0)
        monkeypatch.setattr("mtdiffusion_registry.pace._SHARE", 0.0)
        slow = cli("gallery", copy, "--device", "cpu").err.splitlines()
    finally:
        logging.getLogger().removeHandler(handler)
    news = [line for line in quick if " left" not in line and ": done in" not in line]  # of what takes long
    assert "evaluating: given image" in news and "evaluating: the bound" in news
    assert not [line for line in news for other in news if line.startswith(f"{other}: ")]
    assert len(set(news)) == len(news)
    counts = Counter(re.sub(r", \d+:\d\d left", "", line) for line in slow)
    assert counts["drawing the gallery: 5 of 6"] == 1 and max(counts.values()) == 1, counts


def test_gallery_shows_what_is_asked_for(cli: Cli, copy: Path, tmp_path: Path) -> None:
    heights = []
    shown = (
        ["image"],
        ["image", "label"],
        ["image", "label", "--blocks", "label"],
        ["image", "--blocks", "image:part"],
    )
    for number, show in enumerate(shown):
        out = tmp_path / f"{number}.png"
        cli("gallery", copy, "--device", "cpu", "--columns", 3, "--show", *show, "--out", out)
        with Image.open(out) as picture:
            heights.append(picture.height)
    whole, with_labels, given_labels, holes = heights
    assert whole < with_labels and given_labels < with_labels and holes < whole
    refused = cli(
        "gallery", copy, "--device", "cpu", "--show", "image", "--blocks", "label", "--out", tmp_path / "no.png"
    )
    assert refused.code == 2 and "blocks: expected some of joint, image, image:part; found label" in refused.err
    refused = cli("gallery", copy, "--device", "cpu", "--show", "sound", "--out", tmp_path / "no.png")
    assert refused.code == 2 and "show: no modality named sound; this model has image" in refused.err
    assert not (tmp_path / "no.png").exists()


def test_gallery_draws_a_picture(cli: Cli, copy: Path, tmp_path: Path) -> None:
    for options, path in (((), copy / "gallery.png"), (("--out", tmp_path / "my.png"), tmp_path / "my.png")):
        result = cli("gallery", copy, "--device", "cpu", *options)
        assert result.code == 0, result.err
        assert f"gallery: {path}" in result.out
        assert min(Image.open(path).size) > 100


def test_the_demo_does_what_is_not_done_yet(
    cli: Cli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "demo"
    arguments = ("demo", "--config", tiny_config, "--out", run, "--device", "cpu")
    first = cli(*arguments)
    assert first.code == 0, first.err
    assert f"gallery: {run / 'gallery.png'}" in first.out.splitlines()[-1]
    assert "label | image" in first.out
    before = contents(run)
    found = json.loads(cli(*arguments, "--json").out)
    assert found == {
        "run": str(run),
        "checkpoint": str(ckpt.require_run(run)),
        "steps": 10,
        "metrics": json.loads((run / "metrics.json").read_text()),
        "gallery": str(run / "gallery.png"),
    }
    second = cli(*arguments)
    assert second.out.endswith(first.out.partition("\n")[2])  # all but "trained: ..."
    assert "step" not in second.err
    assert contents(run) == before
    shutil.rmtree(ckpt.require_run(run))  # as if it had been interrupted
    assert "resuming at step 8 of 10" in cli(*arguments).err
    assert ckpt.require_run(run).name == "step-00000010"
    assert (
        "holds another experiment (training.seed is 0, asked for 1)"
        in cli(*arguments, "--set", "training.seed=1").error
    )


def test_the_demo_needs_its_configuration(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = cli("demo").error
    assert (
        "configs/scenes-demo.toml: no such file; run the demo from a clone of the repository, or give --config" in error
    )
    assert list(tmp_path.iterdir()) == []


# --- errors -----------------------------------------------------------------------------------------------------------


def test_the_traceback_is_there_for_who_asks(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTDIFFUSION_TRACEBACK", "1")
    result = cli("evaluate", tmp_path)
    assert result.code == 2
    assert "Traceback" in result.err
    assert "not the folder of a run" in result.err


def test_a_fault_of_ours_is_not_dressed_up_as_one_of_the_user(
    cli: Cli, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtdiffusion_engine import commands

    def fail(*_: object, **__: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(commands, "load_run", fail)
    result = cli("evaluate", tiny_run)
    assert result.code == 1
    assert "Traceback" in result.err


BASH = """
source {script}
COMP_WORDS=({line}x)
COMP_WORDS[-1]=${{COMP_WORDS[-1]%x}}
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_mtdiffusion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
FISH = "source {script}; complete -C '{line}'"


def profiles(start: str = "") -> set[str]:
    """Names of benchmarks' profiles that ship, which begin like this."""
    return {name for name in shipped() if name.startswith(start)}


@pytest.mark.parametrize(("shell", "code"), [("bash", BASH), ("fish", FISH)])
def test_a_shell_completes_commands_options_and_files(shell: str, code: str, cli: Cli, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(cli("completion", shell).out)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "runs-here").mkdir()

    def completed(line: str) -> set[str]:
        asked = [shell, "-c", code.format(script=script, line=line)]
        done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True)
        return {each.partition("\t")[0].rstrip("/") for each in done.stdout.splitlines()}  # fish says what each is

    assert completed("mtdiffusion ev") == {"evaluate"}
    assert completed("mtdiffusion sample --st") == {"--steps", "--strength"}
    assert completed("mtdiffusion bench so") == {"solvers"}
    assert completed("mtdiffusion evaluate runs") == {"runs-here"}
    assert completed("mtdiffusion completion fi") == {"fish"}
    (tmp_path / "small-mine.toml").touch()
    for action in ("run", "list"):
        assert completed(f"mtdiffusion bench {action} sm") == {*profiles("sm"), "small-mine.toml"}
        assert completed(f"mtdiffusion bench {action} ./sm") == {"./small-mine.toml"}


@pytest.mark.parametrize("shell", SHELLS)
def test_there_is_a_completion_for_each_shell(shell: str, cli: Cli) -> None:
    result = cli("completion", shell)
    assert result.code == 0
    assert {"evaluate", "solvers", "strength", *profiles()} <= set(re.findall(r"\w+", result.out))


@pytest.fixture
def document(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command with --json beside libraries that print; the one document of its standard output."""
    from mtdiffusion_engine import commands

    load, read = commands.load_run, commands.load_experiment

    def loud(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            print("a library prints")
            os.write(1, b"one in C, too\n")
            return function(*arguments, **options)

        return run

    monkeypatch.setattr(commands, "load_run", loud(load))
    monkeypatch.setattr(commands, "load_experiment", loud(read))

    def of(*arguments: object) -> Any:
        result = cli(*arguments, "--json")
        assert result.code == 0, result
        assert "a library prints\n" in result.err and "one in C, too\n" in result.err
        return json.loads(result.out, parse_constant=pytest.fail)

    return of


def test_train_says_for_machines_what_came_of_it(
    document: Callable[..., Any], tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    reports: list[Progress] = []
    tell = Monitor.progress
    monkeypatch.setattr(Monitor, "progress", lambda self, report: (reports.append(report), tell(self, report)))
    found = document("train", tiny_config, "--out", run, "--device", "cpu")
    assert found == {
        "run": str(run),
        "checkpoint": str(ckpt.list_checkpoints(run)[-1]),
        "steps": 10,
        "losses": reports[-1].means,
        "held_out": reports[-1].held_out,
    }
    assert {"loss", "l2/image"} <= found["losses"].keys() == found["held_out"].keys()
    again = document("train", "--resume", "--out", run, "--device", "cpu")  # nothing is left to train
    assert again == {**found, "losses": None, "held_out": None}


def test_sample_says_for_machines_what_it_wrote(document: Callable[..., Any], tiny_run: Path, tmp_path: Path) -> None:
    for out, options, written in (
        (tmp_path / "files", (), ["image/0000.png", "image/0001.png", "label.csv", "request.json", "samples.png"]),
        (tmp_path / "shards", ("--shards", "tar"), ["request.json", "samples-00000.tar", "samples.png"]),
    ):
        asked = ("--observe", "label=3", "--generate", "image", "-n", 2, "--device", "cpu")
        found = document("sample", tiny_run, "--out", out, *asked, *options)
        assert (found["out"], found["n"]) == (str(out), 2)
        assert found["paths"] == [str(out / name) for name in written]
        assert found["request"] == json.loads((out / "request.json").read_text())
        assert found["request"]["observed"] == {"label": "3"}


def test_gallery_says_for_machines_where_it_is(document: Callable[..., Any], copy: Path) -> None:
    (copy / "gallery.html").write_text("something else, which is older")
    os.utime(copy / "gallery.html", (0, 0))
    found = document("gallery", copy, "--device", "cpu", "--columns", 2, "--blocks", "joint")
    assert found == {"gallery": str(copy / "gallery.png"), "page": None}
    assert (copy / "gallery.png").is_file()


def test_other_results_are_printed_for_machines_too(
    cli: Cli, document: Callable[..., Any], copy: Path, tiny_config: Path, tmp_path: Path
) -> None:
    found = document("evaluate", copy, "--device", "cpu", "--only", "label|image", "--samples", 4)
    assert found == json.loads((copy / "metrics.json").read_text()) and found["label|image/samples"] == 4
    out = tmp_path / "exported"
    found = document("export", copy, "--out", out, "--device", "cpu")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert found == {"out": str(out), "card": str(out / "README.md"), "bytes": size}
    assert document("config", "check", tiny_config)["data"]["kind"] == "digits"
    drawn = document("process", "plot", tiny_config, "--out", tmp_path / "noise.png", "--part", "noise")
    assert drawn == {
        "config": str(tiny_config),
        "out": str(tmp_path / "noise.png"),
        "part": "noise",
        "steps": 20,
        "curve": "cosine",
        "retention": "compensated",
        "clocks": "shared",
    }
    assert (tmp_path / "noise.png").is_file()
    result = cli("plugins", "new", "depth", "--kind", "field", "--out", tmp_path / "plugin", "--json")
    new = json.loads(result.out)
    assert (new["name"], new["kinds"], new["out"]) == ("depth", ["field"], str(tmp_path / "plugin"))
    assert set(map(Path, new["paths"])) == {path for path in (tmp_path / "plugin").rglob("*") if path.is_file()}

    listed = json.loads(cli("plugins", "list", "--json").out)
    (image,) = [each for each in listed if (each["group"], each["kind"]) == ("modality", "image")]
    assert (image["distribution"], image["status"]) == ("mtdiffusion", "ok")
    result = cli("plugins", "check", "weight_schedule.constant", "--json")
    checked = json.loads(result.out)
    (one,) = checked["checked"]
    assert checked["plugin"] == "weight_schedule.constant" and result.code == one["failed"] == 0
    assert one["ok"] == sum(each["status"] == "ok" for each in one["checks"]) > 0


def test_what_fails_leaves_the_standard_output_empty(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    result = cli("sample", tiny_run, "--out", tmp_path / "out", "--observe", "label=99", "--json")
    assert "--observe label=99" in result.error and result.out == ""
