"""Norms and attention of both backbones, in the precision that suits each device while autocast lasts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion.precision import at_least_single, without_autocast


class GroupNorm(nn.GroupNorm):
    """In float32 while autocast lasts, as CUDA's own autocast has it. A CPU's would go on in bfloat16, for
    whose gradient torch takes far longer."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        return super().forward(at_least_single(x) if rounded else x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries to keys, all ``[B, heads, places, channels]``; on a CPU never in 16 bits, in which
    torch takes far longer for the gradient."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with without_autocast(q.device):  # it would make them bfloat16 again
        exact = F.scaled_dot_product_attention(at_least_single(q), at_least_single(k), at_least_single(v))
    return exact.to(v.dtype)


class HeadNorm(nn.RMSNorm):
    """Queries or keys ``[..., channels]`` of an attention head, scaled to an RMS of 1, times learned gains.

    No logit then grows beyond √channels times the gains, however large the weights (Henry et al. 2020; Dehghani et al.
    2023). It computes in its gains' precision, whatever autocast has made of what it is given.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
