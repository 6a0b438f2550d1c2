"""Means over seeds, and paired comparisons with their 95 % intervals. Pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from attrs import frozen
from scipy.special import stdtrit

Direction = Literal["higher", "lower"]
Scale = Literal["error", "value", "absolute", "points"]
Verdict = Literal["helps", "hurts", "free", "undecided"]

LEVEL = 0.95
NEGLIGIBLE = 0.005
"""An error no greater than this in every seed is too small for ratios to it to mean anything."""
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
            of nothing, being the "absolute" difference, or that in percentage "points".
        difference: mean difference over seeds, in the metric's own unit, signed so that positive is better.
        effect: the difference in units of the scale.
        low, high: its 95 % confidence interval; None where it cannot be had.
        seeds: how many pairs.
        verdict: whether the interval lies above zero ("helps"), below it ("hurts") or around it ("free"); "undecided"
            without an interval.
        perfect: whether the effect is no share because the other leaves too little to be relative to.
    """

    scale: Scale
    difference: float
    effect: float
    low: float | None
    high: float | None
    seeds: int
    verdict: Verdict
    perfect: bool = False

    @property
    def relative(self) -> bool:
        """Whether the effect is a share, and so can be set beside the effects on other metrics."""
        return self.scale in ("error", "value")


def compare(
    ours: Mapping[int, float],
    theirs: Mapping[int, float],
    direction: Direction,
    scale: Scale,
    negligible: Scale | None = None,
) -> Comparison | None:
    """Paired comparison over the seeds that both have.

    The interval is Student's t on the paired differences; scaled by the other's mean over the same seeds, taken as
    exact, so that the verdict is that of the plain differences. Differences that do not vary at all give no
    interval: no difference is "free", the same difference every time "undecided", since nothing says how far it would
    vary.

    Args:
        ours, theirs: a metric's value by seed.
        scale: of what the effect is to be a share. "error", for a metric that is itself a share of something right, in
            [0, 1]: effect = 1 − (1 − ours) / (1 − theirs); "points" where theirs is nearly perfect: an error of at most
            :data:`NEGLIGIBLE` in every seed, or smaller than its own standard deviation over seeds, which says that it
            is not resolved. "value", for a metric that has a zero: effect = ±(ours − theirs) / theirs; where theirs is
            0, "absolute".
        negligible: for a metric of scale "value" that measures an error on a scale of order 1: what to use instead
            where theirs is nearly perfect, as above; None: it is never.

    Returns:
        None if they have no seed in common, or a value that is not finite.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or not all(math.isfinite(values[seed]) for values in (ours, theirs) for seed in seeds):
        return None
    sign = 1.0 if direction == "higher" else -1.0
    differences = [sign * (ours[seed] - theirs[seed]) for seed in seeds]
    mean, reference = statistics.fmean(differences), statistics.fmean(theirs[seed] for seed in seeds)
    perfect = False
    instead: Scale | None = "points" if scale == "error" else negligible if scale == "value" else None
    if instead and _nearly_perfect([1.0 - theirs[seed] if scale == "error" else theirs[seed] for seed in seeds]):
        scale, perfect = instead, True
    if scale == "value" and reference == 0:
        scale, perfect = "absolute", True
    unit = {"error": 1.0 - reference, "value": abs(reference), "absolute": 1.0, "points": 0.01}[scale]
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
    return Comparison(scale, mean, mean / unit, low, high, len(seeds), verdict, perfect)


def _nearly_perfect(errors: Sequence[float]) -> bool:
    """Whether errors, one a seed, are too small, or too little resolved, to be relative to."""
    spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
    return max(errors) <= NEGLIGIBLE * (1 + 1e-9) or statistics.fmean(errors) < spread
