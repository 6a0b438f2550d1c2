"""Pictures for people: sheets of samples under titles, with legends, and visibility maps from files."""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from attrs import field, frozen
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtdiffusion import Modality, MultimodalDiffusion
from mtdiffusion_registry.errors import UserError, given_file
from mtdiffusion_registry.pictures import fitted, open_picture, to_colour

Colour = tuple[int, int, int]
Kind = Literal["generated", "given", "truth"]
Legend = Sequence[tuple[str, Colour]]
"""Names and RGB in 0..255, as :attr:`Modality.legend` has them."""

SMALL, LARGEST = 64, 160
"""The longer side of a tile in pixels: at least (of a small picture, enlarged) and at most (of a large one)."""
_SCENE = 128  # at least, of a picture of places that is not tiny: at 64 pixels nobody recognises a street
_FEW = 32  # colours: a picture with no more is taken for classes, which must not blur into one another
_WIDE = 100  # columns wider than this are fewer, so that a sheet fits a screen

_GAP, _PAIR, _SECTION, _MARGIN = 4, 3, 12, 16  # between tiles; a value and its truth; modalities; at the edges
_LABEL_HEIGHT = 32  # room for a name and what it is
_LEFT, _MOST_LEFT, _LEAST_WIDTH = 84, 150, 480
_INK, _QUIET, _FAINT, _GIVEN = (24, 26, 32), (92, 96, 106), (122, 126, 136), (0, 114, 178)
_PAPER, _RULE, _BAND, _HATCH = (255, 255, 255), (222, 224, 230), (238, 240, 244), ((206, 208, 214), (150, 153, 162))

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@frozen(eq=False)
class Row:
    """Pictures of one modality side by side, a column a sample.

    Attributes:
        name: of the modality.
        pictures: ``[n, 3, h, w]`` in [0, 1].
        kind: given pictures are marked; the truth stands quieter, close to what is above.
        role: a word below the name: "given", "truth"; by default as the kind has it, and none of what is generated.
        scene: whether they show places, so that they are worth larger tiles than a word or a vector.
        visible: ``[n, H, W]`` of any size: 0 where the picture was hidden, which is hatched; None: nowhere.
        present: ``[n]`` bool: samples that have the modality; the tiles of others are empty. None: all.
        values: ``[n, ...]``, what is shown, on the CPU; None: nobody asks for it.
    """

    name: str
    pictures: Tensor
    kind: Kind = "generated"
    role: str = field()
    scene: bool = False
    visible: Tensor | None = None
    present: Tensor | None = None
    values: Tensor | None = None

    @role.default
    def _role(self) -> str:
        return "" if self.kind == "generated" else self.kind

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of its tiles."""
        return tile_size(self.pictures.shape[-2], self.pictures.shape[-1], *tile_bounds(self.scene, self.pictures))

    @property
    def height(self) -> int:
        return max(self.tile[0], _LABEL_HEIGHT)

    def tiles(self) -> list[Image.Image | None]:
        """Its pictures as tiles; None where there is none."""
        there = [True] * len(self.pictures) if self.present is None else self.present.tolist()
        hidden = [None] * len(self.pictures) if self.visible is None else list(self.visible)
        return [
            tile(picture, self.tile, seen) if has else None
            for picture, seen, has in zip(self.pictures, hidden, there, strict=True)
        ]


@frozen(eq=False)
class Block:
    """Rows of pictures under a title ("": none)."""

    title: str
    rows: Sequence[Row]


def tile_bounds(scene: bool, pictures: Tensor) -> tuple[int, int]:
    """The least and the largest longer side of a tile of pictures ``[..., h, w]``: larger for scenes that have more
    to show."""
    return (_SCENE if scene and max(pictures.shape[-2:]) > SMALL // 2 else SMALL), LARGEST


def tile_size(height: int, width: int, least: int = SMALL, most: int = LARGEST) -> tuple[int, int]:
    """Height and width at which a picture is drawn, in its own shape.

    A picture whose longer side is below ``least`` is enlarged, by a whole factor and not beyond ``most``; a larger one
    than ``most`` is made smaller.
    """
    side = max(height, width)
    if side > most:
        return max(round(height * most / side), 1), max(round(width * most / side), 1)
    factor = max(min(-(-least // side), most // side), 1)
    return height * factor, width * factor


def tile(picture: Tensor, size: tuple[int, int], visible: Tensor | None = None) -> Image.Image:
    """A picture ``[3, h, w]`` in [0, 1] drawn at a size (height and width), as :func:`tile_size` has it.

    Made smaller it is filtered, unless it has so few colours that they must be classes (of a mask), which stay pure.

    Args:
        visible: ``[H, W]`` of any size: where it is 0 the tile is hatched.
    """
    image = to_image(picture)
    height, width = size
    if image.size != (width, height):
        nearest = width >= image.width or image.getcolors(_FEW) is not None
        image = image.resize((width, height), Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)
    if visible is None:
        return image
    shown = Image.fromarray(np.ascontiguousarray((visible > 0).cpu().numpy()).astype(np.uint8))
    hidden = np.asarray(shown.resize((width, height), Image.Resampling.NEAREST)) == 0
    pixels = np.array(image)
    stripes = np.add.outer(np.arange(height), np.arange(width)) // 3 % 2
    pixels[hidden] = np.array(_HATCH, dtype=np.uint8)[stripes][hidden]
    return Image.fromarray(pixels)


def draw_blocks(
    title: str, blocks: Sequence[Block], legends: Mapping[str, Legend] | None = None, subtitle: str = ""
) -> Image.Image:
    """The blocks below one another under a title, and the legends of what they show.

    Columns are as wide as the widest tile, so that what belongs to one sample stands in one column.

    Args:
        legends: by the modality's name; those of modalities that no row shows, and empty ones, are left out.
        subtitle: what else is to be said of all of them; it is wrapped.
    """
    rows = [row for block in blocks for row in block.rows]
    large, medium, plain, small = (ImageFont.load_default(size) for size in (22, 17, 14, 13))
    column = max((row.tile[1] for row in rows), default=SMALL)
    labels = [plain.getlength(_printable(row.name)) for row in rows]
    left = _MARGIN + int(min(max([_LEFT, *labels]), _MOST_LEFT)) + 14
    columns = max((len(row.pictures) for row in rows), default=0)
    width = max(left + columns * (column + _GAP) - _GAP + _MARGIN, _LEAST_WIDTH)
    shown = {row.name for row in rows}
    page = _Page(width)
    page.text(_cut(title, large, width - 2 * _MARGIN), large, _INK, 30)
    for line in _wrapped(subtitle, plain, width - 2 * _MARGIN):
        page.text(line, plain, _QUIET, 20)
    page.skip(6)
    for name, legend in _shared({name: legend for name, legend in (legends or {}).items() if name in shown}):
        page.legend(name, legend, small, left)
    for block in blocks:
        page.rule()
        if block.title:
            page.text(_cut(block.title, medium, width - 2 * _MARGIN), medium, _INK, 28)
        for place, row in enumerate(block.rows):
            if place:
                page.skip(_PAIR if row.kind == "truth" else _SECTION)
            page.row(row, plain, small, left, column)
        page.skip(_MARGIN)
    return page.image()


def sheet_columns(model: MultimodalDiffusion, most: int) -> int:
    """How many samples stand side by side: ``most``, or fewer where a modality has large tiles."""
    widest = max(
        rendered(model.modality(name), name, model.modality(name).placeholder(1)).tile[1] for name in model.names
    )
    return min(most, 16 if widest <= _WIDE else 8)


def rendered(
    modality: Modality,
    name: str,
    x: Tensor,
    kind: Kind = "generated",
    role: str | None = None,
    visible: Tensor | None = None,
    present: Tensor | None = None,
) -> Row:
    """A row of a modality's values ``[n, ...]`` as the modality shows them."""
    word = {} if role is None else {"role": role}
    pictures = modality.render(x).float().cpu()
    scene, values = modality.encoder.spatial, x.cpu()
    return Row(name, pictures, kind, scene=scene, visible=visible, present=present, values=values, **word)


