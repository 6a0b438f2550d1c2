"""Small pictures for modalities that are none: words on a tile, vectors as cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def text_tiles(words: Sequence[str], side: int = 64) -> Tensor:
    """Each word on a dark tile: ``[B, 3, side, side]`` in [0, 1]."""
    tiles = []
    for word in words:
        tile = Image.new("RGB", (side, side), (28, 30, 38))
        draw = ImageDraw.Draw(tile)
        size = max(8, min(40, int(1.5 * side / max(len(word), 1))))
        draw.text((side / 2, side / 2), word, fill=(255, 214, 120), font=ImageFont.load_default(size), anchor="mm")
        tiles.append(torch.from_numpy(np.array(tile)))
    return torch.stack(tiles).permute(0, 3, 1, 2).float() / 255


def vector_tiles(vectors: Tensor) -> Tensor:
    """Each vector ``[B, D]`` of norm 1 as cells, blue (negative) to white to red: ``[B, 3, h, w]`` in [0, 1]."""
    batch, dim = vectors.shape
    side = int(np.ceil(np.sqrt(dim)))
    cells = torch.zeros(batch, side * side, device=vectors.device)
    cells[:, :dim] = (vectors.float() * dim**0.5 / 2).clamp(-1, 1)
    warm, cold = cells.clamp(min=0), (-cells).clamp(min=0)
    return torch.stack([1 - cold, 1 - 0.8 * (warm + cold), 1 - warm], 1).reshape(batch, 3, side, side)
