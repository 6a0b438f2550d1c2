"""Sounds of samples: players in the gallery, and waves in TensorBoard, of whichever modality writes such files."""

from __future__ import annotations

import base64
import io
import re
import wave
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from mtdiffusion_engine import load_run
from mtdiffusion_engine.gallery import draw_gallery
from mtdiffusion_engine.monitor import Monitor
from mtdiffusion_engine.sounds import is_heard, wave_of
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_plugins.image import ImageModality
from tests.engine.tiny import REGISTRY, toy

RATE = 8000


def write_as_sound(self: ImageModality, x: Tensor, folder: Path, stem: str) -> Path:
    """A picture's pixels as the samples of a sound."""
    path = folder / f"{stem}.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((x.flatten().clamp(-1, 1) * 32767).round().numpy().astype("<i2").tobytes())
    return path


def test_what_is_written_decides_and_no_name(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(tiny_run, device="cpu")
    image, label = run.modality("image"), run.modality("label")
    assert not is_heard(image, tmp_path) and wave_of(image, image.placeholder(1)[0], tmp_path) is None
    monkeypatch.setattr(ImageModality, "write", write_as_sound)
    assert is_heard(image, tmp_path) and not is_heard(label, tmp_path)
    x = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = wave_of(image, x, tmp_path)
    assert found is not None and found[1] == RATE
    assert torch.allclose(found[0], x.flatten(), atol=1e-4)


def test_the_gallery_has_a_page_with_players_if_anything_is_heard(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(tiny_run, device="cpu")
    draw_gallery(run, tmp_path / "seen.png", columns=2)
    assert not (tmp_path / "seen.html").exists()
    monkeypatch.setattr(ImageModality, "write", write_as_sound)
    draw_gallery(run, tmp_path / "heard.png", columns=2)
    page = (tmp_path / "heard.html").read_text()
    rows = []
    for block in page.split("<h2>")[1:]:
        found = re.findall(r"<tr><th>(\w+) <small>(.*?)</small></th>(.*?)</tr>", block, re.S)
        rows += [(name, "with holes" in block and role == "seen", cells) for name, role, cells in found]
    assert {name for name, _, _ in rows} == {"image", "mask", "label"}
    assert [name for name, in_part, _ in rows if in_part] == ["image", "mask"]
    for name, in_part, cells in rows:
        assert cells.count("<img ") == 2
        # What is seen in part has no sound of its own: the whole would be heard.
        assert cells.count("<audio ") == (2 if name == "image" and not in_part else 0)
    first = re.search(r"<audio [^>]*src=\"data:audio/[\w-]+;base64,([^\"]+)\"", page)
    assert first
    with wave.open(io.BytesIO(base64.b64decode(first[1]))) as file:
        assert (file.getnframes(), file.getframerate()) == (64, RATE)


def test_tensorboard_has_sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageModality, "write", write_as_sound)
    trainer = Trainer(toy("training.steps=2", "training.sample_every=2"), tmp_path / "run", REGISTRY, device="cpu")
    with Monitor(trainer, Console(file=io.StringIO()), heard=2) as monitor:
        trainer.train(monitor.progress, monitor.samples)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert events.Tags()["audio"] == ["samples/image/0", "samples/image/1"]
    (event,) = events.Audio("samples/image/0")
    assert (event.step, event.sample_rate) == (2, RATE)
