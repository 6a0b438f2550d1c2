"""Sampling: any subset observed, the rest generated, along any path of clocks.

A solver is a step t → s that sees only a :class:`Prediction` and the process's coefficients, so it serves any number of
modalities, any schedule, any path and any way of conditioning; :func:`sample` is the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from attrs import Attribute, field, frozen
from attrs.validators import and_, ge, in_, le, lt, optional
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mtdiffusion.conditioning import Observation, merge_visible
from mtdiffusion.interfaces import Params
from mtdiffusion.model import Heads, MultimodalDiffusion, Prediction, standard_normal
from mtdiffusion.process import DiffusionProcess

Step = Callable[[Tensor, Prediction, Tensor, Tensor], Tensor]
"""z_t, what is predicted of it, clocks t and s ``[B, N, h, w]`` -> z_s."""

SOLVERS = ("ancestral", "ddim", "dpmpp_2m")


def _interval(_: object, attribute: Attribute[tuple[float, float]], value: tuple[float, float]) -> None:
    if len(value) != 2 or not 0 <= value[0] < value[1] <= 1:
        raise ValueError(f"'{attribute.name}': expected two shares of the path, 0 <= low < high <= 1, found {value}")


def _by_name(_: object, attribute: Attribute[Mapping[str, float] | None], value: object) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"'{attribute.name}': expected shares by modality name, such as {shares(value)}; found {value!r}"
        )


def shares(value: object) -> str:
    """The dict that somebody meant who wrote ``label=0.6,mask=0.3``; an example of one, if it cannot be told."""
    try:
        pairs = [pair.partition("=") for pair in str(value).split(",")]
        return str({name.strip(): float(share) for name, _, share in pairs})
    except ValueError:
        return str({"label": 0.6})


@frozen
class SamplerSettings:
    """How to sample.

    Attributes:
        steps: network evaluations (twice as large where there is guidance).
        solver: "dpmpp_2m" (DPM-Solver++(2M)): of second order; conditionals are good from 16 steps, joint samples from
            32. "ddim": of first order. "ancestral": the same with η = 1.
        eta: noise of a step: 0 none; 1 ancestral sampling's, by which modalities go on correcting one another; above,
            they do so further, up to starting each step afresh. None: 1.4 of "dpmpp_2m", 1 of "ancestral" (which knows
            no other), 0 of "ddim".
        path: how far ahead of the slowest each modality is denoised, by name, in shares of the path (0 for those not
            named; {}: all together). None: as the model's law of clocks says.
        guidance: classifier-free guidance on what is observed; 1 is none, and replacement knows no other.
        guidance_interval: (low, high): the part of the path on which there is guidance, in shares of the path, 1 its
            start and 0 its end (Kynkäänniemi et al. 2024). Elsewhere a step costs what it does without.
        conditioning: "observed": the network is shown what is observed. "replacement": it is not (for a model trained
            without; biased).
        draw: draw each modality from its final distribution instead of taking its mode.
        compile: compile the network (torch.compile): up to some minutes at the first batch, for faster ones after it.
        precision: of the network. "float32": that of its weights. "bfloat16": autocast, faster where the device
            multiplies bfloat16 natively; all else stays in the precision of the weights.
    """

    steps: int = field(default=32, validator=ge(1))
    solver: Literal["ancestral", "ddim", "dpmpp_2m"] = field(default="dpmpp_2m", validator=in_(SOLVERS))
    eta: float | None = field(default=None, validator=optional(and_(ge(0.0), le(1e6))))
    path: Mapping[str, float] | None = field(default=None, validator=_by_name)
    guidance: float = field(default=1.0, validator=and_(ge(0.0), lt(math.inf)))
    guidance_interval: tuple[float, float] = field(default=(0.0, 1.0), converter=tuple, validator=_interval)
    conditioning: Literal["observed", "replacement"] = field(
        default="observed", validator=in_(("observed", "replacement"))
    )
    draw: bool = False
    compile: bool = False
    precision: Literal["float32", "bfloat16"] = field(default="float32", validator=in_(("float32", "bfloat16")))

    def __attrs_post_init__(self) -> None:
        if self.solver == "ancestral" and self.eta not in (None, 1):
            raise ValueError(f"eta: {self.eta} is a setting of the solvers ddim and dpmpp_2m; ancestral's is 1")
        if self.guidance != 1 and self.conditioning == "replacement":
            raise ValueError(f"guidance: {self.guidance} has nothing to guide by with conditioning by replacement")

    @property
    def noise(self) -> float:
        """η of a step: ``eta``, or the solver's own where that is None."""
        if self.eta is not None:
            return self.eta
        return {"dpmpp_2m": 1.4, "ancestral": 1.0, "ddim": 0.0}[self.solver]


