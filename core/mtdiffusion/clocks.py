"""Clocks: which noise levels of the modalities are seen together in training, and along which path sampling takes them
(docs/mathematics.md, section 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import field, frozen
from torch import Tensor

from mtdiffusion.interfaces import ClockLaw


def stratified(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform in (0, 1] ``[batch]`` (float64): one in each of as many equal parts, in random order, for less noise."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator).double()) / batch  # in float32 it may round to 1
    return 1 - u[torch.randperm(batch, generator=generator)]


@frozen
class SharedClock(ClockLaw):
    """One clock for all: t_i = t, uniform."""

    shared = True

    def draw(self, batch: int, modalities: int, generator: torch.Generator | None = None) -> Tensor:
        return stratified(batch, generator)[:, None].expand(batch, modalities)


@frozen
class IndependentClocks(ClockLaw):
    """Each modality's clock drawn by itself (UniDiffuser, Bao et al. 2023); sampled along the shared path."""

    def draw(self, batch: int, modalities: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.stack([stratified(batch, generator) for _ in range(modalities)], 1)


@frozen
class MixedClocks(ClockLaw):
    """A share of the samples with independent clocks, the others with one clock for all.

    Attributes:
        independent: that share.
    """

    independent: float = 0.5

    def draw(self, batch: int, modalities: int, generator: torch.Generator | None = None) -> Tensor:
        each = IndependentClocks().draw(batch, modalities, generator)
        apart = torch.rand(batch, 1, generator=generator) < self.independent
        return torch.where(apart, each, each[:, :1])


@frozen
class OffsetClocks(ClockLaw):
    """Some modalities run ahead of others: t_i = clamp(u − δ_i, 0, 1), u uniform on [0, 1 + max δ].

    Attributes:
        offsets: δ_i, how far ahead each modality is, in shares of T; the least is taken as 0.
    """

    offsets: tuple[float, ...] = field()

    def draw(self, batch: int, modalities: int, generator: torch.Generator | None = None) -> Tensor:
        ahead = self.ahead(modalities)
        return (stratified(batch, generator)[:, None] * (1 + ahead.max()) - ahead).clamp(0, 1)

    def ahead(self, modalities: int) -> Tensor:
        if len(self.offsets) != modalities:
            raise ValueError(f"offsets: expected one for each of {modalities} modalities, found {len(self.offsets)}")
        offsets = torch.tensor(self.offsets, dtype=torch.float64)
        return offsets - offsets.min()


@frozen
class EdgesAndDiagonal(ClockLaw):
    """What sampling visits and nothing between: one clock for all (the diagonal), or some modalities clean and some
    noise beside those that share a clock (the edges).

    Attributes:
        diagonal: share of the samples on the diagonal; in the others one modality drawn evenly is at the common clock,
            and each other one is clean, noise or at that clock, with equal probability.
    """

    diagonal: float = 0.5

    def draw(self, batch: int, modalities: int, generator: torch.Generator | None = None) -> Tensor:
        one = stratified(batch, generator)[:, None].expand(batch, modalities)
        role = torch.randint(3, (batch, modalities), generator=generator)  # clean, noise, or at the common clock
        active = torch.randint(modalities, (batch, 1), generator=generator)
        role = role.scatter(1, active, 2).masked_fill(torch.rand(batch, 1, generator=generator) < self.diagonal, 2)
        return torch.where(role == 2, one, role.double())


def clock_path(ahead: Tensor, steps: int, total: int) -> Tensor:
    """Clocks ``[K + 1, N]`` (int64) from T for all to 0 for all: t_i = T clamp(u − ahead_i, 0, 1), u evenly spread.

    Args:
        ahead: how far ahead of the slowest each modality runs, in shares of T, ``[N]``; all 0: one clock.
        steps: K, or fewer where clocks have no more than T steps to take.
        total: T.
    """
    ahead = ahead.to(torch.float64) - ahead.min()
    u = (1 + ahead.max()) * torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    return torch.unique_consecutive(((u[:, None] - ahead).clamp(0, 1) * total).round().long(), dim=0)


def check_path(path: Tensor, names: Sequence[str], total: int) -> Tensor:
    """The path, if it is one.

    Raises:
        ValueError: unless it is int64 ``[K + 1, N]``, from T for all down to 0 for all, no clock ever rising.
    """
    if path.ndim != 2 or path.shape[1] != len(names) or path.shape[0] < 2 or path.is_floating_point():
        raise ValueError(
            f"path: expected integer clocks [steps + 1, {len(names)}], a column for each of {', '.join(names)}; found "
            f"{path.dtype} {list(path.shape)}"
        )
    if not bool((path[0] == total).all() and (path[-1] == 0).all() and (path.diff(dim=0) <= 0).all()):
        raise ValueError(f"path: expected clocks that fall from T = {total} to 0 and never rise")
    return path
