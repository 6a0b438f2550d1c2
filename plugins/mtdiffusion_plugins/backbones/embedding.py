"""The condition that modulates a backbone's blocks: noise level, flags and read-outs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_FREQUENCIES = 32


class ConditionEmbedding(nn.Module):
    """Noise level ``[B]`` in [0, 1] and vector ``[B, V]`` to a condition ``[B, width]``."""

    def __init__(self, in_vector: int, width: int) -> None:
        super().__init__()
        # Periods from two to 1/500 of the whole range: as fine as T = 500 steps are told apart.
        self.register_buffer("frequencies", torch.logspace(0, math.log10(500), _FREQUENCIES) * math.pi)
        self.frequencies: Tensor
        self.noise = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.vector = nn.Sequential(nn.Linear(in_vector, width), nn.SiLU(), nn.Linear(width, width))
        self.activation = nn.SiLU()

    def forward(self, noise: Tensor, vector: Tensor) -> Tensor:
        angles = noise[:, None] * self.frequencies.to(noise.dtype)
        return self.activation(self.noise(torch.cat([angles.sin(), angles.cos()], 1)) + self.vector(vector))
