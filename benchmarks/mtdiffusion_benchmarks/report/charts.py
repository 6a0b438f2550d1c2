"""Geometry of the report's pictures: learning curves and intervals as numbers that a template draws."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from attrs import frozen

from mtdiffusion_benchmarks.report.tables import Group
from mtdiffusion_benchmarks.report.text import number

WIDTH, HEIGHT = 220.0, 120.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 6.0, 8.0, 18.0
_POINTS = 60  # of a line; more cannot be seen at this size
_LOG_RANGE = 20.0  # a greatest value this many times the smallest is drawn on a logarithmic scale

Point = tuple[float, float]


@frozen
class Line:
    """One seed.

    Attributes:
        segments: SVG paths, broken where a value is not finite.
        end: where it ends, if training ended there; None if it went on to the last step.
    """

    seed: int
    segments: tuple[str, ...]
    end: Point | None


@frozen
class Panel:
    """One method's curves of one term of the loss."""

    title: str
    term: str
    log: bool
    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]
    last_step: int
    description: str


def panel(group: Group, term: str) -> Panel | None:
    """All seeds' curves of a term. The vertical range is that of the finished seeds: a diverged one leaves it.

    Returns:
        None if there is no finite value.
    """
    series = {
        cell.seed: [(point["step"], point.get(term, math.nan)) for point in cell.curve if "step" in point]
        for cell in group.cells
    }
    finished = {cell.seed for cell in group.ok}

    def values(seeds: set[int]) -> list[float]:
        return [y for seed, points in series.items() if seed in seeds for _, y in points if math.isfinite(y)]

    found = values(finished) or values(set(series))
    if not found:
        return None
    low, high = min(found), max(found)
    log = low > 0 and high > _LOG_RANGE * low
    last = max(step for points in series.values() for step, _ in points)

    def place(step: float, y: float) -> Point:
        bottom, top = (math.log(low), math.log(high)) if log else (low, high)
        height = math.log(max(y, low / 1e3)) if log else y
        share = (height - bottom) / (top - bottom) if top > bottom else 0.5
        across = step / last if last else 0.0
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            # Far outside, the clip path hides it; numbers stay small enough for every renderer.
            round(HEIGHT - _BOTTOM - min(max(share, -2.0), 3.0) * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    lines = []
    for seed, points in series.items():
        thin = _thinned(points)
        runs = [list(run) for finite, run in itertools.groupby(thin, lambda p: math.isfinite(p[1])) if finite]
        segments = tuple("M" + "L".join(f"{x:g} {y:g}" for x, y in (place(*p) for p in run)) for run in runs)
        end = None
        if seed not in finished and runs:
            x, y = place(*runs[-1][-1])
            end = (x, min(max(y, _TOP), HEIGHT - _BOTTOM))
        lines.append(Line(seed, segments, end))
    middle = math.sqrt(low * high) if log else (low + high) / 2
    ticks = tuple((place(0, y)[1], _short(y)) for y in ((low, middle, high) if high > low else (low,)))
    ends = [points[-1][1] for seed, points in series.items() if seed in finished and points]
    told = f"ends at {number(statistics.fmean(ends))}" if ends else group.state
    what = f"{term} of {group.title} over {last:g} steps, {group.state}: {told}"
    return Panel(group.title, term, log, tuple(lines), ticks, int(last), what)


def terms(groups: Sequence[Group]) -> list[str]:
    """All terms that the groups' curves have, the whole loss first."""
    found = {name for group in groups for cell in group.cells for point in cell.curve for name in point} - {
        "step",
        "seconds",
    }
    return sorted(found, key=lambda name: (name != "loss", name))


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Means of neighbours, at most ``_POINTS`` of them; a value that is not finite stays so."""
    size = math.ceil(len(points) / _POINTS) or 1
    parts = (points[start : start + size] for start in range(0, len(points), size))
    return [(statistics.fmean(step for step, _ in part), math.fsum(y for _, y in part) / len(part)) for part in parts]


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "\u2212")


@frozen
class Whisker:
    """An effect and its interval on a line from −1 to 1, 0 to 100 across; ends beyond it are cut and said to be."""

    low: float
    middle: float
    high: float
    cut_low: bool
    cut_high: bool


def whisker(low: float | None, effect: float, high: float | None) -> Whisker:
    """The positions of an effect and its interval, which are shares: 1 is 100 %."""

    def place(value: float) -> float:
        return round(50 + 50 * min(max(value, -1.0), 1.0), 1)

    a, b = (effect if low is None else low), (effect if high is None else high)
    return Whisker(place(a), place(effect), place(b), a < -1, b > 1)
