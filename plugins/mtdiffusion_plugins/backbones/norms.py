"""Norms that both backbones use."""

from __future__ import annotations

from torch import Tensor, nn


class HeadNorm(nn.RMSNorm):
    """Queries or keys ``[..., channels]`` of an attention head, scaled to an RMS of 1, times learned gains.

    No logit then grows beyond √channels times the gains, however large the weights (Henry et al. 2020; Dehghani et al.
    2023). It computes in its gains' precision, whatever autocast has made of what it is given.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
