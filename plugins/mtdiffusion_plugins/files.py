"""Reading and writing single values as files. Errors name the file and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mtdiffusion_registry.errors import UserError

# Okabe & Ito's palette, told apart by colour-blind readers; class 0 (background) is black.
PALETTE = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
    (255, 255, 255),
)


def colour_of_class(index: int) -> tuple[int, int, int]:
    """RGB in 0..255 of a class index; the palette repeats after nine, a little darker each time round."""
    red, green, blue = PALETTE[index % len(PALETTE)]
    shade = 0.75 ** (index // len(PALETTE))
    return (round(red * shade), round(green * shade), round(blue * shade))


def open_picture(path: Path) -> Image.Image:
    """A fully decoded picture.

    Raises:
        UserError: if the file is missing, not a picture, or truncated.
    """
    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that can be read (PNG and JPEG are)") from None
    except OSError as error:
        raise UserError(f"{path}: the picture is damaged or cannot be read ({error})") from None
    return picture


def read_image(path: Path, channels: int, size: int) -> Tensor:
    """float32 ``[channels, size, size]`` in [−1, 1].

    Raises:
        UserError: if it cannot be read or has another size.
    """
    picture = open_picture(path).convert("L" if channels == 1 else "RGB")
    _require_size(path, picture, size)
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32).copy()) / 127.5 - 1
    return values.reshape(size, size, channels).permute(2, 0, 1).contiguous()


def read_mask(path: Path, size: int) -> Tensor:
    """int64 class indices ``[size, size]`` from a palette or grey picture.

    Raises:
        UserError: if it cannot be read, is neither palette nor grey, or has another size.
    """
    picture = open_picture(path)
    if picture.mode not in ("P", "L", "1", "I", "I;16"):
        raise UserError(
            f"{path}: expected a picture of class indices (palette or grey), found mode {picture.mode}; "
            "save it with one index a pixel"
        )
    _require_size(path, picture, size)
    return torch.from_numpy(np.asarray(picture).astype(np.int64))


def _require_size(path: Path, picture: Image.Image, size: int) -> None:
    if picture.size != (size, size):
        raise UserError(f"{path}: expected {size} × {size} pixels, found {picture.width} × {picture.height}; resize it")


def write_image(image: Tensor, path: Path) -> Path:
    """Write ``[channels, h, w]`` in [−1, 1] as a picture of 8 bits."""
    values = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).save(path)
    return path


def write_mask(mask: Tensor, path: Path) -> Path:
    """Write class indices ``[h, w]`` below 256 as a palette picture: the indices exactly, coloured for people."""
    picture = Image.fromarray(mask.to(torch.uint8).cpu().numpy())
    picture.putpalette([value for index in range(256) for value in colour_of_class(index)])
    picture.save(path)
    return path


def read_vector(path: Path, dim: int) -> Tensor:
    """float32 ``[dim]`` from a .safetensors (one tensor), .npy or .json (a list) file.

    Raises:
        UserError: if it cannot be read or has another shape.
    """
    try:
        if path.suffix == ".npy":
            vector = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        elif path.suffix == ".json":
            vector = torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float32)
        else:
            from safetensors.torch import load_file

            tensors = load_file(path)
            if len(tensors) != 1:
                raise UserError(f"{path}: expected one tensor, found {len(tensors)}: {', '.join(tensors) or 'none'}")
            vector = next(iter(tensors.values())).float()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # each format has exceptions of its own for a damaged file
        raise UserError(f"{path}: cannot be read as {path.suffix or 'safetensors'} ({error})") from None
    if tuple(vector.shape) != (dim,):
        raise UserError(f"{path}: expected a vector of {dim} numbers, found shape {list(vector.shape)}")
    return vector


def read_json_value(path: Path, key: str) -> str:
    """One value of a JSON object, as text.

    Raises:
        UserError: if the file cannot be read or has no such key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict) or key not in content:
        raise UserError(f'{path}: expected a JSON object with the key "{key}"')
    return str(content[key])
