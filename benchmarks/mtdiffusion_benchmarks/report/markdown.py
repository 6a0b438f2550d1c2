"""The report as GitHub-flavoured Markdown: the headline and every number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from mtdiffusion_benchmarks.report import fidelity, headline, reconstruction, text, variants
from mtdiffusion_benchmarks.report.statistics import Comparison
from mtdiffusion_benchmarks.report.tables import BUDGETS, REAL, SIGNS, Counts, Group, Results, best, split_key
from mtdiffusion_registry.evaluation import ARROWS


def render(results: Results) -> str:
    """The whole document."""
    return "\n\n".join(block.strip() for block in _blocks(results)) + "\n"


def _blocks(results: Results) -> Iterator[str]:
    yield f"# {_plain(results.profile.title)}"
    if results.profile.description:
        yield _plain(results.profile.description)
    yield "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in headline.facts(results))
    yield "## Does training jointly help?"
    for sentence in headline.sentences(results):
        yield _plain(sentence)
    rows = headline.counts(results)
    if rows:
        names = ["comparisons", *SIGNS, "median effect"]
        yield _table(["", *names], ([_plain(label), *_counts(found)] for label, found in rows))
    if results.rows:
        yield "## Transfer"
        yield _plain(headline.TRANSFER)
        yield _table(
            ["setting", "task", "method", "metric", "joint", "control", "effect", "95% interval", "share", "verdict"],
            _transfer_rows(results),
        )
    yield from _reconstruction(results)
    yield from _fidelity(results)
    yield from _variants(results)
    yield "## Results by task"
    yield "Mean ± standard deviation over seeds; the best mean of a row is bold. Held-out real data stand last."
    for setting, task, groups in results.by_task():
        yield f"### {_plain(results.title('settings', setting))}: {_plain(results.title('tasks', task))}"
        yield _task_table(results, groups)
    yield "## Cost"
    yield headline.COST
    yield _table(
        ["setting", "task", "method", "parameters", "FLOPs a step", "time a step", "steps × batch", "training"],
        _cost_rows(results),
    )
    troubles = headline.troubles(results)
    if troubles:
        yield "## Diverged, failed and missing cells"
        yield _table(["cell", "status", "reason"], ([code(a), b, _plain(c)] for a, b, c in troubles))
    yield "## How to read it"
    yield "\n".join(f"- {_plain(line)}" for line in headline.reading(results))


def _counts(found: Counts) -> list[str]:
    numbers = (found.total, found.helps, found.hurts, found.free, found.undecided)
    return [*map(str, numbers), "–" if found.median is None else text.percent(found.median)]


def _transfer_rows(results: Results) -> Iterator[list[str]]:
    for transfer in results.rows:
        group, control = transfer.group, transfer.control
        names = [group.setting, group.task, group.method, transfer.key]
        values = [_summary(group, transfer.key), f"{_summary(control, transfer.key)} ({_plain(_named(control))})"]
        found = transfer.comparison
        told = ["–", "–", "–", "no seed in common"]
        if found:
            told = [
                text.effect(found),
                text.interval(found),
                text.scale(found),
                f"{SIGNS[found.verdict]} {found.verdict}",
            ]
        yield [*map(code, names), *values, *told]


def _reconstruction(results: Results) -> Iterator[str]:
    tables = list(reconstruction.reconstruction(results))
    if not tables:
        return
    yield "## Where the advantage begins"
    yield _plain(reconstruction.INTRODUCTION)
    for table in tables:
        group = table.group
        where = f"{results.title('settings', group.setting)}: {results.title('tasks', group.task)}"
        yield f"### {_plain(where)}, {_plain(table.title)} ({_plain(group.title)})"
        yield "\n".join(f"- {_plain(block.sentence)}" for block in table.blocks)
        rows = []
        for block in table.blocks:
            for row in block.rows:
                name = f"{code(block.metric)} {ARROWS[results.direction(row.key) or 'lower']}"
                against = [_against(one.group, row.key, one.comparison) for one in row.against]
                rows.append([name, f"{row.percent}%", _summary(group, row.key), *against])
        titles = [_plain(rival.title) for rival in table.rivals]
        yield _table(["metric", "hidden", _plain(group.title), *titles], rows)


def _against(group: Group, key: str, found: Comparison | None) -> str:
    """A rival's value, and what the joint model is beside it."""
    if not found:
        return _summary(group, key)
    return f"{_summary(group, key)} ({SIGNS[found.verdict]} {text.effect(found)})"


