"""Retention a_t: how fast the process forgets (docs/mathematics.md, section 1).

Every table is float64 with one row a time step, t = 0 (data) first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from attrs import evolve, frozen
from torch import Tensor

RETENTIONS = ("compensated", "literal", "rectified_flow")

# Rectified flow ends at a mean of exactly 0, where log(a_t) does not exist; it is stopped this far before.
_FLOW_END = 1e-3


def _cosine(steps: int) -> Tensor:
    """Nichol & Dhariwal 2021: ᾱ(u) = cos²(π/2 · (u + s)/(1 + s)), each 1 − α_t capped at 0.999."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return 1 - torch.clamp(1 - alpha_bar[1:] / alpha_bar[:-1], max=0.999)


def _linear(steps: int) -> Tensor:
    """Ho et al. 2020: 1 − α_t linear from 1e-4 to 0.02 at T = 1000; scaled by 1000/T so that other T end alike."""
    scale = 1000 / steps
    return 1 - torch.clamp(torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64), max=0.999)


def _rectified_flow(steps: int) -> Tensor:
    """The variance-preserving α_t with the signal-to-noise ratio of z = (1 − τ) x + τ ε (Liu et al. 2022)."""
    tau = _flow_time(steps)
    alpha_bar = (1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2)
    return alpha_bar[1:] / alpha_bar[:-1]


def _flow_time(steps: int) -> Tensor:
    return torch.arange(steps + 1, dtype=torch.float64) / steps * (1 - _FLOW_END)


CURVES: dict[str, Callable[[int], Tensor]] = {
    "cosine": _cosine,
    "linear": _linear,
    "rectified_flow": _rectified_flow,
}
"""Variance-preserving noise curves: steps T -> α_t ``[T]``, t = 1 first."""


def curve_log_snr(curve: str, steps: int) -> Tensor:
    """log SNR_t ``[T + 1]`` of a variance-preserving curve; +inf at t = 0."""
    log_alpha_bar = _log_cumulative(CURVES[curve](steps))
    return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))


def _log_cumulative(retentions: Tensor) -> Tensor:
    return torch.cat([retentions.new_zeros(1), torch.log(retentions).cumsum(0)])


@frozen(eq=False)
class Retention:
    """ᾱ_t = Π a_s, kept as its logarithm: with the literal convention ᾱ_T underflows float32 by T ≈ 64 at N = 4.

    Attributes:
        log_alpha_bar: ``[T + 1]`` float64, 0 at t = 0 and falling.
        curve: the name of the curve it comes from, if any.
    """

    log_alpha_bar: Tensor
    curve: str | None = None

    @classmethod
    def from_alphas(cls, alphas: Tensor, modalities: int = 1, kind: str = "compensated") -> Retention:
        """From α_t ``[T]`` of a variance-preserving process (t = 1 first).

        ``compensated``: a_t = α_t. ``literal``: a_t = α_t / (N + 1), as the paper writes it.

        Raises:
            ValueError: if some α_t is not strictly between 0 and 1, or the kind is neither.
        """
        alphas = alphas.to(torch.float64)
        if alphas.ndim != 1 or not bool(((alphas > 0) & (alphas < 1)).all()):
            raise ValueError(
                f"alphas: expected a one-dimensional table strictly between 0 and 1, found {tuple(alphas.shape)} "
                f"from {alphas.min().item():.3g} to {alphas.max().item():.3g}"
            )
        if kind not in ("compensated", "literal"):
            raise ValueError(f"retention of given alphas: expected 'compensated' or 'literal', found {kind!r}")
        return cls(_log_cumulative(alphas / (modalities + 1) if kind == "literal" else alphas))

    @classmethod
    def from_curve(
        cls, curve: str = "cosine", steps: int = 1000, modalities: int = 1, kind: str = "compensated"
    ) -> Retention:
        """From a named curve (:data:`CURVES`) and a kind (:data:`RETENTIONS`).

        ``rectified_flow`` sets σ_t = τ, τ = t/T (up to 1 − 1e-3, not 1); with an SNR-matched signal of the curve of
        that name, m_t = 1 − τ.

        Raises:
            ValueError: for an unknown curve or kind.
        """
        if curve not in CURVES:
            raise ValueError(f"curve: expected one of {', '.join(CURVES)}, found {curve!r}")
        if kind not in RETENTIONS:
            raise ValueError(f"retention: expected one of {', '.join(RETENTIONS)}, found {kind!r}")
        if kind == "rectified_flow":
            return cls(torch.log1p(-(_flow_time(steps) ** 2)), curve)
        return evolve(cls.from_alphas(CURVES[curve](steps), modalities, kind), curve=curve)

    @property
    def steps(self) -> int:
        """T."""
        return self.log_alpha_bar.numel() - 1

    @property
    def variance(self) -> Tensor:
        """σ_t² = 1 − ᾱ_t: ``[T + 1]``."""
        return -torch.expm1(self.log_alpha_bar)

    @property
    def sqrt_step(self) -> Tensor:
        """√a_t: ``[T]``, t = 1 first."""
        return torch.exp(0.5 * self.log_alpha_bar.diff())


def signal_from_weights(weights: Tensor, retention: Retention) -> Tensor:
    """m ``[T + 1, N]`` from w ``[T + 1, N]``: m_0 = w_0, m_t = √a_t (m_{t−1} + w_t)."""
    rows = [weights[0]]
    for sqrt_a, w in zip(retention.sqrt_step, weights[1:], strict=True):
        rows.append(sqrt_a * (rows[-1] + w))
    return torch.stack(rows)


def weights_from_signal(signal: Tensor, retention: Retention) -> Tensor:
    """w ``[T + 1, N]`` that reach a wanted m ``[T + 1, N]``: w_t = m_t / √a_t − m_{t−1}."""
    return torch.cat([signal[:1], signal[1:] / retention.sqrt_step[:, None] - signal[:-1]])
