"""The fields of people's files that come with mtdiffusion: image, mask, label, class_folder, embedding and caption."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress
from typing import ClassVar, Literal

import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import in_
from PIL import Image
from torch import Tensor

from mtdiffusion_plugins.files import (
    Colour,
    classes_of_colours,
    from_levels,
    hex_of,
    read_text,
    read_vector,
    rgb_of_names,
    unknown_colours,
    used_colours,
)
from mtdiffusion_registry.configs import FieldConfig, Reader
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.pictures import (
    SUFFIXES,
    Source,
    fit,
    open_picture,
    picture_size,
    read_levels,
    read_palette,
    require_lossless,
    to_colour,
    to_indices,
)

MTDIFFUSION_API = 1

_LONGEST = 1000  # characters that a class's name may have
_WHOLE = re.compile(r"\+?(\d+)(\.0*)?", re.ASCII)


@frozen
class ImageField(FieldConfig):
    """A picture: float32 ``[channels, h, w]`` in [−1, 1].

    Attributes:
        channels: 1 (grey) or 3 (RGB).
    """

    kind: ClassVar[str] = "image"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    spatial: ClassVar[bool] = True
    encoded: ClassVar[bool] = True
    plain: ClassVar[bool] = True

    channels: Literal[1, 3] = field(default=3, validator=in_((1, 3)))

    def read(self, path: Source, size: tuple[int, int] | None = None) -> Tensor:
        return torch.from_numpy(read_levels(path, size, self.channels))

    def reader(self) -> Reader:
        return partial(read_levels, channels=self.channels)

    def value(self, stored: Tensor) -> Tensor:
        return from_levels(stored)

    def extent(self, path: Source) -> tuple[int, int]:
        return picture_size(path)


@frozen
class MaskField(FieldConfig):
    """A picture whose pixels are class indices, or colours that stand for classes: int64 ``[h, w]``.

    Attributes:
        colours: the colour of each class in order, such as ``["#000000", "#ff0000"]``; (): pixels are class indices.
        ignore: with colours, the index of pixels of any other colour, which the mask modality is told to ignore; None:
            another colour is an error.
        values: the pixel value of each class in order, such as ``[0, 255]``; (): the class itself. Other values stay
            as they are.
    """

    kind: ClassVar[str] = "mask"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    spatial: ClassVar[bool] = True
    encoded: ClassVar[bool] = True
    plain: ClassVar[bool] = True

    colours: tuple[str, ...] = field(default=())
    ignore: int | None = None
    values: tuple[int, ...] = field(default=())

    @colours.validator
    def _are_colours(self, _: object, value: tuple[str, ...]) -> None:
        rgb_of_names(value)

    def __attrs_post_init__(self) -> None:
        if self.colours and self.values:
            raise ValueError("colours and values: give one of the two")

    def read(self, path: Source, size: tuple[int, int] | None = None) -> Tensor:
        require_lossless(path)
        picture = open_picture(path)
        if self.colours:
            # Scaled first: the nearest pixel's colour is one of the colours, and there are fewer to look up.
            page = to_colour(picture, path)
            return self._classes(page, page if size is None else fit(page, size, nearest=True), path)
        picture = to_indices(picture, path)
        pixels = np.array(picture if size is None else fit(picture, size, nearest=True)).astype(np.int32)
        if self.values:
            known = pixels.copy()
            for index, value in enumerate(self.values):
                pixels[known == value] = index
        return torch.from_numpy(pixels.astype(np.uint8) if pixels.min() >= 0 and pixels.max() < 256 else pixels)

    def _classes(self, page: Image.Image, fitted: Image.Image, path: Source) -> Tensor:
        """Of a file's picture as it is, and as it is scaled."""
        colours = {rgb: index for index, rgb in enumerate(rgb_of_names(self.colours))}
        classes = classes_of_colours(np.asarray(fitted), colours)
        unknown = classes < 0
        if self.ignore is not None:
            classes[unknown] = self.ignore
        elif unknown.any():
            raise UserError(
                f"{path}: {unknown_colours(page, colours, 'that is none of colours')}; add it, or give ignore an index "
                "for such pixels"
            )
        return torch.from_numpy(classes.astype(np.uint8) if classes.max() < 256 else classes)

    def value(self, stored: Tensor) -> Tensor:
        return stored.long()

    def extent(self, path: Source) -> tuple[int, int]:
        return picture_size(path)

    def check_files(self, paths: Sequence[Source]) -> None:
        """Palettes must agree on the indices that are used where pixels are taken for indices: if they do not, the
        colours say what the classes are, and an index means another class in each file. What says no more than the
        indices does not count: greys that grow with the index, and Pillow's own palette."""
        if self.colours:
            return
        palettes = [_palette(path) for path in paths]
        if len({*palettes} - {()}) < 2:
            return
        seen: dict[int, tuple[Colour, Source, bool]] = {}
        for path in compress(paths, palettes):
            used = _used(path)
            rising = _rising(used)
            for index, colour in used.items():
                first, where, risen = seen.setdefault(index, (colour, path, rising))
                if _differ(colour, first) and not (rising and risen):
                    raise UserError(
                        f"{path}: index {index} of its palette is {hex_of(colour)}, and {hex_of(first)} in {where}, so "
                        "it seems to mean another class. If the colours say what the classes are, list them in colours "
                        "of the field, or give its pixels the indices of the other; if the indices are right all the "
                        "same, save it without a palette, in grey"
                    )


