"""From what a person enters on a page to a modality's value: drawings, paintings, holes, texts, files and sounds.

Nothing here knows the page. Whatever is entered becomes a file or a text that :meth:`mtdiffusion.Modality.parse` reads,
as on the command line.
"""

from __future__ import annotations

import math
import tempfile
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import InputSpec, Modality
from mtdiffusion_engine.sounds import SUFFIXES
from mtdiffusion_registry import UserError
from mtdiffusion_registry.pictures import fit, open_picture, to_colour

Colour = tuple[int, int, int]

HOLE: Colour = (255, 0, 255)
"""What is painted in this colour is a hole: it is not given."""
SOUNDS, TEXTS, PICTURES = SUFFIXES, (".txt",), (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes of what :meth:`mtdiffusion.Modality.write` writes, by how a page shows it."""

_CANVAS = 320  # pixels that the longer side of a canvas has, about
_NEAR = 60  # of 255: strokes have soft edges, whose colours lie near to the brush's


@frozen(eq=False)
class Canvas:
    """Where a picture is drawn: its size, and that of a canvas that is a whole number of times as large."""

    height: int
    width: int
    scale: int

    @classmethod
    def of(cls, modality: Modality) -> Canvas:
        """The canvas of a modality whose input is a picture or classes."""
        height, width = picture_size(modality)
        return cls(height, width, max(round(_CANVAS / max(height, width)), 1))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return (self.width * self.scale, self.height * self.scale)

    def enlarged(self, picture: Image.Image) -> Image.Image:
        """A picture of the data's size on the canvas."""
        return picture.resize(self.size, Image.Resampling.NEAREST)


@frozen(eq=False)
class Painting:
    """What stands on a canvas.

    Attributes:
        colours: uint8 ``[H, W, 3]``, what is below holes as it was before.
        hole: bool ``[H, W]``.
    """

    colours: np.ndarray
    hole: np.ndarray

    @classmethod
    def of(cls, background: Image.Image | None, layers: Sequence[Image.Image], size: tuple[int, int]) -> Painting:
        """From a background and strokes above it (RGBA), of whichever sizes, drawn at ``size`` (width and height)."""
        page = Image.new("RGB", size) if background is None else background.convert("RGB").resize(size)
        hole = np.zeros(size[::-1], bool)
        for layer in layers:
            pixels = np.array(layer.convert("RGBA").resize(size))
            pink = (np.abs(pixels[..., :3].astype(int) - HOLE) < _NEAR).all(2)
            hole |= pink & (pixels[..., 3] >= 128)
            pixels[pink, 3] = 0
            strokes = Image.fromarray(pixels)
            page.paste(strokes, (0, 0), strokes)
        return cls(np.asarray(page), hole)


def picture_size(modality: Modality) -> tuple[int, int]:
    """Height and width of a modality's pictures."""
    with torch.no_grad():
        height, width = modality.render(modality.placeholder(1)).shape[-2:]
    return height, width


def written_suffix(modality: Modality) -> str:
    """The suffix of the files that a modality writes, in lower case."""
    with tempfile.TemporaryDirectory() as folder:
        return modality.write(modality.placeholder(1)[0], Path(folder), "example").suffix.lower()


def written_text(modality: Modality, x: Tensor) -> str:
    """The text in the file that a modality writes of one x (no batch axis), without space around it."""
    with tempfile.TemporaryDirectory() as folder:
        return modality.write(x, Path(folder), "text").read_text(encoding="utf-8").strip()


def opened(modality: Modality, path: Path, canvas: Canvas) -> Image.Image:
    """A file as the background of a canvas, which is cropped and scaled as ``parse`` has it.

    Raises:
        UserError: if it cannot be read.
    """
    if modality.input_spec.form == "picture":
        with _said_of(path):
            return canvas.enlarged(fit(to_colour(open_picture(path), path), (canvas.height, canvas.width)))
    x = read_file(modality, path)[None]
    with torch.no_grad():
        pixels = (modality.render(x)[0] * 255).round().to(torch.uint8)
    return canvas.enlarged(Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())))


def read_painting(modality: Modality, painting: Painting, canvas: Canvas, folder: Path) -> Tensor:
    """x (no batch axis) of a canvas.

    Raises:
        UserError: if the modality refuses it.
    """
    spec = modality.input_spec
    if spec.form == "picture":
        path = folder / "drawing.png"
        shrunk = Image.fromarray(painting.colours).resize((canvas.width, canvas.height), Image.Resampling.BOX)
        shrunk.save(path)
    else:  # a picture of class indices would be read as the data's masks are, whose values may be others
        path = modality.write(torch.from_numpy(painted_classes(painting, spec, canvas)), folder, "drawing")
    return read_file(modality, path)


