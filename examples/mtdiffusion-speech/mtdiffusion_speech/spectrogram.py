"""Sound to log-mel spectrogram and back. No plugin: what field, data set and modality share."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion_registry import UserError

FRAMES_A_SECOND = 50
"""A spectrum every 20 ms, of a Hann window of 40 ms."""
RANGE = 60.0
"""Decibels below the loudest cell that are taken for silence."""
LOWEST = 50.0  # Hz, where the mel bands begin
CONVERT = "ffmpeg -i OLD.wav -c:a pcm_s16le NEW.wav"
"""The command that makes a file of whichever form one that can be read."""
FINER = 4  # steps of synthesis in a frame: Griffin and Lim's method wants windows that overlap much


def read_wav(path: Path, rate: int) -> Tensor:
    """A .wav file at ``rate`` samples a second, float32 ``[n]`` in [-1, 1]: the mean of its channels, resampled if it
    has another rate. Its samples are integers of 8, 16, 24 or 32 bits, or floats of 32 or 64.

    Raises:
        UserError: if it is missing, damaged, cut short, empty or compressed.
    """
    try:
        samples, found = _samples(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; speech is given as a .wav file") from None
    except (OSError, EOFError, wave.Error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = str(error) or "it ends within its header"  # of which EOFError says nothing
        raise UserError(
            f"{path}: cannot be read as a .wav file ({why}); if a player plays it, convert it: {CONVERT}"
        ) from None
    if not len(samples):
        raise UserError(f"{path}: holds no sound, expected at least one sample")
    sound = samples.mean(1)
    if not np.isfinite(sound).all():
        raise UserError(f"{path}: expected finite samples, found NaN or infinity")
    if found != rate:
        from scipy.signal import resample_poly

        common = math.gcd(rate, found)
        sound = resample_poly(sound, rate // common, found // common)
    return torch.from_numpy(sound.astype(np.float32)).clamp(-1, 1)


def _samples(path: Path) -> tuple[np.ndarray, int]:
    """A file's samples, float64 ``[n, channels]`` in [-1, 1], and how many there are a second."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, size, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            count = file.getnframes()
            data = file.readframes(count)
    except wave.Error as error:
        if "unknown format" not in str(error):
            raise
        return _samples_of_scipy(path)  # floats, and integers with a header of more than stereo's
    if len(data) != size * channels * count:
        raise UserError(f"{path}: cut short: expected {count} samples, found {len(data) // (size * channels)}")
    octets = np.frombuffer(data, np.uint8).reshape(-1, channels, size)
    if size == 1:  # the only ones without a sign
        return (octets[..., 0].astype(np.float64) - 128) / 128, rate
    wide = np.zeros((*octets.shape[:2], 4), np.uint8)
    wide[..., 4 - size :] = octets  # as the upper bytes of 32 bits
    return wide.view("<i4")[..., 0] / 2**31, rate


def _samples_of_scipy(path: Path) -> tuple[np.ndarray, int]:
    """:func:`_samples` of what the standard library does not read."""
    from scipy.io import wavfile

    with path.open("rb") as file:
        stated = 8 + int.from_bytes(file.read(8)[4:], "little")
    if path.stat().st_size < stated < 2**32:  # scipy only warns of it
        raise UserError(f"{path}: cut short: expected {stated} bytes, found {path.stat().st_size}")
    rate, samples = wavfile.read(path)
    samples = samples.reshape(len(samples), -1)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128, rate
    return samples / (1 if samples.dtype.kind == "f" else -float(np.iinfo(samples.dtype).min)), rate


def write_wav(sound: Tensor, path: Path, rate: int) -> None:
    """Sound ``[n]`` in [-1, 1] as a mono .wav file of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound.double().clamp(-1, 1) * 32767).round().cpu().numpy().astype("<i2").tobytes())


@frozen
class LogMel:
    """A log-mel spectrogram of fixed size, ``[1, bands, frames]`` in [-1, 1], the lowest band first.

    1 is the recording's loudest cell and -1 is RANGE dB below it, or less: how loud a recording is as a whole is not
    kept. It begins where the recording does; a shorter one is followed by silence, a longer one is cut.

    Attributes:
        rate: samples a second.
        bands: mel-spaced triangles from 50 Hz to half the rate.
        frames: of 20 ms each.
    """

    rate: int
    bands: int
    frames: int

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return self.rate // FRAMES_A_SECOND

    def filters(self) -> Tensor:
        """The bands' weights of the frequencies of a window of two frames: ``[bands, hop + 1]``.

        Triangles with corners evenly spaced in mel, 2595 log10(1 + f / 700 Hz), each as high as 1 (as in Davis and
        Mermelstein 1980).

        Raises:
            ValueError: if a band is so narrow that it holds no frequency.
        """
        low, high = (2595 * math.log10(1 + f / 700) for f in (LOWEST, self.rate / 2))
        mel = torch.linspace(low, high, self.bands + 2, dtype=torch.float64)
        corner = 700 * (10 ** (mel / 2595) - 1)
        frequency = torch.linspace(0, self.rate / 2, self.hop + 1, dtype=torch.float64)
        rising = (frequency - corner[:-2, None]) / (corner[1:-1] - corner[:-2])[:, None]
        falling = (corner[2:, None] - frequency) / (corner[2:] - corner[1:-1])[:, None]
        filters = torch.minimum(rising, falling).clamp(min=0).float()
        if filters.amax(1).min() < 0.01:
            raise ValueError(f"bands: {self.bands} are too many: some hold none of the frequencies, 25 Hz apart")
        return filters

    def analyse(self, sound: Tensor) -> Tensor:
        """The spectrogram of sound ``[n]``."""
        length = self.frames * self.hop
        sound = F.pad(sound[:length], (0, max(length - len(sound), 0)))
        power = self._stft(sound, self.hop).abs().square()[:, : self.frames]
        level = 10 * torch.log10((self.filters() @ power).clamp(min=1e-10))
        return (1 + 2 * (level - level.max()) / RANGE).clamp(-1, 1)[None]

    def synthesise(self, x: Tensor, rounds: int = 60) -> Tensor:
        """Sound ``[frames · hop]`` that has about this spectrogram, its loudest sample at 0.5: spectra from bands by
        the filters' pseudo-inverse, phases by Griffin and Lim's method (1984), from random ones that are always the
        same."""
        x = F.interpolate(x.cpu().float(), (self.frames - 1) * FINER + 1, mode="linear", align_corners=True)
        x = F.pad(x, (0, FINER), mode="replicate")[0]
        power = 10 ** (RANGE * (x - 1) / 20)
        magnitude = (torch.linalg.pinv(self.filters()) @ power).clamp(min=0).sqrt()
        angle = 2 * math.pi * torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
        hop = self.hop // FINER
        for _ in range(rounds):
            sound = self._istft(torch.polar(magnitude, angle), hop)
            angle = self._stft(sound, hop).angle()
        sound = self._istft(torch.polar(magnitude, angle), hop)
        return sound / (2 * sound.abs().max()).clamp(min=1e-6)

    def _window(self) -> Tensor:
        return torch.hann_window(2 * self.hop)

    def _stft(self, sound: Tensor, hop: int) -> Tensor:
        """``[hop + 1, 1 + n / hop]``, complex; spectrum k is centred on sample k · hop."""
        size = 2 * self.hop
        return torch.stft(sound, size, hop, window=self._window(), pad_mode="constant", return_complex=True)

    def _istft(self, spectra: Tensor, hop: int) -> Tensor:
        return torch.istft(spectra, 2 * self.hop, hop, window=self._window(), length=self.frames * self.hop)
