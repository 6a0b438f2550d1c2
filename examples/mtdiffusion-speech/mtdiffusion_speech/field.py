"""Recordings of one's own: the data set ``folder`` reads .wav files by ``fields = { speech = "logmel" }``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor

from mtdiffusion_registry import FieldConfig, hookimpl
from mtdiffusion_speech.spectrogram import FRAMES_A_SECOND, LogMel, read_wav

MTDIFFUSION_API = 1


@frozen
class LogMelField(FieldConfig):
    """A recording as its log-mel spectrogram, float32 ``[1, bands, frames]`` in [-1, 1]: see :class:`LogMel`.

    Attributes:
        rate: samples a second; a recording of another rate is resampled.
        bands: mel-spaced bands of frequencies.
        frames: of 20 ms: what is shorter is followed by silence, what is longer is cut.
    """

    kind: ClassVar[str] = "logmel"
    suffixes: ClassVar[tuple[str, ...]] = (".wav",)

    rate: int = field(default=8000, validator=ge(FRAMES_A_SECOND))
    bands: int = field(default=32, validator=ge(1))
    frames: int = field(default=32, validator=ge(1))

    def read(self, path: Path, size: tuple[int, int] | None = None) -> Tensor:
        return LogMel(self.rate, self.bands, self.frames).analyse(read_wav(path, self.rate))


@hookimpl
def mtdiffusion_fields() -> list[type[FieldConfig]]:
    return [LogMelField]
