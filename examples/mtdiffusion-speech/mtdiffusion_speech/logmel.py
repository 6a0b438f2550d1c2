"""``logmel``: speech as a log-mel spectrogram, in patches, with a Gaussian head."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion_registry import ModalityConfig, hookimpl
from mtdiffusion_speech.spectrogram import FRAMES_A_SECOND, RANGE, LogMel, read_wav, write_wav

MTDIFFUSION_API = 1

LOG_SCALE = (-6.0, 2.0)


class Patches(nn.Module):
    """Spectrograms ``[B, 1, bands, frames]``, standardised, to ``[B, c, H, W]`` and back: a place holds a patch of some
    bands in some frames, as its channels."""

    def __init__(self, config: LogMelConfig, height: int, width: int) -> None:
        super().__init__()
        self.mean, self.std = config.mean, config.std
        self.grid = (height, config.bands // height, width, config.frames // width)
        self.channels = self.grid[1] * self.grid[3]

    def forward(self, x: Tensor) -> Tensor:
        height, bands, width, frames = self.grid
        patches = ((x - self.mean) / self.std).reshape(-1, height, bands, width, frames)
        return patches.permute(0, 2, 4, 1, 3).reshape(-1, self.channels, height, width)

    def inverse(self, e: Tensor) -> Tensor:
        height, bands, width, frames = self.grid
        u = e.reshape(-1, bands, frames, height, width).permute(0, 3, 1, 4, 2)
        return u.reshape(-1, 1, height * bands, width * frames) * self.std + self.mean


class LogMelEncoder(Encoder):
    """Standardised levels, patch by patch: fixed and linear, so it cannot shrink, and lossless."""

    spatial = True

    def __init__(self, latent: LatentSpec, patches: Patches) -> None:
        super().__init__(latent)
        self.patches = patches
        self.spare = latent.channels - patches.channels
        if self.spare < 0:
            raise ValueError(f"logmel: its code needs {patches.channels} channels, found {latent.channels}")

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.patches(x), (0, 0, 0, 0, 0, self.spare))


class GaussianDecoder(Decoder):
    """p(x | h) = N(mean, (std · σ)² I), the mean read off the feature map; one σ a sample."""

    def __init__(self, features: FeatureSpec, patches: Patches, dims: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features.channels, patches.channels, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        self.log_scale = nn.Linear(features.vector, 1)
        nn.init.zeros_(self.log_scale.weight)
        nn.init.constant_(self.log_scale.bias, -1.0)  # within the range of the levels, before it has learned
        self.patches, self.dims = patches, dims

    def forward(self, features: Features) -> Params:
        mean = self.patches.inverse(self.conv(features.map))
        # The scale is read off the features, and does not shape them.
        return {"mean": mean, "log_scale": self.log_scale(features.vector.detach())[:, 0]}

    def _error(self, params: Params, x: Tensor) -> Tensor:
        """Mean squared error of standardised levels: ``[B]``."""
        return ((x - params["mean"]) / self.patches.std).square().flatten(1).mean(1)

    def nll(self, params: Params, x: Tensor) -> Tensor:
        """Of the levels as a density over real numbers."""
        log_scale = params["log_scale"].clamp(*LOG_SCALE)
        each = self._error(params, x) * torch.exp(-2 * log_scale) / 2 + log_scale + math.log(self.patches.std)
        return self.dims * (each + math.log(2 * math.pi) / 2)

    def objective(self, params: Params, x: Tensor) -> Tensor:
        """Half the squared error, which trains the mean alike at all scales, and apart from it the scale's own nll."""
        error, log_scale = self._error(params, x), params["log_scale"].clamp(*LOG_SCALE)
        return error / 2 + 0.01 * (error.detach() * torch.exp(-2 * log_scale) / 2 + log_scale)

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(params["mean"])  # linear

    def mode(self, params: Params) -> Tensor:
        return params["mean"].clamp(-1, 1)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        mean = params["mean"]
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=device, generator=generator).to(mean.device)
        scale = self.patches.std * params["log_scale"].clamp(*LOG_SCALE).exp()
        return (mean + scale[:, None, None, None] * noise).clamp(-1, 1)


