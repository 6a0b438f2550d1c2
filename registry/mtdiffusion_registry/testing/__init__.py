"""Does a plugin keep the contract? In a test file, by the name of its entry point or by a config::

    from mtdiffusion_registry.testing import conformance

    sonar = conformance("modality.sonar")

pytest then shows each check as a test of its own, such as ``test_sonar.py::sonar::nll``. ``mtdiffusion plugins check
modality.sonar`` makes the same checks. To make all of them within a test of one's own, there is a function for each
group, such as :func:`check_modality`.

A check that fails raises :class:`ContractError`, which says what the contract is, what was found and how to meet it.
They run on the CPU within seconds, leave the global random state as it was, and are repeatable.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from attrs import NOTHING, fields, frozen
from torch import Tensor

from mtdiffusion_registry.config import structure
from mtdiffusion_registry.configs import (
    BASES,
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
from mtdiffusion_registry.errors import ConfigError, PluginError, UserError, did_you_mean
from mtdiffusion_registry.registry import PluginInfo, Registry
from mtdiffusion_registry.testing import (
    backbone,
    benchmark,
    clock_law,
    dataset,
    evaluator,
    field,
    modality,
    weight_schedule,
)
from mtdiffusion_registry.testing.config import CHECKS as CONFIG_CHECKS
from mtdiffusion_registry.testing.contract import (
    BATCHES,
    Check,
    Contract,
    ContractError,
    NotApplicable,
    Outcome,
    Subject,
)

__all__ = [
    "Check",
    "Conformance",
    "Contract",
    "ContractError",
    "NotApplicable",
    "Outcome",
    "check_backbone",
    "check_clock_law",
    "check_config",
    "check_dataset",
    "check_evaluator",
    "check_field",
    "check_method",
    "check_modality",
    "check_task",
    "check_weight_schedule",
    "conformance",
    "installed",
]

PLUGIN = "mtdiffusion_registry.pytest_plugin"

CHECKS: Mapping[str, tuple[Check, ...]] = MappingProxyType(
    {
        "modality": modality.CHECKS,
        "backbone": backbone.CHECKS,
        "dataset": dataset.CHECKS,
        "field": field.CHECKS,
        "weight_schedule": weight_schedule.CHECKS,
        "clock_law": clock_law.CHECKS,
        "evaluator": evaluator.CHECKS,
        "task": benchmark.TASK_CHECKS,
        "method": benchmark.METHOD_CHECKS,
    }
)
"""The contract of each group."""


def installed(group: str) -> list[PluginInfo]:
    """The usable plugins of a group, to parametrize a test over what is installed; imports none of them."""
    return [info for info in Registry.discover().plugins() if info.group == group and info.status == "ok"]


@frozen(eq=False)
class Conformance:
    """The contract of one plugin, for pytest to collect.

    Attributes:
        plugin: the name of its entry point, ``GROUP.KIND``, or a config.
        values: of the config, by key, if it is named.
        options: as of :func:`check_modality` and its neighbours.
    """

    plugin: str | Config
    values: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def checks(self) -> tuple[Check, ...]:
        """Known without importing the plugin."""
        group = self.plugin.partition(".")[0] if isinstance(self.plugin, str) else self.plugin.group
        if group not in CHECKS:
            raise UserError(
                f'{self.plugin!r}: expected GROUP.KIND, found no group "{group}"{did_you_mean(group, CHECKS)} '
                f"(known: {', '.join(CHECKS)})"
            )
        return CHECKS[group]

    def contract(self, give: str = 'values={{"{key}": ...}}') -> Contract:
        """The checks of this plugin; imports it.

        Args:
            give: how errors say that a value is given to ``{key}``.

        Raises:
            UserError: if there is no such plugin, or the values do not fit it.
        """
        if not isinstance(self.plugin, str):
            return Contract(_subject(self.plugin, _entry_point_of(self.plugin), self.options), self.checks)
        registry = Registry.discover()
        group, _, kind = self.plugin.partition(".")
        infos = [info for info in registry.plugins() if (info.group, info.kind) == (group, kind)]
        try:
            cls = registry.config_class(group, kind)
        except PluginError:  # the first check says what is wrong
            return Contract(Subject(None, info=infos[0]), self.checks)
        try:
            config = structure(registry, {"kind": kind, **self.values}, BASES[group], self.plugin)
        except ConfigError as error:
            needed = [each.name for each in fields(cls) if each.init and each.default is NOTHING]
            if missing := [give.format(key=key) for key in needed if key not in self.values]:
                raise ConfigError(f"{error}\n{self.plugin}: it has no default; give {' and '.join(missing)}") from error
            raise
        return Contract(_subject(config, infos[0], self.options), self.checks)


def conformance(plugin: str | Config, *, values: Mapping[str, Any] | None = None, **options: Any) -> Conformance:
    """The whole contract of a plugin: assign it to a name in a test file, and each check is a test of that name.

    Args:
        plugin: the name of its entry point, ``"modality.sonar"``, or a config, ``SonarConfig(bins=64)``.
        values: of the config, by key, where a plugin that is named has no default.
        options: those of :func:`check_modality`, :func:`check_backbone`, ..., for the plugin's group. A modality needs
            no ``examples``: a fresh head makes them. Real ones make the better test.

    Raises:
        UserError: for an unknown group, or where pytest runs without this package's plugin and would collect nothing.
    """
    # pytest's variable is inherited by programs that a test starts: it is pytest here only if it is imported, too.
    if "PYTEST_VERSION" in os.environ and "pytest" in sys.modules and PLUGIN not in sys.modules:
        raise UserError(f"conformance needs the pytest plugin of mtdiffusion, which is not loaded: pytest -p {PLUGIN}")
    found = Conformance(plugin, values or {}, options)
    _ = found.checks  # an unknown group is to be known where it is written
    return found


def _subject(config: Config, info: PluginInfo | None, options: Mapping[str, Any]) -> Subject:
    make = _SUBJECTS[config.group]
    known = list(inspect.signature(make).parameters)[2:]
    if unknown := sorted(options.keys() - set(known)):
        raise UserError(
            f"the checks of a {config.group} have no option {', '.join(unknown)} (known: {', '.join(known) or 'none'})"
        )
    subject: Subject = make(config, info, **options)
    return subject


def _entry_point_of(config: Config) -> PluginInfo | None:
    """The entry point that gives a config's class, if it is installed."""
    registry = Registry.discover()
    for info in registry.plugins():
        if (info.group, info.kind, info.status) == (config.group, config.kind, "ok"):
            try:
                return info if registry.config_class(info.group, info.kind) is type(config) else None
            except UserError:
                return None
    return None


