"""docs/plugin-reference.md has every hook, every class and every member of what plugins implement, and none besides."""

from __future__ import annotations

import ast
import inspect
import re
from abc import ABC
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import attrs
import pytest
from torch import Tensor

from mtdiffusion import interfaces
from mtdiffusion_benchmarks import interfaces as benchmark
from mtdiffusion_registry import configs, evaluation, queries
from mtdiffusion_registry.configs import BASES
from mtdiffusion_registry.hookspecs import HOOKS

PAGE = (Path(__file__).parents[1] / "docs/plugin-reference.md").read_text()
MODULES = (interfaces, configs, evaluation, queries, benchmark)


def defined(module: ModuleType) -> list[type]:
    """The public classes that a module defines, in its order."""
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


CLASSES = [cls for module in MODULES for cls in defined(module)]


def members(cls: type) -> set[str]:
    """What a class has of its own: methods, attributes, and what its __init__ sets; abstract ones even if special."""
    found = {*vars(cls), *vars(cls).get("__annotations__", {})}
    init = vars(cls).get("__init__")
    if init is not None and not attrs.has(cls):
        found |= {
            node.attr
            for node in ast.walk(ast.parse(dedent(inspect.getsource(init))))
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
    return {name for name in found if not name.startswith("_")} | set(getattr(cls, "__abstractmethods__", ()))


def section(title: str) -> str:
    """What stands under a heading of whichever level, to the next."""
    found = re.split(rf"^##+ {re.escape(title)}$", PAGE, flags=re.M)
    assert len(found) == 2, f"{title}: expected one section, found {len(found) - 1}"
    return re.split(r"^##+ ", found[1], flags=re.M)[0]


def rows(text: str) -> dict[str, tuple[tuple[str, ...] | None, str]]:
    """By member: the names of its parameters (None: it is no method), and whether it is abstract, optional or given."""
    found: dict[str, tuple[tuple[str, ...] | None, str]] = {}
    for cells in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \| .*\S.* \|$", text, re.M):
        for name, arguments in re.findall(r"`(\w+)(\([^`]*\))?`", cells[0]):
            assert name not in found, f"{name} stands there twice"
            parameters = tuple(re.findall(r"\w+", arguments)) if arguments else None
            found[name] = (parameters, cells[1].strip("*"))
    return found


def test_there_is_something_to_compare() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert names >= {"Encoder", "Modality", "Backbone", "Evaluator", "Query", "Problem", "Fitted", "MethodConfig"}
    assert members(interfaces.Modality) >= {"encoder", "loss_weight", "derived", "check", "predictive_metrics"}
    assert members(interfaces.Dataset) == {
        "__len__",
        "__getitem__",
        "varied",
        "without",
        "stored",
        "describe",
        "fingerprint",
        "class_names",
    }
    assert members(benchmark.Fitted) >= {"cost", "curve", "answers", "generate", "predict"}


def test_everything_is_imported_from_where_the_page_says() -> None:
    found = re.findall(r"^\| .*\| `([\w.]+)` \| (.*) \|$", section("Where everything is imported from"), re.M)
    names = {name: module for module, row in found for name in re.findall(r"`(\w+)`", row)}
    for name, module in names.items():
        assert hasattr(import_module(module), name), f"{module}.{name}"
    by_hand = {"Config"}  # which plugins do not subclass
    assert {cls.__name__ for cls in CLASSES} - names.keys() == by_hand


def test_every_hook_is_there_with_its_group_and_base() -> None:
    found = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", section("Hooks"), re.M)
    assert found == [(HOOKS[group], group, base.__name__) for group, base in BASES.items()]


def test_every_class_has_a_section_and_no_others_do() -> None:
    titles = set(re.findall(r"^### (\w+)$", PAGE, re.M))
    assert titles == {cls.__name__ for cls in CLASSES}
    contents = PAGE.partition("\n## ")[0]
    assert set(re.findall(r"\[(\w+)\]\(#\w+\)", contents)) >= titles


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_member_is_there_and_no_others(cls: type) -> None:
    assert set(rows(section(cls.__name__))) == members(cls)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_methods_have_the_parameters_of_the_code(cls: type) -> None:
    for name, (parameters, _) in rows(section(cls.__name__)).items():
        function = inspect.getattr_static(cls, name, None)
        function = function.__func__ if isinstance(function, classmethod) else function
        expected = tuple(inspect.signature(function).parameters)[1:] if inspect.isfunction(function) else None
        assert parameters == expected, name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_what_must_be_implemented_is_marked(cls: type) -> None:
    """A method is abstract as the code says; an attribute, if it is annotated but has no value to inherit."""
    implemented = issubclass(cls, ABC)  # others are read, not subclassed
    annotated = vars(cls).get("__annotations__", {})
    for name, (parameters, status) in rows(section(cls.__name__)).items():
        if not implemented:
            assert status == "given", name
        elif parameters is not None:
            assert (status == "abstract") == (name in cls.__abstractmethods__), name
        elif status == "given":
            assert name not in annotated or name == "group", name  # which the bases of plugins' classes have set
        else:
            assert status in ("abstract", "optional"), name
            assert (status == "abstract") == (name in annotated and not hasattr(cls, name)), name


def test_a_member_that_the_page_lacks_is_seen() -> None:
    class Encoder(interfaces.Encoder):
        width = 3

        def forward(self, x: Tensor) -> Tensor:
            return x

        def warp(self) -> None: ...

    assert members(Encoder) - rows(section("Encoder")).keys() == {"width", "warp"}