def ddim(
    process: DiffusionProcess,
    eta: float = 0.0,
    *,
    epsilon_head: bool = False,
    generator: torch.Generator | None = None,
) -> Step:
    """DDIM (η = 0, Song et al. 2021) to ancestral sampling (η = 1) and beyond: of z_s's variance, noise that is drawn
    makes up η² times as much as in the posterior, at most all."""

    def step(z: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        if epsilon_head:
            mean = process.mean_from_epsilon(z, prediction.epsilon, prediction.codes, t, s)
        else:
            mean = process.mean(prediction.codes, s)
        if eta == 0:
            return process.jump(mean, prediction.epsilon, s)
        kept = 1 - eta**2 + eta**2 * torch.exp(process.log_noise_kept(t, s))
        return process.jump(mean, prediction.epsilon, s, torch.log(kept.clamp(min=0)), standard_normal(z, generator))

    return step


def dpmpp_2m(process: DiffusionProcess, eta: float = 0.0, *, generator: torch.Generator | None = None) -> Step:
    """DPM-Solver++(2M) (Lu et al. 2022), generalised to N modalities, each with its half-log-SNR λ_i = log(m^(i)/σ).

    A jump from ê_i*, which extrapolates the last two ê_i in λ_i, in place of ê_i. For η = 0 that is
    ``z_s = (σ_s/σ_t) z_t + Σ_i (m_s^(i) − (σ_s/σ_t) m_t^(i)) ê_i*``; for η = 1 the stochastic solver of the same order.
    Any η integrates the stochastic equation of η² times the noise (SA-Solver's τ, Xue et al. 2023), as if ê_i* stood
    still: steps keep what their parts would. A modality's first step and its last, into t = 0, are of first order.
    """
    previous: tuple[dict[str, Tensor], Tensor] | None = None

    def step(z: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        nonlocal previous
        h = 0.5 * (torch.log(process.snr(s)) - torch.log(process.snr(t)))  # [B, N, h, w]; infinite into t = 0
        codes = prediction.codes
        if previous is not None:
            # h is 0 while a clock stands still, and infinite at its ends: no extrapolation there.
            factor = (h / (2 * previous[1])).nan_to_num(0.0, 0.0, 0.0)
            codes = {
                name: code + factor[:, i : i + 1].to(code.dtype) * (code - previous[0][name])
                for i, (name, code) in enumerate(codes.items())
            }
        previous = prediction.codes, h
        mean, epsilon = process.mean(codes, s), process.epsilon(z, codes, t)
        if eta == 0:
            return process.jump(mean, epsilon, s)
        return process.jump(mean, epsilon, s, eta**2 * process.log_noise_kept(t, s), standard_normal(z, generator))

    return step


def solver(model: MultimodalDiffusion, settings: SamplerSettings, generator: torch.Generator | None = None) -> Step:
    """The solver that the settings name, for one trajectory."""
    if settings.solver == "dpmpp_2m":
        return dpmpp_2m(model.process, settings.noise, generator=generator)
    return ddim(model.process, settings.noise, epsilon_head=model.epsilon_head is not None, generator=generator)


@torch.no_grad()
def sample(
    model: MultimodalDiffusion,
    batch: int,
    *,
    observed: Mapping[str, Tensor] | None = None,
    visible: Mapping[str, Tensor] | None = None,
    strength: Mapping[str, float] | None = None,
    generate: Sequence[str] | None = None,
    settings: SamplerSettings | None = None,
    path: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, int, Mapping[str, Params]], None] | None = None,
) -> dict[str, Tensor]:
    """Generate every modality, or the rest given any subset.

    Args:
        batch: how many samples, B.
        observed: what is given, by modality name, each ``[B, ...]``.
        visible: for those given in part, a map ``[B, h, w]`` of 1 (seen) and 0 (to be filled in).
        strength: for those given as something to start from: they enter with the noise of this share of the path, and
            are denoised from there (SDEdit, Meng et al. 2022). 1 forgets what was given, near 0 keeps it.
        generate: the modalities wanted beside the observed; None: all. The others take part unseen: the process is that
            of the whole, so the wanted have the law that they have among all.
        path: clocks ``[K + 1, N]`` to go along, from T for all to 0 for all, instead of what the settings say.
        generator: where all randomness comes from.
        on_step: is told of each step, when the network has been asked: how many steps are done, of how many, and the
            parameters of p(x_i | z_t, observed) of all modalities by name. What it raises ends the sampling.

    Returns:
        Observed and generated modalities by name, each ``[B, ...]``; the observed as given where they were seen (and as
        :meth:`Modality.mend` leaves them).

    Raises:
        ValueError: for a name that is no modality, a batch that differs, a map that does not fit, no path, or steps so
            long that an ε head's errors would grow beyond all bounds.
    """
    settings = settings or SamplerSettings()
    model = model.compiled() if settings.compile else model
    observed, visible, strength = dict(observed or {}), dict(visible or {}), dict(strength or {})
    wanted = set(model.names if generate is None else generate) | set(observed)
    _check_request(model, batch, observed, strength, wanted)
    observed = {name: x.to(model.device) for name, x in observed.items()}
    fixed = [name for name in observed if name not in strength and name not in visible]
    out: dict[str, Tensor] = {name: observed[name] for name in fixed}
    process, layout = model.process, model.layout

    shown = {name: x for name, x in observed.items() if name in visible or name not in strength}
    observation = model.observe(shown, model.visibility(batch, shown, visible))
    blind = settings.conditioning == "replacement"
    clocks = _clocks(model, settings, path, [] if blind else fixed, strength)
    if len(fixed) == len(model.names):  # nothing is left to generate
        return out
    if model.epsilon_head is not None and settings.solver != "dpmpp_2m":
        generated = [i for i, name in enumerate(model.names) if name not in fixed]
        _require_short_jumps(process, clocks[:, generated], model.dtype)
    steps = [row[None, :, None, None].to(model.device) for row in clocks]
    noise = model.noise(batch, generator)
    z = _start(model, observed, strength, steps[0], noise)
    clean = process.signal(torch.zeros_like(steps[0]))
    seen = torch.zeros_like(observation.seen) if blind else observation.seen
    if not blind:
        z = layout.place(z, observation, clean)
    predict = _predictor(model, observation, settings, noise)
    step = solver(model, settings, generator)
    for k in range(len(steps) - 1):
        prediction = predict(z, steps[k], 1 - k / (len(steps) - 1))
        if on_step is not None:
            on_step(k, len(steps) - 1, prediction.params)
        t, s = layout.clocks(steps[k], seen), layout.clocks(steps[k + 1], seen)
        z = torch.where(layout.spread(s < t), step(z, prediction, t, s), z)
        arrived = [n for i, n in enumerate(model.names) if clocks[k, i] > 0 == clocks[k + 1, i] and n not in fixed]
        for name in arrived:
            decoder = model.modality(name).decoder
            params = prediction.params[name]
            out[name] = decoder.sample(params, generator) if settings.draw else decoder.mode(params)
            if name in visible:
                where = visible[name].to(model.device)
                out[name] = model.modality(name).mend(merge_visible(observed[name], out[name], where), where)
        if k < len(steps) - 2 and arrived:  # the others go on by what was decided, not by what was expected
            done = model.encode({name: out[name] for name in arrived})
            here = torch.tensor([[name in done for name in model.names]], device=model.device)[:, :, None, None]
            z = layout.place(z, Observation(done, here.to(z.dtype)), clean)
    return {name: out[name] for name in model.names if name in wanted}


