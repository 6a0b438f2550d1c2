"""A diffusion transformer with adaLN-zero blocks (Peebles & Xie 2023)."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Backbone, Features, FeatureSpec
from mtdiffusion_plugins.backbones.embedding import ConditionEmbedding
from mtdiffusion_registry.configs import BackboneConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm modulated by the condition and a gate that starts at zero."""

    def __init__(self, width: int, heads: int, condition: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(condition, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        b, n, d = x.shape
        qkv = self.qkv(_modulate(self.norm1(x), shift1, scale1)).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + gate1[:, None] * self.out(attended)
        return x + gate2[:, None] * self.mlp(_modulate(self.norm2(x), shift2, scale2))


class DiT(Backbone):
    """Tokens are patches of the latent plus one register, whose final state is the feature vector."""

    def __init__(self, config: DiTConfig, in_channels: int, height: int, width: int, in_vector: int) -> None:
        super().__init__()
        condition = config.width
        self.patch = config.patch
        self.grid = (height // config.patch, width // config.patch)
        self.embedding = ConditionEmbedding(in_vector, condition)
        self.tokens = nn.Conv2d(in_channels, config.width, config.patch, stride=config.patch)
        self.register_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1] + 1, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, condition) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = nn.Linear(condition, 2 * config.width)
        self.to_map = nn.Linear(config.width, config.channels * config.patch**2)
        self.shuffle = nn.PixelShuffle(config.patch)
        self.features = FeatureSpec(config.channels, height, width, config.width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        condition = self.embedding(noise, vector)
        places = self.tokens(z).flatten(2).transpose(1, 2)  # [B, patches, width]
        # The register starts from the condition: read-outs reach it without crossing the modulation.
        register = self.register_token + condition[:, None]
        x = torch.cat([register, places], 1) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        x = _modulate(self.norm(x), shift, scale)
        b = z.shape[0]
        folded = self.to_map(x[:, 1:]).transpose(1, 2).reshape(b, -1, *self.grid)
        return Features(F.silu(self.shuffle(folded)), x[:, 0])


@frozen
class DiTConfig(BackboneConfig):
    """A diffusion transformer.

    Attributes:
        width: of a token.
        depth: blocks.
        heads: attention heads.
        patch: side of the patch of the latent that is one token.
        channels: of the feature map it unfolds to.
    """

    kind: ClassVar[str] = "dit"
    width: int = field(default=192, validator=ge(8))
    depth: int = field(default=6, validator=ge(1))
    heads: int = field(default=6, validator=ge(1))
    patch: int = field(default=1, validator=ge(1))
    channels: int = field(default=48, validator=ge(1))

    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        if height % self.patch or width % self.patch:
            raise UserError(f"backbone.patch: {self.patch} does not divide the latent of {height} × {width}")
        if self.width % self.heads:
            raise UserError(f"backbone.heads: {self.heads} heads do not divide the width {self.width}")
        return DiT(self, in_channels, height, width, in_vector)


@hookimpl
def mtdiffusion_backbones() -> list[type]:
    return [DiTConfig]