class LogMelModality(Modality):
    metric_directions = MappingProxyType({"log_mel_distance": "lower"})
    snr_clamp = (0.05, 5.0)

    def __init__(self, encoder: Encoder, decoder: Decoder, config: LogMelConfig) -> None:
        super().__init__(encoder, decoder)
        self.spectrogram = config.spectrogram
        self.field = config.field
        self.loss_weight = config.loss_weight

    def check(self, x: Tensor) -> None:
        shape = [1, self.spectrogram.bands, self.spectrogram.frames]
        if list(x.shape[1:]) != shape or x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"logmel: expected floating point [batch, 1, bands = {shape[1]}, frames = {shape[2]}], found {x.dtype} "
                f"of {list(x.shape)}; bands and frames of modality and data set must be the same"
            )
        if not bool((x.abs() <= 1.001).all()):  # no comparison holds for NaN
            raise ValueError(f"logmel: expected levels in [-1, 1], found {float(x.min()):g} to {float(x.max()):g}")

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1, self.spectrogram.bands, self.spectrogram.frames)

    def render(self, x: Tensor) -> Tensor:
        """Time to the right and frequency up: black is silence, white the loudest there can be."""
        light = ((x[:, 0].flip(1) + 1) / 2).clamp(0, 1)
        return torch.stack([light, light**1.5, light**3], 1)

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """``log_mel_distance`` in dB: root mean square over a spectrogram's cells of the difference, its mean over
        samples. Two people say one digit differently, so it is small only where the very recording is known."""
        decibels = (generated - truth).double() * RANGE / 2
        return {"log_mel_distance": decibels.square().flatten(1).mean(1).sqrt().mean().item()}

    def parse(self, text: str) -> Tensor:
        """A .wav file of any length and rate."""
        return self.spectrogram.analyse(read_wav(Path(text), self.spectrogram.rate))

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        """A .wav file to listen to. No sound may have exactly this spectrogram: what is read again is near it."""
        path = folder / f"{stem}.wav"
        write_wav(self.spectrogram.synthesise(x), path, self.spectrogram.rate)
        return path


@frozen
class LogMelConfig(ModalityConfig):
    """A log-mel spectrogram, float32 ``[B, 1, bands, frames]`` in [-1, 1]: see :class:`LogMel`.

    Attributes:
        rate: samples a second, of files.
        bands: mel-spaced bands of frequencies; a multiple of the latent's height.
        frames: of 20 ms; a multiple of the latent's width.
        mean, std: of the levels over the data, about. The defaults are the spoken digits'.
        loss_weight: λ of its part of L2.
        field: the data set's field; None: the instance's name.
    """

    kind: ClassVar[str] = "logmel"
    rate: int = field(default=8000, validator=ge(FRAMES_A_SECOND))
    bands: int = field(default=32, validator=ge(1))
    frames: int = field(default=32, validator=ge(1))
    mean: float = -0.42
    std: float = field(default=0.58, validator=gt(0.0))
    loss_weight: float = field(default=1.0, validator=gt(0.0))
    field: str | None = None

    @property
    def spectrogram(self) -> LogMel:
        """What turns sound into x and back."""
        return LogMel(self.rate, self.bands, self.frames)

    def latent_channels(self, height: int, width: int) -> int:
        if self.bands % height or self.frames % width:
            raise ValueError(
                f"logmel: {self.bands} bands of {self.frames} frames do not fill a latent of {height} × {width}; "
                "expected bands to be a multiple of its height, and frames of its width"
            )
        return self.bands * self.frames // (height * width)

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        self.latent_channels(latent.height, latent.width)  # refuses what does not fit
        self.spectrogram.filters()  # and what has too many bands
        patches = Patches(self, latent.height, latent.width)
        decoder = GaussianDecoder(features, patches, self.bands * self.frames)
        return LogMelModality(LogMelEncoder(latent, patches), decoder, self)


@hookimpl
def mtdiffusion_modalities() -> list[type[ModalityConfig]]:
    return [LogMelConfig]
