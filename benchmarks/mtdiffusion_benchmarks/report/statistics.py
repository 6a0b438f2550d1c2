"""Means over seeds, and paired comparisons with their 95 % intervals. Pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Literal

from attrs import frozen
from scipy.special import stdtrit

Direction = Literal["higher", "lower"]
Scale = Literal["error", "value", "absolute"]
Verdict = Literal["helps", "hurts", "free", "undecided"]

LEVEL = 0.95
_RESOLUTION = 1e-12  # relative: what is smaller is rounding


@frozen
class Summary:
    """Of one metric over seeds.

    Attributes:
        mean: not finite if one of the values is not.
        std: the sample standard deviation (n − 1); None of a single value.
        count: how many seeds.
    """

    mean: float
    std: float | None
    count: int


def summarise(values: Iterable[float]) -> Summary:
    """Mean and standard deviation of at least one value."""
    found = list(values)
    if not all(math.isfinite(value) for value in found):
        return Summary(math.nan, None, len(found))
    return Summary(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


@frozen
class Comparison:
    """One model against another on one metric; positive is better, whichever way the metric goes.

    Attributes:
        scale: what :attr:`effect` is a share of: the other's "error" (1 − its mean), the other's "value" (its mean), or
            of nothing, being the "absolute" difference.
        difference: mean difference over seeds, in the metric's own unit, signed so that positive is better.
        effect: the difference in units of the scale.
        low, high: its 95 % confidence interval; None where it cannot be had.
        seeds: how many pairs.
        verdict: whether the interval lies above zero ("helps"), below it ("hurts") or around it ("free"); "undecided"
            without an interval.
    """

    scale: Scale
    difference: float
    effect: float
    low: float | None
    high: float | None
    seeds: int
    verdict: Verdict


def compare(
    ours: Mapping[int, float], theirs: Mapping[int, float], direction: Direction, scale: Scale
) -> Comparison | None:
    """Paired comparison over the seeds that both have.

    The interval is Student's t on the paired differences; scaled by the other's mean over the same seeds, taken as
    exact, so that the verdict is that of the plain differences. Differences that do not vary at all give no
    interval: no difference is "free", the same difference every time "undecided", since nothing says how far it would
    vary.

    Args:
        ours, theirs: a metric's value by seed.
        scale: of what the effect is to be a share. "error", for a metric that is itself a share of something right, in
            [0, 1]: effect = 1 − (1 − ours) / (1 − theirs); where theirs has no error, "value". "value", for a metric
            that has a zero: effect = ±(ours − theirs) / theirs; where theirs is 0, "absolute".

    Returns:
        None if they have no seed in common, or a value that is not finite.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or not all(math.isfinite(values[seed]) for values in (ours, theirs) for seed in seeds):
        return None
    sign = 1.0 if direction == "higher" else -1.0
    differences = [sign * (ours[seed] - theirs[seed]) for seed in seeds]
    mean, reference = statistics.fmean(differences), statistics.fmean(theirs[seed] for seed in seeds)
    if scale == "error" and 1.0 - reference <= _RESOLUTION:
        scale = "value"
    if scale == "value" and reference == 0:
        scale = "absolute"
    unit = {"error": 1.0 - reference, "value": abs(reference), "absolute": 1.0}[scale]
    size = max(abs(value) for seed in seeds for value in (ours[seed], theirs[seed]))
    low = high = None
    verdict: Verdict = "undecided"
    if len(seeds) > 1:
        std = statistics.stdev(differences)
        if std > _RESOLUTION * size:
            half = float(stdtrit(len(seeds) - 1, 0.5 + LEVEL / 2)) * std / math.sqrt(len(seeds))
            low, high = (mean - half) / unit, (mean + half) / unit
            verdict = "helps" if low > 0 else "hurts" if high < 0 else "free"
        elif abs(mean) <= _RESOLUTION * size:
            verdict = "free"
    return Comparison(scale, mean, mean / unit, low, high, len(seeds), verdict)
