"""The condition that modulates a backbone's blocks: noise level, flags and read-outs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mtdiffusion.precision import single_or_wider

_FREQUENCIES = 32


class ConditionEmbedding(nn.Module):
    """Noise level ``[B]`` in [0, 1] and vector ``[B, V]`` to a condition ``[B, width]``.

    Frequencies and angles have at least 32 bits: in 16, an angle of 250 turns would say nothing.
    """

    def __init__(self, in_vector: int, width: int) -> None:
        super().__init__()
        # Periods from two to 1/500 of the whole range: as fine as T = 500 steps are told apart.
        self.register_buffer("frequencies", torch.logspace(0, math.log10(500), _FREQUENCIES) * math.pi)
        self.frequencies: Tensor
        self.noise = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.vector = nn.Sequential(nn.Linear(in_vector, width), nn.SiLU(), nn.Linear(width, width))
        self.activation = nn.SiLU()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        frequencies = self.frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frequencies.dtype != single_or_wider(self.frequencies.dtype):
            self.frequencies = frequencies.to(self.frequencies.device)
        return self

    def forward(self, noise: Tensor, vector: Tensor) -> Tensor:
        angles = noise[:, None] * self.frequencies.to(noise.dtype)
        told = torch.cat([angles.sin(), angles.cos()], 1).to(vector.dtype)
        return self.activation(self.noise(told) + self.vector(vector))
