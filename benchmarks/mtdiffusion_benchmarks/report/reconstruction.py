"""Where the advantage begins: targets given in part, by how much of them is hidden."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence

from attrs import frozen

from mtdiffusion_benchmarks.report import text
from mtdiffusion_benchmarks.report.statistics import Comparison, Direction
from mtdiffusion_benchmarks.report.tables import Group, Results, split_key

INTRODUCTION = (
    "Each joint model against everything else that fills in the same target, by how much of it is hidden. Distances of "
    "all samples together to the training data (fid, kid) say how likely the samples look; perceptual distances "
    "(lpips, perceptual) and the target's own metrics say how near each is to what was hidden: a model that gives the "
    "mean of all possibilities does well in the second and badly in the first."
)
_DISTANCES = ("fid", "kid", "lpips", "perceptual")
_READOUT = "readout_"


@frozen
class InPart:
    """What was asked of a target given in part.

    Attributes:
        target: the modality.
        beside: what was given whole beside it, "" if nothing.
        pattern: how it was hidden.
        percent: how much of it, in per cent.
    """

    target: str
    beside: str
    pattern: str
    percent: int


@frozen
class Against:
    """One rival at one share: its group, and the joint model's comparison with it (None if they share no seed)."""

    group: Group
    comparison: Comparison | None


@frozen
class Row:
    """One metric at one share, against each rival of the table, in order."""

    percent: int
    key: str
    against: tuple[Against, ...]


@frozen
class Block:
    """One metric: a row a share, and what they say in words."""

    metric: str
    features: bool
    rows: tuple[Row, ...]
    sentence: str


@frozen
class Table:
    """A joint model, a target and a pattern.

    Attributes:
        rivals: what it is compared with, in the profile's order.
        blocks: distances in features first, then the target's own metrics.
    """

    group: Group
    query: InPart
    rivals: tuple[Group, ...]
    blocks: tuple[Block, ...]

    @property
    def title(self) -> str:
        beside = f", given {self.query.beside}" if self.query.beside else ""
        return f"{self.query.target}{beside}, hidden as {self.query.pattern}"


def parse(query: str) -> InPart | None:
    """``image|label+image:75%box`` in its parts; None if nothing is given in part."""
    target, _, given = query.partition("|")
    found = re.fullmatch(rf"(?:(.*)\+)?{re.escape(target)}:(\d+)%(\w+)", given)
    return InPart(target, found[1] or "", found[3], int(found[2])) if found and target else None


def reconstruction(results: Results) -> Iterator[Table]:
    """A table for every joint model, target and pattern for which there is something to compare with."""
    for group in results.groups:
        if group.role != "joint":
            continue
        asked: dict[InPart, dict[int, list[str]]] = {}
        for key in group.keys:
            query = parse(split_key(key)[0])
            if query is not None and results.direction(key):
                kind = InPart(query.target, query.beside, query.pattern, 0)
                asked.setdefault(kind, {}).setdefault(query.percent, []).append(key)
        for kind, by_share in asked.items():
            rivals = _rivals(results, group, {key for keys in by_share.values() for key in keys})
            if rivals:
                yield Table(group, kind, rivals, tuple(_blocks(results, group, rivals, by_share)))


def _rivals(results: Results, group: Group, keys: set[str]) -> tuple[Group, ...]:
    """Everything else of the setting that answers it, one a method: of the same task if it is there."""
    chosen: dict[str, Group] = {}
    for other in results.groups:
        answers = other.setting == group.setting and other.role != "joint" and keys & set(other.keys)
        if answers and (other.method not in chosen or other.task == group.task):
            chosen[other.method] = other
    order = list(results.profile.methods)
    return tuple(sorted(chosen.values(), key=lambda g: order.index(g.method) if g.method in order else len(order)))


