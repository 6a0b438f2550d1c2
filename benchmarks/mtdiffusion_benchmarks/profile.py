"""Profiles: a file that says which cells there are, and where each profile that ships lies."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from attrs import evolve, field, frozen
from attrs.validators import in_, min_len

from mtdiffusion_engine.experiment import Experiment, resolved, structure_experiment, with_precision
from mtdiffusion_registry import MethodConfig, Registry, TaskConfig, UserError
from mtdiffusion_registry.config import apply_overrides, load_toml, structure, unstructure

Budget = Literal["steps", "flops", "seconds"]

SHIPPED = Path(__file__).parent / "profiles"
_NAME = re.compile(r"[A-Za-z0-9+.-]+(_[A-Za-z0-9+.-]+)*")  # single underscores: two divide the parts of a file's name


@frozen
class Setting:
    """Data with all their modalities, the backbone and the budget.

    Attributes:
        config: the experiment's file, beside the profile.
        title: what reports call it.
        set: ``table.key=value`` changes to it.
    """

    config: str
    title: str = ""
    set: tuple[str, ...] = ()


@frozen
class Task:
    """A task by name.

    Attributes:
        task: what is asked.
        title: what reports call it.
        paper: what of Chen et al. 2024 it corresponds to.
    """

    task: TaskConfig
    title: str = ""
    paper: str | None = None


@frozen
class Method:
    """A method by name.

    Attributes:
        method: what is trained.
        title: what reports call it.
        set: ``table.key=value`` changes to the experiment that it is given.
        budget: what its training costs as much of as the task's joint model's: optimizer "steps" (the experiment's
            own); or, with as many steps as that takes, floating-point operations ("flops", counted) or "seconds"
            (measured on the machine before the cell is trained).
        trained_as: another method whose trained model this one is, sampled otherwise: that one's changes are made, too,
            and ``set`` may name keys under sampling and evaluation alone. None: its own.
    """

    method: MethodConfig
    title: str = ""
    set: tuple[str, ...] = ()
    budget: Budget = field(default="steps", validator=in_(get_args(Budget)))
    trained_as: str | None = None


@frozen
class Block:
    """A part of the matrix: every task with every method.

    Attributes:
        settings, tasks, methods: their names.
        seeds: None: the profile's.
    """

    settings: tuple[str, ...] = field(validator=min_len(1))
    tasks: tuple[str, ...] = field(validator=min_len(1))
    methods: tuple[str, ...] = field(validator=min_len(1))
    seeds: tuple[int, ...] | None = None


@frozen
class Profile:
    """A benchmark's file.

    Attributes:
        title, description: for the report.
        settings, tasks, methods: the axes, by name.
        run: the parts of the matrix that are run, in this order.
        seeds: of initialisation, data order, noise and evaluation.
        set: changes to the experiment in every cell.
        figures: how many samples a figure shows; 0: none. Figures are made for the first seed.
        bound: measure the variational bound too (``joint/bound_bits_per_dim``), of methods that have one.
        table: metrics that are the columns of this benchmark's table in the documents; none: it has no table there.
    """

    title: str
    settings: dict[str, Setting]
    tasks: dict[str, Task]
    methods: dict[str, Method]
    run: tuple[Block, ...] = field(validator=min_len(1))
    description: str = ""
    seeds: tuple[int, ...] = field(default=(0, 1, 2), validator=min_len(1))
    set: tuple[str, ...] = ()
    figures: int = 10
    bound: bool = False
    table: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        axes: dict[str, Mapping[str, Any]] = {
            "settings": self.settings,
            "tasks": self.tasks,
            "methods": self.methods,
        }
        for axis, entries in axes.items():
            for name in entries:
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{axis}: {name!r} cannot be a name; expected letters, digits, + - . and single _")
            for number, block in enumerate(self.run):
                for name in getattr(block, axis):
                    if name not in entries:
                        raise ValueError(f"run[{number}].{axis}: no {name!r}; there are {', '.join(entries)}")
        for name, entry in self.methods.items():
            self._check_trained_as(name, entry)

    def _check_trained_as(self, name: str, entry: Method) -> None:
        if entry.trained_as is None:
            return
        other = self.methods.get(entry.trained_as)
        if other is None or other.trained_as is not None:
            own = ", ".join(known for known, each in self.methods.items() if each.trained_as is None)
            raise ValueError(
                f"methods.{name}.trained_as: expected a method that is trained itself (there are {own}), found "
                f"{entry.trained_as!r}"
            )
        if entry.budget != "steps":
            raise ValueError(f"methods.{name}.budget: it is that of {entry.trained_as}, whose trained model it is")
        for change in entry.set:
            if not change.strip().startswith(("sampling.", "evaluation.")):
                raise ValueError(
                    f"methods.{name}.set: expected keys under sampling and evaluation, since the model is that of "
                    f"{entry.trained_as}, found {change!r}"
                )

    def method(self, name: str) -> Method:
        """A method with all that it inherits: of the one whose trained model it is, the changes and the budget."""
        entry = self.methods[name]
        if entry.trained_as is None:
            return entry
        other = self.methods[entry.trained_as]
        return evolve(entry, set=(*other.set, *entry.set), budget=other.budget)


@frozen
class Cell:
    """One entry of the matrix."""

    setting: str
    task: str
    method: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.setting}/{self.task}/{self.method}/{self.seed}"

    @property
    def stem(self) -> str:
        return f"{self.setting}__{self.task}__{self.method}__{self.seed}"


def shipped() -> dict[str, Path]:
    """The profiles that ship with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def load_profile(name: str, registry: Registry) -> tuple[Profile, Path]:
    """A profile that ships, or a file; and where it lies.

    Raises:
        UserError: if there is no such profile, or for whatever is wrong with it.
    """
    path = shipped().get(name, Path(name))
    if not path.is_file():
        raise UserError(f"{name}: no such profile or file; there are {', '.join(shipped())}")
    return structure(registry, load_toml(path), Profile, str(path)), path


