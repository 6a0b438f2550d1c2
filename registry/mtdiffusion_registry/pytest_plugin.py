"""What makes a :func:`mtdiffusion_registry.testing.conformance` in a test file a test for each check.

pytest loads this wherever the package is installed, so it imports nothing heavy: a project that does not import the kit
pays nothing for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pytest


def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> Any:
    kit: Any = sys.modules.get("mtdiffusion_registry.testing")
    if kit is not None and type(obj) is getattr(kit, "Conformance", None):
        return ConformanceCollector.from_parent(collector, name=name, conformance=obj)
    return None


class ConformanceCollector(pytest.Collector):
    """The checks of one plugin."""

    def __init__(self, *, conformance: Any, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.conformance = conformance

    @cached_property
    def contract(self) -> Any:
        """Shared by the checks, of which each is made once; imports the plugin."""
        return self.conformance.contract()

    def collect(self) -> Iterator[pytest.Item]:
        for check in self.conformance.checks:
            yield ConformanceItem.from_parent(self, name=check.id, check=check, collector=self)


class ConformanceItem(pytest.Item):
    """One check."""

    def __init__(self, *, check: Any, collector: ConformanceCollector, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.check, self.collector = check, collector

    def runtest(self) -> None:
        outcome = self.collector.contract.outcome(self.check)
        if outcome.status == "skipped":
            pytest.skip(outcome.reason)
        if outcome.error is not None:
            raise outcome.error

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The message of what a person can mend; a traceback, of the plugin's own code, for anything else."""
        from mtdiffusion_registry.errors import UserError
        from mtdiffusion_registry.testing import ContractError

        if isinstance(excinfo.value, ContractError | UserError):
            return str(excinfo.value)
        shown = excinfo.traceback.filter(excinfo)
        excinfo.traceback = shown or excinfo.traceback
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.collector.name}: {self.check.contract}"
