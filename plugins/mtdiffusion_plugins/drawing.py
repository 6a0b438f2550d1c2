"""Small pictures for modalities that are none: words on a tile, vectors as cells."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MOST, _LEAST, _SPACING = 40, 7, 1
_UNBROKEN = 12


def text_tiles(words: Sequence[str], side: int = 64) -> Tensor:
    """Each word or text on a dark tile: ``[B, 3, side, side]`` in [0, 1].

    As large as all of them fit, of several lines where one is long; what does not fit in the smallest letters is cut
    off.
    """
    tiles = []
    largest = min((_fitted(word, side - 4, _MOST)[1] for word in words), default=_MOST)
    for word in words:
        tile = Image.new("RGB", (side, side), (28, 30, 38))
        draw = ImageDraw.Draw(tile)
        text, size = _fitted(word, side - 4, largest)
        draw.multiline_text(
            (side / 2, side / 2),
            text,
            fill=(255, 214, 120),
            font=_font(size),
            anchor="mm",
            align="center",
            spacing=_SPACING,
        )
        tiles.append(torch.from_numpy(np.array(tile)))
    return torch.stack(tiles).permute(0, 3, 1, 2).float() / 255


def _fitted(text: str, side: int, largest: int) -> tuple[str, int]:
    """A text in lines, and the size of letters, ``largest`` at most, with which they fill a square."""
    # One word of up to a dozen letters is not broken: it is easier to read small than in pieces.
    if len(text.split()) <= 1 and len(text) <= _UNBROKEN:
        return text, max(_LEAST, min(largest, int(1.5 * (side + 4) / max(len(text), 1))))
    lines: list[str] = []
    for size in range(largest, _LEAST - 1, -1):
        fits = partial(_fits, size, side)
        lines = _lines(text, fits, whole=size > _LEAST)  # only in the smallest letters is a word broken
        if len(lines) * (size + _SPACING) <= side and all(map(fits, lines)):
            return "\n".join(lines), size
    rows = max(side // (_LEAST + _SPACING), 1)
    return "\n".join([*lines[: rows - 1], lines[rows - 1][:-1] + "…"]), _LEAST


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fits(size: int, side: int, line: str) -> bool:
    return _font(size).getlength(line) <= side


def _lines(text: str, fits: Callable[[str], bool], whole: bool) -> list[str]:
    """Greedily, words that do not fit alone broken unless they are to stay whole."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        rest = word
        if line and fits(f"{line} {rest}"):
            line = f"{line} {rest}"
            continue
        if line:
            lines.append(line)
        while not whole and not fits(rest):
            cut = _longest(rest, fits)
            lines.append(rest[:cut])
            rest = rest[cut:]
        line = rest
    return [*lines, line] if line else lines


def _longest(word: str, fits: Callable[[str], bool]) -> int:
    """How many letters of a word's beginning fit; at least 1."""
    return max(bisect_left(range(len(word)), True, key=lambda n: not fits(word[:n])) - 1, 1)


def vector_tiles(vectors: Tensor) -> Tensor:
    """Each vector ``[B, D]`` of norm 1 as cells, blue (negative) to white to red: ``[B, 3, h, w]`` in [0, 1]."""
    batch, dim = vectors.shape
    side = int(np.ceil(np.sqrt(dim)))
    cells = torch.zeros(batch, side * side, device=vectors.device)
    cells[:, :dim] = (vectors.float() * dim**0.5 / 2).clamp(-1, 1)
    warm, cold = cells.clamp(min=0), (-cells).clamp(min=0)
    return torch.stack([1 - cold, 1 - 0.8 * (warm + cold), 1 - warm], 1).reshape(batch, 3, side, side)