_SEEDS = ("training.seed", "evaluation.seed")
"""Keys that are each cell's own seed."""


def with_changes(profile: Profile, changes: Sequence[str], cells: Sequence[Cell]) -> Profile:
    """The profile with ``table.key=value`` changes to the experiment in every cell, after its own.

    Args:
        cells: which are to be run.

    Raises:
        UserError: if one of them would not follow a change: keys that its task or method sets, and the seeds.
    """
    owners = dict.fromkeys(_SEEDS, "every cell")
    for name in dict.fromkeys(cell.task for cell in cells):
        owners |= dict.fromkeys(_keys(profile.tasks[name].task.training()), f"the task {name}")
    for name in dict.fromkeys(cell.method for cell in cells):
        owners |= {change.partition("=")[0].strip(): f"the method {name}" for change in profile.method(name).set}
    for change in changes:
        key = change.partition("=")[0].strip()
        for owned, owner in owners.items():
            # One may be within the other: a table and a key of it.
            if f"{owned}.".startswith(f"{key}.") or f"{key}.".startswith(f"{owned}."):
                remedy = "give --seeds" if key in _SEEDS else "change it in the profile"
                raise UserError(f'--set {change}: {owner} sets "{owned}" itself; {remedy}')
    return evolve(profile, set=(*profile.set, *changes))


def with_seeds(profile: Profile, seeds: Sequence[int]) -> Profile:
    """The profile with these seeds, also where a part of its matrix has its own; itself if there are none.

    Raises:
        UserError: if one is negative or given twice.
    """
    for seed in seeds:
        if seed < 0 or seeds.count(seed) > 1:
            raise UserError(f"--seeds {' '.join(map(str, seeds))}: expected numbers from 0, each once")
    if not seeds:
        return profile
    return evolve(profile, seeds=tuple(seeds), run=tuple(evolve(block, seeds=None) for block in profile.run))


