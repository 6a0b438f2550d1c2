"""What is installed, and how a configuration becomes objects.

A plugin needs the names below; nothing here imports torch. See also :mod:`mtdiffusion_registry.config` (configuration
files) and :mod:`mtdiffusion_registry.testing` (does my plugin keep the contract?).
"""

from mtdiffusion_registry.configs import (
    GROUPS,
    BackboneConfig,
    ClockLawConfig,
    Config,
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
