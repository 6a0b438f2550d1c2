"""What the subcommands do. Importing this module imports torch; :mod:`mtdiffusion_engine.cli` does so when it must."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from attrs import asdict, evolve
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine import packing, sampling
from mtdiffusion_engine.checks import check_held_out, check_training, doubts_of
from mtdiffusion_engine.cost import count_cost, describe_cost
from mtdiffusion_engine.data import load_data
from mtdiffusion_engine.environment import choose_device, left_alone, native_bfloat16
from mtdiffusion_engine.experiment import (
    Experiment,
    TrainingConfig,
    build_model,
    load_experiment,
    require_resumable,
    resolved,
    with_precision,
)
from mtdiffusion_engine.explaining import explain, lines_of
from mtdiffusion_engine.given import parsed
from mtdiffusion_engine.hanging import HangWatch
from mtdiffusion_engine.hub import CARD, GALLERY
from mtdiffusion_engine.interrupt import held
from mtdiffusion_engine.metrics import DIRECTIONS, METRICS, legend, rows, stored_directions
from mtdiffusion_engine.monitor import Monitor
from mtdiffusion_engine.printing import log_shown, say, screen, with_json
from mtdiffusion_engine.process_plot import draw_process
from mtdiffusion_engine.run import Run, load_run
from mtdiffusion_engine.shards import require_arrow
from mtdiffusion_engine.team import Team
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import DatasetConfig, Registry, UserError
from mtdiffusion_registry.pace import Pace, Tell, how_far
from mtdiffusion_registry.partial import partial_of

if TYPE_CHECKING:
    from mtdiffusion_engine.measures import Kept

PARTIAL = "metrics.partial.json"
"""What an evaluation has measured before it is done: it goes on from there if it is stopped."""

MANY = 10_000
"""Samples above which files are many, and what is lost when it stops is much."""


@with_json
def check_config(args: Namespace) -> dict[str, Any] | None:
    """Build everything that a configuration describes, look through its data and say what its model costs."""
    registry = Registry.discover()
    with held():
        experiment = load_experiment(args.config, args.set, registry)
    model = build_model(experiment, weightless=True)
    train = load_data(experiment, model, "train")
    check_training(train, experiment, model)
    test, warnings = check_held_out(experiment, model)
    held_out = 0 if test is None else len(test)
    warnings = [*warnings, *doubts_of(experiment, model)]
    latent = model.layout.latent
    cost = count_cost(experiment, model)
    settled = with_precision(experiment, native_bfloat16(choose_device(None)))
    explained = explain(settled, model, cost, len(train), held_out)
    if args.json:
        modalities = {
            name: {
                "kind": experiment.modalities[name].kind,
                "shape": list(model.modality(name).placeholder(1).shape[1:]),
                "code": list(model.modality(name).encoder.latent.shape),
            }
            for name in model.names
        }
        return {
            "config": str(args.config),
            "data": {"kind": experiment.data.kind, "training_samples": len(train), "held_out_samples": held_out},
            "modalities": modalities,
            "latent": list(latent.shape),
            "explained": explained,
            "resolved": resolved(experiment, registry),
            "batch_size": experiment.training.batch_size,
            "cost": {**asdict(cost), "parameters": cost.parameters, "memory": cost.memory},
            "warnings": warnings,
        }
    print(f"{args.config}: {experiment.data.kind}, {_count(len(train), 'training sample')}, {held_out:,} held out")
    for name, modality in zip(model.names, map(model.modality, model.names), strict=True):
        code = modality.encoder.latent
        shape = " × ".join(map(str, modality.placeholder(1).shape[1:])) or "one value"
        print(f"  {name} ({experiment.modalities[name].kind}): {shape}, as a code of {code.channels} channels")
    print(f"latent: {latent.channels} × {latent.height} × {latent.width}")
    for line in (*lines_of(explained), *describe_cost(cost, experiment.training)):
        print(line)
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"ready: mtdiffusion train {args.config} --out runs/{args.config.stem}")
    return None


@with_json
def plan(args: Namespace) -> dict[str, Any] | None:
    """Say what a configuration's training takes on some number of GPUs."""
    from mtdiffusion_engine import plan as planning

    device = planning.device_of(args.device, {name: getattr(args, name) for name in planning.FIGURES})
    stated = {name: value for name in planning.ASSUMED if (value := getattr(args, name)) is not None}
    assumptions = planning.assumptions_of(stated)
    registry = Registry.discover()
    with held():
        experiment = load_experiment(args.config, args.set, registry)
    made = planning.plan_training(experiment, args.gpus, device, assumptions)
    if args.json:
        return made.as_json()
    for line in planning.describe_plan(made):
        print(line)
    return None


