"""The command line. Only the standard library is imported before it is known what to do: --help must be quick."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mtdiffusion_engine.allocator import keep_freed_memory
from mtdiffusion_engine.interrupt import STATUS, Terminated, held, terminable
from mtdiffusion_engine.printing import json_document, log_of_command, with_json
from mtdiffusion_registry.installed import EntryPoint, blame, entry_points, version

if TYPE_CHECKING:
    from mtdiffusion_registry import PluginInfo, Registry
    from mtdiffusion_registry.testing import Contract

    Commands = argparse._SubParsersAction["_Parser"]

TRACEBACK_VARIABLE = "MTDIFFUSION_TRACEBACK"
COMMANDS = "mtdiffusion.commands"
"""Entry points of modules that add a subcommand: ``add_parser(commands)``, which sets the default ``handler``."""
SOLVERS = ("ancestral", "ddim", "dpmpp_2m")
PARTS = ("all", "noise", "clocks")
SCAFFOLDS = ("modality", "dataset", "field", "backbone", "schedule", "clock-law", "evaluator", "task", "method")
GPUS = ("h100", "h200", "a100")
FIGURES = {
    "flops": "operations a second in bfloat16, such as 989e12",
    "float32": "operations a second in float32 (default: as --flops), such as 67e12",
    "memory": "bytes of memory, such as 80e9",
    "bandwidth": "bytes a second of the memory, such as 3.35e12",
    "link": "bytes a second each way to GPUs of the same machine, such as 450e9",
    "network": "bytes a second each way of one GPU to other machines, such as 50e9",
}
"""Of a GPU, for `plan`."""
ASSUMED = {
    "attained": "share of the GPU's operations a second that the network gets (default: 0.35)",
    "link-attained": "share of a link's bytes a second that is got (default: 0.7)",
    "overlap": "share of the computation that communication can hide behind (default: 0.5)",
    "reserve": "share of the memory that stays free (default: 0.1)",
    "machine": "GPUs a machine (default: 8)",
    "disk": "bytes a second that a checkpoint is written with (default: 2e9)",
}
"""What `plan` assumes."""
SHELLS = ("bash", "zsh", "fish", "tcsh")
LIKES = ("vector", "spatial", "sequence", "file")
SLOW_IMPORT = 1.0
"""Seconds from which the import of a plugin is called slow: who lists or trains waits for it."""


class _Parser(argparse.ArgumentParser):
    """argparse, which also says what may have been meant."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # its overloads are argparse's
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_near(unknown[0], self._option_string_actions)}")
        return namespace, unknown

    def error(self, message: str):  # type: ignore[no-untyped-def]
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            message += _near(choice[1], re.findall(r"[\w-]+", choice[2]))
        self.print_usage(sys.stderr)
        self.exit(2, f"mtdiffusion: error: {message}\n")


def _near(word: str, known: Sequence[str] | dict[str, argparse.Action]) -> str:
    from mtdiffusion_registry.errors import did_you_mean

    return did_you_mean(word.partition("=")[0], known)


_MOST = 2**63 - 1  # of a signed integer of 64 bits


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, found {text!r}")
    if value > _MOST:
        raise argparse.ArgumentTypeError(f"expected a whole number, {_MOST} at most, found {text!r}")
    return value


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text!r}")
    return value


