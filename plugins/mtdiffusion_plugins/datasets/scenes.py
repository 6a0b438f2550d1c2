"""``scenes``: landscapes with one thing in each, by day, at dusk and by night, with masks, labels and captions."""

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
Colour = tuple[float, float, float]

SUPERSAMPLING = 3  # odd, so that a pixel's centre is the centre of one of its parts

THINGS = ("house", "tree", "car", "boat", "balloon", "lighthouse")
"""Label k is THINGS[k]."""

CLASSES = ("sky", "hills", "land", "water", "sun or moon", *THINGS)
"""What a mask's classes are."""

GROUNDS = {
    "grass": (0.42, 0.66, 0.26),
    "sand": (0.90, 0.78, 0.50),
    "snow": (0.93, 0.95, 0.98),
    "water": (0.16, 0.45, 0.66),
}
STANDS_ON = {
    "house": ("grass", "sand", "snow"),
    "tree": ("grass", "sand", "snow"),
    "car": ("grass", "sand", "snow"),
    "boat": ("water",),
    "balloon": ("grass", "sand", "snow", "water"),
    "lighthouse": ("sand", "snow", "water"),
}

COLOURS: dict[str, Colour] = {
    "red": (0.84, 0.15, 0.15),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.97, 0.84, 0.18),
    "green": (0.13, 0.50, 0.22),
    "blue": (0.15, 0.30, 0.80),
    "purple": (0.52, 0.20, 0.66),
    "pink": (0.97, 0.50, 0.68),
}
SIZES = {"small": (0.17, 0.21), "large": (0.27, 0.32)}
PLACES = {"at the left": (0.22, 0.36), "in the middle": (0.44, 0.56), "at the right": (0.64, 0.78)}
TIMES = ("by day", "at dusk", "by night")

# The sky's colour above and at the horizon, what daylight leaves of all colours, and the colour of sun or moon.
_SKY: tuple[tuple[Colour, Colour], ...] = (
    ((0.33, 0.62, 0.93), (0.80, 0.91, 0.98)),
    ((0.36, 0.27, 0.52), (0.99, 0.62, 0.36)),
    ((0.03, 0.04, 0.14), (0.12, 0.16, 0.36)),
)
_LIGHT: tuple[Colour, ...] = ((1.0, 1.0, 1.0), (0.90, 0.68, 0.62), (0.26, 0.31, 0.50))
_SUN: tuple[Colour, ...] = ((1.0, 0.95, 0.62), (1.0, 0.72, 0.30), (0.95, 0.95, 0.86))
_LAMP = (1.0, 0.84, 0.45)


@frozen
class Scene:
    """One scene, in units of the picture's side, x to the right and y downwards, the picture being [0, 1]².

    Attributes:
        thing, colour, size, place, ground: what the caption says; keys of the tables above.
        time: an index into TIMES.
        x, radius: the thing's middle, and half of what it fills.
        foot: where it stands; of a balloon, the end of its basket.
        horizon: where the ground begins.
        hills: height, waves and phase of the hills behind.
        sun: x and y of the sun's or moon's centre, and its radius.
    """

    thing: str
    colour: str
    size: str
    place: str
    ground: str
    time: int
    x: float
    radius: float
    foot: float
    horizon: float
    hills: tuple[float, float, float]
    sun: tuple[float, float, float]

    @property
    def caption(self) -> str:
        over = "over" if self.thing == "balloon" else "on"
        return f"a {self.size} {self.colour} {self.thing} {self.place} {over} {self.ground} {TIMES[self.time]}"


def scene(rng: np.random.Generator) -> Scene:
    """A scene at random. Does not depend on the picture's size."""

    def one_of(names: tuple[str, ...]) -> str:
        return names[int(rng.integers(len(names)))]

    thing = one_of(THINGS)
    size, place, ground = one_of(tuple(SIZES)), one_of(tuple(PLACES)), one_of(STANDS_ON[thing])
    horizon = float(rng.uniform(0.58, 0.70))
    radius = float(rng.uniform(*SIZES[size]))
    on_ground = horizon + (1 - horizon) * float(rng.uniform(0.25, 0.6))
    x = float(rng.uniform(*PLACES[place]))
    sun_x = (x + float(rng.uniform(0.3, 0.6))) % 1.0  # beside the thing, never behind its middle
    return Scene(
        thing=thing,
        colour=one_of(tuple(COLOURS)),
        size=size,
        place=place,
        ground=ground,
        time=int(rng.integers(len(TIMES))),
        x=x,
        radius=radius,
        foot=float(rng.uniform(2.05, 2.6)) * radius if thing == "balloon" else on_ground,
        horizon=horizon,
        hills=(float(rng.uniform(0.03, 0.16)), float(rng.uniform(0.6, 1.6)), float(rng.uniform(0, 1))),
        sun=(min(max(sun_x, 0.1), 0.9), float(rng.uniform(0.12, 0.3)), float(rng.uniform(0.07, 0.09))),
    )


