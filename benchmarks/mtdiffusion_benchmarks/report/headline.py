"""What the report says in words, and the rows that both of its formats show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from attrs import frozen

from mtdiffusion_benchmarks.report import text, variants
from mtdiffusion_benchmarks.report.statistics import LEVEL, NEGLIGIBLE, Comparison
from mtdiffusion_benchmarks.report.tables import (
    BUDGETS,
    JOINT,
    REAL,
    Counts,
    Group,
    Results,
    Transfer,
    count,
    key_order,
    modality,
    split_key,
)

TRANSFER = (
    "Each joint model against the control: a model trained for that one question alone, in the same setting. Positive "
    f"is better for the joint model, whichever way the metric goes; the interval is a {LEVEL:.0%} confidence interval "
    "over seeds."
)
COST = (
    "Means over seeds. In brackets, for joint models: relative to the controls they are compared with (the least and "
    "the greatest ratio where there are several). Parameters and operations are counted, times are those measured: "
    "they depend on the machine and on what else ran on it."
)
_FEATURES = {
    "fid": "Fréchet distance between Gaussians fitted to generated and training samples (Heusel et al. 2017)",
    "kid": "kernel distance of generated to training samples, can be negative (Bińkowski et al. 2018)",
    "precision": "share of generated samples within the training samples' neighbourhoods (Kynkäänniemi et al. 2019)",
    "recall": "share of training samples within the generated samples' neighbourhoods (Kynkäänniemi et al. 2019)",
    "memorisation": "distance to the nearest training sample over that among training samples; a copy has 0",
    "lpips": "learned perceptual distance to the true picture (Zhang et al. 2018)",
}
"""Distances by the first part of a metric's name; the rest is the network whose features they are taken in."""


@frozen
class CostRow:
    """A group's parameters, FLOPs a step, time a step, steps × batch, training: each (text, ratio to its controls)."""

    group: Group
    values: tuple[tuple[str, str], ...]


def keys(groups: Sequence[Group]) -> list[str]:
    """All metrics that the groups have, in order."""
    return sorted({key for group in groups for key in group.keys}, key=key_order)


def facts(results: Results) -> list[tuple[str, str]]:
    """What was run, where, and by which code."""
    cells = results.cells
    number = {status: sum(cell.status == status for cell in cells) for status in ("ok", "diverged", "failed")}
    costs = [cell.cost for cell in cells if cell.cost]
    budgets = sorted({(cost.steps, cost.batch_size) for cost in costs if cost.budget == "steps"})
    matched = {name: sum(cost.budget == name for cost in costs) for name in BUDGETS if name != "steps"}
    # A model that is sampled in several ways was trained once.
    hours = sum((0.0 if cost.trained_as else cost.train_seconds) + cost.evaluate_seconds for cost in costs)

    def told(name: str) -> str:
        values = {str(value) for cell in cells if (value := cell.hardware.get(name)) is not None}
        return ", ".join(sorted(values))

    device = "" if told("device") == "cpu" else told("device")
    threads = f"threads: {told('threads')}" if told("threads") else ""
    machine = [told("processor"), device, threads, f"torch {told('torch')}" if told("torch") else ""]
    return [
        ("cells", ", ".join([*(f"{n} {status}" for status, n in number.items()), f"{len(results.missing)} missing"])),
        ("seeds", ", ".join(str(seed) for seed in sorted({cell.seed for cell in cells}))),
        (
            "budget",
            ", ".join(
                [f"{steps:,} steps of {size} samples" for steps, size in budgets]
                + [f"{n} cell{'s' * (n > 1)} {BUDGETS[name]}" for name, n in matched.items() if n]
            )
            or "–",
        ),
        ("time", f"{text.seconds(hours)} of training and evaluation in all"),
        ("machine", ", ".join(part for part in machine if part) or "not recorded"),
        ("code", ", ".join(_codes(results))),
    ]


def _codes(results: Results) -> list[str]:
    """Version and hash of the code of each cell, each once."""
    return sorted({f"{cell.code.get('version', '?')} ({cell.code.get('source', '?')})" for cell in results.cells})


