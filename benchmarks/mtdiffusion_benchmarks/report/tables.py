"""What the report says, as values: groups of cells, comparisons with controls, counts; no HTML or Markdown."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from mtdiffusion_benchmarks.report.cells import Budget, Cell, Entry, Profile, load
from mtdiffusion_benchmarks.report.statistics import Comparison, Direction, Scale, Summary, compare, summarise

REAL = "real"
JOINT = "joint"
SIGNS: Mapping[str, str] = {"helps": "▲", "hurts": "▼", "free": "≈", "undecided": "?"}
VERDICTS = tuple(SIGNS)
BUDGETS: Mapping[Budget, str] = {"steps": "", "flops": "at equal FLOPs", "seconds": "at equal seconds"}
"""What is made equal between a method and the joint model, as it stands behind a method's title."""
_NEGLIGIBLE: Mapping[str, Scale] = {"nll": "absolute", "ece": "points"}
"""Metrics by the last part of their names whose value is an error on a scale of order 1 (nats; a share), and how they
are compared where the control has next to none: negative log-likelihood, expected calibration error. Of others, such as
a squared error, a small value may be as far from perfect as any."""


def split_key(key: str) -> tuple[str, str]:
    """What was asked, and the metric: ``label|image/accuracy`` -> (``label|image``, ``accuracy``)."""
    query, _, metric = key.rpartition("/")
    return query, metric


def modality(query: str) -> str:
    """What was generated, ``joint`` for everything at once."""
    return query.partition("|")[0]


def given(query: str) -> str:
    """What was given; "" if nothing was."""
    return query.partition("|")[2]


def key_order(key: str) -> tuple[int, str, int, str, str]:
    """Joint samples first, then by target and by how much is given; held-out data last."""
    query, metric = split_key(key)
    place = {JOINT: 0, REAL: 2}.get(query, 1)
    return place, modality(query), given(query).count("+"), query, metric


@frozen
class Group:
    """The cells of one setting, task and method, a cell a seed; the title names the budget unless that is of steps."""

    cells: tuple[Cell, ...]
    title: str
    budget: Budget = "steps"

    @property
    def id(self) -> tuple[str, str, str]:
        return self.setting, self.task, self.method

    @property
    def setting(self) -> str:
        return self.cells[0].setting

    @property
    def task(self) -> str:
        return self.cells[0].task

    @property
    def method(self) -> str:
        return self.cells[0].method

    @property
    def role(self) -> str:
        return self.cells[0].role

    @property
    def kind(self) -> str | None:
        """Of the method; None if the results do not tell."""
        method = self.cells[0].config.get("method")
        return method.get("kind") if isinstance(method, dict) else None

    def alike(self, other: Group) -> bool:
        """Whether both are sampled with the same settings; none, if the results do not tell, are the same."""
        return self._sampling == other._sampling

    @property
    def _sampling(self) -> tuple[Any, Any]:
        experiment = self.cells[0].config.get("experiment", {})
        return experiment.get("sampling"), experiment.get("evaluation", {}).get("steps")

    @property
    def ok(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.status == "ok")

    @property
    def state(self) -> str:
        """ "3 seeds", "2 of 3 seeds, 1 diverged", "diverged"."""
        lost = [
            f"{count} {status}"
            for status in ("diverged", "failed")
            if (count := sum(cell.status == status for cell in self.cells))
        ]
        if not lost:
            return f"{len(self.cells)} seed{'s' * (len(self.cells) > 1)}"
        if not self.ok:
            return " and ".join(sorted({cell.status for cell in self.cells}))
        return f"{len(self.ok)} of {len(self.cells)} seeds, {', '.join(lost)}"

    @property
    def keys(self) -> list[str]:
        return sorted({key for cell in self.ok for key in cell.metrics}, key=key_order)

    def values(self, key: str) -> dict[int, float]:
        """By seed."""
        return {cell.seed: cell.metrics[key] for cell in self.ok if key in cell.metrics}

    def summary(self, key: str) -> Summary | None:
        values = self.values(key)
        return summarise(values.values()) if values else None

    def cost(self, name: str) -> float | None:
        """Mean over seeds of one of a cost's fields."""
        found = [float(getattr(cell.cost, name)) for cell in self.ok if cell.cost is not None]
        return statistics.fmean(found) if found else None


@frozen
class Transfer:
    """A joint model against a control for one metric; no comparison if they share no seed. The control's budget says
    which comparison it is."""

    group: Group
    control: Group
    key: str
    comparison: Comparison | None


@frozen
class Counts:
    """Of comparisons by verdict, and the median of their effects (of those that are shares)."""

    helps: int
    hurts: int
    free: int
    undecided: int
    median: float | None

    @property
    def total(self) -> int:
        return self.helps + self.hurts + self.free + self.undecided


