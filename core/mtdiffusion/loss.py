"""The composite loss L0 + L1 + L2 + L3 (Chen et al. 2024; docs/mathematics.md, section 4), and the exact bound.

Everything stays per sample ``[B]``; weights, presence and observation multiply there, and the mean comes last. It is in
the model's floating point, or in float32 where that has 16 bits: sums of many squares leave their range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from attrs import Attribute, field, frozen
from attrs.validators import ge, in_
from torch import Tensor

from mtdiffusion.conditioning import Observation
from mtdiffusion.interfaces import Params
from mtdiffusion.layout import Codes
from mtdiffusion.model import MultimodalDiffusion, Prediction
from mtdiffusion.precision import at_least_single, single_or_wider, to_device, widened
from mtdiffusion.process import DiffusionProcess


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
    """How the four terms add up to the training loss; a term of weight 0 is not computed.

    Attributes:
        l0, l1, l2, l3: weights of the terms.
        l1_time: "elbo": the exact KL terms of the bound, per latent dimension. "snr": the same error of z_{t−1}
            weighted as ½ ‖ε − ε̂‖² · clamp(SNR_t) / SNR_t, per latent dimension.
        l1_clamp: (low, high) of that clamp; (0, inf) leaves the plain ε loss.
        readout: share of the samples with something observed of which all else is taken at t = T, where z tells nothing
            and every head has to read its modality off what is observed. By name: of the samples that see that modality
            whole (of several, the greatest counts), so that no others are spent on it ({"image": 0.5}).
    """

    l0: float = field(default=0.0, validator=ge(0.0))
    l1: float = field(default=0.0, validator=ge(0.0))
    l2: float = field(default=1.0, validator=ge(0.0))
    l3: float = field(default=0.0, validator=ge(0.0))
    l1_time: Literal["snr", "elbo"] = field(default="snr", validator=in_(("snr", "elbo")))
    l1_clamp: tuple[float, float] = field(default=(0.05, 5.0), validator=low_before_high)
    readout: float | Mapping[str, float] = field(default=0.25, validator=share_or_shares)


class LossTerms(NamedTuple):
    """The loss of one batch, unreduced; each ``[B]``.

    Attributes:
        total: the weighted training loss.
        l0: KL(q(z_T | X) ‖ N(0, I)) in nats; None if it does not count.
        l1: one-sample estimate of Σ_{t≥2} KL(q(z_{t−1} | z_t, X) ‖ p) in nats; None if it does not count. It and l3 are
            scaled for clocks that are uniform on 1..T: by another law they estimate no bound.
        l2: per modality, the head's objective at its clock, where it has something to predict; 0 elsewhere.
        l3: per modality, one-sample estimate of −log p(x_i | z_1) in nats: 0 unless t = 1, T times it there; empty if
            it does not count.
        counted: per modality, 1 where the sample has it, it is not observed whole and its clock is not at 0.
    """

    total: Tensor
    l0: Tensor | None
    l1: Tensor | None
    l2: dict[str, Tensor]
    l3: dict[str, Tensor]
    counted: dict[str, Tensor]

    def sums(self) -> dict[str, Tensor]:
        """Sum and count ``[2]`` by name (loss, l0, l1, l2/NAME, l3/NAME), for a log that averages over many batches: L2
        over the samples it counts for."""
        counts = {f"l2/{name}": count for name, count in self.counted.items()}
        every = torch.ones_like(self.total)
        return {
            name: widened(torch.stack([value.detach().sum(), counts.get(name, every).sum()]))
            for name, value in self.each().items()
        }

    def each(self) -> dict[str, Tensor]:
        """Those that count, by name (loss, l0, l1, l2/NAME, l3/NAME); each ``[B]``."""
        parts = {"loss": self.total, "l0": self.l0, "l1": self.l1}
        parts |= {f"l2/{name}": value for name, value in self.l2.items()}
        parts |= {f"l3/{name}": value for name, value in self.l3.items()}
        return {name: value for name, value in parts.items() if value is not None}


class Draws(NamedTuple):
    """What the loss of a batch leaves to chance.

    Attributes:
        clocks: the modalities' clocks as shares of T in [0, 1], by the model's law: ``[B, N]``.
        readout: uniform in [0, 1), ``[B]``: below the share of :attr:`LossWeights.readout` a sample is read out.
        noise: ε ~ N(0, I), ``[B, C, H, W]``.
    """

    clocks: Tensor
    readout: Tensor
    noise: Tensor

    @classmethod
    def of(cls, model: MultimodalDiffusion, batch: int, generator: torch.Generator | None = None) -> Draws:
        """One draw for a batch."""
        clocks = model.law.draw(batch, len(model.names), generator)
        return cls(clocks, torch.rand(batch, generator=generator), model.noise(batch, generator))


def prior_kl(process: DiffusionProcess, codes: Codes, presence: Tensor | None = None) -> Tensor:
    """L0 = KL(q(z_T | X) ‖ N(0, I)) in nats ``[B]``, in closed form."""
    t = torch.full((1, len(codes)), process.steps, device=process.log_alpha_bar.device)
    mean = at_least_single(process.mean(codes, t, presence))
    variance = process.variance(t[:, 0])  # no lone index, which would wait for the device
    return 0.5 * (mean.square().sum((1, 2, 3)) + (variance - 1 - torch.log(variance)).to(mean.dtype) * mean[0].numel())


def transition_kl(
    process: DiffusionProcess,
    z: Tensor,
    codes: Codes,
    prediction: Prediction,
    t: Tensor,
    s: Tensor,
    presence: Tensor | None = None,
    *,
    derived_epsilon: bool = True,
) -> Tensor:
    """KL(q(z_s | z_t, X) ‖ p(z_s | z_t)) in nats ``[B]``, for clocks s ≤ t ``[B, N, h, w]``; 0 for what stays, and for
    what reaches s = 0, where L3 takes its place.

    With ε derived from the heads it is ‖c (e − ê)‖² / (2 β̃); with an ε head, the distance of the posterior mean from
    the paper's μ_θ, put together from the errors of the codes and of ε. Neither takes a small difference of large
    means.
    """
    layout = process.layout
    wrong = {name: at_least_single(codes[name] - prediction.codes[name]) for name in layout.names}
    if derived_epsilon:
        difference = layout.meet(process.code_error_gain(t, s, presence), wrong)
    else:
        gain, of_epsilon = process.epsilon_error_gains(t, s, presence)
        missed = at_least_single(process.epsilon(z, codes, t, presence) - prediction.epsilon)
        difference = layout.meet(gain, wrong, (-of_epsilon, missed))
    counts = layout.spread(_where_present((s > 0) & (s < t), presence))
    dtype = difference.dtype
    variance = layout.spread(process.posterior_variance(t, s).to(dtype)).clamp(min=torch.finfo(dtype).tiny)
    return torch.where(counts, difference.square() / (2 * variance), 0).sum((1, 2, 3))


def _where_present(counts: Tensor, presence: Tensor | None) -> Tensor:
    return counts if presence is None else counts & (presence[:, :, None, None] > 0)


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
    draws: Draws | None = None,
) -> LossTerms:
    """The loss of one batch. Nothing in it waits for the device, and with ``draws`` nothing in it is random.

    Args:
        x: every modality by name, ``[B, ...]``; a placeholder where a sample lacks it.
        visible: what the network is shown, ``[B, N, h, w]``, h = w = 1 if nothing is seen in part; None shows nothing.
        presence: ``[B, N]``, 0 where a sample lacks a modality: out of the process and out of the loss.
        draws: what is left to chance; None: drawn here, from torch's global generator.

    Raises:
        ValueError: if ``weights.readout`` names a modality that is not there.
    """
    weights = weights or LossWeights()
    process, names = model.process, model.names
    batch, n = len(x[names[0]]), len(names)
    draws = draws or Draws.of(model, batch)
    device, dtype = model.device, model.dtype
    presence = torch.ones(batch, n, device=device) if presence is None else presence
    visible = torch.zeros(batch, n, 1, 1, device=device) if visible is None else visible
    presence, visible = presence.to(device, dtype), visible.to(device, dtype)
    codes = model.encode(x)
    observation = model.observe(x, visible * presence[:, :, None, None], codes)
    codes = observation.merge(codes, names)  # an encoder may tell less of a part than of the whole
    t = _clocks(model, observation, weights, draws)
    if not model.layout.shared_clock:  # what is missing is noise
        t = torch.where(presence > 0, t, process.steps)
    clocks = model.layout.clocks(t[:, :, None, None], observation.seen)
    z = process.corrupt(codes, clocks, draws.noise.to(model.device), presence)
    heads = model(z, clocks, observation, presence)

    total = at_least_single(z.new_zeros(batch))
    latent_dims = model.layout.latent.numel
    l0 = l1 = None
    if weights.l0 > 0:
        l0 = prior_kl(process, codes, presence)
        total = total + weights.l0 * l0 / latent_dims
    if weights.l1 > 0:
        prediction = model.complete(heads, z, clocks, observation, presence, _blanks(model, x, codes))
        derived = model.epsilon_head is None
        earlier = (clocks - 1).clamp(min=0)
        kl = transition_kl(process, z, codes, prediction, clocks, earlier, presence, derived_epsilon=derived)
        l1 = process.steps * kl  # p(t) = 1/T: T times one term estimates the sum
        plain = (
            l1 if weights.l1_time == "elbo" else _snr_weighted(process, z, codes, prediction, clocks, presence, weights)
        )
        total = total + weights.l1 * plain / latent_dims
    l2: dict[str, Tensor] = {}
    l3: dict[str, Tensor] = {}
    counted: dict[str, Tensor] = {}
    snr = process.snr(t.clamp(min=1))
    counts = presence * _left(observation, t)
    for i, name in enumerate(names):
        modality, params = model.modality(name), _at_least_single(heads.params[name])
        counted[name] = counts[:, i]
        l2[name] = torch.where(counted[name] > 0, modality.decoder.objective(params, x[name]), 0)
        scale = modality.loss_weight * snr_weight(snr[:, i], modality.snr_clamp)
        total = total + weights.l2 * scale.to(total.dtype) * l2[name]
        if weights.l3 > 0:
            final = (t[:, i] == 1) & (counted[name] > 0)
            l3[name] = torch.where(final, process.steps * modality.decoder.nll(params, x[name]), 0)
            total = total + weights.l3 * l3[name] / modality.decoder.dims_of(x[name]).clamp(min=1)
    return LossTerms(total, l0, l1, l2, l3, counted)


def left_to_denoise(
    model: MultimodalDiffusion, visible: Tensor, presence: Tensor, weights: LossWeights, draws: Draws
) -> Tensor:
    """Which modalities of each sample :func:`composite_loss` counts: ``[B, N]`` bool, on the device of ``visible``.

    Args:
        visible: what the network is shown, ``[B, N, h, w]``.
        presence: ``[B, N]``, 0 where a sample lacks a modality.
        draws: of the batch; the noise is not looked at.
    """
    observation = Observation({}, visible * presence[:, :, None, None])
    return (presence > 0) & _left(observation, _clocks(model, observation, weights, draws))


def _left(observation: Observation, t: Tensor) -> Tensor:
    """Where a modality that is there is neither observed whole nor clean by its clock: ``[B, N]`` bool."""
    return ~observation.complete & (t > 0)


def _at_least_single(params: Params) -> Params:
    """Parameters for a likelihood, which adds up many dimensions."""
    return {key: at_least_single(value) for key, value in params.items()}


def _blanks(model: MultimodalDiffusion, x: Mapping[str, Tensor], codes: Codes) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes, and where they are known, of the modalities whose x has places without a value."""
    known = {name: model.modality(name).encoder.known(x[name]) for name in model.names}
    return {name: (codes[name], where) for name, where in known.items() if where is not None}


