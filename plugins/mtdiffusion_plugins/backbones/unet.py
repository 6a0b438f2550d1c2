"""A U-Net over the diffusion space (Ronneberger et al. 2015; Ho et al. 2020), with a flattened bottleneck as vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import deep_iterable, ge, min_len, optional
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Backbone, Features, FeatureSpec
from mtdiffusion_plugins.backbones.embedding import ConditionEmbedding
from mtdiffusion_plugins.backbones.norms import GroupNorm, HeadNorm, attend
from mtdiffusion_registry.configs import BackboneConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

_MANY = 4  # times as many channels shown as the first level has: the first convolution would be a good part of the work


def _norm(channels: int, places: int, **options: bool) -> GroupNorm:
    """Over groups of channels, up to 8 of them, of maps of so many places; over all channels where each group would be
    a single number, of which its norm leaves nothing."""
    groups = next(g for g in (8, 6, 4, 3, 2, 1) if channels % g == 0)
    return GroupNorm(1 if channels // groups * places == 1 else groups, channels, **options)


class SelfAttention(nn.Module):
    """Multi-head self-attention over places, with a residual."""

    def __init__(self, channels: int, heads: int, qk_norm: bool, places: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(channels, places)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.query_norm = HeadNorm(channels // heads) if qk_norm else nn.Identity()
        self.key_norm = HeadNorm(channels // heads) if qk_norm else nn.Identity()
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # [B, 3C, H, W] -> three of [B, heads, H·W, C/heads]
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        # Normed as they lie in memory if channels come last, [B, H·W, heads, C/heads]: the answer then lies so, too.
        q = self.query_norm(q.transpose(1, 2)).transpose(1, 2)
        k = self.key_norm(k.transpose(1, 2)).transpose(1, 2)
        attended = attend(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        return x + self.out(attended)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv; norm, scale and shift by the condition, SiLU, conv; plus a shortcut. Then attention, if any."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        condition: int,
        dropout: float,
        places: int,
        attention: SelfAttention | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, places)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * outputs)
        self.norm2 = _norm(outputs, places, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = attention or nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a block starts as its shortcut
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.attention(self.shortcut(x) + self.conv2(self.dropout(h)))


def _channels_last(x: Tensor) -> Tensor:
    """x laid out as a CPU's convolutions of this size are 1.4 times faster."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class Narrowing(nn.Conv2d):
    """A 1 × 1 convolution, on a CPU of channels as they lie: with so many, to bring them last takes as long as it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        weight, bias = self.weight.flatten(1).expand(len(x), -1, -1), self.bias[:, None]  # type: ignore[index]
        return _channels_last(torch.baddbmm(bias, weight, x.flatten(2)).reshape(len(x), -1, *x.shape[2:]))


def _stem(inputs: int, outputs: int, narrow: int | None) -> nn.Module:
    if narrow is None:
        narrow = outputs if inputs > _MANY * outputs else 0
    if not narrow:
        return nn.Conv2d(inputs, outputs, 3, padding=1)
    # One place's codes say little that its neighbours' do not: most of nine times as many weights would be wasted.
    return nn.Sequential(Narrowing(inputs, narrow), nn.Conv2d(narrow, outputs, 3, padding=1))


class UNet(Backbone):
    def __init__(self, config: UNetConfig, in_channels: int, height: int, width: int, in_vector: int) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        condition = 4 * config.channels
        self.embedding = ConditionEmbedding(in_vector, condition)
        self.stem = _stem(in_channels, widths[0], config.narrow)

        places = [(height >> level) * (width >> level) for level in range(len(widths))]

        def attention(channels: int, level: int) -> SelfAttention:
            return SelfAttention(channels, config.heads, config.qk_norm, places[level])

        def block(inputs: int, outputs: int, level: int, attends: bool) -> ResidualBlock:
            attending = attention(outputs, level) if attends else None
            return ResidualBlock(inputs, outputs, condition, config.dropout, places[level], attending)

        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        skips = []
        current = widths[0]
        for level, level_width in enumerate(widths):
            blocks = nn.ModuleList()
            for _ in range(config.blocks):
                blocks.append(block(current, level_width, level, level in config.attention))
                current = level_width
                skips.append(current)
            self.down.append(blocks)
            if level + 1 < len(widths):
                self.shrink.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
        self.middle1 = block(current, current, -1, attends=False)
        self.attention = attention(current, -1) if config.heads else nn.Identity()
        self.middle2 = block(current, current, -1, attends=False)
        # Heads of vector modalities need where things are: pooling over places loses it.
        self.summary = nn.Sequential(nn.Flatten(), nn.Linear(current * places[-1], config.vector))
        self.summary_condition = nn.Linear(condition, config.vector)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList()
            for _ in range(config.blocks):
                blocks.append(block(current + skips.pop(), level_width, level, level in config.attention))
                current = level_width
            self.up.append(blocks)
            if level > 0:  # narrowed before it grows: a quarter of the work
                self.grow.append(nn.Conv2d(current, widths[level - 1], 3, padding=1))
                current = widths[level - 1]
        features = config.features or current
        # Heads are linear in what SiLU leaves of each feature: with as many as the first level has, they cannot say all
        # that it knows.
        self.widen = nn.Conv2d(current, features, 1) if features != current else nn.Identity()
        self.norm = _norm(features, height * width)
        self.features = FeatureSpec(features, height, width, config.vector)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        blocks: list[nn.Module] = [block for block in self.modules() if isinstance(block, ResidualBlock)]
        return [*blocks, self.attention] if isinstance(self.attention, SelfAttention) else blocks

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        condition = self.embedding(noise, vector)
        h = self.stem(z if isinstance(self.stem, nn.Sequential) else _channels_last(z))
        skips = []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, condition)
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.middle2(self.attention(self.middle1(h, condition)), condition)
        summary = self.summary(h) + self.summary_condition(condition)
        for level, blocks in enumerate(self.up):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(torch.cat([h, skips.pop()], 1), condition)
            if level < len(self.grow):
                h = F.interpolate(self.grow[level](h), scale_factor=2.0, mode="nearest")
        return Features(F.silu(self.norm(self.widen(h))), F.silu(summary))


@frozen
class UNetConfig(BackboneConfig):
    """A convolutional U-Net.

    Attributes:
        channels: width of the first level.
        multipliers: widths of the levels as multiples of it; each level halves the side.
        blocks: residual blocks a level, on the way down and as many on the way up.
        attention: levels with self-attention after each of their residual blocks; 0 is the first, the finest.
        heads: attention heads at these levels and at the bottleneck; 0 for no attention at all.
        qk_norm: scale queries and keys to an RMS of 1, times learned gains, so that no logit of attention grows beyond
            bounds (Dehghani et al. 2023).
        narrow: channels to which a 1 × 1 convolution brings the codes ahead of the first of 3 × 3, as the bottleneck
            of a patch embedding does (Li & He 2025, "Back to Basics"); 0: none; None: ``channels`` where the codes
            have more than four times as many, else none.
        features: width of the feature map that heads read; None: that of the first level.
        vector: width of the feature vector.
        dropout: inside residual blocks.
    """

    kind: ClassVar[str] = "unet"
    channels: int = field(default=48, validator=ge(8))
    multipliers: tuple[int, ...] = field(default=(1, 2), validator=[min_len(1), deep_iterable(ge(1))])
    blocks: int = field(default=1, validator=ge(1))
    attention: tuple[int, ...] = field(default=(), validator=deep_iterable(ge(0)))
    heads: int = field(default=4, validator=ge(0))
    qk_norm: bool = False
    narrow: int | None = field(default=None, validator=optional(ge(0)))
    features: int | None = field(default=None, validator=optional(ge(1)))
    vector: int = field(default=256, validator=ge(1))
    dropout: float = field(default=0.0, validator=ge(0.0))

    def __attrs_post_init__(self) -> None:
        last = len(self.multipliers) - 1
        if beyond := [level for level in self.attention if level > last]:
            raise ValueError(
                f"'attention': found level {beyond[0]}, but {len(self.multipliers)} multipliers make levels 0 to {last}"
            )
        if (self.attention or self.qk_norm) and not self.heads:
            key = "attention" if self.attention else "qk_norm"
            raise ValueError(f"'{key}': needs attention heads, found heads = 0; set heads, or leave out {key}")

    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        halvings = 2 ** (len(self.multipliers) - 1)
        if height % halvings or width % halvings:
            raise UserError(
                f"backbone.multipliers: {len(self.multipliers)} levels halve the latent {len(self.multipliers) - 1} "
                f"times, but {height} × {width} is not divisible by {halvings}; use fewer levels"
            )
        for level in {*self.attention, len(self.multipliers) - 1} if self.heads else ():
            if (channels := self.channels * self.multipliers[level]) % self.heads:
                raise UserError(
                    f"backbone.heads: {self.heads} heads do not divide the {channels} channels of level {level}, where "
                    "there is attention"
                )
        return UNet(self, in_channels, height, width, in_vector)


@hookimpl
def mtdiffusion_backbones() -> list[type]:
    return [UNetConfig]
