"""Distributions that importlib.metadata finds as installed ones: a .dist-info folder and modules on sys.path."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

Install = Callable[..., str]

PLUGIN = """
from typing import ClassVar
from attrs import frozen
from mtdiffusion_registry import DatasetConfig, hookimpl

MTDIFFUSION_API = 1

@frozen
class Toy(DatasetConfig):
    kind: ClassVar[str] = "toy"
    size: int = 3
    def build(self, split): ...

@hookimpl
def mtdiffusion_datasets():
    return [Toy]
"""
"""A correct plugin, from which the tests make incorrect ones."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTDIFFUSION_DISABLE_PLUGINS", raising=False)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution, first on the path; returns its module's name, which no other test uses."""
    modules: list[str] = []
    number = itertools.count()

    def install(
        code: str = PLUGIN,
        names: tuple[str, ...] = ("dataset.toy",),
        distribution: str = "toy-plugin",
        version: str = "1.0",
        value: str = "{module}",
        entry_points: str | None = None,
    ) -> str:
        i = next(number)
        folder = tmp_path / f"site{i}"
        module = f"plugin_{tmp_path.name.replace('-', '_')}_{i}"
        modules.append(module)
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        points = [f"{name} = {value.format(module=module)}" for name in names]
        text = "\n".join(["[mtdiffusion.plugins]", *points]) if entry_points is None else entry_points
        (info / "entry_points.txt").write_text(text)
        (folder / f"{module}.py").write_text(dedent(code))
        monkeypatch.syspath_prepend(folder)
        return module

    yield install
    for module in modules:
        sys.modules.pop(module, None)
