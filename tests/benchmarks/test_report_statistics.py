"""The report's statistics against values worked out by hand."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from mtdiffusion_benchmarks.report import text
from mtdiffusion_benchmarks.report.statistics import Comparison, compare, summarise


def found(comparison: Comparison | None) -> Comparison:
    assert comparison is not None
    return comparison


def test_the_mean_and_the_sample_standard_deviation() -> None:
    summary = summarise([1.0, 2.0, 6.0])
    assert summary.mean == 3.0
    assert summary.std == pytest.approx(math.sqrt(7.0))  # (4 + 1 + 9) / 2
    assert summarise([5.0]).std is None
    assert math.isnan(summarise([1.0, math.inf]).mean)


def test_the_interval_of_paired_differences() -> None:
    # Differences 1, 2, 3: mean 2, standard error 1 / √3; t(2, 0.975) = 4.3027; the other's mean is 10.
    comparison = found(compare({0: 9.0, 1: 8.0, 2: 7.0}, {0: 10.0, 1: 10.0, 2: 10.0}, "lower", "value"))
    half = 4.302652729911275 / math.sqrt(3)
    assert comparison.difference == pytest.approx(2.0)
    assert comparison.effect == pytest.approx(0.2)
    assert comparison.low == pytest.approx((2 - half) / 10)
    assert comparison.high == pytest.approx((2 + half) / 10)
    assert comparison.verdict == "free"  # −0.048 to 0.448
    assert (comparison.scale, comparison.seeds) == ("value", 3)


def test_the_verdict_is_that_of_the_paired_t_test() -> None:
    ours, theirs = [0.91, 0.93, 0.95, 0.9], [0.88, 0.91, 0.92, 0.89]
    comparison = found(compare(dict(enumerate(ours)), dict(enumerate(theirs)), "higher", "value"))
    assert (stats.ttest_rel(ours, theirs).pvalue < 0.05) == (comparison.verdict == "helps")
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert comparison.low == pytest.approx(low / 0.9)
    assert comparison.high == pytest.approx(high / 0.9)


def test_pairing_takes_out_what_seeds_share() -> None:
    theirs = {0: 1.0, 1: 5.0, 2: 9.0}
    ours = {0: 1.4, 1: 5.5, 2: 9.6}  # half a unit better every time, among seeds 4 apart
    assert found(compare(ours, theirs, "higher", "value")).verdict == "helps"
    assert found(compare(ours, theirs, "lower", "value")).verdict == "hurts"


def test_shares_of_something_right_are_compared_by_their_errors() -> None:
    comparison = found(compare({0: 0.98}, {0: 0.96}, "higher", "error"))
    assert comparison.scale == "error"
    assert comparison.effect == pytest.approx(1 - 0.02 / 0.04)
    assert found(compare({0: 0.92}, {0: 0.96}, "higher", "error")).effect == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("theirs", "scale"),
    [
        ((1.0, 1.0, 1.0), "points"),  # no error at all
        ((0.996, 0.999, 0.995), "points"),  # at most half a per cent in every seed
        ((0.994, 0.996, 0.996), "error"),  # one seed has more, and the mean is not below the deviation
        ((1.0, 1.0, 0.98), "points"),  # mean error 0.0067, deviation 0.0115: not resolved
        ((0.96, 0.95, 0.97), "error"),
    ],
)
def test_a_nearly_perfect_control_is_compared_in_points(theirs: tuple[float, ...], scale: str) -> None:
    ours = {0: 0.95, 1: 0.94, 2: 0.96}
    comparison = found(compare(ours, dict(enumerate(theirs)), "higher", "error"))
    assert comparison.scale == scale
    assert comparison.perfect == (not comparison.relative) == (scale == "points")
    if scale == "points":
        assert comparison.effect == pytest.approx(100 * comparison.difference)
        assert comparison.low is not None and comparison.high is not None
        assert comparison.low < comparison.effect < comparison.high < 100


def test_the_points_of_a_perfect_control_and_their_verdict() -> None:
    comparison = found(compare({0: 0.9, 1: 0.8}, {0: 1.0, 1: 1.0}, "higher", "error"))
    assert comparison.effect == pytest.approx(-15.0)
    assert comparison.verdict == "free"  # two seeds, ten points apart
    same = found(compare({0: 0.91, 1: 0.9, 2: 0.9}, {0: 1.0, 1: 1.0, 2: 1.0}, "higher", "error"))
    assert same.verdict == "hurts"
    assert text.effect(same) == "−9.7 points"
    assert text.interval(same).endswith(" points")
    assert text.scale(same) == "points: control nearly perfect"
    assert text.effect(found(compare({0: 1.0}, {0: 0.9995}, "higher", "error"))) == "+0.05 points"


def test_small_likelihoods_and_calibration_errors_are_compared_plainly_and_other_small_values_are_not() -> None:
    ours, theirs = {0: 0.03, 1: 0.04}, {0: 0.002, 1: 0.001}
    plain = found(compare(ours, theirs, "lower", "value", "absolute"))
    assert (plain.scale, plain.perfect) == ("absolute", True)
    assert plain.effect == pytest.approx(-0.0335)
    assert text.scale(plain) == "absolute: control nearly perfect"
    points = found(compare(ours, theirs, "lower", "value", "points"))
    assert (points.scale, points.effect) == ("points", pytest.approx(-3.35))
    squared = found(compare(ours, theirs, "lower", "value"))
    assert (squared.scale, squared.perfect) == ("value", False)
    larger = found(compare(ours, {0: 0.02, 1: 0.01}, "lower", "value", "points"))
    assert larger.scale == "value"


def test_a_control_of_zero_leaves_the_plain_difference() -> None:
    comparison = found(compare({0: 0.5, 1: 0.3}, {0: 0.0, 1: 0.0}, "lower", "value"))
    assert (comparison.scale, comparison.perfect) == ("absolute", True)
    assert comparison.effect == comparison.difference == pytest.approx(-0.4)


def test_what_has_no_zero_is_compared_plainly() -> None:
    comparison = found(compare({0: -0.002}, {0: -0.001}, "lower", "absolute"))
    assert (comparison.scale, comparison.effect) == ("absolute", pytest.approx(0.001))
    assert text.scale(comparison) == "absolute"  # not because of the control


def test_one_seed_is_undecided() -> None:
    comparison = found(compare({0: 0.9}, {0: 0.5}, "higher", "error"))
    assert (comparison.verdict, comparison.low, comparison.high) == ("undecided", None, None)


def test_only_common_seeds_are_paired() -> None:
    comparison = found(compare({0: 1.0, 1: 2.0, 2: 99.0}, {0: 1.0, 1: 4.0, 3: -99.0}, "lower", "value"))
    assert comparison.seeds == 2
    assert comparison.difference == 1.0
    assert comparison.effect == pytest.approx(0.4)  # of the mean over the same seeds, 2.5
    assert compare({0: 1.0}, {1: 1.0}, "lower", "value") is None


def test_differences_that_do_not_vary_give_no_interval() -> None:
    same = found(compare({0: 0.7, 1: 0.8}, {0: 0.7, 1: 0.8}, "higher", "error"))
    assert (same.verdict, same.low, same.effect) == ("free", None, 0.0)
    shifted = found(compare({0: 0.2, 1: 0.3, 2: 0.4}, {0: 0.1, 1: 0.2, 2: 0.3}, "higher", "error"))
    assert (shifted.verdict, shifted.low) == ("undecided", None)  # equal but for rounding
    assert shifted.effect > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_compared(value: float) -> None:
    assert compare({0: value, 1: 1.0}, {0: 1.0, 1: 1.0}, "lower", "value") is None
    assert compare({0: 1.0, 1: 1.0}, {0: 1.0, 1: value}, "lower", "value") is None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.9712, 0.9688], "0.9700 ± 0.0017"),
        ([12.0, 15.0], "13.5 ± 2.1"),
        ([360.0, 360.0], "360 ± 0"),
        ([0.5], "0.500"),
        ([-0.0021], "−0.00210"),
        ([1234.5], "1,234.5"),
        ([math.inf, 1.0], "not finite"),
    ],
)
def test_a_mean_has_as_many_places_as_its_deviation_supports(values: list[float], told: str) -> None:
    assert text.mean_std(summarise(values)) == told


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.123, "+12%"), (-0.0123, "−1.2%"), (0.0, "+0.0%"), (12.0, ">+999%"), (-12.0, "<−999%"), (-9.99, "−999%")],
)
def test_an_effect_is_a_signed_percentage_within_bounds(share: float, told: str) -> None:
    assert text.percent(share) == told