def _modality(
    config: ModalityConfig,
    info: PluginInfo | None,
    *,
    examples: Tensor | None = None,
    height: int = 8,
    width: int = 8,
    encoding_bias: float = 0.05,
    source: Tensor | Sequence[str] | None = None,
) -> Subject:
    if examples is not None and source is not None:
        raise UserError("examples and source: give one of the two; examples are derived from the source")
    for name, given in (("examples", examples), ("source", source)):
        if given is not None and len(given) < max(BATCHES):
            raise UserError(f"{name}: expected at least {max(BATCHES)}, found {len(given)}")
    return modality.ModalitySubject(config, examples, height, width, encoding_bias, source, info=info)


def _backbone(config: BackboneConfig, info: PluginInfo | None, *, height: int = 8, width: int = 8) -> Subject:
    return backbone.BackboneSubject(config, height, width, info=info)


def _weight_schedule(
    config: WeightScheduleConfig, info: PluginInfo | None, *, names: Sequence[str] = ("a", "b")
) -> Subject:
    return weight_schedule.WeightScheduleSubject(config, names, info=info)


def _clock_law(config: ClockLawConfig, info: PluginInfo | None, *, names: Sequence[str] = ("a", "b")) -> Subject:
    return clock_law.ClockLawSubject(config, names, info=info)


def _evaluator(
    config: EvaluatorConfig, info: PluginInfo | None, *, data: Mapping[str, Tensor] | None = None
) -> Subject:
    return evaluator.EvaluatorSubject(config, evaluator.example_data() if data is None else data, info=info)


def _dataset(config: DatasetConfig, info: PluginInfo | None) -> Subject:
    return dataset.DatasetSubject(config, info=info)


def _field(
    config: FieldConfig,
    info: PluginInfo | None,
    *,
    files: Mapping[str, bytes] | None = None,
    cells: Sequence[tuple[object, Tensor | str | None]] = (),
) -> Subject:
    return field.FieldSubject(config, files, tuple(cells), info=info)


def _task(config: TaskConfig, info: PluginInfo | None) -> Subject:
    return benchmark.TaskSubject(config, info=info)


def _method(config: MethodConfig, info: PluginInfo | None) -> Subject:
    return benchmark.MethodSubject(config, info=info)


