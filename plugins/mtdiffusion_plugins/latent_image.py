"""The latent image modality: a picture as the latent of a frozen autoencoder, and a Gaussian head on latents.

Latent diffusion (Rombach et al. 2022): the autoencoder encodes each picture once, before training; the diffusion model
knows latents only, and what it generates is decoded where a picture is asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import gt, in_
from torch import Tensor

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, InputSpec, LatentSpec, Modality, Params
from mtdiffusion.loss import low_before_high
from mtdiffusion_plugins.autoencoders import (
    Autoencoder,
    Place,
    Spec,
    load_autoencoder,
    read_spec,
    require_diffusers,
    weights_key,
)
from mtdiffusion_plugins.files import PICTURE_GIVEN, read_image, write_image
from mtdiffusion_plugins.heads import (
    MapHead,
    ScaleHead,
    VectorHead,
    check_batch,
    gaussian_objective,
    patch_channels,
    picture_hint,
    scale_of,
)
from mtdiffusion_plugins.heads import picture_size as fitting_size
from mtdiffusion_plugins.image import PatchEncoder, picture_metrics
from mtdiffusion_plugins.sizes import Size, by, positive_size
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.errors import given_file
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.hub import HUB_NAME
from mtdiffusion_registry.pace import LOGGER

MTDIFFUSION_API = 1

_UNIT_RMS = (1 / 3, 3.0)
"""Between which the root mean square of normalised latents must be: outside, they drown in the noise, or it in them."""
_SHOWN = 16
"""Pictures by which it is told what the autoencoder loses."""


class Scale(torch.nn.Module):
    """Mean and standard deviation of latents by channel: ``[c, 1, 1]`` each, in the checkpoint; of vectors ``[c]``.

    Attributes:
        known: whether they are known, or still to be measured (0 and 1 until then).
    """

    def __init__(
        self, shape: tuple[int, ...], scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    ) -> None:
        super().__init__()
        mean, std = scale or ((0.0,) * shape[0], (1.0,) * shape[0])
        self.register_buffer("mean", torch.tensor(mean).reshape(shape))
        self.register_buffer("std", torch.tensor(std).reshape(shape))
        self.register_buffer("known", torch.tensor(scale is not None))
        self.mean: Tensor
        self.std: Tensor
        self.known: Tensor

    def normalised(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def restored(self, x: Tensor) -> Tensor:
        return self.mean + self.std * x

    def measure(self, x: Tensor) -> None:
        """From latents ``[n, c, h, w]``, or vectors ``[n, c]``; a channel that hardly varies is not blown up."""
        std, mean = torch.std_mean(x.double(), (0, *range(2, x.ndim)), correction=0, keepdim=True)
        self.mean.copy_(mean[0])
        self.std.copy_(std[0].clamp(min=1e-3 * max(float(std.max()), 1e-6)))
        self.known.fill_(True)


class LatentEncoder(PatchEncoder):
    """Normalised latents, p × p places of them in the channels of one place: lossless, affine.

    Not spatial: each place of an autoencoder's latent depends on more of the picture than its own patch (of one with
    attention, on all of it), so that what is hidden of a picture would pass. It is observed whole or not at all.
    """

    spatial = False

    def __init__(self, latent: LatentSpec, channels: int, patch: int, scale: Scale, kind: str = "latent_image") -> None:
        super().__init__(latent, channels, patch, kind)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.scale.normalised(x))


class GaussianLatentDecoder(Decoder):
    """p(x | h) = N(μ + s · mean, (s σ)² I) of latents, with μ and s their mean and standard deviation by channel, and
    one σ a sample.

    The likelihood is the density of the latents: what it says in bits is of them, not of pixels.

    Args:
        mean: the head of their mean, of the feature map or, of latents that are vectors, of the feature vector.
        shape: of a latent.
    """

    def __init__(self, features: FeatureSpec, mean: MapHead | VectorHead, shape: tuple[int, ...], scale: Scale) -> None:
        super().__init__()
        self.mean = mean
        self.log_scale = ScaleHead(features)
        self.scale = scale
        self.dims = math.prod(shape)

    def forward(self, features: Features) -> Params:
        read = features.map if isinstance(self.mean, MapHead) else features.vector
        return {"mean": self.mean(read), "log_scale": self.log_scale(features.vector)}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        mean = params["mean"]
        std = scale_of(params["log_scale"], mean)
        error = (self.scale.normalised(x) - mean) / std
        terms = 0.5 * error.square() + std.log() + self.scale.std.log() + 0.5 * math.log(2 * math.pi)
        return terms.flatten(1).sum(1)

    def objective(self, params: Params, x: Tensor) -> Tensor:
        return gaussian_objective(params["mean"], params["log_scale"], self.scale.normalised(x))

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(self.mode(params))  # the encoder is affine

    def mode(self, params: Params) -> Tensor:
        return self.scale.restored(params["mean"])

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        mean = params["mean"]
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=device, generator=generator).to(mean.device)
        return self.scale.restored(mean + scale_of(params["log_scale"], mean) * noise)


class LatentImageModality(Modality):
    """x is a latent; people, evaluators and files see its picture."""

    metric_directions: Mapping[str, str] = MappingProxyType(
        {"mse": "lower", "psnr": "higher", "ssim": "higher", "latent_mse": "lower", "readout_latent_mse": "lower"}
    )

    derived = True

    def __init__(
        self, encoder: Encoder, decoder: Decoder, config: LatentImageConfig, spec: Spec, shape: tuple[int, int, int]
    ) -> None:
        super().__init__(encoder, decoder)
        self.config, self.spec, self.shape = config, spec, shape
        self.size = (shape[1] * spec.factor, shape[2] * spec.factor)
        self.field = config.field
        self.loss_weight = config.loss_weight
        self.snr_clamp = config.snr_clamp
        self._told = False

    @property
    def autoencoder(self) -> Autoencoder:
        """The frozen autoencoder, which is no part of this module."""
        return load_autoencoder(self.config.place)

    @property
    def derived_by(self) -> str:  # type: ignore[override]  # it is known once the weights are here
        return weights_key(self.config.place)

    @property
    def scale(self) -> Scale:
        """Of its latents."""
        return self.decoder.scale  # type: ignore[return-value]

    def check(self, x: Tensor) -> None:
        hint = f" (latents of pictures of {by(self.size)}, height × width)"
        check_batch("latent_image", x, self.shape, floating=True, hint=hint)

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, *self.shape)

    def derive(self, source: Tensor | Sequence[str]) -> Tensor:
        """Latents of pictures ``[B, 1 or 3, h, w]`` in [−1, 1]; grey ones are repeated where colours are asked for.

        Raises:
            ValueError: if they have another shape.
        """
        pictures = super().derive(source)
        channels = self.spec.pictures
        if pictures.ndim != 4 or pictures.shape[1] not in (1, channels) or tuple(pictures.shape[2:]) != self.size:
            hint = picture_hint(pictures, (channels, *self.size), self.data_field, settable=False)
            raise ValueError(
                f"latent_image: expected pictures [batch, {channels}, {self.size[0]}, {self.size[1]}], found "
                f"{list(pictures.shape)}{hint}"
            )
        pictures = pictures.expand(-1, channels, -1, -1)
        latents = self.autoencoder.encode(pictures)
        if not self._told:
            self._told = True
            psnr = picture_metrics(self.judged(latents[:_SHOWN]), pictures[:_SHOWN])["psnr"]
            logging.getLogger(LOGGER).info(
                "%s gives back the first %d pictures with a PSNR of %.1f dB: what it loses no model of its latents has",
                self.config.autoencoder,
                min(len(pictures), _SHOWN),
                psnr,
            )
        return latents

    def measure(self, x: Tensor) -> None:
        """Mean and standard deviation by channel, unless they are known; then whether they suit these latents.

        Raises:
            ValueError: if normalised latents are far from unit variance.
        """
        if not bool(self.scale.known):
            self.scale.measure(x)
        rms = self.scale.normalised(x.to(self.scale.mean)).square().mean().sqrt().item()
        if not _UNIT_RMS[0] <= rms <= _UNIT_RMS[1]:
            raise ValueError(
                f"its latents, normalised by the autoencoder's own factors, have a root mean square of {rms:.3g}, "
                'expected about 1; set normalisation = "data" to measure them'
            )

    def judged(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode(x)

    def render(self, x: Tensor) -> Tensor:
        return ((self.judged(x).expand(-1, 3, -1, -1) + 1) / 2).clamp(0, 1)

    @property
    def input_spec(self) -> InputSpec:
        return InputSpec("picture")

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """``latent_mse``, per number of normalised latents; and of their pictures, both decoded, ``mse``, ``psnr`` and
        ``ssim`` as of an image."""
        error = self.scale.normalised(generated.to(self.scale.mean)) - self.scale.normalised(truth.to(self.scale.mean))
        return {
            "latent_mse": error.square().mean().item(),
            **picture_metrics(self.judged(generated), self.judged(truth)),
        }

    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        """``readout_latent_mse``: of the mean, per number of normalised latents."""
        mean = params["mean"].to(self.scale.mean)
        error = mean - self.scale.normalised(truth.to(self.scale.mean))
        return {"readout_latent_mse": error.square().mean().item()}

    def parse(self, text: str) -> Tensor:
        """The latent of a picture's file."""
        picture = read_image(
            given_file(text, PICTURE_GIVEN),
            self.spec.pictures,
            self.size,
            resize=self.resize,
        )
        return self.autoencoder.encode(picture[None])[0]

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        return write_image(self.judged(x[None])[0], folder / f"{stem}.png")


