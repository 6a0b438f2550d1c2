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
from mtdiffusion_registry.errors import UserError, counted
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
    require_opaque,
    to_indices,
    to_paint,
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
        ignore: with colours or values, the index of pixels of any other, and of transparent ones, which the mask
            modality is told to ignore; None: another colour is an error, and so is another value that is a class's
            index.
        values: the pixel value of each class in order, such as ``[0, 255]``; (): the class itself. Other values stay
            as they are, unless ``ignore`` says otherwise.
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
        if len(set(self.values)) < len(self.values) or any(value < 0 for value in self.values):
            raise ValueError(
                f"values: expected a different pixel value of 0 or more for each class, found {list(self.values)}"
            )
        classes = len(self.colours or self.values)
        if self.ignore is not None and 0 <= self.ignore < classes:
            raise ValueError(f"ignore: expected an index that is no class, 0 to {classes - 1}, found {self.ignore}")

    def read(self, path: Source, size: tuple[int, int] | None = None) -> Tensor:
        require_lossless(path, greys=not (self.colours or self.values))
        picture = open_picture(path)
        if self.colours:
            # Scaled first: the nearest pixel's colour is one of the colours, and there are fewer to look up.
            page, clear = to_paint(picture, path)
            if self.ignore is None:
                require_opaque(
                    clear,
                    path,
                    "save it without transparency, each pixel in the colour of its class, or give ignore an index for "
                    "such pixels",
                )
            return self._classes(page, _scaled(page, size), None if clear is None else _scaled(clear, size), path)
        picture = to_indices(picture, path)
        if self.values:
            picture = self._in_values(picture)
        pixels = np.array(_scaled(picture, size)).astype(np.int32)
        if self.values:
            pixels = self._of_values(pixels, path)
        return _compact(pixels)

    def _in_values(self, picture: Image.Image) -> Image.Image:
        """A picture of two shades or with a palette of greys in its shades, where these are values: programs number
        the shades that a picture has anew, 255 alone as 0, say. Otherwise in its indices."""
        if picture.mode not in ("1", "P"):
            return picture
        red, green, blue = picture.convert("RGB").split()
        grey = red.tobytes() == green.tobytes() == blue.tobytes()
        return red if grey and self._are_values(red) else picture

    def _are_values(self, picture: Image.Image) -> bool:
        return set(np.unique(np.asarray(picture)).tolist()) <= set(self.values)

    @property
    def shades(self) -> bool:
        """Whether white, where a file has one bit a pixel, is the value 255 and not 1."""
        return 255 in self.values and 1 not in self.values

    def _of_values(self, pixels: np.ndarray, path: Source) -> np.ndarray:
        """The class of each pixel whose value stands for one; others as they are, which must then be no class."""
        classes = pixels.copy()
        for index, value in enumerate(self.values):
            classes[pixels == value] = index
        if self.ignore is not None:
            classes[~np.isin(pixels, self.values)] = self.ignore
            return classes
        odd = (pixels < len(self.values)) & ~np.isin(pixels, self.values)
        if odd.any():
            row, column = np.argwhere(odd)[0]
            found = int(pixels[row, column])
            raise UserError(
                f"{path}: {odd.mean():.1%} of its pixels have a value that is none of values, such as {found} in row "
                f"{row}, column {column} as it is scaled, and would be taken for class {found}, which is value "
                f"{self.values[found]}; add the value, or give ignore an index for such pixels"
            )
        return classes

    def _classes(self, page: Image.Image, fitted: Image.Image, unpainted: Image.Image | None, path: Source) -> Tensor:
        """Of a file's picture as it is, as it is scaled, and of where that has no colour (255)."""
        colours = {rgb: index for index, rgb in enumerate(rgb_of_names(self.colours))}
        classes = classes_of_colours(np.asarray(fitted), colours)
        unknown = classes < 0
        if unpainted is not None:
            unknown |= np.asarray(unpainted) > 0
        if self.ignore is not None:
            classes[unknown] = self.ignore
        elif unknown.any():
            raise UserError(
                f"{path}: {unknown_colours(page, colours, 'that is none of colours')}; add it, or give ignore an index "
                "for such pixels"
            )
        return _compact(classes)

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
        used = {path: _used(path) for path in compress(paths, palettes)}
        usual = _usual(used)
        wrong = []
        for path, colours in used.items():
            rising = _rising(colours)
            for index, colour in colours.items():
                common, where, risen = usual[index]
                if _differ(colour, common) and not (rising and risen):
                    wrong.append(
                        f"{path}: index {index} of its palette is {hex_of(colour)}, and {hex_of(common)} in {where}"
                    )
                    break
        if wrong:
            told = counted(wrong, f"{len(wrong):,} of {len(used):,} masks with a palette contradict the others:")
            told += (
                ", so it seems to mean another class. " if len(wrong) == 1 else "\nSo they seem to mean other classes. "
            )
            it = "it" if len(wrong) == 1 else "them"
            raise UserError(
                f"{told}If the colours say what the classes are, list them in colours of the field, or give the pixels "
                f"the indices of the other; if the indices are right all the same, save {it} without a palette, in grey"
            )


def _usual(used: Mapping[Source, Mapping[int, Colour]]) -> dict[int, tuple[Colour, Source, bool]]:
    """The colour that each index has in most files (of as many, that of the first), the first of these files, and
    whether its colours rise with the index."""
    counts: dict[int, dict[tuple[Colour, bool], list[Source]]] = {}
    for path, colours in used.items():
        rising = _rising(colours)
        for index, colour in colours.items():
            counts.setdefault(index, {}).setdefault((colour, rising), []).append(path)
    usual = {}
    for index, each in counts.items():
        (colour, rising), files = max(each.items(), key=lambda item: len(item[1]))  # the first of equal ones
        usual[index] = colour, files[0], rising
    return usual


def _scaled(picture: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    return picture if size is None else fit(picture, size, nearest=True)


def _compact(indices: np.ndarray) -> Tensor:
    """int32 indices, in a byte each where they fit."""
    return torch.from_numpy(indices.astype(np.uint8) if indices.min() >= 0 and indices.max() < 256 else indices)


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
            vector = self.parse(read_vector(path).numpy())
            assert vector is not None  # as of a blank cell only
            return vector
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def parse(self, content: object) -> Tensor | None:
        if content is None or (isinstance(content, float) and math.isnan(content)):
            return None
        try:
            array = np.asarray(content)
        except ValueError as error:  # a list of lists of different lengths
            raise ValueError(f"expected a vector of numbers ({error})") from None
        if array.ndim != 1 or array.dtype.kind not in "fiu" or not len(array):
            raise ValueError(f"expected a vector of numbers, found shape {list(array.shape)} of {array.dtype}")
        vector = torch.from_numpy(array.astype(np.float32))
        norm = vector.norm()
        if not (torch.isfinite(norm) and norm > 0) and 0 < (most := vector.abs().max()) < torch.inf:
            vector = vector / most  # of numbers whose squares are too large or too small for float32
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
