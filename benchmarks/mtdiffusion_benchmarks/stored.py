"""A cell's result as its file holds it, in few bytes, and as everything else sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtdiffusion_registry.partial import partial_of

_DIGITS = 3  # of a point of a learning curve, which is drawn; metrics keep all of theirs


def write_cell(path: Path, result: Mapping[str, Any]) -> None:
    """Write a cell's result, whole or not at all: a line for each key, metrics by what was asked, the curve by columns
    and rounded, each sound once. :func:`expanded` is the way back."""
    metrics: dict[str, dict[str, float]] = {}
    for name, value in result["metrics"].items():
        asked, _, metric = name.rpartition("/")
        metrics.setdefault(asked, {})[metric] = value
    sounds: dict[str, int] = {}  # what is given to several questions is heard in several figures
    figures = [_with_sounds(figure, lambda data: sounds.setdefault(data, len(sounds))) for figure in result["figures"]]
    stored = {**result, "metrics": metrics, "curve": _columns(result["curve"]), "figures": figures}
    stored |= {"sounds": list(sounds)} if sounds else {}
    texts = {key: json.dumps(value, separators=(",", ":"), sort_keys=True) for key, value in sorted(stored.items())}
    lines = [f"{json.dumps(key)}:{text}" for key, text in texts.items()]
    with partial_of(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        partial.replace(path)


def _with_sounds(figure: Mapping[str, Any], change: Callable[[Any], Any]) -> Mapping[str, Any]:
    """A figure with the data of each sound changed."""
    if "sounds" not in figure:
        return figure
    return {**figure, "sounds": [[{**each, "data": change(each["data"])} for each in row] for row in figure["sounds"]]}


def _columns(curve: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    names = sorted({name for point in curve for name in point})
    return {name: [_rounded(point.get(name)) for point in curve] for name in names}


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def expanded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A result of what a file holds: metrics by ``ASKED/METRIC``, the curve as points, ``{name: value}`` each, and the
    sounds of each figure in it. What older versions wrote so stays as it is.

    Raises:
        TypeError, ValueError, LookupError: if it is damaged.
    """
    metrics, curve, sounds = stored.get("metrics", {}), stored.get("curve", []), stored.get("sounds", [])
    if isinstance(metrics, Mapping) and all(isinstance(group, Mapping) for group in metrics.values()):
        named = {(asked, name): value for asked, group in metrics.items() for name, value in group.items()}
        metrics = dict(sorted((f"{asked}/{name}" if asked else name, value) for (asked, name), value in named.items()))
    if isinstance(curve, Mapping):
        rows = zip(*curve.values(), strict=True)
        curve = [{name: each for name, each in zip(curve, row, strict=True) if each is not None} for row in rows]
    result = {**stored, "metrics": metrics, "curve": curve}
    if sounds:
        del result["sounds"]
        result["figures"] = [_with_sounds(figure, sounds.__getitem__) for figure in stored["figures"]]
    return result