_NEAR = 8  # of 255: a palette that another program has saved again may be off by a little


def _differ(one: Colour, other: Colour) -> bool:
    return any(abs(a - b) > _NEAR for a, b in zip(one, other, strict=True))


def _rising(colours: Mapping[int, Colour]) -> bool:
    """Whether they are greys that grow with the index, as many as there are classes, and say no more than it does."""
    levels = [red for red, green, blue in colours.values() if red == green == blue]
    return len(levels) == len(colours) and levels == sorted(levels)


def _palette(path: Source) -> tuple[int, ...]:
    """A palette picture's palette, by its header; () of other pictures, and of what will turn out to be none."""
    try:
        return read_palette(path)
    except UserError:
        return ()


def _used(path: Source) -> dict[int, Colour]:
    try:
        return used_colours(open_picture(path))
    except UserError:
        return {}


@frozen
class LabelField(FieldConfig):
    """A class: its index, int64 ``[]``, or its name, which the label modality looks up among its names.

    Whole numbers in any form are indices (``2``, ``2.0``), as tables with gaps come out of spreadsheets.
    """

    kind: ClassVar[str] = "label"
    encoded: ClassVar[bool] = True
    cells: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".cls")

    def read(self, path: Source, size: tuple[int, int] | None = None) -> Tensor | str:
        value = self.parse(read_text(path))
        if value is None:
            raise UserError(f"{path}: is blank, expected a class")
        return value

    def parse(self, content: object) -> Tensor | str | None:
        if content is None or (isinstance(content, float) and math.isnan(content)):
            return None
        # bool is an int to Python, but true in a JSON file is no class index.
        if isinstance(content, bool) or not isinstance(content, int | float | str):
            raise ValueError(f"expected a class index (0, 1, 2, ...) or a class's name, found {content!r}")
        text = str(content).strip()
        if not text:
            return None
        if len(text) > _LONGEST:
            raise ValueError(
                f"expected a class index (0, 1, 2, ...) or a class's name, found {len(text):,} characters: "
                f"{text[:20]!r}..."
            )
        if whole := _WHOLE.fullmatch(text):
            if len(whole[1]) <= 18:
                return torch.from_numpy(np.array(int(whole[1]), np.int64))  # takes half as long as torch.tensor
        elif _number(text) is None:
            return text
        raise ValueError(f"expected a class index (0, 1, 2, ...) or a class's name, found {content!r}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@frozen
class ClassFolderField(FieldConfig):
    """The class of another field's file, by the folder that holds it: ``image/cat/0001.png`` is a ``cat``. A str.

    Attributes:
        of: that field.
    """

    kind: ClassVar[str] = "class_folder"
    of: str = "image"

    @property
    def folder_of(self) -> str:
        return self.of

    def parse(self, content: object) -> str:
        return str(content)


@frozen
class EmbeddingField(FieldConfig):
    """A vector, scaled to unit norm: float32 ``[D]``."""

    kind: ClassVar[str] = "embedding"
    suffixes: ClassVar[tuple[str, ...]] = (".npy", ".safetensors")
    encoded: ClassVar[bool] = True
    cells: ClassVar[bool] = True
    arrays: ClassVar[bool] = True

    def read(self, path: Source, size: tuple[int, int] | None = None) -> Tensor:
        try:
            return self.parse(read_vector(path).numpy())
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def parse(self, content: object) -> Tensor:
        try:
            array = np.asarray(content)
        except ValueError as error:  # a list of lists of different lengths
            raise ValueError(f"expected a vector of numbers ({error})") from None
        if array.ndim != 1 or array.dtype.kind not in "fiu" or not len(array):
            raise ValueError(f"expected a vector of numbers, found shape {list(array.shape)} of {array.dtype}")
        vector = torch.from_numpy(array.astype(np.float32))
        norm = vector.norm()
        if not (torch.isfinite(norm) and norm > 0):
            raise ValueError("expected a vector of finite numbers that are not all zero")
        return vector / norm


@frozen
class CaptionField(FieldConfig):
    """A text: str, without the space around it."""

    kind: ClassVar[str] = "caption"
    suffixes: ClassVar[tuple[str, ...]] = (".txt",)
    encoded: ClassVar[bool] = True
    cells: ClassVar[bool] = True

    def read(self, path: Source, size: tuple[int, int] | None = None) -> str:
        return read_text(path).strip()

    def parse(self, content: object) -> str | None:
        if content is None or (isinstance(content, float) and math.isnan(content)):
            return None
        if not isinstance(content, str):
            raise ValueError(f"expected a text, found {content!r}")
        return content.strip() or None


FIELDS: Mapping[str, type[FieldConfig]] = {
    each.kind: each for each in (ImageField, MaskField, LabelField, ClassFolderField, EmbeddingField, CaptionField)
}
"""The fields above, by kind."""


@hookimpl
def mtdiffusion_fields() -> list[type[FieldConfig]]:
    return list(FIELDS.values())
