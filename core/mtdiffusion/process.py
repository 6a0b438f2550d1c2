"""The multimodal diffusion process: marginals, posterior and jumps t → s, block by block, for any number of modalities.

``q(z_t | z_{t-1}, X) = N(√a_t (z_{t-1} + Σ_i w_t^(i) e_i), (1 − a_t) I)`` (Chen et al. 2024), in the closed
forms of docs/mathematics.md, each modality under its own clock where the layout gives it channels of its own.

Clocks t, s are int64 ``[B, N]`` or, over places, ``[B, N, h, w]`` (they broadcast); presence is ``[B, N]``, 0 where a
sample lacks a modality: then m^(i) = 0 for it. Codes are by name, each ``[B, c_i, H, W]``.

Coefficients are worked out in float64, and rounded to the floating point of what they multiply: of 16 bits or more, or
there is a ``ValueError``.
"""

from __future__ import annotations

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from mtdiffusion.interfaces import WeightSchedule
from mtdiffusion.layout import Codes, Layout, Standing, noise_level
from mtdiffusion.precision import to_device
from mtdiffusion.retention import Retention, weights_from_signal

TERMINAL_SNR = 1e-3
"""Below it, noise at t = T is taken to tell nothing of a modality."""


@frozen(eq=False)
class DiffusionProcess:
    """Tables of the process, float64, indexed by t = 0..T, and the layout in which they apply.

    Attributes:
        log_alpha_bar: log ᾱ_t ``[T + 1]``.
        signal_table: m_t^(i) ``[T + 1, N]``.
        layout: where the modalities live.
        ends_in_noise: whether z at t = T tells nothing.
    """

    log_alpha_bar: Tensor
    signal_table: Tensor
    layout: Layout
    _variance_table: Tensor = field(init=False, repr=False)
    _level_table: Tensor = field(init=False, repr=False)
    ends_in_noise: bool = field()  # on another device it stays as it is

    @_variance_table.default
    def _variances(self) -> Tensor:
        return -torch.expm1(self.log_alpha_bar)

    @_level_table.default
    def _levels(self) -> Tensor:
        return noise_level(self.signal_table, self._variance_table[:, None])

    @ends_in_noise.default
    def _ends_in_noise(self) -> bool:
        return bool((self.terminal_snr < TERMINAL_SNR).all())

    @classmethod
    def build(cls, retention: Retention, schedule: WeightSchedule, layout: Layout) -> DiffusionProcess:
        """Raises ``ValueError`` if the schedule's signal has a wrong shape or is not finite."""
        modalities = len(layout.names)
        signal = schedule.signal(retention, modalities)
        expected = (retention.steps + 1, modalities)
        if tuple(signal.shape) != expected or not bool(signal.isfinite().all()):
            raise ValueError(
                f"{type(schedule).__name__}.signal: expected finite values of shape {expected}, found shape "
                f"{tuple(signal.shape)} with {int((~signal.isfinite()).sum())} values that are not finite"
            )
        return cls(retention.log_alpha_bar, signal.to(torch.float64), layout)

    def to(self, device: torch.device | str) -> DiffusionProcess:
        """The same process with its tables on a device, float32 where that has no float64; itself if they are there."""
        log_alpha_bar = to_device(self.log_alpha_bar, torch.device(device))
        if log_alpha_bar is self.log_alpha_bar:
            return self
        signal_table = to_device(self.signal_table, torch.device(device))
        return evolve(self, log_alpha_bar=log_alpha_bar, signal_table=signal_table)

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
        return self.signal_table[-1] ** 2 / self._variance_table[-1]

    def _look_up(self, table: Tensor, t: Tensor) -> Tensor:
        """Entries of a table ``[T + 1, N]`` at clocks ``[B, N, ...]``."""
        flat = t.reshape(*t.shape[:2], -1)
        return table.T.expand(len(t), -1, -1).gather(2, flat).reshape(t.shape)

    def signal(self, t: Tensor, presence: Tensor | None = None) -> Tensor:
        """m_t^(i), in the shape of t (float64)."""
        m = self._look_up(self.signal_table, t)
        return m if presence is None else m * presence.reshape(*presence.shape, *[1] * (t.ndim - 2))

    def variance(self, t: Tensor) -> Tensor:
        """σ_t² = 1 − ᾱ_t, in the shape of t (float64)."""
        return self._variance_table.index_select(0, t.flatten()).reshape(t.shape)

    def snr(self, t: Tensor) -> Tensor:
        """(m_t^(i))² / σ_t², in the shape of t (float64); inf at t = 0."""
        return self.signal(t) ** 2 / self.variance(t)

    def standing(self, t: Tensor, presence: Tensor | None = None) -> Standing:
        """Where the clocks stand, for the layout to show; over places. What is missing is noise at any t."""
        t = _over_places(t)
        level = self._look_up(self._level_table, t)
        return Standing(self.signal(t, presence), self.variance(t), level, (t == self.steps) & self.ends_in_noise)

    # Marginal

    def mean(self, codes: Codes, t: Tensor, presence: Tensor | None = None) -> Tensor:
        """M_t: what the layout makes of m_t^(i) e_i, ``[B, C, H, W]``."""
        return self.layout.meet(_over_places(self.signal(t, presence)), codes)

    def corrupt(self, codes: Codes, t: Tensor, noise: Tensor, presence: Tensor | None = None) -> Tensor:
        """z_t = M_t + σ_t ε, a draw from q(z_t | X): ``[B, C, H, W]``."""
        signal, sigma = self.signal(t, presence), self.variance(t).sqrt()
        return self.layout.meet(_over_places(signal), codes, (_over_places(sigma), noise))

    def epsilon(self, z: Tensor, codes: Codes, t: Tensor, presence: Tensor | None = None) -> Tensor:
        """ε = (z_t − M_t) / σ_t, ``[B, C, H, W]``; 0 where t = 0."""
        variance = self.variance(t)
        inverse = torch.where(variance > 0, variance, torch.inf).rsqrt()
        return self._scaled(inverse, z - self.mean(codes, t, presence))

    # Posterior and jumps

    def posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """β̃ of q(z_s | z_t, X) = σ_s² (1 − ᾱ_t/ᾱ_s)/σ_t², s ≤ t, in the shape of t (float64); 0 at s = 0 and s = t."""
        forgotten = -torch.expm1(self.log_alpha_bar[t] - self.log_alpha_bar[s])
        return self.variance(s) * forgotten / _positive(self.variance(t))

    def residual_gain(self, t: Tensor, s: Tensor) -> Tensor:
        """g = √(ᾱ_t/ᾱ_s) σ_s²/σ_t²: how much of z_t − M_t is left at s, in the shape of t (float64)."""
        ratio = torch.exp(0.5 * (self.log_alpha_bar[t] - self.log_alpha_bar[s]))
        return ratio * self.variance(s) / _positive(self.variance(t))

    def posterior_mean(self, z: Tensor, codes: Codes, t: Tensor, s: Tensor, presence: Tensor | None = None) -> Tensor:
        """μ̃ of q(z_s | z_t, X), s < t, in the stable form M_s + g (z_t − M_t): ``[B, C, H, W]``."""
        residual = z - self.mean(codes, t, presence)
        signal, gain = self.signal(s, presence), self.residual_gain(t, s)
        return self.layout.meet(_over_places(signal), codes, (_over_places(gain), residual))

    def code_error_gain(self, t: Tensor, s: Tensor, presence: Tensor | None = None) -> Tensor:
        """c = m_s − g m_t with μ̃ − μ_θ = Σ_i c^(i) (e_i − ê_i) (docs/mathematics.md, section 4), in the shape of t."""
        return self.signal(s, presence) - self.residual_gain(t, s) * self.signal(t, presence)

    def epsilon_error_gains(self, t: Tensor, s: Tensor, presence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """c = m_s − κ m_t and d = κ (1 − ᾱ_t/ᾱ_s)/σ_t, κ = √(ᾱ_s/ᾱ_t), each in the shape of t: of an ε predicted by
        itself, μ̃ − μ_θ = Σ_i c^(i) (e_i − ê_i) − d (ε − ε̂) (docs/mathematics.md, section 4)."""
        kappa = torch.exp(0.5 * (self.log_alpha_bar[s] - self.log_alpha_bar[t]))
        forgotten = -torch.expm1(self.log_alpha_bar[t] - self.log_alpha_bar[s])
        wrong_code = self.signal(s, presence) - kappa * self.signal(t, presence)
        return wrong_code, kappa * forgotten * _positive(self.variance(t)).rsqrt()

    def mean_from_epsilon(
        self, z: Tensor, epsilon: Tensor, codes: Codes, t: Tensor, s: Tensor, presence: Tensor | None = None
    ) -> Tensor:
        """M_s for s < t from z_t, a separately predicted ε and the codes: ``[B, C, H, W]``.

        ``κ (z_t − σ_t ε) − Σ_i (κ m_t^(i) − m_s^(i)) e_i`` with κ = √(ᾱ_s/ᾱ_t): the paper's parameterisation, of which
        s = t − 1 is its μ_θ, and N = 1 with w_{t>0} = 0 is DDIM's. κ grows with the jump, and errors of ε with it.
        """
        kappa = torch.exp(0.5 * (self.log_alpha_bar[s] - self.log_alpha_bar[t]))
        denoised = z - self._scaled(self.variance(t).sqrt(), epsilon)
        wanted = self.signal(s, presence) - kappa * self.signal(t, presence)
        return self.layout.meet(_over_places(wanted), codes, (_over_places(kappa), denoised))

    def log_noise_kept(self, t: Tensor, s: Tensor) -> Tensor:
        """log r, r = (ᾱ_t/ᾱ_s) σ_s²/σ_t²: the share of z_s's variance given X that q(z_s | z_t, X) leaves to ε of z_t,
        s ≤ t, in the shape of t (float64). Over consecutive steps r is the product."""
        before, now = _positive(self.variance(s)), _positive(self.variance(t))
        return self.log_alpha_bar[t] - self.log_alpha_bar[s] + torch.log(before) - torch.log(now)

    def jump(
        self, mean: Tensor, epsilon: Tensor, s: Tensor, log_kept: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """One step t → s (s < t): ``z_s = M_s + σ_s (√k ε + √(1 − k) ξ)`` ``[B, C, H, W]``.

        It keeps the marginal for any k in [0, 1].

        Args:
            mean: M_s ``[B, C, H, W]``.
            log_kept: log k, over places or not; None: k = 1, a step without noise.
            noise: ξ ``[B, C, H, W]``; needed with ``log_kept``.

        Raises:
            ValueError: if there is one of ``log_kept`` and ``noise`` alone.
        """
        if (log_kept is None) != (noise is None):
            raise ValueError("jump: expected log_kept and noise, or neither")
        variance = self.variance(s)
        if log_kept is None or noise is None:
            return mean + self._scaled(variance.sqrt(), epsilon)
        kept, drawn = torch.exp(log_kept), -torch.expm1(log_kept)  # nothing cancelled
        return mean + self._scaled((variance * kept).sqrt(), epsilon) + self._scaled((variance * drawn).sqrt(), noise)

    def _scaled(self, values: Tensor, z: Tensor) -> Tensor:
        return self.layout.scaled(_over_places(values), z)


def _over_places(values: Tensor) -> Tensor:
    """``[B, N]`` as ``[B, N, 1, 1]``; what is over places already stays."""
    return values[:, :, None, None] if values.ndim == 2 else values


def _positive(variance: Tensor) -> Tensor:
    """σ_t² as a divisor. It is 0 at t = 0, where nothing is left to divide: 0/0 is to be 0."""
    return variance.clamp(min=torch.finfo(variance.dtype).tiny)


def terminal_warning(process: DiffusionProcess, limit: float = 0.01) -> str | None:
    """A sentence naming the modalities whose SNR at t = T exceeds a limit, or None: sampling starts from N(0, I)."""
    loud = [
        f"{name} {snr:.3g}"
        for name, snr in zip(process.layout.names, process.terminal_snr.tolist(), strict=True)
        if snr > limit
    ]
    if not loud:
        return None
    return (
        f"the process does not end in noise: signal-to-noise ratio at t = T is {', '.join(loud)} (expected below "
        f"{limit}); samples will be biased. Use more steps, another curve, or an SNR-matched weight schedule."
    )
