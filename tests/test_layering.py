"""The arrows of the design: core <- registry <- plugins; core, registry <- engine <- benchmarks; and no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
from attrs import frozen

ROOT = Path(__file__).parent.parent


@frozen
class Room:
    """A root package and what it may import beside itself and the standard library.

    Attributes:
        rooms: our own packages.
        third_party: distributions' top-level modules; None for any.
    """

    package: str
    rooms: frozenset[str]
    third_party: frozenset[str] | None


def _room(package: str, rooms: str, third_party: str | None) -> Room:
    return Room(package, frozenset(rooms.split()), None if third_party is None else frozenset(third_party.split()))


ROOMS = {
    "core": _room("mtdiffusion", "", "torch attr attrs"),
    "registry": _room(
        "mtdiffusion_registry", "mtdiffusion", "torch attr attrs pluggy cattrs tomli_w pytest numpy PIL safetensors"
    ),
    "plugins": _room("mtdiffusion_plugins", "mtdiffusion mtdiffusion_registry", None),
    "engine": _room("mtdiffusion_engine", "mtdiffusion mtdiffusion_registry", None),
    "benchmarks": _room("mtdiffusion_benchmarks", "mtdiffusion mtdiffusion_registry mtdiffusion_engine", None),
}
OURS = {room.package for room in ROOMS.values()}
SOURCES = [(name, path) for name in ROOMS for path in sorted((ROOT / name).rglob("*.py"))]
MODALITY_KINDS = frozenset(
    key.removeprefix("modality.")
    for key in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mtdiffusion.plugins"]
    if key.startswith("modality.")
)

every_source = pytest.mark.parametrize(
    ("room", "path"), [pytest.param(name, path, id=str(path.relative_to(ROOT))) for name, path in SOURCES]
)


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level module of every absolute import, wherever it stands, ``import_module("name")`` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value).split(".")[0]


def forbidden_imports(room: Room, source: str) -> list[str]:
    """What a source file of a room imports but may not, with its line."""
    found = []
    for line, module in imported_modules(source):
        if module == room.package or module in room.rooms or module in sys.stdlib_module_names:
            continue
        if module in OURS or (room.third_party is not None and module not in room.third_party):
            found.append(f"line {line}: {module}")
    return found


def kind_comparisons(source: str, kinds: frozenset[str] = MODALITY_KINDS) -> list[str]:
    """Comparisons (==, in, match) of something called kind with a modality's kind written out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            subjects, parts = [node.left, *node.comparators], [node]
        elif isinstance(node, ast.Match):
            subjects, parts = [node.subject], [case.pattern for case in node.cases]
        else:
            continue
        names = {getattr(subject, "id", getattr(subject, "attr", "")) for subject in subjects}
        keys = {
            subject.slice.value
            for subject in subjects
            if isinstance(subject, ast.Subscript) and isinstance(subject.slice, ast.Constant)
        }
        constants = {c.value for part in parts for c in ast.walk(part) if isinstance(c, ast.Constant)} - keys
        if any(str(name).endswith("kind") for name in names | keys) and not constants.isdisjoint(kinds):
            found.append(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}")
    return found


def module_sources(room: str) -> dict[str, str]:
    """The source of each module of a room, by its full name; of a package, ending in ``.__init__``."""
    paths = [path for name, path in SOURCES if name == room]
    return {".".join(path.relative_to(ROOT / room).with_suffix("").parts): path.read_text() for path in paths}


def circle_of_imports(sources: Mapping[str, str]) -> list[str]:
    """Modules each of which imports the next, be it in a function or for types alone; the last is the first again."""
    modules = {name.removesuffix(".__init__") for name in sources}
    graph = {}
    for name, source in sources.items():
        imported = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                start = "." * node.level + (node.module or "")
                start = resolve_name(start, name.rpartition(".")[0]) if node.level else start
                names = {f"{start}.{alias.name}" for alias in node.names}
                imported |= {name if name in modules else start for name in names}
        graph[name.removesuffix(".__init__")] = imported & modules
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


