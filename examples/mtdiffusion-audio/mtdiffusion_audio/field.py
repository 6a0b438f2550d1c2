"""Sounds in a person's own folder: ``fields = { audio = "audio" }`` of the data set ``folder`` reads .wav files."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor

from mtdiffusion_registry import FieldConfig, UserError, hookimpl

MTDIFFUSION_API = 1


CONVERT = "ffmpeg -i OLD.wav -ac 1 -c:a pcm_s16le NEW.wav"
"""The command that makes a file of whichever form one that can be read; ``-ar RATE`` sets its rate."""


def read_wav(path: Path) -> tuple[Tensor, int]:
    """A mono 16-bit .wav file: float32 ``[n]`` in [-1, 1], and its samples a second.

    Raises:
        UserError: if it is missing, damaged, cut short, or of another form.
    """
    try:
        with wave.open(str(path), "rb") as file:
            form, count = (file.getnchannels(), 8 * file.getsampwidth()), file.getnframes()
            rate, data = file.getframerate(), file.readframes(count)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; audio is given as a .wav file") from None
    except (OSError, EOFError, wave.Error) as error:
        why = str(error) or "it ends within its header"  # of which EOFError says nothing
        raise UserError(
            f"{path}: cannot be read as a .wav file ({why}); if a player plays it, convert it: {CONVERT}"
        ) from None
    if form != (1, 16):
        raise UserError(f"{path}: expected 1 channel of 16 bits, found {form[0]} of {form[1]}; convert it: {CONVERT}")
    if not count:
        raise UserError(f"{path}: holds no sound, expected at least one sample")
    if len(data) != 2 * count:
        raise UserError(f"{path}: cut short: expected {count} samples, found {len(data) // 2}")
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.float32) / 32767).clamp(-1, 1), rate


@frozen
class AudioField(FieldConfig):
    """A recording, float32 ``[samples]`` in [-1, 1]: what is shorter is followed by silence, what is longer is cut.

    Attributes:
        samples: how many there are in each.
        rate: samples a second; a file of another rate is refused.
    """

    kind: ClassVar[str] = "audio"
    suffixes: ClassVar[tuple[str, ...]] = (".wav",)

    samples: int = field(default=1024, validator=ge(1))
    rate: int = field(default=8000, validator=ge(1))

    def read(self, path: Path, size: tuple[int, int] | None = None) -> Tensor:
        sound, rate = read_wav(path)
        if rate != self.rate:
            raise UserError(
                f"{path}: expected {self.rate} samples a second, found {rate}; set rate, or convert it: "
                f"ffmpeg -i OLD.wav -ac 1 -ar {self.rate} -c:a pcm_s16le NEW.wav"
            )
        return torch.nn.functional.pad(sound[: self.samples], (0, max(self.samples - len(sound), 0)))


@hookimpl
def mtdiffusion_fields() -> list[type[FieldConfig]]:
    return [AudioField]
