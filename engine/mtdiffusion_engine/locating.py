"""Which samples of a step gave numbers that are not finite: found by computing the step again, after the fact.

All that a step draws follows from the seed, the step and the places of its samples, so a healthy step keeps nothing for
this and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from attrs import frozen
from torch import Tensor

from mtdiffusion import Draws, MultimodalDiffusion
from mtdiffusion_engine.augmentation import Augmentation
from mtdiffusion_engine.chance import StepChance
from mtdiffusion_engine.data import Batch, ModalityData, StepSampler, derive_seed, training_batches
from mtdiffusion_engine.experiment import TrainingConfig

NAMED = 3
"""Samples that are named, at most."""


class Trainer(Protocol):
    """What is asked of a trainer (:class:`mtdiffusion_engine.trainer.Trainer`, which imports this)."""

    config: TrainingConfig
    accelerator: Accelerator
    model: MultimodalDiffusion
    data: ModalityData
    augmentation: Augmentation | None
    chance: StepChance

    @property
    def sharded(self) -> bool: ...

    def sampler(self, start: int, stop: int) -> StepSampler: ...

    def autocast(self) -> torch.autocast: ...

    def each(self, batch: Batch, visible: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]: ...

    def not_finite(self) -> str: ...


Found = list[tuple[int, str]]
"""Samples by their index in the data set, and what of each is not finite."""


def locate(trainer: Trainer, step: int) -> str:
    """What of which samples is not finite at a step, by the present weights, in a sentence; all processes call it.

    Weights and moments are looked at first, then codes and terms of the loss. Where all those are finite, each sample's
    gradient is looked at, unless the model is split over the processes; dropout draws anew then.

    Args:
        step: from 1.
    """
    if wrong := trainer.not_finite():
        return f"By then, {wrong} are not finite. "
    parts = list(_parts(trainer, step))
    found, count = _gathered(_in_loss(trainer, parts)), trainer.config.batch_size
    where = f"Step {step}, computed again: "
    if not found and not trainer.sharded:
        found = _gathered([each for part in parts for each in _in_gradient(trainer, part)])
    if not found:
        return (
            f"{where}every code and every term of the loss is finite"
            + ("" if trainer.sharded else ", and so is each sample's gradient")
            + "; see the sum over the samples, dropout or the machine. "
        )
    text = f"{where}not finite is {_named(trainer.data, found, count)}. "
    if trainer.config.precision == "bfloat16" and not _gathered(_in_loss(trainer, parts, exact=True)):
        text += 'In float32 it is finite: training.precision = "float32" may mend it. '
    return text


def _gathered(found: Found) -> Found:
    """What all processes have found, in each of them."""
    return sorted(gather_object(found))


@frozen(eq=False)
class _Part:
    """A micro-batch of this process as it was: which samples, and what they are computed from.

    Attributes:
        seed: of dropout.
    """

    indices: list[int]
    batch: Batch
    visible: Tensor
    draws: Draws
    seed: int


def _parts(trainer: Trainer, step: int) -> Iterator[_Part]:
    sampler, device = trainer.sampler(step - 1, step), trainer.accelerator.device
    batches = training_batches(trainer.data, sampler, 0, trainer.augmentation)
    for part, (turn, batch) in enumerate(zip(sampler, batches, strict=True)):
        place = sampler.place(part)
        visible, draws = trainer.chance.draw(step - 1, place, batch.presence)
        seed = derive_seed(trainer.config.seed, step - 1, place, 0)
        moved = Draws(*(each.to(device) for each in draws))
        yield _Part(turn.indices, batch.to(device), visible.to(device), moved, seed)


def _in_loss(trainer: Trainer, parts: list[_Part], exact: bool = False) -> Found:
    """Codes and terms of the loss; ``exact``: in float32, whatever the training's precision is."""
    found: Found = []
    for part in parts:
        torch.manual_seed(part.seed)
        with torch.no_grad(), nullcontext() if exact else trainer.autocast():
            _, each = trainer.each(part.batch, part.visible, part.draws)
        for row, index in enumerate(part.indices):
            if wrong := [name for name, values in each.items() if not bool(values[row].isfinite().all())]:
                found.append((index, ", ".join(wrong)))
    return found


def _in_gradient(trainer: Trainer, part: _Part) -> Found:
    """The first sample whose gradient is not finite by itself, by halves."""
    named = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]

    def wrong(rows: slice) -> list[str]:
        x = {name: value[rows] for name, value in part.batch.x.items()}
        some = Batch(x, part.batch.presence[rows]), part.visible[rows], Draws(*(each[rows] for each in part.draws))
        with torch.enable_grad(), trainer.autocast():
            total, _ = trainer.each(*some)
        # Not backward: that would wake what sums gradients over the processes.
        gradients = torch.autograd.grad(total.sum(), [weight for _, weight in named], allow_unused=True)
        pairs = zip(named, gradients, strict=True)
        return [name for (name, _), x in pairs if x is not None and not bool(x.isfinite().all())]

    start, stop = 0, len(part.indices)
    if not wrong(slice(start, stop)):
        return []
    while stop - start > 1:
        middle = (start + stop) // 2
        start, stop = (start, middle) if wrong(slice(start, middle)) else (middle, stop)
    names = wrong(slice(start, stop))
    more = f" and of {len(names) - 1} more parameters" if len(names) > 1 else ""
    return [(part.indices[start], f"the gradient of {names[0]}{more}")] if names else []


def _named(data: ModalityData, found: Found, count: int) -> str:
    """Samples, and what of each is not finite."""
    texts = [f"{what} of {describe(data, index)}" for index, what in found[:NAMED]]
    if len(found) == count:
        texts = [f"{texts[0]} and of all others of the step, so that it is not one sample"]
    elif len(found) > NAMED:
        texts.append(f"and more, of {len(found)} samples in all")
    return "; ".join(texts)


def describe(data: ModalityData, index: int) -> str:
    """What a person calls a training sample: its number, and what the data set calls it."""
    number, name = f"sample {index}", data.dataset.describe(index)
    return number if name == number else f"{number}, {name}"