def _blocks(results: Results, group: Group, rivals: Sequence[Group], by_share: dict[int, list[str]]) -> Iterator[Block]:
    metrics = list(dict.fromkeys(split_key(key)[1] for keys in by_share.values() for key in keys))
    distances = [metric for metric in metrics if metric.partition("_")[0] in _DISTANCES]
    judges = {metric.partition("_")[2] for metric in distances} - {""}
    own = [
        metric
        for metric in metrics
        if metric not in distances and not metric.startswith(_READOUT) and not _is_of(metric, judges)
    ]
    for metric in (*distances, *own):
        rows = []
        for percent, keys in sorted(by_share.items()):
            for key in keys:
                if split_key(key)[1] == metric:
                    against = tuple(Against(rival, results.compared(group, rival, key)) for rival in rivals)
                    rows.append(Row(percent, key, against))
        told = [part for n in range(len(rivals)) if (part := _onset(group, rows, n, results.directions[metric]))]
        found = [one.comparison for row in rows for one in row.against if one.comparison]
        bare = " No intervals: the means decide." if all(comparison.low is None for comparison in found) else ""
        yield Block(metric, metric in distances, tuple(rows), f"{metric}: {'; '.join(told)}.{bare}")


def _is_of(metric: str, judges: set[str]) -> bool:
    """Whether a judge gives it: its name is a part of the metric's, as in judge_accuracy and precision_judge."""
    return any(metric.startswith(f"{judge}_") or metric.endswith(f"_{judge}") for judge in judges)


def _onset(group: Group, rows: Sequence[Row], place: int, direction: Direction) -> str:
    """From which share on the joint model is better than the rival at a place, and by how much; "" if nothing is there
    to tell by."""
    rival = rows[0].against[place].group
    found = [(row, comparison) for row in rows if (comparison := row.against[place].comparison)]
    if not found:
        return ""
    signs = [_sign(comparison) for _, comparison in found]
    first = next((n for n in range(len(found)) if min(signs[n:]) > 0), None)
    told = f"against “{rival.title}” "
    if max(signs) <= 0 and min(signs) == max(signs):
        return told + ("worse at every share" if signs[0] < 0 else "a tie at every share")
    if first is not None:
        start, end = found[first], found[-1]
        ends = [start] if start is end else [start, end]
        sizes = " and ".join(f"{_size(group, rival, *pair, direction)} at {pair[0].percent}%" for pair in ends)
        told += f"better from {start[0].percent}% hidden on, by {sizes}"
    elif max(signs) > 0:
        told += f"better at {_listed(found, signs, 1)} alone"
    else:
        told += "better at no share"
    return told + (f", worse at {_listed(found, signs, -1)}" if min(signs) < 0 else "")


def _sign(comparison: Comparison) -> int:
    """1 if better, −1 if worse, 0 if neither: by the interval, and by the mean alone where there is none."""
    if comparison.verdict == "undecided":
        return (comparison.effect > 0) - (comparison.effect < 0)
    return {"helps": 1, "hurts": -1}.get(comparison.verdict, 0)


def _size(group: Group, rival: Group, row: Row, comparison: Comparison, direction: Direction) -> str:
    """By what factor the rival's error, or value that had better be small, is the greater; or the difference."""
    ours, theirs = group.values(row.key), rival.values(row.key)
    seeds = ours.keys() & theirs.keys()
    mine, other = (statistics.fmean(values[seed] for seed in sorted(seeds)) for values in (ours, theirs))
    if comparison.scale == "error":
        mine, other = 1 - mine, 1 - other
    ratio = comparison.scale == "error" or (comparison.scale == "value" and direction == "lower")
    if ratio and mine > 0 and other > 0:
        return f"a factor of {other / mine:.3g}"
    if comparison.scale == "points":
        return text.effect(comparison).lstrip("+")
    return text.number(comparison.difference)


def _listed(found: Sequence[tuple[Row, Comparison]], signs: Sequence[int], sign: int) -> str:
    return ", ".join(f"{row.percent}%" for (row, _), each in zip(found, signs, strict=True) if each == sign)
