"""The composite loss L0 + L1 + L2 + L3 (Chen et al. 2024; docs/mathematics.md, section 4), and the exact bound.

Everything stays per sample ``[B]``; weights, presence and observation multiply there, and the mean comes last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from attrs import Attribute, field, frozen
from attrs.validators import ge, in_
from torch import Tensor

from mtdiffusion.conditioning import Observation
from mtdiffusion.model import MultimodalDiffusion, Prediction
from mtdiffusion.process import DiffusionProcess, mix


def low_before_high(_: object, attribute: Attribute[tuple[float, float]], value: tuple[float, float]) -> None:
    """Attrs validator of a clamp (low, high): 0 ≤ low ≤ high."""
    if not 0 <= value[0] <= value[1]:
        raise ValueError(f"'{attribute.name}': expected 0 <= low <= high, found {list(value)}")


def share_or_shares(_: object, attribute: Attribute[Any], value: float | Mapping[str, float]) -> None:
    """Attrs validator of a share, or of shares by name: in [0, 1]."""
    for share in value.values() if isinstance(value, Mapping) else (value,):
        if not 0 <= share <= 1:
            raise ValueError(f"'{attribute.name}': expected a share in [0, 1], found {share}")


@frozen
class LossWeights:
    """How the four terms add up to the training loss.

    Attributes:
        l0, l1, l2, l3: weights of the terms.
        l1_time: "elbo": the exact KL terms of the bound, per latent dimension. "snr": the same error of z_{t−1}
            weighted as ½ ‖ε − ε̂‖² · clamp(SNR_t) / SNR_t, per latent dimension.
        l1_clamp: (low, high) of that clamp; (0, inf) leaves the plain ε loss.
        readout: share of the samples with something observed that are taken at t = T, where z tells nothing and every
            head has to read its modality off what is observed. By name: of the samples that see that modality whole (of
            several, the greatest counts), so that no others are spent on it ({"image": 0.5}).
    """

    l0: float = field(default=0.0, validator=ge(0.0))
    l1: float = field(default=0.0, validator=ge(0.0))
    l2: float = field(default=1.0, validator=ge(0.0))
    l3: float = field(default=0.0, validator=ge(0.0))
    l1_time: Literal["snr", "elbo"] = field(default="snr", validator=in_(("snr", "elbo")))
    l1_clamp: tuple[float, float] = field(default=(0.05, 5.0), validator=low_before_high)
    readout: float | Mapping[str, float] = field(default=0.25, validator=share_or_shares)


@frozen(eq=False)
class LossTerms:
    """The loss of one batch, unreduced; each ``[B]``.

    Attributes:
        total: the weighted training loss.
        l0: KL(q(z_T | X) ‖ N(0, I)) in nats.
        l1: one-sample estimate of Σ_{t≥2} KL(q(z_{t−1} | z_t, X) ‖ p) in nats.
        l2: per modality, the head's objective at a random t, where it has something to predict; 0 elsewhere.
        l3: per modality, one-sample estimate of −log p(x_i | z_1) in nats: 0 unless t = 1, T times it there.
        counted: per modality, whether the sample has it and it is not observed whole.
    """

    total: Tensor
    l0: Tensor
    l1: Tensor
    l2: dict[str, Tensor]
    l3: dict[str, Tensor]
    counted: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        """Term by term and modality by modality, for a log: L2 as the mean over the samples it counts for."""
        means = {"loss": self.total, "l0": self.l0, "l1": self.l1}
        values = {name: value.mean().item() for name, value in means.items()}
        for name, value in self.l2.items():
            values[f"l2/{name}"] = (value.sum() / self.counted[name].sum().clamp(min=1)).item()
        for name, value in self.l3.items():
            values[f"l3/{name}"] = value.mean().item()
        return values


def draw_times(batch: int, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform t in 1..T ``[B]``, stratified: one in each of B equal parts, in random order, for less noise."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return 1 + (u[torch.randperm(batch, generator=generator)] * steps).long().clamp(max=steps - 1)


def standard_normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """N(0, I) in the shape, dtype and device of a tensor, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def prior_kl(process: DiffusionProcess, codes: Tensor, presence: Tensor | None = None) -> Tensor:
    """L0 = KL(q(z_T | X) ‖ N(0, I)) in nats ``[B]``, in closed form."""
    t = torch.full((codes.shape[0],), process.steps, device=codes.device)
    mean = process.mean(codes, t, presence)
    log_alpha_bar = process.log_alpha_bar[-1]
    spread = -torch.expm1(log_alpha_bar) - 1 - torch.log(-torch.expm1(log_alpha_bar))  # σ² − 1 − log σ²
    return 0.5 * (mean.square().sum((1, 2, 3)) + spread.to(mean.dtype) * mean[0].numel())


