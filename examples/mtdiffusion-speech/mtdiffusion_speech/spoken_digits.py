"""``spoken_digits``: recordings of spoken digits, each with a handwritten picture of the same digit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import ge, in_
from torch import Tensor

from mtdiffusion import Dataset
from mtdiffusion_registry import DatasetConfig, UserError, hookimpl
from mtdiffusion_speech.spectrogram import FRAMES_A_SECOND, LogMel, read_wav

MTDIFFUSION_API = 1

SOURCE = "the Free Spoken Digit Dataset, https://github.com/Jakobovski/free-spoken-digit-dataset"
TEST_RECORDINGS = 5  # of each speaker and digit, numbers 0 to 4: the split of those who published it
TEST_PICTURES = 360
_NAME = re.compile(r"([0-9])_([^_]+)_([0-9]+)")


class SpokenDigits(Dataset):
    """Columns of one length, and the file that each sample's recording is from.

    Args:
        pictures: by class, ``[n, 1, 8, 8]``, of which each turn of a sample in training shows one at random; None: it
            always shows its own.
    """

    def __init__(
        self, columns: dict[str, Tensor | list[str]], paths: list[Path], pictures: Mapping[int, Tensor] | None = None
    ) -> None:
        self.columns, self.paths, self.pictures = columns, paths, pictures

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return {name: column[index] for name, column in self.columns.items()}

    def varied(self, index: int, seed: int) -> dict[str, Tensor | str]:
        sample = self[index]
        if self.pictures is not None:
            of_its_class = self.pictures[int(self.columns["label"][index])]
            drawn = torch.randint(len(of_its_class), (), generator=torch.Generator().manual_seed(seed))
            sample["image"] = of_its_class[drawn]
        return sample

    def describe(self, index: int, field: str | None = None) -> str:
        return str(self.paths[index])


def pair(recordings: Tensor, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A picture of the same class for each recording, at random: rows of ``pictures``, ``[n]``.

    Every picture of a class is used before one is used again.

    Args:
        recordings: classes ``[n]``.
        pictures: classes ``[m]``, among them each that a recording has.
    """
    shown = torch.empty_like(recordings)
    for label in set(recordings.tolist()):
        mine, theirs = recordings == label, (pictures == label).nonzero()[:, 0]
        count = int(mine.sum())
        rounds = [theirs[torch.randperm(len(theirs), generator=generator)] for _ in range(count // len(theirs) + 1)]
        shown[mine] = torch.cat(rounds)[:count]
    return shown


@frozen
class SpokenDigitsConfig(DatasetConfig):
    """The Free Spoken Digit Dataset (six speakers, 2,700 recordings for training and 300 held out, numbers 0 to 4 of
    each speaker and digit), each recording with a picture of its digit, drawn from scikit-learn's handwritten ones
    (1,437 for training and 360 held out).

    Who speaks and who writes have nothing to do with one another: a pair has the digit in common, and nothing else.

    Fields: ``image`` float32 ``[1, 8, 8]`` in [-1, 1]; ``label`` int64 in 0..9; ``speech`` float32
    ``[1, bands, frames]`` in [-1, 1]; ``speaker``, a name.

    Attributes:
        root: the folder of the recordings, DIGIT_SPEAKER_NUMBER.wav, or that which holds it as ``recordings``.
        rate: samples a second; the recordings have 8000.
        bands: of the spectrogram.
        frames: of the spectrogram, of 20 ms each.
        seed: of the pictures' split and of the pairs.
        pairing: "fixed": a recording always comes with one picture; "random": in training with another one of its digit
            each time.
    """

    kind: ClassVar[str] = "spoken_digits"
    root: Path
    rate: int = field(default=8000, validator=ge(FRAMES_A_SECOND))
    bands: int = field(default=32, validator=ge(1))
    frames: int = field(default=32, validator=ge(1))
    seed: int = field(default=0, validator=ge(0))
    pairing: Literal["fixed", "random"] = field(default="fixed", validator=in_(("fixed", "random")))

    def _recordings(self, split: Literal["train", "test"]) -> list[tuple[Path, int, str]]:
        """Path, digit and speaker of the split's recordings, in the order of their names."""
        folder = self.root / "recordings" if (self.root / "recordings").is_dir() else self.root
        if not folder.is_dir():
            raise UserError(f"data.root: {folder}: no such folder; expected the recordings of {SOURCE}")
        found = []
        for path in sorted(folder.glob("*.wav")):
            name = _NAME.fullmatch(path.stem)
            if name is None:
                raise UserError(f"{path}: expected a name such as 7_jackson_32.wav: digit, speaker and number")
            if (int(name[3]) < TEST_RECORDINGS) == (split == "test"):
                found.append((path, int(name[1]), name[2]))
        if not found:
            raise UserError(
                f"data.root: {folder}: no recordings for the split {split!r} (7_jackson_0.wav to 7_jackson_4.wav are "
                f"held out, the others are for training); expected those of {SOURCE}"
            )
        return found

    def build(self, split: Literal["train", "test"]) -> Dataset:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        paths, digits, speakers = zip(*self._recordings(split), strict=True)
        spectrogram = LogMel(self.rate, self.bands, self.frames)
        speech = torch.stack([spectrogram.analyse(read_wav(path, self.rate)) for path in paths])
        label = torch.tensor(digits)
        bunch = load_digits()
        parts = train_test_split(
            range(len(bunch.target)), test_size=TEST_PICTURES, stratify=bunch.target, random_state=self.seed
        )
        rows = torch.tensor(sorted(parts[0] if split == "train" else parts[1]))
        images = torch.from_numpy(bunch.images).float()[rows, None] / 8 - 1
        generator = torch.Generator().manual_seed(self.seed)
        written = torch.from_numpy(bunch.target).long()[rows]
        shown = pair(label, written, generator)
        columns: dict[str, Tensor | list[str]] = {
            "image": images[shown],
            "label": label,
            "speech": speech,
            "speaker": list(speakers),
        }
        by_class = {digit: images[written == digit] for digit in set(digits)} if self.pairing == "random" else None
        return SpokenDigits(columns, list(paths), by_class)


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [SpokenDigitsConfig]
