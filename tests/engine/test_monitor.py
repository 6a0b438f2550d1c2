"""What a training shows, on a terminal and elsewhere, and what it logs."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtdiffusion import LossWeights
from mtdiffusion_engine.monitor import Monitor, describe
from mtdiffusion_engine.trainer import Trainer
from tests.engine.tiny import REGISTRY, toy


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
