"""The report as one HTML page: everything inline, nothing to load, no script."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from attrs import frozen
from jinja2 import Environment, PackageLoader, StrictUndefined

from mtdiffusion_benchmarks.report import fidelity, headline, reconstruction, text, variants
from mtdiffusion_benchmarks.report.charts import HEIGHT, WIDTH, Panel, Whisker, panel, terms, whisker
from mtdiffusion_benchmarks.report.statistics import Comparison
from mtdiffusion_benchmarks.report.tables import (
    BUDGETS,
    JOINT,
    REAL,
    SIGNS,
    VERDICTS,
    Group,
    Results,
    Transfer,
    best,
    given,
    key_order,
    modality,
    split_key,
)
from mtdiffusion_registry.evaluation import ARROWS

_STEPS = (0.05, 0.15, 0.4)  # effects at which the colour deepens
_PICTURE = 480  # pixels across that a figure is enlarged to, at most, by whole factors


@frozen
class HeatMap:
    """Transfer to one modality in one setting, whole or where part of it is given.

    Attributes:
        queries: what is given, with the number of its metrics.
        columns: the metrics' names in full.
        rows: a joint model and a budget of its controls each (its name, "" for that of steps): the transfers by column
            (None where it was not asked), or () if no seed is left.
    """

    title: str
    queries: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Group, str, tuple[Transfer | None, ...]], ...]


@frozen
class Remedies:
    """Several joint models of one task, the first being the reference of the others."""

    setting: str
    task: str
    groups: tuple[Group, ...]
    rows: tuple[tuple[str, tuple[Comparison | None, ...]], ...]


def render(results: Results) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("mtdiffusion_benchmarks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "arrows": ARROWS,
        "by_query": _by_query,
        "best": lambda groups, key: best(results, groups, key),
        "direction": results.direction,
        "figures": _figures,
        "controls_elsewhere": lambda groups: _controls_elsewhere(results, groups),
        "front": _front,
        "floor": lambda groups, key: _floor(results, groups, key),
        "given": given,
        "keys": headline.keys,
        "introductions": {
            "fidelity": fidelity.INTRODUCTION,
            "reconstruction": reconstruction.INTRODUCTION,
            "variants": variants.INTRODUCTION,
        },
        "panels": _panels,
        "shade": _shade,
        "signs": SIGNS,
        "split_key": split_key,
        "terms": terms,
        "text": text,
        "title": results.title,
        "verdicts": VERDICTS,
        "whisker": _whisker,
        "words": headline,
    }
    rows = fidelity.fidelity(results)
    return environment.get_template("report.html.j2").render(
        fidelity=rows,
        fidelity_sentence=fidelity.sentence(results, rows),
        reconstruction=list(reconstruction.reconstruction(results)),
        variants=list(variants.variants(results)),
        results=results,
        heat_maps=_heat_maps(results),
        remedies=list(_remedies(results)),
        tasks=list(results.by_task()),
        panel_size=(WIDTH, HEIGHT),
    )


def _heat_maps(results: Results) -> dict[str, list[HeatMap]]:
    made: dict[str, list[HeatMap]] = {}
    for setting in dict.fromkeys(group.setting for group in results.groups):
        transfers = [transfer for transfer in results.rows if transfer.group.setting == setting]
        by_cell = {(t.group.id, t.control.budget, t.key): t for t in results.rows if t.group.setting == setting}
        joint = [group for group in results.groups if group.setting == setting and group.role == "joint"]
        parts = {_part(transfer.key) for transfer in transfers}
        made[setting] = []
        for part in sorted(parts, key=lambda part: (part[0] != JOINT, part)):
            columns = sorted({t.key for t in transfers if _part(t.key) == part}, key=key_order)
            queries = tuple((query, len(found)) for query, found in _by_query(columns))
            rows = []
            for group in joint:
                for budget, name in BUDGETS.items():
                    cells = tuple(by_cell.get((group.id, budget, key)) for key in columns)
                    if any(cells):
                        rows.append((group, name, cells))
                    elif budget == "steps" and not group.ok and part in _asked(results, group.task):
                        rows.append((group, name, ()))
            made[setting].append(HeatMap(_heading(*part), queries, tuple(columns), tuple(rows)))
    return made


def _by_query(keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Metrics, already in order, by what was asked."""
    return [(query, list(found)) for query, found in itertools.groupby(keys, lambda key: split_key(key)[0])]


