"""The contracts of tasks and methods, as far as they can be seen without running a benchmark."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import tomli_w
from attrs import frozen

from mtdiffusion_registry.configs import MethodConfig, TaskConfig
from mtdiffusion_registry.queries import Query
from mtdiffusion_registry.testing import config as of_config
from mtdiffusion_registry.testing.contract import Check, Subject, check, contract_error, kind_of, require

__tracebackhide__ = True


@frozen(eq=False, slots=False)
class TaskSubject(Subject):
    """A task."""

    config: TaskConfig


@frozen(eq=False, slots=False)
class MethodSubject(Subject):
    """A method."""

    config: MethodConfig


@check("entry_point")
def instances(subject: TaskSubject) -> None:
    """instances are different names, at least one."""
    found = subject.config.instances()
    require(
        isinstance(found, tuple) and bool(found) and all(isinstance(name, str) for name in found),
        "instances() is a tuple of names",
        repr(found),
        "return the modality instances that take part",
    )
    require(len(set(found)) == len(found), "instances() are different names", repr(found), "name each once")


@check("instances")
def queries(subject: TaskSubject) -> None:
    """queries are different ones, of the task's instances alone."""
    found = subject.config.queries()
    require(
        isinstance(found, tuple) and bool(found) and all(isinstance(query, Query) for query in found),
        "queries() is a tuple of Query",
        repr(found),
        "return what a model is asked, at least one query",
    )
    known = set(subject.config.instances())
    strange = sorted({name for query in found for name in (*query.observed, *query.targets)} - known)
    require(not strange, "queries name instances of the task", ", ".join(strange), "name them in instances(), too")
    require(len(set(found)) == len(found), "queries are different", repr(found), "ask each once")


@check("entry_point")
def training(subject: TaskSubject) -> None:
    """training is tables that a configuration file can hold."""
    found = subject.config.training()
    fix = 'return changes to the experiment as tables: {"conditioning": {"partial": 0.5}}'
    contract = "training() is a mapping that TOML can hold"
    require(isinstance(found, Mapping), contract, kind_of(found), fix)
    try:
        tomli_w.dumps(found)
    except TypeError as error:
        raise contract_error(contract, str(error), fix) from error


@check("entry_point")
def role(subject: MethodSubject) -> None:
    """role is one that reports know."""
    known = ("joint", "control", "baseline")
    require(
        subject.config.role in known,
        f"role is one of {', '.join(known)}",
        repr(subject.config.role),
        'state it: role: ClassVar[Literal[...]] = "baseline"',
    )


@check("entry_point")
def fit(subject: MethodSubject) -> None:
    """fit takes a problem."""
    try:
        inspect.signature(subject.config.fit).bind(object())
    except TypeError as error:
        raise contract_error("fit(problem) takes one argument", str(error), "define fit(self, problem)") from error


TASK_CHECKS: tuple[Check, ...] = (*of_config.CHECKS, instances, queries, training)
METHOD_CHECKS: tuple[Check, ...] = (*of_config.CHECKS, role, fit)
