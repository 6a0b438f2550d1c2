"""Sampling: any subset observed, the rest generated. Each solver is one readable loop over an array of times.

A solver sees only ``predict(z, t) -> Prediction`` and the process's coefficients, so it serves any number of
modalities, any schedule and any way of conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from attrs import field, frozen
from attrs.validators import ge, in_
from torch import Tensor

from mtdiffusion.conditioning import Observation, merge_visible
from mtdiffusion.interfaces import Params
from mtdiffusion.loss import standard_normal
from mtdiffusion.model import MultimodalDiffusion, Prediction
from mtdiffusion.process import DiffusionProcess, mix, per_sample

Predict = Callable[[Tensor, Tensor], Prediction]

SOLVERS = ("ancestral", "ddim", "dpmpp_2m")


@frozen
class SamplerSettings:
    """How to sample.

    Attributes:
        steps: network evaluations (twice as large with guidance).
        solver: "ancestral" (η = 1): modalities go on correcting one another; conditionals are good from 25 steps, joint
            samples from 50. "dpmpp_2m" (DPM-Solver++(2M)): deterministic, good from 8 to 12 and from 25. "ddim": η as
            given.
        eta: noise of a "ddim" step: 0 none, 1 ancestral sampling's; above, modalities correct one another further, at
            the price of diversity, up to starting each step afresh. Other solvers have none to set.
        guidance: classifier-free guidance on what is observed; 1 is none, and replacement knows no other.
        conditioning: "observed_aggregate", or "replacement" (for a model trained without it; biased).
        draw: draw each modality from its final distribution instead of taking its mode.
    """

    steps: int = field(default=50, validator=ge(1))
    solver: Literal["ancestral", "ddim", "dpmpp_2m"] = field(default="ancestral", validator=in_(SOLVERS))
    eta: float = field(default=0.0, validator=ge(0.0))
    guidance: float = field(default=1.0, validator=ge(0.0))
    conditioning: Literal["observed_aggregate", "replacement"] = field(
        default="observed_aggregate", validator=in_(("observed_aggregate", "replacement"))
    )
    draw: bool = False

    def __attrs_post_init__(self) -> None:
        if self.eta > 0 and self.solver != "ddim":
            raise ValueError(f"eta: {self.eta} is a setting of the solver ddim, found {self.solver}")
        if self.guidance != 1 and self.conditioning == "replacement":
            raise ValueError(
                f"guidance: {self.guidance} needs the observed aggregate; replacement has nothing to guide by"
            )


def time_steps(steps: int, total: int) -> list[int]:
    """Times T = t_0 > t_1 > ... > t_K = 0, evenly spread; K = min(steps, T)."""
    steps = min(steps, total)
    return [round(total * (steps - k) / steps) for k in range(steps + 1)]


def solve_ddim(
    predict: Predict,
    process: DiffusionProcess,
    z: Tensor,
    times: Sequence[int],
    *,
    eta: float = 0.0,
    epsilon_head: bool = False,
    generator: torch.Generator | None = None,
) -> Prediction:
    """DDIM (η = 0, Song et al. 2021) to ancestral sampling (η = 1) and beyond: jumps t → s with noise η.

    Raises:
        ValueError: with an ε head, if the jumps are so long that errors of ε would grow beyond all bounds.
    """
    if epsilon_head:
        _require_short_jumps(process, times)
    for now, later in pairwise(times):
        t = torch.full((z.shape[0],), now, device=z.device)
        s = torch.full_like(t, later)
        prediction = predict(z, t)
        if epsilon_head:
            mean = process.mean_from_epsilon(z, prediction.epsilon, prediction.codes, t, s)
        else:
            mean = process.mean(prediction.codes, s)
        noise = standard_normal(z, generator) if eta > 0 else None
        z = process.jump(mean, prediction.epsilon, t, s, eta, noise)
    return prediction


def _require_short_jumps(process: DiffusionProcess, times: Sequence[int], most: float = 1e6) -> None:
    """An ε head's jump multiplies its errors by κ = √(ᾱ_s/ᾱ_t); with literal retention that overflows float32."""
    log_alpha_bar = process.log_alpha_bar[torch.tensor(times)]
    kappa = torch.exp(0.5 * log_alpha_bar.diff().max()).item()
    if kappa > most:
        raise ValueError(
            f"with an ε head, the longest of {len(times) - 1} steps would multiply errors by {kappa:.0e}; "
            f"expected at most {most:.0e}. Take more steps (up to T = {process.steps}), or the solver "
            "dpmpp_2m, which uses the heads alone."
        )


def solve_dpmpp_2m(
    predict: Predict,
    process: DiffusionProcess,
    z: Tensor,
    times: Sequence[int],
) -> Prediction:
    """DPM-Solver++(2M) (Lu et al. 2022), generalised to N modalities, each with its half-log-SNR λ_i = log(m^(i)/σ).

    ``z_s = (σ_s/σ_t) z_t + Σ_i (m_s^(i) − (σ_s/σ_t) m_t^(i)) ê_i*``, where ê_i* extrapolates the last two ê_i in λ_i;
    the first and the last step are of first order.
    """
    previous: Prediction | None = None
    h_previous: Tensor | None = None
    for now, later in pairwise(times):
        t = torch.full((z.shape[0],), now, device=z.device)
        s = torch.full_like(t, later)
        prediction = predict(z, t)
        codes = prediction.codes
        h = _half_log_snr(process, s) - _half_log_snr(process, t)  # [B, N]; infinite into t = 0
        if previous is not None and h_previous is not None and later > 0:
            extrapolate = (h / (2 * h_previous)).nan_to_num(0.0, 0.0, 0.0)[:, :, None, None, None].to(codes.dtype)
            codes = codes + extrapolate * (codes - previous.codes)
        ratio = (process.variance(s) / process.variance(t)).sqrt()
        gain = process.signal(s) - ratio[:, None] * process.signal(t)
        z = per_sample(ratio, z) * z + mix(gain, codes)
        previous, h_previous = prediction, h
    return prediction