@every_source
def test_imports_follow_the_arrows(room: str, path: Path) -> None:
    assert forbidden_imports(ROOMS[room], path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "path"),
    [pytest.param(name, path, id=str(path.relative_to(ROOT))) for name, path in SOURCES if name != "plugins"],
)
def test_no_modality_kind_is_compared_outside_plugins(room: str, path: Path) -> None:
    assert kind_comparisons(path.read_text()) == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_modules_of_a_room_import_one_another_in_a_circle(room: str) -> None:
    assert circle_of_imports(module_sources(room)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_all_code_of_a_room_is_in_its_package(room: str) -> None:
    package = ROOT / room / ROOMS[room].package
    assert (package / "__init__.py").exists()
    assert [path for name, path in SOURCES if name == room and package not in path.parents] == []


# The detectors themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "import numpy as np"),
        ("core", "from mtdiffusion_registry import Registry"),
        ("core", "def f():\n    import pluggy"),
        ("registry", "from mtdiffusion_plugins.image import ImageModality"),
        ("registry", "from torchvision import transforms"),
        ("plugins", "import mtdiffusion_engine.train"),
        ("engine", "if TYPE_CHECKING:\n    from mtdiffusion_plugins import image"),
        ("engine", "importlib.import_module('mtdiffusion_plugins.image')"),
        ("engine", "from mtdiffusion_benchmarks import tasks"),
        ("benchmarks", "import mtdiffusion_plugins"),
    ],
)
def test_an_import_against_an_arrow_is_found(room: str, source: str) -> None:
    assert len(forbidden_imports(ROOMS[room], source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "import math, torch\nfrom attrs import frozen\nfrom mtdiffusion.loss import mix\nfrom . import model"),
        ("registry", "import torch, pluggy, cattrs, tomli_w, tomllib\nfrom mtdiffusion import Modality"),
        ("plugins", "import open_clip\nfrom mtdiffusion_registry import hookimpl\nfrom mtdiffusion import Modality"),
        ("engine", "import accelerate\nfrom mtdiffusion import sample\nfrom mtdiffusion_registry import Registry"),
        ("benchmarks", "from mtdiffusion_engine import train\nimport rich"),
    ],
)
def test_an_import_along_an_arrow_is_allowed(room: str, source: str) -> None:
    assert forbidden_imports(ROOMS[room], source) == []


@pytest.mark.parametrize(
    "source",
    [
        "if kind == 'image': pass",
        "if 'label' == config.kind: pass",
        "if modality.kind in ('image', 'mask'): pass",
        "if config['kind'] != 'clip': pass",
        "if kind not in {'label'}: pass",
        "match config.kind:\n    case 'image' | 'mask': pass",
    ],
)
def test_a_comparison_with_a_modality_kind_is_found(source: str) -> None:
    assert len(kind_comparisons(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "if kind == 'rectified_flow': pass",  # of a retention
        "if kind == other.kind: pass",
        "if name in ('image', 'label'): pass",  # of an instance: data
        "kind = 'image'",
    ],
)
def test_other_comparisons_are_allowed(source: str) -> None:
    assert kind_comparisons(source) == []


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"p.a": "import p.b", "p.b": "def f():\n    from p.a import g"}, {"p.a", "p.b"}),
        ({"p.a": "from p import b", "p.b": "if TYPE_CHECKING:\n    from p import a"}, {"p.a", "p.b"}),
        ({"p.a": "from .b import x, y", "p.b": "from . import c", "p.c": "from p.a import z"}, {"p.a", "p.b", "p.c"}),
        ({"p.__init__": "from p.a import x", "p.a": "from p import y"}, {"p", "p.a"}),
        ({"p.__init__": "from .a import x", "p.a": "from . import b, y", "p.b": ""}, {"p", "p.a"}),
    ],
)
def test_a_circle_of_imports_is_found(sources: dict[str, str], circle: set[str]) -> None:
    assert set(circle_of_imports(sources)) == circle


@pytest.mark.parametrize(
    "sources",
    [
        {"p.a": "import p.b, p.c", "p.b": "from p.c import x", "p.c": "import torch"},
        {"p.__init__": "from p import a, b", "p.a": "from p import b", "p.b": ""},
        {"p.a": "from q import a", "p.b": "from p.a import b"},
    ],
)
def test_imports_without_a_circle_are_allowed(sources: dict[str, str]) -> None:
    assert circle_of_imports(sources) == []


def test_what_is_committed_stays_small() -> None:
    """A clone is to take seconds: pictures of the documents and small data, no weights and no results of runs."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no clone")
    sizes = {name: (ROOT / name).lstat().st_size for name in listed.decode().split("\0") if (ROOT / name).is_file()}
    largest = sorted(sizes.items(), key=lambda each: -each[1])[:5]
    assert sum(sizes.values()) < 10_000_000, f"the largest: {largest}"
