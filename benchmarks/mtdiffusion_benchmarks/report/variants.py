"""Joint models of one task side by side, each against the controls: the table by which a default is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from attrs import frozen

from mtdiffusion_benchmarks.report.statistics import Comparison
from mtdiffusion_benchmarks.report.tables import JOINT, Group, Results, Transfer, key_order, modality, split_key

INTRODUCTION = (
    "Tasks that were trained jointly in several ways, and the same tasks in other settings: every metric that has a "
    "control, marked as better (▲), worse (▼) or tied (≈), and those of joint samples. “Ties or beats” counts target "
    "modalities: one is counted if none of its primary metrics is worse than its control, whatever it is given; "
    "without an interval, the mean decides. "
    "Primary are accuracy, mean IoU, cosine and the Fréchet distance; of a modality that has none of them, all its "
    "metrics but those of the predicted distribution (nll, ece). Where both have a primary metric of one evaluation "
    "(readout_accuracy), those of one evaluation alone decide the query: the control answers in one evaluation, and so "
    "can the joint model. Joint samples are no modality."
)
_PRIMARY = frozenset(("accuracy", "miou", "cosine", "fid"))
_OF_DISTRIBUTION = frozenset(("nll", "ece"))
_READOUT = "readout_"


@frozen
class Variant:
    """One joint model.

    Attributes:
        cells: its comparison with the control by metric, None where there is none.
        kept: by target modality, whether it ties with or beats the control; None if there is nothing to tell by.
    """

    group: Group
    cells: Mapping[str, Comparison | None]
    kept: Mapping[str, bool | None]

    @property
    def count(self) -> int:
        """In how many modalities it ties or beats."""
        return sum(kept is True for kept in self.kept.values())

    @property
    def told(self) -> str:
        """``3 of 4``."""
        return f"{self.count} of {len(self.kept)}"

    @property
    def except_for(self) -> str:
        """`` (not clip)``; "" if it is worse in none."""
        return f" (not {', '.join(self.lost)})" if self.lost else ""

    @property
    def lost(self) -> tuple[str, ...]:
        """The modalities in which it is worse."""
        return tuple(name for name, kept in self.kept.items() if kept is False)


@frozen
class Table:
    """The joint models of a task.

    Attributes:
        queries: what was asked, with its metrics' keys; joint samples first.
        controls: rows of them, by key, each with what the row is called: the first of every metric that has one, and
            below it those that other models are compared with, being sampled like them.
        primary: by target modality, the keys that decide whether it is counted.
    """

    setting: str
    task: str
    queries: tuple[tuple[str, tuple[str, ...]], ...]
    variants: tuple[Variant, ...]
    controls: tuple[tuple[str, Mapping[str, Group]], ...]
    primary: Mapping[str, list[str]]

    @property
    def keys(self) -> list[str]:
        return [key for _, keys in self.queries for key in keys]


def variants(results: Results) -> Iterator[Table]:
    """For every task that has more than one joint model in some setting, a table in each setting."""
    by_task = [
        (setting, task, [group for group in groups if group.role == "joint"])
        for setting, task, groups in results.by_task()
    ]
    several = {task for _, task, joint in by_task if len(joint) > 1}
    for setting, task, joint in by_task:
        if task not in several:
            continue
        ids = {group.id for group in joint}
        found = {(t.group.id, t.key): t for t in results.transfers if t.group.id in ids}
        controls = _controls(found.values())
        plain = {key for group in joint for key in group.keys if split_key(key)[0] == JOINT and results.direction(key)}
        keys = sorted({*controls, *plain}, key=key_order)
        if not keys:
            continue
        queries = tuple((q, tuple(part)) for q, part in itertools.groupby(keys, lambda key: split_key(key)[0]))
        primary = _primary(controls)
        made = tuple(_variant(group, found, keys, primary) for group in joint)
        yield Table(setting, task, queries, made, tuple(_rows(controls)), primary)


def sentences(results: Results) -> Iterator[str]:
    """For every table of several modalities, which of its models keep up in most of them."""
    for table in variants(results):
        first = table.variants[0]
        if len(first.kept) < 2:
            continue
        most = max(variant.count for variant in table.variants)
        where = f"{results.title('settings', table.setting)}, {results.title('tasks', table.task)}"
        if len(table.variants) == 1:
            told = f"ties with or beats the controls in {first.told} modalities{first.except_for}."
            yield f"{where}: “{first.group.title}” {told}"
            continue
        told = f"{where}: of {len(table.variants)} joint models, "
        if most > first.count:
            best = [variant for variant in table.variants if variant.count == most]
            told += " and ".join(f"“{each.group.title}”, in {each.told}{each.except_for}," for each in best)
            verb = "ties or beats" if len(best) == 1 else "tie or beat"
            told += f" {verb} the controls in most modalities; “{first.group.title}” in "
            yield f"{told}{first.told}{first.except_for}."
        else:
            told += f"none ties or beats the controls in more modalities than “{first.group.title}”, "
            yield f"{told}{first.told}{first.except_for}."


def _controls(transfers: Iterable[Transfer]) -> dict[str, list[Group]]:
    """By key, every control that is compared with, in the order of the joint models."""
    found: dict[str, dict[tuple[str, str, str], Group]] = {}
    for transfer in transfers:
        found.setdefault(transfer.key, {}).setdefault(transfer.control.id, transfer.control)
    return {key: list(groups.values()) for key, groups in found.items()}


def _rows(controls: Mapping[str, list[Group]]) -> Iterator[tuple[str, Mapping[str, Group]]]:
    for row in range(max(map(len, controls.values()), default=1)):
        name = "sampled otherwise" if row else "one for each question"
        yield name, {key: groups[row] for key, groups in controls.items() if row < len(groups)}


def _variant(
    group: Group,
    found: Mapping[tuple[tuple[str, str, str], str], Transfer],
    keys: Iterable[str],
    primary: Mapping[str, list[str]],
) -> Variant:
    cells: dict[str, Comparison | None] = {}
    for key in keys:
        transfer = found.get((group.id, key))
        cells[key] = transfer.comparison if transfer else None
    kept: dict[str, bool | None] = {}
    for target, own in primary.items():
        compared = [comparison for key in own if (comparison := cells[key])]
        kept[target] = not any(_worse(comparison) for comparison in compared) if compared else None
    return Variant(group, cells, kept)


def _worse(comparison: Comparison) -> bool:
    if comparison.verdict == "undecided":
        return comparison.effect < 0
    return comparison.verdict == "hurts"


def _primary(keys: Iterable[str]) -> dict[str, list[str]]:
    """The keys by which each target modality is judged, of those that have a control."""
    keys = set(keys)
    by_target: dict[str, list[str]] = {}
    for key in sorted(keys, key=key_order):
        query, metric = split_key(key)
        if query != JOINT and not metric.startswith(_READOUT):
            by_target.setdefault(modality(query), []).append(key)
    chosen: dict[str, list[str]] = {}
    for target, own in by_target.items():
        named = [key for key in own if _PRIMARY & {*_ends(key)}]
        if found := named or [key for key in own if _ends(key)[1] not in _OF_DISTRIBUTION]:
            read = [_read_out(key) for key in found if _read_out(key) in keys]
            answered = {split_key(key)[0] for key in read}
            chosen[target] = read + [key for key in found if split_key(key)[0] not in answered]
    return chosen


def _read_out(key: str) -> str:
    """The same metric, of one evaluation."""
    query, metric = split_key(key)
    return f"{query}/{_READOUT}{metric}"


def _ends(key: str) -> tuple[str, str]:
    """The first and the last part of a metric's name: a distance stands first, what a judge measures last."""
    metric = split_key(key)[1]
    return metric.partition("_")[0], metric.rpartition("_")[2]
