"""``sdedit``: holes filled by editing a crude guess with an unconditional model (after Meng et al. 2022).

Meng et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations", arXiv 2108.01073.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import and_, gt, in_, le
from torch import Tensor

from mtdiffusion import MultimodalDiffusion, SamplerSettings
from mtdiffusion.conditioning import Observation, merge_visible
from mtdiffusion.loss import standard_normal
from mtdiffusion.model import Prediction
from mtdiffusion.process import DiffusionProcess
from mtdiffusion.sampler import Predict, solve, time_steps
from mtdiffusion_benchmarks.interfaces import Fitted, Problem
from mtdiffusion_benchmarks.methods.joint import Diffusion, train, without_observations
from mtdiffusion_engine.data import ModalityData
from mtdiffusion_registry import MethodConfig, Query, UserError, hookimpl

MTDIFFUSION_API = 1

_TRAINING_SAMPLES = 1024  # over which the mean training code is taken


def start_time(strength: float, steps: int) -> int:
    """t0 = strength · T in whole steps, at least 1."""
    return max(1, round(strength * steps))


def edit(
    predict: Predict,
    process: DiffusionProcess,
    guide: Tensor,
    start: int,
    settings: SamplerSettings,
    *,
    epsilon_head: bool = False,
    generator: torch.Generator | None = None,
) -> Prediction:
    """Noise a guide to a time and denoise it from there.

    From t0 = T nothing of the guide is left: there we start from N(0, I), as sampling does.

    Args:
        predict: the model, as the solvers call it.
        guide: codes ``[B, N, C, H, W]``.
        start: t0 in 1..T.
        settings: the solver, and its number of evaluations, spread over t0..0 (fewer if t0 is less).

    Returns:
        The last prediction, whose parameters are the answer's.
    """
    noise = standard_normal(guide[:, 0], generator)
    t = torch.full((len(guide),), start, device=guide.device)
    z = noise if start == process.steps else process.corrupt(guide, t, noise)
    times = time_steps(settings.steps, start)
    return solve(predict, process, z, times, settings, epsilon_head=epsilon_head, generator=generator)


def fill_holes(code: Tensor, visible: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """A code with its hidden places filled.

    Args:
        code: ``[B, c, H, W]``, 0 where it is hidden.
        visible: ``[B, 1, H, W]`` of 1 (seen) and 0 (hidden).
        otherwise: what to fill with, ``[c, H, W]``; None: each channel's mean over the places of the sample that are
            seen.

    Returns:
        ``[B, c, H, W]``, untouched where it is seen.
    """
    if otherwise is None:
        mean = code.sum((-2, -1), keepdim=True) / visible.sum((-2, -1), keepdim=True).clamp(min=1)
        return code + mean * (1 - visible)
    return code + otherwise * (1 - visible)


@torch.no_grad()
def mean_codes(model: MultimodalDiffusion, data: ModalityData) -> Tensor:
    """The mean code of each modality ``[N, C, H, W]``, over training samples that have it."""
    step = -(-len(data) // _TRAINING_SAMPLES)
    batch = data.batch(range(0, len(data), step)).to(model.owner.device)
    present = batch.presence[:, :, None, None, None]
    return (model.encode(batch.x) * present).sum(0) / present.sum(0).clamp(min=1)


class SDEdit(Fitted):
    """A trained unconditional model, asked to edit.

    Args:
        diffusion: the trained model.
        means: mean training codes ``[N, C, H, W]``.
    """

    def __init__(self, diffusion: Diffusion, config: SDEditConfig, means: Tensor) -> None:
        self.model, self.settings = diffusion.model, diffusion.conditional
        self.config, self.means = config, means
        self.cost, self.curve = diffusion.cost, diffusion.curve

    def answers(self, query: Query) -> bool:
        """Its target given in part, and nothing else."""
        return query.hidden > 0 and query.targets == (self.config.target,) and not query.observed

    @torch.no_grad()
    def generate(
        self, query: Query, x: Mapping[str, Tensor], visible: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        assert visible is not None  # the query is of a target given in part
        model, target = self.model, self.config.target
        guide = self.guide(x[target], visible)
        nothing = Observation(torch.zeros_like(guide), guide.new_zeros(*guide.shape[:2], *guide.shape[3:]))
        prediction = edit(
            lambda z, t: model(z, t, nothing),
            model.process,
            guide,
            start_time(self.config.strength, model.process.steps),
            self.settings,
            epsilon_head=model.epsilon_head is not None,
            generator=generator,
        )
        decoder = model.modality(target).decoder
        params = prediction.params[target]
        out = decoder.sample(params, generator) if self.settings.draw else decoder.mode(params)
        return {target: merge_visible(x[target].cpu(), out.cpu(), visible.cpu())}

    def guide(self, x: Tensor, visible: Tensor) -> Tensor:
        """Codes ``[B, N, C, H, W]`` of what is edited: the target ``[B, ...]`` with its holes ``[B, H, W]`` filled, and
        of the modalities that nothing is known of the mean training code. A sample of which nothing is seen is
        filled with that, too."""
        model, target = self.model, self.config.target
        column = model.names.index(target)
        seen = visible[:, None].to(self.means)
        code = model.modality(target).encoder.observe(x.to(self.means.device), seen)
        otherwise = model.layout.take(target, self.means[column : column + 1])[0]
        known = fill_holes(code, seen, otherwise)
        if self.config.fill == "seen":
            some = seen.amax((-2, -1), keepdim=True) > 0
            known = torch.where(some, fill_holes(code, seen), known)
        codes = self.means.expand(len(x), *self.means.shape).clone()
        codes[:, column] = model.layout.place(target, known)
        return codes


@frozen
class SDEditConfig(MethodConfig):
    """A model trained on the joint distribution alone (as ``replacement`` is: nothing is ever observed), that fills
    holes as SDEdit edits a picture.

    The hole is filled with a mean, the whole is noised to t0 = strength · T and denoised from there, once, and what is
    seen is merged in at the end. This is SDEdit's plain procedure: what is seen guides by the start alone, and is not
    put back at every step, as the variant with a mask in the loop does (``replacement`` is what that leads to at
    strength 1). It happens in the diffusion space, through the target's encoder, so that any spatial modality can be
    asked; the mean is that of codes. Network evaluations are those of other conditionals, ``evaluation.steps``, spread
    over t0..0; the solver is ``sampling.solver``.

    Attributes:
        target: the modality.
        strength: t0 / T. More makes what is filled in likelier, and less like what surrounds it.
        fill: the hole's first filling: the mean of what is "seen" of the sample, or the mean code of the "training"
            data, place by place.
    """

    kind: ClassVar[str] = "sdedit"
    target: str
    strength: float = field(default=0.6, validator=and_(gt(0.0), le(1.0)))
    fill: Literal["seen", "training"] = field(default="seen", validator=in_(("seen", "training")))

    def fit(self, problem: Problem) -> Fitted:
        if self.target not in problem.modalities:
            raise UserError(
                f"method sdedit: the task has no modality named {self.target} (it has {', '.join(problem.modalities)})"
            )
        if not problem.modalities[self.target].encoder.spatial:
            raise UserError(
                f"method sdedit: target: {self.target} has no places, so no part of it can be hidden; expected a "
                "spatial modality"
            )
        diffusion = train(problem, without_observations(problem.experiment))
        return SDEdit(diffusion, self, mean_codes(diffusion.model, problem.train))


@hookimpl
def mtdiffusion_methods() -> list[type]:
    return [SDEditConfig]