def _clocks(model: MultimodalDiffusion, observation: Observation, weights: LossWeights, draws: Draws) -> Tensor:
    """Clocks ``[B, N]`` in 0..T as they were drawn, some samples with T for all instead."""
    names, steps, device = model.names, model.process.steps, observation.seen.device
    t = (to_device(draws.clocks, device) * steps).ceil().long()
    if isinstance(weights.readout, Mapping):
        if unknown := sorted(set(weights.readout) - set(names)):
            raise ValueError(f"readout: expected names among {', '.join(names)}, found {', '.join(unknown)}")
        whole = zip(names, observation.complete.unbind(1), strict=True)
        chance = torch.stack([seen * weights.readout.get(name, 0.0) for name, seen in whole]).amax(0)
    else:
        chance = (observation.seen.amax((1, 2, 3)) > 0) * weights.readout
    last = draws.readout.to(device) < chance
    return torch.where(last[:, None], steps, t)


def _snr_weighted(
    process: DiffusionProcess,
    z: Tensor,
    codes: Codes,
    prediction: Prediction,
    t: Tensor,
    presence: Tensor,
    weights: LossWeights,
) -> Tensor:
    """½ ‖ε − ε̂‖² · clamp(SNR_t) / SNR_t where t > 0: ``[B]``."""
    layout = process.layout
    error = at_least_single(process.epsilon(z, codes, t, presence) - prediction.epsilon)
    snr = layout.spread(process.snr(t.clamp(min=1))).clamp(min=torch.finfo(error.dtype).tiny)  # a target may reach 0
    counts = layout.spread(_where_present(t > 0, presence))
    scale = counts * snr_weight(snr, weights.l1_clamp) / snr
    return 0.5 * (scale.to(error.dtype) * error.square()).sum((1, 2, 3))


