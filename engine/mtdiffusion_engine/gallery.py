"""A picture of what a model does: joint samples, and one block for every single modality given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtdiffusion import MultimodalDiffusion, sample
from mtdiffusion.conditioning import random_holes
from mtdiffusion_engine.evaluation import complete_samples

if TYPE_CHECKING:
    from mtdiffusion_engine.run import Run

_TILE, _GAP, _MARGIN, _LEFT, _HEADER = 56, 4, 16, 132, 34
_INK, _QUIET, _GIVEN, _PAPER = (24, 26, 32), (110, 114, 124), (0, 114, 178), (255, 255, 255)


class Block:
    """One titled block of the gallery: a row of tiles a modality, the given ones marked."""

    def __init__(self, title: str, rows: Mapping[str, Tensor], given: frozenset[str]) -> None:
        self.title = title
        self.rows = rows
        self.given = given

    @property
    def height(self) -> int:
        return _HEADER + len(self.rows) * (_TILE + _GAP) + _MARGIN


def tile(picture: Tensor) -> Image.Image:
    """``[3, h, w]`` in [0, 1] as a square tile; nearest-neighbour, so that small pictures stay crisp."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    small = max(image.size) <= _TILE
    return image.resize((_TILE, _TILE), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def draw_blocks(title: str, blocks: list[Block], columns: int) -> Image.Image:
    """The blocks below one another under a title."""
    width = _MARGIN + _LEFT + columns * (_TILE + _GAP) + _MARGIN
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
            draw.text((_MARGIN, y + _TILE / 2), name, fill=colour, font=small, anchor="lm")
            if given:
                draw.text((_MARGIN, y + _TILE / 2 + 15), "given", fill=colour, font=small, anchor="lm")
                right = _MARGIN + _LEFT + len(pictures) * (_TILE + _GAP) - 2
                draw.rectangle((_MARGIN + _LEFT - 4, y - 3, right, y + _TILE + 1), outline=_GIVEN, width=2)
            for column, picture in enumerate(pictures):
                page.paste(tile(picture), (_MARGIN + _LEFT + column * (_TILE + _GAP), y))
            y += _TILE + _GAP
        top += block.height
    return page


def _render(model: MultimodalDiffusion, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: model.modality(name).render(samples[name]).cpu() for name in model.names}


def draw_gallery(run: Run, path: Path, seed: int = 0, columns: int = 12) -> Path:
    """Write the gallery of a run's model as a picture; what is given comes from its test split."""
    model, settings = run.model, run.experiment.sampling
    test = complete_samples(run.data("test"))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(next(iter(test.values()))), generator=generator)[:columns]
    test = {name: x[rows] for name, x in test.items()}
    n = len(rows)

    joint = sample(model, n, settings=settings, generator=generator)
    blocks = [Block("everything generated together", _render(model, joint), frozenset())]
    for given in model.names if len(model.names) > 1 else []:
        out = sample(model, n, observed={given: test[given]}, settings=settings, generator=generator)
        blocks.append(Block(f"given {given} alone (held-out data)", _render(model, out), frozenset([given])))
    latent = model.layout.latent
    for name, spatial in zip(model.names, model.spatial, strict=True):
        if not spatial:
            continue
        share = torch.full((n,), run.experiment.evaluation.hidden_share)
        visible = random_holes(share, (latent.height, latent.width), generator)
        out = sample(
            model, n, observed={name: test[name]}, visible={name: visible}, settings=settings, generator=generator
        )
        rendered = model.modality(name)
        seen = rendered.render(test[name]).cpu()
        holes = torch.nn.functional.interpolate(visible[:, None], size=seen.shape[-2:], mode="nearest")
        grey = torch.tensor([0.55, 0.35, 0.65])[None, :, None, None]
        shown = {
            f"{name} seen": seen * holes + grey * (1 - holes),
            f"{name} filled": rendered.render(out[name]).cpu(),
            f"{name} truth": seen,
        }
        blocks.append(Block(f"given {name} with holes", shown, frozenset([f"{name} seen"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"One model, {len(model.names)} modalities: {', '.join(model.names)}"
    draw_blocks(title, blocks, n).save(path)
    return path
