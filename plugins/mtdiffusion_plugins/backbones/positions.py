"""Where tokens are: fixed encodings of the places of a grid, added to the tokens or turning queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

_SINCOS_BASE = 10000.0
_ROPE_BASE = 100.0


def _angles(height: int, width: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each place of a grid, times each of the frequencies: two of ``[height · width, F]``."""
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    return rows[:, None] * frequencies, columns[:, None] * frequencies


def _frequencies(count: int, base: float) -> Tensor:
    """1 down to nearly 1 / base, geometrically: ``[count]``."""
    return base ** -(torch.arange(count, dtype=torch.float64) / count)


def sincos(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of row and column (Vaswani et al. 2017, in two dimensions): ``[height · width, channels]``.

    With ω_k = 10000^(−k / (channels / 4)): the sines of row · ω, its cosines, and the same of the column. Places go row
    by row; channels are a multiple of 4.
    """
    row, column = _angles(height, width, _frequencies(channels // 4, _SINCOS_BASE))
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1).float()


def rotation(height: int, width: int, channels: int, still: int = 0) -> Tensor:
    """By how much queries and keys are turned (Su et al. 2021): cosines and sines ``[2, tokens, channels / 2]``.

    Of the pairs of channels, the first half turns by row · ω, the other by column · ω, so that an inner product of a
    query and a key depends on both offsets and nothing else. ω_k = 100^(−k / (channels / 4)): a base of 100 suits the
    few places of a side (Heo et al. 2024).

    Args:
        channels: of a head, a multiple of 4.
        still: tokens before those of the grid that have no place, and are not turned.
    """
    angles = torch.cat(_angles(height, width, _frequencies(channels // 4, _ROPE_BASE)), 1)
    angles = torch.cat([angles.new_zeros(still, channels // 2), angles])
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys ``[B, heads, tokens, channels]``, turned; channel j and j + channels / 2 are a pair."""
    cosine, sine = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1).to(x.dtype)