def transition_kl(
    process: DiffusionProcess,
    z: Tensor,
    codes: Tensor,
    prediction: Prediction,
    t: Tensor,
    presence: Tensor | None = None,
    *,
    derived_epsilon: bool = True,
) -> Tensor:
    """KL(q(z_{t−1} | z_t, X) ‖ p(z_{t−1} | z_t)) in nats ``[B]``; 0 at t = 1, where L3 takes its place.

    With ε derived from the heads it is ‖Σ_i c_t^(i) (e_i − ê_i)‖² / (2 β̃_t), which cancels nothing; with an ε head, the
    difference of the posterior mean and the paper's μ_θ.
    """
    if derived_epsilon:
        difference = mix(process.code_error_gain(t, presence), codes - prediction.codes)
    else:
        s = t - 1
        mu = process.mean_from_epsilon(z, prediction.epsilon, prediction.codes, t, s, presence)
        # The posterior keeps √(1 − ᾱ_s − β̃_t) of ε; p keeps as much of its own ε̂.
        mu = process.jump(mu, prediction.epsilon, t, s, eta=1.0, noise=torch.zeros_like(z))
        difference = process.posterior_mean(z, codes, t, presence) - mu
    variance = process.posterior_variance(t).to(z.dtype)
    kl = difference.square().sum((1, 2, 3)) / (2 * variance.clamp(min=torch.finfo(z.dtype).tiny))
    return torch.where(t > 1, kl, torch.zeros_like(kl))


def snr_weight(snr: Tensor, clamp: tuple[float, float]) -> Tensor:
    """λ_t = clamp(SNR_t, low, high)."""
    return snr.clamp(*clamp)


