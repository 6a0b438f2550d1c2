"""``independent``: a joint model without a shared diffusion, every modality with noise and a time of its own.

The idea is UniDiffuser's (Bao et al. 2023, "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale"):
noise the modalities independently, tell one network all the times, and every conditional is a choice of times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from mtdiffusion import Backbone, DiffusionProcess, LatentLayout, Modality, MultimodalDiffusion, Params
from mtdiffusion.conditioning import merge_visible
from mtdiffusion.loss import draw_times, snr_weight, standard_normal
from mtdiffusion.sampler import time_steps
from mtdiffusion_benchmarks.interfaces import Cost, Fitted, Problem
from mtdiffusion_benchmarks.methods._training import fit_module
from mtdiffusion_engine.data import Batch
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_registry import ConfigError, MethodConfig, Query, hookimpl

MTDIFFUSION_API = 1

_FREQUENCIES = 32


class IndependentDiffusion(nn.Module):
    """Modalities side by side in channels of their own, z_i = m(t_i) e_i + σ(t_i) ε_i with a time t_i for each.

    The backbone receives the scaled z_i, and as its vector sines and cosines of every modality's noise level beside the
    encoders' read-outs of z_i; as its one noise level, their mean. What is observed is clean, at t_i = 0, and what is
    missing is noise, at t_i = T, so it needs no flags and no aggregate.

    Args:
        modalities: by instance name, in the order of the layout.
        backbone: built for :meth:`backbone_inputs`.
        process: whose column i is the process of modality i.
        layout: disjoint.
    """

    def __init__(
        self, modalities: Mapping[str, Modality], backbone: Backbone, process: DiffusionProcess, layout: LatentLayout
    ) -> None:
        super().__init__()
        self.names = list(modalities)
        self.modalities = nn.ModuleDict(modalities)
        self.backbone = backbone
        self.layout = layout
        self.register_buffer("log_alpha_bar", process.log_alpha_bar, persistent=False)
        self.register_buffer("signal_table", process.signal_table, persistent=False)
        self.register_buffer("frequencies", math.pi * torch.logspace(0, math.log10(500), _FREQUENCIES), False)
        self.log_alpha_bar: Tensor
        self.signal_table: Tensor
        self.frequencies: Tensor

    @staticmethod
    def backbone_inputs(layout: LatentLayout, readout: int) -> tuple[int, int]:
        """Channels of the map and width of the vector that a backbone receives (``readout``: of all encoders)."""
        return layout.latent.channels, 2 * _FREQUENCIES * len(layout.slots) + readout

    def modality(self, name: str) -> Modality:
        return self.modalities[name]  # type: ignore[return-value]

    @property
    def steps(self) -> int:
        """T, of every modality."""
        return self.log_alpha_bar.numel() - 1

    def process(self, name: str) -> DiffusionProcess:
        """The diffusion of one modality alone."""
        column = self.names.index(name)
        return DiffusionProcess(self.log_alpha_bar, self.signal_table[:, column : column + 1])

    def forward(self, z: Mapping[str, Tensor], t: Mapping[str, Tensor]) -> dict[str, Params]:
        """Parameters of p(x_i | all z) by name, from z_i ``[B, c_i, H, W]`` and t_i ``[B]`` in 0..T."""
        scaled, levels, readouts = [], [], []
        for name in self.names:
            process = self.process(name)
            scale = (process.signal(t[name]).square()[:, 0] + process.variance(t[name])).rsqrt()
            scaled.append(z[name] * scale[:, None, None, None].to(z[name].dtype))
            levels.append(process.noise_level(t[name]).to(z[name].dtype))
            readouts.append(self.modality(name).encoder.readout(scaled[-1]))
        noise = torch.stack(levels, 1)  # [B, N]
        angles = (noise[:, :, None] * self.frequencies).flatten(1)
        vector = torch.cat([angles.sin(), angles.cos(), *readouts], 1)
        features = self.backbone(torch.cat(scaled, 1), noise.mean(1), vector)
        return {name: self.modality(name).decoder(features) for name in self.names}


def build_independent(experiment: Experiment) -> IndependentDiffusion:
    """The model, freshly initialised from ``training.seed``: the experiment's encoders, heads, schedule and backbone.

    Raises:
        ConfigError: if its parts do not fit together.
    """
    own = evolve(experiment, latent=evolve(experiment.latent, layout="own", channels=None))
    joint: MultimodalDiffusion = build_model(own)  # a head depends on the backbone's features, not on its inputs
    readout = sum(joint.modality(name).encoder.readout_dim for name in joint.names)
    latent = joint.layout.latent
    inputs, vector = IndependentDiffusion.backbone_inputs(joint.layout, readout)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(experiment.training.seed)
            backbone = experiment.backbone.build(inputs, latent.height, latent.width, vector)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    modalities = {name: joint.modality(name) for name in joint.names}
    return IndependentDiffusion(modalities, backbone, joint.process, joint.layout)


def independent_loss(model: IndependentDiffusion, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """Σ_i λ_i clamp(SNR(t_i)) · objective_i, the mean over the batch: L2 of the joint model, each at its own time.

    Times are drawn uniformly from 0..T, for each modality independently: at t_i = 0 it is what a condition is, and has
    nothing left to predict. A modality that a sample lacks is noise, and not predicted.
    """
    z, t, presence = {}, {}, {}
    for column, name in enumerate(model.names):
        code = model.modality(name).encoder(batch.x[name])
        presence[name] = batch.presence[:, column]
        drawn = draw_times(len(code), model.steps + 1, generator).to(code.device) - 1
        t[name] = torch.where(presence[name] > 0, drawn, model.steps)
        noise = standard_normal(code, generator)
        z[name] = model.process(name).corrupt(code[:, None], t[name], noise, presence[name][:, None])
    params = model(z, t)
    total = torch.zeros_like(batch.presence[:, 0])
    terms: dict[str, Tensor] = {}
    for name in model.names:
        modality = model.modality(name)
        counted = (presence[name] > 0) & (t[name] > 0)
        objective = modality.decoder.objective(params[name], batch.x[name])
        objective = torch.where(counted, objective, torch.zeros_like(objective))
        snr = model.process(name).snr(t[name].clamp(min=1))[:, 0]
        total = total + modality.loss_weight * snr_weight(snr, modality.snr_clamp).to(objective.dtype) * objective
        terms[f"l2/{name}"] = objective.sum() / counted.sum().clamp(min=1)
    return {"loss": total.mean(), **terms}


@torch.no_grad()
def sample_independent(
    model: IndependentDiffusion,
    batch: int,
    steps: int,
    *,
    observed: Mapping[str, Tensor],
    partial: tuple[str, Tensor, Tensor] | None = None,
    draw: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Ancestral sampling: what is observed stays clean at t_i = 0, all else is denoised together from t = T.

    A modality given in part is inpainted by replacement: before each step its seen places are replaced by their code,
    noised to the step's time, as in RePaint (Lugmayr et al. 2022) without its resampling. The model was not trained
    for it; that is how such a model is given a part.

    Args:
        steps: network evaluations.
        observed: what is given whole, by name, each ``[batch, ...]``.
        partial: name, data ``[batch, ..., h, w]`` and visibility ``[batch, H, W]`` of what is given in part.
        draw: draw from the final distributions instead of taking their modes.

    Returns:
        What was generated by name, each ``[batch, ...]``; what was seen in part is as it was given.
    """
    device = model.frequencies.device
    known: Tensor | None = None
    if partial is not None:
        hole, part, visible = partial[0], partial[1].to(device), partial[2].to(device)
        seen = visible[:, None]
        known = model.modality(hole).encoder.observe(part, seen)
    z: dict[str, Tensor] = {}
    for name in model.names:
        if name in observed:
            z[name] = model.modality(name).encoder(observed[name].to(device))
        else:
            z[name] = standard_normal(torch.empty(batch, *model.layout.share(name).shape, device=device), generator)
    generated = [name for name in model.names if name not in observed]
    clean = torch.zeros(batch, dtype=torch.long, device=device)
    for now, later in pairwise(time_steps(steps, model.steps)):
        t, s = torch.full_like(clean, now), torch.full_like(clean, later)
        if known is not None:
            noised = model.process(hole).corrupt(known[:, None], t, standard_normal(known, generator))
            z[hole] = noised * seen + z[hole] * (1 - seen)
        params = model(z, {name: clean if name in observed else t for name in model.names})
        for name in generated:
            modality, process = model.modality(name), model.process(name)
            code = modality.decoder.expected_encoding(params[name], modality.encoder)[:, None]
            epsilon = process.epsilon(z[name], code, t)
            noise = standard_normal(z[name], generator)
            z[name] = process.jump(process.mean(code, s), epsilon, t, s, 1.0, noise)
    out: dict[str, Tensor] = {}
    for name in generated:
        decoder = model.modality(name).decoder
        out[name] = decoder.sample(params[name], generator) if draw else decoder.mode(params[name])
    if known is not None:
        out[hole] = merge_visible(part, out[hole], visible)
    return out


