"""Reading and writing single values as files. Errors name the file and what to do about it."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path, PurePath
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from mtdiffusion_plugins.sizes import Size, sides
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.pictures import (
    Source,
    fitted,
    open_picture,
    require_lossless,
    require_opaque,
    to_colour,
    to_indices,
    to_levels,
    to_paint,
)

Colour = tuple[int, int, int]
"""RGB in 0..255."""

__all__ = ["open_picture", "read_image", "read_json_value", "read_mask", "read_text", "read_vector", "write_image"]

# Okabe & Ito's palette, told apart by colour-blind readers too; class 0 (background) is black.
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
VOID_COLOUR = (128, 128, 128)

PICTURE_GIVEN = "a picture is given as a file, such as a PNG or JPEG"


def colour_of_class(index: int) -> Colour:
    """RGB in 0..255 of a class index: the palette, then each time the colour that differs most from all before it and
    from void's, as people see colours."""
    return _colours(max(64, 1 << index.bit_length()))[index]


@cache
def _colours(count: int) -> list[Colour]:
    """The first colours, each as far as can be from those before; the next ones do not change them."""
    levels = np.linspace(0, 255, 18).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    places = _oklab(candidates)
    found: list[Colour] = [*PALETTE]
    distance = np.full(len(candidates), np.inf)
    for colour in (VOID_COLOUR, *PALETTE):
        distance = np.minimum(distance, np.linalg.norm(places - _oklab(np.array(colour)), axis=1))
    while len(found) < count:
        furthest = int(distance.argmax())
        red, green, blue = (int(value) for value in candidates[furthest])
        found.append((red, green, blue))
        distance = np.minimum(distance, np.linalg.norm(places - places[furthest], axis=1))
    return found


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 ``[..., 3]`` in Oklab (Ottosson 2020), where distances are about those that people see."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(linear @ _TO_CONES.T)
    return cones @ _TO_OKLAB.T


_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def rgb_of_names(colours: Sequence[str]) -> list[Colour]:
    """RGB in 0..255 of colours such as ``"#ff0000"`` or ``"red"``, of which no two are the same.

    Raises:
        ValueError: if one is no colour, or is there twice.
    """
    found: list[Colour] = []
    for colour in colours:
        try:
            red, green, blue = ImageColor.getrgb(colour)[:3]
        except ValueError:
            raise ValueError(f"colours: expected colours such as '#ff0000' or 'red', found {colour!r}") from None
        found.append((red, green, blue))
    if len(set(found)) < len(found):
        raise ValueError("colours: expected a different colour for each class, found one twice")
    return found


def read_image(path: Path, channels: int, size: Size, *, resize: bool = True) -> Tensor:
    """float32 ``[channels, height, width]`` in [−1, 1], scaled and cropped centrally to ``size``.

    Args:
        size: height and width, or a square's side.
        resize: whether a picture of another size is scaled and cropped, or refused.

    Raises:
        UserError: if it cannot be read, or has another size and is not to be resized.
    """
    picture = to_colour(open_picture(path, sides(size) if resize else None), path)
    return from_levels(read_pixels(fitted(path, picture, sides(size), resize=resize), channels))


def read_pixels(picture: Image.Image, channels: int) -> Tensor:
    """uint8 ``[channels, height, width]`` of an RGB picture."""
    return torch.from_numpy(to_levels(picture, channels))


def from_levels(pixels: Tensor) -> Tensor:
    """Values 0..255 as float32 in [−1, 1], the same to the bit on every device."""
    # Divided by a tensor: by a number, CUDA would multiply with its reciprocal, which rounds otherwise.
    half = torch.full((), 127.5, device=pixels.device)
    return pixels.to(torch.float32).div_(half).sub_(1)


def read_mask(
    path: Path, size: Size, *, resize: bool = True, colours: Mapping[Colour, int] = MappingProxyType({})
) -> Tensor:
    """int64 class indices ``[height, width]`` from a palette or grey picture, as :func:`read_image`, of nearest pixels;
    or from a picture that is painted in the colours of the classes.

    Args:
        colours: the class of each colour, RGB in 0..255. A grey picture of these alone (0 and 255 for black and white)
            is taken for painted where its values are not all classes.

    Raises:
        UserError: if it cannot be read, was compressed with losses, is neither palette nor grey nor painted in the
            colours, or has another size and is not to be resized.
    """
    require_lossless(path)
    picture = open_picture(path)
    if not (colours and is_painted(picture, colours)):
        require_lossless(path, greys=True)
        indices = fitted(path, to_indices(picture, path), sides(size), resize=resize, nearest=True)
        return torch.from_numpy(np.asarray(indices).astype(np.int64))
    page, clear = to_paint(picture, path)
    require_opaque(clear, path, "save it without transparency, each pixel in the colour of its class")
    scaled = fitted(path, page, sides(size), resize=resize, nearest=True)
    classes = classes_of_colours(np.asarray(scaled), colours)
    if (classes < 0).any():
        raise UserError(
            f"{path}: {unknown_colours(page, colours, 'of no class')}; expected class indices, one a pixel, or the "
            f"colours of the classes without soft edges: {', '.join(map(hex_of, colours))}"
        )
    return torch.from_numpy(classes.astype(np.int64))


def unknown_colours(page: Image.Image, colours: Mapping[Colour, int], which: str) -> str:
    """What to say of a mask's file, in RGB and as large as it is, some of whose pixels have none of these colours."""
    pixels = np.asarray(page)
    unknown = classes_of_colours(pixels, colours) < 0
    row, column = np.argwhere(unknown)[0]
    found = hex_of(pixels[row, column].tolist())
    return f"{unknown.mean():.1%} of its pixels have a colour {which}, such as {found} in row {row}, column {column}"


