"""Which modalities are observed, and how much of each.

In training a random part is observed, none included, so that one network serves every conditional and classifier-free
guidance needs nothing more (docs/mathematics.md, section 5). How a network is told is the layout's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, le
from torch import Tensor
from torch.nn import functional as F

_probability = and_(ge(0.0), le(1.0))


@frozen(eq=False)
class Observation:
    """What is seen of each modality.

    Attributes:
        codes: by name, each ``[B, c_i, H, W]``, of those that something is seen of; of no meaning where it is not.
        seen: ``[B, N, h, w]``, 1 where seen and 0 where not; h and w are 1 if nothing is seen in part.
    """

    codes: Mapping[str, Tensor]
    seen: Tensor

    @property
    def complete(self) -> Tensor:
        """Whether the whole of each modality is seen: ``[B, N]`` bool."""
        return self.seen.amin((-2, -1)) > 0.5

    def merge(self, codes: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Predicted codes by name, with the true ones where they are seen."""
        return {
            name: torch.where(self.seen[:, i : i + 1] > 0.5, self.codes[name], codes[name])
            if name in self.codes
            else codes[name]
            for i, name in enumerate(names)
        }


def pool_visibility(visible: Tensor, height: int, width: int) -> Tensor:
    """A visibility map ``[B, h, w]`` of the data at the latent's resolution: ``[B, 1, H, W]``.

    A place of the latent is seen only if all of the data under it is.

    Raises:
        ValueError: if it is not ``[B, h, w]``, or h, w are not multiples of H, W.
    """
    if visible.ndim != 3 or visible.shape[1] % height or visible.shape[2] % width:
        raise ValueError(
            f"visibility: expected [batch, h, w] with h and w multiples of {height} and {width}, "
            f"found {list(visible.shape)}"
        )
    kernel = (visible.shape[1] // height, visible.shape[2] // width)
    return -F.max_pool2d(-visible.float().unsqueeze(1), kernel)


def merge_visible(observed: Tensor, generated: Tensor, visible: Tensor) -> Tensor:
    """Data x ``[B, ..., h, w]``: as observed where ``visible [B, h', w']`` is 1, as generated elsewhere."""
    seen = F.interpolate(visible.float().unsqueeze(1), size=generated.shape[-2:], mode="nearest") > 0.5
    seen = seen.reshape(len(seen), *[1] * (generated.ndim - 3), *generated.shape[-2:])
    return torch.where(seen, observed, generated)


@frozen
class SubsetDistribution:
    """Which modalities a training sample shows to the network. What is drawn here decides what the model can do.

    Attributes:
        observed: probability that anything is observed at all.
        singleton: of those, the probability that it is one modality alone (independent coins hardly ever draw "only
            the label", and conditionals on one modality suffer for it).
        partial: probability that one spatial modality is, in addition, seen with holes.
        hidden_share: range of the share that holes hide.
        subsets: explicit subsets and their relative weights; when given, they are drawn instead of singletons and
            coins ({("label",): 2.0, ("image", "mask"): 1.0}).
    """

    observed: float = field(default=0.7, validator=_probability)
    singleton: float = field(default=0.5, validator=_probability)
    partial: float = field(default=0.15, validator=_probability)
    hidden_share: tuple[float, float] = (0.1, 0.75)
    subsets: Mapping[tuple[str, ...], float] | None = None

    def draw(
        self,
        names: Sequence[str],
        spatial: Sequence[bool],
        batch: int,
        size: tuple[int, int],
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Visibility ``[batch, N, h, w]`` of 0 and 1, on the CPU: maps of this size if any may be seen in part, else
        h = w = 1.

        Raises:
            ValueError: if ``subsets`` names a modality that is not there.
        """
        n = len(names)

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        if self.subsets is not None:
            whole = self._explicit(names, batch, generator)
        else:
            coins = rand(batch, n) < 0.5
            single = F.one_hot((rand(batch) * n).long(), n).bool()
            whole = torch.where(rand(batch, 1) < self.singleton, single, coins)
        whole &= rand(batch, 1) < self.observed
        visible = whole.float()[:, :, None, None]
        places = [i for i, s in enumerate(spatial) if s]
        if places and self.partial > 0:
            visible = visible.expand(batch, n, *size).clone()
            chosen = torch.tensor(places)[(rand(batch) * len(places)).long()]
            rows = (rand(batch) < self.partial).nonzero()[:, 0]
            low, high = self.hidden_share
            share = low + (high - low) * rand(len(rows))
            visible[rows, chosen[rows]] = random_holes(share, size, generator)
        return visible

    def _explicit(self, names: Sequence[str], batch: int, generator: torch.Generator | None) -> Tensor:
        assert self.subsets is not None
        unknown = sorted({name for subset in self.subsets for name in subset} - set(names))
        if unknown:
            raise ValueError(f"subsets: expected names among {', '.join(names)}, found {', '.join(unknown)}")
        table = torch.tensor([[name in subset for name in names] for subset in self.subsets])
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
