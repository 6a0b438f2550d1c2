"""What an evaluation measures, by the names that its results go by, and what of it is kept when it is interrupted.

A *group* is what stands before the slash of a metric's key: ``label|image``, ``image|label+mask``, ``image|image:part``
(filled holes), ``joint``, ``real``; and ``bound``, whose one metric stands in the group ``joint``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from attrs import frozen

from mtdiffusion_engine.checkpoint import read_json, write_json
from mtdiffusion_engine.judging import Metrics
from mtdiffusion_registry import UserError
from mtdiffusion_registry.errors import did_you_mean

PART = ":part"
"""Of a modality that is given in part, as its name is written on the right of a bar."""


@frozen
class Measure:
    """A part of an evaluation, done at once and kept when it is done.

    Attributes:
        name: what a person is told it is. What it draws follows from its name and the seed alone, so that none changes
            another's numbers.
        kind: "given" something whole, or "part" of the one target itself.
        targets, observed: what is judged, and what is given; () where that is nothing in particular.
    """

    name: str
    kind: Literal["real", "given", "part", "joint", "bound"]
    targets: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()


def groups(names: Sequence[str], spatial: Sequence[bool]) -> list[str]:
    """What is measured where nothing is chosen: each modality given every other, given all others and, if it is
    spatial, given a part of itself; real data, joint samples and the bound."""
    subsets: list[tuple[str, ...]] = [(name,) for name in names] if len(names) > 1 else []
    if len(names) > 2:
        subsets += [tuple(other for other in names if other != name) for name in names]
    given = [f"{name}|{'+'.join(observed)}" for observed in subsets for name in names if name not in observed]
    parts = [f"{name}|{name}{PART}" for name, has in zip(names, spatial, strict=True) if has]
    return ["real", *given, *parts, "joint", "bound"]


def plan(
    names: Sequence[str],
    spatial: Sequence[bool],
    chosen: Sequence[str] | None = None,
    *,
    joint_draws: int = 1,
    bound: bool = True,
) -> list[Measure]:
    """What is to be measured, in this order.

    Args:
        names, spatial: of the model's modalities.
        chosen: groups; any modality may be given any others. None: :func:`groups`.
        joint_draws: how many times joint samples are drawn.
        bound: whether the bound can be measured at all.

    Raises:
        UserError: if a group that was chosen is none; the message says what there is.
    """
    possible = groups(names, spatial)
    if chosen is None:
        wanted = possible
    else:
        wanted = list(dict.fromkeys(_group(text, names, possible) for text in chosen))
        if "bound" in wanted and not bound:
            raise UserError(
                'evaluation.conditionals: found "bound", but evaluation.bound_times is 0; expected at least 1 there'
            )
    given: dict[str, list[str]] = {}
    parts = []
    for group in wanted:
        target, bar, observed = group.partition("|")
        if observed.endswith(PART):
            parts.append(Measure(f"given a part of {target}", "part", (target,), (target,)))
        elif bar:
            given.setdefault(observed, []).append(target)
    measures = [Measure("real data", "real")] if "real" in wanted else []
    for observed, targets in given.items():
        measures.append(Measure(f"given {observed}", "given", tuple(targets), tuple(observed.split("+"))))
    measures += parts
    if "joint" in wanted:
        measures += [Measure(f"joint samples, draw {draw}", "joint") for draw in range(1, joint_draws + 1)]
    if "bound" in wanted and bound:
        measures.append(Measure("the bound", "bound"))
    return measures


def _group(text: str, names: Sequence[str], possible: Sequence[str]) -> str:
    """A group as its metrics' keys write it: what is given in the order of the modalities.

    Raises:
        UserError: if it is none.
    """
    group = text.replace(" ", "")
    target, bar, observed = group.partition("|")
    given = observed.split("+")
    if group in possible:
        return group
    if bar and target in names and set(given) <= set(names) - {target}:
        return f"{target}|{'+'.join(name for name in names if name in given)}"
    unknown = [name for name in (target, *given) if name.removesuffix(PART) not in names] if bar else []
    which = f": no modality is named {' or '.join(unknown)}{did_you_mean(unknown[0], names)}" if unknown else ""
    raise UserError(
        f'evaluation.conditionals: cannot measure "{text}"{which or did_you_mean(group, possible)} (there are '
        f"{', '.join(possible)}; and any modality given some others, as TARGET|GIVEN+GIVEN, of {', '.join(names)})"
    )


class Kept:
    """What an evaluation has measured so far, in a file from which one that was interrupted goes on.

    Args:
        path: where to; None: nowhere.

    Attributes:
        done: the metrics of each measure that is done, by its name.
        missing: names of the others.
        directions: which way metrics are better, what tells most first
            (:func:`mtdiffusion_engine.metrics.directions_of`).
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.done: dict[str, Metrics] = {}
        self.missing: list[str] = []
        self.directions: dict[str, str] = {}
        self._fingerprint = ""

    def begin(self, measures: Sequence[Measure], fingerprint: str = "") -> bool:
        """Take up what the file holds of the same measures, if its fingerprint, of all that results depend on, is this.

        Returns:
            Whether the file is of another evaluation, and will be replaced.
        """
        names = [measure.name for measure in measures]
        self._fingerprint, self.missing = fingerprint, names
        if self.path is None or not self.path.is_file():
            return False
        try:
            stored = read_json(self.path)
            if stored["fingerprint"] != fingerprint:
                return True
            done = {name: _with_nan(stored["done"][name]) for name in names if name in stored["done"]}
            directions = dict(stored["directions"])
        except (UserError, KeyError, TypeError, ValueError, AttributeError):  # damaged: it is made again
            return True
        self.directions = directions
        self.done, self.missing = done, [name for name in names if name not in done]
        return False

    def add(self, name: str, metrics: Metrics) -> None:
        """Keep what was measured; the file is written whole or not at all."""
        self.done[name] = metrics
        self.missing = [other for other in self.missing if other != name]
        if self.path is not None:
            told = {key: {name: _or_none(x) for name, x in found.items()} for key, found in self.done.items()}
            stored = {
                "partial": True,
                "missing": self.missing,
                "fingerprint": self._fingerprint,
                "directions": self.directions,
                "done": told,
            }
            write_json(self.path, stored, sort_keys=False)

    def remove(self) -> None:
        """Remove the file: all was measured, and is written elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _or_none(value: float) -> float | None:
    """JSON has no NaN, nor infinity; both are undefined here."""
    return value if math.isfinite(value) else None


def _with_nan(metrics: dict[str, float | None]) -> Metrics:
    return {name: math.nan if value is None else value for name, value in metrics.items()}