@frozen
class Results:
    """Everything that a report shows.

    Attributes:
        missing: ids SETTING/TASK/METHOD/SEED of planned cells without a result.
        directions: by metric.
        scales: how a metric is compared: by the "error" if higher is better and all values lie in [0, 1]; plainly
            ("absolute") if some are negative, since it then has no zero to be relative to; else by the "value".
        rows: every joint model against its controls; for each metric that at the same steps, then those at other
            budgets.
        uncontrolled: how many (joint model, directed metric) have no control at the same steps.
    """

    profile: Profile
    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]
    missing: tuple[str, ...]
    directions: Mapping[str, Direction]
    scales: Mapping[str, Scale]
    rows: tuple[Transfer, ...]
    uncontrolled: int

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """Against controls at the same steps: what verdicts are counted over."""
        return tuple(transfer for transfer in self.rows if transfer.control.budget == "steps")

    @cached_property
    def matched(self) -> tuple[Transfer, ...]:
        """Against controls at another budget."""
        return tuple(transfer for transfer in self.rows if transfer.control.budget != "steps")

    @property
    def lead(self) -> str | None:
        """The joint method that the headline is about: the first with a comparison."""
        return self.transfers[0].group.method if self.transfers else None

    def place(self, method: str) -> int:
        """Of a method in the profile's order; those that it does not know come last."""
        order = list(self.profile.methods)
        return order.index(method) if method in order else len(order)

    def title(self, axis: str, name: str) -> str:
        """What the profile calls a setting, task or method; its name if nothing."""
        entries: Mapping[str, Entry] = getattr(self.profile, axis)
        return (entries[name].title if name in entries else "") or name

    def direction(self, key: str) -> Direction | None:
        return self.directions.get(split_key(key)[1])

    def by_task(self) -> Iterator[tuple[str, str, list[Group]]]:
        """Setting, task and its groups."""
        for (setting, task), found in itertools.groupby(self.groups, lambda group: group.id[:2]):
            yield setting, task, list(found)

    def compared(self, ours: Group, theirs: Group, key: str) -> Comparison | None:
        """Two methods on one metric that has a direction."""
        metric = split_key(key)[1]
        direction = self.directions[metric]
        negligible = _NEGLIGIBLE.get(metric.rpartition("_")[2])
        return compare(ours.values(key), theirs.values(key), direction, self.scales[metric], negligible)


def read_results(folder: Path) -> Results:
    """The folder of a benchmark.

    Raises:
        UserError: for whatever is wrong with its files.
    """
    profile, cells = load(folder)
    groups = tuple(_groups(profile, cells))
    directions = {metric: direction for cell in cells for metric, direction in cell.directions.items()}
    results = Results(
        profile=profile,
        cells=tuple(cells),
        groups=groups,
        missing=tuple(name for name in profile.cells if name not in {cell.id for cell in cells}),
        directions=directions,
        scales=_scales(cells, directions),
        rows=(),
        uncontrolled=0,
    )
    rows, uncontrolled = _transfers(results)
    return evolve(results, rows=rows, uncontrolled=uncontrolled)


def count(transfers: Iterable[Transfer]) -> Counts:
    found = [transfer.comparison for transfer in transfers if transfer.comparison]
    effects = [comparison.effect for comparison in found if comparison.relative]
    number = {verdict: sum(comparison.verdict == verdict for comparison in found) for verdict in VERDICTS}
    return Counts(**number, median=statistics.median(effects) if effects else None)


def best(results: Results, groups: Sequence[Group], key: str) -> frozenset[str]:
    """The methods with the best mean, if there is anything to choose."""
    direction = results.direction(key)
    found = {group.method: summary.mean for group in groups if (summary := group.summary(key))}
    means = {method: mean for method, mean in found.items() if math.isfinite(mean)}
    if direction is None or split_key(key)[0] == REAL or len(means) < 2:
        return frozenset()
    first = max(means.values()) if direction == "higher" else min(means.values())
    return frozenset(method for method, mean in means.items() if math.isclose(mean, first, rel_tol=1e-12))


def _groups(profile: Profile, cells: Sequence[Cell]) -> Iterator[Group]:
    for (_, _, method), found in itertools.groupby(cells, lambda cell: (cell.setting, cell.task, cell.method)):
        group = tuple(found)
        entry = profile.methods.get(method, Entry())
        budget = next((cell.cost.budget for cell in group if cell.cost), entry.budget)
        title = entry.title or group[0].title or method
        yield Group(group, f"{title}, {BUDGETS[budget]}" if BUDGETS[budget] else title, budget)


def _scales(cells: Iterable[Cell], directions: Mapping[str, Direction]) -> dict[str, Scale]:
    values: dict[str, list[float]] = {}
    for cell in cells:
        for key, value in cell.metrics.items():
            found = values.setdefault(split_key(key)[1], [])
            if math.isfinite(value):
                found.append(value)
    scales: dict[str, Scale] = {}
    for metric, found in values.items():
        share = directions.get(metric) == "higher" and max(found, default=0.0) <= 1
        scales[metric] = "absolute" if min(found, default=0.0) < 0 else "error" if share else "value"
    return scales


def preference(results: Results, group: Group, control: Group) -> tuple[bool, int, str, bool]:
    """Least for the control that a joint model is compared with: one that is sampled alike, of these the first method,
    of its tasks the same one, since a task may train a control differently."""
    return not group.alike(control), results.place(control.method), control.method, control.task != group.task


def _transfers(results: Results) -> tuple[tuple[Transfer, ...], int]:
    """Every joint group's directed metrics against the control of each budget that has the same; by method, then
    setting and task. And how many have none at the same steps."""
    found: list[Transfer] = []
    uncontrolled = 0
    joint = sorted(
        (group for group in results.groups if group.role == "joint"), key=lambda g: (results.place(g.method), g.method)
    )
    for group in joint:
        for key in group.keys:
            if results.direction(key) is None or split_key(key)[0] == REAL:
                continue
            controls = [
                other
                for other in results.groups
                if other.role == "control" and other.setting == group.setting and other.values(key)
            ]
            uncontrolled += all(other.budget != "steps" for other in controls)
            for budget in BUDGETS:
                equal = [other for other in controls if other.budget == budget]
                if not equal:
                    continue
                control = min(equal, key=lambda other: preference(results, group, other))
                found.append(Transfer(group, control, key, results.compared(group, control, key)))
    return tuple(found), uncontrolled
