"""The command line. Only the standard library is imported before it is known what to do: --help must be quick."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

TRACEBACK_VARIABLE = "MTDIFFUSION_TRACEBACK"
SOLVERS = ("ancestral", "ddim", "dpmpp_2m")


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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


# argparse names a type by its __name__ in "invalid ... value".
_positive.__name__ = "positive integer"
_natural.__name__ = "non-negative integer"


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
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")

    train = command("train", "train a configuration")
    train.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="TOML file (to resume: the run's own)")
    train.add_argument("--out", required=True, type=Path, metavar="RUN", help="the run's folder; must not exist yet")
    train.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="change the configuration"
    )
    train.add_argument("--resume", action="store_true", help="continue the run in RUN from its newest checkpoint")
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
        "--visible",
        action="append",
        default=[],
        metavar="NAME=MASK.png",
        help="what is seen of something observed: white is seen, black is filled in; repeatable",
    )
    sample.add_argument("--generate", type=_names, metavar="NAME,...", help="what to generate (default: all the rest)")
    sample.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist yet")
    sample.add_argument("--steps", type=_positive, help="solver steps (this and below, default: as the run says)")
    sample.add_argument("--solver", choices=SOLVERS)
    sample.add_argument("--guidance", type=float, help="classifier-free guidance on what is observed; 1 is none")
    sample.add_argument("--eta", type=float, help="noise of a ddim step, in [0, 1]")
    sample.add_argument(
        "--draw",
        action=argparse.BooleanOptionalAction,
        help="draw from the final distributions instead of taking their modes",
    )
    sample.add_argument("--seed", type=_natural, default=0)
    on_device(sample)

    evaluate = command("evaluate", "measure a run on held-out data")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument("--samples", type=_positive, help="held-out samples (default: as the run says)")
    evaluate.add_argument("--steps", type=_positive, help="solver steps of the conditionals")
    evaluate.add_argument("--seed", type=_natural)
    on_device(evaluate)

    gallery = command("gallery", "draw samples and every conditional of a run")
    gallery.add_argument("run", type=Path, metavar="RUN")
    gallery.add_argument("--out", type=Path, metavar="PNG", help="default: RUN/gallery.png")
    gallery.add_argument("--seed", type=_natural, default=0)
    on_device(gallery)

    demo = command("demo", "train on handwritten digits, evaluate and draw the gallery; what is done is kept")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="default: %(default)s")
    demo.add_argument("--config", type=Path, default=Path("configs/digits-demo.toml"), help="default: %(default)s")
    demo.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=argparse.SUPPRESS)
    on_device(demo)

    plugins = command("plugins", "what is installed")
    actions = plugins.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list plugins; imports none", description="List plugins; imports none.")
    listing.add_argument("--verbose", action="store_true", help="show the modules, too")
    return parser


def _list_plugins(verbose: bool) -> None:
    from mtdiffusion_registry import Registry

    plugins = Registry.discover().plugins()
    rows = [("GROUP", "KIND", "DISTRIBUTION", "VERSION", "STATUS", "MODULE")]
    rows += [
        (info.group or "?", info.kind or info.entry_point, info.distribution, info.version, info.status, info.module)
        for info in plugins
    ]
    if not verbose:
        rows = [row[:-1] for row in rows]  # type: ignore[misc]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for info in plugins:
        if info.status != "ok":
            print(f"{info.entry_point} of {info.owner}: {info.status}: {info.reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 2 for what the user can mend, 130 after Ctrl-C.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return _run(parser, args)
    except KeyboardInterrupt as interrupt:
        print(f"mtdiffusion: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
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
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.version:
        from importlib.metadata import version

        print(f"mtdiffusion {version('mtdiffusion')}")
    elif args.command is None:
        parser.print_help()
    elif args.command == "plugins":
        _list_plugins(args.verbose)
    else:
        from mtdiffusion_engine import commands

        getattr(commands, args.command)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
