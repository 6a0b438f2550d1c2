"""Backbones of the library diffusers: its U-Net and its diffusion transformer, by their own arguments.

Their weights start anew. Both are made for a timestep, a number; here the noise level, the clocks and the read-outs of
all modalities are embedded together, and the embedding enters where theirs of the timestep does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import deep_iterable, ge, in_, min_len
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Backbone, Features, FeatureSpec
from mtdiffusion_plugins.autoencoders import require_diffusers
from mtdiffusion_plugins.backbones.embedding import ConditionEmbedding
from mtdiffusion_registry.configs import BackboneConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

_TIMESTEPS = 1000  # which diffusers' embedding of a timestep is made for
_POOLED = 8  # places, along a side, of the map that the feature vector is made of

DownBlock = Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]


class DiffusersBackbone(Backbone):
    """A model of diffusers that gives the feature map; the feature vector is a linear map of it, pooled to at most
    8 × 8 places, and of the condition."""

    def __init__(
        self, model: Any, condition: int, vector: int, in_vector: int, channels: int, height: int, width: int
    ) -> None:
        super().__init__()
        self.model = model
        self.embedding = ConditionEmbedding(in_vector, condition)
        cell = (-(-height // _POOLED), -(-width // _POOLED))
        places = -(-height // cell[0]) * -(-width // cell[1])
        self.summary = nn.Sequential(
            nn.AvgPool2d(cell, ceil_mode=True), nn.Flatten(), nn.Linear(channels * places, vector)
        )
        self.summary_condition = nn.Linear(condition, vector)
        self.features = FeatureSpec(channels, height, width, vector)

    @abstractmethod
    def map(self, z: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """The model's output ``[B, channels, H, W]`` for a condition ``[B, width]``."""

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        condition = self.embedding(noise, vector)
        h = F.silu(self.map(z, noise, condition))
        return Features(h, F.silu(self.summary(h) + self.summary_condition(condition)))


