"""Running cells: train, ask, measure, write one JSON a cell. Interrupted anywhere, it goes on where it stopped.

Several processes, or several machines that share a folder, may run one profile into one folder at the same time: each
cell is locked while it runs. Folders of different machines are merged by copying their ``cells`` together.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, evolve, frozen
from torch import Tensor

from mtdiffusion import Modality
from mtdiffusion_benchmarks.budget import Match, joint_of, match, with_steps
from mtdiffusion_benchmarks.figures import figures_of
from mtdiffusion_benchmarks.interfaces import Diverged, Fitted, Problem
from mtdiffusion_benchmarks.profile import Cell, Profile, base_experiment, cell_experiment, description, fingerprint
from mtdiffusion_benchmarks.provenance import Plugins, code_hash, differences
from mtdiffusion_benchmarks.stored import write_cell
from mtdiffusion_engine.checkpoint import read_json, write_json
from mtdiffusion_engine.data import derive_seed, load_data
from mtdiffusion_engine.evaluation import complete_samples
from mtdiffusion_engine.experiment import EvaluationConfig, Experiment, build_model, origins
from mtdiffusion_engine.judging import (
    Metrics,
    build_evaluators,
    check_evaluators,
    defined,
    judge_joint,
    judge_real,
    judge_target,
)
from mtdiffusion_engine.metrics import directions_of
from mtdiffusion_engine.subsets import random_holes
from mtdiffusion_registry import Evaluator, Query, Registry, UserError
from mtdiffusion_registry.pace import SELDOM, Pace

SCHEMA = 1


@frozen(eq=False)
class Held:
    """A setting in memory: its held-out data with every modality, and its judges, which are the same for all of its
    cells."""

    test: dict[str, Tensor]
    evaluators: list[Evaluator]


class Runner:
    """Runs a profile's cells into a folder.

    Args:
        source: the folder that the profile's file lies in.
        out: where results go: ``cells/*.json``, ``profile.json``, and checkpoints in ``runs/`` until a cell is done.
        keep_runs: keep the checkpoints of finished cells, too.
        keep_changed: keep finished cells whose plugins are of another version or code by now, too; otherwise they are
            made again.

    Attributes:
        statuses: by the ids of the cells that were run: "ok", "diverged", "failed" or "elsewhere".

    Raises:
        UserError: if the folder holds results of another profile.
    """

    def __init__(
        self,
        profile: Profile,
        source: Path,
        out: Path,
        registry: Registry,
        *,
        device: str = "cpu",
        keep_runs: bool = False,
        keep_changed: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.profile, self.source, self.out, self.registry = profile, source, out, registry
        self.device, self.keep_runs, self.keep_changed, self.say = device, keep_runs, keep_changed, say
        self.statuses: dict[str, str] = {}
        self._held: dict[str, Held] = {}
        self._cells: tuple[Cell, ...] = ()
        self._left: set[Cell] = set()
        self._known: dict[Cell, Plugins] = {}
        self._code: dict[tuple[str, str], str] = {}

    def run(self, cells: Sequence[Cell]) -> dict[str, int]:
        """Run what is not done yet. Torch is set to flush denormal numbers, as the engine's trainer does.

        Returns:
            How many cells are "ok", "diverged", "failed", and how many were left to another process ("elsewhere").
        """
        self._cells = tuple(cells)
        torch.set_flush_denormal(True)  # for methods with a loop of their own, and before the judges' first tensor
        finished = self._check(cells)
        self._left = {cell for cell in cells if cell not in finished}
        (self.out / "cells").mkdir(parents=True, exist_ok=True)
        write_json(self.out / "profile.json", summary(self.profile, cells, self.out), sort_keys=False)
        self.statuses = {}
        pace, made = Pace("all cells", len(self._left), self.say, every=0), 0
        for number, cell in enumerate(cells, 1):
            if cell in finished and self._unneeded(cell).is_file():
                self._remove_run(cell)  # the process that finished the cell was killed before it had
            state = finished.get(cell) or self._finish(cell, f"[{number}/{len(cells)}] {cell.id}")
            if cell not in finished:
                made += 1
                pace.tell(made)
            self._left.discard(cell)
            self.statuses[cell.id] = state
        return dict(Counter(self.statuses.values()))

    def state(self, cell: Cell) -> str:
        """What there is of a cell: "ok", "diverged", "failed", "to do", "damaged", or "other" where the result is of
        another configuration. What failed is run again, whatever its configuration was; and where a plugin of the cell
        is not installed, nobody can tell of which configuration a result is."""
        path = self._path(cell)
        if not path.is_file():
            return "to do"
        try:
            result = read_json(path)
        except UserError:
            return "damaged"
        status = str(result.get("status"))
        if status != "failed":
            with suppress(UserError):
                return status if result.get("fingerprint") == fingerprint(self._describe(cell)) else "other"
        return status

    def _finish(self, cell: Cell, told: str) -> str:
        """Run a cell that was not done when we looked; its status, or "elsewhere" if another process runs it."""
        with ExitStack() as locks:
            # Of a cell that samples another's model that one, too: both work in its folder.
            for stem in dict.fromkeys((cell.stem, self._trained(cell).stem)):
                if not locks.enter_context(_locked(self.out / "locks" / f"{stem}.lock")):
                    return "elsewhere"
            result = self._result(cell)  # another process may have done it since
            if result is None:
                self.say(told)
                result = self._run(cell)
                if not self.keep_runs:
                    self._unneeded(cell).parent.mkdir(exist_ok=True)
                    self._unneeded(cell).touch()
                write_cell(self._path(cell), result)
                self._left.discard(cell)
                self._remove_run(cell)
                self.say(f"{told}: {_told(result)}")
            return str(result["status"])

    def _trained(self, cell: Cell) -> Cell:
        """The cell whose trained model it is: its own, or that of the method that it is trained as."""
        return evolve(cell, method=self.profile.methods[cell.method].trained_as or cell.method)

    def _path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.stem}.json"

    def _result(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result if it is there and need not be made again.

        Raises:
            UserError: if it is of another configuration.
        """
        result = self._stored(cell)
        return None if result is None or (self._changes(cell, result) and not self.keep_changed) else result

    def _stored(self, cell: Cell, *, quiet: bool = False) -> dict[str, Any] | None:
        """The cell's result if it is there and whole; None, said unless quiet, of a damaged one: it is made again.

        Raises:
            UserError: if it is of another configuration.
        """
        path, mark = self._path(cell), fingerprint(self._describe(cell))
        if not path.is_file():
            return None
        try:
            result = read_json(path)
        except UserError as error:
            if not quiet:
                self.say(f"{error}; running the cell again")
            return None
        # A cell that failed may have been mended since: a diverged one would only diverge again.
        if result.get("status") == "failed":
            return None
        if result.get("fingerprint") != mark:
            raise UserError(
                f"{path}: holds a result of another configuration of {cell.id} (fingerprint "
                f"{result.get('fingerprint')}, asked for {mark}). Give another --out, or remove the file"
            )
        return result

    def _check(self, cells: Sequence[Cell]) -> dict[Cell, str]:
        """Every setting's and cell's configuration is sound, and is that of the result that is there, before anything
        runs.

        Returns:
            The status of those that are done; each result is read once, here.
        """
        for setting in dict.fromkeys(cell.setting for cell in cells):
            experiment = base_experiment(self.profile, setting, self.source, self.registry)
            check_evaluators(experiment.evaluation.evaluators, experiment.modalities)
        done: dict[Cell, str] = {}
        changed: dict[str, list[Cell]] = {}
        unknown = 0
        for cell in cells:
            if (result := self._stored(cell, quiet=True)) is None:
                continue
            unknown += "plugins" not in result
            changes = self._changes(cell, result)
            for plugin, told in changes.items():
                changed.setdefault(f"{plugin}: {told}", []).append(cell)
            if not changes or self.keep_changed:
                done[cell] = str(result["status"])
        if unknown:
            self.say(f"kept: {_cells(unknown)} of before the plugins were recorded, so that no change of them is seen")
        for told, of in changed.items():
            self.say(f"{told}, since {_named(of)} {'was' if len(of) == 1 else 'were'} made")
        if count := len({cell for of in changed.values() for cell in of}):
            self.say(
                f"{_cells(count)} of other plugins {'is' if count == 1 else 'are'} "
                + ("kept (--keep-changed)" if self.keep_changed else "made again (--keep-changed keeps them)")
            )
        return done

    def _changes(self, cell: Cell, result: Mapping[str, Any]) -> dict[str, str]:
        """What is another about the plugins by now; nothing of a result that does not record them."""
        before = result.get("plugins")
        return {} if before is None else differences(before, self._plugins(cell))

    def _plugins(self, cell: Cell) -> Plugins:
        """What the cell is made by: the plugins of its experiment and of all its setting's, which the judges and the
        choice of held-out samples depend on; its task and method; and those of the cells that it depends on."""
        cell = evolve(cell, seed=0)  # they are the same for every seed
        if cell in self._known:
            return self._known[cell]
        cells = {cell, self._trained(cell)}
        if self.profile.method(cell.method).budget != "steps":
            cells.add(joint_of(self.profile, cell))
        registry = self.registry
        found = origins(base_experiment(self.profile, cell.setting, self.source, registry), registry)
        for each in cells:
            found |= origins(cell_experiment(self.profile, each, self.source, registry), registry)
            for config in (self.profile.tasks[each.task].task, self.profile.methods[each.method].method):
                found[f"{config.group}.{config.kind}"] = registry.origin(config.group, config.kind)
        known = {name: {**origin, "code": self._code_of(origin)} for name, origin in sorted(found.items())}
        return self._known.setdefault(cell, known)

    def _code_of(self, origin: Mapping[str, str]) -> str:
        """The hash of the code as it was when it was first asked for: that is what runs."""
        key = (origin["distribution"], origin["module"])
        if key not in self._code:
            self._code[key] = code_hash(origin)
        return self._code[key]

    def _describe(self, cell: Cell) -> dict[str, Any]:
        experiment = cell_experiment(self.profile, cell, self.source, self.registry)
        described = description(self.profile, cell, experiment, self.registry)
        # What is not the default is added only then, so that the fingerprints of the others stay what they were.
        budget = self.profile.method(cell.method).budget
        if self.profile.bound:
            described["bound"] = True
        if (trained := self._trained(cell)) != cell:
            described["trained_as"] = self._describe(trained)
        if budget != "steps":
            described["budget"] = {"kind": budget, "joint": self._describe(joint_of(self.profile, cell))}
        return described

    def _run(self, cell: Cell) -> dict[str, Any]:
        described = self._describe(cell)
        method = self.profile.methods[cell.method]
        result: dict[str, Any] = {
            "schema": SCHEMA,
            **asdict(cell),
            "role": method.method.role,
            "title": method.title or cell.method,
            "status": "ok",
            "reason": None,
            "fingerprint": fingerprint(described),
            "config": described,
            "code": {"version": version("mtdiffusion"), "source": source_hash()},
            "plugins": self._plugins(cell),
            "hardware": hardware(self.device),
            "cost": None,
            "metrics": {},
            "directions": {},
            "curve": [],
            "figures": [],
        }
        try:
            return result | self._measure(cell)
        except Diverged as error:
            return result | {"status": "diverged", "reason": str(error)}
        except UserError as error:
            return result | {"status": "failed", "reason": str(error)}

    def _measure(self, cell: Cell) -> dict[str, Any]:
        held = self._hold(cell.setting)
        trained = self._trained(cell)
        folder = self.out / "runs" / trained.stem
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._begin(trained)
        problem = self._problem(cell, folder)
        modalities, queries = problem.modalities, problem.queries
        directions = directions_of(modalities, held.evaluators)  # before it is trained: they may contradict one another
        method = self.profile.method(cell.method)
        matched = self._matched(trained, problem) if method.budget != "steps" else None
        if matched is not None:
            problem = with_steps(problem, matched.steps)
        fitted: Fitted = method.method.fit(problem)
        experiment = problem.experiment
        started = time.monotonic()
        shown = self.profile.figures if cell.seed == self.profile.seeds[0] else 0
        metrics, figures = measure(
            fitted,
            experiment,
            modalities,
            queries,
            held,
            shown,
            bound=self.profile.bound,
            note=lambda told: self.say(f"{cell.id}: {told}"),
        )
        return {
            "cost": {
                **asdict(fitted.cost),
                "train_seconds": round(fitted.cost.train_seconds, 2),
                "seconds_per_step": round(fitted.cost.train_seconds / fitted.cost.steps, 5),
                "evaluate_seconds": round(time.monotonic() - started, 2),
                "budget": method.budget,
                "matched": None if matched is None else asdict(matched),
                "trained_as": method.trained_as,
            },
            "metrics": dict(sorted(metrics.items())),
            "directions": directions,
            "curve": fitted.curve,
            "figures": figures,
        }

    def _begin(self, trained: Cell) -> None:
        """Start with what there is of a training, unless other plugins made it: it would be neither's."""
        mark, now = self._plugins_file(trained), self._plugins(trained)
        if mark.is_file() and (changes := differences(read_json(mark), now)):
            told = "; ".join(f"{plugin}: {what}" for plugin, what in changes.items())
            self.say(f"{trained.id}: what was trained of it is of other plugins ({told}); it is trained again")
            self._forget(trained)
        write_json(mark, now)

    def _plugins_file(self, cell: Cell) -> Path:
        return self.out / "runs" / f"{cell.stem}.plugins.json"

    def _problem(self, cell: Cell, folder: Path) -> Problem:
        experiment = cell_experiment(self.profile, cell, self.source, self.registry)
        model = build_model(experiment)
        return Problem(
            experiment=experiment,
            modalities={name: model.modality(name) for name in model.names},
            queries=self.profile.tasks[cell.task].task.queries(),
            train=load_data(experiment, model, "train"),
            folder=folder,
            registry=self.registry,
            device=self.device,
            say=self.say,
        )

    def _matched(self, cell: Cell, problem: Problem) -> Match:
        """The steps of a cell that is to cost what the joint model does: chosen once, and kept until the cell is done,
        since seconds measured again would be others, and an interrupted training could not go on."""
        stored = self._budget_file(cell)
        mark = fingerprint(self._describe(cell))
        if stored.is_file():
            found = read_json(stored)
            if found["fingerprint"] == mark:
                return Match(**found["matched"])
        joint = joint_of(self.profile, cell)
        scratch = self.out / "runs" / f"{cell.stem}.probe"
        shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
        try:
            matched = match(
                self.profile.methods[cell.method].budget,
                self.profile.methods[cell.method].method,
                problem,
                self.profile.methods[joint.method].method,
                self._problem(joint, problem.folder),
                joint.method,
                scratch,
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        write_json(stored, {"fingerprint": mark, "matched": asdict(matched)})
        self.say(
            f"{cell.id}: {matched.steps} steps cost the {matched.budget} of {matched.joint_steps} of {matched.joint}"
        )
        return matched

    def _budget_file(self, cell: Cell) -> Path:
        return self.out / "runs" / f"{cell.stem}.budget.json"

    def _hold(self, setting: str) -> Held:
        if setting not in self._held:
            experiment = base_experiment(self.profile, setting, self.source, self.registry)
            model = build_model(experiment)
            config = experiment.evaluation
            test = complete_samples(load_data(experiment, model, "test"), config.limit(), config.seed)
            evaluators = build_evaluators(
                config.evaluators,
                {name: model.modality(name) for name in model.names},
                lambda: load_data(experiment, model, "train"),
                seed=config.seed,
                progress=lambda told: self.say(f"{setting}: {told}"),
            )
            self._held[setting] = Held(test, evaluators)
        return self._held[setting]

    def _remove_run(self, cell: Cell) -> None:
        """Remove what was trained, once no cell under way waits for it."""
        trained = self._trained(cell)
        sharing = [other for other in self._cells if self._trained(other) == trained]
        done = all(self._path(other).is_file() and other not in self._left for other in sharing)
        if done and not self.keep_runs:
            self._forget(trained)
            for other in sharing:
                self._unneeded(other).unlink(missing_ok=True)

    def _forget(self, trained: Cell) -> None:
        folder = self.out / "runs" / trained.stem
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.curve.json").unlink(missing_ok=True)
        self._budget_file(trained).unlink(missing_ok=True)
        self._plugins_file(trained).unlink(missing_ok=True)

    def _unneeded(self, cell: Cell) -> Path:
        """A file that says that what a cell trained can go once it has its result."""
        return self.out / "runs" / f"{cell.stem}.unneeded"


def measure(
    fitted: Fitted,
    experiment: Experiment,
    modalities: Mapping[str, Modality],
    queries: Sequence[Query],
    held: Held,
    shown: int = 0,
    *,
    bound: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Ask every query that the method answers; metrics by ``target|given/metric``, and figures of ``shown`` samples.

    With ``bound``, the variational bound too, of ``evaluation.bound_times`` terms, if the method has one. No metric is
    infinite or NaN; ``note`` is told which are undefined, and so left out, and how far the sampling is.

    Raises:
        UserError: if two evaluators, or an evaluator and a modality, give a metric of one name.
    """
    config = experiment.evaluation
    test = held.test
    count = len(next(iter(test.values())))
    size = (experiment.latent.height, experiment.latent.width)
    metrics: Metrics = {}
    figures: list[dict[str, Any]] = []
    for number, query in enumerate(queries):
        if not fitted.answers(query):
            continue
        # A stream of its own for each query: adding one changes no other's answer.
        generator = torch.Generator().manual_seed(derive_seed(config.seed, number))
        visible = None
        if query.hidden:
            # The same holes whatever the method and the seed.
            holes = torch.Generator().manual_seed(derive_seed(0, number))
            visible = random_holes(torch.full((count,), query.hidden), size, holes, query.pattern)
        pace = Pace(f"sampling, question {number + 1} of {len(queries)}", count, note, every=SELDOM)
        generated = _ask(fitted, query, test, visible, config.batch_size, generator, pace)
        if query.joint:
            metrics |= {f"joint/{name}": value for name, value in judge_joint(held.evaluators, generated).items()}
            metrics["joint/samples"] = count
        else:
            predicted = fitted.predict(query, test)
            for target in dict.fromkeys([*generated, *predicted]):
                params = predicted.get(target)
                if target in generated:
                    judged = judge_target(modalities[target], target, generated, test, held.evaluators, params)
                else:
                    judged = dict(modalities[target].predictive_metrics(predicted[target], test[target]))
                metrics |= {f"{query.key(target)}/{name}": value for name, value in judged.items()}
        if shown:
            figures += figures_of(query, generated, test, visible, modalities, shown)
    metrics |= {f"real/{name}": value for name, value in judge_real(held.evaluators, test).items()}
    if bound and config.bound_times and (bits := _bound(fitted, test, config)) is not None:
        metrics["joint/bound_bits_per_dim"] = bits
    return defined(metrics, note), figures


def _bound(fitted: Fitted, test: Mapping[str, Tensor], config: EvaluationConfig) -> float | None:
    """The mean over held-out samples; its noise is the same whatever the method is."""
    generator = torch.Generator().manual_seed(config.seed)
    parts = []
    for rows in torch.split(torch.arange(len(next(iter(test.values())))), config.batch_size):
        bits = fitted.bits_per_dim({name: x[rows] for name, x in test.items()}, config.bound_times, generator)
        if bits is None:
            return None
        parts.append(bits)
    return float(torch.cat(parts).mean())


def _ask(
    fitted: Fitted,
    query: Query,
    test: Mapping[str, Tensor],
    visible: Tensor | None,
    batch_size: int,
    generator: torch.Generator,
    pace: Pace,
) -> dict[str, Tensor]:
    count = len(next(iter(test.values())))
    parts = []
    for rows in torch.split(torch.arange(count), batch_size):
        x = {name: values[rows] for name, values in test.items()}
        parts.append(fitted.generate(query, x, None if visible is None else visible[rows], generator))
        pace.tell(int(rows[-1]) + 1)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summary(profile: Profile, cells: Sequence[Cell], out: Path) -> dict[str, Any]:
    """What the report needs to know beside the results: titles, in the profile's order, and which cells are planned."""
    before: list[str] = []
    if (out / "profile.json").is_file():
        before = read_json(out / "profile.json").get("cells", [])
    return {
        "name": profile.title,
        "title": profile.title,
        "description": profile.description,
        "seeds": list(profile.seeds),
        "settings": {name: {"title": entry.title or name} for name, entry in profile.settings.items()},
        "tasks": {name: {"title": entry.title or name, "paper": entry.paper} for name, entry in profile.tasks.items()},
        "methods": {
            name: {"title": entry.title or name, "role": entry.method.role, "budget": profile.method(name).budget}
            for name, entry in profile.methods.items()
        },
        "table": list(profile.table),
        "cells": sorted({*before, *(cell.id for cell in cells)}),
    }


def source_hash() -> str:
    """A hash of the Python sources that a result depends on (all but the report's), committed or not."""
    digest = hashlib.sha256()
    for name in (
        "mtdiffusion",
        "mtdiffusion_registry",
        "mtdiffusion_plugins",
        "mtdiffusion_engine",
        "mtdiffusion_benchmarks",
    ):
        module = __import__(name)
        folder = Path(str(module.__file__)).parent
        for path in sorted(path for path in folder.rglob("*.py") if "report" not in path.parts):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def hardware(device: str) -> dict[str, Any]:
    """On what a result was made."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock; the system gives it back when a process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"


def _named(cells: Sequence[Cell]) -> str:
    """A few cells by name."""
    more = f" and {len(cells) - 3} others" if len(cells) > 4 else ""
    return ", ".join(cell.id for cell in (cells[:3] if more else cells)) + more


def _told(result: Mapping[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason']}"
    cost = result["cost"]
    return f"ok, trained {cost['train_seconds']:.0f} s, asked {cost['evaluate_seconds']:.0f} s"
