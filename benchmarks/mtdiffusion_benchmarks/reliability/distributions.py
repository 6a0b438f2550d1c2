"""Made-up distributions on the path, and what the command line says of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mtdiffusion_benchmarks.reliability.children import Ended, started_anew
from mtdiffusion_benchmarks.reliability.jobs import Bench
from mtdiffusion_benchmarks.reliability.kills import Wrong
from mtdiffusion_registry.configs import GROUPS
from mtdiffusion_registry.hookspecs import API_VERSION, HOOKS

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_MODULES = ("madeup_a", "madeup_b", "madeup_c")
_KINDS = ("madeup", "label", "image")
_USED = {
    ("modality", "madeup"): 'modalities.label.kind="madeup"',
    ("modality", "label"): 'modalities.label.kind="label"',
    ("backbone", "madeup"): 'backbone={kind="madeup"}',
    ("dataset", "madeup"): 'data.kind="madeup"',
    ("field", "madeup"): 'data.fields.label="madeup"',
}
"""Group and kind of a plugin, and what asks for it."""
_RAISES = (
    "ImportError('gone')",
    "ModuleNotFoundError(name=None)",
    "SystemExit(3)",
    "KeyError()",
    "MemoryError",
    "GeneratorExit",
    "BaseException('a panic')",
    "UnicodeDecodeError('utf-8', b'x', 0, 1, chr(0xdc80))",
)
_BODIES = (
    "x = (",
    "x = " + "(" * 300 + ")" * 300,
    "import madeup_c",
    "import sys; sys.modules[__name__] = None",
    "import sys; sys.modules[__name__] = 3",
    "import sys; del sys.modules[__name__]",
    "def __getattr__(name): raise RuntimeError(name)",
    "def __dir__(): raise RuntimeError('dir')",
    "def __dir__(): return [3, 'x']",
    "class Odd:\n    def __getattr__(self, name): raise RuntimeError(name)\nodd = Odd()",
    "def __getattr__(name): return __getattr__",
    *(f"raise {error}" for error in _RAISES),
)
_CLASSES = (
    "3",
    "None",
    "object()",
    "type('M', (), {})",
    "type('M', (BASE,), {})",
    "type('M', (BASE,), {'kind': 3})",
    "attrs.frozen(type('M', (BASE,), {'kind': 'madeup'}))",
    "attrs.frozen(type('M', (BASE,), {'kind': ['madeup']}))",
    "attrs.frozen(type('M', (BASE,), {'kind': 'other'}))",
    "Odd",
)
_RETURNS = ("None", "3", "[]", "{}", "'madeup'", "[CLASS]", "(CLASS, CLASS)", "[CLASS for _ in range(2)]", "iter(())")
_PARSERS = (
    "3",
    "lambda: None",
    "lambda commands: None",
    "lambda commands: commands.add_parser('madeup')",
    "lambda commands: commands.add_parser('train')",
    "lambda commands: commands.add_parser('madeup', help='%(nothing)s').set_defaults(handler=print)",
    "lambda commands: commands.add_parser('madeup', help=3).set_defaults(handler=print)",
    "lambda commands: commands.add_parser(3).set_defaults(handler=print)",
    "lambda commands: commands.add_parser('mad\\x1b[2Jeup').set_defaults(handler=3)",
    "lambda commands: commands.add_parser('madeup', aliases=['train']).set_defaults(handler=print)",
)


class MadeUp(NamedTuple):
    """A distribution.

    Attributes:
        folder: of its metadata.
        files: of the metadata, by name.
        modules: sources, by name.
    """

    folder: str
    files: dict[str, bytes]
    modules: dict[str, bytes]


_DAMAGE = (
    ("entry_points.txt", b"[a]\nb = \xff\n"),
    ("entry_points.txt", b"[a]\nno equals sign\n"),
    ("METADATA", b"Name: \xff\n"),
    ("entry_points.txt", "[a]\nb = c\n".encode("utf-16")),
    ("METADATA", b"\0" * 100),
)
Case = tuple[list[MadeUp], Sequence[str]]
"""What is on the path, and a command line."""


def cases() -> SearchStrategy[Case]:
    """One to three distributions, and a command that meets them."""
    from hypothesis import strategies as st

    names = st.sampled_from([f"{group}.{kind}" for group in GROUPS for kind in _KINDS]) | st.text(max_size=12)
    values = st.sampled_from([*_MODULES, "madeup_a:x", "madeup_a.inner", "os", "", "1x", ".madeup_a"])
    sections = st.sampled_from(
        ["[mtdiffusion.plugins]", "[mtdiffusion.commands]", "[mtdiffusion.plugins", "[console_scripts]", "[]"]
    )
    pairs = st.tuples(names, values | st.text(max_size=12)).map(" = ".join)
    lines = st.lists(sections | pairs | st.text(max_size=20), max_size=6).map("\n".join)
    owners = st.sampled_from(["madeup", "Made-Up", "made.up", "mtdiffusion", ""]) | st.text(max_size=12)
    versions = st.sampled_from(["1.0", "1.0", "", "9" * 300]) | st.text(max_size=12)
    metadata = st.tuples(owners, versions).map(lambda pair: "Name: {}\nVersion: {}\n".format(*pair))
    folders = st.sampled_from(
        ["madeup-1.0.dist-info", "b-1.dist-info", "~adeup-1.0.dist-info", "madeup.egg-info", "mtdiffusion-9.dist-info"]
    )
    modules = st.fixed_dictionaries(
        {"madeup_a": _damaged(_plugins()), "madeup_b": _damaged(_commands())},
        optional={"madeup_c": _damaged(_plugins() | _commands())},
    )

    @st.composite
    def draw(drawn: DrawFn) -> Case:
        group, kind = drawn(st.sampled_from(sorted(_USED)))
        sound = f"[mtdiffusion.plugins]\n{group}.{kind} = madeup_a\n[mtdiffusion.commands]\nmadeup = madeup_b\n"
        points = st.tuples(st.just(sound) | st.just(""), lines).map("".join)
        files = st.fixed_dictionaries(
            {"entry_points.txt": _damaged(points), "METADATA": _damaged(metadata)}, optional={"PKG-INFO": st.binary()}
        )
        command = drawn(
            st.sampled_from(
                [
                    ("--help",),
                    ("plugins", "list"),
                    ("plugins", "list", "--json"),
                    ("plugins", "check", f"{group}.{kind}"),
                    ("config", "check", "config.toml"),
                    ("config", "check", "config.toml", "--set", _USED[group, kind]),
                    ("config", "check", "config.toml", "--set", _USED[group, kind]),
                ]
            )
        )
        return drawn(st.lists(st.builds(MadeUp, folders, files, modules), min_size=1, max_size=3)), command

    return draw()


def _damaged(texts: SearchStrategy[str]) -> SearchStrategy[bytes]:
    """Bytes of a text: mostly as they should be, else in another encoding, cut short or with some that are none."""
    from hypothesis import strategies as st

    @st.composite
    def draw(drawn: DrawFn) -> bytes:
        text = drawn(texts)
        content = text.encode(errors="surrogatepass")
        how = drawn(st.sampled_from(["whole", "whole", "whole", "whole", "utf-16", "latin-1", "cut", "spliced"]))
        if how in ("utf-16", "latin-1"):
            return text.encode(how, errors="replace")
        place = drawn(st.integers(0, len(content)))
        if how == "cut":
            return content[:place]
        return content[:place] + drawn(st.binary(max_size=6)) + content[place:] if how == "spliced" else content

    return draw()


def _plugins() -> SearchStrategy[str]:
    """Modules that are meant as plugins, and are none."""
    from hypothesis import strategies as st

    versions = st.sampled_from([API_VERSION, API_VERSION, API_VERSION, 99, -1, "1", None])
    api = versions.map("MTDIFFUSION_API = {!r}".format)
    marker = st.sampled_from(["@hookimpl\n", "@hookimpl\n", "@hookimpl\n", "", "@hookimpl(specname='nothing')\n"])
    given = st.sampled_from(["", "", "", "a, b", "*, a"])
    throws = st.sampled_from(_RAISES).map("(_ for _ in ()).throw({})".format)
    groups = st.sampled_from(sorted({group for group, _ in _USED}))

    def hook(drawn: tuple[str, str, str, str, str]) -> str:
        marked, group, parameters, returned, found = drawn
        return f"""