def _counts(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _samples(text: str) -> int | str:
    try:
        return text if text == "all" else _positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(str(error).replace(", found", ' or "all", found')) from None


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mtdiffusion",
        description="One diffusion model over any set of modalities: generate all of them, or any from any.",
        epilog=f"{TRACEBACK_VARIABLE}=1 shows where in the code an error comes from.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=description, description=description, allow_abbrev=False)

    def on_device(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--device", help="cpu, cuda, a certain GPU such as cuda:1, or mps (default: cuda if there is one)"
        )

    def machine(command: argparse.ArgumentParser, what: str) -> None:
        command.add_argument(
            "--json",
            action="store_true",
            help=f"print one JSON object alone, for other programs: {what}; all else goes to the standard error",
        )

    def setting(command: argparse.ArgumentParser, description: str) -> None:
        command.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=description)

    of_a_run = "change the run's data, evaluation or sampling for this once, such as data.root=FOLDER"

    train = command("train", "train a configuration")
    train.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="TOML file (to resume: the run's own)")
    train.add_argument("--out", required=True, type=Path, metavar="RUN", help="the run's folder; must not exist yet")
    setting(train, "change the configuration")
    machine(train, "the run's folder, its checkpoint, steps, the last losses, those of held-out samples")
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in RUN from its newest checkpoint; with CONFIG, start it if there is none yet",
    )
    train.add_argument(
        "--init-from",
        type=Path,
        metavar="OTHER",
        help="start a new run from the averaged weights of the run in OTHER",
    )
    on_device(train)

    sample = command("sample", "sample from a run: observe any subset, generate the rest")
    sample.add_argument("run", type=Path, metavar="RUN")
    sample.add_argument("-n", type=_positive, default=16, help="how many samples (default: %(default)s)")
    sample.add_argument(
        "--observe",
        action="append",
        default=[],
        metavar="NAME=VALUE_OR_PATH",
        help="what is given, a value or a file; repeatable",
    )
    sample.add_argument(
        "--resize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="scale and crop pictures that are given to the size of the data (default), or refuse those of another",
    )
    sample.add_argument(
        "--visible",
        action="append",
        default=[],
        metavar="NAME=MASK.png",
        help="what is seen of something observed: white is seen, black is filled in; repeatable",
    )
    sample.add_argument(
        "--strength",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="start from something observed instead of keeping it: 1 forgets it, near 0 keeps it; repeatable",
    )
    sample.add_argument("--generate", type=_names, metavar="NAME,...", help="what to generate (default: all the rest)")
    sample.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist yet")
    sample.add_argument(
        "--shards",
        choices=("tar", "parquet"),
        help="write archives or tables of samples instead of files; torchrun draws them in several processes, and the "
        "same command goes on with those that are missing",
    )
    sample.add_argument("--shard-size", type=_positive, metavar="N", help="samples a shard (default: 1,024)")
    sample.add_argument("--steps", type=_positive, help="solver steps (this and below, default: as the run says)")
    sample.add_argument("--solver", choices=SOLVERS)
    sample.add_argument(
        "--path",
        metavar="shared|NAME=SHARE,...",
        help="how far ahead of the slowest each modality is denoised, in shares of the path: label=0.6,mask=0.3",
    )
    sample.add_argument("--guidance", type=_number, help="classifier-free guidance on what is observed; 1 is none")
    sample.add_argument(
        "--guidance-interval",
        type=_number,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide on this part of the path alone, in shares of it, 1 its start and 0 its end: 0.2 0.8",
    )
    sample.add_argument(
        "--eta",
        type=_number,
        help="noise of a step of ddim (default: 0) or dpmpp_2m (1.4): 0 none, 1 as ancestral sampling, or more",
    )
    sample.add_argument(
        "--draw",
        action=argparse.BooleanOptionalAction,
        help="draw from the final distributions instead of taking their modes",
    )
    sample.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the network first, which takes up to some minutes, for faster batches after that",
    )
    sample.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the network; bfloat16 is faster where the device multiplies it natively",
    )
    sample.add_argument("--seed", type=_natural, default=0)
    machine(sample, "the folder, how many samples, the files' paths, the request")
    setting(sample, of_a_run)
    on_device(sample)

    play = command("play", "play with a run on a page in the browser: give some modalities, watch the others appear")
    play.add_argument("run", type=Path, metavar="RUN")
    play.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    play.add_argument("--port", type=_positive, help="default: 7860, or the next that is free")
    setting(play, of_a_run)
    on_device(play)

    evaluate = command("evaluate", "measure a run on held-out data")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument(
        "--samples",
        type=_samples,
        metavar="N|all",
        help="held-out samples, a random draw of N at most (default: as the run says, or 1,000)",
    )
    evaluate.add_argument(
        "--only",
        nargs="+",
        action="extend",
        metavar="TARGET|GIVEN",
        help='measure these alone, named as in the results: "mask|image", "image|label+mask", "image|image:part", '
        "joint, real, bound; after RUN",
    )
    evaluate.add_argument("--steps", type=_positive, help="solver steps of the conditionals")
    evaluate.add_argument("--seed", type=_natural)
    machine(evaluate, "what metrics.json holds")
    setting(evaluate, of_a_run)
    on_device(evaluate)

    gallery = command("gallery", "draw samples and every conditional of a run")
    gallery.add_argument("run", type=Path, metavar="RUN")
    gallery.add_argument("--out", type=Path, metavar="PNG", help="default: RUN/gallery.png")
    gallery.add_argument("--seed", type=_natural, default=0)
    gallery.add_argument("--columns", type=_positive, default=12, help="samples in a block (default: %(default)s)")
    gallery.add_argument("--show", nargs="+", metavar="NAME", help="modalities to show and to give (default: all)")
    gallery.add_argument(
        "--blocks",
        nargs="+",
        metavar="BLOCK",
        help="what to draw: joint, NAME (it alone is given), NAME:part (it has holes); default: all; after RUN",
    )
    machine(gallery, "the paths of the picture and of the page with sounds, if there are any")
    setting(gallery, of_a_run)
    on_device(gallery)

    export = command("export", "write a trained run into a folder of its own: weights, configuration, model card")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist yet")
    push = command("push", "export a run to the Hugging Face Hub")
    push.add_argument("run", type=Path, metavar="RUN")
    push.add_argument("name", metavar="OWNER/NAME", help="on the Hub; made if it is not there")
    push.add_argument("--private", action="store_true", help="make it private, if it is made")
    machine(export, "the folder, its size and its model card")
    machine(push, "the name and the page's address")
    for publish in (export, push):
        publish.add_argument(
            "--license", metavar="ID", help="of the weights, as the Hub names it: apache-2.0, mit, ..."
        )
        setting(publish, of_a_run)
        on_device(publish)

    demo = command("demo", "train on small landscapes, evaluate and draw the gallery; what is done is kept")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="default: %(default)s")
    demo.add_argument("--config", type=Path, default=Path("configs/scenes-demo.toml"), help="default: %(default)s")
    machine(demo, "the run's folder, its checkpoint and steps, what metrics.json holds, the gallery's path")
    setting(demo, "change the configuration, such as training.steps=300; of a new demo alone")
    on_device(demo)

    config = command("config", "look at a configuration")
    actions = config.add_subparsers(dest="action", metavar="ACTION", required=True)
    look = actions.add_parser(
        "check",
        help="build what it describes and look through its data, without training",
        description="Build what a configuration describes, look through its data and say what its model costs, without "
        "training.",
        allow_abbrev=False,
    )
    look.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    machine(look, "samples, modalities, the cost, warnings")
    setting(look, "change the configuration")
    look.set_defaults(handler=_check_config)

    plan = command("plan", "what a configuration's training takes on some number of GPUs: memory, time, communication")
    plan.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    plan.add_argument("--gpus", type=_counts, default=[1, 8, 64], metavar="N,...", help="how many (default: 1,8,64)")
    plan.add_argument("--device", choices=GPUS, help="the GPU; without it say --flops, --memory and --bandwidth")
    for name, what in {**FIGURES, **ASSUMED}.items():
        plan.add_argument(f"--{name}", type=_positive if name == "machine" else _number, metavar="X", help=what)
    machine(plan, "what the table says, and more")
    setting(plan, "change the configuration")

    process = command("process", "look at a configuration's noise")
    actions = process.add_subparsers(dest="action", metavar="ACTION", required=True)
    plotting = actions.add_parser(
        "plot",
        help="draw the noise and weight schedules, the law of clocks and the path of sampling",
        description="Draw what a configuration says of noise: the noise and weight schedules, which clocks are trained "
        "together, and the path of sampling. Nothing is trained or read.",
        allow_abbrev=False,
    )
    plotting.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    plotting.add_argument("--out", required=True, type=Path, metavar="PNG", help="the picture to write")
    plotting.add_argument(
        "--part", choices=PARTS, default="all", help="the schedules alone, or the clocks alone (default: %(default)s)"
    )
    machine(plotting, "the picture's path, and the process that it shows")
    setting(plotting, "change the configuration")
    plotting.set_defaults(handler=_plot_process)

    data = command("data", "prepare data")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    packing = actions.add_parser(
        "pack",
        help="write a configuration's data set into shards, for object stores and slow disks",
        description="Write both splits of a configuration's data set into shards, all fields of all samples as they "
        "are, and print the table that reads them.",
        allow_abbrev=False,
    )
    packing.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    packing.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist yet")
    packing.add_argument("--as", dest="packer", default="litdata", metavar="KIND", help="default: %(default)s")
    machine(packing, "the folder, samples by split, the size, the table that reads it")
    setting(packing, "change the configuration")
    packing.set_defaults(handler=_pack_data)

    plugins = command("plugins", "what is installed")
    actions = plugins.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list plugins; imports none", description="List plugins; imports none.")
    listing.add_argument("--json", action="store_true", help="print one JSON list of objects instead of a table")
    listing.add_argument("--verbose", action="store_true", help="show modules, and import each plugin to time it")
    listing.set_defaults(handler=_list_plugins)
    new = actions.add_parser(
        "new",
        help="write a plugin package to start from",
        description="Write a complete plugin package to start from: a working plugin, its tests and its metadata.",
    )
    new.add_argument("name", metavar="NAME", help="of the new kind, such as depth: the package is mtdiffusion-depth")
    new.add_argument(
        "--kind",
        required=True,
        choices=SCAFFOLDS,
        action="extend",
        nargs="+",
        help="what it is; of several, given at once or each with --kind, all are written into one package",
    )
    new.add_argument(
        "--like",
        choices=LIKES,
        default="vector",
        help="what a modality's data are: a vector, a map, a sequence, or a vector from files of its own, with the "
        "field that reads them (default: %(default)s)",
    )
    new.add_argument("--out", type=Path, metavar="DIR", help="default: mtdiffusion-NAME; must not exist yet")
    machine(new, "the folder and the files' paths")
    new.set_defaults(handler=_new_plugin)
    checking = actions.add_parser(
        "check",
        help="check a plugin against its contract",
        description="Check a plugin against its contract. Exit status: 0 if it keeps it, 1 if a check failed.",
        allow_abbrev=False,
    )
    checking.add_argument("name", metavar="NAME", help="KIND, or GROUP.KIND")
    checking.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        help="check a modality or an evaluator as this TOML file has it, on samples of its data",
    )
    checking.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="set a key of the plugin's configuration; with --data, of CONFIG",
    )
    checking.add_argument("--latent", type=_positive, metavar="SIDE", help="of the largest latent (default: 8)")
    machine(checking, "what was checked, and of each check its status and why")
    checking.set_defaults(handler=_check_plugin)

    completion = command("completion", "print a script that completes commands and options in a shell")
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    completion.set_defaults(handler=_complete)

    listing.set_defaults(broken_commands=_add_commands(commands))  # last: none may take the name of one of ours
    return parser


