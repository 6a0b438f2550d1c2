"""What is installed, and how a configuration becomes objects.

A plugin needs the names below; nothing here imports torch. See also :mod:`mtdiffusion_registry.config` (configuration
files) and :mod:`mtdiffusion_registry.testing` (does my plugin keep the contract?).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtdiffusion_registry.configs import (
        GROUPS,
        BackboneConfig,
        ClockLawConfig,
        Config,
        DataField,
        DatasetConfig,
        EvaluatorConfig,
        FieldConfig,
        MethodConfig,
        ModalityConfig,
        TaskConfig,
        WeightScheduleConfig,
    )
    from mtdiffusion_registry.errors import ConfigError, EmptySplit, PluginError, UserError
    from mtdiffusion_registry.evaluation import Evaluator
    from mtdiffusion_registry.hookspecs import API_VERSION, hookimpl
    from mtdiffusion_registry.queries import Query
    from mtdiffusion_registry.registry import PluginInfo, Registry

__all__ = [
    "API_VERSION",
    "GROUPS",
    "BackboneConfig",
    "ClockLawConfig",
    "Config",
    "ConfigError",
    "DataField",
    "DatasetConfig",
    "EmptySplit",
    "Evaluator",
    "EvaluatorConfig",
    "FieldConfig",
    "MethodConfig",
    "ModalityConfig",
    "PluginError",
    "PluginInfo",
    "Query",
    "Registry",
    "TaskConfig",
    "UserError",
    "WeightScheduleConfig",
    "hookimpl",
]


def __getattr__(name: str) -> object:
    """Import a name when it is asked for (PEP 562): the command line must answer --help without attrs and pluggy."""
    if name in __all__:
        for home in ("errors", "queries", "evaluation", "configs", "hookspecs", "registry"):  # the light ones first
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
