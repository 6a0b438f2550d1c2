"""The one reader of picture files: whoever opens a picture opens it here, so that all see the same pixels.

A picture is decoded whole, turned as its EXIF data say, and of 8 bits a channel.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from attrs import field, frozen
from PIL import Image, ImageOps, UnidentifiedImageError

from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.pace import LOGGER

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif")
"""Of files that are taken for pictures, in lower case."""

_ORIENTATION = 0x0112  # EXIF
_WIDTH, _LENGTH, _PHOTOMETRIC = 256, 257, 262  # TIFF
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
MOST_PIXELS = 2 * 10**8
"""That a picture may have."""


@frozen
class Encoded:
    """A picture's file in memory, as tables and archives hold them; it stands wherever a picture's path does.

    Attributes:
        content: the file's bytes.
        name: what errors call it.
    """

    content: bytes = field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """The file's bytes, as of a path."""
        return self.content


Source = Path | Encoded
"""Where a picture is read from."""


def picture_size(path: Source) -> tuple[int, int]:
    """Height and width of a picture as it is shown, read from its header.

    Raises:
        UserError: if the file is missing or no picture.
    """
    with _opened(path) as picture:
        width, height = _stored_size(picture)
        return (width, height) if _orientation(picture) in _SWAPS_SIDES else (height, width)


def read_palette(path: Source) -> tuple[int, ...]:
    """The palette of a palette picture, RGB one after another, read from its header; () of other pictures.

    Raises:
        UserError: as :func:`picture_size`.
    """
    with _opened(path) as picture:
        return tuple(picture.getpalette("RGB") or ()) if picture.mode == "P" else ()


def open_picture(path: Source, at_least: tuple[int, int] | None = None) -> Image.Image:
    """A picture, decoded whole and upright, in the mode of the file.

    Args:
        at_least: height and width below which it need not be known: a large JPEG is then decoded at a half, a quarter
            or an eighth of its size, which takes a fraction of the time.

    Raises:
        UserError: if the file is missing, no picture, damaged, or holds several pictures.
    """
    with _opened(path) as picture:
        turned = _orientation(picture)
        if at_least is not None:
            height, width = reversed(at_least) if turned in _SWAPS_SIDES else at_least
            if picture.width >= 4 * width and picture.height >= 4 * height:
                picture.draft(None, (2 * width, 2 * height))  # twice as large: the rest is filtered properly
        picture.load()
        if picture.format == "TIFF":
            turned = _orientation(picture)  # what is left to do: Pillow turns these while it loads them
        return picture.transpose(_TURNED[turned]) if turned in _TURNED else picture


def to_colour(picture: Image.Image, path: Source) -> Image.Image:
    """A picture in RGB of 8 bits a channel, transparent parts over white; 16-bit greys keep their upper 8 bits.

    Args:
        path: where it comes from, for errors.

    Raises:
        UserError: if its pixels have no known range (32-bit integers, floats).
    """
    if _is_16_bits(picture):
        picture = _of_8_bits(picture)
    if picture.mode.startswith(("I", "F")):
        raise UserError(
            f"{path}: pictures must have 8 or 16 bits a channel, this one has mode {picture.mode!r}, whose range is "
            "not known; save it with 8 bits a channel"
        )
    if _has_alpha(picture):
        picture = picture.convert("RGBA")
        page = Image.new("RGBA", picture.size, "white")
        page.alpha_composite(picture)
        picture = page
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _is_16_bits(picture: Image.Image) -> bool:
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info


