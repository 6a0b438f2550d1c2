"""The core's weight schedules under the names a configuration gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from attrs import field, frozen
from attrs.validators import deep_mapping, ge, in_, instance_of, min_len, optional

from mtdiffusion import DirectWeights, SNRMatched, TargetSignal, WeightSchedule
from mtdiffusion.retention import CURVES
from mtdiffusion_registry.configs import WeightScheduleConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1


def _ordered(gains: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
    unknown = sorted(set(gains) - set(names))
    if unknown:
        raise UserError(f"weights.gains: no modality named {', '.join(unknown)}; this model has {', '.join(names)}")
    return tuple(float(gains.get(name, 1.0)) for name in names)


_non_negative = deep_mapping(key_validator=instance_of(str), value_validator=ge(0.0))


@frozen
class SNRMatchedConfig(WeightScheduleConfig):
    """m_t^(i) = g_i √(SNR_t (1 − ᾱ_t)), the default.

    Attributes:
        curve: the SNR's noise curve: cosine, linear or rectified_flow; None: the process's.
        gains: g_i by modality; 1 where not given.
    """

    kind: ClassVar[str] = "snr_matched"
    curve: str | None = field(default=None, validator=optional(in_(tuple(CURVES))))
    gains: dict[str, float] = field(factory=dict, validator=_non_negative)

    def build(self, names: Sequence[str]) -> WeightSchedule:
        return SNRMatched(self.curve, _ordered(self.gains, names))


@frozen
class TargetConfig(WeightScheduleConfig):
    """m_t solved from a target: knots spread evenly over t/T, linear between them.

    Attributes:
        knots: m at t = 0, ..., T.
        gains: factors by modality; 1 where not given.
    """

    kind: ClassVar[str] = "target"
    knots: tuple[float, ...] = field(validator=min_len(2))
    gains: dict[str, float] = field(factory=dict, validator=_non_negative)

    def build(self, names: Sequence[str]) -> WeightSchedule:
        return TargetSignal(self.knots, _ordered(self.gains, names))


@frozen
class _DirectConfig(WeightScheduleConfig):
    initial: float = 1.0
    start: float = 0.0
    end: float = 0.0
    gains: dict[str, float] = field(factory=dict, validator=_non_negative)

    _shape: ClassVar[Literal["linear", "cosine"]]

    def build(self, names: Sequence[str]) -> WeightSchedule:
        return DirectWeights(self._shape, self.initial, self.start, self.end, _ordered(self.gains, names))


@frozen
class LinearConfig(_DirectConfig):
    """w_0 = initial, then w_t linear from start (t = 1) to end (t = T), times a gain by modality."""

    kind: ClassVar[str] = "linear"
    _shape = "linear"


@frozen
class CosineConfig(_DirectConfig):
    """w_0 = initial, then w_t along half a cosine from start (t = 1) to end (t = T), times a gain by modality."""

    kind: ClassVar[str] = "cosine"
    _shape = "cosine"


@frozen
class ConstantConfig(WeightScheduleConfig):
    """w_0 = initial, w_t = value for t ≥ 1, times a gain by modality. initial = 1, value = 0 is DDPM's."""

    kind: ClassVar[str] = "constant"
    initial: float = 1.0
    value: float = 0.0
    gains: dict[str, float] = field(factory=dict, validator=_non_negative)

    def build(self, names: Sequence[str]) -> WeightSchedule:
        return DirectWeights("constant", self.initial, self.value, self.value, _ordered(self.gains, names))


@hookimpl
def mtdiffusion_weight_schedules() -> list[type]:
    return [SNRMatchedConfig, TargetConfig, LinearConfig, CosineConfig, ConstantConfig]
