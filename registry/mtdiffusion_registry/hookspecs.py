"""The hooks that a plugin module may implement, one a group. Each takes nothing and returns config classes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import pluggy

from mtdiffusion_registry.configs import (
    BackboneConfig,
    ClockLawConfig,
    DatasetConfig,
    EvaluatorConfig,
    FieldConfig,
    MethodConfig,
    ModalityConfig,
    TaskConfig,
    WeightScheduleConfig,
)

PROJECT = "mtdiffusion"
API_VERSION = 1
"""A plugin module states the version it was written for: ``MTDIFFUSION_API = 1``."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mtdiffusion_modalities() -> list[type[ModalityConfig]]:  # type: ignore[empty-body]
    """Modalities: what can be diffused."""


@hookspec
def mtdiffusion_backbones() -> list[type[BackboneConfig]]:  # type: ignore[empty-body]
    """Backbones: the shared denoiser."""


@hookspec
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:  # type: ignore[empty-body]
    """Data sets."""


@hookspec
def mtdiffusion_fields() -> list[type[FieldConfig]]:  # type: ignore[empty-body]
    """Fields: how values are read from a person's files."""


@hookspec
def mtdiffusion_weight_schedules() -> list[type[WeightScheduleConfig]]:  # type: ignore[empty-body]
    """Weight schedules: how modalities enter the process over time."""


@hookspec
def mtdiffusion_clock_laws() -> list[type[ClockLawConfig]]:  # type: ignore[empty-body]
    """Laws of clocks: which noise levels are trained together, and in which order sampling goes."""


@hookspec
def mtdiffusion_evaluators() -> list[type[EvaluatorConfig]]:  # type: ignore[empty-body]
    """Evaluators: how samples are judged as a whole."""


@hookspec
def mtdiffusion_tasks() -> list[type[TaskConfig]]:  # type: ignore[empty-body]
    """Tasks: what is given and what is generated."""


@hookspec
def mtdiffusion_methods() -> list[type[MethodConfig]]:  # type: ignore[empty-body]
    """Methods of the benchmark: what is trained and compared."""


HOOKS: Mapping[str, str] = MappingProxyType(
    {
        "modality": "mtdiffusion_modalities",
        "backbone": "mtdiffusion_backbones",
        "dataset": "mtdiffusion_datasets",
        "field": "mtdiffusion_fields",
        "weight_schedule": "mtdiffusion_weight_schedules",
        "clock_law": "mtdiffusion_clock_laws",
        "evaluator": "mtdiffusion_evaluators",
        "task": "mtdiffusion_tasks",
        "method": "mtdiffusion_methods",
    }
)
"""The hook of each group."""
