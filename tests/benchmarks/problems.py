"""Small benchmark problems: the digits at 8 × 8, and a backbone that learns in seconds."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

import torch
from attrs import evolve
from torch import Tensor

from mtdiffusion import Dataset
from mtdiffusion_benchmarks.interfaces import Fitted, Problem
from mtdiffusion_engine.data import ModalityData, load_data
from mtdiffusion_engine.evaluation import complete_samples
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_engine.subsets import random_holes
from mtdiffusion_registry import Query, Registry
from mtdiffusion_registry.config import apply_overrides, structure

DIGITS = """
data.kind = "digits"
latent = { height = 8, width = 8 }

[modalities]
image = { kind = "image", size = 8, channels = 1 }
mask = { kind = "mask", size = 8 }
label = { kind = "label", classes = 10, loss_weight = 0.3 }

[backbone]
kind = "unet"
channels = 16
multipliers = [1]
heads = 0
vector = 32
dropout = 0.05

[process]
steps = 100

[training]
steps = 8
batch_size = 64
learning_rate = 4e-3
warmup = 5
ema = 0.9
log_every = 4
checkpoint_every = 4

[sampling]
steps = 5

[evaluation]
steps = 4
"""

REGISTRY = Registry.discover()


def digits(folder: Path, *overrides: str) -> Problem:
    """Image, mask and label of the digits, changed by ``table.key=value`` arguments."""
    experiment = structure(REGISTRY, apply_overrides(tomllib.loads(DIGITS), list(overrides)), Experiment)
    model = build_model(experiment)
    return Problem(
        experiment=experiment,
        modalities={name: model.modality(name) for name in model.names},
        queries=(),
        train=load_data(experiment, model, "train"),
        folder=folder,
        registry=REGISTRY,
        device="cpu",
        say=lambda _: None,
    )


class _Lacking(Dataset):
    """A data set every third sample of which lacks a field."""

    def __init__(self, dataset: Dataset, field: str) -> None:
        self.dataset, self.field = dataset, field

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        sample = dict(self.dataset[index])
        if index % 3 == 1:
            del sample[self.field]
        return sample


def lacking(problem: Problem, field: str) -> Problem:
    """The problem with every third training sample lacking a field."""
    return evolve(problem, train=ModalityData(_Lacking(problem.train.dataset, field), problem.modalities))


def held_out(problem: Problem, count: int = 200) -> dict[str, Tensor]:
    """Test samples by modality name."""
    return complete_samples(load_data(problem.experiment, build_model(problem.experiment), "test"), count)


def holes(count: int, share: float = 0.5, side: int = 8) -> Tensor:
    """Visibility maps ``[count, side, side]``, scattered."""
    return random_holes(torch.full((count,), share), (side, side), torch.Generator().manual_seed(0), "patches")


def ask(fitted: Fitted, query: Query, x: Mapping[str, Tensor], visible: Tensor | None = None) -> dict[str, Tensor]:
    """An answer, whose randomness is always the same."""
    assert fitted.answers(query)
    return fitted.generate(query, x, visible, torch.Generator().manual_seed(1))


def scrambled(x: Mapping[str, Tensor], query: Query, visible: Tensor | None) -> dict[str, Tensor]:
    """The same samples with all that a query does not give replaced by other samples'."""
    out = {}
    for name, value in x.items():
        other = value.roll(1, 0)
        if name in query.observed:
            out[name] = value
        elif visible is not None and name in query.targets:
            seen = visible.reshape(len(value), *[1] * (value.ndim - 3), *visible.shape[1:]) > 0.5
            out[name] = torch.where(seen, value, other)
        else:
            out[name] = other
    return out


def check_answer(fitted: Fitted, problem: Problem, query: Query) -> dict[str, Tensor]:
    """Ask for an answer and check what every answer must be; returns it.

    It holds valid data of what was asked for, is the same for the same generator, keeps what was seen, and does not
    depend on what is not given.
    """
    x = held_out(problem, 12)
    visible = holes(12) if query.hidden else None
    before = torch.random.get_rng_state()
    out = ask(fitted, query, x, visible)
    assert set(out) <= set(query.targets or problem.modalities)
    for name, value in out.items():
        problem.modalities[name].check(value)
        assert value.shape == x[name].shape
        if visible is not None:
            seen = visible.reshape(12, *[1] * (value.ndim - 3), 8, 8).expand_as(value) > 0.5
            assert torch.equal(value[seen], x[name][seen])
            assert not torch.equal(value[~seen], x[name][~seen])
    again = ask(fitted, query, x, visible)
    blind = ask(fitted, query, scrambled(x, query, visible), visible)
    for name, value in out.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, blind[name])
    assert torch.equal(before, torch.random.get_rng_state()), "an answer drew from the global generator"
    return out


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two modules are the same to the bit."""
    mine, other = first.state_dict(), second.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