def legends(model: MultimodalDiffusion) -> dict[str, Legend]:
    """What the colours of a model's modalities mean, by name, of those that say so."""
    return {name: legend for name in model.names if (legend := model.modality(name).legend)}


def sample_sheet(
    model: MultimodalDiffusion,
    samples: Mapping[str, Tensor],
    title: str = "Samples",
    *,
    observed: Mapping[str, Tensor] | None = None,
    visible: Mapping[str, Tensor] | None = None,
    strength: Mapping[str, float] | None = None,
    values: Mapping[str, str] | None = None,
    most: int = 64,
    first: int = 0,
    total: int | None = None,
) -> Image.Image:
    """Samples in lines, a row for each modality: above what was given, with its holes, below what was made.

    Args:
        samples: ``[n, ...]`` by name.
        observed: what they were made from, as :meth:`Run.sample` takes it.
        visible: the places seen of those given in part, as there.
        strength: of those that were something to start from, as there.
        values: of those observed that are one value, what it is called: ``{"label": "horse"}``.
        most: how many are drawn; if there are more, the sheet says so.
        first: the place of the first of these among all.
        total: how many there are in all; None: these.
    """
    observed, visible, strength = observed or {}, visible or {}, strength or {}
    count = len(next(iter(samples.values())))
    n = min(count, most)
    total = total or first + count
    columns = sheet_columns(model, 16)
    given = {name: _batch(model.modality(name), observed[name], n) for name in model.names if name in observed}
    maps = {name: seen[:n] if seen.ndim == 3 else seen.expand(n, *seen.shape) for name, seen in visible.items()}

    def line(part: slice) -> Iterator[Row]:
        for name, x in given.items():
            role = "start" if name in strength else "given"
            seen = maps[name][part] if name in maps else None
            yield rendered(model.modality(name), name, x[part], "given", role, seen)
        for name, x in samples.items():
            if name not in given or name in maps or name in strength:
                filled = "filled" if name in maps and name not in strength else None
                yield rendered(model.modality(name), name, x[part], role=filled)

    blocks = []
    for start in range(0, n, columns):
        stop = min(start + columns, n)
        numbers = f"samples {_places(first + start, first + stop, total)}"
        blocks.append(Block(numbers if n > columns else "", list(line(slice(start, stop)))))
    told = _told(given, visible, strength, values or {})
    if total > n:
        told += f"; {_places(first, first + n, total) if first else f'first {n}'} of {total}"
    return draw_blocks(title, blocks, legends(model), told)