@with_json
def plot_process(args: Namespace) -> dict[str, Any]:
    """Draw what a configuration says of noise and of clocks."""
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: expected the name of a PNG file, such as {args.out.with_suffix('.png')}")
    registry = Registry.discover()
    with held():
        experiment = load_experiment(args.config, args.set, registry)
    law_kind = experiment.clocks.kind if experiment.clocks else "shared"
    process = experiment.process
    said = f"T = {process.steps}, curve {process.curve}, retention {process.retention}"
    law = f"law of clocks: {law_kind}"
    title = {"all": f"{said}; {law}", "noise": said, "clocks": law}[args.part]
    picture = draw_process(experiment, f"{args.config.name}: {title}", args.part)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(64).save(args.out, optimize=True)
    if not args.json:
        print(f"drawn: {args.out}")
    return {
        "config": str(args.config),
        "out": str(args.out),
        "part": args.part,
        "steps": process.steps,
        "curve": process.curve,
        "retention": process.retention,
        "clocks": law_kind,
    }


@with_json
def pack_data(args: Namespace) -> dict[str, Any]:
    """Write a configuration's data set into a new folder, in the form of another kind, and say how it is read."""
    ckpt.require_free(args.out)
    registry = Registry.discover()
    with held():
        experiment = load_experiment(args.config, args.set, registry)
        packer = registry.config_class("dataset", args.packer)
    assert issubclass(packer, DatasetConfig)
    with _new_folder(args.out) as folder:
        counts = packing.pack_data(experiment.data, packer, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    data = {"kind": packer.kind, "root": str(args.out.absolute())}
    if not args.json:
        said = ", ".join(f"{_count(count, 'sample')} ({split})" for split, count in counts.items())
        print(f"packed: {said}; {size / 2**20:,.1f} MiB in {args.out}. To read it:\n")
        print(tomli_w.dumps({"data": data}), end="")
    return {"out": str(args.out), "samples": counts, "bytes": size, "data": data}


@with_json
def train(args: Namespace) -> dict[str, Any] | None:
    """Train a configuration into a run folder, or resume the run there: with --resume, whichever is possible."""
    if args.config is None and not args.resume:
        raise UserError("train: which configuration? Give CONFIG (only --resume can do without)")
    begun = (args.out / "config.toml").is_file()
    if args.config is None and not begun:
        raise UserError(
            f"{args.out}: nothing to resume here (it has no config.toml). To start a run, give its configuration: "
            f"{shlex.join(['mtdiffusion', 'train', 'CONFIG', '--out', str(args.out)])}"
        )
    registry = Registry.discover()
    config = args.out / "config.toml" if args.config is None else args.config
    with held():  # it imports plugins
        experiment = load_experiment(config, args.set, registry)
    trained = _train(experiment, args.out, registry, args.resume and begun, args.device, args.init_from)
    if trained is not None and not args.json:
        print(f"trained: {args.out}")
    return trained


def _train(
    experiment: Experiment,
    out: Path,
    registry: Registry,
    resume: bool,
    device: str | None,
    init_from: Path | None = None,
) -> dict[str, Any] | None:
    """Train; of several processes, the first one says what came of it."""
    if resume and ckpt.is_exported(out):
        raise UserError(
            f"{out}: an exported run, which has no more than its averaged weights and cannot be resumed. Start a new "
            f"run from it: {shlex.join(['mtdiffusion', 'train', 'CONFIG', '--out', 'NEW', '--init-from', str(out)])}"
        )
    trainer = Trainer(experiment, out, registry, resume=resume, init_from=init_from, device=device, on_message=say)
    if not trainer.main:
        trainer.train()
        trainer.accelerator.end_training()
        return None
    try:
        for line in _introduction(trainer, resume):
            say(line)
        with held():
            monitor = Monitor(trainer, screen())
        with monitor:
            trainer.train(monitor.progress, monitor.samples)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(_parting(trainer)) from None
    except UserError:
        trainer.discard()  # once it is mended, the same command is to work
        raise
    trainer.accelerator.end_training()  # a process that left while another still listens would end it, too
    last = monitor.last
    return {
        "run": str(out),
        "checkpoint": str(ckpt.list_checkpoints(out)[-1]),
        "steps": trainer.step,
        "losses": None if last is None else last.means,
        "held_out": None if last is None else last.held_out,
    }


def _introduction(trainer: Trainer, resume: bool) -> Iterator[str]:
    """What is trained on what, and where it goes."""
    config, processes = trainer.config, trainer.accelerator.num_processes
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    yield f"{_count(len(trainer.data), 'training sample')}; {parameters:.3g} million parameters"
    micro = config.batch_size // (config.accumulate * processes)
    parts = {"samples": micro, "micro-batches": config.accumulate, "processes": processes}
    batch = _count(config.batch_size, "sample")
    if micro < config.batch_size:
        batch += f" ({' × '.join(f'{count} {name}' for name, count in parts.items() if count > 1)})"
    device = trainer.accelerator.device.type + " in bfloat16" * (config.precision == "bfloat16")
    yield f"on {device}, {_count(processes, 'process')}: {_count(config.steps, 'step')} of {batch}"
    yield f"the run is written to {trainer.run}"
    if trainer.step == config.steps:
        more = ckpt.resume_command(trainer.run, f"training.steps={2 * config.steps}")
        yield f"all {config.steps} steps are trained already; to train longer: {more}"
    elif trainer.step:
        yield f"resuming at step {trainer.step} of {config.steps}"
    elif resume:
        yield "resuming a run that has no checkpoint: it starts again from the beginning"


def _count(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def _parting(trainer: Trainer) -> str:
    """What to say of a training that was told to stop."""
    checkpoints = ckpt.list_checkpoints(trainer.run)
    if trainer.discard():
        return f"stopped before the first step; nothing is left in {trainer.run}"
    again = ckpt.resume_command(trainer.run)
    if not checkpoints:
        return f"stopped before the first checkpoint. Start again with: {again}"
    return f"stopped; the checkpoint of step {ckpt.step_of(checkpoints[-1])} is saved. Continue with: {again}"


@with_json
def sample(args: Namespace) -> dict[str, Any] | None:
    """Sample from a run, given any subset, into a new folder, or into shards of which some may be there."""
    if args.shards is None:
        if args.shard_size:
            raise UserError(f"--shard-size {args.shard_size}: only shards have a size; add --shards tar")
        ckpt.require_free(args.out)
    if args.shards == "parquet":
        require_arrow()
    with _processes() as (rank, world):
        if args.shards is None and world > 1:
            raise UserError(f"{world} processes can only sample into shards: add --shards tar")
        request = _request(args)
        if args.shards is None:
            if args.n > MANY:
                say(
                    f"{args.n:,} samples are written as files, all or nothing. --shards tar writes fewer files, and "
                    "the same command goes on where it was stopped"
                )
            with _new_folder(args.out) as folder, _progress("sampling", args.n) as tell:
                sampling.write_folder(request, folder, tell)
        else:
            _sample_shards(request, args.out, args.shards, args.shard_size or sampling.SHARD_SIZE, rank, world)
    if rank:
        return None
    if args.json:
        paths = sorted(str(path) for path in args.out.rglob("[!.]*") if path.is_file())
        record = ckpt.read_json(args.out / sampling.REQUEST)
        return {"out": str(args.out), "n": args.n, "paths": paths, "request": record}
    pages = 1 if args.shards else -(-args.n // sampling.SHOWN)
    glance = f"at a glance: {args.out / sampling.sheet_name(0, pages)}"
    if pages > 1:
        glance += f" to {sampling.sheet_name(pages - 1, pages)}"
    elif args.n > sampling.SHOWN:
        glance = f"the first {glance}"
    print(f"{args.n:,} samples of {', '.join(request.names)}: {args.out} ({glance})")
    return None


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Which of how many processes this is (:func:`sampling.processes`); says so if there were to be others."""
    for said in left_alone(os.environ):
        say(f"warning: {said}")
    with sampling.processes() as which:
        yield which


def _request(args: Namespace) -> sampling.Request:
    """What is asked of a run on the command line."""
    run = load_run(args.run, device=args.device, overrides=args.set)
    for modality in run.model.modalities.values():
        modality.resize = args.resize
    stated = {"observed": _pairs("--observe", args.observe), "visible": _pairs("--visible", args.visible)}
    names = ("steps", "solver", "eta", "guidance", "guidance_interval", "draw", "compile", "precision")
    changes = {name: getattr(args, name) for name in names} | {"path": _path(args.path)}
    if args.steps is not None:
        _say_most_steps(run, args.steps, run.settings(path=changes["path"]).path)
    return sampling.Request(
        run,
        args.n,
        observed={name: _given(run, name, text) for name, text in stated["observed"].items()},
        visible={name: run.visibility(name, text) for name, text in stated["visible"].items()},
        strength={name: _share("--strength", name, text) for name, text in _pairs("--strength", args.strength).items()},
        generate=args.generate,
        changes=changes,
        seed=args.seed,
        stated=stated,
    )


def _say_most_steps(run: Run, steps: int, path: Mapping[str, float] | None) -> None:
    """Say if a path takes fewer steps than are asked for, since clocks have no more."""
    try:
        taken = len(run.model.path(steps, path)) - 1
    except ValueError:  # sampling says what is wrong with it
        return
    if taken < steps:
        say(f"--steps {steps}: {taken} are taken, as many as the clocks have (process.steps)")


def _sample_shards(request: sampling.Request, out: Path, form: str, size: int, rank: int, world: int) -> None:
    record = {**request.record(), "shards": form, "shard_size": size}
    again = "Shards that are whole are kept; the same command goes on with the others"
    timeout = request.run.experiment.training.timeout
    sampling.meet(rank, world, timeout)
    shards = -(-request.n // size)
    with (
        HangWatch(rank, world, timeout, lambda: again) as watch,
        sampling.shards_in(out, record, rank, world, watch) as missing,
    ):
        if rank == 0 and (there := shards - len(missing)):
            say(f"{there} of {_count(shards, 'shard')} are there" + "; the others are drawn" * (there < shards))
        own = missing[rank::world]
        count = sum(min(size, request.n - shard * size) for shard in own)
        what = "sampling" if world == 1 else f"sampling, process {rank + 1} of {world}"
        try:
            with _progress(what, count, rank == 0) as tell:
                sampling.write_shards(request, out, size, own, tell, form)
        except KeyboardInterrupt as interrupt:
            there = shards - len(sampling.missing_shards(out, request.n, size, form))
            said = f"stopped; {there} of {_count(shards, 'shard')} are there. The same command goes on with the others"
            raise type(interrupt)(said if rank == 0 else "") from None


@contextmanager
def _progress(what: str, total: int, shown: bool = True) -> Iterator[Tell]:
    """Tells how far work of a known amount is: a bar on a terminal, lines elsewhere."""
    if not screen().is_terminal:
        yield Pace(what, total).tell
        return
    where = TextColumn("{task.fields[where]}")
    columns = (TextColumn(what), BarColumn(None), where, TimeRemainingColumn())
    with Progress(*columns, console=screen(), disable=not shown) as bar:
        task = bar.add_task("", total=total, where="")
        yield lambda done, at: bar.update(task, completed=done, where=how_far(done, total, at))


def play(args: Namespace) -> None:
    """Show the page of a run until Ctrl-C."""
    try:
        with held():
            from mtdiffusion_engine.play.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("play: the page needs gradio: pip install 'mtdiffusion[play]'") from None
    run = load_run(args.run, device=args.device, overrides=args.set)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        say(f"warning: --host {args.host}: whoever reaches this machine over the network can use the page")
    serve(run, args.host, args.port, lambda address: print(f"{args.run}: {address} (Ctrl-C ends it)", flush=True))


def _pairs(option: str, arguments: list[str]) -> dict[str, str]:
    """NAME=VALUE arguments as a dict."""
    pairs: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not (name and equals and value):
            raise UserError(f'{option} {argument}: expected NAME=VALUE, such as "label=3" or "image=picture.png"')
        if name in pairs:
            raise UserError(f"{option} {argument}: {name} is given twice")
        pairs[name] = value
    return pairs


def _share(option: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} {name}={text}: expected a number, such as {name}=0.4") from None


def _path(text: str | None) -> dict[str, float] | None:
    """``shared``, or ``NAME=SHARE,...``: how far ahead of the slowest each modality is denoised."""
    if text is None or text == "shared":
        return None if text is None else {}
    return {name: _share("--path", name, value) for name, value in _pairs("--path", text.split(",")).items()}


def _given(run: Run, name: str, text: str) -> Tensor:
    """What is observed of a modality: one value for all samples, or several ``[k, ...]``, which take turns."""
    modality = run.modality(name)
    try:
        return parsed(modality, text)
    except (UserError, ValueError) as error:
        raise UserError(f"--observe {name}={text}: {error}") from error


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in that becomes ``out`` if all goes well, and leaves nothing if not."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with partial_of(out.absolute(), folder=True) as partial:
        yield partial
        ckpt.require_free(out)
        partial.replace(out)


@with_json
def evaluate(args: Namespace) -> dict[str, Any] | None:
    """Measure a run on its held-out data; writes metrics.json and prints a table."""
    changes = {name: getattr(args, name) for name in ("samples", "steps", "seed") if getattr(args, name) is not None}
    if args.only:
        changes["conditionals"] = tuple(args.only)
    with _processes() as (rank, world):
        run = load_run(args.run, device=args.device, overrides=args.set)
        evaluation = evolve(run.experiment.evaluation, **changes)
        again = "What was measured is kept; the same command goes on with the rest"
        timeout = run.experiment.training.timeout
        sampling.meet(rank, world, timeout)
        with HangWatch(rank, world, timeout, lambda: again) as watch:
            run = evolve(run, experiment=evolve(run.experiment, evaluation=evaluation))
            metrics = _evaluate(run, Team(rank, world, watch))
    if rank:
        return None
    if not args.json:
        print(f"measured: {run.checkpoint.name}")
        print_metrics(metrics, stored_directions(run.path, run.model))
        print(f"metrics: {args.run / METRICS}")
    return metrics


def _evaluate(run: Run, team: Team | None = None) -> dict[str, Any]:
    """Measure a run; of several processes, the first one writes and gets what was measured."""
    from mtdiffusion_engine.evaluation import evaluate_run
    from mtdiffusion_engine.measures import Kept

    kept = Kept(run.path / PARTIAL)
    with screen().status("evaluating") as status:  # which shows on a terminal only

        def tell(what: str) -> None:
            status.update(f"evaluating: {escape(what)}")
            if not screen().is_terminal:
                say(f"evaluating: {what}")

        try:
            with log_shown(tell):
                metrics = dict(evaluate_run(run, tell, say, kept, team))
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(_kept(kept) if team is None or team.first else "") from None
    if team is not None and not team.first:
        return metrics
    _set_aside(run, metrics)
    ckpt.write_json(run.path / METRICS, metrics)
    ckpt.write_json(run.path / DIRECTIONS, kept.directions, sort_keys=False)
    kept.remove()
    return metrics


def _set_aside(run: Run, metrics: Mapping[str, Any]) -> None:
    """Keep what was measured before, if not all of it was measured again: under the checkpoint's name, or, where a
    training has gone on or the configuration has changed since, under the time of the measurement."""
    path = run.path / METRICS
    aside = path.with_name(f"{path.stem}-before{path.suffix}")
    before = _figures(path)
    lacking = before.keys() - metrics.keys()
    if not lacking:
        return
    measured = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    of = f"{measured:%Y-%m-%d %H:%M:%S} UTC" if run.outdates(path) else run.checkpoint.name
    kept = _figures(aside)
    if not all(isinstance(figures, dict) for figures in kept.values()):
        kept = {"earlier": kept}  # of before they were told apart
    ckpt.write_json(aside, {**kept, of: {**kept.get(of, {}), **before}})
    say(f"{_count(len(lacking), 'figure')} of before not measured again; in {aside}, under {of!r}")


def _figures(path: Path) -> dict[str, Any]:
    """What a file of metrics holds; nothing, if it is not there. A damaged one is renamed before it is written."""
    if not path.is_file():
        return {}
    try:
        return ckpt.read_json(path)
    except UserError as error:
        damaged = path.with_name(f"{path.stem}-damaged{path.suffix}")
        path.replace(damaged)
        say(f"{str(error).partition('; ')[0]}; it is kept as {damaged}, and written anew")
        return {}


def _kept(kept: Kept) -> str:
    """What to say of an evaluation that was told to stop."""
    if not kept.done:
        return (
            "stopped before anything was measured; how far judges are trained stays in the cache, and the same command "
            "goes on with them"
        )
    return (
        f"stopped; what is measured is kept in {kept.path} ({', '.join(kept.done)}), missing are "
        f"{', '.join(kept.missing)}. The same command goes on with those"
    )


def print_metrics(metrics: Mapping[str, Any], directions: Mapping[str, str]) -> None:
    """A table with a row for each ``target|observed`` of metrics ``target|observed/metric``; what tells most stands
    out."""
    console = Console(highlight=False)
    table = Table("target | given", "metrics")
    for row in rows(metrics, directions, console.encoding):
        told = Text("  ".join(row.first), "bold")
        if row.first and row.others:
            told.append("\n")
        told.append("  ".join(row.others), "not bold")
        table.add_row(Text(row.group.replace("|", " | ")), told)
    console.print(table)
    console.print(legend(console.encoding), soft_wrap=True)


@with_json
def gallery(args: Namespace) -> dict[str, Any] | None:
    """Draw the gallery of a run."""
    found = None
    with sampling.processes() as (rank, world):
        sampling.meet(rank, world, TrainingConfig().timeout)  # the run's own is not read by those that wait
        # A few samples in one picture: the first process draws it, and the others wait.
        if rank == 0:
            run = load_run(args.run, device=args.device, overrides=args.set)
            picture = _gallery(run, args.out or run.path / GALLERY, args.seed, args.columns, args.show, args.blocks)
            page = picture.with_suffix(".html")
            # One that is older is of something else.
            heard = page.is_file() and page.stat().st_mtime_ns >= picture.stat().st_mtime_ns
            found = {"gallery": str(picture), "page": str(page) if heard else None}
            if not args.json:
                print(f"gallery: {picture}")
                if heard:
                    print(f"to hear it: {page}")
        Team(rank, world).told(None)
    return found


def _gallery(
    run: Run,
    out: Path,
    seed: int,
    columns: int = 12,
    show: Sequence[str] | None = None,
    blocks: Sequence[str] | None = None,
) -> Path:
    from mtdiffusion_engine.gallery import draw_gallery

    return draw_gallery(run, out, seed, columns, say, show, blocks)


@with_json
def export(args: Namespace) -> dict[str, Any]:
    """Write a run into a new folder that serves without the training's."""
    ckpt.require_free(args.out)
    run = load_run(args.run, device=args.device, overrides=args.set)
    with _new_folder(args.out) as folder:
        run.save_pretrained(folder, license=args.license)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not args.json:
        print(f"exported: {args.out} ({size / 2**20:,.1f} MiB; read {args.out / CARD} before you publish it)")
    return {"out": str(args.out), "card": str(args.out / CARD), "bytes": size}


@with_json
def push(args: Namespace) -> dict[str, Any]:
    """Export a run to the Hugging Face Hub."""
    run = load_run(args.run, device=args.device, overrides=args.set)
    page = run.push_to_hub(args.name, license=args.license, private=args.private or None)
    if not args.json:
        print(f"pushed: {page}")
    return {"name": args.name, "page": page}


@with_json
def demo(args: Namespace) -> dict[str, Any]:
    """Train, evaluate and draw; what is done already is not done again."""
    if not args.config.is_file():
        raise UserError(f"{args.config}: no such file; run the demo from a clone of the repository, or give --config")
    registry = Registry.discover()
    experiment = load_experiment(args.config, args.set, registry)
    out: Path = args.out
    begun = (out / "config.toml").is_file()
    steps = _trained_steps(out)  # says so if another version made it
    changed = require_resumable(experiment, out, registry) if begun else {}
    if changed or steps < experiment.training.steps:
        _train(experiment, out, registry, begun, args.device)
        if not args.json:
            print(f"trained: {out}")
    run = load_run(out, device=args.device)
    metrics, picture = out / METRICS, out / GALLERY
    if run.outdates(metrics):
        _evaluate(run)
    if run.outdates(picture):
        _gallery(run, picture, seed=0)
    measured = ckpt.read_json(metrics)
    if not args.json:
        print_metrics(measured, stored_directions(out, run.model))
        print(f"metrics: {metrics}")
        print(f"gallery: {picture}")
    return {
        "run": str(out),
        "checkpoint": str(run.checkpoint),
        "steps": _trained_steps(out),
        "metrics": measured,
        "gallery": str(picture),
    }


def _trained_steps(run: Path) -> int:
    checkpoints = ckpt.list_checkpoints(run)
    return int(ckpt.load_state(checkpoints[-1])["step"]) if checkpoints else 0