def _box(u: Array, v: Array, left: float, right: float, top: float, bottom: float) -> Bools:
    return (u >= left) & (u <= right) & (v >= top) & (v <= bottom)


def _disc(u: Array, v: Array, x: float, y: float, radius: float) -> Bools:
    return (u - x) ** 2 + (v - y) ** 2 <= radius**2


# A thing's parts from back to front: where they are, and "paint" for the thing's own colour, "lamp" for what shines by
# night, or a colour. The thing fills u in [-1, 1] and v in [-2, 0]; it stands at v = 0.
Parts = list[tuple[Bools, Colour | Literal["paint", "lamp"]]]
_WOOD, _DARK, _CREAM, _GLASS = (0.42, 0.27, 0.16), (0.14, 0.14, 0.17), (0.96, 0.93, 0.86), (0.70, 0.84, 0.92)


def _house(u: Array, v: Array) -> Parts:
    roof = (v >= -1.9) & (v <= -1.0) & (np.abs(u) <= 1.15 * (v + 1.9))
    return [
        (_box(u, v, -0.82, 0.82, -1.05, 0.0), _CREAM),
        (roof, "paint"),
        (_box(u, v, -0.2, 0.2, -0.62, 0.0), _WOOD),
        (_box(u, v, -0.66, -0.32, -0.78, -0.4) | _box(u, v, 0.32, 0.66, -0.78, -0.4), "lamp"),
    ]


def _tree(u: Array, v: Array) -> Parts:
    crown = _disc(u, v, 0, -1.42, 0.58) | _disc(u, v, -0.42, -1.05, 0.45) | _disc(u, v, 0.42, -1.05, 0.45)
    return [(_box(u, v, -0.14, 0.14, -0.9, 0.0), _WOOD), (crown, "paint")]


def _car(u: Array, v: Array) -> Parts:
    cabin = (v >= -1.0) & (v <= -0.5) & (np.abs(u + 0.05) <= 0.62 + 0.35 * (v + 0.5))
    glass = (v >= -0.9) & (v <= -0.58) & (np.abs(u + 0.05) <= 0.5 + 0.35 * (v + 0.5)) & (np.abs(u + 0.05) >= 0.06)
    return [
        (cabin, "paint"),
        (glass, _GLASS),
        (_box(u, v, -1.0, 1.0, -0.6, -0.18), "paint"),
        (_box(u, v, 0.84, 1.0, -0.5, -0.34), "lamp"),
        (_disc(u, v, -0.55, -0.2, 0.22) | _disc(u, v, 0.55, -0.2, 0.22), _DARK),
    ]


def _boat(u: Array, v: Array) -> Parts:
    hull = (v >= -0.45) & (v <= 0) & (np.abs(u) <= 0.95 + 0.6 * v)
    sail = (u >= 0.02) & (v <= -0.55) & (v >= -2.0) & (u <= 0.02 + 0.55 * (v + 2.0))
    jib = (u <= -0.1) & (v <= -0.55) & (v >= -1.6) & (-u <= 0.1 + 0.55 * (v + 1.6))
    return [(_box(u, v, -0.06, 0.03, -2.0, -0.4), _WOOD), (sail | jib, _CREAM), (hull, "paint")]


def _balloon(u: Array, v: Array) -> Parts:
    # A ball that tapers to the basket, with a light stripe in the middle.
    envelope = _disc(u, v, 0, -1.3, 0.7) | ((v >= -0.95) & (v <= -0.4) & (np.abs(u) <= 0.6 - 0.75 * (v + 0.95)))
    return [
        (envelope, "paint"),
        (envelope & (np.abs(u) <= 0.22), _CREAM),
        (_box(u, v, -0.2, 0.2, -0.3, 0.0), _WOOD),
    ]


def _lighthouse(u: Array, v: Array) -> Parts:
    tower = (v >= -1.5) & (v <= 0) & (np.abs(u) <= 0.38 + 0.12 * v)
    return [
        (tower, _CREAM),
        (tower & ((np.floor((v + 1.5) / 0.375).astype(np.int64) % 2) == 0), "paint"),
        (_box(u, v, -0.2, 0.2, -1.8, -1.5), "lamp"),
        ((v >= -2.05) & (v <= -1.78) & (np.abs(u) <= 1.1 * (v + 2.05)), _DARK),
    ]


_PARTS: dict[str, Callable[[Array, Array], Parts]] = {
    "house": _house,
    "tree": _tree,
    "car": _car,
    "boat": _boat,
    "balloon": _balloon,
    "lighthouse": _lighthouse,
}