def read_out(model: MultimodalDiffusion, observation: Observation) -> dict[str, Params]:
    """Parameters of p(x_i | observed) by modality name, from one evaluation of the network: all that is not observed at
    t = T, where z says nothing (it is 0 here), so that all there is to go by is what is observed.

    For what the observed all but determine, this is a classifier or a regression. It is differentiable.
    """
    layout, process = model.layout, model.process
    t = torch.full((1, len(model.names), 1, 1), process.steps, device=model.device)
    z = torch.zeros(len(observation.seen), *layout.latent.shape, device=model.device, dtype=model.dtype)
    z = layout.place(z, observation, process.signal(torch.zeros_like(t)))
    return model(z, layout.clocks(t, observation.seen), observation).params


def _check_request(
    model: MultimodalDiffusion,
    batch: int,
    observed: Mapping[str, Tensor],
    strength: Mapping[str, float],
    wanted: set[str],
) -> None:
    unknown = sorted((wanted | set(strength)) - set(model.names))
    if unknown:
        raise ValueError(f"no modality named {', '.join(unknown)}; this model has {', '.join(model.names)}")
    for name, x in observed.items():
        if x.shape[0] != batch:
            raise ValueError(f"observed[{name!r}]: expected a batch of {batch}, found {x.shape[0]}")
        model.modality(name).check(x)
    for name, value in strength.items():
        if name not in observed:
            raise ValueError(f"strength: {value} was given for {name!r}, but it is not among the observed")
        if not 0 < value <= 1:
            raise ValueError(f"strength[{name!r}]: expected a share of the path above 0 and up to 1, found {value}")
    if strength and model.layout.shared_clock:
        raise ValueError("strength: in a shared layout all modalities have one clock, so none can start from another")


