"""Contenders that take turns in one process, a few steps each a round, so that a machine whose speed drifts leaves the
ratios alone. Of a ratio the median over the rounds is told, and the range."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import define, evolve, field, frozen
from torch import nn

from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_engine.tally import Tally
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Registry

STEPS = 3  # trained in a turn
SAMPLED = 64
EVALUATIONS = 5  # of the network, in a turn of sampling


@frozen
class Setting:
    """Where and how contenders train and sample.

    Attributes:
        device: "cpu" or "cuda".
        precision: of training, as ``training.precision``. Sampling is float32, but for a group that says otherwise.
        compile: compile what trains.
        large: other libraries' networks, and ours beside them, of 36 million parameters instead of 2.7.
        batch: samples of a step, where a configuration does not say it.
    """

    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    large: bool = False
    batch: int = 16

    @property
    def autocast(self) -> torch.autocast:
        """Of a training step's forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


@define(eq=False)
class Contender:
    """Something whose turns are timed.

    Attributes:
        name: by which it is told.
        turn: one turn.
        against: the contender it is compared with; "" for one that others are compared with.
        target: the ratio that is wanted at most.
        seconds: of its turns.
        memory: in MiB, see :func:`peak_memory`.
        trainer: of a contender whose work is counted.
        images: trained or sampled in a turn; 0 where that is not what is timed.
        parameters: of the network; 0 where they are not told.
        work: floating-point operations an image, as torch counts them; 0 where they are not counted.
        first: seconds of the turn that warms up, which compiles what is compiled.
    """

    name: str
    turn: Callable[[], object]
    against: str = ""
    target: float | None = None
    seconds: list[float] = field(factory=list)
    memory: float | None = None
    trainer: Trainer | None = None
    images: int = 0
    parameters: int = 0
    work: float = 0.0
    first: float = 0.0

    @property
    def images_per_second(self) -> float | None:
        """By the median of its turns."""
        return self.images / statistics.median(self.seconds) if self.images and self.seconds else None


def ours(experiment: Experiment, folder: Path, registry: Registry, setting: Setting) -> Trainer:
    """The framework's training of an experiment, as the setting says."""
    training = evolve(experiment.training, precision=setting.precision, compile=setting.compile)
    experiment = evolve(experiment, training=training)
    return Trainer(experiment, folder, registry, evaluated=False, device=setting.device, on_message=lambda _: None)


def train_ours(trainer: Trainer) -> Callable[[], object]:
    """A turn of it."""
    batches, tally = trainer.batches(10**6), Tally(trainer.accelerator)
    trainer.model.train()

    def turn() -> None:
        for _ in range(STEPS):
            trainer.advance(batches, tally)

    return turn


def count_parameters(module: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(weight.numel() for weight in module.parameters())


def race(contenders: Sequence[Contender], rounds: int, say: Callable[[str], None], setting: Setting) -> None:
    """Time the contenders' turns, in turn; the first round warms up and is not counted."""
    for number in range(rounds + 1):
        for contender in contenders:
            started = time.perf_counter()
            contender.turn()
            setting.wait()
            seconds = time.perf_counter() - started
            if number:
                contender.seconds.append(seconds)
            else:
                contender.first = seconds
        say(f"round {number} of {rounds}")


def ratios(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Each contender that is compared: median, least and greatest ratio over the rounds."""
    by_name = {contender.name: contender for contender in contenders}
    rows = []
    for contender in contenders:
        if contender.against:
            pairs = zip(contender.seconds, by_name[contender.against].seconds, strict=True)
            found = sorted(mine / theirs for mine, theirs in pairs)
            rows.append(
                {
                    "what": contender.name,
                    "against": contender.against,
                    "ratio": round(statistics.median(found), 3),
                    "least": round(found[0], 3),
                    "greatest": round(found[-1], 3),
                    "target": contender.target,
                    "seconds": round(statistics.median(contender.seconds), 4),
                    "first": round(contender.first, 4),
                    "memory": _ratio(contender.memory, by_name[contender.against].memory),
                    "images_per_second": contender.images_per_second,
                    "parameters": contender.parameters or None,
                    "work": _ratio(contender.work or None, by_name[contender.against].work),
                }
            )
    return rows


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or not theirs else round(mine / theirs, 3)
