"""What a caller gives of a modality, as a tensor: a tensor, a value as on the command line, or a picture."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtdiffusion import Modality
from mtdiffusion_registry import UserError


def tensor_of(modality: Modality, value: Any) -> Tensor:
    """A value of a modality, or a batch of them; whether it fits is the modality's to check.

    Args:
        value: a tensor, or what torch takes for one; or a text, as after ``--observe NAME=``: a file's path or the
            value itself (a class's name, a caption); or a picture: Pillow's, or a uint8 array ``[H, W, 1, 3 or 4]``, or
            ``[H, W]`` where x is no classes, of any size; or an array of several, ``[n, H, W, ...]``, without channels
            only where x has one; or a list of any of these, one a sample. Floats of a modality ``[C, h, w]`` may also
            have their channels last, ``[h, w, C]``, or no axis of them where there is one; their range is the
            modality's own. Where both layouts would do, channels come first.

    Raises:
        UserError, ValueError: if it is none of these, or if the modality cannot read it.
    """
    if isinstance(value, str | os.PathLike):
        return modality.parse(os.fspath(value))
    if isinstance(value, Image.Image):
        return _of_picture(modality, value)
    if isinstance(value, list | tuple) and any(isinstance(each, _SINGLE) for each in value):
        return _stacked([tensor_of(modality, each) for each in value])
    example = modality.placeholder(1)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        one, many = _picture_axes(modality, example, value.shape)
        if one or many:
            pictures = [
                _of_picture(modality, Image.fromarray(_without_one(each))) for each in (value if many else [value])
            ]
            return _stacked(pictures) if many else pictures[0]
    try:
        # A copy: torch warns of arrays that cannot be written, and takes none whose strides are negative.
        x = torch.as_tensor(np.array(value, order="C") if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"expected a tensor, a text, a path or a picture, found {_told(value)}") from None
    return _arranged(modality, example, x)


_ARRAYS = (np.ndarray, Tensor)
_SINGLE = (*_ARRAYS, str, os.PathLike, Image.Image)
"""What is one sample each in a list."""


def _stacked(values: Sequence[Tensor]) -> Tensor:
    if not values or len({x.shape for x in values}) > 1:
        raise ValueError(f"expected values of one shape, found {sorted({str(list(x.shape)) for x in values})}")
    return torch.stack(list(values))


def _of_picture(modality: Modality, picture: Image.Image) -> Tensor:
    with tempfile.TemporaryDirectory(prefix="mtdiffusion-") as folder:  # modalities read pictures from files
        path = Path(folder) / "picture.png"
        picture.save(path)
        return modality.parse(str(path))


def _without_one(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pillow takes grey pictures ``[H, W]``."""
    return np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _picture_axes(modality: Modality, example: Tensor, shape: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether bytes are a picture, and whether they are several.

    Bytes with their channels last are how pictures are held elsewhere, and values of no modality but of one whose x has
    that very shape. Without channels they may be values, of a modality of classes.
    """
    own = tuple(example.shape[1:])
    if 0 in shape or (not example.is_floating_point() and shape in (own, (shape[0], *own) if shape else own)):
        return False, False
    if len(shape) in (3, 4) and shape[-1] in (1, 3, 4):
        return len(shape) == 3, len(shape) == 4
    if not _is_picture(modality, example):
        return False, False
    return len(shape) == 2, len(shape) == 3 and own[0] == 1


def _is_picture(modality: Modality, example: Tensor) -> bool:
    """Whether x is ``[C, h, w]``, of floats, and a picture to its modality."""
    return example.is_floating_point() and example.ndim == 4 and modality.input_spec.form == "picture"


def _arranged(modality: Modality, example: Tensor, x: Tensor) -> Tensor:
    """Floats with their channels first, as the modality has them; others as they are.

    Raises:
        ValueError: if a picture has a shape or a dtype that says nothing of where its channels are.
    """
    if not _is_picture(modality, example):
        return x
    channels, *places = example.shape[1:]
    if x.is_floating_point():
        shape = list(x.shape)
        if x.ndim in (3, 4) and shape[-3:] == [channels, *places]:
            return x
        if x.ndim in (3, 4) and shape[-3:] == [*places, channels]:
            return x.movedim(-1, -3)
        if channels == 1 and x.ndim in (2, 3) and shape[-2:] == places:
            return x.unsqueeze(-3)
    height, width = places
    bare = f"[{height}, {width}], " if channels == 1 else ""
    grey = "[H, W] or " if channels == 1 else ""
    raise ValueError(
        f"expected a picture: floats {bare}[{channels}, {height}, {width}] or [{height}, {width}, {channels}] in the "
        f"modality's own range (of kind image -1 to 1), one or a batch [n, ...]; or an array of uint8, 0 to 255, of "
        f"any size: [H, W] or [H, W, 1, 3 or 4], or a batch of {grey}the latter, [n, ...]; found {_told(x)}"
    )


def _told(value: Any) -> str:
    """What a value is, for errors."""
    if isinstance(value, _ARRAYS):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def parsed(modality: Modality, text: str) -> Tensor:
    """What follows ``--observe NAME=``: one value, or several with commas between them, ``[k, ...]``.

    A text that is a value as a whole (a caption, a file's name) is one, whatever commas are in it.

    Raises:
        UserError, ValueError: if it is neither; of the first part that is no value, or of the whole if none is.
    """
    try:
        return modality.parse(text)
    except (UserError, ValueError):
        values: list[Tensor] = []
        wrong: Exception | None = None
        for part in [part.strip() for part in text.split(",")] if "," in text else ():
            try:
                values.append(modality.parse(part))
            except (UserError, ValueError) as error:
                wrong = wrong or error
        if not values:
            raise
        if wrong is not None:
            raise wrong from None
    return torch.stack(values)