def _clocks(
    model: MultimodalDiffusion,
    settings: SamplerSettings,
    path: Tensor | None,
    fixed: Sequence[str],
    strength: Mapping[str, float],
) -> Tensor:
    """The path ``[K + 1, N]`` of a request, no step of it spent where nothing that is generated moves."""
    names, total = model.names, model.process.steps
    moving = torch.tensor([name not in fixed for name in names])
    most = torch.tensor([max(1, round(strength.get(name, 1.0) * total)) for name in names])
    if path is None:
        # As many steps as are asked for, along the part of the path in which something moves.
        fine = torch.minimum(model.path(None, settings.path), most)
        moves = (fine.diff(dim=0) != 0)[:, moving].any(1)
        fine = torch.cat([fine[:-1][moves], fine[-1:]])
        last = len(fine) - 1
        k = min(settings.steps, last)
        return fine[[last - round(last * j / k) for j in range(k, 0, -1)] + [last]]
    path = torch.minimum(model.path(path=path), most)
    moves = (path.diff(dim=0) != 0)[:, moving].any(1)
    return torch.cat([path[:-1][moves], path[-1:]])


def _require_short_jumps(process: DiffusionProcess, clocks: Tensor, dtype: torch.dtype) -> None:
    """An ε head's jump multiplies its errors, those of rounding among them, by κ = √(ᾱ_s/ᾱ_t); with literal retention
    that overflows float32."""
    most = min(1e6, 0.5 / torch.finfo(dtype).eps)
    kappa = torch.exp(0.5 * process.log_alpha_bar[clocks].diff(dim=0).max()).item()
    if kappa > most:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"with an ε head, the longest of {len(clocks) - 1} steps would multiply errors by {kappa:.0e}; "
            f"expected at most {most:g} in {name}. Take more steps (up to T = {process.steps}), or the solver "
            "dpmpp_2m, which uses the heads alone."
        )


def _start(
    model: MultimodalDiffusion,
    observed: Mapping[str, Tensor],
    strength: Mapping[str, float],
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """N(0, I), and what is given to start from with the noise of its clock; at T, where nothing is left of it, none."""
    codes = model.encode({name: observed[name] for name, share in strength.items() if share < 1})
    given = torch.tensor([[name in codes for name in model.names]], device=model.device)[:, :, None, None]
    rest = model.layout.scaled(model.process.variance(t).sqrt(), noise)
    return model.layout.place(noise, Observation(codes, given.to(noise.dtype)), model.process.signal(t), rest)


def _predictor(
    model: MultimodalDiffusion, observation: Observation, settings: SamplerSettings, noise: Tensor
) -> Callable[[Tensor, Tensor, float], Prediction]:
    """From z, the path's clocks ``[1, N, 1, 1]`` and the share of the path that is left to a prediction: the model with
    its conditioning and guidance."""
    layout, process = model.layout, model.process
    network = _in_bfloat16(model) if settings.precision == "bfloat16" else model
    if settings.conditioning == "replacement":
        return lambda z, t, left: model.complete(network(z, t), z, t, observation)

    def plain(z: Tensor, t: Tensor, left: float) -> Prediction:
        t = layout.clocks(t, observation.seen)
        return model.complete(network(z, t, observation), z, t, observation)

    if settings.guidance == 1.0 or not observation.codes:
        return plain
    both = Observation(
        {name: torch.cat([code, code]) for name, code in observation.codes.items()},
        torch.cat([observation.seen, torch.zeros_like(observation.seen)]),
    )

    low, high = settings.guidance_interval

    def guided(z: Tensor, t: Tensor, left: float) -> Prediction:
        """Ho & Salimans 2022, on the heads' parameters: θ = θ_u + g (θ_c − θ_u). For logits it is exact Bayes.

        Unconditionally, what is observed is as noisy as all else.
        """
        if not low < left <= high:
            return plain(z, t, left)
        t = t.expand(len(z), -1, -1, -1)
        rest = layout.scaled(process.variance(t).sqrt(), noise)
        unseen = layout.place(z, observation, process.signal(t), rest)
        seen_at = layout.clocks(t, observation.seen)
        pair = network(torch.cat([z, unseen]), torch.cat([seen_at, t.expand_as(seen_at)]), both)
        params: dict[str, Params] = {
            name: {key: _extrapolate(value, settings.guidance) for key, value in values.items()}
            for name, values in pair.params.items()
        }
        epsilon = None if pair.epsilon is None else _extrapolate(pair.epsilon, settings.guidance)
        return model.complete(Heads(params, epsilon), z, seen_at, observation)

    return guided


def _in_bfloat16(model: MultimodalDiffusion) -> Callable[..., Heads]:
    """The model's network by autocast. Its answers are made as wide as its weights are: steps add them up."""

    def network(*given: Any) -> Heads:
        with torch.autocast(model.device.type, torch.bfloat16):
            heads = model(*given)
        return tree_map_only(Tensor, lambda x: x.to(model.dtype), heads)

    return network


def _extrapolate(pair: Tensor, guidance: float) -> Tensor:
    conditional, unconditional = pair.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
