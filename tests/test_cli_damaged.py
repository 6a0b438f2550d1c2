"""The command line beside damaged distributions, broken subcommands and names that are not text: it goes on working."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

GOOD = """
def add_parser(commands):
    commands.add_parser("greet", help="say hello").set_defaults(handler=lambda args: print("hello"))
"""


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """Put a distribution on the path, with one module."""

    def put(name: str, entry_points: bytes | str, code: str = "", metadata: bool = True) -> None:
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        if metadata:
            (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        points = entry_points.encode() if isinstance(entry_points, str) else entry_points
        (info / "entry_points.txt").write_bytes(points)
        (tmp_path / "site" / f"module_{name}.py").write_text(dedent(code))

    return put


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command line in a process of its own, with those distributions first on the path."""

    def run(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
        return subprocess.run(
            [sys.executable, "-m", "mtdiffusion_engine.cli", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    return run


def commands_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    lines = done.stdout.partition("COMMAND\n")[2].partition("\n\n")[0].splitlines()
    return [line.split()[0] for line in lines if line[4] != " "]


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("plugins", "list")])
def test_damaged_distributions_cost_nobody_anything(
    put: Callable[..., None], run: Run, arguments: tuple[str, ...]
) -> None:
    put("first", "no equals sign\n")
    put("second", b"[console_scripts]\nx\xe9 = y:z\n")
    put("third", "[mtdiffusion.plugins]\nno equals sign\n")
    put("fourth", "[mtdiffusion.plugins]\ndataset.toy = toy\n", metadata=False)
    put("mtdiffusion", "", metadata=False)  # what was left of another version
    put("greetings", "[mtdiffusion.commands]\ngreet = module_greetings\n", GOOD)
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    if arguments == ("--help",):
        assert {"train", "plugins", "bench", "greet"} <= set(commands_of(done))
    elif arguments == ("--version",):
        assert done.stdout.startswith("mtdiffusion ")
        assert "None" not in done.stdout
    else:
        assert "no equals sign of third 1.0: broken: line 2 of entry_points.txt is damaged" in done.stdout
        assert "fourth-1.0.dist-info: broken: METADATA is missing or empty" in done.stdout
        assert "first" not in done.stdout
        assert "modality" in done.stdout.split()


def test_nor_where_torch_is_imported_which_reads_all_entry_points_itself(put: Callable[..., None], run: Run) -> None:
    put("first", "[console_scripts]\nno equals sign\n")
    put(
        "greetings",
        "[mtdiffusion.commands]\ngreet = module_greetings\n",
        GOOD.replace("print(", "__import__('torch') and print("),
    )
    done = run("greet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


def test_a_subcommand_of_a_plugin_is_run(put: Callable[..., None], run: Run) -> None:
    put("greetings", "[mtdiffusion.commands]\ngreet = module_greetings\n", GOOD)
    done = run("greet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


def test_of_a_damaged_distribution_at_which_a_library_stops_it_is_said_whose_it_is(
    put: Callable[..., None], run: Run, tmp_path: Path
) -> None:
    put("damaged", b"[console_scripts]\nx\xe9 = y:z\n")
    code = """
    from importlib.metadata import entry_points

    def add_parser(commands):
        commands.add_parser("all", help="as Triton does").set_defaults(handler=lambda args: entry_points())
    """
    put("lists", "[mtdiffusion.commands]\nall = module_lists\n", code)
    done = run("all")
    assert (done.returncode, done.stdout) == (2, "")
    told = f"mtdiffusion: error: {tmp_path}/site/damaged-1.0.dist-info: is damaged (UnicodeDecodeError: 'utf-8' codec"
    assert done.stderr.startswith(told)
    assert done.stderr.endswith("Install it again, or delete that folder\n")


BROKEN = {
    "import": ("import no_such_library", "the import of module_import failed: ModuleNotFoundError: No module named"),
    "exit": ("raise SystemExit(3)", "the import of module_exit failed: SystemExit: 3"),
    "panic": ("raise BaseException('a panic')", "the import of module_panic failed: BaseException: a panic"),
    "syntax": ("def (", "the import of module_syntax failed: SyntaxError"),
    "lacking": ("", "the module module_lacking has no function add_parser"),
    "variable": ("add_parser = 3", "the module module_variable has no function add_parser"),
    "arguments": ("def add_parser(): pass", "module_arguments.add_parser failed: TypeError"),
    "leaving": ("import sys\ndef add_parser(c): sys.exit('line\\nline')", "add_parser failed: SystemExit: line line. "),
    "panicking": ("def add_parser(c): raise BaseException('a panic')", "add_parser failed: BaseException: a panic. "),
    "half": (
        "def add_parser(c):\n    c.add_parser('half', help='h').set_defaults(handler=print)\n    1 / 0",
        "module_half.add_parser failed: ZeroDivisionError: division by zero",
    ),
    "twice": (
        "def add_parser(c):\n    for _ in 'ab': c.add_parser('two', help='h').set_defaults(handler=print)",
        "module_twice.add_parser failed: ArgumentError: ",
    ),
    "percent": (
        "def add_parser(c): c.add_parser('percent', help='100%').set_defaults(handler=print)",
        "module_percent.add_parser failed: ",
    ),
    "nothing": ("def add_parser(c): pass", "module_nothing.add_parser added none"),
    "unhandled": (
        "def add_parser(c): c.add_parser('unhandled', help='h')",
        'module_unhandled.add_parser set no default "handler" for "unhandled"',
    ),
    "below": (
        "def add_parser(c):\n    s = c.add_parser('below', help='h').add_subparsers()\n"
        "    s.add_parser('x').set_defaults(handler=print)\n    s.add_parser('y')",
        'module_below.add_parser set no default "handler" for "below"',
    ),
    "train": (GOOD.replace("greet", "train"), 'there is a subcommand "train" already. Uninstall train or the other'),
    "plugins": (GOOD.replace("greet", "plugins"), 'there is a subcommand "plugins" already'),
    "both": (
        GOOD.replace("greet", "more") + '    commands.add_parser("sample", help="h").set_defaults(handler=print)',
        'there is a subcommand "sample" already',
    ),
}


def test_broken_subcommands_are_told_of_and_the_others_work(put: Callable[..., None], run: Run) -> None:
    for name, (code, _) in BROKEN.items():
        put(name, f"[mtdiffusion.commands]\n{name} = module_{name}\n", code)
    put("malformed", "[mtdiffusion.commands]\nno equals sign\n")
    put("object", "[mtdiffusion.commands]\nobject = module_object:add_parser\n", GOOD)
    put("zz", "[mtdiffusion.commands]\ngreet = module_zz\n", GOOD)
    ours = {"train", "sample", "evaluate", "gallery", "export", "push", "demo", "config", "data", "plugins"}
    ours |= {"play", "plan", "process", "completion"}
    sound = ours | {"bench", "greet"}

    done = run("--help")
    assert done.returncode == 0
    assert sorted(commands_of(done)) == sorted(sound)
    warnings = {}
    for line in done.stderr.splitlines():
        head, _, problem = line.partition(" cannot be used: ")
        assert head.startswith("mtdiffusion: warning: subcommand ")
        warnings[head.removeprefix("mtdiffusion: warning: subcommand ")] = problem
    assert set(warnings) == {
        *(f"{name} of {name} 1.0" for name in BROKEN),
        "no equals sign of malformed 1.0",
        "object of object 1.0",
    }
    for name, (_, problem) in BROKEN.items():
        assert problem in warnings[f"{name} of {name} 1.0"]
    assert warnings["object of object 1.0"].endswith("must point at a module, found 'module_object:add_parser'")
    assert warnings["no equals sign of malformed 1.0"].startswith("line 2 of entry_points.txt is damaged")

    assert run("greet").stdout == "hello\n"
    listed = run("plugins", "list")
    assert listed.returncode == 0
    assert ["command", "half", "half", "1.0", "broken"] in [line.split() for line in listed.stdout.splitlines()]
    assert "command half of half 1.0: broken: module_half.add_parser failed: ZeroDivisionError" in listed.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_of_files_that_are_not_text_can_be_told(put: Callable[..., None], run: Run, encoding: str) -> None:
    tell = """
    from pathlib import Path
    def add_parser(commands):
        tell = commands.add_parser("tell")
        tell.add_argument("path", type=Path)
        tell.set_defaults(handler=handler)
    def handler(args):
        print(args.path)
        args.path.read_bytes()
    """
    put("tell", "[mtdiffusion.commands]\ntell = module_tell\n", tell)
    done = run("tell", b"caf\xe9.toml", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert done.stdout == "caf\\udce9.toml\n"
    assert done.stderr == "mtdiffusion: error: caf\\udce9.toml: No such file or directory\n"