class Independent(Fitted):
    """A trained model with independent times, sampled."""

    def __init__(
        self, model: IndependentDiffusion, experiment: Experiment, cost: Cost, curve: list[dict[str, float]]
    ) -> None:
        self.model, self.experiment, self.cost, self.curve = model, experiment, cost, curve

    def answers(self, query: Query) -> bool:
        """Anything about its modalities; of a target given in part, if it has places."""
        names = set(self.model.names)
        if not {*query.observed, *query.targets} <= names:
            return False
        return not query.hidden or self.model.modality(query.targets[0]).encoder.spatial

    def generate(
        self, query: Query, x: Mapping[str, Tensor], visible: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        settings = self.experiment.sampling
        out = sample_independent(
            self.model,
            len(next(iter(x.values()))),
            settings.steps if query.joint else self.experiment.evaluation.steps,
            observed={name: x[name] for name in query.observed},
            partial=None if visible is None else (query.targets[0], x[query.targets[0]], visible),
            draw=settings.draw,
            generator=generator,
        )
        return {name: out[name].cpu() for name in query.targets or self.model.names}

    @torch.no_grad()
    def predict(self, query: Query, x: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """What the heads say with the given at t_i = 0 and all else noise at t_i = T."""
        if query.joint or query.hidden:
            return {}
        model = self.model
        device = model.frequencies.device
        batch = len(x[query.observed[0]])
        noise = torch.Generator().manual_seed(0)
        z, t = {}, {}
        for name in model.names:
            given = name in query.observed
            like = torch.empty(batch, *model.layout.share(name).shape, device=device)
            z[name] = model.modality(name).encoder(x[name].to(device)) if given else standard_normal(like, noise)
            t[name] = torch.full((batch,), 0 if given else model.steps, device=device)
        params = model(z, t)
        return {name: {key: value.cpu() for key, value in params[name].items()} for name in query.targets}


@frozen
class IndependentConfig(MethodConfig):
    """A joint model without the shared diffusion space, in the manner of UniDiffuser (Bao et al. 2023).

    Encoders, heads, their weights in the loss, the noise schedule, the backbone's configuration and the budget are the
    joint model's; what is observed is told by the times alone, and nothing about seeing a part is learned. It is
    sampled ancestrally, with ``sampling.steps`` for joint samples and ``evaluation.steps`` for conditionals; solver and
    guidance of the joint model do not apply.
    """

    kind: ClassVar[str] = "independent"

    def fit(self, problem: Problem) -> Fitted:
        experiment = problem.experiment
        model, cost, curve = fit_module(problem, self, build_independent(experiment), independent_loss)
        return Independent(model, experiment, cost, curve)


@hookimpl
def mtdiffusion_methods() -> list[type]:
    return [IndependentConfig]