def _fidelity(results: Results) -> Iterator[str]:
    rows = fidelity.fidelity(results)
    if not rows:
        return
    yield "## Fidelity and diversity"
    if told := fidelity.sentence(results, rows):
        yield _plain(told)
    yield _plain(fidelity.INTRODUCTION)
    names = ["joint", "control", "difference", "95% interval"]
    header = ["setting", "task", "method", "asked", "control", "features"]
    header += [f"{metric} ↑, {name}" for metric in ("precision", "recall") for name in names]
    lines = []
    for row in rows:
        about = [row.group.setting, row.group.task, row.group.method, row.query, row.control.method, row.features]
        values = []
        for key, found in (row.precision, row.recall):
            values += [_summary(row.group, key), _summary(row.control, key)]
            values += [f"{SIGNS[found.verdict]} {text.effect(found)}", text.interval(found)] if found else ["–", "–"]
        lines.append([*map(code, about), *values])
    yield _table(header, lines)


def _variants(results: Results) -> Iterator[str]:
    tables = list(variants.variants(results))
    if not tables:
        return
    yield "## Joint models side by side"
    yield _plain(variants.INTRODUCTION)
    for table in tables:
        where = f"{results.title('settings', table.setting)}: {results.title('tasks', table.task)}"
        yield f"### Joint models: {_plain(where)}"
        yield variants_table(results, table, table.keys, lambda group: _plain(f"{group.title} ({group.state})"))


def variants_table(results: Results, table: variants.Table, keys: Sequence[str], name: Callable[[Group], str]) -> str:
    """The joint models of a task against their controls, by these metrics. ``name``: what a row is called, in
    Markdown."""
    header = [f"{code(key)} {ARROWS[results.direction(key) or 'lower']}" for key in keys]
    rows = []
    for variant in table.variants:
        cells = []
        for key in keys:
            found = variant.cells[key]
            mark = f"{SIGNS[found.verdict]} " if found else ""
            cells.append(f"{mark}{_summary(variant.group, key)}")
        rows.append([name(variant.group), _plain(variant.told + variant.except_for), *cells])
    for which, controls in table.controls:
        cells = [_summary(controls[key], key) if key in controls else "" for key in keys]
        rows.append([f"control, {which}", "", *cells])
    return _table(["joint model", "ties or beats the control", *header], rows)


def _named(control: Group) -> str:
    return f"{control.method}, {BUDGETS[control.budget]}" if BUDGETS[control.budget] else control.method


def _task_table(results: Results, groups: Sequence[Group]) -> str:
    rows = []
    for key in headline.keys(groups):
        leaders = best(results, groups, key)
        arrow = ARROWS.get(results.direction(key) or "", "")
        cells = [f"**{_summary(g, key)}**" if g.method in leaders else _summary(g, key) for g in groups]
        rows.append([f"{code(key)} {arrow if split_key(key)[0] != REAL else ''}".strip(), *cells])
    return _table(["metric", *(f"{_plain(group.title)} ({group.state})" for group in groups)], rows)


def _summary(group: Group, key: str) -> str:
    if not group.ok:
        return group.state
    summary = group.summary(key)
    return text.mean_std(summary) if summary else ""


def _cost_rows(results: Results) -> Iterator[list[str]]:
    for row in headline.costs(results):
        names = [code(row.group.setting), code(row.group.task), code(row.group.method)]
        yield [*names, *(f"{value} ({ratio})" if ratio else value for value, ratio in row.values)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _plain(value: str) -> str:
    """Text that Markdown takes for nothing else: no markup, no table's bar, no line's end."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(value.split()))


def code(value: str) -> str:
    """As code; a table wants bars escaped there too. A backtick would end it: such a name is written as text."""
    flat = " ".join(value.split())
    return _plain(flat) if "`" in flat else "`" + flat.replace("|", "\\|") + "`"
