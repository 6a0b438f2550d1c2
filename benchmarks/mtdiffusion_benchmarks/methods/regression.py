"""``regression``: the single-task control, the joint model's own network trained to answer one query at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from mtdiffusion import MultimodalDiffusion, Params, read_out
from mtdiffusion.conditioning import merge_visible
from mtdiffusion_benchmarks.interfaces import Cost, Fitted, Problem
from mtdiffusion_benchmarks.methods._training import fit_module
from mtdiffusion_engine.data import Batch
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_engine.subsets import random_holes
from mtdiffusion_registry import MethodConfig, Query, UserError, hookimpl

MTDIFFUSION_API = 1


class Regression(Fitted):
    """A network that predicts one target from what it was trained to be given.

    Args:
        draw: answer with a draw from the predicted distribution instead of its mode, as ``sampling.draw`` asks.
    """

    def __init__(
        self,
        model: MultimodalDiffusion,
        config: RegressionConfig,
        cost: Cost,
        curve: list[dict[str, float]],
        *,
        draw: bool,
    ) -> None:
        self.model, self.config, self.cost, self.curve, self.draw = model, config, cost, curve, draw

    def answers(self, query: Query) -> bool:
        """What is given must be what it was trained on; it answers for its target, whatever else is asked for."""
        return (
            self.config.target in query.targets
            and set(query.observed) == set(self.config.observed)
            and bool(query.hidden) == self.config.partial
        )

    @torch.no_grad()
    def generate(
        self, query: Query, x: Mapping[str, Tensor], visible: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        model, target = self.model, self.config.target
        params = self.config.read(model, x, visible)
        decoder = model.modality(target).decoder
        out = (decoder.sample(params, generator) if self.draw else decoder.mode(params)).cpu()
        if visible is not None:
            out = model.modality(target).mend(merge_visible(x[target].cpu(), out, visible.cpu()), visible.cpu())
        return {target: out}

    @torch.no_grad()
    def predict(self, query: Query, x: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """Parameters of its target's distribution; {} for a target given in part."""
        if self.config.partial:
            return {}
        return {self.config.target: {key: value.cpu() for key, value in self.config.read(self.model, x).items()}}


@frozen
class RegressionConfig(MethodConfig):
    """The joint model's network without diffusion, trained for one query: an image classifier for label given image, a
    segmentation net for mask given image, masked reconstruction for a target given with holes.

    Encoders, backbone and heads are built as the joint model's, the whole task's, and the network is evaluated at t = T
    with z = 0: it has the same parameters and the same forward pass. The backward pass is shorter, and
    ``flops_per_step`` with it: what the target's head does not read (other heads; of a U-Net, the way up, if the target
    is a vector) gets no gradient. The loss is the objective of the target's head over the samples that have the
    target. With holes, these are drawn as in the joint model's training (``conditioning.hidden_share``), and the
    objective is over the whole target, as it is there.

    Attributes:
        target: what it predicts.
        observed: what it is given whole.
        partial: whether the target itself is given with holes.
    """

    kind: ClassVar[str] = "regression"
    role: ClassVar[Literal["joint", "control", "baseline"]] = "control"
    target: str
    observed: tuple[str, ...] = field(default=())
    partial: bool = False

    def __attrs_post_init__(self) -> None:
        if self.target in self.observed:
            raise ValueError(f"observed: {self.target} is the target, and cannot be given whole")
        if not self.observed and not self.partial:
            raise ValueError("observed: expected names of what is given, or partial = true, found neither")

    def fit(self, problem: Problem) -> Fitted:
        experiment = problem.experiment
        if missing := sorted({self.target, *self.observed} - set(experiment.modalities)):
            raise UserError(
                f"method regression: the task has no modality named {', '.join(missing)} (it has "
                f"{', '.join(experiment.modalities)})"
            )
        if self.partial and not problem.modalities[self.target].encoder.spatial:
            raise UserError(f"method regression: partial: {self.target} has no places, so it cannot be given in part")
        low, high = experiment.conditioning.hidden_share
        places = (experiment.latent.height, experiment.latent.width)

        def loss(model: MultimodalDiffusion, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
            visible = None
            if self.partial:
                share = low + (high - low) * torch.rand(len(batch.presence), generator=generator)
                visible = random_holes(share, places, generator)
            params = self.read(model, batch.x, visible, batch.presence)
            present = batch.presence[:, model.names.index(self.target)]
            objective = model.modality(self.target).decoder.objective(params, batch.x[self.target])
            return {"loss": (objective * present).sum() / present.sum().clamp(min=1)}

        model, cost, curve = fit_module(problem, self, build_model(experiment), loss)
        return Regression(model, self, cost, curve, draw=experiment.sampling.draw)

    def read(
        self,
        model: MultimodalDiffusion,
        x: Mapping[str, Tensor],
        visible: Tensor | None = None,
        presence: Tensor | None = None,
    ) -> Params:
        """Parameters of the target's distribution from what is given.

        Args:
            visible: ``[B, H, W]``, what is seen of a target given in part.
            presence: ``[B, N]``, 0 where a sample lacks a modality; None: all are there.
        """
        names = (*self.observed, *([self.target] if visible is not None else []))
        given = {name: x[name].to(model.device) for name in names}
        maps = {self.target: visible} if visible is not None else {}
        seen = model.visibility(len(given[names[0]]), given, maps)
        if presence is not None:
            seen = seen * presence[:, :, None, None]
        return read_out(model, model.observe(given, seen))[self.target]


@hookimpl
def mtdiffusion_methods() -> list[type]:
    return [RegressionConfig]
