"""Numbers as text, the same in every format of the report."""

from __future__ import annotations

import math

from mtdiffusion_benchmarks.report.statistics import Comparison, Summary

MINUS = "\u2212"
_SCALES = {"error": "of the error", "value": "of the value", "absolute": "absolute", "points": "points"}


def number(value: float, decimals: int | None = None) -> str:
    """Three decimals around 1, fewer above 100, more below 0.1, so that something is always left to read."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.{_decimals(value) if decimals is None else decimals}f}".replace("-", MINUS)


def _decimals(value: float) -> int:
    size = abs(float(value))
    if size >= 100:
        return 1 if size < 10_000 and not size.is_integer() else 0
    return 3 if size >= 0.1 or size == 0 else min(2 - math.floor(math.log10(size)), 8)


def mean_std(summary: Summary) -> str:
    """``0.971 ± 0.004``; the mean alone where there is one seed."""
    if summary.std is None or not math.isfinite(summary.mean):
        return number(summary.mean)
    if summary.std == 0:
        return f"{number(summary.mean)} ± 0"
    # Two digits of the deviation, and the mean to the same place.
    decimals = min(max(1 - math.floor(math.log10(summary.std)), 0), 6)
    return f"{number(summary.mean, decimals)} ± {number(summary.std, decimals)}"


def percent(share: float) -> str:
    """A signed percentage; what is beyond ±999 % says so."""
    if beyond(share):
        return ">+999%" if share > 0 else f"<{MINUS}999%"
    decimals = 0 if abs(share) >= 0.0995 else 1
    return f"{share:+.{decimals}%}".replace("-", MINUS)


def beyond(share: float) -> bool:
    """Whether a share is too large for its percentage to be told."""
    return abs(share) >= 9.995


def effect(comparison: Comparison) -> str:
    """In per cent of its scale, in points, or the plain difference."""
    if comparison.scale == "points":
        return points(comparison.effect)
    if comparison.scale == "absolute":
        return ("+" if comparison.difference >= 0 else "") + number(comparison.difference)
    return percent(comparison.effect)


def points(value: float) -> str:
    """A signed difference in percentage points."""
    return f"{value:+.{2 if abs(value) < 0.995 else 1}f} points".replace("-", MINUS)


def interval(comparison: Comparison) -> str:
    """``−3.1% to +8.0%``; "no interval"."""
    if comparison.low is None or comparison.high is None:
        return "no interval"
    if comparison.scale == "absolute":
        return f"{number(comparison.low)} to {number(comparison.high)}"
    if comparison.scale == "points":
        return f"{points(comparison.low).removesuffix(' points')} to {points(comparison.high)}"
    return f"{percent(comparison.low)} to {percent(comparison.high)}"


def scale(comparison: Comparison) -> str:
    """Of what the effect is a share, or why it is none."""
    return _SCALES[comparison.scale] + (": control nearly perfect" if comparison.perfect else "")


def count(value: float | None) -> str:
    """``1.23 M``, for parameters and operations."""
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def seconds(value: float | None) -> str:
    """``95.1 s``, ``12 ms``, ``5.2 min``, ``1.3 h``."""
    if value is None:
        return "–"
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if value >= 2 * size or (unit == "s" and value >= 1):
            return f"{value / size:.3g} {unit}"
    return f"{1000 * value:.3g} ms"
