"""What the stages share: how long something takes on a device, how much memory, and what could be had of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtdiffusion import Dataset
from mtdiffusion_engine.experiment import Experiment, structure_experiment
from mtdiffusion_engine.tally import Tally
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Registry
from mtdiffusion_registry.configs import DatasetConfig

Part = Callable[[], dict[str, Any]]
"""Measures something; what it returns is kept as JSON."""

PEAKS: Mapping[str, float] = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
"""Operations a second of dense bfloat16 matrix products, by a part of the device's name; the first that fits counts.
From NVIDIA's data sheets of the H200, H100 and A100 Tensor Core GPUs, which give the first three with sparsity, twice
as much."""


@frozen
class Setting:
    """Where and how a stage measures.

    Attributes:
        device: "cuda" or "cpu".
        tiny: sizes that a CPU does in seconds; the figures mean nothing.
        out: folder of the results.
        work: folder of all else; what is there is made again if it is gone.
        data: CIFAR-10, as ``{train,test}/CLASS/*``; None: not there.
        deadline: when the stage is stopped, by ``time.monotonic``.
    """

    device: str
    tiny: bool
    out: Path
    work: Path
    data: Path | None = None
    deadline: float = float("inf")

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def seconds(self) -> float:
        """What a figure is measured for."""
        return 0.2 if self.tiny else 4.0


@frozen
class SyntheticConfig(DatasetConfig):
    """Noise: ``image`` float32 ``[channels, size, size]`` in [−1, 1] and ``label`` in 0..classes−1."""

    kind: ClassVar[str] = "synthetic"
    reproducible: ClassVar[bool] = True

    size: int = 32
    channels: int = 3
    classes: int = 10
    count: int = 1024

    def build(self, split: Literal["train", "test"]) -> Dataset:
        return _Noise(self)


class _Noise(Dataset):
    def __init__(self, config: SyntheticConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (config.count, config.channels, config.size, config.size)
        self.image = torch.rand(shape, generator=generator) * 2 - 1
        self.label = torch.randint(config.classes, (config.count,), generator=generator)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return {"image": self.image[index], "label": self.label[index]}


def registry() -> Registry:
    """What is installed, and :class:`SyntheticConfig`."""
    return Registry.discover().with_classes(SyntheticConfig)


def experiment_of(tables: Mapping[str, Any], setting: Setting, **training: Any) -> Experiment:
    """The experiment of a configuration's tables, with other keys of ``training``."""
    few = {"warmup": 0, "checkpoint_every": 0, "sample_every": 0, "batch_size": 4 if setting.tiny else 256}
    tables = {**tables, "training": {**few, **tables.get("training", {}), **training}}
    return structure_experiment(tables, registry(), "gpu benchmark")


def trainer_of(experiment: Experiment, setting: Setting) -> Trainer:
    """A trainer that writes where nothing is kept."""
    folder = setting.work / "runs" / f"{time.time_ns()}"
    return Trainer(experiment, folder, registry(), evaluated=False, device=setting.device, on_message=lambda _: None)


def turn_of(trainer: Trainer) -> Callable[[], object]:
    """A training step of the framework, its batches included."""
    batches, tally = trainer.batches(10**7), Tally(trainer.accelerator)
    trainer.model.train()
    return lambda: trainer.advance(batches, tally)


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(turn: Callable[[], object], images: int, setting: Setting, *, warm: int = 3) -> dict[str, Any]:
    """How fast turns of so many images go, by the median of chunks of them, and the most memory that is allocated.

    Returns:
        ``images_per_second``; ``least`` and ``greatest`` over the chunks; ``seconds`` of a turn; ``first``: those of
        the turns that warm up; ``peak_mib``, None on a CPU.
    """
    started = time.perf_counter()
    for _ in range(warm):
        turn()
    wait(setting.device)
    first = time.perf_counter() - started
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()
    found: list[float] = []
    chunk, until = 1 if setting.tiny else 5, time.perf_counter() + setting.seconds
    while len(found) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(chunk):
            turn()
        wait(setting.device)
        found.append((time.perf_counter() - started) / chunk)
    return {
        "images_per_second": images / statistics.median(found),
        "least": images / max(found),
        "greatest": images / min(found),
        "seconds": statistics.median(found),
        "first": first,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if setting.cuda else None,
    }


def operations(function: Callable[[], object]) -> int:
    """Floating-point operations of a function's matrix products, convolutions and attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
        return counter.get_total_flops()


def product_rate(setting: Setting) -> float:
    """Operations a second of a large bfloat16 matrix product of random numbers, as measured."""
    side = 256 if setting.tiny else 8192
    a, b = (torch.randn(side, side, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    wait(setting.device)
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    wait(setting.device)
    return 10 * 2 * side**3 / (time.perf_counter() - started)


def peak_rate(setting: Setting) -> tuple[float, str]:
    """Operations a second that the device could do at most in bfloat16, and where that is known from."""
    if setting.cuda:
        name = torch.cuda.get_device_name()
        for part, rate in PEAKS.items():
            if all(word in name for word in part.split()):
                return rate, f"NVIDIA's data sheet of the {part}"
    return product_rate(setting), "a matrix product, measured"


def utilisation(per_image: float, measured: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B): the operations that the model's mathematics asks for
    in a second, as a share of the device's peak; what is computed twice counts once."""
    peak, source = peak_rate(setting)
    rate = per_image * measured["images_per_second"]
    return {"flops_per_image": per_image, "mfu": rate / peak, "peak": peak, "peak_from": source}
