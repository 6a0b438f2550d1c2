"""Which modalities a training sample shows to the network, and how much of each.

A random part is observed, none included, so that one network serves every conditional and classifier-free guidance
needs nothing more (docs/mathematics.md, section 5). Something is always left to denoise: a sample of which all is
observed would train nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from attrs import field, frozen
from attrs.validators import and_, deep_iterable, deep_mapping, ge, gt, le, lt
from torch import Tensor
from torch.nn import functional as F

_share = and_(ge(0.0), le(1.0))


@frozen
class ConditioningConfig:
    """Which modalities a training sample shows. What is drawn here decides what the model can do.

    Attributes:
        observed: probability that anything is observed at all.
        singleton: of those, the probability that it is one modality alone (independent coins hardly ever draw "only
            the label", and conditionals on one modality suffer for it).
        partial: probability that one spatial modality is, in addition, seen with holes.
        hidden_share: range of the share that holes hide; they hide one place at least.
        subsets: explicit subsets and their relative weights, names joined by "+": {"label" = 2.0, "image+mask" = 1.0};
            they are drawn instead of singletons and coins. Empty: none.

    A subset is drawn from these probabilities on condition that it leaves the sample something to denoise. The
    condition is on the subset alone: ``observed``, ``singleton`` and ``partial`` keep their shares. Of singletons, of
    coins and of explicit subsets those that leave something keep their ratios; where none does (as for a lone
    modality, or a sample that lacks all others), nothing is observed.
    """

    observed: float = field(default=0.7, validator=_share)
    singleton: float = field(default=0.5, validator=_share)
    partial: float = field(default=0.15, validator=_share)
    hidden_share: tuple[float, float] = field(default=(0.1, 0.75), validator=deep_iterable(_share))
    subsets: dict[str, float] = field(factory=dict, validator=deep_mapping(value_validator=and_(gt(0.0), lt(math.inf))))

    def draw(
        self,
        names: Sequence[str],
        spatial: Sequence[bool],
        batch: int,
        size: tuple[int, int],
        generator: torch.Generator | None = None,
        part: slice = slice(None),
        left: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Visibility ``[batch, N, h, w]`` of 0 and 1, on the CPU: maps of this size if any may be seen in part, else
        h = w = 1.

        Args:
            part: of the batch, whose rows are returned: they do not depend on it.
            left: which modalities of those rows are left to denoise, ``[rows, N]`` bool, if so much is visible; None:
                all that are not observed whole.

        Raises:
            ValueError: if ``subsets`` names a modality that is not there.
        """
        n = len(names)

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        table, weights = self._explicit(names) if self.subsets else (torch.eye(n).bool(), torch.ones(n).double())
        if self.subsets:
            whole = table[torch.multinomial(weights, batch, replacement=True, generator=generator)]
            listed = torch.ones(batch, 1).bool()
        else:
            coins = rand(batch, n) < 0.5
            single = F.one_hot((rand(batch) * n).long(), n).bool()
            listed = rand(batch, 1) < self.singleton
            whole = torch.where(listed, single, coins)
        whole &= rand(batch, 1) < self.observed
        visible = whole.float()[part, :, None, None]
        in_part = torch.zeros_like(visible, dtype=torch.bool)
        places = [i for i, s in enumerate(spatial) if s]
        if places and self.partial > 0:
            visible = visible.expand(-1, n, *size).clone()
            chosen = torch.tensor(places)[(rand(batch) * len(places)).long()]
            rows = (rand(batch) < self.partial).nonzero()[:, 0]
            low, high = self.hidden_share
            holes = random_holes(low + (high - low) * rand(len(rows)), size, generator)
            start, stop, _ = part.indices(batch)
            mine = (rows >= start) & (rows < stop)
            visible[rows[mine] - start, chosen[rows[mine]]] = holes[mine]
            in_part[rows[mine] - start, chosen[rows[mine]]] = True
        # Drawn last, and for all rows: whichever need it, the others stay as they are.
        coins, place = rand(batch, n) < 0.5, rand(batch)
        left = left or _not_whole
        if len(idle := (~left(visible).any(1)).nonzero()[:, 0]):
            needed = left(torch.zeros(len(visible), n, 1, 1))[idle]
            listed, coins, place = (each[part][idle] for each in (listed, coins, place))
            again = torch.where(listed, _row(table, weights, needed, place), _coins(coins, needed, place))
            visible[idle] = torch.where(in_part[idle], visible[idle], again.float()[:, :, None, None])
        return visible

    def _explicit(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The subsets ``[K, N]`` and their weights ``[K]``."""
        subsets = [set(key.split("+")) for key in self.subsets]
        if unknown := sorted(set().union(*subsets) - set(names)):
            raise ValueError(f"subsets: expected names among {', '.join(names)}, found {', '.join(unknown)}")
        table = torch.tensor([[name in subset for name in names] for subset in subsets])
        return table, torch.tensor(list(self.subsets.values()), dtype=torch.float64)


def _not_whole(visible: Tensor) -> Tensor:
    return visible.amin((2, 3)) < 1


def _row(table: Tensor, weights: Tensor, needed: Tensor, place: Tensor) -> Tensor:
    """Of subsets ``[K, N]`` with weights, one that does not hold all that is needed ``[B, N]``; the empty one if none
    does not: ``[B, N]`` bool, by a number ``[B]`` uniform in [0, 1)."""
    fits = (needed[:, None] & ~table).any(2)
    return table[_weighted(weights * fits, place)] & fits.any(1, keepdim=True)


def _coins(coins: Tensor, needed: Tensor, place: Tensor) -> Tensor:
    """Coins ``[B, N]`` on condition that of those needed ``[B, N]`` one is tails at least: the first tails among them
    is drawn from its law, those before it are heads, and the others are as they were tossed."""
    order = needed.cumsum(1)
    first = F.one_hot(_weighted(needed * 0.5 ** order.double(), place), coins.shape[1]).bool()
    before = needed & (order < (order * first).sum(1, keepdim=True))
    return (coins | before) & ~first


def _weighted(weights: Tensor, place: Tensor) -> Tensor:
    """An index ``[B]`` in proportion to weights ``[B, K]``, by a number ``[B]`` uniform in [0, 1)."""
    total = weights.cumsum(1)
    return (total <= place[:, None] * total[:, -1:]).sum(1).clamp(max=weights.shape[1] - 1)


def random_holes(
    share: Tensor,
    size: tuple[int, int],
    generator: torch.Generator | None = None,
    pattern: Literal["mixed", "box", "patches"] = "mixed",
) -> Tensor:
    """Visibility maps ``[B, H, W]`` that hide a share ``[B]`` of the places, at least one: as one "box", scattered
    ("patches"), or half of the maps so and half so ("mixed")."""
    height, width = size
    batch = len(share)
    draws = torch.rand(batch, 3, generator=generator)
    box_h = (height * share.sqrt()).round().clamp(1, height)
    box_w = (width * share.sqrt()).round().clamp(1, width)
    top = (draws[:, 0] * (height - box_h + 1)).floor()
    left = (draws[:, 1] * (width - box_w + 1)).floor()
    y = torch.arange(height)[None, :, None]
    x = torch.arange(width)[None, None, :]
    in_rows = (y >= top[:, None, None]) & (y < (top + box_h)[:, None, None])
    in_columns = (x >= left[:, None, None]) & (x < (left + box_w)[:, None, None])
    places = torch.rand(batch, height, width, generator=generator)
    scattered = (places < share[:, None, None]) | (places == places.amin((1, 2), keepdim=True))
    boxes = {"mixed": draws[:, 2] < 0.5, "box": draws[:, 2] >= 0, "patches": draws[:, 2] < 0}[pattern]
    hidden = torch.where(boxes[:, None, None], in_rows & in_columns, scattered)
    return (~hidden).float()
