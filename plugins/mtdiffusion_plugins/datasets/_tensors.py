"""What the data sets that fit in memory share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins.files import from_levels


class TensorDataset(Dataset):
    """A data set of columns: tensors ``[len, ...]`` and lists of str, all of one length.

    Args:
        fields: columns by name. A uint8 one stands for levels of float32 in [−1, 1] or for int64.
        levels: which of them are levels.

    Raises:
        ValueError: if there is no column, or if their lengths differ.
    """

    def __init__(self, fields: Mapping[str, Tensor | Sequence[str]], levels: Collection[str] = ()) -> None:
        lengths = {name: len(column) for name, column in fields.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"a data set needs columns of one length, got {lengths}")
        self.fields = dict(fields)
        self._length = next(iter(lengths.values()))
        self._levels = levels
        self._stored = {
            name: column.dtype
            for name, column in fields.items()
            if isinstance(column, Tensor) and column.dtype == torch.uint8
        }

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        sample = {name: column[index] for name, column in self.fields.items()}
        return {name: self._valued(name, x) if isinstance(x, Tensor) else x for name, x in sample.items()}

    def tensor(self, name: str) -> Tensor:
        """A column's values, as samples have them: ``[len, ...]``."""
        column = self.fields[name]
        assert isinstance(column, Tensor)
        return self._valued(name, column)

    def _valued(self, name: str, stored: Tensor) -> Tensor:
        if name not in self._stored:
            return stored
        return from_levels(stored) if name in self._levels else stored.long()

    def stored(self, dtypes: Mapping[str, Collection[torch.dtype]]) -> TensorDataset:
        other = copy(self)
        other._stored = {name: dtype for name, dtype in self._stored.items() if dtype not in dtypes.get(name, ())}
        return other


def generators(seed: int, split: Literal["train", "test"], count: int) -> Iterator[np.random.Generator]:
    """What each sample of a split is drawn with. Sample i follows from (seed, split, i) alone, so that more samples
    leave the first ones as they are."""
    return (np.random.default_rng([seed, 0 if split == "train" else 1, index]) for index in range(count))


def channels_first(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Pictures ``[..., h, w, C]`` as uint8 ``[..., C, h, w]``."""
    return torch.from_numpy(pixels).movedim(-1, -3).contiguous()
