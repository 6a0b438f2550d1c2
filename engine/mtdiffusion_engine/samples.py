"""Samples drawn from a split, of which some may lack modalities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion_engine.data import ModalityData
from mtdiffusion_registry import EmptySplit, UserError

if TYPE_CHECKING:
    from mtdiffusion_engine.run import Run

_CHUNK = 256  # samples read at a time


@frozen(eq=False)
class Samples:
    """Samples by modality name, each of which may lack some.

    Attributes:
        x: ``[n, ...]`` by name; a placeholder where a sample lacks it.
        presence: ``[n]`` bool by the same names: which samples have it.
    """

    x: Mapping[str, Tensor]
    presence: Mapping[str, Tensor]

    @classmethod
    def complete(cls, x: Mapping[str, Tensor]) -> Samples:
        """Of samples that have every modality."""
        return cls(x, {name: torch.ones(len(values), dtype=torch.bool) for name, values in x.items()})

    def __len__(self) -> int:
        return len(next(iter(self.presence.values()))) if self.presence else 0

    def having(self, names: Iterable[str]) -> Tensor:
        """Indices ``[k]`` of the samples that have all of these modalities."""
        has = torch.ones(len(self), dtype=torch.bool)
        for name in names:
            has &= self.presence.get(name, torch.zeros_like(has))
        return has.nonzero()[:, 0]

    def take(self, rows: Tensor) -> Samples:
        """The samples of these indices ``[k]``, ascending and none twice."""
        if len(rows) == len(self):
            return self
        return Samples(*({name: x[rows] for name, x in part.items()} for part in (self.x, self.presence)))

    def common(self) -> dict[str, Tensor]:
        """The modalities that all of the samples have, ``[n, ...]`` by name."""
        return {name: x for name, x in self.x.items() if bool(self.presence[name].all())}


@frozen
class Wish:
    """Samples wanted of a split.

    Attributes:
        names: modalities that each of them must have.
        limit: how many at most; None: all there are.
    """

    names: Sequence[str] = ()
    limit: int | None = None


def draw_samples(data: ModalityData, wishes: Sequence[Wish], seed: int = 0) -> list[Samples]:
    """Samples for each wish, in the order of the split: all that have its modalities or, if it wants fewer, a random
    draw without replacement, which follows from the seed. Wishes share what they can: a small one's samples are among a
    large one's with the same modalities.

    No more is read than is needed to fulfil them, a chunk at a time, and no more is kept than was wanted.

    Raises:
        UserError: if a sample that is read cannot be, or does not fit its modality.
    """
    names, size = list(data.modalities), len(data)
    left = [size if wish.limit is None else min(wish.limit, size) for wish in wishes]
    if all(count == size for count in left):
        order = torch.arange(size)
    else:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    kept: list[Samples] = []
    index: list[Tensor] = []  # of those kept, in the split
    taken: list[list[Tensor]] = [[] for _ in wishes]  # of each wish, in the split
    start = 0
    while start < size and any(left):
        rows = order[start : start + min(_CHUNK, max(left))]
        start += len(rows)
        batch = data.batch(rows.tolist())
        part = Samples(batch.x, {name: batch.presence[:, place] > 0 for place, name in enumerate(names)})
        used = torch.zeros(len(rows), dtype=torch.bool)
        for place, wish in enumerate(wishes):
            found = part.having(wish.names)[: left[place]]
            left[place] -= len(found)
            used[found] = True
            taken[place].append(rows[found])
        if bool(used.any()):
            kept.append(part.take(used.nonzero()[:, 0]))
            index.append(rows[used])
    if not kept:
        empty = {name: modality.placeholder(1)[:0] for name, modality in data.modalities.items()}
        return [Samples.complete(empty) for _ in wishes]
    where, order = torch.cat(index).sort()
    places = torch.empty_like(order)  # of those kept, in the order of the split
    places[order] = torch.arange(len(order))
    presence = {name: torch.cat([part.presence[name] for part in kept])[order] for name in names}
    split = torch.split(places, [len(part) for part in kept])
    # Each part is let go as it is put in its place: nothing is held twice.
    every = Samples(joined(len(where), ((at, kept.pop(0).x) for at in split)), presence)
    return [every.take(torch.isin(where, torch.cat([where[:0], *rows])).nonzero()[:, 0]) for rows in taken]


def joined(count: int, parts: Iterable[tuple[Tensor, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Batches by name as one ``[count, ...]``, without a second copy of all.

    Args:
        parts: the places ``[b]`` of a batch and the batch, each ``[b, ...]``; all places, each once.
    """
    whole: dict[str, Tensor] = {}
    for places, part in parts:
        for name, x in part.items():
            if name not in whole:
                whole[name] = x.new_empty(count, *x.shape[1:])
            whole[name][places] = x
    return whole


def held_out(run: Run) -> ModalityData:
    """A run's test split; some of its modalities may be in none of its samples.

    Raises:
        UserError: if it is empty, has none of the modalities, or cannot be read.
    """
    try:
        return run.data("test")
    except EmptySplit as error:
        raise UserError(
            f"{error}. There is nothing to measure on: let the data set hold some samples out (of kind folder: set "
            "data.test_fraction above 0, or lay a folder test beside train)"
        ) from error
