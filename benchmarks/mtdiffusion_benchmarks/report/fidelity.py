"""Fidelity and diversity: precision and recall of generated samples, against a diffusion model for one query alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from attrs import frozen

from mtdiffusion_benchmarks.report import text
from mtdiffusion_benchmarks.report.reconstruction import parse
from mtdiffusion_benchmarks.report.statistics import Comparison, compare
from mtdiffusion_benchmarks.report.tables import REAL, Group, Results, preference, split_key

INTRODUCTION = (
    "Precision is the share of generated samples that look like training samples, recall the share of training "
    "samples that something generated looks like (Kynkäänniemi et al. 2019). Differences are the joint model minus its "
    "control, a diffusion model for this query alone if there is one, in percentage points."
)
_METRICS = ("precision", "recall")
_DIFFUSION = "single"


@frozen
class Row:
    """One query: (joint model's key, comparison) of precision and of recall in one network's features."""

    group: Group
    control: Group
    query: str
    features: str
    precision: tuple[str, Comparison | None]
    recall: tuple[str, Comparison | None]


def fidelity(results: Results) -> list[Row]:
    """A row for every joint model and query, nothing being given in part, that has both and a control that has."""
    return list(_rows(results))


def _rows(results: Results) -> Iterator[Row]:
    for group in results.groups:
        if group.role != "joint":
            continue
        have = set(group.keys)
        for key in group.keys:
            query, metric = split_key(key)
            first, _, features = metric.partition("_")
            both = [f"{query}/{name}_{features}" for name in _METRICS]
            if first != _METRICS[0] or not features or query == REAL or parse(query) or not have.issuperset(both):
                continue
            control = _control(results, group, both)
            if control is not None:
                precision, recall = ((key, _points(group, control, key)) for key in both)
                yield Row(group, control, query, features, precision, recall)


def _control(results: Results, group: Group, keys: Sequence[str]) -> Group | None:
    """A diffusion model for this query alone, at the same steps, if there is one; else any other control."""
    controls = [
        other
        for other in results.groups
        if other.role == "control"
        and other.setting == group.setting
        and other.budget == "steps"
        and all(other.values(key) for key in keys)
    ]
    if not controls:
        return None
    return min(controls, key=lambda other: (other.kind != _DIFFUSION, preference(results, group, other)))


def _points(group: Group, control: Group, key: str) -> Comparison | None:
    return compare(group.values(key), control.values(key), "higher", "points")


def sentence(results: Results, rows: Sequence[Row]) -> str:
    """What the rows of the leading joint method say."""
    lead = [row for row in rows if row.group.method == results.lead] or list(rows)
    if not lead:
        return ""
    told = []
    for name in _METRICS:
        found = [comparison for row in lead if (comparison := getattr(row, name)[1])]
        if not found:
            continue
        number = {v: sum(c.verdict == v for c in found) for v in ("helps", "hurts", "free", "undecided")}
        undecided = f", undecided in {number['undecided']}" if number["undecided"] else ""
        mean = statistics.fmean(comparison.effect for comparison in found)
        told.append(
            f"{name} is higher in {number['helps']}, lower in {number['hurts']}, a tie in {number['free']}{undecided} "
            f"(mean difference {text.points(mean)})"
        )
    queries = "1 query" if len(lead) == 1 else f"{len(lead)} queries"
    return f"“{lead[0].group.title}” against its controls over {queries}: {'; '.join(told)}." if told else ""
