"""Work on batches that several processes share: each does some of them, and the first has what all have made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from attrs import field, frozen
from torch import Tensor, distributed

from mtdiffusion_engine.data import derive_seed
from mtdiffusion_engine.hanging import HangWatch
from mtdiffusion_registry import UserError

T = TypeVar("T")


@frozen
class Team:
    """One of several processes that do the same work, all in the same order; alone unless it is said otherwise.

    Attributes:
        rank, world: which of how many (:func:`mtdiffusion_engine.sampling.processes`).
        watch: is told where this process is. Each batch is to be done within its timeout; between batches the first
            process may judge, and the others wait, for as long as it takes.
    """

    rank: int = 0
    world: int = 1
    watch: HangWatch = field(factory=HangWatch)

    @property
    def first(self) -> bool:
        """Whether this is the process that has the results."""
        return self.rank == 0

    def shared(self, batches: Sequence[T], work: Callable[[T], Any]) -> list[Any] | None:
        """What the work gives for each batch, in their order, in the first process; None in the others.

        Each process does every ``world``-th batch, none is done twice, and then all wait for one another.

        Raises:
            UserError: if another process has stopped.
        """
        own: list[Any] = []
        for batch in batches[self.rank :: self.world]:
            self.watch.at(f"batch {self.rank + len(own) * self.world + 1} of {len(batches)}")
            own.append(work(batch))
        if self.world == 1:
            return own
        parts: list[Any] | None = [None] * self.world if self.first else None
        self._together(lambda: distributed.gather_object(own, parts))
        return None if parts is None else [parts[at % self.world][at // self.world] for at in range(len(batches))]

    def told(self, value: T) -> T:
        """The first process's value, in all of them.

        Raises:
            UserError: if another process has stopped.
        """
        if self.world == 1:
            return value
        box = [value]
        self._together(lambda: distributed.broadcast_object_list(box))
        return box[0]

    def _together(self, call: Callable[[], object]) -> None:
        self.watch.at("its part is done", waits=True)
        try:
            call()
        except RuntimeError as error:  # of the connection, which ends with the process at its other end
            raise UserError(
                f"process {self.rank + 1} of {self.world}: another process has stopped, so this one does, too. Start "
                "all of them again; what was measured before is kept"
            ) from error
        self.watch.at("all have met", patient=True)


def chance_at(generator: torch.Generator, place: int) -> torch.Generator:
    """The random numbers of a batch, whoever draws it: they follow from a generator's seed and from the place of the
    batch's first sample. The first batch goes on with the generator itself."""
    if place == 0:
        return generator
    return torch.Generator().manual_seed(derive_seed(generator.initial_seed(), place))


def batches_of(count: int, size: int) -> list[Tensor]:
    """The indices of ``count`` samples, ``size`` a batch."""
    return list(torch.split(torch.arange(count), size)) if count else []
