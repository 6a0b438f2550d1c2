"""A diffusion transformer with adaLN-zero blocks (Peebles & Xie 2023), and what has proved itself since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

import torch
from attrs import Factory, field, frozen
from attrs.validators import ge, in_, optional
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Backbone, Features, FeatureSpec
from mtdiffusion_plugins.backbones.embedding import ConditionEmbedding
from mtdiffusion_plugins.backbones.norms import HeadNorm, attend
from mtdiffusion_plugins.backbones.positions import rotate, rotation, sincos
from mtdiffusion_registry.configs import BackboneConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1


class Shape(NamedTuple):
    """What a size stands for."""

    width: int
    depth: int
    heads: int


SIZES: Mapping[str, Shape] = MappingProxyType(
    {"S": Shape(384, 12, 6), "B": Shape(768, 12, 12), "L": Shape(1024, 24, 16), "XL": Shape(1152, 28, 16)}
)
"""The sizes of the paper (Peebles & Xie 2023, table 1)."""

_NO_SIZE = Shape(192, 6, 6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class SwiGLU(nn.Module):
    """W3 (SiLU(W1 x) · W2 x) (Shazeer 2020). Two thirds as wide inside as a perceptron of as many parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * max(1, round(width / 3))  # of 4 · width, two thirds, to a multiple of 8 as fast kernels want it
        self.enter = nn.Linear(width, 2 * hidden)
        self.leave = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.enter(x).chunk(2, dim=-1)
        return self.leave(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm modulated by the condition and a gate that starts at zero."""

    def __init__(self, config: DiTConfig, condition: int) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp: nn.Module
        if config.mlp == "swiglu":
            self.mlp = SwiGLU(width)
        else:
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
            )
        self.modulation = nn.Linear(condition, 6 * width)
        self.query_norm = HeadNorm(width // config.heads) if config.qk_norm else nn.Identity()
        self.key_norm = HeadNorm(width // config.heads) if config.qk_norm else nn.Identity()
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def project(self, x: Tensor, rotation: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, heads, tokens, width / heads]`` of tokens ``[B, tokens, width]``."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        q, k, v = self.project(_modulate(self.norm1(x), shift1, scale1), rotation)
        attended = attend(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + gate1[:, None] * self.out(attended)
        return x + gate2[:, None] * self.mlp(_modulate(self.norm2(x), shift2, scale2))


class DiT(Backbone):
    """Tokens are registers and patches of the latent; the first register's final state is the feature vector."""

    def __init__(self, config: DiTConfig, in_channels: int, height: int, width: int, in_vector: int) -> None:
        super().__init__()
        condition = config.width
        self.patch = config.patch
        self.registers = config.registers
        self.grid = (height // config.patch, width // config.patch)
        self.embedding = ConditionEmbedding(in_vector, condition)
        self.tokens = nn.Conv2d(in_channels, config.width, config.patch, stride=config.patch)
        self.register_token = nn.Parameter(torch.zeros(1, self.registers, config.width))
        places = self.grid[0] * self.grid[1]
        if config.positions == "learned":
            self.positions: Tensor = nn.Parameter(0.02 * torch.randn(1, self.registers + places, config.width))
        else:  # nothing but what they start as tells registers apart
            nn.init.normal_(self.register_token, std=0.02)
        if config.positions == "sincos":
            fixed = F.pad(sincos(*self.grid, config.width), (0, 0, self.registers, 0))
            self.register_buffer("positions", fixed[None], persistent=False)
        turns = None
        if config.positions == "rope":
            turns = rotation(*self.grid, config.width // config.heads, still=self.registers)
        self.register_buffer("rotation", turns, persistent=False)
        self.rotation: Tensor | None
        self.blocks = nn.ModuleList(Block(config, condition) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = nn.Linear(condition, 2 * config.width)
        self.to_map = nn.Linear(config.width, config.channels * config.patch**2)
        self.shuffle = nn.PixelShuffle(config.patch)
        self.features = FeatureSpec(config.channels, height, width, config.width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return tuple(self.blocks)

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        condition = self.embedding(noise, vector)
        places = self.tokens(z).flatten(2).transpose(1, 2)  # [B, patches, width]
        # Registers start from the condition: read-outs reach the vector without crossing the modulation.
        x = torch.cat([self.register_token + condition[:, None], places], 1)
        if self.rotation is None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x, condition, self.rotation)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        x = _modulate(self.norm(x), shift, scale)
        folded = self.to_map(x[:, self.registers :]).transpose(1, 2).reshape(z.shape[0], -1, *self.grid)
        return Features(F.silu(self.shuffle(folded)), x[:, 0])


def _of_size(key: str) -> int:
    """The default of width, depth and heads: as the size says."""
    return Factory(lambda self: getattr(SIZES.get(self.size, _NO_SIZE), key), takes_self=True)


@frozen
class DiTConfig(BackboneConfig):
    """A diffusion transformer.

    Attributes:
        size: width, depth and heads by the paper's name for them.
        width: of a token; by default as the size says, or 192.
        depth: blocks; by default as the size says, or 6.
        heads: attention heads; by default as the size says, or 6.
        patch: side of the patch of the latent that is one token.
        channels: of the feature map it unfolds to.
        positions: "learned": a vector for each token, added; "sincos": a fixed one for each place; "rope": queries and
            keys are turned by where they are, so that attention goes by offsets.
        qk_norm: scale queries and keys to an RMS of 1, times learned gains, so that no logit of attention grows beyond
            bounds (Dehghani et al. 2023; Esser et al. 2024).
        mlp: "gelu" or "swiglu", of as many parameters.
        registers: tokens that are no patch (Darcet et al. 2024); the first becomes the feature vector.
    """

    kind: ClassVar[str] = "dit"
    size: Literal["S", "B", "L", "XL"] | None = field(default=None, validator=optional(in_(tuple(SIZES))))
    width: int = field(default=_of_size("width"), validator=ge(8))
    depth: int = field(default=_of_size("depth"), validator=ge(1))
    heads: int = field(default=_of_size("heads"), validator=ge(1))
    patch: int = field(default=1, validator=ge(1))
    channels: int = field(default=48, validator=ge(1))
    positions: Literal["learned", "sincos", "rope"] = field(
        default="learned", validator=in_(("learned", "sincos", "rope"))
    )
    qk_norm: bool = False
    mlp: Literal["gelu", "swiglu"] = field(default="gelu", validator=in_(("gelu", "swiglu")))
    registers: int = field(default=1, validator=ge(1))

    def __attrs_post_init__(self) -> None:
        if self.size is None:
            return
        named = SIZES[self.size]
        for key, value in named._asdict().items():
            if (found := getattr(self, key)) != value:
                raise ValueError(f"'{key}' is {found}, but size {self.size} means {value}; leave out {key}, or size")

    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        if height % self.patch or width % self.patch:
            raise UserError(f"backbone.patch: {self.patch} does not divide the latent of {height} × {width}")
        if self.width % self.heads:
            raise UserError(f"backbone.heads: {self.heads} heads do not divide the width {self.width}")
        if self.positions == "sincos" and self.width % 4:
            raise UserError(
                f'backbone.width: found {self.width}, expected a multiple of 4, as positions = "sincos" tells rows and '
                "columns by sines and cosines"
            )
        if self.positions == "rope" and self.width // self.heads % 4:
            raise UserError(
                f"backbone.heads: {self.heads} heads of the width {self.width} have {self.width // self.heads} "
                'channels each, expected a multiple of 4, as positions = "rope" turns pairs by row and by column'
            )
        return DiT(self, in_channels, height, width, in_vector)


@hookimpl
def mtdiffusion_backbones() -> list[type]:
    return [DiTConfig]