class DiffusersUNet(DiffusersBackbone):
    """``UNet2DModel``; the condition is added to its embedding of the noise level, as that of a class would be."""

    def map(self, z: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        found: Tensor = self.model(z, noise * _TIMESTEPS, class_labels=condition, return_dict=False)[0]
        return found

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return (*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks)


class _Given(nn.Module):
    """In place of an embedding of timestep and class: what is given as the timestep is the condition already."""

    def forward(self, timestep: Tensor, class_labels: None = None, hidden_dtype: object = None) -> Tensor:
        return timestep


class DiffusersDiT(DiffusersBackbone):
    """``DiTTransformer2DModel``; the condition modulates its blocks and its last norm.

    Its blocks start as the identity (adaLN-zero, Peebles & Xie 2023), which diffusers leaves to trained weights.
    """

    def __init__(self, model: Any, *others: int) -> None:
        super().__init__(model, *others)
        for block in model.transformer_blocks:
            block.norm1.emb = _Given()  # the last norm asks that of the first block
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)

    def map(self, z: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        found: Tensor = self.model(z, timestep=condition, return_dict=False)[0]
        return found

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return tuple(self.model.transformer_blocks)


def _made(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, TypeError, NotImplementedError, ZeroDivisionError) as error:
        raise UserError(f"backbone: diffusers refuses these values: {' '.join(str(error).split())[:300]}") from error


@frozen
class DiffusersUNetConfig(BackboneConfig):
    """The U-Net of diffusers (``UNet2DModel``). Keys are its own arguments, beside ``channels`` and ``vector``.

    Attributes:
        block_out_channels: width of each level; each halves the side of the one before.
        down_block_types: the blocks on the way down, one a level: with attention ("AttnDownBlock2D") or without.
        up_block_types: the blocks on the way up, the coarsest level first.
        layers_per_block: residual blocks of each on the way down; one more on the way up.
        attention_head_dim: channels of an attention head.
        norm_num_groups: groups of group normalisation; it divides each width.
        resnet_time_scale_shift: whether the condition is added ("default"), or scales and shifts.
        dropout: inside residual blocks.
        channels: of the feature map.
        vector: width of the feature vector.
    """

    kind: ClassVar[str] = "diffusers_unet"
    block_out_channels: tuple[int, ...] = field(default=(32, 64), validator=[min_len(1), deep_iterable(ge(1))])
    down_block_types: tuple[DownBlock, ...] = ("DownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[UpBlock, ...] = ("AttnUpBlock2D", "UpBlock2D")
    layers_per_block: int = field(default=1, validator=ge(1))
    attention_head_dim: int = field(default=8, validator=ge(1))
    norm_num_groups: int = field(default=32, validator=ge(1))
    resnet_time_scale_shift: Literal["default", "scale_shift"] = field(
        default="default", validator=in_(("default", "scale_shift"))
    )
    dropout: float = field(default=0.0, validator=ge(0.0))
    channels: int = field(default=48, validator=ge(1))
    vector: int = field(default=256, validator=ge(1))

    def __attrs_post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for key in ("down_block_types", "up_block_types"):
            if (found := len(getattr(self, key))) != levels:
                raise ValueError(f"'{key}': expected {levels}, one for each of block_out_channels, found {found}")

    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        require_diffusers("this backbone")
        from diffusers import UNet2DModel

        levels = len(self.block_out_channels)
        if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
            raise UserError(
                f"backbone.block_out_channels: {levels} levels halve the latent {levels - 1} times, but {height} × "
                f"{width} is not divisible by {2 ** (levels - 1)}; use fewer levels"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups or channels % self.attention_head_dim:
                raise UserError(
                    f"backbone.block_out_channels: expected multiples of norm_num_groups = {self.norm_num_groups} and "
                    f"attention_head_dim = {self.attention_head_dim}, found {channels}"
                )
        model = _made(
            lambda: UNet2DModel(
                sample_size=(height, width),
                in_channels=in_channels,
                out_channels=self.channels,
                down_block_types=self.down_block_types,
                up_block_types=self.up_block_types,
                block_out_channels=self.block_out_channels,
                layers_per_block=self.layers_per_block,
                attention_head_dim=self.attention_head_dim,
                norm_num_groups=self.norm_num_groups,
                resnet_time_scale_shift=self.resnet_time_scale_shift,
                dropout=self.dropout,
                class_embed_type="identity",
            )
        )
        condition = 4 * self.block_out_channels[0]  # the width of its embedding of the timestep
        return DiffusersUNet(model, condition, self.vector, in_vector, self.channels, height, width)


@frozen
class DiffusersDiTConfig(BackboneConfig):
    """The diffusion transformer of diffusers (``DiTTransformer2DModel``). Keys are its own arguments, beside
    ``channels`` and ``vector``. The latent is to be a square.

    Attributes:
        num_layers: blocks.
        num_attention_heads: attention heads.
        attention_head_dim: channels of a head; the width is this times the heads.
        patch_size: side of the patch of the latent that is one token.
        attention_bias: whether queries, keys and values have a bias.
        activation_fn: inside the perceptron, by diffusers' name.
        dropout: inside blocks.
        channels: of the feature map it unfolds to.
        vector: width of the feature vector.
    """

    kind: ClassVar[str] = "diffusers_dit"
    num_layers: int = field(default=6, validator=ge(1))
    num_attention_heads: int = field(default=6, validator=ge(1))
    attention_head_dim: int = field(default=32, validator=ge(1))
    patch_size: int = field(default=1, validator=ge(1))
    attention_bias: bool = True
    activation_fn: Literal["gelu-approximate", "gelu", "geglu", "geglu-approximate"] = field(
        default="gelu-approximate", validator=in_(("gelu-approximate", "gelu", "geglu", "geglu-approximate"))
    )
    dropout: float = field(default=0.0, validator=ge(0.0))
    channels: int = field(default=48, validator=ge(1))
    vector: int = field(default=256, validator=ge(1))

    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        require_diffusers("this backbone")
        from diffusers import DiTTransformer2DModel

        if height != width:
            raise UserError(f"backbone: diffusers_dit wants a square latent, found {height} × {width}; use kind dit")
        if height % self.patch_size:
            raise UserError(f"backbone.patch_size: {self.patch_size} does not divide the latent of {height} × {width}")
        condition = self.num_attention_heads * self.attention_head_dim
        if condition % 4:
            raise UserError(
                f"backbone.attention_head_dim: expected a width of a multiple of 4, as sines and cosines tell rows and "
                f"columns, found {self.num_attention_heads} × {self.attention_head_dim}"
            )
        model = _made(
            lambda: DiTTransformer2DModel(
                sample_size=height,
                in_channels=in_channels,
                out_channels=self.channels,
                num_layers=self.num_layers,
                num_attention_heads=self.num_attention_heads,
                attention_head_dim=self.attention_head_dim,
                patch_size=self.patch_size,
                attention_bias=self.attention_bias,
                activation_fn=self.activation_fn,
                dropout=self.dropout,
            )
        )
        return DiffusersDiT(model, condition, self.vector, in_vector, self.channels, height, width)


@hookimpl
def mtdiffusion_backbones() -> list[type]:
    return [DiffusersUNetConfig, DiffusersDiTConfig]
