"""``shapes``: procedural scenes by day and by night, with exact masks, labels and captions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from attrs import field, frozen
from attrs.validators import ge

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins.datasets._tensors import TensorDataset, channels_first, generators
from mtdiffusion_registry.configs import DatasetConfig
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

Array = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

SUPERSAMPLING = 4
SHAPES = ("circle", "square", "triangle", "ring", "cross")
"""Label k is SHAPES[k]; mask class k + 1 is SHAPES[k], and mask class 0 the background."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.55, 0.12),
    "yellow": (0.96, 0.86, 0.20),
    "green": (0.20, 0.66, 0.26),
    "blue": (0.16, 0.34, 0.86),
    "purple": (0.56, 0.22, 0.72),
    "pink": (0.97, 0.55, 0.72),
    "white": (0.96, 0.96, 0.94),
}
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "at the left",
    "in the centre",
    "at the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
"""Where a caption says that a shape is, row by row."""

# Geometry is in units of the picture's side, x to the right and y downwards, the picture being [0, 1]².
_LARGE = (0.24, 0.34)
_SMALL = (0.13, 0.19)
_VISIBLE = 0.4  # the least share of a shape that the shapes in front must leave to be seen

_NIGHT_TINT = np.array((0.16, 0.20, 0.38), np.float32)
_LAMP = np.array((1.0, 0.86, 0.58), np.float32)
_MOON = np.array((0.93, 0.93, 0.82), np.float32)


@frozen
class Shape:
    """One shape of a scene: what it is (an index into SHAPES), its colour's name, and its place in [0, 1]²."""

    kind: int
    colour: str
    x: float
    y: float
    radius: float
    angle: float


def inside(shape: Shape, x: Array, y: Array) -> Bools:
    """Whether the points (x, y) of [0, 1]² lie in the shape: the one definition of its geometry."""
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    dx, dy = (x - shape.x) / shape.radius, (y - shape.y) / shape.radius
    return _INSIDE[shape.kind](dx * cos + dy * sin, dy * cos - dx * sin)


def _circle(u: Array, v: Array) -> Bools:
    return u * u + v * v <= 1


def _square(u: Array, v: Array) -> Bools:
    return np.maximum(np.abs(u), np.abs(v)) <= 0.85


def _triangle(u: Array, v: Array) -> Bools:
    # Equilateral, point upwards: three half planes at distance 0.55 from a centre moved down to balance the picture.
    v = v - 0.15
    return np.maximum(v, np.abs(u) * (math.sqrt(3) / 2) - v / 2) <= 0.55


def _ring(u: Array, v: Array) -> Bools:
    squared = u * u + v * v
    return (squared <= 1) & (squared >= 0.5**2)


def _cross(u: Array, v: Array) -> Bools:
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return (long <= 0.95) & (short <= 0.33)


_INSIDE: tuple[Callable[[Array, Array], Bools], ...] = (_circle, _square, _triangle, _ring, _cross)


def grid(size: int) -> tuple[Array, Array]:
    """x ``[1, size]`` and y ``[size, 1]`` of the pixels' centres in [0, 1]²."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return centres[None, :], centres[:, None]


def topmost(shapes: list[Shape], size: int) -> npt.NDArray[np.int64]:
    """The shape seen at each pixel's centre, ``[size, size]``: 0 for none, i + 1 for shapes[i]; last is in front."""
    x, y = grid(size)
    seen = np.zeros((size, size), np.int64)
    for index, shape in enumerate(shapes):
        seen[inside(shape, x, y)] = index + 1
    return seen


def scene(rng: np.random.Generator) -> list[Shape]:
    """One large shape and up to two small ones in front of it, of different colours, each of which can be seen.

    Most pixels that show a shape show the large one's kind. Does not depend on the picture's size.
    """
    while True:
        count = int(rng.integers(1, 4))
        colours = rng.permutation(list(COLOURS))[:count]
        shapes = [
            Shape(
                kind=int(rng.integers(len(SHAPES))),
                colour=str(colour),
                x=float(rng.uniform(0.2, 0.8)),
                y=float(rng.uniform(0.2, 0.8)),
                radius=float(rng.uniform(*(_SMALL if index else _LARGE))),
                angle=float(rng.uniform(-0.35, 0.35)),
            )
            for index, colour in enumerate(colours)
        ]
        if _all_seen(shapes):
            return shapes


def _all_seen(shapes: list[Shape]) -> bool:
    size = 32
    x, y = grid(size)
    seen = topmost(shapes, size)
    areas = np.bincount(seen.ravel(), minlength=len(shapes) + 1)[1:]
    whole = [int(inside(shape, x, y).sum()) for shape in shapes]
    kinds = np.bincount([shape.kind for shape in shapes], weights=areas, minlength=len(SHAPES))
    main = shapes[0].kind
    # The margin keeps the majority at any picture size, not only at the one measured here.
    return bool((areas >= _VISIBLE * np.array(whole)).all() and kinds[main] > 1.15 * np.delete(kinds, main).max())


def caption(shapes: list[Shape]) -> str:
    """Every shape's size, colour, kind and place: "a large red circle at the top left and a small ..."."""
    parts = [
        f"a {'small' if index else 'large'} {shape.colour} {SHAPES[shape.kind]} {_place(shape)}"
        for index, shape in enumerate(shapes)
    ]
    return " and ".join(parts) if len(parts) < 3 else f"{parts[0]}, {parts[1]} and {parts[2]}"


def _place(shape: Shape) -> str:
    row, column = np.digitize((shape.y, shape.x), (0.4, 0.6))
    return PLACES[3 * row + column]