def composite_loss(
    model: MultimodalDiffusion,
    x: Mapping[str, Tensor],
    weights: LossWeights | None = None,
    *,
    visible: Tensor | None = None,
    presence: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LossTerms:
    """The loss of one batch at one random t a sample.

    Args:
        x: every modality by name, ``[B, ...]``; a placeholder where a sample lacks it.
        visible: what the network is shown, ``[B, N, H, W]``; None shows nothing.
        presence: ``[B, N]``, 0 where a sample lacks a modality: out of the process and out of the loss.
    """
    weights = weights or LossWeights()
    codes = model.encode(x)
    batch, n, _, height, width = codes.shape
    if presence is None:
        presence = codes.new_ones(batch, n)
    if visible is None:
        visible = codes.new_zeros(batch, n, height, width)
    presence, visible = presence.to(codes), visible.to(codes)
    observation = model.observe(x, visible * presence[:, :, None, None])
    process = model.process
    t = draw_times(batch, process.steps, generator).to(codes.device)
    if weights.readout:
        last = torch.rand(batch, generator=generator).to(codes.device) < _readout_share(
            model, observation, weights.readout
        )
        t = torch.where(last, process.steps, t)
    z = process.corrupt(codes, t, standard_normal(codes[:, 0], generator), presence)
    prediction = model(z, t, observation, presence)
    return _terms(model, x, codes, z, t, observation, presence, prediction, weights)


def _readout_share(
    model: MultimodalDiffusion, observation: Observation, readout: float | Mapping[str, float]
) -> Tensor:
    """Probability of t = T for each sample: ``[B]``.

    Raises:
        ValueError: if ``readout`` names a modality that is not there.
    """
    if not isinstance(readout, Mapping):
        return (observation.visible.amax((1, 2, 3)) > 0) * readout
    if unknown := sorted(set(readout) - set(model.names)):
        raise ValueError(f"readout: expected names among {', '.join(model.names)}, found {', '.join(unknown)}")
    shares = observation.visible.new_tensor([readout.get(name, 0.0) for name in model.names])  # [N]
    return (observation.complete * shares).amax(1)


def _terms(
    model: MultimodalDiffusion,
    x: Mapping[str, Tensor],
    codes: Tensor,
    z: Tensor,
    t: Tensor,
    observation: Observation,
    presence: Tensor,
    prediction: Prediction,
    weights: LossWeights,
) -> LossTerms:
    process = model.process
    latent_dims = codes[0, 0].numel()
    derived = model.epsilon_head is None
    l0 = prior_kl(process, codes, presence)
    kl = transition_kl(process, z, codes, prediction, t, presence, derived_epsilon=derived)
    l1 = process.steps * kl  # p(t) = 1/T: T times one term estimates the sum
    total = weights.l0 * l0 / latent_dims
    snr = process.snr(t)
    if weights.l1 > 0:
        if weights.l1_time == "elbo":
            l1_training = l1
        else:
            shared_snr = snr.mean(1).clamp(min=torch.finfo(z.dtype).tiny)  # a target schedule may reach 0
            scale = snr_weight(shared_snr, weights.l1_clamp) / shared_snr
            error = process.epsilon(z, codes, t, presence) - prediction.epsilon
            l1_training = 0.5 * error.square().sum((1, 2, 3)) * scale.to(z.dtype)
        total = total + weights.l1 * l1_training / latent_dims
    l2: dict[str, Tensor] = {}
    l3: dict[str, Tensor] = {}
    counted: dict[str, Tensor] = {}
    for i, name in enumerate(model.names):
        modality = model.modality(name)
        counts = presence[:, i] * (~observation.complete[:, i])
        objective = modality.decoder.objective(prediction.params[name], x[name])
        l2[name] = torch.where(counts > 0, objective, torch.zeros_like(objective))
        scale = modality.loss_weight * snr_weight(snr[:, i], modality.snr_clamp)
        total = total + weights.l2 * scale.to(z.dtype) * l2[name]
        counted[name] = counts
        final = (t == 1) & (counts > 0)
        l3[name] = torch.zeros_like(objective)
        if bool(final.any()):
            nll = modality.decoder.nll(prediction.params[name], x[name])
            l3[name] = torch.where(final, process.steps * nll, l3[name])
        total = total + weights.l3 * l3[name] / modality.decoder.dims
    return LossTerms(total, l0, l1, l2, l3, counted)


@frozen(eq=False)
class Bound:
    """The variational bound −log p(X) ≤ l0 + l1 + Σ_i l3_i, exact weights and likelihoods; nats, each ``[B]``."""

    l0: Tensor
    l1: Tensor
    l3: dict[str, Tensor]
    dims: int

    @property
    def nats(self) -> Tensor:
        return self.l0 + self.l1 + torch.stack(list(self.l3.values())).sum(0)

    @property
    def bits_per_dim(self) -> Tensor:
        """Over the dimensions of all modalities together."""
        return self.nats / (self.dims * math.log(2))


@torch.no_grad()
def variational_bound(
    model: MultimodalDiffusion,
    x: Mapping[str, Tensor],
    *,
    times: int | None = None,
    generator: torch.Generator | None = None,
) -> Bound:
    """The true bound of each sample, nothing observed.

    Args:
        times: how many of the T − 1 terms of L1 are computed, spread evenly and scaled up; None: all of them.

    Returns:
        One draw of the noise at each t: unbiased, with a Monte Carlo error that falls with the samples averaged.
    """
    codes = model.encode(x)
    batch, n, _, height, width = codes.shape
    nothing = Observation(torch.zeros_like(codes), codes.new_zeros(batch, n, height, width))
    process = model.process
    terms = torch.arange(2, process.steps + 1)
    if times is not None and times < len(terms):
        offset = torch.rand(1, generator=generator)
        terms = terms[((torch.arange(times) + offset) * len(terms) / times).long().clamp(max=len(terms) - 1)]
    derived = model.epsilon_head is None
    l1 = codes.new_zeros(batch)
    for step in terms.tolist():
        t = torch.full((batch,), step, device=codes.device)
        z = process.corrupt(codes, t, standard_normal(codes[:, 0], generator))
        l1 = l1 + transition_kl(process, z, codes, model(z, t, nothing), t, derived_epsilon=derived)
    l1 = l1 * ((process.steps - 1) / max(len(terms), 1))  # T = 1 has no such term
    t = torch.ones(batch, dtype=torch.long, device=codes.device)
    z = process.corrupt(codes, t, standard_normal(codes[:, 0], generator))
    prediction = model(z, t, nothing)
    decoders = {name: model.modality(name).decoder for name in model.names}
    l3 = {name: decoder.nll(prediction.params[name], x[name]) for name, decoder in decoders.items()}
    return Bound(prior_kl(process, codes), l1, l3, sum(decoder.dims for decoder in decoders.values()))
