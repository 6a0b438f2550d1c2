"""``digits``: scikit-learn's 1,797 handwritten digits (8×8, 17 grey levels), split 1,437 / 360 by label."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor
from torch.nn.functional import interpolate

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins.datasets._tensors import TensorDataset
from mtdiffusion_registry.configs import DatasetConfig
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

NATIVE_SIZE = 8
TEST_COUNT = 360

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "regular", "bold")
SLANTS = ("backslanted", "upright", "slanted")
TEMPLATES = (
    "a handwritten {number}",
    "a {weight} {slant} handwritten {number}",
    "the digit {number}, {weight} and {slant}",
    "the number {number} in {weight} {slant} strokes",
)
"""The first names the number only; every other one also says how it is written."""

# Captions say "bold" or "slanted" as people do: against what is usual. Each pair of edges cuts the data in thirds.
_INK_EDGES = (0.288, 0.321)
_TYPICAL_SHEAR = (-0.03, -0.01, -0.14, -0.08, 0.0, -0.01, -0.2, 0.13, 0.0, -0.1)
_SLANT_EDGES = (-0.03, 0.035)


def caption(template: int, number: int, weight: int, slant: int) -> str:
    """The caption by indices into TEMPLATES, NUMBERS, WEIGHTS and SLANTS."""
    return TEMPLATES[template].format(number=NUMBERS[number], weight=WEIGHTS[weight], slant=SLANTS[slant])


def handwriting(pixels: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """How digits ``[B, 8, 8]`` in [0, 1] are written, measured from their pixels: weight and slant, each int64 ``[B]``.

    The values are indices into WEIGHTS and SLANTS; the weight is the mean ink, the slant the shear beyond what is
    typical of the digit (a seven leans to the right by itself).
    """
    ink = pixels.mean(dim=(1, 2))
    slant = shear(pixels) - torch.tensor(_TYPICAL_SHEAR)[label]
    return torch.bucketize(ink, torch.tensor(_INK_EDGES)), torch.bucketize(slant, torch.tensor(_SLANT_EDGES))


def shear(pixels: Tensor) -> Tensor:
    """The regression of x on height, weighted by the ink of ``[B, h, w]``: ``[B]``; positive leans to the right."""
    height, width = pixels.shape[1:]
    mass = pixels / pixels.sum(dim=(1, 2), keepdim=True)
    x = torch.arange(width, dtype=pixels.dtype).expand(height, width)
    y = -torch.arange(height, dtype=pixels.dtype)[:, None].expand(height, width)
    dx = x - (mass * x).sum(dim=(1, 2), keepdim=True)
    dy = y - (mass * y).sum(dim=(1, 2), keepdim=True)
    return (mass * dx * dy).sum(dim=(1, 2)) / (mass * dy * dy).sum(dim=(1, 2))


@frozen(kw_only=True)
class DigitsConfig(DatasetConfig):
    """Handwritten digits.

    Fields: ``image`` float32 ``[1, size, size]`` in [−1, 1]; ``mask`` int64 ``[size, size]``, 1 where there is at least
    half of the full ink; ``label`` int64 in 0..9; ``caption``, such as "a bold slanted handwritten three": the stroke's
    weight and slant are measured from the picture, and the template is fixed for each digit.

    Attributes:
        size: side in pixels; other than 8, pictures are resized bilinearly (and antialiased).
        seed: of the stratified split.
    """

    kind: ClassVar[str] = "digits"
    reproducible: ClassVar[bool] = True

    size: int = field(default=NATIVE_SIZE, validator=ge(NATIVE_SIZE))
    seed: int = field(default=0, validator=ge(0))

    def build(self, split: Literal["train", "test"]) -> Dataset:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        index_train, index_test = train_test_split(
            range(len(bunch.target)), test_size=TEST_COUNT, stratify=bunch.target, random_state=self.seed
        )
        index = torch.tensor(sorted(index_train if split == "train" else index_test))
        native = torch.from_numpy(bunch.images).to(torch.float32)[index] / 16
        label = torch.from_numpy(bunch.target).to(torch.int64)[index]
        weight, slant = handwriting(native, label)

        # Drawn for the whole data set, so that a digit keeps its caption whichever split it falls in.
        draw = torch.Generator().manual_seed(0)
        template = torch.randint(len(TEMPLATES), (len(bunch.target),), generator=draw)[index]
        rows = torch.stack((template, label, weight, slant), dim=1).tolist()

        pixels = native[:, None]
        if self.size != NATIVE_SIZE:
            pixels = interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True).clamp(0, 1)
        return TensorDataset(
            {
                "image": pixels * 2 - 1,
                "mask": (pixels[:, 0] >= 0.5).to(torch.uint8),
                "label": label,
                "caption": [caption(*row) for row in rows],
            }
        )


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [DigitsConfig]
