"""An evaluation's metrics for a person: what tells most comes first, with an arrow that says which way is better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from attrs import frozen

from mtdiffusion import Modality, MultimodalDiffusion
from mtdiffusion_engine.checkpoint import read_json
from mtdiffusion_registry import Evaluator, UserError
from mtdiffusion_registry.evaluation import ARROWS

METRICS = "metrics.json"
DIRECTIONS = "metrics-directions.json"
"""Beside :data:`METRICS`, what :func:`directions_of` says of them."""
_PLAIN = str.maketrans({"↑": "(^)", "↓": "(v)", "±": "+-"})
FIRST = 2
"""Metrics of a group that stand out."""
_BOUND = {"bound_bits_per_dim": "lower"}
_LAST = ("joint", "real")
"""Groups that stand below all others, beside one another."""


def directions_of(modalities: Mapping[str, Modality], evaluators: Sequence[Evaluator]) -> dict[str, str]:
    """Which way each metric is better, by its bare name; what tells most comes first: the evaluators' metrics before
    the modalities' own, each in the order that its ``metric_directions`` has, those of several by turns.

    Raises:
        UserError: if a name is better higher for one of them and lower for another.
    """
    own = [(f"the modality {name}", modality.metric_directions) for name, modality in modalities.items()]
    # The title is what an evaluator of a configuration is called, by its place there.
    judges = [(str(getattr(each, "title", type(each).__name__)), each.metric_directions) for each in evaluators]
    found: dict[str, tuple[str, str]] = {}
    for giver, name, direction in chain(_by_turns(judges), _by_turns(own)):
        other, before = found.pop(name, (giver, direction))
        if before != direction:
            raise UserError(
                f"metric_directions: {name} is better {before} for {other} and better {direction} for {giver}; a "
                "name must mean one direction, so give one of the metrics another name"
            )
        found[name] = giver, direction  # last, as the giver to whom it matters least has it
    return {name: direction for name, (_, direction) in found.items()}


def stored_directions(run: Path, model: MultimodalDiffusion) -> dict[str, str]:
    """What an evaluation wrote of its metrics into a run's folder; the modalities' own, if it is not there or damaged.

    Raises:
        UserError: as of :func:`directions_of`.
    """
    try:
        return dict(read_json(run / DIRECTIONS))
    except (UserError, ValueError, TypeError):
        return directions_of({name: model.modality(name) for name in model.names}, [])


def _by_turns(givers: Iterable[tuple[str, Mapping[str, str]]]) -> Iterable[tuple[str, str, str]]:
    each = [[(giver, name, direction) for name, direction in stated.items()] for giver, stated in givers]
    return (one for turn in zip_longest(*each) for one in turn if one is not None)


@frozen
class Row:
    """A group's metrics as words, such as ``accuracy=0.875↑``: those that tell most, and the others."""

    group: str
    first: tuple[str, ...]
    others: tuple[str, ...]


def legend(encoding: str = "utf-8") -> str:
    """What the arrows of :func:`rows` say."""
    return _written("↑ higher is better, ↓ lower is better; what tells most comes first", encoding)


def _written(text: str, encoding: str) -> str:
    """A text with arrows, or in ASCII where an encoding has none."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN)
    return text


def rows(metrics: Mapping[str, float | int], directions: Mapping[str, str], encoding: str = "utf-8") -> list[Row]:
    """A row for each group of metrics ``GROUP/METRIC``: what is generated of what is given, then joint samples and real
    data.

    Args:
        directions: "higher" or "lower" by metric, what tells most first (:func:`directions_of`). Metrics that it lacks
            come after those it has.
        encoding: of what they are written to.
    """
    groups: dict[str, dict[str, float | int]] = {}
    for key, value in sorted(metrics.items()):
        group, _, metric = key.rpartition("/")
        groups.setdefault(group, {})[metric] = value
    known = {**directions, **_BOUND}
    ranks = {name: rank for rank, name in enumerate(known)}

    def row(group: str) -> Row:
        found = groups[group]
        spreads = {name for name in found if name.endswith("_std") and name.removesuffix("_std") in found}
        names = sorted(found.keys() - spreads, key=lambda name: (ranks.get(name, len(ranks)), _is_count(name), name))
        words = [_written(_word(name, found, known.get(name, "")), encoding) for name in names]
        shown = min(FIRST, sum(name in known for name in names))
        return Row(group, tuple(words[:shown]), tuple(words[shown:]))

    return [row(group) for group in sorted(groups, key=lambda group: (group in _LAST, group))]


def _is_count(name: str) -> bool:
    return name.rpartition("_")[2] in ("samples", "draws")


def _word(name: str, found: Mapping[str, float | int], direction: str) -> str:
    spread = f"±{found[f'{name}_std']:.2g}" if f"{name}_std" in found else ""
    value, arrow = found[name], ARROWS.get(direction, "")
    return f"{name}={value:.4g}{spread}{arrow}" if isinstance(value, float) else f"{name}={value}{arrow}"
