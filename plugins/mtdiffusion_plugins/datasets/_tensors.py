"""What the data sets that fit in memory share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtdiffusion.interfaces import Dataset


class TensorDataset(Dataset):
    """A data set of columns: tensors ``[len, ...]`` and lists of str, all of one length.

    Raises:
        ValueError: if there is no column, or if their lengths differ.
    """

    def __init__(self, fields: Mapping[str, Tensor | Sequence[str]]) -> None:
        lengths = {name: len(column) for name, column in fields.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"a data set needs columns of one length, got {lengths}")
        self.fields = dict(fields)
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return {name: column[index] for name, column in self.fields.items()}


def generators(seed: int, split: Literal["train", "test"], count: int) -> Iterator[np.random.Generator]:
    """What each sample of a split is drawn with. Sample i follows from (seed, split, i) alone, so that more samples
    leave the first ones as they are."""
    return (np.random.default_rng([seed, 0 if split == "train" else 1, index]) for index in range(count))


def from_uint8(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Pictures ``[..., h, w, C]`` in 0..255 as float32 ``[..., C, h, w]`` in [−1, 1]."""
    return torch.from_numpy(pixels).movedim(-1, -3).to(torch.float32).div_(127.5).sub_(1).contiguous()
