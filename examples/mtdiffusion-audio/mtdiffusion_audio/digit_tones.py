"""``digit_tones``: scikit-learn's handwritten digits, seen, heard and described."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor

from mtdiffusion import Dataset
from mtdiffusion_audio.tones import FRAME, synthesise
from mtdiffusion_registry import DatasetConfig, hookimpl

MTDIFFUSION_API = 1

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = (*NUMBERS, "dark", "light", "strokes")
"""Words of the captions; a token is a word's place here, from 1."""
LENGTH = 4
TEST_COUNT = 360
_INK_EDGES = (0.288, 0.321)  # of the mean ink, 0 to 1: they cut the data in thirds


def describe(label: int, ink: float) -> str:
    """ "three dark strokes", "three light strokes", or "three" if the ink is as usual."""
    light, dark = ink < _INK_EDGES[0], ink >= _INK_EDGES[1]
    return NUMBERS[label] + (" light strokes" if light else " dark strokes" if dark else "")


class DigitTones(Dataset):
    """Columns of one length."""

    def __init__(self, columns: dict[str, Tensor], captions: list[str]) -> None:
        self.columns, self.captions = columns, captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return {name: column[index] for name, column in self.columns.items()} | {"caption": self.captions[index]}


@frozen
class DigitTonesConfig(DatasetConfig):
    """Digits that are seen, heard and described: 1,437 for training and 360 held out, by label.

    Fields: ``image`` float32 ``[1, 8, 8]`` in [-1, 1]; ``label`` int64 in 0..9; ``audio`` float32 ``[samples]``, the
    two tones of the digit on a telephone's keypad; ``caption``, such as "three dark strokes", and ``tokens``, the same
    as int64 ``[4]``: places in VOCABULARY from 1, then 0.

    Attributes:
        samples: of a waveform; at least 256, so that its tones can be told apart at 8 kHz.
        rate: samples a second; at least 4000, as the highest tone has 1477 Hz.
        seed: of the split, and of phases, amplitudes, onsets and noise.
    """

    kind: ClassVar[str] = "digit_tones"
    samples: int = field(default=1024, validator=ge(FRAME))
    rate: int = field(default=8000, validator=ge(4000))
    seed: int = field(default=0, validator=ge(0))

    def build(self, split: Literal["train", "test"]) -> Dataset:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        label = torch.from_numpy(bunch.target).long()
        ink = torch.from_numpy(bunch.images).float() / 16
        # Made for the whole data set, so that a digit sounds the same whichever split it falls in.
        audio = synthesise(label, self.samples, self.rate, torch.Generator().manual_seed(self.seed))
        captions = [describe(int(y), float(pixels.mean())) for y, pixels in zip(label, ink, strict=True)]
        words = [[VOCABULARY.index(word) + 1 for word in caption.split()] for caption in captions]
        tokens = torch.tensor([row + [0] * (LENGTH - len(row)) for row in words])
        train, test = train_test_split(
            range(len(label)), test_size=TEST_COUNT, stratify=bunch.target, random_state=self.seed
        )
        rows = torch.tensor(sorted(train if split == "train" else test))
        columns = {"image": ink[:, None] * 2 - 1, "label": label, "audio": audio, "tokens": tokens}
        return DigitTones({name: x[rows] for name, x in columns.items()}, [captions[row] for row in rows])


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [DigitTonesConfig]
