"""What is observed of each modality (docs/mathematics.md, section 5). How a network is told is the layout's matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Observation(NamedTuple):
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
            if name in self.codes and self.codes[name] is not codes[name]
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
