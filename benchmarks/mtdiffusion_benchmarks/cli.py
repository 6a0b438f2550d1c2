"""``mtdiffusion bench``: run a profile, report on a folder, list what there is. Imports torch when it must."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from mtdiffusion_engine.printing import json_document, with_json

_MEASURED = "what was measured, as --out has it"


class _Refused(argparse.Action):
    """An option that other actions have and that has no sense here: it says why, and what to do."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]  # argparse's own
        parser.error(f"{parser.prog.partition(' ')[2]}: {option_string}: {self.const}")


def _refuse_set(action: argparse.ArgumentParser, why: str) -> None:
    action.add_argument("--set", action=_Refused, nargs="*", const=why, help=argparse.SUPPRESS)


def _profiles() -> list[str]:
    """Names of the profiles that ship."""
    from mtdiffusion_benchmarks.profile import shipped

    return list(shipped())


def _machine(action: argparse.ArgumentParser, what: str) -> None:
    action.add_argument(
        "--json",
        action="store_true",
        help=f"print one JSON object alone, for other programs: {what}; all else goes to the standard error",
    )


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand; its ``handler`` is what runs it."""
    bench = commands.add_parser(
        "bench",
        help="does training jointly help, hurt, or is it free?",
        description="Compare joint models with their controls over tasks, methods, data sets and seeds.",
    )
    bench.set_defaults(handler=run)
    actions = bench.add_subparsers(dest="action", metavar="ACTION", required=True)

    start = actions.add_parser("run", help="run a profile's cells", description="Run what is not done yet.")
    profile = start.add_argument(
        "profile", metavar="PROFILE|FILE.toml", help="a profile that ships (see `bench list`), or a file"
    )
    profile.names = _profiles  # type: ignore[attr-defined]  # which a shell completes, beside files
    start.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the results; may hold some")
    start.add_argument("--keep-runs", action="store_true", help="keep the checkpoints of finished cells")
    start.add_argument(
        "--keep-changed",
        action="store_true",
        help="keep finished cells whose plugins have changed since, which are made again otherwise",
    )
    start.add_argument(
        "--device", default="cpu", help="cpu, cuda, a certain GPU such as cuda:1, or mps (default: %(default)s)"
    )
    _machine(start, "the status of each cell")

    report = actions.add_parser("report", help="write report.html and report.md from the results")
    report.add_argument("out", type=Path, metavar="DIR", help="folder of the results")
    _machine(report, "the paths of both")
    _refuse_set(
        report,
        "a report is of results as they were made; make others with `mtdiffusion bench run PROFILE --out DIR --set "
        "KEY=VALUE`",
    )

    perf = actions.add_parser(
        "perf",
        help="what the framework costs in time",
        description="Time training and sampling beside a loop written by hand and beside other libraries (where they "
        "are installed), further modalities, and commands as they start, in turn. Run it from a clone of the "
        "repository, on a machine that does nothing else.",
    )
    perf.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write what was measured here, too; with --only, beside what is there",
    )
    perf.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each (default: %(default)s)")
    perf.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    perf.add_argument("--without-memory", action="store_true", help="leave out peak memory, which takes as long again")
    perf.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="groups by title, with * for any, such as 'peers*'"
    )
    _machine(perf, _MEASURED)
    _refuse_set(
        perf,
        "what it times are configurations of the repository beside the same thing written by hand, which would not "
        "follow; time a training of your own by `mtdiffusion train`, which says its steps a second",
    )

    curves = actions.add_parser(
        "curves",
        help="the held-out loss along training, beside diffusers' example",
        description="Train our network and diffusers' on the same batches of made-up pictures of 32 x 32, in turn, and "
        "measure the held-out error of both in one process, by images and by seconds. About twenty minutes.",
    )
    curves.add_argument("--out", type=Path, metavar="FILE.json", help="write what was measured here, too")
    curves.add_argument("--steps", type=int, default=400, metavar="N", help="of each (default: %(default)s)")
    curves.add_argument("--batch", type=int, default=16, metavar="N", help="pictures a step (default: %(default)s)")
    curves.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    _machine(curves, _MEASURED)
    _refuse_set(curves, "it trains a configuration of its own, of the same size as the network that it stands beside")

    data = actions.add_parser(
        "data",
        help="how long the first step takes on many pictures, and how much memory",
        description="Time from the command to the first step, and the memory it takes, on many small pictures.",
    )
    data.add_argument("--out", type=Path, metavar="FILE.json", help="write what was measured here, too")
    data.add_argument("--pictures", type=int, default=50000, metavar="N", help="default: %(default)s")
    _machine(data, _MEASURED)
    _refuse_set(data, "it trains one step of a configuration of its own, on pictures that it makes")

    reading = actions.add_parser(
        "reading",
        help="how many samples a second data sets give, and how much memory",
        description="Read the same small pictures from a folder, tar shards, Parquet and litdata, in a random order, "
        "several times over.",
    )
    reading.add_argument("--out", type=Path, metavar="FILE.json", help="write what was measured here, too")
    reading.add_argument("--pictures", type=int, default=20000, metavar="N", help="default: %(default)s")
    reading.add_argument("--epochs", type=int, default=5, metavar="N", help="default: %(default)s")
    _machine(reading, _MEASURED)
    _refuse_set(reading, "it reads no configuration: it times data sets of pictures that it makes")

    solvers = actions.add_parser(
        "solvers",
        help="which solver a run's samples need, and how many evaluations",
        description="Measure a run's samples by several solvers and numbers of evaluations, and say which is the "
        "cheapest that is as good as a long one.",
    )
    solvers.add_argument("run", type=Path, metavar="RUN")
    solvers.add_argument(
        "--metric",
        action="extend",
        nargs="+",
        required=True,
        metavar="KEY",
        help="figures, named as by `mtdiffusion evaluate`: 'image|label/fid_judge' joint/fid_judge",
    )
    solvers.add_argument(
        "--solver",
        nargs="+",
        default=["ancestral", "dpmpp_2m", "dpmpp_2m=0", "ddim", "ddim=2"],
        metavar="SOLVER[=ETA]",
        help="default: ancestral dpmpp_2m dpmpp_2m=0 ddim ddim=2",
    )
    solvers.add_argument(
        "--steps", nargs="+", type=int, default=[8, 16, 32, 64], metavar="N", help="evaluations (default: 8 16 32 64)"
    )
    solvers.add_argument(
        "--guidance",
        nargs="+",
        default=["1"],
        metavar="G[@LOW-HIGH]",
        help="guidance on what is given, on all of the path or a part of it; the reference has the first (default: 1, "
        "which is none)",
    )
    solvers.add_argument(
        "--reference", type=int, default=250, metavar="N", help="of ancestral, to compare with (default: %(default)s)"
    )
    solvers.add_argument("--samples", type=int, default=500, metavar="N", help="default: %(default)s")
    solvers.add_argument("--seeds", type=int, default=2, metavar="N", help="draws of each (default: %(default)s)")
    solvers.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="change the run's configuration"
    )
    solvers.add_argument("--out", type=Path, metavar="FILE.json", help="write it here, too; go on with what is there")
    solvers.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: cuda if there is one)")
    _machine(solvers, _MEASURED)

    planning = actions.add_parser(
        "plan",
        help="what `mtdiffusion plan` says of a step's time, beside steps measured here",
        description="Time a matrix product, a copy of memory and steps of each training, in turn; say which share of "
        "the product's rate a step gets, and by which options `mtdiffusion plan` goes by that.",
    )
    planning.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.toml")
    planning.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="change each of the configurations"
    )
    planning.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    planning.add_argument("--out", type=Path, metavar="FILE.json", help="write it here, too")
    planning.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    _machine(planning, _MEASURED)

    reliability = actions.add_parser(
        "reliability",
        help="what is lost when things go wrong",
        description="Try faults on the real commands: kill them, starve them, feed them damaged and made-up files. "
        "Needs hypothesis. It forks, and uses one thread.",
    )
    reliability.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write what was found here; go on with what is there",
    )
    reliability.add_argument("--trials", type=int, default=50, metavar="N", help="of each fault (default: %(default)s)")
    reliability.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    reliability.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="faults by name, with * for any, such as 'training*'"
    )
    reliability.add_argument(
        "--docs", action="store_true", help="try nothing: make docs/reliability.md of the committed results"
    )
    _machine(reliability, "what was found, as --out has it")
    _refuse_set(reliability, "it tries faults on a configuration of its own, for which it knows what is to come out")

    topology = actions.add_parser(
        "topology",
        help="whether a training is the same run on any number of processes",
        description="Train a small run in float64 on one process and on several, split or not, in micro-batches or "
        "not, and resume each on every other; compare weights, moments, averages and logs with one process.",
    )
    topology.add_argument("--out", type=Path, metavar="FILE.json", help="write what was found here, too")
    topology.add_argument(
        "--processes", type=int, nargs="+", default=[2, 4], choices=(2, 4), help="beside one (default: 2 4)"
    )
    _machine(topology, "what was found, as --out has it")
    _refuse_set(topology, "it trains a configuration of its own, which has what depends on the number of processes")

    samples = actions.add_parser(
        "samples",
        help="whether many samples are all there, each once, if what draws them is killed",
        description="Train a tiny run, draw samples of it into shards in several processes, kill them half way, go on "
        "by the same command, and compare shards with those of one process. Linux, on the CPU.",
    )
    samples.add_argument("--out", type=Path, metavar="FILE.json", help="write what was found here, too")
    samples.add_argument("-n", type=int, default=100_000, metavar="N", help="samples (default: %(default)s)")
    samples.add_argument("--processes", type=int, default=2, metavar="N", help="default: %(default)s")
    samples.add_argument("--shard-size", type=int, default=1024, metavar="N", help="default: %(default)s")
    samples.add_argument(
        "--compared",
        type=int,
        default=4,
        metavar="N",
        help="shards that one process draws again (default: %(default)s)",
    )
    _machine(samples, "what was found, as --out has it")
    _refuse_set(samples, "it draws samples of a configuration of its own")

    listing = actions.add_parser("list", help="list profiles, or a profile's cells")
    listed = listing.add_argument("profile", nargs="?", metavar="PROFILE|FILE.toml")
    listed.names = _profiles  # type: ignore[attr-defined]
    listing.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="say of each cell what is there: its status, or `other` for a result of another configuration",
    )
    for cells in (start, listing):
        cells.add_argument(
            "--seeds",
            type=int,
            action="extend",
            nargs="+",
            default=[],
            metavar="N",
            help="in place of the profile's, such as 0 1 2",
        )
        cells.add_argument(
            "--only",
            action="extend",
            nargs="+",
            default=[],
            metavar="PATTERN",
            help="cells SETTING/TASK/METHOD/SEED, with * for any, such as 'digits/*/joint/0'",
        )
        cells.add_argument(
            "--set",
            action="extend",
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help="change the configuration of every cell, as the profile's own set does",
        )
    _machine(listing, "the profiles, or the cells and the status of each")


def run(args: argparse.Namespace) -> None:
    """What ``mtdiffusion bench ACTION`` does."""
    actions = {
        "run": _run,
        "report": _report,
        "perf": _perf,
        "curves": _curves,
        "data": _data,
        "reading": _reading,
        "solvers": _solvers,
        "plan": _plan,
        "reliability": _reliability,
        "topology": _topology,
        "samples": _samples,
        "list": _list,
    }
    actions[args.action](args)


@with_json
def _run(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks.profile import load_profile, plan, with_changes, with_seeds
    from mtdiffusion_benchmarks.runner import Runner
    from mtdiffusion_engine.environment import choose_device
    from mtdiffusion_registry import Registry

    device = choose_device(args.device)  # says so before anything is read if it is not there
    registry = Registry.discover()
    profile, path = load_profile(args.profile, registry)
    profile = with_seeds(profile, args.seeds)
    cells = plan(profile, tuple(args.only))
    runner = Runner(
        with_changes(profile, args.set, cells),
        path.parent,
        args.out,
        registry,
        device=str(device),
        keep_runs=args.keep_runs,
        keep_changed=args.keep_changed,
        say=partial(print, flush=True),
    )
    states = runner.run(cells)
    if not args.json:
        print(f"{len(cells)} cells: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items())))
        print(f"now: mtdiffusion bench report {args.out}")
    return {"out": str(args.out), "states": states, "cells": runner.statuses}


@with_json
def _report(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks.report import build_report
    from mtdiffusion_registry import UserError

    if not (args.out / "cells").is_dir():
        raise UserError(f"{args.out}: no results here (no folder cells); make some with `mtdiffusion bench run`")
    page, document = build_report(args.out)
    if not args.json:
        print(page, document, sep="\n")
    return {"html": str(page), "markdown": str(document)}


@with_json
def _list(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks.profile import cell_experiment, load_profile, plan, shipped, with_changes, with_seeds
    from mtdiffusion_registry import Registry, UserError

    registry = Registry.discover()
    if args.profile is None:
        for option, given in (("--set", args.set), ("--only", args.only), ("--seeds", args.seeds), ("--out", args.out)):
            if given:
                raise UserError(f"bench list: {option} is about a profile's cells; say which: bench list PROFILE")
        profiles = []
        for name in shipped():
            profile, path = load_profile(name, registry)
            profiles.append({"name": name, "cells": len(plan(profile)), "title": profile.title, "path": str(path)})
            if not args.json:
                print("{name:10} {cells:4} cells  {title}  ({path})".format(**profiles[-1]))
        return {"profiles": profiles}
    profile, path = load_profile(args.profile, registry)
    profile = with_seeds(profile, args.seeds)
    cells = plan(profile, tuple(args.only))
    profile = with_changes(profile, args.set, cells)
    for cell in cells if args.set else ():
        cell_experiment(profile, cell, path.parent, registry)  # refuses what a cell's configuration does not have
    states: dict[str, str | None] = dict.fromkeys(cell.id for cell in cells)
    if args.out is not None:
        from mtdiffusion_benchmarks.runner import Runner

        runner = Runner(profile, path.parent, args.out, registry)
        states = {cell.id: runner.state(cell) for cell in cells}
    if not args.json:
        for name, state in states.items():
            print(name if state is None else f"{state:9} {name}")
    return {"profile": args.profile, "path": str(path), "cells": states}


@with_json
def _perf(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks import perf
    from mtdiffusion_engine.checkpoint import read_json, write_json
    from mtdiffusion_registry import Registry, UserError

    if missing := [str(path) for path in perf.CONFIGS if not path.is_file()]:
        raise UserError(f"{missing[0]}: no such file; run this from a clone of the repository")
    say = partial(print, flush=True)

    def keep(result: dict[str, Any]) -> None:
        if args.out is not None:
            write_json(args.out, result, sort_keys=False)

    before = read_json(args.out) if args.only and args.out is not None and args.out.is_file() else None
    memory = not args.without_memory
    result = perf.measure(
        args.rounds, args.threads, Registry.discover(), say, args.only, memory=memory, before=before, keep=keep
    )
    keep(result)
    if not args.json:
        print(perf.table(result), perf.flops_table(result), sep="\n\n")
    return result


@with_json
def _curves(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks import curves
    from mtdiffusion_engine.checkpoint import write_json
    from mtdiffusion_registry import Registry, UserError

    for option, value in (("--batch", args.batch), ("--threads", args.threads)):
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    result = curves.measure(args.steps, args.batch, args.threads, Registry.discover(), partial(print, flush=True))
    if args.out is not None:
        write_json(args.out, result, sort_keys=False)
    if not args.json:
        print(curves.table(result), curves.seconds_table(result), sep="\n\n")
    return result


@with_json
def _data(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks import startup
    from mtdiffusion_engine.checkpoint import write_json

    result = startup.measure(args.pictures, say=lambda text: print(text, flush=True))
    if args.out is not None:
        write_json(args.out, result, sort_keys=False)
    if not args.json:
        print(startup.table(result))
    return result


@with_json
def _reading(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks import reading
    from mtdiffusion_engine.checkpoint import write_json

    result = reading.measure(args.pictures, args.epochs, say=lambda text: print(text, flush=True))
    if args.out is not None:
        write_json(args.out, result, sort_keys=False)
    if not args.json:
        print(reading.table(result))
    return result


@with_json
def _solvers(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks import solvers
    from mtdiffusion_engine import load_run
    from mtdiffusion_engine.checkpoint import read_json, write_json
    from mtdiffusion_registry import UserError

    counts = {"--reference": [args.reference], "--steps": args.steps, "--samples": [args.samples]}
    for option, values in (counts | {"--seeds": [args.seeds]}).items():
        if least := [value for value in values if value < 1]:
            raise UserError(f"{option} {least[0]}: expected 1 or more")
    guidance = [solvers.guidance(text) for text in args.guidance]
    ways = [solvers.way("ancestral", args.reference, guidance[0])]
    ways += [
        solvers.way(text, steps, guided) for text in args.solver for guided in guidance for steps in sorted(args.steps)
    ]

    def keep(result: dict[str, Any]) -> None:
        if args.out is not None:
            write_json(args.out, result, sort_keys=False)

    run = load_run(args.run, device=args.device, overrides=args.set)
    say = partial(print, flush=True)
    comparison = solvers.Comparison(run, args.metric, ways, args.samples, args.seeds, say)
    before = read_json(args.out) if args.out is not None and args.out.is_file() else None
    result = comparison.measure(before, keep)
    keep(result)
    if not args.json:
        print(solvers.table(result), solvers.verdict(result), sep="\n\n")
    return result


@with_json
def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks import planning
    from mtdiffusion_engine.checkpoint import write_json
    from mtdiffusion_engine.environment import choose_device
    from mtdiffusion_engine.experiment import load_experiment
    from mtdiffusion_registry import Registry, UserError

    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: expected 1 or more")
    device = choose_device(args.device).type
    if device == "mps":
        raise UserError("--device mps: bench plan measures cpu and cuda")
    registry = Registry.discover()
    experiments = {str(path): load_experiment(path, args.set, registry) for path in args.configs}
    result = planning.measure(experiments, args.rounds, registry, device, partial(print, flush=True))
    if args.out is not None:
        write_json(args.out, result, sort_keys=False)
    if not args.json:
        print(planning.table(result))
        print(f"\nto plan by this: mtdiffusion plan {args.configs[0]} --gpus 1 {planning.options(result)}")
    return result


@with_json
def _reliability(args: argparse.Namespace) -> dict[str, Any]:
    from importlib.util import find_spec

    from mtdiffusion_benchmarks.reliability import many, page, topology
    from mtdiffusion_engine.checkpoint import read_json, write_json
    from mtdiffusion_registry import UserError

    if args.docs:
        if not page.PAGE.parent.is_dir():
            raise UserError(f"{page.PAGE.parent}: no such folder; run this from a clone of the repository")
        results = (
            read_json(path, f"make it by mtdiffusion bench {action} --out {path}")
            for path, action in ((page.RESULT, "reliability"), (topology.RESULT, "topology"), (many.RESULT, "samples"))
        )
        page.PAGE.write_text(page.page(*results), encoding="utf-8")
        if not args.json:
            print(page.PAGE)
        return {"page": str(page.PAGE)}
    if args.trials < 1:
        raise UserError(f"--trials {args.trials}: expected 1 or more")
    if find_spec("hypothesis") is None:
        raise UserError("bench reliability: made-up inputs need hypothesis: pip install hypothesis")
    from mtdiffusion_benchmarks.reliability import trying

    def keep(result: dict[str, Any]) -> None:
        if args.out is not None:
            write_json(args.out, result, sort_keys=False)

    before = read_json(args.out) if args.out is not None and args.out.is_file() else None
    say = partial(print, flush=True)
    result = trying.measure(args.trials, args.seed, args.only, before, keep, say)
    rows = [row for name, row in result["faults"].items() if name in trying.chosen(args.only)]
    if not args.json:
        tried, lost = (sum(row[what] for row in rows) for what in ("tried", "lost"))
        print(f"{tried:,} trials, something was lost in {lost:,}")
    return result


@with_json
def _samples(args: argparse.Namespace) -> dict[str, Any]:
    from mtdiffusion_benchmarks.reliability import many
    from mtdiffusion_engine.checkpoint import write_json
    from mtdiffusion_registry import UserError

    asked = {"-n": (args.n, 1), "--processes": (args.processes, 1), "--shard-size": (args.shard_size, 1)}
    for option, (value, least) in (asked | {"--compared": (args.compared, 2)}).items():
        if value < least:
            raise UserError(f"{option} {value}: expected {least} or more")
    result = many.measure(args.n, args.processes, args.shard_size, args.compared, partial(print, flush=True))
    if args.out is not None:
        write_json(args.out, result, sort_keys=False)
    if not args.json:
        print(*many.section(result), sep="\n")
    return result


def _topology(args: argparse.Namespace) -> None:
    from mtdiffusion_benchmarks.reliability import topology
    from mtdiffusion_engine.checkpoint import write_json
    from mtdiffusion_registry import UserError

    with json_document(args.json) as put:
        result = topology.measure(sorted({1, *args.processes}), partial(print, flush=True))
        if args.out is not None:
            write_json(args.out, result, sort_keys=False)
        most = max(row[what] for row in result["rows"] for what in (*topology.FILES, topology.LOGGED))
        compared = f"{len(result['rows'])} trainings compared in {result['seconds']:.0f} s"
        print(f"{compared}; the greatest difference is {most:.1e}")
        put(result)
    if not most < topology.WANTED:
        raise UserError(f"topology: wanted less than {topology.WANTED:.0e}")
