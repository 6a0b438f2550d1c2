"""The image modality: identity, patch or learned strided-convolution codes, and a Gaussian head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, in_
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, InputSpec, LatentSpec, Modality, Params
from mtdiffusion.loss import low_before_high
from mtdiffusion.precision import single_or_wider
from mtdiffusion_plugins.files import PICTURE_GIVEN, from_levels, read_image, write_image
from mtdiffusion_plugins.heads import (
    MapHead,
    ScaleHead,
    check_batch,
    check_channels,
    check_range,
    check_shape,
    discretised_gaussian_nll,
    gaussian_objective,
    patch_channels,
    picture_hint,
    picture_size,
    scale_of,
    with_spare,
)
from mtdiffusion_plugins.sizes import Size, positive_size
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.errors import given_file
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

_BATCH = 256  # pictures that are compared at a time: SSIM holds fifteen copies of them


class PatchEncoder(Encoder):
    """Each p × p patch becomes the channels of one place of the latent: lossless, linear. p = 1 is the identity."""

    spatial = True

    def __init__(self, latent: LatentSpec, channels: int, patch: int, kind: str = "image") -> None:
        super().__init__(latent)
        check_channels(kind, latent, channels * patch**2)
        self.patch = patch
        self.spare = latent.channels - channels * patch**2

    def forward(self, x: Tensor) -> Tensor:
        return with_spare(F.pixel_unshuffle(x, self.patch), self.spare)


class ConvEncoder(Encoder):
    """A learned strided convolution with orthonormal filters: p × p patches to fewer channels than they have numbers.

    Linear, so that the code of the mean is the mean of the code; orthonormal, so that it cannot shrink.
    """

    spatial = True

    def __init__(self, latent: LatentSpec, channels: int, patch: int) -> None:
        super().__init__(latent)
        if latent.channels > channels * patch**2:
            raise ValueError(
                f"image: a conv code of {latent.channels} channels cannot be orthonormal over patches of "
                f"{channels * patch**2} numbers; expected at most that many channels"
            )
        self.patch = patch
        linear = nn.Linear(channels * patch**2, latent.channels, bias=False)
        self.filters = nn.utils.parametrizations.orthogonal(linear)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x, self.patch).movedim(1, -1)  # [B, H, W, channels · p²]
        filters: Tensor = self.filters.weight  # type: ignore[assignment]  # of a parametrised module
        return F.linear(patches, filters.to(x.dtype)).movedim(-1, 1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        def wide(x: Tensor) -> Tensor:
            """Filters of 16 bits are not made orthonormal: LAPACK has none of that."""
            applied: Tensor = fn(x)
            return applied if applied.dtype == single_or_wider(applied.dtype) else x.to(applied.device)

        return super()._apply(wide, recurse)  # type: ignore[no-untyped-call]


class GaussianImageDecoder(Decoder):
    """p(x | h) = N(mean, σ² I) with one σ a sample; the exact likelihood is over the discrete levels of the pixels."""

    def __init__(self, features: FeatureSpec, shape: tuple[int, int, int], patch: int, levels: int) -> None:
        super().__init__()
        self.mean = MapHead(features, shape[0], patch)
        self.log_scale = ScaleHead(features)
        self.levels = levels
        self.dims = math.prod(shape)

    def forward(self, features: Features) -> Params:
        return {"mean": self.mean(features.map), "log_scale": self.log_scale(features.vector)}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        return discretised_gaussian_nll(params["mean"], params["log_scale"], x, self.levels)

    def objective(self, params: Params, x: Tensor) -> Tensor:
        return gaussian_objective(params["mean"], params["log_scale"], x)

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(params["mean"])  # the encoders here are linear

    def mode(self, params: Params) -> Tensor:
        return params["mean"].clamp(-1, 1)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        mean = params["mean"]
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=device, generator=generator).to(mean.device)
        return (mean + scale_of(params["log_scale"], mean) * noise).clamp(-1, 1)


class ImageModality(Modality):
    metric_directions: Mapping[str, str] = MappingProxyType(
        {"mse": "lower", "psnr": "higher", "ssim": "higher", "readout_mse": "lower"}
    )

    moves = "image"
    coloured = True
    stored_dtypes = (torch.uint8,)

    def __init__(self, encoder: Encoder, decoder: Decoder, config: ImageConfig, shape: tuple[int, int, int]) -> None:
        super().__init__(encoder, decoder)
        self.shape = shape
        self.field = config.field
        self.loss_weight = config.loss_weight
        self.snr_clamp = config.snr_clamp

    def check(self, x: Tensor) -> None:
        check_batch("image", x, self.shape, floating=True, hint=picture_hint(x, self.shape, self.data_field))
        check_range("image", x, -1.001, 1.001)

    def from_stored(self, stored: Tensor) -> Tensor:
        return from_levels(stored)

    def check_stored(self, stored: Tensor) -> None:
        check_shape(
            "image", stored, self.shape, picture_hint(stored, self.shape, self.data_field)
        )  # any level is in the range

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, *self.shape)

    def render(self, x: Tensor) -> Tensor:
        rgb = x if self.shape[0] == 3 else x[:, :1].expand(-1, 3, -1, -1)
        return ((rgb + 1) / 2).clamp(0, 1)

    @property
    def input_spec(self) -> InputSpec:
        return InputSpec("picture")

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        return picture_metrics(generated, truth)

    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        """``readout_mse``: of the mean, per pixel, of pixels in [0, 1]."""
        return {"readout_mse": ((self.decoder.mode(params) - truth) / 2).square().mean().item()}

    def parse(self, text: str) -> Tensor:
        return read_image(
            given_file(text, PICTURE_GIVEN),
            self.shape[0],
            self.shape[1:],
            resize=self.resize,
        )

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        return write_image(x, folder / f"{stem}.png")


def picture_metrics(generated: Tensor, truth: Tensor) -> dict[str, float]:
    """``mse`` per pixel, and ``psnr`` in dB, of pixels in [0, 1]; ``ssim`` (Wang et al. 2004). Means over pictures.

    SSIM's window is Gaussian, σ = 1.5, 11 × 11; of pictures smaller than that, uniform, of the largest odd side up to 7
    that fits, and there is none below 3 × 3. It is taken where the window lies inside of the picture.

    Args:
        generated, truth: ``[B, C, h, w]`` in [−1, 1].
    """
    pairs = list(zip(torch.split(generated, _BATCH), torch.split(truth, _BATCH), strict=True))
    error = torch.cat([((a - b) / 2).square().flatten(1).mean(1) for a, b in pairs])
    metrics = {"mse": error.mean().item(), "psnr": (-10 * torch.log10(error.clamp(min=1e-10))).mean().item()}
    if min(truth.shape[-2:]) >= 3:
        metrics["ssim"] = torch.cat([_ssim(a, b) for a, b in pairs]).mean().item()
    return metrics


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM ``[B]`` of pictures ``[B, C, h, w]`` in [−1, 1], h, w ≥ 3."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(a.shape[-2:])
    gaussian = side >= 11
    window = 11 if gaussian else min(7, side - 1 + side % 2)
    _, full = structural_similarity_index_measure(
        a, b, gaussian_kernel=gaussian, kernel_size=window, data_range=2.0, return_full_image=True
    )
    # The margin is of windows that reach beyond the picture; releases of torchmetrics differ in whether they count it.
    margin = window // 2
    return full[..., margin:-margin, margin:-margin].flatten(1).mean(1)


@frozen
class ImageConfig(ModalityConfig):
    """A picture, float32 ``[B, channels, height, width]`` in [−1, 1].

    Attributes:
        size: height and width in pixels, the same multiple of the latent's; or the height alone (of a square latent:
            the side), and the width is as the latent's shape has it.
        channels: 1 (grey) or 3 (RGB).
        encoder: "patch" (lossless; the identity where the latent has the picture's size) or "conv" (learned, fewer
            channels).
        code_channels: channels of a "conv" code.
        levels: how many values a pixel can take, for the exact likelihood (256 for 8 bits).
        loss_weight: λ of its part of L2.
        snr_clamp: λ_t = loss_weight · clamp(SNR_t, low, high).
        field: the data set's field; None: the instance's name.
    """

    kind: ClassVar[str] = "image"
    size: Size = field(validator=positive_size)
    channels: Literal[1, 3] = field(default=3, validator=in_((1, 3)))
    encoder: Literal["patch", "conv"] = field(default="patch", validator=in_(("patch", "conv")))
    code_channels: int = field(default=4, validator=ge(1))
    levels: int = field(default=256, validator=ge(2))
    loss_weight: float = field(default=1.0, validator=gt(0.0))
    snr_clamp: tuple[float, float] = field(default=(0.05, 5.0), validator=low_before_high)
    field: str | None = None

    def latent_channels(self, height: int, width: int) -> int:
        if self.encoder == "conv":
            return self.code_channels
        return self.channels * patch_channels(self.size, height, width)

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        height, width, patch = picture_size("image", self.size, latent)
        shape = (self.channels, height, width)
        encoder = (PatchEncoder if self.encoder == "patch" else ConvEncoder)(latent, self.channels, patch)
        decoder = GaussianImageDecoder(features, shape, patch, self.levels)
        return ImageModality(encoder, decoder, self, shape)


@hookimpl
def mtdiffusion_modalities() -> list[type]:
    return [ImageConfig]