_SUBJECTS: Mapping[str, Any] = MappingProxyType(
    {
        "modality": _modality,
        "backbone": _backbone,
        "dataset": _dataset,
        "field": _field,
        "weight_schedule": _weight_schedule,
        "clock_law": _clock_law,
        "evaluator": _evaluator,
        "task": _task,
        "method": _method,
    }
)


# --- all checks of a config at once, in a test of one's own -----------------------------------------------------------


def _require(config: Config, **options: Any) -> None:
    check_config(config)  # also of what belongs to no group
    Contract(_subject(config, None, options), CHECKS[config.group]).require()


def check_config(config: Config) -> None:
    """A config is an attrs-frozen instance of a registered base, and comes back from TOML as it was.

    Raises:
        ContractError: if not.
    """
    Contract(Subject(config), CONFIG_CHECKS).require()


def check_modality(
    config: ModalityConfig,
    *,
    examples: Tensor | None = None,
    height: int = 8,
    width: int = 8,
    encoding_bias: float = 0.05,
    source: Tensor | Sequence[str] | None = None,
) -> None:
    """A modality keeps the contract of :mod:`mtdiffusion.interfaces`, in latents of several sizes, and can be learned.

    Args:
        config: what builds it.
        examples: real, varied data x ``[n, ...]``, n >= 3 (8 to 32 is good); for a derived modality, what ``derive``
            returns. None: derived from ``source``, or modes of a fresh head (samples, where modes are alike).
        height: of the largest latent, which the modality must be able to fill. Smaller and narrower ones are tried too
            and skipped if building refuses them with a ``ValueError``.
        width: of that latent.
        encoding_bias: by how much of the codes' RMS ``expected_encoding`` may differ from the mean code of samples,
            beside the Monte Carlo error. A sampler that clips to the range of the data needs some.
        source: for a derived modality, in place of ``examples``: samples ``[n, ...]`` of the data set's field, or its
            texts, from which ``derive`` makes them.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    _require(config, examples=examples, height=height, width=width, encoding_bias=encoding_bias, source=source)


def check_backbone(config: BackboneConfig, *, height: int = 8, width: int = 8) -> None:
    """A backbone keeps the contract of :mod:`mtdiffusion.interfaces`, at several sizes, and uses all its inputs.

    Args:
        config: what builds it.
        height: of the largest latent, which the backbone must be able to work at. Smaller and narrower ones are tried
            too and skipped if building refuses them with a ``ValueError``.
        width: of that latent.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    _require(config, height=height, width=width)


def check_weight_schedule(config: WeightScheduleConfig, *, names: Sequence[str] = ("a", "b")) -> None:
    """A weight schedule gives finite signal coefficients for every retention.

    Args:
        config: what builds it.
        names: the modality instances it is configured for.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    _require(config, names=names)


def check_clock_law(config: ClockLawConfig, *, names: Sequence[str] = ("a", "b")) -> None:
    """A law of clocks draws shares of T that are repeatable, and comes near whatever sampling visits along its path.

    Args:
        config: what builds it.
        names: the modality instances it is configured for. Fewer and more are tried too, and skipped if building
            refuses them with a ``ValueError``.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    _require(config, names=names)


def check_dataset(config: DatasetConfig) -> None:
    """A data set has a training and a test split, is the same every time and keeps the conventions for fields.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    _require(config)


def check_field(
    config: FieldConfig,
    *,
    files: Mapping[str, bytes] | None = None,
    cells: Sequence[tuple[object, Tensor | str | None]] = (),
) -> None:
    """A field reads files and cells the same every time, and says what is wrong with those that are damaged.

    Args:
        config: what reads.
        files: the contents of a proper file, by its suffix. None: reading is not tried.
        cells: what tables may hold, each with what it stands for: a tensor, a text, or None if it is blank.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    _require(config, files=files, cells=cells)


def check_evaluator(config: EvaluatorConfig, *, data: Mapping[str, Tensor] | None = None) -> None:
    """An evaluator gives finite floats by name, the same every time.

    Args:
        config: what builds it.
        data: tensors ``[n, ...]`` by modality name, the first half to fit it to, the second to judge. None: small
            pictures under the names ``image``, ``mask``, ``label`` and ``embedding``.

    Raises:
        ContractError: at the first part of the contract that is not kept. What an evaluator refuses to be built for,
            by a ``UserError``, is not held against it.
    """
    _require(config, data=data)


def check_task(config: TaskConfig) -> None:
    """A task's queries are of its instances, and its training is tables.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    _require(config)


def check_method(config: MethodConfig) -> None:
    """A method has a role that reports know, and can be fitted to a problem. It is not fitted here.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    _require(config)