def used_colours(picture: Image.Image) -> dict[int, Colour]:
    """The colour of each index that a palette picture uses, by its palette; {} of other pictures, and where the palette
    tells nothing: it lacks an index, has one colour for several, or is Pillow's own, index i being the grey (i, i, i).
    """
    if picture.mode != "P":
        return {}
    used = np.unique(np.asarray(picture)).tolist()
    flat = picture.getpalette("RGB") or []
    palette = [(flat[place], flat[place + 1], flat[place + 2]) for place in range(0, len(flat) - 2, 3)]
    colours = {index: palette[index] for index in used if index < len(palette)}
    plain = all(colour == (index,) * 3 for index, colour in colours.items())
    return {} if plain or len(set(colours.values())) < len(used) else colours


def is_painted(picture: Image.Image, colours: Mapping[Colour, int]) -> bool:
    """Whether a mask's pixels are colours of classes instead of their indices."""
    if picture.mode in ("RGB", "RGBA", "LA", "PA", "CMYK"):
        red, green, blue = picture.convert("RGB").split()
        if not red.tobytes() == green.tobytes() == blue.tobytes():
            return True
        picture = red
    if picture.mode != "L":
        return False
    values = set(np.unique(np.asarray(picture)).tolist())
    return not values <= set(colours.values()) and all((value,) * 3 in colours for value in values)


def classes_of_colours(pixels: np.ndarray, colours: Mapping[Colour, int]) -> np.ndarray:
    """int32 ``[h, w]``: the class of each colour of ``[h, w, 3]``, -1 where it is of none."""
    codes = _codes(pixels)
    classes = np.full(codes.shape, -1, np.int32)
    for colour, index in colours.items():
        classes[codes == _codes(np.array(colour))] = index
    return classes


def _codes(pixels: np.ndarray) -> np.ndarray:
    """One integer for each colour ``[..., 3]``."""
    return pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32)


def hex_of(colour: Sequence[int]) -> str:
    """A colour as a configuration has it, ``"#ff0000"``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def write_image(image: Tensor, path: Path) -> Path:
    """Write ``[channels, h, w]`` in [−1, 1] as a picture of 8 bits."""
    values = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).save(path)
    return path


def _written_palette(colours: Sequence[Colour]) -> list[int]:
    """Of masks that :func:`write_mask` writes."""
    palette = [*colours, *map(colour_of_class, range(len(colours), 256))]
    return [value for colour in palette[:256] for value in colour]


def is_written_mask(picture: Image.Image, colours: Sequence[Colour]) -> bool:
    """Whether a mask's file comes from :func:`write_mask`: its palette of 256 colours, most of which nothing uses, is
    like no other."""
    return picture.mode == "P" and picture.getpalette("RGB") == _written_palette(colours)


def write_mask(mask: Tensor, path: Path, colours: Sequence[Colour] = ()) -> Path:
    """Write class indices ``[h, w]`` as a picture that holds them exactly: below 256 of a palette, for people, else of
    16 bits. The first classes have ``colours``, RGB in 0..255, the others those of :func:`colour_of_class`."""
    if mask.numel() and int(mask.max()) > 255:
        Image.fromarray(mask.cpu().numpy().astype(np.uint16)).save(path)
        return path
    picture = Image.fromarray(mask.to(torch.uint8).cpu().numpy())
    picture.putpalette(_written_palette(colours))
    picture.save(path)
    return path


def read_text(path: Source) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark, as spreadsheets and editors save it.

    Raises:
        UserError: if it is missing, or in another encoding.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: not {encoding.removesuffix('-sig').upper()} (line {line}); save it as UTF-8"
        ) from None


def read_vector(path: Source, dim: int | None = None) -> Tensor:
    """float32 ``[dim]`` from a .safetensors (one tensor), .npy or .json (a list) file.

    Args:
        dim: its width; None: any.

    Raises:
        UserError: if it cannot be read, is no vector of finite numbers, or has another width.
    """
    suffix = PurePath(str(path)).suffix
    try:
        content = path.read_bytes()
        if suffix == ".npy" or content.startswith(b"\x93NUMPY"):  # a file in memory need not have a suffix
            array = np.load(BytesIO(content), allow_pickle=False)
            if array.dtype.kind not in "fiub":
                raise UserError(f"{path}: expected real numbers, found {array.dtype}")
            vector = torch.from_numpy(array.astype(np.float32))  # of any byte order
        elif suffix == ".json":
            vector = torch.tensor(json.loads(read_text(path)), dtype=torch.float32)
        else:
            from safetensors.torch import load

            tensors = load(content)
            if len(tensors) != 1:
                raise UserError(f"{path}: expected one tensor, found {len(tensors)}: {', '.join(tensors) or 'none'}")
            vector = next(iter(tensors.values()))
            if vector.is_complex():
                raise UserError(f"{path}: expected real numbers, found {vector.dtype}")
            vector = vector.float()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # each format has exceptions of its own for a damaged file
        raise UserError(f"{path}: cannot be read as {suffix or 'safetensors'} ({error})") from None
    if vector.ndim != 1 or (dim is not None and len(vector) != dim):
        wanted = "a vector" if dim is None else f"a vector of {dim} numbers"
        raise UserError(f"{path}: expected {wanted}, found shape {list(vector.shape)}")
    if not bool(vector.isfinite().all()):
        raise UserError(f"{path}: expected finite numbers, found NaN or infinity")
    return vector


def read_json_value(path: Path, key: str) -> str:
    """One value of a JSON object, as text.

    Raises:
        UserError: if the file cannot be read or has no such key.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict) or key not in content:
        raise UserError(f'{path}: expected a JSON object with the key "{key}"')
    return str(content[key])
