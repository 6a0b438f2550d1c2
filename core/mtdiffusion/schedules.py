"""Weight schedules: how strongly each modality is in z_t (docs/mathematics.md, section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import field, frozen
from attrs.validators import in_, optional
from torch import Tensor

from mtdiffusion.interfaces import WeightSchedule
from mtdiffusion.retention import CURVES, Retention, curve_log_snr, signal_from_weights


def _gains(gains: Sequence[float], modalities: int) -> Tensor:
    if not gains:
        return torch.ones(modalities, dtype=torch.float64)
    if len(gains) != modalities:
        raise ValueError(f"gains: expected one for each of {modalities} modalities, found {len(gains)}")
    return torch.tensor(gains, dtype=torch.float64)


@frozen
class SNRMatched(WeightSchedule):
    """The default: m_t^(i) = g_i √(SNR_t (1 − ᾱ_t)) for a chosen SNR curve, whatever the retention.

    Attributes:
        curve: a name in :data:`CURVES`; None: the retention's own, or cosine if it has none.
        gains: g_i per modality; empty means 1 for all.
    """

    curve: str | None = field(default=None, validator=optional(in_(CURVES)))
    gains: tuple[float, ...] = ()

    def signal(self, retention: Retention, modalities: int) -> Tensor:
        log_snr = curve_log_snr(self.curve or retention.curve or "cosine", retention.steps)
        signal = torch.exp(0.5 * (log_snr + torch.log(retention.variance)))
        signal[0] = 1.0  # the limit: SNR = ∞ and σ = 0 at t = 0
        return signal[:, None] * _gains(self.gains, modalities)


@frozen
class TargetSignal(WeightSchedule):
    """Solved from a target: m_t linearly interpolated between knots spread evenly over t / T.

    Attributes:
        knots: m at t = 0, ..., T; at least two.
        gains: g_i per modality; empty means 1 for all.
    """

    knots: tuple[float, ...] = field()
    gains: tuple[float, ...] = ()

    @knots.validator
    def _at_least_two(self, _: object, value: tuple[float, ...]) -> None:
        if len(value) < 2:
            raise ValueError(f"knots: expected at least two values of m_t, found {len(value)}")

    def signal(self, retention: Retention, modalities: int) -> Tensor:
        knots = torch.tensor(self.knots, dtype=torch.float64)[None, None]
        table = torch.nn.functional.interpolate(knots, retention.steps + 1, mode="linear", align_corners=True)
        return table[0, 0, :, None] * _gains(self.gains, modalities)


@frozen
class DirectWeights(WeightSchedule):
    """Weights given directly: w_0 = initial, then from start (t = 1) to end (t = T) along a shape.

    ``initial=1, start=end=0`` with compensated retention and N = 1 is DDPM.

    Attributes:
        shape: "constant" (start throughout), "linear", or "cosine" (half a cosine from start to end).
    """

    shape: str = field(default="constant", validator=in_(("constant", "linear", "cosine")))
    initial: float = 1.0
    start: float = 0.0
    end: float = 0.0
    gains: tuple[float, ...] = ()

    def signal(self, retention: Retention, modalities: int) -> Tensor:
        ramp = torch.linspace(0, 1, retention.steps, dtype=torch.float64)
        if self.shape == "constant":
            ramp = torch.zeros_like(ramp)
        elif self.shape == "cosine":
            ramp = (1 - torch.cos(math.pi * ramp)) / 2
        later = self.start + (self.end - self.start) * ramp
        weights = torch.cat([torch.tensor([self.initial], dtype=torch.float64), later])
        return signal_from_weights(weights[:, None] * _gains(self.gains, modalities), retention)
