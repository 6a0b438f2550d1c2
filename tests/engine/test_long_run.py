"""The memory of a long training does not grow."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion import Dataset
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_engine.trainer import Progress, Trainer
from mtdiffusion_registry import DatasetConfig
from mtdiffusion_registry.config import apply_overrides, structure
from tests.engine.tiny import REGISTRY, TOY

COUNT, LEAK = 4096, 16 * 2**10
SETTLED, STEPS = 300, 900
MOST = 8 * 2**20
"""Bytes that a training may grow by in six hundred steps: not two kilobytes a sample."""


class Stream(Dataset):
    """Reads each sample from a file when it is asked for; keeps LEAK bytes of each if it is to leak."""

    def __init__(self, path: str, leaks: bool) -> None:
        self._path, self._leaks = Path(path), leaks
        self._kept: list[bytearray] = []

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        with self._path.open("rb") as file:
            file.seek(index * 64)
            image = torch.frombuffer(bytearray(file.read(64)), dtype=torch.float32).view(1, 4, 4)
        if self._leaks:
            self._kept.append(bytearray(os.urandom(LEAK)))
        return {"image": image, "mask": (image[0] > 0).long(), "label": torch.tensor(index % 3)}


@frozen
class StreamConfig(DatasetConfig):
    kind: ClassVar[str] = "stream"
    path: str
    leaks: bool = False

    def build(self, split: Literal["train", "test"]) -> Dataset:
        return Stream(self.path, self.leaks)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.parametrize("leaks", [False, True])
def test_memory_is_flat(leaks: bool, tmp_path: Path) -> None:
    """Of six hundred steps after those in which caches fill; a data set that leaks is seen."""
    values = np.random.default_rng(0).uniform(-1, 1, (COUNT, 16)).astype(np.float32)
    (tmp_path / "data.bin").write_bytes(values.tobytes())
    overrides = (
        f"training.steps={STEPS}",
        "training.accumulate=1",
        "training.log_every=100",
        "training.checkpoint_every=0",
        "training.held_out_every=0",
        f'data={{kind="stream", path="{tmp_path / "data.bin"}", leaks={str(leaks).lower()}}}',
    )
    registry = REGISTRY.with_classes(StreamConfig)
    experiment = structure(registry, apply_overrides(tomllib.loads(TOY), overrides), Experiment)
    found: dict[int, int] = {}

    def progress(report: Progress) -> None:
        found[report.step] = resident()

    Trainer(experiment, tmp_path / "run", registry, device="cpu", evaluated=False).train(progress)
    growth = found[STEPS] - found[SETTLED]
    print(f"leaks {leaks}: grew by {growth:,} bytes")
    assert (growth > MOST) == leaks, found