@frozen(eq=False)
class Bound:
    """The variational bound −log p(X) ≤ l0 + l1 + Σ_i l3_i, exact weights and likelihoods; nats, each ``[B]``.

    Attributes:
        dims: how many dimensions of each sample count, of all modalities together: ``[B]``.
    """

    l0: Tensor
    l1: Tensor
    l3: dict[str, Tensor]
    dims: Tensor

    @property
    def nats(self) -> Tensor:
        return self.l0 + self.l1 + torch.stack(list(self.l3.values())).sum(0)

    @property
    def bits_per_dim(self) -> Tensor:
        """Over the dimensions that count of all modalities together: ``[B]``."""
        return self.nats / (self.dims.clamp(min=1) * math.log(2))


@torch.no_grad()
def variational_bound(
    model: MultimodalDiffusion,
    x: Mapping[str, Tensor],
    *,
    path: Tensor | None = None,
    times: int | None = None,
    generator: torch.Generator | None = None,
) -> Bound:
    """The true bound of each sample along a path of clocks, nothing observed.

    Args:
        path: clocks ``[K + 1, N]`` from T for all to 0 for all; None: the law's own, T steps for each modality.
        times: how many of the steps of L1 are computed, spread evenly and scaled up, beside those in which a modality
            arrives at 0; None: all of them.

    Returns:
        One draw of the noise at each step: unbiased, with a Monte Carlo error that falls with the samples averaged.

    Raises:
        ValueError: if the path is none, or has several clocks where the layout has one.
    """
    process, names = model.process, model.names
    path = model.path(path=path)
    codes = model.encode(x)
    blanks = _blanks(model, x, codes)
    arrives = (path[1:] == 0) & (path[:-1] > 0)  # [K, N]
    between = (~arrives.any(1)).nonzero()[:, 0].flip(0)
    chosen = between
    if times is not None and times < len(between):
        offset = torch.rand(1, generator=generator)
        chosen = between[((torch.arange(times) + offset) * len(between) / times).long().clamp(max=len(between) - 1)]
    l1 = torch.zeros(len(x[names[0]]), device=model.device, dtype=single_or_wider(model.dtype))
    l3: dict[str, Tensor] = {}
    for k in [*chosen.tolist(), *arrives.any(1).nonzero()[:, 0].tolist()]:
        t, s = (path[j][None, :, None, None].to(model.device) for j in (k, k + 1))
        z = process.corrupt(codes, t, model.noise(len(l1), generator))
        heads = model(z, t)
        prediction = model.complete(heads, z, t, blanks=blanks)
        kl = transition_kl(process, z, codes, prediction, t, s, derived_epsilon=model.epsilon_head is None)
        l1 = l1 + kl * (1.0 if bool(arrives[k].any()) else len(between) / len(chosen))
        for i, name in enumerate(names):
            if bool(arrives[k, i]):
                l3[name] = model.modality(name).decoder.nll(_at_least_single(heads.params[name]), x[name])
    dims = torch.stack([model.modality(name).decoder.dims_of(x[name]) for name in names]).sum(0)
    return Bound(prior_kl(process, codes), l1, {name: l3[name] for name in names}, dims)