def _keys(tables: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of nested tables, with dots between them."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def plan(profile: Profile, only: tuple[str, ...] = ()) -> list[Cell]:
    """The profile's cells in order; with ``only``, those whose id SETTING/TASK/METHOD/SEED matches one of the patterns.

    Raises:
        UserError: if a pattern matches none.
    """
    cells: dict[str, Cell] = {}
    for block in profile.run:
        for seed in profile.seeds if block.seeds is None else block.seeds:
            for setting in block.settings:
                for task in block.tasks:
                    for method in block.methods:
                        cell = Cell(setting, task, method, seed)
                        cells.setdefault(cell.id, cell)
    chosen = [cell for cell in cells.values() if not only or any(fnmatch.fnmatchcase(cell.id, p) for p in only)]
    for pattern in only:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in cells):
            raise UserError(f"--only {pattern}: matches no cell; cells read as {next(iter(cells))} does")
    return chosen


def base_experiment(profile: Profile, setting: str, folder: Path, registry: Registry) -> Experiment:
    """A setting's experiment with all its modalities. ``folder``: where the profile lies.

    Raises:
        UserError: for whatever is wrong with it, a kind that its ``plugins.disable`` leaves out included.
    """
    path, changes = _source(profile, setting, folder)
    return _experiment(apply_overrides(load_toml(path), changes), registry, str(path))


def cell_experiment(profile: Profile, cell: Cell, folder: Path, registry: Registry) -> Experiment:
    """The experiment of one cell: the setting's, with the task's modalities alone, and the task's, the method's and the
    seed's changes to it.

    Raises:
        UserError: if the setting lacks a modality of the task, a change does not fit, or a kind is one that the
            setting's ``plugins.disable`` leaves out.
    """
    task, method = profile.tasks[cell.task].task, profile.method(cell.method)
    path, changes = _source(profile, cell.setting, folder)
    tables = apply_overrides(load_toml(path), changes)
    known = tables.get("modalities", {})
    if missing := [name for name in task.instances() if name not in known]:
        raise UserError(
            f"{cell.id}: the setting has no modality named {', '.join(missing)}; it has {', '.join(known)} ({path})"
        )
    tables["modalities"] = {name: known[name] for name in task.instances()}
    for table, key in (("loss", "readout"), ("sampling", "path")):
        if key in tables.get(table, {}):
            tables[table][key] = said_of(tables[table][key], task.instances())
    tables = _merged(tables, task.training())
    own = [*method.set, f"training.seed={cell.seed}", f"evaluation.seed={cell.seed}"]
    return _experiment(apply_overrides(tables, own), registry, f"{cell.id} ({path})")


def _experiment(tables: dict[str, Any], registry: Registry, source: str) -> Experiment:
    """In float32 where a setting does not say a precision: one table's results are of one, on whatever machines."""
    return with_precision(structure_experiment(tables, registry, source), native=False)


def said_of(value: Any, names: Collection[str]) -> Any:
    """A setting for these modalities alone: of a table by modality, what is said of the others is left out."""
    if not isinstance(value, Mapping):
        return value
    return {name: each for name, each in value.items() if name in names}


def _source(profile: Profile, setting: str, folder: Path) -> tuple[Path, list[str]]:
    entry = profile.settings[setting]
    return folder / entry.config, [*entry.set, *profile.set]


def _merged(tables: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tables)
    for key, value in changes.items():
        merged[key] = _merged(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def description(profile: Profile, cell: Cell, experiment: Experiment, registry: Registry) -> dict[str, Any]:
    """All that a cell's result depends on, as tables for JSON."""
    tables = resolved(experiment, registry)
    for key, usual in (("compile", False), ("precision", "float32")):
        if tables["sampling"][key] == usual:
            del tables["sampling"][key]  # fingerprints of results from before there was the key stay what they were
    return {
        "experiment": tables,
        "task": unstructure(registry, profile.tasks[cell.task].task),
        "method": unstructure(registry, profile.methods[cell.method].method),
    }


def fingerprint(described: Mapping[str, Any]) -> str:
    """A short hash of :func:`description`."""
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
