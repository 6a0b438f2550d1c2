"""``sdedit``: holes filled by editing a crude guess with an unconditional model (after Meng et al. 2022).

Meng et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations", arXiv 2108.01073.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import and_, gt, le
from torch import Tensor

from mtdiffusion import read_out, sample
from mtdiffusion.conditioning import merge_visible
from mtdiffusion_benchmarks.interfaces import Fitted, Problem
from mtdiffusion_benchmarks.methods.joint import Diffusion, train, without_observations
from mtdiffusion_registry import MethodConfig, Query, UserError, hookimpl

MTDIFFUSION_API = 1


class SDEdit(Fitted):
    """A trained unconditional model, asked to edit."""

    def __init__(self, diffusion: Diffusion, target: str, strength: float) -> None:
        self.model, self.settings = diffusion.model, diffusion.conditional
        self.target, self.strength = target, strength
        self.cost, self.curve = diffusion.cost, diffusion.curve

    def answers(self, query: Query) -> bool:
        """Its target given in part, and nothing else."""
        return query.hidden > 0 and query.targets == (self.target,) and not query.observed

    @torch.no_grad()
    def generate(
        self, query: Query, x: Mapping[str, Tensor], visible: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        assert visible is not None  # the query is of a target given in part
        model, target = self.model, self.target
        given, seen = x[target].to(model.device), visible.to(model.device)
        nothing = model.observe({}, model.visibility(len(given), {}))
        guess = model.modality(target).decoder.mode(read_out(model, nothing)[target])
        edited = sample(
            model,
            len(given),
            observed={target: merge_visible(given, guess, seen)},
            strength={target: self.strength},
            settings=self.settings,
            generator=generator,
        )
        whole = merge_visible(given, edited[target], seen)
        return {target: model.modality(target).mend(whole, seen).cpu()}


@frozen
class SDEditConfig(MethodConfig):
    """A model trained on the joint distribution alone (as ``replacement`` is: nothing is ever observed), that fills
    holes as SDEdit edits a picture.

    The hole is filled with what the model expects at t = T, where it knows nothing (of an image, about the mean of the
    training images); the whole is noised to t0 = strength · T and denoised from there, once, and what is seen is merged
    in at the end. This is SDEdit's plain procedure: what is seen guides by the start alone, and is not put back at
    every step, as the variant with a mask in the loop does (``replacement`` is what that leads to at strength 1). Other
    modalities take part from noise. Network evaluations are those of other conditionals, ``evaluation.steps``; the
    solver is ``sampling.solver``.

    Attributes:
        target: the modality.
        strength: t0 / T. More makes what is filled in likelier, and less like what surrounds it.
    """

    kind: ClassVar[str] = "sdedit"
    target: str
    strength: float = field(default=0.6, validator=and_(gt(0.0), le(1.0)))

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
        if problem.experiment.latent.layout == "shared":
            raise UserError(
                "method sdedit: in a shared layout all modalities have one clock, so none can start from another; "
                'expected latent.layout = "own"'
            )
        return SDEdit(train(problem, without_observations(problem.experiment)), self.target, self.strength)


@hookimpl
def mtdiffusion_methods() -> list[type]:
    return [SDEditConfig]
