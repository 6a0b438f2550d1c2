"""Waveforms: an orthonormal lapped transform folded into the latent, and a Gaussian head.

``x`` is float32 ``[B, samples]`` in [-1, 1], which has nothing of the latent's shape. The modified discrete cosine
transform (MDCT; Princen and Bradley 1986), with the sine window and a circular boundary, is an orthonormal matrix: it
keeps energy, its inverse is its transpose, and a Gaussian in coefficients is one in samples.
"""

from __future__ import annotations

import math
import wave
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion_audio.field import AudioField, read_wav
from mtdiffusion_registry import DataField, ModalityConfig, UserError, hookimpl

MTDIFFUSION_API = 1

LOG_SCALE = (-6.0, 2.0)
FLOOR = 1e-6  # of the power of a short-time spectrum, against that of a full-scale tone: -60 dB


def mdct(frames: int, bins: int) -> Tensor:
    """The circular MDCT of ``frames · bins`` samples as an orthonormal matrix ``[frames, bins, samples]``, float32."""
    n = torch.arange(2 * bins, dtype=torch.float64)
    k = torch.arange(bins, dtype=torch.float64)[:, None]
    window = torch.sin(math.pi * (n + 0.5) / (2 * bins))
    rows = math.sqrt(2 / bins) * window * torch.cos(math.pi / bins * (n + 0.5 + bins / 2) * (k + 0.5))
    first = F.pad(rows, (0, (frames - 2) * bins))
    return torch.stack([first.roll(frame * bins, 1) for frame in range(frames)]).float()


class Folding(nn.Module):
    """The transform ``[B, samples] -> [B, c, H, W]`` and back: frequency goes up with the row, time with the column.

    A place holds the coefficients of one band of frequencies in one stretch of time, as its channels.
    """

    def __init__(self, frames: int, bins: int, height: int, width: int) -> None:
        super().__init__()
        bands = mdct(frames, bins).reshape(width, frames // width, height, bins // height, frames * bins)
        matrix = bands.permute(1, 3, 2, 0, 4).flatten(0, 3)  # channels, then rows, then columns
        self.shape = (matrix.shape[0] // (height * width), height, width)
        self.register_buffer("matrix", matrix, persistent=False)  # it follows from the configuration
        self.matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix.T).reshape(-1, *self.shape)

    def inverse(self, e: Tensor) -> Tensor:
        return e.flatten(1) @ self.matrix


class WaveformEncoder(Encoder):
    """MDCT coefficients over the data's RMS amplitude. Fixed and orthonormal: it cannot shrink, and loses nothing."""

    def __init__(self, latent: LatentSpec, folding: Folding, rms: float) -> None:
        super().__init__(latent)
        self.folding, self.rms = folding, rms
        self.spare = latent.channels - folding.shape[0]
        if self.spare < 0:
            raise ValueError(f"audio: its code needs {folding.shape[0]} channels, found {latent.channels}")

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.folding(x) / self.rms, (0, 0, 0, 0, 0, self.spare))