def sentences(results: Results) -> list[str]:
    """The headline."""
    lead = [transfer for transfer in results.transfers if transfer.group.method == results.lead]
    if not lead and not any(group.role == "control" for group in results.groups):
        joint = len({group.method for group in results.groups if group.role == "joint"})
        return [f"Not asked here: there is no control. {joint} joint models are compared with one another."]
    if not lead:
        return ["There is nothing to compare: no control has a metric that a joint model has."]
    counted = count(lead)
    told = [
        f"“{lead[0].group.title}” against a control of its own for each question: over {counted.total} comparisons "
        f"(setting, task, metric) it is better in {counted.helps}, worse in {counted.hurts}, a tie in {counted.free}"
        + (f", undecided in {counted.undecided}: too few seeds to tell." if counted.undecided else ".")
    ]
    for label, other in _other_budgets(results):
        told.append(
            f"Against {label}: over {other.total} comparisons better in {other.helps}, worse in {other.hurts}, a tie "
            f"in {other.free}, undecided in {other.undecided}."
        )
    decided = counted.helps + counted.hurts + counted.free
    if decided:
        told.append(
            f"A tie means that the {LEVEL:.0%} interval contains zero, not that the two are equal: with few seeds "
            f"intervals are wide. Of {decided} intervals about {decided * (1 - LEVEL):.0f} would miss zero by chance "
            "if joint training made no difference at all; metrics of one model are not independent."
        )
    for verdict, word in (("helps", "gains"), ("hurts", "losses")):
        found = [
            (comparison, transfer)
            for transfer in lead
            if (comparison := transfer.comparison) and comparison.verdict == verdict and comparison.relative
        ]
        found.sort(key=lambda pair: (-abs(pair[0].effect), pair[1].group.id, pair[1].key))
        if found:
            told.append(f"Greatest {word}: " + "; ".join(itertools.starmap(_named, found[:3])) + ".")
    points = [
        (comparison, transfer)
        for transfer in lead
        if (comparison := transfer.comparison) and comparison.verdict == "hurts" and comparison.scale == "points"
    ]
    if points:
        points.sort(key=lambda pair: (pair[0].effect, pair[1].group.id, pair[1].key))
        told.append(
            "Where the control is nearly perfect, and no ratio means anything, greatest losses: "
            + "; ".join(itertools.starmap(_named, points[:3]))
            + "."
        )
    told += variants.sentences(results)
    if results.uncontrolled:
        told.append(f"{results.uncontrolled} metrics of joint models have no control and are not compared.")
    if len(codes := _codes(results)) > 1:
        told.append(f"The cells were made by {len(codes)} versions of the code.")
    if plugins := _plugins(results):
        told.append(plugins)
    return told


def _plugins(results: Results) -> str:
    """Which plugins are not the same in all cells, and how many cells do not tell; "" if there is nothing to say, or
    none tells."""
    telling = [cell for cell in results.cells if cell.plugins]
    found: dict[str, set[tuple[str, ...]]] = {}
    for cell in telling:
        for name, plugin in cell.plugins.items():
            found.setdefault(name, set()).add(tuple(plugin.get(key, "") for key in ("distribution", "version", "code")))
    told = [f"{name} (in {len(forms)} forms)" for name, forms in sorted(found.items()) if len(forms) > 1]
    lacking = len(results.cells) - len(telling)
    if lacking and telling:
        told.append(f"{lacking} cell{'s' * (lacking > 1)} of before plugins were recorded")
    return f"Some cells are of other plugins than others: {', '.join(told)}." if told else ""


def _named(found: Comparison, transfer: Transfer) -> str:
    group = transfer.group
    told = f"{text.effect(found)} ({text.interval(found)})"
    if found.relative and text.beyond(found.effect):
        # Such a share says only that the control leaves little to be relative to.
        summaries = (side.summary(transfer.key) for side in (group, transfer.control))
        told = " to the control's ".join(text.number(summary.mean) for summary in summaries if summary)
    return f"{transfer.key} in {group.setting}, {group.task}: {told}"


def _other_budgets(results: Results) -> Iterator[tuple[str, Counts]]:
    """The leading joint method's verdicts against controls at each other budget that there is."""
    lead = [transfer for transfer in results.matched if transfer.group.method == results.lead]
    for budget, name in BUDGETS.items():
        if found := [transfer for transfer in lead if transfer.control.budget == budget]:
            yield f"controls {name}", count(found)


def counts(results: Results) -> list[tuple[str, Counts]]:
    """The leading joint method's verdicts: all, by what is generated, by setting; and, apart, those against controls at
    another budget."""
    lead = [transfer for transfer in results.transfers if transfer.group.method == results.lead]
    if not lead:
        return []
    rows = [("all", count(lead))]
    for name in sorted({modality(split_key(t.key)[0]) for t in lead}, key=lambda name: (name == JOINT, name)):
        label = "everything jointly" if name == JOINT else f"generating {name}"
        rows.append((label, count(t for t in lead if modality(split_key(t.key)[0]) == name)))
    settings = dict.fromkeys(t.group.setting for t in lead)
    by_setting = ((name, count(t for t in lead if t.group.setting == name)) for name in settings)
    named = ((results.title("settings", name), found) for name, found in by_setting)
    return [*rows, *named, *_other_budgets(results)]