import attrs
from mtdiffusion_registry import hookimpl
from mtdiffusion_registry.configs import BASES
BASE = BASES[{group!r}]
class Odd(type):
    def __subclasscheck__(self, other): raise KeyError
{marked}def {HOOKS[group]}({parameters}): return {returned.replace("CLASS", found)}
"""

    hooks = st.tuples(marker, groups, given, st.sampled_from(_RETURNS) | throws, st.sampled_from(_CLASSES)).map(hook)
    bodies = st.lists(hooks | st.sampled_from(_BODIES), min_size=1, max_size=3).map("\n".join)
    return st.tuples(api, bodies).map("\n".join) | st.text(max_size=60)


def _commands() -> SearchStrategy[str]:
    """Modules that are meant as subcommands, and are none."""
    from hypothesis import strategies as st

    throws = st.sampled_from(_RAISES).map("lambda commands: (_ for _ in ()).throw({})".format)
    parsers = (st.sampled_from(_PARSERS) | throws).map("add_parser = {}".format)
    return st.lists(parsers | st.sampled_from(_BODIES), min_size=1, max_size=2).map("\n".join) | st.text(max_size=60)


def met(case: Case) -> None:
    """Put distributions on the path, run the command, and take them off again.

    Raises:
        AssertionError: if it ends otherwise than with status 0, 1 or 2, in silence or with a traceback.
    """
    made_up, arguments = case
    site = Path("site").absolute()
    shutil.rmtree(site, ignore_errors=True)
    for number, (folder, files, modules) in enumerate(made_up):
        root = site / str(number)
        (root / folder).mkdir(parents=True)
        for name, content in files.items():
            (root / folder / name).write_bytes(content)
        for name, source in modules.items():
            (root / f"{name}.py").write_bytes(source)
    before = list(sys.path)
    sys.path[:0] = [str(site / str(number)) for number in range(len(made_up))]
    importlib.invalidate_caches()
    try:
        status, said = _run(arguments)
    finally:
        sys.path[:] = before
        for name in _MODULES:
            sys.modules.pop(name, None)
    assert "Traceback (most recent call last)" not in said, said
    assert status in (0, 1, 2), f"status {status}: {said}"
    assert said.strip(), f"status {status}, and nothing is said"


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    """The command line in this process: its status, and what it wrote on both outputs."""
    from mtdiffusion_engine.cli import main

    content = io.BytesIO()
    out = io.TextIOWrapper(content, encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main(list(arguments))
        except SystemExit as leave:  # argparse's
            status = leave.code if isinstance(leave.code, int) else 70
    return status, content.getvalue().decode(errors="replace")


def in_new_processes(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """Damaged distributions before a process that starts from nothing, of which libraries that it imports may look at
    all that is installed: a result or a sentence."""
    for trial in range(trials):
        file, content = _DAMAGE[trial % len(_DAMAGE)]
        bench.empty()
        info = bench.place.work / "site" / "madeup-1.0.dist-info"
        info.mkdir(parents=True)
        files = {"METADATA": b"Name: madeup\nVersion: 1.0\n", "entry_points.txt": b"[a]\nb = c\n", file: content}
        for name, each in files.items():
            (info / name).write_bytes(each)
        path = os.pathsep.join(["site", *sys.path])
        process = started_anew(bench.place, ("config", "check", "config.toml"), {"PYTHONPATH": path})
        said, _ = process.communicate()
        wrong = Ended(process.returncode, said, 0, 0).wrong(0, 2)
        yield f"{file} is {content[:20]!r}: {wrong}" if wrong else ""


def target() -> tuple[SearchStrategy[Case], Callable[[Case], None]]:
    """What is drawn, and what is done with it."""
    return cases(), met
