"""Sizes of pictures in configurations: the side of a square, or height and width."""

from __future__ import annotations

from typing import Any

from attrs import Attribute

from mtdiffusion_registry.pictures import MOST_PIXELS

Size = int | tuple[int, int]


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def positive_size(_: object, attribute: Attribute[Any], value: Size | None) -> None:
    """Attrs validator: a side, or a height and a width, of at least 1 and together no more pixels than a picture may
    have; or None."""
    if value is not None and min(sides(value)) < 1:
        raise ValueError(f"'{attribute.name}': expected a side, or height and width, of at least 1, found {value}")
    if value is not None and sides(value)[0] * sides(value)[1] > MOST_PIXELS:
        raise ValueError(f"'{attribute.name}': expected at most {MOST_PIXELS:,} pixels, found {by(sides(value))}")


def by(size: tuple[int, int]) -> str:
    """``height × width`` in words."""
    return f"{size[0]} × {size[1]}"