def _places(start: int, stop: int, total: int) -> str:
    """From which sample to which, by the names of their files."""
    return f"{stem_of(start, total)} to {stem_of(stop - 1, total)}"


def stem_of(place: int, total: int) -> str:
    """How a sample's files are named, by its place among all: with as many digits as the last of them has, at least
    four."""
    return str(place).zfill(max(4, len(str(total - 1))))


def to_image(picture: Tensor) -> Image.Image:
    """``[3, h, w]`` in [0, 1] as a picture of 8 bits."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


_SEEN = 128
"""The least grey that counts as white."""


def visibility_of(value: Any, size: tuple[int, int] | None = None, *, resize: bool = True) -> Tensor:
    """A visibility map: a tensor ``[..., h, w]`` as it is; of a picture, or a file of one, ``[h, w]``: 1 (seen) where
    it is white, 0 (to be filled in) where it is black.

    Args:
        size: height and width to which a picture is scaled and cropped, as one that is observed; None: as it is.
        resize: whether a picture of another size is, or is refused.

    Raises:
        UserError: as :func:`read_visibility`.
    """
    if isinstance(value, str | os.PathLike):
        return read_visibility(Path(value), size, resize=resize)
    if isinstance(value, Image.Image):
        return _visible(value, Path("a picture of what is visible"), size, resize=resize)
    return torch.as_tensor(value).float()


def _visible(picture: Image.Image, path: Path, size: tuple[int, int] | None, *, resize: bool) -> Tensor:
    greys = to_colour(picture, path).convert("L")
    _, lightest = greys.getextrema()
    if 0 < lightest < _SEEN:  # type: ignore[operator]  # of one channel it is a number
        raise UserError(
            f"{path}: nothing in it is white, its lightest grey is {lightest} of 255, so nothing would be seen; "
            "expected white (255) where it is seen and black (0) elsewhere"
        )
    if size is not None:
        greys = fitted(path, greys, size, resize=resize, nearest=True)
    return (torch.from_numpy(np.array(greys)) >= _SEEN).float()


def read_visibility(path: Path, size: tuple[int, int] | None = None, *, resize: bool = True) -> Tensor:
    """The visibility map ``[h, w]`` of a file.

    Args:
        size, resize: as of :func:`visibility_of`.

    Raises:
        UserError: if it is missing, or no picture, or damaged, or has no white though it is not black, or has another
            size and is not to be resized.
    """
    given_file(str(path), "what is visible is given as a picture file, white where it is seen and black elsewhere")
    return _visible(open_picture(path), path, size, resize=resize)


class _Page:
    """A page that is written from above, as long as it needs to be."""

    def __init__(self, width: int) -> None:
        self._page = Image.new("RGB", (width, 256), _PAPER)
        self._y = _MARGIN
        self._room(0)

    def image(self) -> Image.Image:
        return self._page.crop((0, 0, self._page.width, self._y))

    def skip(self, height: int) -> None:
        self._room(height)
        self._y += height

    def text(self, text: str, font: Font, colour: Colour, height: int) -> None:
        self._room(height)
        self._draw.text((_MARGIN, self._y), text, fill=colour, font=font)
        self._y += height

    def rule(self) -> None:
        self._room(10)
        self._draw.line((_MARGIN, self._y, self._page.width - _MARGIN, self._y), fill=_RULE)
        self._y += 10

    def legend(self, name: str, legend: Legend, font: Font, left: int) -> None:
        """Swatches with names from ``left`` on, wrapped over lines."""
        swatch, step, right = 14, 22, self._page.width - _MARGIN
        self._room(step)
        self._draw.text((_MARGIN, self._y), _cut(name, font, left - _MARGIN - 8), fill=_QUIET, font=font)
        x = left
        for what, colour in legend:
            label = _cut(what, font, min(170, right - left - swatch - 6))
            needed = swatch + 6 + int(font.getlength(label)) + 1
            if x > left and x + needed > right:
                x, self._y = left, self._y + step
                self._room(step)
            self._draw.rectangle((x, self._y, x + swatch, self._y + swatch), fill=colour, outline=_FAINT)
            self._draw.text((x + swatch + 6, self._y), label, fill=_INK, font=font)
            x += needed + 16
        self._y += step + 4

    def row(self, row: Row, font: Font, small: Font, left: int, column: int) -> None:
        """A name, what it is, and tiles in columns of this width."""
        self._room(row.height)
        (high, wide), y = row.tile, self._y
        right = left + len(row.pictures) * (column + _GAP) - _GAP
        if row.kind == "truth":
            band = (
                _MARGIN,
                y - _PAIR,
                self._page.width - _MARGIN - 1,
                y + row.height,
            )  # white tiles end where it begins
            self._draw.rectangle(band, fill=_BAND)
        middle = y + row.height / 2
        colour = {"generated": _INK, "given": _GIVEN, "truth": _FAINT}[row.kind]
        # The truth belongs to the row above, which has the name.
        words = [(row.role, small)] if row.kind == "truth" else [(row.name, font), (row.role, small)]
        words = [(word, its) for word, its in words if word]
        for place, (word, its) in enumerate(words):
            at = middle + (place - (len(words) - 1) / 2) * 16
            indent = 12 if row.kind == "truth" else 0
            label = _cut(word, its, left - _MARGIN - 10 - indent)
            self._draw.text((_MARGIN + indent, at), label, fill=colour, font=its, anchor="lm")
        top = y + (row.height - high) // 2
        for place, picture in enumerate(row.tiles()):
            x = left + place * (column + _GAP) + (column - wide) // 2
            if picture is not None:
                self._page.paste(picture, (x, top))
                continue
            self._draw.rectangle((x, top, x + wide - 1, top + high - 1), fill=_PAPER, outline=_RULE)
            centre, half = x + wide // 2, min(6, wide // 4)
            self._draw.line((centre - half, top + high // 2, centre + half, top + high // 2), fill=_FAINT, width=2)
        if row.kind == "given":
            self._draw.rectangle((left - 4, y - 4, right + 3, y + row.height + 3), outline=_GIVEN, width=2)
        self._y += row.height

    def _room(self, height: int) -> None:
        """Make the page longer where this much does not fit."""
        needed = self._y + height + _MARGIN
        if needed > self._page.height:
            longer = Image.new("RGB", (self._page.width, 2 * needed), _PAPER)
            longer.paste(self._page)
            self._page = longer
        self._draw = ImageDraw.Draw(self._page)


def _batch(modality: Modality, x: Tensor, n: int) -> Tensor:
    """The first n of what is given for each sample, or one value n times: ``[n, ...]``."""
    x = x.cpu()
    return x.expand(n, *x.shape) if x.ndim == modality.placeholder(1).ndim - 1 else x[:n]


def _told(
    given: Iterable[str], visible: Iterable[str], strength: Mapping[str, float], values: Mapping[str, str]
) -> str:
    """In words what samples were made from."""

    def named(name: str) -> str:
        if name not in values:
            return name
        value = values[name]  # a caption may be long
        return f"{name}={value if len(value) <= 80 else value[:79].rstrip() + '…'}"

    whole = [named(name) + (" with holes" if name in visible else "") for name in given if name not in strength]
    parts = [f"given {', '.join(whole)}"] if whole else []
    parts += [f"started from {named(name)} at strength {share:g}" for name, share in sorted(strength.items())]
    return "; ".join(parts) or "everything generated together"


def _shared(legends: Mapping[str, Legend]) -> list[tuple[str, Legend]]:
    """Legends with the names of the modalities that have them, one that several have once."""
    names: dict[tuple[tuple[str, Colour], ...], list[str]] = {}
    for name, legend in legends.items():
        if legend:
            names.setdefault(tuple(legend), []).append(name)
    return [(", ".join(those), legend) for legend, those in names.items()]


def _printable(text: str) -> str:
    """A text without accents, which Pillow's own font lacks."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _cut(text: str, font: Font, width: float) -> str:
    """A text that fits, with an ellipsis if it must be cut."""
    text = _printable(text)
    if font.getlength(text) <= width:
        return text
    fits = bisect(range(len(text)), width, key=lambda count: font.getlength(f"{text[:count]}…"))
    return f"{text[: max(fits - 1, 0)].rstrip()}…"


def _wrapped(text: str, font: Font, width: float) -> list[str]:
    """Lines that fit."""
    lines: list[str] = []
    for word in _printable(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_cut(word, font, width))
    return lines