def _add_commands(commands: Commands) -> list[EntryPoint]:
    """Add the subcommands that entry points declare. Warn of those that cannot be used, and return them."""
    broken = []
    for point in entry_points(COMMANDS):
        if problem := point.problem or _add_command(point, commands):
            problem = " ".join(problem.split())
            broken.append(point._replace(problem=problem))
            print(
                f"mtdiffusion: warning: subcommand {point.name} of {point.owner} cannot be used: {problem}",
                file=sys.stderr,
            )
    return broken


def _add_command(point: EntryPoint, commands: Commands) -> str:
    """Add what a module declares, all or nothing; what is wrong with it, if anything is."""
    if not point.names_module:
        return f"its entry point must point at a module, found {point.value!r}"
    remedy = f"Upgrade, reinstall or uninstall {point.distribution}"
    try:
        module = import_module(point.value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, or a library's own, such as a panic in Rust
        return f"the import of {point.value} failed: {type(error).__name__}: {error}. {remedy}"
    if not callable(add_parser := getattr(module, "add_parser", None)):
        return f"the module {point.value} has no function add_parser. {remedy}"
    # On a parser of its own first: what fails half way, or when its help is written, must leave nothing behind.
    trial = _Parser(prog="mtdiffusion", allow_abbrev=False)
    added = trial.add_subparsers(dest="command", metavar="COMMAND")
    try:
        add_parser(added)
        trial.format_help()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{point.value}.add_parser failed: {type(error).__name__}: {error}. {remedy}"
    if not added.choices:
        return f"{point.value}.add_parser added none. {remedy}"
    for name, parser in added.choices.items():
        if name in commands.choices:
            return f'there is a subcommand "{name}" already. Uninstall {point.distribution} or the other'
        if not _is_handled(parser):
            return f'{point.value}.add_parser set no default "handler" for "{name}". {remedy}'
    commands.choices.update(added.choices)
    commands._choices_actions.extend(added._choices_actions)
    return ""


def _is_handled(parser: argparse.ArgumentParser) -> bool:
    """Whether it is set what runs a subcommand: for itself, or for each subcommand of its own."""
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    nested = [sub for action in actions for sub in action.choices.values()]
    return callable(parser.get_default("handler")) or (bool(nested) and all(map(_is_handled, nested)))


def _check_config(args: argparse.Namespace) -> None:
    with held():
        from mtdiffusion_engine import commands

    commands.check_config(args)


def _plot_process(args: argparse.Namespace) -> None:
    with held():
        from mtdiffusion_engine import commands

    commands.plot_process(args)


def _pack_data(args: argparse.Namespace) -> None:
    with held():
        from mtdiffusion_engine import commands

    commands.pack_data(args)


def _complete(args: argparse.Namespace) -> None:
    import shtab

    parser = _parser()
    _complete_files(parser, shtab.FILE)
    print(shtab.complete(parser, args.shell))


def _complete_files(parser: argparse.ArgumentParser, files: object) -> None:
    """Have the arguments that are paths completed by files' names, of all subcommands, and by the names that may stand
    in their place."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_files(inner, files)
        elif names := getattr(action, "names", None):
            action.complete = _names_or_files(action.dest, names())  # type: ignore[attr-defined]
        elif action.type is Path:
            action.complete = files  # type: ignore[attr-defined]  # where shtab looks for it


def _names_or_files(dest: str, names: Iterable[str]) -> dict[str, object]:
    """What completes an argument that is one of these names or a file, in each shell's own words."""
    listed, function = " ".join(names), f"_mtdiffusion_{dest}_or_file"
    return {
        "bash": function,  # as "file" is in its name, shtab has bash end folders with a slash
        "zsh": function,
        "fish": f"{listed} (__fish_complete_path (commandline -ct))",
        "tcsh": f"`echo {listed} *`",
        "preamble": {
            "bash": f'{function}() {{ compgen -W "{listed}" -- "$1"; compgen -f -- "$1"; }}',
            "zsh": f"{function}() {{ _alternative 'names:{dest}:({listed})' 'files:file:_files' }}",
        },
    }


@with_json
def _list_plugins(args: argparse.Namespace) -> list[dict[str, str]] | None:
    from mtdiffusion_registry import Registry

    registry = Registry.discover()
    rows = [["GROUP", "KIND", "DISTRIBUTION", "VERSION", "STATUS", *(["SECONDS", "MODULE"] if args.verbose else [])]]
    notes = []
    if args.verbose:
        import mtdiffusion  # noqa: F401  # its import and torch's are no plugin's fault
    for info in registry.plugins():
        status, problem, more = info.status, info.reason, []
        if args.verbose:
            seconds, failure = _timed_import(registry, info) if info.status == "ok" else (None, "")
            more = ["-" if seconds is None else f"{seconds:.2f}", info.module]
            if failure:
                status, problem = "broken", failure
            elif seconds is not None and seconds > SLOW_IMPORT:
                notes.append(
                    f"{info.entry_point} of {info.owner}: slow: the import of {info.module} took {seconds:.1f} s; "
                    "heavy libraries are better imported where they are used"
                )
        rows.append([info.group or "?", info.kind or info.entry_point, info.distribution, info.version, status, *more])
        if status != "ok":
            notes.append(f"{info.entry_point} of {info.owner}: {status}: {problem}")
    for point in args.broken_commands:
        more = ["-", point.value] if args.verbose else []
        rows.append(["command", point.name, point.distribution, point.version, "broken", *more])
        notes.append(f"command {point.name} of {point.owner}: broken: {point.problem}")
    if args.json:
        names, *rows = rows
        return [dict(zip(map(str.lower, names), row, strict=True)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in notes:
        print(note)
    return None


def _timed_import(registry: Registry, info: PluginInfo) -> tuple[float, str]:
    """How long it takes to load a plugin (none, if another of its module was loaded before), and what went wrong."""
    from mtdiffusion_registry import UserError

    started = time.perf_counter()
    try:
        registry.config_class(info.group, info.kind)
    except UserError as error:
        return time.perf_counter() - started, str(error)
    return time.perf_counter() - started, ""


@with_json
def _new_plugin(args: argparse.Namespace) -> dict[str, object]:
    from mtdiffusion_engine.scaffold import GROUPS, write_package
    from mtdiffusion_registry import Registry

    groups = [GROUPS[kind] for kind in args.kind]
    folder = write_package(args.name, groups, args.out, Registry.discover(), args.like)
    if not args.json:
        print(f"{folder}: written. Next: pip install -e '{folder}[dev]' && pytest {folder}")
    paths = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    return {"name": args.name, "kinds": args.kind, "out": str(folder), "paths": paths}


def _check_plugin(args: argparse.Namespace) -> int:
    from mtdiffusion_registry import Registry, UserError

    known = {f"{info.group}.{info.kind}": info.kind for info in Registry.discover().plugins() if info.kind}
    every = [full for full, kind in known.items() if args.name in (full, kind)]
    found = every
    if len(every) > 1:  # a field of files often has the name of the modality that reads it, which is meant
        found = [full for full in every if full == args.name or not full.startswith("field.")]
    if not found:
        hint = _near(args.name, [*known, *known.values()])
        raise UserError(
            f'there is no plugin "{args.name}"{hint} (see all: mtdiffusion plugins list). After a '
            "change of entry points, install their package again"
        )
    if len(found) > 1:
        raise UserError(f'"{args.name}" is the kind of {len(every)} plugins; say which: {", ".join(every)}')

    failed, made = 0, []
    with json_document(args.json) as put:  # the lines are then of the work that goes on
        for title, contract in _contracts(args, found[0]):
            counts = {"ok": 0, "failed": 0, "skipped": 0}
            checks = []
            for outcome in contract.outcomes():
                # An evaluator that refuses the kit's made-up data may be right; of data that it is to judge, it fails.
                refused = args.data is not None and outcome.check.id == "build" and outcome.status == "skipped"
                status = "failed" if refused else outcome.status
                counts[status] += 1
                reason = " ".join(outcome.reason.split())
                print(f"{status:<8} {outcome.check.id:<18} {reason or outcome.check.contract}", flush=True)
                checks.append({"check": outcome.check.id, "status": status, "reason": reason or None})
            print(f"{title}: {', '.join(f'{count} {status}' for status, count in counts.items())}")
            made.append({"title": title, **counts, "checks": checks})
            failed += counts["failed"]
        put({"plugin": found[0], "checked": made})
    return 1 if failed else 0


def _contracts(args: argparse.Namespace, plugin: str) -> Iterator[tuple[str, Contract]]:
    """What is checked, and how it is called."""
    from mtdiffusion_registry import Registry, UserError
    from mtdiffusion_registry.config import apply_overrides
    from mtdiffusion_registry.testing import conformance

    if args.data is None:
        options = {} if args.latent is None else {"height": args.latent, "width": args.latent}
        kept = conformance(plugin, values=apply_overrides({}, args.set), **options)
        yield plugin, kept.contract(give="--set {key}=VALUE")
        return
    if args.latent is not None:
        raise UserError("--latent: with --data the configuration says it; set latent.height and latent.width there")
    from mtdiffusion_engine.conforming import contracts
    from mtdiffusion_engine.experiment import load_experiment

    experiment = load_experiment(args.data, args.set, Registry.discover())
    yield from ((f"{plugin} ({where})", contract) for where, contract in contracts(plugin, experiment))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 if a plugin fails a check, 2 for what the user can mend, 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # not every stream that takes their place has it
            reconfigure(errors="backslashreplace")  # a file's name need not be text
    # torch would import the devices that other distributions add, and fails if the metadata of any are damaged; ours
    # are the CPU and CUDA.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    keep_freed_memory()
    with terminable(), log_of_command():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return _run(parser, args)
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or ("terminated" if isinstance(interrupt, Terminated) else "interrupted")
        print(f"mtdiffusion: {said}", file=sys.stderr)
        return STATUS[type(interrupt)]
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
            return 2 if message else 1
        print(f"mtdiffusion: error: {message}", file=sys.stderr)
        return 2


def _message(error: Exception) -> str | None:
    """What to tell of an error that a person can mend; None if it is a fault of ours."""
    from mtdiffusion_registry import UserError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        into = f" to {error.filename2}" if error.filename2 else ""  # of a copy
        return f"{error.filename}{into}: {error.strerror}" if error.filename else str(error)
    return blame(error) or None


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.version:
        print(f"mtdiffusion {version('mtdiffusion')}")
    elif args.command is None:
        parser.print_help()
    elif handler := getattr(args, "handler", None):
        return handler(args) or 0
    else:
        with held():
            from mtdiffusion_engine import commands

        getattr(commands, args.command)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
