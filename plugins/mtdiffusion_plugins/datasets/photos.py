"""``photos``: random crops of the eight colour photographs that come with scikit-image."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from attrs import field, frozen
from attrs.validators import and_, ge, le

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins.datasets._tensors import TensorDataset, channels_first, generators
from mtdiffusion_registry.configs import DatasetConfig
from mtdiffusion_registry.hookspecs import hookimpl

if TYPE_CHECKING:
    from PIL.Image import Image

MTDIFFUSION_API = 1

# Bundled with scikit-image >= 0.24 itself; its other colour photographs are downloaded.
PHOTOGRAPHS: dict[str, str] = {
    "astronaut": "an astronaut",
    "chelsea": "a tabby cat",
    "coffee": "a cup of coffee",
    "rocket": "a rocket on its launch pad",
    "stereo_motorcycle": "a motorcycle in a workshop",
    "retina": "the retina of an eye",
    "immunohistochemistry": "a stained tissue section",
    "hubble_deep_field": "galaxies in deep space",
}
"""Label k is the k-th photograph: its name in ``skimage.data``, and what its captions call it."""

TEST_STRIP = 0.25  # the share of each photograph's columns, from the right, that only test crops come from
_MAX_ZOOM = 6
_MIN_CONTRAST = (
    6.0  # standard deviation of a channel over the crop, of 255: flat sky or a black border is not worth a sample
)
_MAX_TRIES = 1000


def load(name: str) -> npt.NDArray[np.uint8]:
    """A photograph ``[h, w, 3]`` in 0..255."""
    from skimage import data

    picture = getattr(data, name)()
    # The motorcycle comes as a stereo pair with its disparity.
    return np.asarray(picture[0] if isinstance(picture, tuple) else picture)


def _crop(strip: Image, longest: int, size: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], int]:
    """A random crop with some contrast, as ``[size, size, 3]``, and its side in the photograph's pixels."""
    from PIL import Image as PIL

    for _ in range(_MAX_TRIES):
        side = int(np.rint(np.exp(rng.uniform(np.log(size), np.log(longest)))))
        left, top = int(rng.integers(strip.width - side + 1)), int(rng.integers(strip.height - side + 1))
        crop = strip.crop((left, top, left + side, top + side)).resize((size, size), PIL.Resampling.BICUBIC)
        pixels = np.asarray(crop)
        if pixels.std(axis=(0, 1)).max() >= _MIN_CONTRAST:
            return (pixels[:, ::-1] if rng.random() < 0.5 else pixels), side
    raise AssertionError(f"no crop of {size} pixels has contrast")


@frozen(kw_only=True)
class PhotosConfig(DatasetConfig):
    """Crops of eight photographs, at random places and scales, half of them mirrored.

    A crop's side is log-uniform between ``size`` and six times it, or the width of the test strip if that is less, so
    that both splits see the same scales. Test crops come from the right quarter of each photograph, training crops from
    the rest: no pixel is in both.

    Fields: ``image`` float32 ``[3, size, size]`` in [−1, 1], of 256 levels; ``label`` int64 in 0..7, which photograph;
    ``caption``, such as "a close-up of a tabby cat".

    Attributes:
        size: side in pixels, at most 96 (the narrowest test strip is 112 wide).
        count: number of training crops, shared equally among the photographs.
        test_count: number of test crops.
        seed: crop i of a split follows from (seed, split, i) alone.
    """

    kind: ClassVar[str] = "photos"
    reproducible: ClassVar[bool] = True

    size: int = field(default=32, validator=and_(ge(8), le(96)))
    count: int = field(default=4000, validator=ge(1))
    test_count: int = field(default=500, validator=ge(1))
    seed: int = field(default=0, validator=ge(0))

    def build(self, split: Literal["train", "test"]) -> Dataset:
        from PIL import Image as PIL

        strips = []
        longest = []
        for name in PHOTOGRAPHS:
            pixels = load(name)
            height, width = pixels.shape[:2]
            border = width - int(width * TEST_STRIP)
            # Cut before any resizing: a resampling filter then cannot reach across the border.
            strips.append(PIL.fromarray(pixels[:, :border] if split == "train" else pixels[:, border:]))
            longest.append(min(_MAX_ZOOM * self.size, width - border, height))

        count = self.count if split == "train" else self.test_count
        images = np.empty((count, self.size, self.size, 3), np.uint8)
        captions = []
        for index, rng in enumerate(generators(self.seed, split, count)):
            which = index % len(strips)
            images[index], side = _crop(strips[which], longest[which], self.size, rng)
            view = "a close-up" if side < 2 * self.size else "a photograph"
            captions.append(f"{view} of {list(PHOTOGRAPHS.values())[which]}")
        return TensorDataset(
            {
                "image": channels_first(images),
                "label": torch.arange(count) % len(strips),
                "caption": captions,
            },
            levels=("image",),
        )


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [PhotosConfig]