def _place(name: str | Path) -> str | Path:
    """A path unless it is a name on the Hub, so that it is known to say where something is, not what it is."""
    return str(name) if HUB_NAME.fullmatch(str(name)) and not Path(name).is_dir() else Path(name)


@frozen
class LatentImageConfig(ModalityConfig):
    """A picture as a latent of a frozen autoencoder, float32 ``[B, c, height / f, width / f]``.

    Attributes:
        size: height and width of the picture in pixels, a multiple of the latent's and of the autoencoder's factor f;
            or the height alone, and the width is as the latent's shape has it.
        autoencoder: ``OWNER/NAME`` on the Hugging Face Hub, or a folder: an AutoencoderKL, AutoencoderTiny or
            AutoencoderDC of diffusers, saved as safetensors.
        subfolder: of it, in which the autoencoder is ("vae" of a model with several parts).
        revision: branch, tag or commit on the Hub; a commit never changes.
        normalisation: "autoencoder": latents are normalised by the factors in the autoencoder's configuration or,
            where it has none, as "data": by mean and standard deviation of each channel over the training data.
        loss_weight: λ of its part of L2.
        snr_clamp: λ_t = loss_weight · clamp(SNR_t, low, high).
        field: the data set's field of pictures; None: the instance's name.
    """

    kind: ClassVar[str] = "latent_image"
    size: Size = field(validator=positive_size)
    autoencoder: str | Path = field(converter=_place)
    subfolder: str | None = None
    revision: str | None = None
    normalisation: Literal["autoencoder", "data"] = field(default="autoencoder", validator=in_(("autoencoder", "data")))
    loss_weight: float = field(default=1.0, validator=gt(0.0))
    snr_clamp: tuple[float, float] = field(default=(0.05, 5.0), validator=low_before_high)
    field: str | None = None

    @property
    def place(self) -> Place:
        """Where the autoencoder is."""
        name = self.autoencoder
        return Place(name.expanduser() if isinstance(name, Path) else name, self.subfolder, self.revision)

    def latent_channels(self, height: int, width: int) -> int:
        spec = read_spec(self.place)
        return spec.channels * max(patch_channels(self.size, height, width) // spec.factor**2, 1)

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        require_diffusers()
        spec = read_spec(self.place)
        height, width, pixels = fitting_size("latent_image", self.size, latent)
        if pixels % spec.factor:
            most = by((height // spec.factor, width // spec.factor))
            raise ValueError(
                f"latent_image: a place of a latent of {by((latent.height, latent.width))} holds {pixels} × {pixels} "
                f"pixels of a picture of {by((height, width))}, no multiple of the autoencoder's {spec.factor} × "
                f"{spec.factor}; expected a latent of {most}, or a whole part of that"
            )
        shape = (spec.channels, height // spec.factor, width // spec.factor)
        scale = Scale((spec.channels, 1, 1), spec.scale if self.normalisation == "autoencoder" else None)
        patch = pixels // spec.factor
        encoder = LatentEncoder(latent, spec.channels, patch, scale)
        decoder = GaussianLatentDecoder(features, MapHead(features, spec.channels, patch), shape, scale)
        return LatentImageModality(encoder, decoder, self, spec, shape)


@hookimpl
def mtdiffusion_modalities() -> list[type]:
    return [LatentImageConfig]