def costs(results: Results) -> Iterator[CostRow]:
    """A row a group that cost something."""
    for group in results.groups:
        if group.cost("steps") is None:
            continue
        controls = {t.control.id: t.control for t in results.transfers if t.group.id == group.id}
        values = []
        for name, write in (
            ("parameters", text.count),
            ("flops_per_step", text.count),
            ("seconds_per_step", text.seconds),
            ("steps", None),
            ("train_seconds", text.seconds),
        ):
            ours = group.cost(name)
            if write is None:
                values.append((f"{group.cost('steps'):,.0f} × {group.cost('batch_size'):,.0f}", _matched(group)))
                continue
            theirs = [value for control in controls.values() if (value := control.cost(name))]
            ratios = sorted(ours / value for value in theirs) if ours is not None else []
            values.append((write(ours), _ratio(ratios)))
        yield CostRow(group, tuple(values))


def _matched(group: Group) -> str:
    """To what its steps were matched, or whose model it samples; "" if they are the experiment's own."""
    if other := next((cell.cost.trained_as for cell in group.ok if cell.cost), None):
        return f"the model of {other}"
    found = next((cell.cost.matched for cell in group.ok if cell.cost and cell.cost.matched), None)
    unit = {"flops": "FLOPs", "seconds": "seconds"}.get(group.budget, group.budget)
    return "" if found is None else f"the {unit} of {found.joint_steps:,} steps of {found.joint}"


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    low, high = f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"
    return f"{low}×" if low == high else f"{low} to {high}×"


def troubles(results: Results) -> list[tuple[str, str, str]]:
    """Cells that gave no result: (id, status, reason)."""
    found = [(cell.id, cell.status, cell.reason or "no reason given") for cell in results.cells if cell.status != "ok"]
    return [*found, *((name, "missing", "planned, not run yet") for name in results.missing)]


def reading(results: Results) -> list[str]:
    """Definitions."""
    used = sorted({split_key(key)[1] for group in results.groups for key in group.keys})
    by_scale = {
        scale: ", ".join(metric for metric in used if metric in results.directions and results.scales[metric] == scale)
        or "none"
        for scale in ("error", "absolute")
    }
    told = [
        "A metric's name says what was asked: label|image/accuracy is the accuracy of the label generated given the "
        "image; image|image:75%box/mse is of images of which a box of 75% was hidden and filled in; joint/… is of "
        f"samples of all modalities with nothing given; {REAL}/… is of held-out real data, what a perfect model would "
        "score, and no result of any model.",
        "joint: one model for all of a task's questions. control: a model for one of them alone. "
        "baseline: anything else. Where several controls have a metric, one that is sampled alike is taken, of these "
        "the first of the profile, preferably of the same task; it is named in the table.",
        "Effect, of the error: metrics that are shares of something right, better when higher, with all values in [0, "
        f"1] ({by_scale['error']}) are compared by their errors: 1 − (1 − joint) / (1 − control). +20% is "
        "a fifth fewer errors.",
        "Effect, of the value: for all others, the difference over the control's value. +20% of an error measure is a "
        "fifth less of it.",
        "Control nearly perfect: where the control's error (for nll and ece: its value) is at most "
        f"{NEGLIGIBLE:.1%} for every seed, or smaller than its own standard deviation over seeds, "
        "a ratio to it means nothing. The difference stands then, in percentage points (of nll: in nats). Such effects "
        "are counted by their verdicts, and are in no median and not among the greatest gains and losses but for a "
        "sentence of their own.",
        f"Effect, absolute: metrics that take negative values ({by_scale['absolute']}) have no zero to be relative to; "
        "for them, and where the control is 0, the plain difference stands. The depth of its colour says nothing.",
        "Interval: Student's t over seeds, on differences paired by seed, scaled by the control's mean over the same "
        "seeds, which is taken as exact. ▲ helps: it lies above zero; ▼ hurts: below; ≈ free: zero is inside; ? "
        "undecided: there is no interval, for want of a second seed, or because the difference is the same, not zero, "
        "for every seed.",
        "Seeds that diverged or failed are in no mean; a comparison is over the seeds that both have. If a method "
        "loses seeds, what is left is its better part.",
    ]
    if any(group.budget != "steps" for group in results.groups):
        told.append(
            "At equal FLOPs, at equal seconds: trained for as many steps as cost the floating-point operations "
            "(counted) or the seconds (measured) of the joint model that the cost table names; all others have its "
            "optimizer steps. Comparisons with such controls have rows of their own, and are in no count but theirs."
        )
    told += [
        f"{metric}: {meaning}, in the features of “{metric.partition('_')[2]}”."
        if metric.partition("_")[2]
        else f"{metric}: {meaning}; the name does not say in which features."
        for metric in used
        if (meaning := _FEATURES.get(metric.partition("_")[0]))
    ]
    if any("_judge" in metric for metric in used):
        told.append(
            "judge: a small classifier trained on the setting's training split alone. Distances in its features "
            "compare methods within a setting, never with published figures, which are taken in other features."
        )
    return told