def _part(key: str) -> tuple[str, bool]:
    """The heat map that a metric stands in: what is generated, and whether part of it is given."""
    query = split_key(key)[0]
    return modality(query), ":" in given(query)


def _heading(target: str, in_part: bool) -> str:
    if target == JOINT:
        return "All modalities jointly"
    return f"Filling in what is hidden of {target}" if in_part else f"Generating {target}"


def _asked(results: Results, task: str) -> set[tuple[str, bool]]:
    """The heat maps of a task's other models, to place a model that has nothing to show."""
    return {_part(key) for group in results.groups if group.task == task for key in group.keys}


def _remedies(results: Results) -> Iterator[Remedies]:
    for setting, task, groups in results.by_task():
        joint = tuple(group for group in groups if group.role == "joint")
        if len(joint) < 2:
            continue
        rows = tuple(
            (key, tuple(results.compared(group, joint[0], key) for group in joint[1:]))
            for key in headline.keys(joint)
            if results.direction(key) and split_key(key)[0] != REAL
        )
        yield Remedies(setting, task, joint, rows)


def _controls_elsewhere(results: Results, groups: Sequence[Group]) -> dict[str, Group]:
    """The controls that a task's joint models are compared with but that were trained under another task, by metric."""
    ids = {group.id for group in groups}
    return {t.key: t.control for t in results.transfers if t.group.id in ids and t.control.id not in ids}


def _floor(results: Results, groups: Sequence[Group], key: str) -> str:
    """What held-out real data score on the metric, if it was measured: the mean over the task's cells."""
    query, metric = split_key(key)
    if query == REAL or results.direction(key) is None:
        return ""
    found = [summary for group in groups if (summary := group.summary(f"{REAL}/{metric}"))]
    return text.number(sum(s.mean * s.count for s in found) / sum(s.count for s in found)) if found else ""


def _panels(groups: Sequence[Group], term: str) -> list[Panel]:
    return [made for group in groups if (made := panel(group, term))]


def _front(results: Results) -> list[dict[str, object]]:
    """The picture that the page opens with, if there is one: joint samples of the first joint model."""
    joint = [group for group in results.groups if group.role == "joint"]
    leading = [group for group in joint if group.method == results.lead] or joint
    return [picture for picture in _figures(leading) if picture["figure"].name == "joint"][:1]  # type: ignore[attr-defined]


def _figures(groups: Sequence[Group]) -> list[dict[str, object]]:
    """Pictures with their size on the page, a whole multiple of their own where there is room."""
    made = []
    for group in groups:
        for cell in group.ok:
            for figure in cell.figures:
                width, height = figure.size
                factor = max(_PICTURE // max(width, 1), 1)
                shown = {"width": factor * width, "height": factor * height}
                made.append({"group": group, "seed": cell.seed, "figure": figure, **shown})
    return made


def _whisker(comparison: Comparison) -> Whisker | None:
    if not comparison.relative:
        return None
    return whisker(comparison.low, comparison.effect, comparison.high)


def _shade(comparison: Comparison | None) -> str:
    """The class of a heat map's cell: the depth of colour says how large, and only a verdict has a colour."""
    if comparison is None or comparison.verdict in ("free", "undecided"):
        return "none" if comparison is None else comparison.verdict
    depth = 1 if not comparison.relative else sum(abs(comparison.effect) >= step for step in _STEPS)
    return f"{comparison.verdict} {comparison.verdict}-{depth}"
