"""Which modalities a training sample shows to the network, and how much of each.

A random part is observed, none included, so that one network serves every conditional and classifier-free guidance
needs nothing more (docs/mathematics.md, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from attrs import field, frozen
from attrs.validators import and_, deep_iterable, deep_mapping, ge, gt, le
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
        hidden_share: range of the share that holes hide.
        subsets: explicit subsets and their relative weights, names joined by "+": {"label" = 2.0, "image+mask" = 1.0};
            they are drawn instead of singletons and coins. Empty: none.
    """

    observed: float = field(default=0.7, validator=_share)
    singleton: float = field(default=0.5, validator=_share)
    partial: float = field(default=0.15, validator=_share)
    hidden_share: tuple[float, float] = field(default=(0.1, 0.75), validator=deep_iterable(_share))
    subsets: dict[str, float] = field(factory=dict, validator=deep_mapping(value_validator=gt(0.0)))

    def draw(
        self,
        names: Sequence[str],
        spatial: Sequence[bool],
        batch: int,
        size: tuple[int, int],
        generator: torch.Generator | None = None,
        part: slice = slice(None),
    ) -> Tensor:
        """Visibility ``[batch, N, h, w]`` of 0 and 1, on the CPU: maps of this size if any may be seen in part, else
        h = w = 1.

        Args:
            part: of the batch, whose rows are returned: they do not depend on it.

        Raises:
            ValueError: if ``subsets`` names a modality that is not there.
        """
        n = len(names)

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        if self.subsets:
            whole = self._explicit(names, batch, generator)
        else:
            coins = rand(batch, n) < 0.5
            single = F.one_hot((rand(batch) * n).long(), n).bool()
            whole = torch.where(rand(batch, 1) < self.singleton, single, coins)
        whole &= rand(batch, 1) < self.observed
        visible = whole.float()[part, :, None, None]
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
        return visible

    def _explicit(self, names: Sequence[str], batch: int, generator: torch.Generator | None) -> Tensor:
        subsets = [set(key.split("+")) for key in self.subsets]
        if unknown := sorted(set().union(*subsets) - set(names)):
            raise ValueError(f"subsets: expected names among {', '.join(names)}, found {', '.join(unknown)}")
        table = torch.tensor([[name in subset for name in names] for subset in subsets])
        weights = torch.tensor(list(self.subsets.values()), dtype=torch.float64)
        return table[torch.multinomial(weights, batch, replacement=True, generator=generator)]


def random_holes(
    share: Tensor,
    size: tuple[int, int],
    generator: torch.Generator | None = None,
    pattern: Literal["mixed", "box", "patches"] = "mixed",
) -> Tensor:
    """Visibility maps ``[B, H, W]`` that hide a share ``[B]`` of the places: as one "box", scattered ("patches"), or
    half of the maps so and half so ("mixed")."""
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
    scattered = torch.rand(batch, height, width, generator=generator) < share[:, None, None]
    boxes = {"mixed": draws[:, 2] < 0.5, "box": draws[:, 2] >= 0, "patches": draws[:, 2] < 0}[pattern]
    hidden = torch.where(boxes[:, None, None], in_rows & in_columns, scattered)
    return (~hidden).float()
