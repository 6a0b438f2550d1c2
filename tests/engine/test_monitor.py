"""What a training shows, on a terminal and elsewhere, and what it logs."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtdiffusion import LossWeights
from mtdiffusion_engine.monitor import Monitor, describe
from mtdiffusion_engine.trainer import Progress, Trainer
from mtdiffusion_registry import UserError
from tests.engine.tiny import CONFIG, REGISTRY, toy

ROOT = Path(__file__).parents[2]
LOGGED = "SELECT run_name, step, metrics FROM metrics ORDER BY step"


def shown(tmp_path: Path, *, terminal: bool, every: float = 0.0) -> str:
    trainer = Trainer(toy("training.steps=4"), tmp_path / "run", REGISTRY, device="cpu")
    out = io.StringIO()
    with Monitor(trainer, Console(file=out, force_terminal=terminal, width=160), every=every) as monitor:
        trainer.train(monitor.progress, monitor.samples)
    return out.getvalue()


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    for part in ("training", "4/4", "it/s", "loss ", "image ", "mask ", "label "):
        assert part in text


def test_a_file_gets_lines_now_and_then(tmp_path: Path) -> None:
    lines = shown(tmp_path, terminal=False).splitlines()
    told = ["step 1/4", "step 2/4", "step 3/4", "step 4/4", "step 4: held out"]
    assert [line.split("  ")[0] for line in lines] == told
    assert lines[4].endswith("(11 samples of data (test))")
    assert all(part in lines[0] for part in ("it/s", "ETA 0:0", "loss ", "image ", "mask ", "label "))


def test_the_rate_is_that_of_late(tmp_path: Path) -> None:
    trainer = Trainer(toy("training.steps=1000"), tmp_path / "run", REGISTRY, device="cpu")
    out = io.StringIO()
    with Monitor(trainer, Console(file=out, width=160), every=0.0) as monitor:
        for step, seconds in ((10, 100.0), (20, 101.0), (30, 102.0), (40, 103.0), (50, 104.0), (60, 105.0)):
            monitor.progress(Progress(step, {"loss": 1.0}, 1e-3, 1.0, 0, seconds, None, ""))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 10/1000  0.1 it/s  ETA 165:00")
    assert lines[-1].startswith("step 60/1000  10.0 it/s  ETA 1:34")  # of 940 steps, the slow start forgotten


def test_the_last_line_comes_whatever_the_time(tmp_path: Path) -> None:
    assert shown(tmp_path, terminal=False, every=1e6).startswith("step 4/4")


def test_only_the_terms_that_count_are_shown() -> None:
    means = {"loss": 1.5, "l0": 9.0, "l1": 8.0, "l2/image": 0.25, "l3/image": 7.0}
    assert describe(means, LossWeights()) == "loss 1.5  image 0.25"
    assert describe(means, LossWeights(l1=1.0, l2=0.0, l3=0.1)) == "loss 1.5  l1 8  l3/image 7"


def test_tensorboard_has_scalars_and_sample_grids(tiny_run: Path) -> None:
    events = EventAccumulator(str(tiny_run / "tensorboard")).Reload()
    tags = events.Tags()
    terms = {"loss", *(f"l2/{name}" for name in ("image", "mask", "label"))}  # the others have no weight
    others = {"learning_rate", "gradient_norm", "skipped_steps", "iterations_per_second"}
    held_out = {f"held_out/{name}" for name in terms}
    assert set(tags["scalars"]) == {f"train/{name}" for name in terms | others} | held_out
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10]
    assert tags["images"] == ["samples"]
    assert [event.step for event in events.Images("samples")] == [5, 10]


def test_what_was_logged_after_the_last_checkpoint_is_dropped_when_a_run_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for resume, stop_at in ((False, 6), (True, None)):
        trainer = Trainer(toy(), run, REGISTRY, resume=resume, device="cpu")
        with Monitor(trainer, Console(file=io.StringIO())) as monitor:
            trainer.train(monitor.progress, stop_at=stop_at)
        if not resume:
            shutil.rmtree(run / "checkpoints" / "step-00000006")  # as if it had crashed: that of step 4 remains
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))  # 5 and 6 once


TRACKED = (
    "import sys\n"
    "from pathlib import Path\n"
    "from rich.console import Console\n"
    "from mtdiffusion_engine.monitor import Monitor\n"
    "from mtdiffusion_engine.trainer import Trainer\n"
    "from tests.engine.tiny import CONFIG, REGISTRY, toy\n"
    "trainer = Trainer(toy('training.steps=4', *sys.argv[2:]), Path(sys.argv[1]), REGISTRY, device='cpu')\n"
    "with Monitor(trainer, Console()) as monitor:\n"
    "    trainer.train(monitor.progress, monitor.samples)\n"
    "trainer.accelerator.end_training()\n"
)
"""A training of four steps, in a process of its own: trackers leave threads and hooks behind."""


def test_a_training_is_logged_to_the_trackers_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    asked = ('training.trackers=["trackio"]', "training.project=shelf")
    subprocess.run([sys.executable, "-c", TRACKED, str(tmp_path / "book"), *asked], check=True, cwd=ROOT)
    with sqlite3.connect(tmp_path / "trackio" / "shelf.db") as stored:
        told = [(name, step, json.loads(values)) for name, step, values in stored.execute(LOGGED)]
        ((config,),) = stored.execute("SELECT config FROM configs")
    assert [(name, step) for name, step, _ in told] == [("book", step) for step in (1, 2, 3, 4)]
    assert {"train/loss", "train/l2/image", "train/learning_rate"} <= set(told[0][2])
    assert "held_out/loss" in told[3][2] and "held_out/loss" not in told[0][2]
    assert json.loads(config)["training.steps"] == 4 and json.loads(config)["modalities.image.kind"] == "image"


def test_weights_and_biases_gets_numbers_settings_and_sample_grids(tmp_path: Path) -> None:
    """Offline, into a file that its own reader reads."""
    pytest.importorskip("wandb")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    asked = ('training.trackers=["wandb"]', "training.project=shelf", "training.sample_every=2")
    command = [sys.executable, "-c", TRACKED, str(tmp_path / "book"), *asked]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (stored,) = folder.glob("*.wandb")
    written = stored.read_bytes()
    for said in (b"shelf", b"book", b"training.steps", b"train/l2/image", b"held_out/loss"):
        assert said in written
    sheets = [Image.open(path) for path in (folder / "files" / "media" / "images").glob("samples_*.png")]
    assert len(sheets) == 2 and all(sheet.width > 8 and sheet.convert("L").getextrema()[1] > 0 for sheet in sheets)


def test_mlflow_gets_numbers_settings_and_sample_grids(tmp_path: Path) -> None:
    """Into its own store of files."""
    pytest.importorskip("mlflow")
    store = {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    environment = {**os.environ, **store}
    asked = ('training.trackers=["mlflow"]', "training.project=shelf", "training.sample_every=2")
    command = [sys.executable, "-c", TRACKED, str(tmp_path / "book"), *asked]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    (losses,) = (tmp_path / "mlruns").glob("*/*/metrics/train/loss")
    assert [line.split()[2] for line in losses.read_text().splitlines()] == ["1", "2", "3", "4"]
    run = losses.parents[2]
    assert (run / "params" / "training.steps").read_text() == "4"
    assert (run / "tags" / "mlflow.runName").read_text() == "book"
    sheets = list((run / "artifacts" / "images").glob("*.png"))
    assert len(sheets) == 2 and all(Image.open(path).width > 8 for path in sheets)


class Forgetful(GeneralTracker):
    """A tracker whose server is there for two steps."""

    name = "forgetful"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[int] = []

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if step is None or step > 2:
            raise ConnectionError("no route to host\nand much more")
        self.told.append(step)


def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(tmp_path: Path) -> None:
    trainer = Trainer(toy("training.steps=4"), tmp_path / "run", REGISTRY, device="cpu")
    forgetful, screen = Forgetful(), Console(file=io.StringIO(), width=200)
    trainer.accelerator.trackers.append(forgetful)
    with Monitor(trainer, screen) as monitor:
        trainer.train(monitor.progress, monitor.samples)
    assert trainer.step == 4 and forgetful.told == [1, 2]
    said = screen.file.getvalue()  # type: ignore[attr-defined]
    assert (
        said.count("warning: forgetful failed (ConnectionError: no route to host); the training goes on without") == 1
    )


def test_a_tracker_that_does_not_start_is_named_and_leaves_no_run_behind(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    (tmp_path / "tiny.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "mtdiffusion", "train", "tiny.toml", "--out", "run", "--device", "cpu"]
    command += ["--set", "training.trackers=['trackio']"]
    environment = {**os.environ, "TRACKIO_SERVER_URL": "http://localhost:1"}  # it wants a token, too
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2, failed.stderr
    assert "training.trackers: trackio could not be started (ValueError: Self-hosted" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_there_or_not_known_is_named_before_anything_is_written(tmp_path: Path) -> None:
    if find_spec("aim") is not None:
        pytest.skip("aim is installed")
    with pytest.raises(UserError, match=r"training\.trackers: aim is not installed; run: pip install aim"):
        Trainer(toy('training.trackers=["aim"]'), tmp_path / "run", REGISTRY, device="cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="trackers"):
        toy('training.trackers=["notebook"]')