def painted_classes(painting: Painting, spec: InputSpec, canvas: Canvas) -> np.ndarray:
    """The class of each place ``[height, width]``: that which most of its pixels are nearest to in colour."""
    colours = torch.tensor(np.asarray(painting.colours), dtype=torch.float32)
    nearest = torch.cdist(colours.flatten(0, 1), torch.tensor(spec.colours, dtype=torch.float32)).argmin(1)
    votes = F.one_hot(nearest, len(spec.colours)).float().reshape(*colours.shape[:2], -1).permute(2, 0, 1)
    shares: Tensor = F.adaptive_avg_pool2d(votes, (canvas.height, canvas.width))
    return shares.argmax(0).numpy()


def visible_places(modality: Modality, painting: Painting) -> Tensor | None:
    """A map ``[h, w]`` of the data, 0 where most of a place is a hole and 1 elsewhere; None if there is no hole."""
    shape = modality.placeholder(1).shape[-2:]
    hole = torch.from_numpy(painting.hole).float()
    places: Tensor = F.adaptive_avg_pool2d(hole[None], (shape[0], shape[1]))[0]
    visible = (places < 0.5).float()
    return None if bool(visible.all()) else visible


def read_text(modality: Modality, text: str, folder: Path) -> Tensor:
    """x (no batch axis) of a typed text, as if it stood in a file that the modality wrote.

    Raises:
        UserError: if the modality refuses it.
    """
    path = folder / f"text{written_suffix(modality)}"
    path.write_text(text, encoding="utf-8")
    try:
        return modality.parse(str(path))
    except (UserError, ValueError) as error:
        raise UserError(str(error).replace(f"{path}: ", "").replace(str(path), "the text")) from None


def read_line(modality: Modality, line: str) -> Tensor:
    """x (no batch axis) of a value as it is given on the command line. Files are uploaded: who sees the page need not
    see those of this machine.

    Raises:
        UserError: if the modality refuses it, or it is the path of a file.
    """
    line = line.strip()
    try:
        there = Path(line).exists()
    except (OSError, ValueError):  # too long for a path, or no path at all
        there = False
    if there:
        raise UserError(f"{line!r} is the path of a file; upload the file instead")
    try:
        return modality.parse(line)
    except (UserError, ValueError, OSError) as error:
        raise UserError(str(error)) from None


def read_file(modality: Modality, path: Path) -> Tensor:
    """x (no batch axis) of a file.

    Raises:
        UserError: if the modality refuses it; the file is called by its name alone.
    """
    with _said_of(path):
        return modality.parse(str(path))


def read_sound(modality: Modality, path: Path, folder: Path) -> tuple[Tensor, str]:
    """x (no batch axis) of a sound, and what was done to it, if anything.

    A sound that the modality refuses as it is, is brought into the form of those that it writes: of one channel,
    resampled, and cut to the loudest part or followed by silence.

    Raises:
        UserError: if it is no .wav file, or the modality refuses it then, too.
    """
    from scipy.io import wavfile

    try:
        return read_file(modality, path), ""
    except UserError as error:
        refusal = error
    example = modality.write(modality.placeholder(1)[0], folder, "form")
    try:
        with wave.open(str(example), "rb") as file:
            rate, count = file.getframerate(), file.getnframes()
        found_rate, samples = wavfile.read(path)
    except (OSError, EOFError, ValueError, wave.Error):
        raise refusal from None
    sound = loudest_part(resampled(to_mono(samples), found_rate, rate), count)
    fitted = folder / "sound.wav"
    with wave.open(str(fitted), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    told = f"of {len(samples) / found_rate:.2f} s, the loudest {count / rate:.2f} s are taken, at {rate} Hz"
    return read_file(modality, fitted), told


def to_mono(samples: np.ndarray) -> np.ndarray:
    """float64 ``[n]`` in [−1, 1] of PCM or float samples, ``[n]`` or ``[n, channels]``."""
    values = samples.astype(np.float64)
    if samples.dtype == np.uint8:
        values = (values - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        values /= -float(np.iinfo(samples.dtype).min)
    return values if values.ndim == 1 else values.mean(1)


def resampled(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A sound at another number of samples a second, what it could not hold filtered out."""
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return sound if rate == wanted else resample_poly(sound, wanted // common, rate // common)


def loudest_part(sound: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` samples in a row that have most energy; what is shorter is followed by silence."""
    if len(sound) <= count:
        return np.pad(sound, (0, count - len(sound)))
    energy = np.concatenate([[0.0], np.cumsum(sound**2)])
    start = int(np.argmax(energy[count:] - energy[:-count]))
    return sound[start : start + count]


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Turns what a reader raises into a UserError that calls the file by its name, not by where it was put."""
    try:
        yield
    except (UserError, ValueError, OSError) as error:
        raise UserError(str(error).replace(str(path), path.name)) from None
