"""Pictures for people: samples side by side, and visibility maps from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_registry import UserError

_BACKGROUND = 0.12
_GAP = 2


def sample_sheet(model: MultimodalDiffusion, samples: Mapping[str, Tensor], most: int = 16) -> Tensor:
    """The first samples side by side, a row for each modality: ``[3, height, width]`` in [0, 1]."""
    return contact_sheet({name: model.modality(name).render(x[:most]).float().cpu() for name, x in samples.items()})


def contact_sheet(rows: Mapping[str, Tensor], side: int = 64) -> Tensor:
    """Pictures in rows, each row under its name: ``[3, height, width]`` in [0, 1].

    Args:
        rows: pictures ``[n, 3, h, w]`` in [0, 1], by the row's name. Small ones are enlarged by whole pixels.
        side: of a tile, at least; larger pictures keep their size.
    """
    side = max(side, *(size for pictures in rows.values() for size in pictures.shape[-2:]))
    columns = max(len(pictures) for pictures in rows.values())
    width = columns * (side + _GAP) + _GAP
    lines = []
    for name, pictures in rows.items():
        line = torch.full((3, side + _GAP, width), _BACKGROUND)
        height, length = pictures.shape[-2:]
        scale = side // max(height, length)
        large = F.interpolate(pictures, scale_factor=scale, mode="nearest")
        top, left = (side - height * scale) // 2, (side - length * scale) // 2
        for i, picture in enumerate(large):
            x = _GAP + i * (side + _GAP) + left
            line[:, top : top + picture.shape[1], x : x + picture.shape[2]] = picture
        lines += [_caption(name, width), line]
    return torch.cat(lines, 1)


def _caption(text: str, width: int, height: int = 16) -> Tensor:
    strip = Image.new("L", (width, height), round(_BACKGROUND * 255))
    ImageDraw.Draw(strip).text((_GAP, height / 2), text, fill=220, font=ImageFont.load_default(11), anchor="lm")
    return (torch.from_numpy(np.array(strip)).float() / 255).expand(3, -1, -1)


def save_png(picture: Tensor, path: Path) -> Path:
    """Write ``[3, h, w]`` in [0, 1] as a picture of 8 bits."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def read_visibility(path: Path) -> Tensor:
    """A visibility map ``[h, w]``: 1 (seen) where the picture is white, 0 (to be filled in) where it is black.

    Raises:
        UserError: if it is missing, or no picture, or damaged.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("L"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for a file that is no picture, or damaged
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None
    return (torch.from_numpy(pixels) >= 128).float()
