"""What a training shows, on a terminal and elsewhere, and what it logs."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtdiffusion import LossWeights
from mtdiffusion_engine.monitor import Monitor, describe
from mtdiffusion_engine.pictures import contact_sheet, read_visibility, save_png
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import UserError
from tests.engine.tiny import REGISTRY, toy


def shown(tmp_path: Path, *, terminal: bool, every: float = 0.0) -> str:
    trainer = Trainer(toy("training.steps=4"), tmp_path / "run", REGISTRY, device="cpu")
    out = io.StringIO()
    with Monitor(trainer, Console(file=out, force_terminal=terminal, width=160), every=every) as monitor:
        trainer.train(monitor.progress, monitor.samples)
    return out.getvalue()


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    for part in ("training", "4/4", "it/s", "loss ", "l2/image ", "l2/mask ", "l2/label "):
        assert part in text


def test_a_file_gets_lines_now_and_then(tmp_path: Path) -> None:
    lines = shown(tmp_path, terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert all(part in lines[0] for part in ("it/s", "ETA 0:0", "loss ", "l2/image ", "l2/mask ", "l2/label "))


def test_the_last_line_comes_whatever_the_time(tmp_path: Path) -> None:
    assert shown(tmp_path, terminal=False, every=1e6).startswith("step 4/4")


def test_only_the_terms_that_count_are_shown() -> None:
    means = {"loss": 1.5, "l0": 9.0, "l1": 8.0, "l2/image": 0.25, "l3/image": 7.0}
    assert describe(means, LossWeights()) == "loss 1.5  l2/image 0.25"
    assert describe(means, LossWeights(l1=1.0, l2=0.0, l3=0.1)) == "loss 1.5  l1 8  l3/image 7"


def test_tensorboard_has_scalars_and_sample_grids(tiny_run: Path) -> None:
    events = EventAccumulator(str(tiny_run / "tensorboard")).Reload()
    tags = events.Tags()
    terms = {"loss", "l0", "l1", *(f"l{k}/{name}" for k in (2, 3) for name in ("image", "mask", "label"))}
    others = {"learning_rate", "gradient_norm", "iterations_per_second"}
    assert set(tags["scalars"]) == {f"train/{name}" for name in terms | others}
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


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    picture = torch.rand(1, 3, 8, 8)
    sheet = contact_sheet({"a": picture}, side=64)
    row = sheet[:, -66:-2, 2:66]
    assert torch.equal(row, picture[0].repeat_interleave(8, 1).repeat_interleave(8, 2))


def test_rows_may_differ_in_size_and_number() -> None:
    sheet = contact_sheet({"a": torch.zeros(5, 3, 8, 8), "b": torch.ones(2, 3, 100, 50)}, side=64)
    assert sheet.shape == (3, 2 * (16 + 102), 5 * 102 + 2)
    assert float(sheet.min()) >= 0
    assert float(sheet.max()) == 1


def test_a_visibility_map_is_white_where_it_is_seen(tmp_path: Path) -> None:
    visible = (torch.rand(5, 7) > 0.5).float()
    path = save_png(visible.expand(3, -1, -1), tmp_path / "map.png")
    assert torch.equal(read_visibility(path), visible)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"map\.png: cannot be read as a picture"):
        read_visibility(path)
    with pytest.raises(UserError, match="no such file"):
        read_visibility(tmp_path / "none.png")
