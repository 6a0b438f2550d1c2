"""The multimodal diffusion process: marginals, posterior and jumps t → s, for any number of modalities.

``q(z_t | z_{t-1}, X) = N(√a_t (z_{t-1} + Σ_i w_t^(i) e_i), (1 − a_t) I)`` (Chen et al. 2024), in the closed
forms of docs/mathematics.md. Codes e are ``[B, N, C, H, W]``, times t ``[B]`` (int64), presence ``[B, N]`` (0 where a
sample lacks a modality: then m^(i) = 0 for it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from mtdiffusion.interfaces import WeightSchedule
from mtdiffusion.schedules import Retention, weights_from_signal


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``[B]`` to broadcast against ``like [B, ...]``, in its dtype."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def mix(coefficients: Tensor, codes: Tensor) -> Tensor:
    """Σ_i coefficients ``[B, N]`` · codes ``[B, N, C, H, W]`` -> ``[B, C, H, W]``.

    A product and a sum, not an einsum: autocast would run that in half precision, and 1e-3 of M_t is not small beside
    σ_t near t = 0.
    """
    return (coefficients.to(codes.dtype)[:, :, None, None, None] * codes).sum(1)


@frozen(eq=False)
class DiffusionProcess:
    """Tables of the process, float64, indexed by t = 0..T.

    Attributes:
        log_alpha_bar: log ᾱ_t ``[T + 1]``.
        signal_table: m_t^(i) ``[T + 1, N]``.
    """

    log_alpha_bar: Tensor
    signal_table: Tensor

    @classmethod
    def build(cls, retention: Retention, schedule: WeightSchedule, modalities: int) -> DiffusionProcess:
        """Raises ``ValueError`` if the schedule's signal has a wrong shape or is not finite."""
        signal = schedule.signal(retention, modalities)
        expected = (retention.steps + 1, modalities)
        if tuple(signal.shape) != expected or not bool(signal.isfinite().all()):
            raise ValueError(
                f"{type(schedule).__name__}.signal: expected finite values of shape {expected}, found shape "
                f"{tuple(signal.shape)} with {int((~signal.isfinite()).sum())} values that are not finite"
            )
        return cls(retention.log_alpha_bar, signal.to(torch.float64))

    def to(self, device: torch.device | str) -> DiffusionProcess:
        """The same process with its tables on a device; itself if they are there."""
        if self.log_alpha_bar.device == torch.device(device):
            return self
        return evolve(self, log_alpha_bar=self.log_alpha_bar.to(device), signal_table=self.signal_table.to(device))

    @property
    def steps(self) -> int:
        """T."""
        return self.log_alpha_bar.numel() - 1

    @property
    def weight_table(self) -> Tensor:
        """w_t^(i) ``[T + 1, N]``."""
        return weights_from_signal(self.signal_table, Retention(self.log_alpha_bar))

    @property
    def terminal_snr(self) -> Tensor:
        """SNR of each modality at t = T ``[N]``: should be far below 1, or L0 and sampling from N(0, I) are off."""
        return self.signal_table[-1] ** 2 / -torch.expm1(self.log_alpha_bar[-1])

    def signal(self, t: Tensor, presence: Tensor | None = None) -> Tensor:
        """m_t ``[B, N]`` (float64)."""
        m = self.signal_table[t]
        return m if presence is None else m * presence

    def variance(self, t: Tensor) -> Tensor:
        """σ_t² = 1 − ᾱ_t ``[B]`` (float64)."""
        return -torch.expm1(self.log_alpha_bar[t])

    def snr(self, t: Tensor) -> Tensor:
        """(m_t^(i))² / σ_t² ``[B, N]`` (float64); inf at t = 0."""
        return self.signal(t) ** 2 / self.variance(t)[:, None]

    def noise_level(self, t: Tensor) -> Tensor:
        """arctan(σ_t / m_t) · 2/π in [0, 1] ``[B]``, m_t the root mean square over modalities.

        What a backbone is told instead of t: it means the same for another T, curve or retention.
        """
        m = self.signal(t).square().mean(1).sqrt()
        return torch.atan2(self.variance(t).sqrt(), m) * (2 / math.pi)

    def mean(self, codes: Tensor, t: Tensor, presence: Tensor | None = None) -> Tensor:
        """M_t = Σ_i m_t^(i) e_i: ``[B, C, H, W]``."""
        return mix(self.signal(t, presence), codes)

    def corrupt(self, codes: Tensor, t: Tensor, noise: Tensor, presence: Tensor | None = None) -> Tensor:
        """z_t = M_t + σ_t ε, a draw from q(z_t | X): ``[B, C, H, W]``."""
        return self.mean(codes, t, presence) + per_sample(self.variance(t).sqrt(), noise) * noise

    def epsilon(self, z: Tensor, codes: Tensor, t: Tensor, presence: Tensor | None = None) -> Tensor:
        """ε = (z_t − M_t) / σ_t for t ≥ 1: ``[B, C, H, W]``."""
        return (z - self.mean(codes, t, presence)) / per_sample(self.variance(t).sqrt(), z)

    def posterior_variance(self, t: Tensor) -> Tensor:
        """β̃_t = (1 − ᾱ_{t−1})(1 − a_t)/(1 − ᾱ_t) ``[B]`` (float64), t ≥ 1; 0 at t = 1."""
        one_minus_a = -torch.expm1(self.log_alpha_bar[t] - self.log_alpha_bar[t - 1])
        return self.variance(t - 1) * one_minus_a / self.variance(t)

    def posterior_mean(self, z: Tensor, codes: Tensor, t: Tensor, presence: Tensor | None = None) -> Tensor:
        """μ̃_t of q(z_{t−1} | z_t, X), t ≥ 1, in the stable form: ``[B, C, H, W]``."""
        residual = z - self.mean(codes, t, presence)
        return self.mean(codes, t - 1, presence) + per_sample(self._residual_gain(t), z) * residual

    def code_error_gain(self, t: Tensor, presence: Tensor | None = None) -> Tensor:
        """c_t ``[B, N]`` with μ̃_t − μ_θ = Σ_i c_t^(i) (e_i − ê_i) (docs/mathematics.md, section 4)."""
        return self.signal(t - 1, presence) - self._residual_gain(t)[:, None] * self.signal(t, presence)

    def _residual_gain(self, t: Tensor) -> Tensor:
        sqrt_a = torch.exp(0.5 * (self.log_alpha_bar[t] - self.log_alpha_bar[t - 1]))
        return sqrt_a * self.variance(t - 1) / self.variance(t)

    def mean_from_epsilon(
        self, z: Tensor, epsilon: Tensor, codes: Tensor, t: Tensor, s: Tensor, presence: Tensor | None = None
    ) -> Tensor:
        """M_s for s < t from z_t, a separately predicted ε and the codes: ``[B, C, H, W]``.

        ``κ (z_t − σ_t ε) − Σ_i (κ m_t^(i) − m_s^(i)) e_i`` with κ = √(ᾱ_s/ᾱ_t): the paper's parameterisation, of which
        s = t − 1 is its μ_θ, and N = 1 with w_{t>0} = 0 is DDIM's. κ grows with the jump, and errors of ε with it.
        """
        kappa = torch.exp(0.5 * (self.log_alpha_bar[s] - self.log_alpha_bar[t]))
        denoised = z - per_sample(self.variance(t).sqrt(), z) * epsilon
        excess = kappa[:, None] * self.signal(t, presence) - self.signal(s, presence)
        return per_sample(kappa, z) * denoised - mix(excess, codes)

    def jump(
        self, mean: Tensor, epsilon: Tensor, t: Tensor, s: Tensor, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """One step t → s (s < t): ``z_s = M_s + √(1 − ᾱ_s − σ²) ε + σ ξ`` ``[B, C, H, W]``.

        σ² = η² (1 − ᾱ_s)(1 − ᾱ_t/ᾱ_s)/(1 − ᾱ_t), at most 1 − ᾱ_s: ancestral at η = 1, DDIM (Song et al. 2021) at
        η = 0; beyond 1, more of ε is forgotten than the posterior forgets, and at the bound all of it.

        Args:
            mean: M_s ``[B, C, H, W]``.
            noise: ξ ``[B, C, H, W]``; needed when η > 0.
        """
        log_ratio = self.log_alpha_bar[t] - self.log_alpha_bar[s]
        before, now = self.variance(s), self.variance(t)
        injected = torch.minimum(eta**2 * before * -torch.expm1(log_ratio) / now, before)
        # 1 − ᾱ_s − σ², nothing cancelled
        kept = (before * (1 - eta**2 + eta**2 * torch.exp(log_ratio) * before / now)).clamp(min=0)
        z = mean + per_sample(kept.sqrt(), mean) * epsilon
        if eta > 0:
            if noise is None:
                raise ValueError(f"jump with eta = {eta} needs noise")
            z = z + per_sample(injected.sqrt(), mean) * noise
        return z


def terminal_warning(process: DiffusionProcess, names: Sequence[str], limit: float = 0.01) -> str | None:
    """A sentence naming the modalities whose SNR at t = T exceeds a limit, or None: sampling starts from N(0, I)."""
    loud = [f"{n} {s:.3g}" for n, s in zip(names, process.terminal_snr.tolist(), strict=True) if s > limit]
    if not loud:
        return None
    return (
        f"the process does not end in noise: signal-to-noise ratio at t = T is {', '.join(loud)} (expected below "
        f"{limit}); samples will be biased. Use more steps, another curve, or an SNR-matched weight schedule."
    )