def draw(seen: Scene, size: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """The picture ``[size, size, 3]`` in [0, 1], and its mask ``[size, size]``: the class at each pixel's centre."""
    side = size * SUPERSAMPLING
    centres = ((np.arange(side) + 0.5) / side).astype(np.float32)
    x, y = centres[None, :], centres[:, None]
    light, sun_colour = np.array(_LIGHT[seen.time], np.float32), np.array(_SUN[seen.time], np.float32)
    night = seen.time == 2

    above, below = (np.array(colour, np.float32) for colour in _SKY[seen.time])
    ramp = np.minimum(y / seen.horizon, 1)[..., None]
    picture: Array = np.broadcast_to(above + (below - above) * ramp**1.4, (side, side, 3)).copy()
    classes = np.zeros((side, side), np.int64)

    def put(where: Bools, colour: Array, name: str) -> None:
        picture[where] = colour
        classes[where] = CLASSES.index(name)

    sun_x, sun_y, sun_radius = seen.sun
    distance = np.hypot(x - sun_x, y - sun_y)
    picture += 0.35 * np.exp(-((distance / (2.2 * sun_radius)) ** 2))[..., None] * (sun_colour - picture)
    put(distance <= sun_radius, sun_colour, "sun or moon")

    height, waves, phase = seen.hills
    ridge = seen.horizon - height * (0.55 + 0.45 * np.sin(2 * math.pi * (waves * x + phase)))
    hill = 0.55 * np.array((0.40, 0.52, 0.52), np.float32) * light + 0.45 * below
    put((y >= ridge) & (y < seen.horizon), hill, "hills")

    ground = np.array(GROUNDS[seen.ground], np.float32)
    depth = ((y - seen.horizon) / (1 - seen.horizon)).clip(0, 1)[..., None]
    land: Array = np.broadcast_to(ground * (1.06 - 0.22 * depth) * light, (side, side, 3))
    if seen.ground == "water":
        land = land * 0.8 + 0.2 * below  # which the sky is seen in
    on_ground = np.broadcast_to(y >= seen.horizon, (side, side))
    put(on_ground, land[on_ground], "water" if seen.ground == "water" else "land")

    paints: dict[str, Array] = {
        "paint": np.array(COLOURS[seen.colour], np.float32) * (0.3 + 0.7 * light if night else light),
        "lamp": np.array(_LAMP if seen.time else _GLASS, np.float32),
    }
    for where, colour in _PARTS[seen.thing]((x - seen.x) / seen.radius, (y - seen.foot) / seen.radius):
        put(where, paints[colour] if isinstance(colour, str) else np.array(colour, np.float32) * light, seen.thing)

    picture = picture.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean(axis=(1, 3))
    middle = SUPERSAMPLING // 2
    return picture.clip(0, 1), classes[middle::SUPERSAMPLING, middle::SUPERSAMPLING]


@frozen(kw_only=True)
class ScenesConfig(DatasetConfig):
    """Landscapes with one thing in each: a house, a tree, a car, a boat, a balloon or a lighthouse.

    Fields: ``image`` float32 ``[3, size, size]`` in [−1, 1], of 256 levels; ``mask`` int64 ``[size, size]``, which
    class of CLASSES is seen at the pixel's centre; ``label`` int64 in 0..5: the thing; ``caption``: its size, colour
    and place, the ground and the time of day, "a small red house at the left on snow by night".

    Attributes:
        size: side in pixels.
        count: number of training scenes.
        test_count: number of test scenes, drawn from other seeds.
        seed: scene i of a split follows from (seed, split, i) alone, so more scenes leave the first ones as they are.
    """

    kind: ClassVar[str] = "scenes"
    reproducible: ClassVar[bool] = True

    size: int = field(default=32, validator=ge(16))
    count: int = field(default=4000, validator=ge(1))
    test_count: int = field(default=500, validator=ge(1))
    seed: int = field(default=0, validator=ge(0))

    def build(self, split: Literal["train", "test"]) -> Dataset:
        count = self.count if split == "train" else self.test_count
        image = np.empty((count, self.size, self.size, 3), np.uint8)
        mask = np.empty((count, self.size, self.size), np.uint8)
        label = np.empty(count, np.int64)
        captions = []
        for index, rng in enumerate(generators(self.seed, split, count)):
            seen = scene(rng)
            picture, mask[index] = draw(seen, self.size)
            image[index] = np.rint(picture * 255)
            label[index] = THINGS.index(seen.thing)
            captions.append(seen.caption)
        return TensorDataset(
            {
                "image": channels_first(image),
                "mask": torch.from_numpy(mask),
                "label": torch.from_numpy(label),
                "caption": captions,
            },
            levels=("image",),
        )


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [ScenesConfig]
