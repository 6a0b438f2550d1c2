"""Pictures for people: blocks of samples under titles, and visibility maps from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_registry.pictures import open_picture, to_colour

TILE = 64
"""Side of a tile in pixels."""
_GAP, _MARGIN, _LEFT, _HEADER = 4, 16, 132, 34
_INK, _QUIET, _GIVEN, _PAPER = (24, 26, 32), (110, 114, 124), (0, 114, 178), (255, 255, 255)


@frozen(eq=False)
class Block:
    """Rows of pictures under a title.

    Attributes:
        title: what they show.
        rows: pictures ``[n, 3, h, w]`` in [0, 1], by the row's name.
        given: names of the rows that were given rather than generated; they are marked.
    """

    title: str
    rows: Mapping[str, Tensor]
    given: frozenset[str] = frozenset()

    @property
    def height(self) -> int:
        return _HEADER + len(self.rows) * (TILE + _GAP) + _MARGIN


def tile(picture: Tensor) -> Image.Image:
    """``[3, h, w]`` in [0, 1] on a square tile: small pictures enlarged by whole pixels, large ones made smaller."""
    image = to_image(picture)
    factor = TILE / max(image.size)
    if factor >= 1:
        image = image.resize((image.width * int(factor), image.height * int(factor)), Image.Resampling.NEAREST)
    else:
        image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (TILE, TILE), _PAPER)
    page.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return page


def draw_blocks(title: str, blocks: Sequence[Block]) -> Image.Image:
    """The blocks below one another under a title."""
    columns = max(len(pictures) for block in blocks for pictures in block.rows.values())
    width = max(_MARGIN + _LEFT + columns * (TILE + _GAP) + _MARGIN, 480)
    top = _MARGIN + 40
    page = Image.new("RGB", (width, top + sum(block.height for block in blocks)), _PAPER)
    draw = ImageDraw.Draw(page)
    large, medium, small = (ImageFont.load_default(size) for size in (22, 17, 14))
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=large)
    for block in blocks:
        draw.line((_MARGIN, top, width - _MARGIN, top), fill=(222, 224, 230))
        draw.text((_MARGIN, top + 9), block.title, fill=_INK, font=medium)
        y = top + _HEADER
        for name, pictures in block.rows.items():
            given = name in block.given
            colour = _GIVEN if given else _QUIET
            draw.text((_MARGIN, y + TILE / 2), name, fill=colour, font=small, anchor="lm")
            if given:
                draw.text((_MARGIN, y + TILE / 2 + 15), "given", fill=colour, font=small, anchor="lm")
                right = _MARGIN + _LEFT + len(pictures) * (TILE + _GAP) - 2
                draw.rectangle((_MARGIN + _LEFT - 4, y - 3, right, y + TILE + 1), outline=_GIVEN, width=2)
            for column, picture in enumerate(pictures):
                page.paste(tile(picture), (_MARGIN + _LEFT + column * (TILE + _GAP), y))
            y += TILE + _GAP
        top += block.height
    return page


def sample_sheet(
    model: MultimodalDiffusion,
    samples: Mapping[str, Tensor],
    given: frozenset[str] = frozenset(),
    title: str = "Samples",
    start: frozenset[str] = frozenset(),
    most: int = 16,
) -> Image.Image:
    """The first samples side by side, a row for each modality; ``start``: what they started from."""
    rows = {name: model.modality(name).render(x[:most]).float().cpu() for name, x in samples.items()}
    parts = [f"{how} {', '.join(sorted(names))}" for how, names in (("given", given), ("from", start)) if names]
    what = "; ".join(parts) or "everything generated together"
    return draw_blocks(title, [Block(what, rows, given)])


def to_image(picture: Tensor) -> Image.Image:
    """``[3, h, w]`` in [0, 1] as a picture of 8 bits."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def read_visibility(path: Path) -> Tensor:
    """A visibility map ``[h, w]``: 1 (seen) where the picture is white, 0 (to be filled in) where it is black.

    Raises:
        UserError: if it is missing, or no picture, or damaged.
    """
    pixels = np.array(to_colour(open_picture(path), path).convert("L"))
    return (torch.from_numpy(pixels) >= 128).float()