class GaussianDecoder(Decoder):
    """p(x | h) = N(mean, (rms · σ)² I), the mean read off the feature map as MDCT coefficients; one σ a sample."""

    def __init__(self, features: FeatureSpec, folding: Folding, samples: int, rms: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features.channels, folding.shape[0], 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        self.log_scale = nn.Linear(features.vector, 1)
        nn.init.zeros_(self.log_scale.weight)
        self.folding, self.rms = folding, rms
        self.dims = samples

    def forward(self, features: Features) -> Params:
        mean = self.rms * self.folding.inverse(self.conv(features.map))
        # The scale is read off the features, and does not shape them.
        return {"mean": mean, "log_scale": self.log_scale(features.vector.detach())[:, 0]}

    def _error(self, params: Params, x: Tensor) -> Tensor:
        """Mean squared error over the data's power: ``[B]``."""
        return ((x - params["mean"]) / self.rms).square().mean(1)

    def nll(self, params: Params, x: Tensor) -> Tensor:
        """Of the waveform as a density over real samples."""
        log_scale = params["log_scale"].clamp(*LOG_SCALE)
        each = self._error(params, x) * torch.exp(-2 * log_scale) / 2 + log_scale + math.log(self.rms)
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
        scale = self.rms * params["log_scale"].clamp(*LOG_SCALE).exp()
        return (mean + scale[:, None] * noise).clamp(-1, 1)


class AudioModality(Modality):
    metric_directions = MappingProxyType({"log_spectral_distance": "lower", "snr_db": "higher"})
    # Tones stand out of noise in a few coefficients each: which they are is settled while the mean SNR is still low.
    snr_clamp = (0.5, 2.0)

    def __init__(self, encoder: Encoder, decoder: Decoder, config: AudioConfig) -> None:
        super().__init__(encoder, decoder)
        self.samples, self.rate = config.samples, config.rate
        self.field = config.field
        self.loss_weight = config.loss_weight

    def check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.samples or not x.is_floating_point():
            raise ValueError(
                f"audio: expected floating point [batch, {self.samples}], found {x.dtype} of {list(x.shape)}"
            )
        if not bool((x.abs() <= 1.001).all()):  # no comparison holds for NaN
            raise ValueError(f"audio: expected samples in [-1, 1], found {float(x.min()):g} to {float(x.max()):g}")

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.samples)

    def _spectra(self, x: Tensor) -> Tensor:
        """Short-time power in dB ``[B, frequencies, times]``: 0 for a full-scale tone, -60 at least."""
        size = min(128, self.samples)
        window = torch.hann_window(size, dtype=x.dtype, device=x.device)
        stft = torch.stft(x, size, size // 4, window=window, pad_mode="constant", return_complex=True)
        return 10 * torch.log10((stft.abs() * 2 / window.sum()).square().clamp(min=FLOOR))

    def render(self, x: Tensor) -> Tensor:
        """A spectrogram, time to the right and frequency up: black at -60 dB, white at full scale."""
        light = (self._spectra(x).flip(1) / 60 + 1).clamp(0, 1)
        return torch.stack([light, light**1.5, light**3], 1)

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """How close waveforms are, in dB.

        ``log_spectral_distance`` (Gray and Markel 1976): the root mean square over frequencies of the difference of
        short-time spectra, its mean over times and samples. ``snr_db``: power of the truth over that of the error, at
        most 100, mean over samples; it asks for the very phases, and says little where nothing determines them.
        """
        difference = self._spectra(generated.double()) - self._spectra(truth.double())
        power, error = (v.double().square().mean(1).clamp(min=1e-12) for v in (truth, generated - truth))
        return {
            "log_spectral_distance": difference.square().mean(1).sqrt().mean().item(),
            "snr_db": (10 * torch.log10(power / error)).clamp(max=100).mean().item(),
        }

    def parse(self, text: str) -> Tensor:
        """A mono 16-bit .wav file of this rate: as the data set reads it, where it reads files; else of this length."""
        if isinstance(self.data_field, DataField) and isinstance(self.data_field.config, AudioField):
            return self.data_field.config.read(Path(text))
        sound, rate = read_wav(Path(text))
        if (rate, len(sound)) != (self.rate, self.samples):
            seconds = f"-af apad -t {self.samples / self.rate:g}"
            raise UserError(
                f"{text}: expected {self.samples} samples at {self.rate} Hz, found {len(sound)} at {rate} Hz; "
                f"convert it: ffmpeg -i OLD.wav -ac 1 -ar {self.rate} {seconds} -c:a pcm_s16le NEW.wav"
            )
        return sound

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        path = folder / f"{stem}.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes((x.double().clamp(-1, 1) * 32767).round().cpu().numpy().astype("<i2").tobytes())
        return path


@frozen
class AudioConfig(ModalityConfig):
    """A waveform of fixed length, float32 ``[B, samples]`` in [-1, 1].

    Attributes:
        samples: a multiple of twice ``frames``.
        rate: samples a second, for files.
        frames: of the transform, at least 2; a multiple of the latent's width. The samples of one frame are as many
            frequencies, whose number is a multiple of the latent's height.
        rms: root mean square amplitude of the data, about.
        loss_weight: λ of its part of L2.
        field: the data set's field; None: the instance's name.
    """

    kind: ClassVar[str] = "audio"
    samples: int = field(default=1024, validator=ge(4))
    rate: int = field(default=8000, validator=ge(1))
    frames: int = field(default=8, validator=ge(2))
    rms: float = field(default=0.28, validator=gt(0.0))
    loss_weight: float = field(default=1.0, validator=gt(0.0))
    field: str | None = None

    @frames.validator
    def _whole(self, _: object, value: int) -> None:
        if self.samples % (2 * value):  # the transform needs an even number of samples a frame
            raise ValueError(f"'frames': expected twice it to divide samples = {self.samples}, found {value}")

    def latent_channels(self, height: int, width: int) -> int:
        bins = self.samples // self.frames
        if self.frames % width or bins % height:
            raise ValueError(
                f"audio: {self.frames} frames of {bins} frequencies do not fold into a latent of {height} × {width}; "
                "expected frames to be a multiple of its width, and samples / frames of its height"
            )
        return self.samples // (height * width)

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        self.latent_channels(latent.height, latent.width)  # refuses what does not fold
        folding = Folding(self.frames, self.samples // self.frames, latent.height, latent.width)
        return AudioModality(
            WaveformEncoder(latent, folding, self.rms),
            GaussianDecoder(features, folding, self.samples, self.rms),
            self,
        )


@hookimpl
def mtdiffusion_modalities() -> list[type[ModalityConfig]]:
    return [AudioConfig]
