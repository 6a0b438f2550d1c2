"""The contract of weight schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion.interfaces import WeightSchedule
from mtdiffusion.retention import RETENTIONS, Retention
from mtdiffusion_registry.configs import WeightScheduleConfig
from mtdiffusion_registry.testing import config as of_config
from mtdiffusion_registry.testing.contract import Check, Subject, check, finite, kind_of, require, same_shape

__tracebackhide__ = True


@frozen(eq=False, slots=False)
class WeightScheduleSubject(Subject):
    """A weight schedule's config and the modality instances it is configured for."""

    config: WeightScheduleConfig
    names: Sequence[str] = ("a", "b")

    def signals(self) -> Iterator[tuple[str, int, Tensor]]:
        """Where, T, and the signal, for every retention and two numbers of steps."""
        n = len(self.names)
        for kind in RETENTIONS:
            for steps in (2, 50):
                retention = Retention.from_curve(curve="cosine", steps=steps, modalities=n, kind=kind)
                yield f"({kind}, {steps} steps)", steps, self.config.build(self.names).signal(retention, n)


@check("entry_point")
def build(subject: WeightScheduleSubject) -> None:
    """build gives a WeightSchedule."""
    schedule = subject.config.build(subject.names)
    fix = "subclass mtdiffusion.interfaces.WeightSchedule"
    require(isinstance(schedule, WeightSchedule), "build returns a WeightSchedule", kind_of(schedule), fix)


@check("build")
def signal(subject: WeightScheduleSubject) -> None:
    """signal is float64 [T + 1, N] for every retention."""
    for where, steps, m in subject.signals():
        shape = (steps + 1, len(subject.names))
        same_shape(m, shape, f"signal is [T + 1, N] {where}", "one row a time, t = 0 first")
        require(m.dtype == torch.float64, f"signal is float64 {where}", f"{m.dtype}", "compute schedules in float64")


@check("signal")
def values(subject: WeightScheduleSubject) -> None:
    """signal is finite for every retention."""
    for where, _, m in subject.signals():
        fix = "the SNR is infinite at t = 0: work with logarithms or with m"
        finite(m, f"signal is finite {where}", fix)


@check("values")
def determinism(subject: WeightScheduleSubject) -> None:
    """signal is the same every time."""
    for (where, _, m), (_, _, again) in zip(subject.signals(), subject.signals(), strict=True):
        require(torch.equal(m, again), f"signal is deterministic {where}", "two that differ", "draw nothing")


CHECKS: tuple[Check, ...] = (*of_config.CHECKS, build, signal, values, determinism)