def _of_8_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16-bit greys in 8 bits, and as transparent as it was: a PNG may say of one grey that it is."""
    levels = np.asarray(picture).astype(np.int64)
    page = Image.fromarray((levels // 257).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        page.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return page


def to_indices(picture: Image.Image, path: Source) -> Image.Image:
    """A picture of class indices, one a pixel; greys that were saved as three equal channels are taken as one.

    Raises:
        UserError: if its pixels are colours.
    """
    if picture.mode == "RGB":
        red, green, blue = picture.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            return red
    if picture.mode not in ("1", "L", "P", "I") and not picture.mode.startswith("I;16"):
        raise UserError(
            f"{path}: a mask's pixels must be class indices (mode 1, L, P, I or I;16), this one has mode "
            f"{picture.mode!r}; save one index a pixel, or say which colour is which class (colours of the field)"
        )
    return picture


def require_lossless(path: Source, *, greys: bool = False) -> None:
    """Raise :class:`UserError` if a picture's pixels are not what was saved: its file was compressed with losses, which
    blurs neighbouring classes into others.

    Args:
        greys: whether greys are to be the numbers that the file stores, as class indices are, and not shades from 0
            (black) to 255 (white), which some formats make of them.
    """
    with _opened(path) as picture:
        spread = _respread(picture) if greys else ""
        kind = str(picture.format)
        lossy = kind in ("JPEG", "MPO", "JPEG2000", "AVIF") or picture.info.get("compression") in ("jpeg", "webp")
    if kind == "WEBP":
        lossy = b"VP8L" not in path.read_bytes()
    if lossy:
        raise UserError(
            f"{path}: a mask saved as {kind} with losses no longer holds its classes, as neighbouring ones blur into "
            "others; make it anew from the original, as PNG"
        )
    if spread:
        raise UserError(
            f"{path}: {spread}, so that programs read its pixels as different numbers, and these need not be the class "
            "indices that were saved; save it as PNG with 8 bits a pixel"
        )


def _respread(picture: Image.Image) -> str:
    """Why a picture's greys are not the numbers that its file stores; empty if they are. To be asked before it is
    loaded."""
    tiles = getattr(picture, "tile", ())
    if picture.format == "PPM" and tiles:
        arguments = tiles[0][3]
        most = arguments[1] if isinstance(arguments, tuple) and len(arguments) == 2 else 255
        return "" if most in (255, 65535) else f"its greatest grey is {most}"
    raw = str(tiles[0][3]) if tiles else ""
    if picture.mode in ("1", "L") and (bits := re.search(r"\bL;([24])", raw)):
        return f"its greys have {bits[1]} bits"
    if picture.format == "TIFF" and getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        return "it is a TIFF in which 0 is white"
    return ""


def to_paint(picture: Image.Image, path: Source) -> tuple[Image.Image, Image.Image | None]:
    """The colours that a picture stores, in RGB of 8 bits a channel, where these are to be classes; and in grey, where
    it is wholly transparent (255) and so shows no colour of its own. None: nowhere.

    What is transparent in part, as the soft edge of a brush is, has the colour that it is painted in.

    Raises:
        UserError: as :func:`to_colour`.
    """
    if _is_16_bits(picture):
        picture = _of_8_bits(picture)
    if not _has_alpha(picture):
        return to_colour(picture, path), None
    picture = picture.convert("RGBA")
    clear = picture.getchannel("A").point([255] + [0] * 255)
    return picture.convert("RGB"), clear if clear.getbbox() else None


def require_opaque(clear: Image.Image | None, path: Source, remedy: str) -> None:
    """Raise :class:`UserError` if a painted picture is wholly transparent somewhere (:func:`to_paint`): what is seen
    there is the colour of whatever lies behind.

    Args:
        remedy: what to do about it.
    """
    if clear is not None:
        pixels = np.asarray(clear) > 0
        row, column = np.argwhere(pixels)[0]
        raise UserError(
            f"{path}: {pixels.mean():.1%} of its pixels are transparent, the first in row {row}, column {column}, and "
            f"have the colour of no class; {remedy}"
        )


def fit(picture: Image.Image, size: tuple[int, int], *, nearest: bool = False) -> Image.Image:
    """A picture scaled until it covers ``size`` (height and width) and cropped to it centrally; bicubic, or of the
    nearest pixel, where values are classes."""
    if picture.size == (size[1], size[0]):
        return picture
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    return ImageOps.fit(picture, (size[1], size[0]), how)


def require_size(path: object, found: tuple[int, int], size: tuple[int, int], *, resize: bool) -> None:
    """Say that a picture is scaled and cropped from one height and width to another, if it is.

    Args:
        path: by which it is named.
        resize: whether it may be.

    Raises:
        UserError: if it is not to be.
    """
    if found == size:
        return
    if not resize:
        raise UserError(f"{path}: expected {size[1]} × {size[0]} pixels, found {found[1]} × {found[0]}; resize it")
    logging.getLogger(LOGGER).info(
        "%s: %d × %d pixels, scaled and cropped centrally to %d × %d", path, found[1], found[0], size[1], size[0]
    )


def fitted(
    path: object, picture: Image.Image, size: tuple[int, int], *, resize: bool, nearest: bool = False
) -> Image.Image:
    """A picture of a size: :func:`fit`, as :func:`require_size` says or refuses."""
    require_size(path, (picture.height, picture.width), size, resize=resize)
    return fit(picture, size, nearest=nearest)


def to_levels(picture: Image.Image, channels: int) -> np.ndarray:
    """uint8 ``[channels, height, width]`` of an RGB picture: itself, or its grey levels if there is to be 1 channel."""
    pixels = np.asarray(picture.convert("L") if channels == 1 else picture)
    return np.array(pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1), np.uint8, order="C")


def read_levels(path: Source, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """uint8 ``[channels, height, width]`` of a picture's file.

    Args:
        size: height and width to which it is scaled and cropped centrally; None: as it is.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        UserError: as :func:`open_picture` and :func:`to_colour`.
    """
    picture = to_colour(open_picture(path, size), path)
    return to_levels(picture if size is None else fit(picture, size), channels)


@contextmanager
def _opened(path: Source) -> Iterator[Image.Image]:
    """An opened picture; whatever is wrong with its file is a UserError."""
    try:
        with Image.open(BytesIO(path.content) if isinstance(path, Encoded) else path) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise UserError(
                    f"{path}: has {picture.width} × {picture.height} pixels, more than {MOST_PIXELS:,}; make it smaller"
                )
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # MPO: a photograph and its preview
                raise UserError(f"{path}: holds {frames} pictures, expected one; save one of them alone")
            yield picture
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: cannot be read as a picture (PNG and JPEG can)") from None
    except Exception as error:  # Pillow's readers raise whatever their parsing runs into
        raise UserError(f"{path}: the picture is damaged or cannot be read ({type(error).__name__}: {error})") from None


def _stored_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height as stored, before any turning: newer Pillows give those of a TIFF as they are shown."""
    if picture.format == "TIFF":
        tags = picture.tag_v2  # type: ignore[attr-defined]
        return int(tags[_WIDTH]), int(tags[_LENGTH])
    return picture.size


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none that can be read."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF data are often malformed, and a viewer shows the picture all the same
        return 1
