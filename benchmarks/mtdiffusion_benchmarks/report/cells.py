"""Reading a benchmark's folder: its profile and its cells, checked, in an order of their own."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from attrs import field, frozen
from attrs.validators import in_, matches_re
from cattrs import Converter, transform_error

from mtdiffusion_benchmarks.report.statistics import Direction
from mtdiffusion_benchmarks.stored import expanded
from mtdiffusion_registry import UserError

SCHEMA = 1
T = TypeVar("T")
Budget = Literal["steps", "flops", "seconds"]


@frozen
class Match:
    """To what a cell's steps were matched; see ``mtdiffusion_benchmarks.budget.Match``."""

    joint: str
    joint_steps: int
    steps: int


@frozen
class Cost:
    """What a cell cost; see ``mtdiffusion_benchmarks.interfaces.Cost``. Older results lack the last three."""

    steps: int
    batch_size: int
    parameters: int
    train_seconds: float
    seconds_per_step: float
    flops_per_step: float
    evaluate_seconds: float = 0.0
    budget: Budget = "steps"
    matched: Match | None = None
    trained_as: str | None = None


@frozen
class Sound:
    """A file that a browser plays: its media type and its content, base64."""

    type: str = field(validator=matches_re(r"audio/[\w.+-]+"))
    data: str = field(validator=matches_re(r"[A-Za-z0-9+/]+={0,2}"))


@frozen
class Figure:
    """A small PNG, base64: a row for each of ``columns``, which name what is shown, and a sample a column; and the
    sounds of each row, of its first samples, if any is heard."""

    name: str
    title: str
    png: str
    kind: str = ""
    columns: tuple[str, ...] = ()
    sounds: tuple[tuple[Sound, ...], ...] = ()

    @property
    def heard(self) -> list[tuple[str, tuple[Sound, ...]]]:
        """The rows that are heard, by what they show."""
        return [(name, sounds) for name, sounds in zip(self.columns, self.sounds, strict=False) if sounds]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels.

        Raises:
            ValueError: if it is no PNG.
        """
        try:
            head = base64.b64decode(self.png, validate=True)[:24]
        except binascii.Error:
            head = b""
        if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
            raise ValueError("expected a PNG in base64")
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@frozen
class Cell:
    """One trained and measured method; of one that is not "ok", nothing but status, reason and curve counts. Older
    results have no ``plugins``."""

    schema: int
    setting: str
    task: str
    method: str
    seed: int
    role: Literal["joint", "control", "baseline"]
    status: Literal["ok", "diverged", "failed"]
    title: str = ""
    reason: str | None = None
    config: dict[str, Any] = field(factory=dict)
    code: dict[str, Any] = field(factory=dict)
    plugins: dict[str, dict[str, str]] = field(factory=dict)
    hardware: dict[str, Any] = field(factory=dict)
    cost: Cost | None = None
    metrics: dict[str, float] = field(factory=dict)
    directions: dict[str, Direction] = field(factory=dict)
    curve: tuple[dict[str, float], ...] = ()
    figures: tuple[Figure, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.setting}/{self.task}/{self.method}/{self.seed}"


@frozen
class Entry:
    """A setting, task or method as the profile calls it."""

    title: str = ""
    paper: str | None = None
    role: str = field(default="baseline", validator=in_(("joint", "control", "baseline")))
    budget: Budget = "steps"


@frozen
class Profile:
    """What was asked for; the order of settings, tasks and methods is that of the report."""

    title: str
    description: str = ""
    name: str = ""
    settings: dict[str, Entry] = field(factory=dict)
    tasks: dict[str, Entry] = field(factory=dict)
    methods: dict[str, Entry] = field(factory=dict)
    table: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()


def load(folder: Path) -> tuple[Profile, list[Cell]]:
    """The profile and all cells of a folder, in the order of settings, tasks, methods and seeds.

    Raises:
        UserError: if a file is missing, damaged, of another schema or not as expected, or if two are of one cell, or
            disagree on a metric's direction.
    """
    path = folder / "profile.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the folder of a benchmark, with profile.json and cells/*.json")
    profile = _structure(_read(path), Profile, path)
    found: dict[str, tuple[Cell, Path]] = {}
    directions: dict[str, Direction] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = _cell(path)
        if cell.id in found:
            raise UserError(f"{path}: holds the result of {cell.id}, as {found[cell.id][1]} does; remove one of them")
        found[cell.id] = (cell, path)
        for metric, direction in cell.directions.items():
            if directions.setdefault(metric, direction) != direction:
                raise UserError(
                    f"{path}: says that {metric!r} is better {direction}, other cells {directions[metric]}; "
                    "they were made by different versions: run the cells again with one"
                )
    if not found:
        raise UserError(f"{folder / 'cells'}: no results there; run the benchmark first")

    def place(names: Mapping[str, Entry], name: str) -> tuple[int, str]:
        return (list(names).index(name) if name in names else len(names), name)

    def order(cell: Cell) -> tuple[Any, ...]:
        return (
            place(profile.settings, cell.setting),
            place(profile.tasks, cell.task),
            place(profile.methods, cell.method),
            cell.seed,
        )

    return profile, sorted((cell for cell, _ in found.values()), key=order)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); remove it and run its cell again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, found {type(value).__name__}; remove it and run its cell again")
    return value


def _cell(path: Path) -> Cell:
    value = _read(path)
    if value.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema {value.get('schema')!r}, this version reads {SCHEMA}; "
            "make the report with the version that made the result, or run the cell again"
        )
    if value.get("status") in ("diverged", "failed"):
        # Numbers of a broken run must never reach a table.
        value = value | {"metrics": {}, "figures": [], "cost": None}
    try:
        value = expanded(value)
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(f"{path}: is damaged ({error}); remove it and run its cell again") from None
    cell = _structure(value, Cell, path)
    for figure in cell.figures:
        try:
            _ = figure.size
        except ValueError as error:
            raise UserError(f"{path}: figure {figure.name!r}: {error}; remove it and run its cell again") from None
    return cell


def _structure(value: Mapping[str, Any], to: type[T], path: Path) -> T:
    try:
        return Converter().structure(value, to)
    except Exception as error:
        told = "; ".join(transform_error(error, path="file"))
        raise UserError(f"{path}: not as expected: {told}; remove it and run its cell again") from None