def solve(
    predict: Predict,
    process: DiffusionProcess,
    z: Tensor,
    times: Sequence[int],
    settings: SamplerSettings,
    *,
    epsilon_head: bool = False,
    generator: torch.Generator | None = None,
) -> Prediction:
    """The solver that the settings name, over given times; their ``steps`` are not asked."""
    if settings.solver == "dpmpp_2m":
        return solve_dpmpp_2m(predict, process, z, times)
    eta = 1.0 if settings.solver == "ancestral" else settings.eta
    return solve_ddim(predict, process, z, times, eta=eta, epsilon_head=epsilon_head, generator=generator)


def _half_log_snr(process: DiffusionProcess, t: Tensor) -> Tensor:
    return 0.5 * torch.log(process.snr(t))


@torch.no_grad()
def sample(
    model: MultimodalDiffusion,
    batch: int,
    *,
    observed: Mapping[str, Tensor] | None = None,
    visible: Mapping[str, Tensor] | None = None,
    generate: Sequence[str] | None = None,
    settings: SamplerSettings | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Generate every modality, or the rest given any subset.

    Args:
        batch: how many samples, B.
        observed: what is given, by modality name, each ``[B, ...]``.
        visible: for those given in part, a map ``[B, h, w]`` of 1 (seen) and 0 (to be filled in).
        generate: the modalities wanted beside the observed; None: all. The others take part unseen: the process is that
            of the whole, so the wanted have the law that they have among all.
        generator: where all randomness comes from.

    Returns:
        Observed and generated modalities by name, each ``[B, ...]``; the observed as given where they were seen.

    Raises:
        ValueError: for a name that is no modality, a batch that differs, or a map that does not fit.
    """
    settings = settings or SamplerSettings()
    observed = dict(observed or {})
    wanted = set(model.names if generate is None else generate) | set(observed)
    _check_request(model, batch, observed, wanted)
    weight = model.owner
    observed = {name: x.to(weight.device) for name, x in observed.items()}
    seen = model.visibility(batch, observed, visible).to(weight.dtype)
    observation = model.observe(observed, seen)
    predict = _predictor(model, observation, settings)
    z = standard_normal(observation.codes[:, 0], generator)
    times = time_steps(settings.steps, model.process.steps)
    prediction = solve(
        predict,
        model.process,
        z,
        times,
        settings,
        epsilon_head=model.epsilon_head is not None,
        generator=generator,
    )
    out: dict[str, Tensor] = {}
    for i, name in enumerate(model.names):
        if name not in wanted:
            continue
        if name in observed and bool(observation.complete[:, i].all()):
            out[name] = observed[name]
            continue
        decoder = model.modality(name).decoder
        params = prediction.params[name]
        out[name] = decoder.sample(params, generator) if settings.draw else decoder.mode(params)
        if name in observed:
            assert visible is not None
            out[name] = merge_visible(observed[name], out[name], visible[name].to(weight.device))
    return out


def read_out(model: MultimodalDiffusion, observation: Observation) -> dict[str, Params]:
    """Parameters of p(x_i | observed) by modality name, from one evaluation of the network: at t = T, where z says
    nothing (it is 0 here), so that all there is to go by is what is observed.

    For what the observed all but determine, this is a classifier or a regression. It is differentiable.
    """
    z = torch.zeros_like(observation.codes[:, 0])
    t = torch.full((len(z),), model.process.steps, device=z.device)
    return model(z, t, observation).params


def _check_request(model: MultimodalDiffusion, batch: int, observed: Mapping[str, Tensor], wanted: set[str]) -> None:
    unknown = sorted(wanted - set(model.names))
    if unknown:
        raise ValueError(f"no modality named {', '.join(unknown)}; this model has {', '.join(model.names)}")
    for name, x in observed.items():
        if x.shape[0] != batch:
            raise ValueError(f"observed[{name!r}]: expected a batch of {batch}, found {x.shape[0]}")
        model.modality(name).check(x)


def _predictor(model: MultimodalDiffusion, observation: Observation, settings: SamplerSettings) -> Predict:
    """What the solvers call: the model with its conditioning and classifier-free guidance."""
    if settings.conditioning == "replacement":
        nothing = observation.without()

        def replace(z: Tensor, t: Tensor) -> Prediction:
            blind = model(z, t, nothing)
            epsilon = blind.epsilon if model.epsilon_head is not None else None
            return model.complete(z, t, observation, blind.params, epsilon)

        return replace
    if settings.guidance == 1.0 or not bool(observation.visible.any()):
        return lambda z, t: model(z, t, observation)
    both = Observation(
        torch.cat([observation.codes, torch.zeros_like(observation.codes)]),
        torch.cat([observation.visible, torch.zeros_like(observation.visible)]),
    )

    def guided(z: Tensor, t: Tensor) -> Prediction:
        """Ho & Salimans 2022, on the heads' parameters: θ = θ_u + g (θ_c − θ_u). For logits it is exact Bayes."""
        pair = model(torch.cat([z, z]), torch.cat([t, t]), both)
        params: dict[str, Params] = {
            name: {key: _extrapolate(value, settings.guidance) for key, value in values.items()}
            for name, values in pair.params.items()
        }
        epsilon = _extrapolate(pair.epsilon, settings.guidance) if model.epsilon_head is not None else None
        return model.complete(z, t, observation, params, epsilon)

    return guided


def _extrapolate(pair: Tensor, guidance: float) -> Tensor:
    conditional, unconditional = pair.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
