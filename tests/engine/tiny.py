"""Small experiments: the digits by configuration file, and made-up data that lack what a test wants them to lack."""

from __future__ import annotations

import tomllib
from typing import ClassVar, Literal

import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion import Dataset
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_registry import DatasetConfig, Registry
from mtdiffusion_registry.config import apply_overrides, structure

CONFIG = """
data.kind = "digits"

[latent]
height = 8
width = 8

[modalities]
image = { kind = "image", size = 8, channels = 1 }
mask = { kind = "mask", size = 8 }
label = { kind = "label", classes = 10 }

[backbone]
kind = "unet"
channels = 8
multipliers = [1]
heads = 0
vector = 16

[process]
steps = 20

[training]
steps = 10
batch_size = 8
warmup = 2
log_every = 2
checkpoint_every = 4
sample_every = 5

[sampling]
steps = 3

[evaluation]
samples = 8
steps = 2
bound_times = 1
"""

TOY = """
data.kind = "toy"
latent = { height = 4, width = 4 }

[modalities]
image = { kind = "image", size = 4, channels = 1 }
mask = { kind = "mask", size = 4 }
label = { kind = "label", classes = 3 }

[backbone]
kind = "unet"
channels = 8
multipliers = [1]
heads = 0
vector = 8
dropout = 0.1

[process]
steps = 20

[training]
steps = 10
batch_size = 8
accumulate = 2
warmup = 2
log_every = 1
checkpoint_every = 4
sample_every = 0

[sampling]
steps = 2
"""


class ToyData(Dataset):
    def __init__(self, count: int, lacking: str, nan_at: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.label = torch.randint(3, (count,), generator=generator)
        self.image = torch.rand(count, 1, 4, 4, generator=generator) * 2 - 1
        if nan_at >= 0:
            self.image[nan_at, 0, 1, 2] = torch.nan
        self.lacking = lacking

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        sample: dict[str, Tensor | str] = {
            "image": self.image[index],
            "mask": (self.image[index, 0] > 0).long(),
            "label": self.label[index],
            "caption": "noise",
        }
        if index % 3 == 1 and self.lacking:
            del sample[self.lacking]
        return sample


@frozen
class Toy(DatasetConfig):
    """Noise and what follows from it; every third sample lacks the field ``lacking``."""

    kind: ClassVar[str] = "toy"
    count: int = 11
    lacking: str = ""
    nan_at: int = -1

    def build(self, split: Literal["train", "test"]) -> Dataset:
        return ToyData(self.count, self.lacking, self.nan_at)


REGISTRY = Registry.discover().with_classes(Toy)


def toy(*overrides: str) -> Experiment:
    """The experiment on made-up data, changed by ``table.key=value`` arguments."""
    return structure(REGISTRY, apply_overrides(tomllib.loads(TOY), overrides), Experiment)