def _background(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """A muted gradient between two colours, plain, striped or checked: ``[s, s, 3]``."""
    first, second = rng.uniform(0.35, 0.8, (2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = 0.5 + (x - 0.5) * math.cos(angle) * 0.7 + (y - 0.5) * math.sin(angle) * 0.7
    pattern = int(rng.integers(3))
    frequency, phase = rng.uniform(3, 6), rng.uniform(0, 2 * math.pi)
    turned = x * math.sin(angle) - y * math.cos(angle)
    if pattern == 1:
        ramp = ramp + 0.25 * np.sin(2 * math.pi * frequency * turned + phase)
    elif pattern == 2:
        ramp = ramp + 0.35 * np.sin(2 * math.pi * frequency * x + phase) * np.sin(2 * math.pi * frequency * y + phase)
    ramp = np.clip(ramp, 0, 1)[..., None]
    colours: Array = first * (1 - ramp) + second * ramp
    return colours


def draw(shapes: list[Shape], rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """The scene by day and by night, each ``[size, size, 3]`` in [0, 1].

    By night everything is dim and blue; the moon and stars are out, and some of the shapes are lit. Which ones cannot
    be told from the day, so one day has many nights.
    """
    x, y = grid(size)
    fine = topmost(shapes, size * SUPERSAMPLING)
    blocks = fine.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    layers = np.arange(len(shapes) + 1)
    cover = (blocks[..., None] == layers).mean(axis=(1, 3), dtype=np.float32)

    sky = _background(rng, x, y)
    day = cover[..., :1] * sky
    lamps = np.zeros_like(day)
    for index, shape in enumerate(shapes):
        shade = rng.uniform(0.9, 1.05) * (1.08 - 0.16 * y[..., None])
        paint = np.clip(np.array(COLOURS[shape.colour], np.float32) * shade + rng.normal(0, 0.02, 3), 0, 1)
        area = cover[..., index + 1, None]
        day += area * paint
        if rng.random() < 0.5:
            lamps += area * (0.2 * _LAMP + 0.8 * paint)

    night = day * _NIGHT_TINT
    night += cover[..., :1] * _stars(rng, x, y)
    glow = _blur(lamps, sigma=0.09 * size)
    night = 1 - (1 - np.clip(night, 0, 1)) * (1 - 0.4 * np.clip(glow, 0, 1)) * (1 - 0.9 * np.clip(lamps, 0, 1))
    return np.clip(day, 0, 1).astype(np.float32), np.clip(night, 0, 1).astype(np.float32)


def _stars(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """The moon and stars of a night sky: ``[s, s, 3]`` of added light."""
    moon_x, moon_y, radius = rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.3), rng.uniform(0.05, 0.08)
    distance = np.hypot(x - moon_x, y - moon_y)
    edge = 0.5 / x.shape[1]
    disc = np.clip((radius - distance) / (2 * edge) + 0.5, 0, 1)
    halo = 0.25 * np.exp(-((distance / (2.5 * radius)) ** 2))
    light: Array = (disc + halo)[..., None] * _MOON
    for star_x, star_y, power in rng.uniform((0, 0, 0.2), (1, 0.6, 0.7), (int(rng.integers(4, 10)), 3)):
        light = light + (power * np.exp(-(((x - star_x) ** 2 + (y - star_y) ** 2) / 0.012**2)))[..., None]
    return light


def _blur(picture: Array, sigma: float) -> Array:
    """A Gaussian blur of ``[s, s, 3]``, as two matrix products."""
    place = np.arange(picture.shape[0])
    kernel = np.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)
    blurred: Array = np.einsum("ij,jkc,lk->ilc", kernel, picture, kernel, optimize=True)
    return blurred


@frozen(kw_only=True)
class ShapesConfig(DatasetConfig):
    """Scenes of one to three overlapping shapes before a gradient, a striped or a checked background.

    Fields: ``image`` and ``night`` float32 ``[3, size, size]`` in [−1, 1], of 256 levels: the scene by day and by
    night; ``mask`` int64 ``[size, size]``, 0 for background and 1..5 for circle, square, triangle, ring, cross: what is
    seen at the pixel's centre; ``label`` int64 in 0..4: the kind of the large shape, which is also the kind that most
    of the mask's pixels show, background aside; ``caption``, which names every shape, its colour and its place.

    Attributes:
        size: side in pixels.
        count: number of training scenes.
        test_count: number of test scenes, drawn from other seeds.
        seed: scene i of a split follows from (seed, split, i) alone, so more scenes leave the first ones as they are.
    """

    kind: ClassVar[str] = "shapes"
    reproducible: ClassVar[bool] = True

    size: int = field(default=32, validator=ge(16))
    count: int = field(default=4000, validator=ge(1))
    test_count: int = field(default=500, validator=ge(1))
    seed: int = field(default=0, validator=ge(0))

    def build(self, split: Literal["train", "test"]) -> Dataset:
        count = self.count if split == "train" else self.test_count
        day = np.empty((count, self.size, self.size, 3), np.uint8)
        night = np.empty_like(day)
        mask = np.empty((count, self.size, self.size), np.uint8)
        label = np.empty(count, np.int64)
        captions = []
        for index, rng in enumerate(generators(self.seed, split, count)):
            shapes = scene(rng)
            light, dark = draw(shapes, rng, self.size)
            day[index], night[index] = np.rint(light * 255), np.rint(dark * 255)
            classes = np.array([0, *(shape.kind + 1 for shape in shapes)])
            mask[index] = classes[topmost(shapes, self.size)]
            label[index] = shapes[0].kind
            captions.append(caption(shapes))
        return TensorDataset(
            {
                "image": channels_first(day),
                "night": channels_first(night),
                "mask": torch.from_numpy(mask),
                "label": torch.from_numpy(label),
                "caption": captions,
            },
            levels=("image", "night"),
        )


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [ShapesConfig]
