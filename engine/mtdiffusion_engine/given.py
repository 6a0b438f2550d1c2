"""What a caller gives of a modality, as a tensor: a tensor, a value as on the command line, or a picture."""

from __future__ import annotations

import os
import tempfile
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
            value itself (a class's name, a caption); or a picture: Pillow's, or a uint8 array ``[h, w, 1, 3 or 4]``; or
            a list of texts and Pillow's pictures, one a sample.

    Raises:
        UserError, ValueError: if it is none of these, or if the modality cannot read it.
    """
    if isinstance(value, str | os.PathLike):
        return modality.parse(os.fspath(value))
    if _is_picture(value):
        with tempfile.TemporaryDirectory(prefix="mtdiffusion-") as folder:  # modalities read pictures from files
            path = Path(folder) / "picture.png"
            (value if isinstance(value, Image.Image) else Image.fromarray(np.squeeze(value))).save(path)
            return modality.parse(str(path))
    if isinstance(value, list | tuple) and any(isinstance(each, str | os.PathLike | Image.Image) for each in value):
        return torch.stack([tensor_of(modality, each) for each in value])
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"expected a tensor, a text, a path or a picture, found {type(value).__name__}") from None


def _is_picture(value: Any) -> bool:
    """Arrays of bytes with their channels last are how pictures are held elsewhere; in no modality are they values."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return value.ndim == 3 and value.shape[2] in (1, 3, 4)
    return isinstance(value, Image.Image)


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
