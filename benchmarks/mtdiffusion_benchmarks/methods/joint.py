"""The framework's own model: ``joint``, one for all of a task's queries; ``single``, the same for one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from attrs import evolve, field, frozen
from attrs.validators import min_len
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mtdiffusion import Draws, MultimodalDiffusion, SamplerSettings, composite_loss, read_out, sample, variational_bound
from mtdiffusion_benchmarks.interfaces import Cost, Curve, Fitted, Problem
from mtdiffusion_benchmarks.profile import said_of
from mtdiffusion_engine.checkpoint import read_json, write_json
from mtdiffusion_engine.data import ModalityData
from mtdiffusion_engine.experiment import Experiment, build_model, require_same
from mtdiffusion_engine.run import load_run
from mtdiffusion_engine.trainer import Progress, Trainer
from mtdiffusion_registry import MethodConfig, Query, UserError, hookimpl
from mtdiffusion_registry.pace import SELDOM, Pace

MTDIFFUSION_API = 1


class Diffusion(Fitted):
    """A trained model of the framework, sampled.

    Args:
        asked: the one query it was trained for; None: any.
    """

    def __init__(
        self,
        model: MultimodalDiffusion,
        experiment: Experiment,
        cost: Cost,
        curve: list[dict[str, float]],
        asked: Query | None = None,
    ) -> None:
        self.model, self.cost, self.curve, self.asked = model, cost, curve, asked
        self.joint = experiment.sampling
        self.conditional = evolve(experiment.sampling, steps=experiment.evaluation.steps)

    def answers(self, query: Query) -> bool:
        names = set(self.model.names)
        if not set(query.observed) <= names or (query.targets and not set(query.targets) & names):
            return False
        asked = self.asked
        return asked is None or (
            set(asked.observed) == set(query.observed)
            and bool(asked.hidden) == bool(query.hidden)
            and (query.joint or bool(set(asked.targets) & set(query.targets)))
        )

    def settings(self, query: Query) -> SamplerSettings:
        return self.joint if query.joint else self.conditional

    def generate(
        self, query: Query, x: Mapping[str, Tensor], visible: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        targets = [name for name in (query.targets or self.model.names) if name in self.model.names]
        observed = {name: x[name] for name in query.observed}
        maps = {}
        if visible is not None:
            (name,) = query.targets
            observed[name] = x[name]
            maps[name] = F.interpolate(visible[:, None], x[name].shape[-2:], mode="nearest")[:, 0]
        out = sample(
            self.model,
            len(next(iter(x.values()))),
            observed=observed,
            visible=maps,
            settings=self.settings(query),
            generator=generator,
        )
        return {name: out[name].cpu() for name in targets}

    @torch.no_grad()
    def predict(self, query: Query, x: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """What the heads say of all that is at t = T, going by what is given; {} if the network is not shown that."""
        if query.joint or query.hidden or self.conditional.conditioning == "replacement":
            return {}
        model = self.model
        observed = {name: x[name].to(model.device) for name in query.observed}
        batch = len(next(iter(observed.values())))
        params = read_out(model, model.observe(observed, model.visibility(batch, observed)))
        return {name: {k: v.cpu() for k, v in params[name].items()} for name in query.targets if name in params}

    @torch.no_grad()
    def bits_per_dim(self, x: Mapping[str, Tensor], times: int, generator: torch.Generator) -> Tensor | None:
        """The bound of all modalities together; None of a model that is asked one query alone."""
        if self.asked is not None:
            return None
        device = self.model.device
        given = {name: x[name].to(device) for name in self.model.names}
        return variational_bound(self.model, given, times=times, generator=generator).bits_per_dim.cpu()


def count_flops(experiment: Experiment, data: ModalityData, device: str = "cpu") -> int:
    """Floating-point operations of one training step, forward and backward, counted on a model of its own."""
    model = build_model(experiment).to(device)
    batch = data.batch([i % len(data) for i in range(experiment.training.batch_size)]).to(torch.device(device))
    latent = model.layout.latent
    generator = torch.Generator().manual_seed(0)
    size = (latent.height, latent.width)
    visible = experiment.conditioning.draw(model.names, model.spatial, len(batch.presence), size, generator)
    visible = visible.to(device)
    with FlopCounterMode(display=False) as counter:
        draws = Draws.of(model, len(batch.presence), generator)
        terms = composite_loss(model, batch.x, experiment.loss, visible=visible, presence=batch.presence, draws=draws)
        terms.total.mean().backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops()


def train(problem: Problem, experiment: Experiment, asked: Query | None = None) -> Diffusion:
    """Train with the framework's trainer, or go on where it was interrupted; a finished folder is only loaded."""
    folder = problem.folder
    curve_file = folder.with_name(folder.name + ".curve.json")
    resume = (folder / "config.toml").is_file()
    if resume:
        require_same(experiment, folder, problem.registry)  # a run may be resumed with changes, a measurement not
    trainer = Trainer(
        experiment,
        folder,
        problem.registry,
        resume=resume,
        evaluated=False,  # here evaluators judge by all of a setting's modalities, not by the task's alone
        device=problem.device,
        on_message=problem.say,
    )
    # The curve's points past the checkpoint are of steps that are done again.
    told = read_json(curve_file)["points"] if resume and curve_file.is_file() else []
    curve = Curve([point for point in told if point["step"] <= trainer.step])
    before = curve.points[-1]["seconds"] if curve.points else 0.0
    what, steps = f"{folder.name}: training", experiment.training.steps
    pace = Pace(what, steps, problem.say, before=trainer.step, every=SELDOM)

    def note(progress: Progress) -> None:
        pace.tell(progress.step)
        curve.add(progress.step, seconds=before + progress.seconds, **progress.means)
        write_json(curve_file, {"points": curve.points})

    if trainer.step < experiment.training.steps:
        trainer.train(note)
    cost = Cost(
        steps=experiment.training.steps,
        batch_size=experiment.training.batch_size,
        parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        train_seconds=curve.points[-1]["seconds"],
        flops_per_step=count_flops(experiment, trainer.data, problem.device),
    )
    run = load_run(folder, device=problem.device, registry=problem.registry)
    return Diffusion(run.model, experiment, cost, curve.points, asked)


def without_observations(experiment: Experiment) -> Experiment:
    """The same experiment with nothing ever observed in training: a model of the joint distribution alone."""
    return evolve(experiment, conditioning=evolve(experiment.conditioning, observed=0.0, partial=0.0, subsets={}))


@frozen
class JointConfig(MethodConfig):
    """One model over the task's modalities, for all its queries.

    Variants of it are methods of this kind whose setting differs by ``set`` in a benchmark's file.
    """

    kind: ClassVar[str] = "joint"
    role: ClassVar[Literal["joint", "control", "baseline"]] = "joint"

    def fit(self, problem: Problem) -> Fitted:
        return train(problem, problem.experiment)


@frozen
class SingleConfig(MethodConfig):
    """The same framework and backbone, trained for one query alone, at the same budget.

    With nothing observed it is a plain diffusion model of its targets; with a label observed, a class-conditional one;
    with an image observed and a mask as target, a segmentation net that denoises. All that is not observed has one
    clock, whatever the joint model's law of clocks is.

    Attributes:
        targets: what it generates; the other modalities of the task are not modelled.
        observed: what it is always given.
        partial: whether its one target is always given in part (masked-image training alone).
    """

    kind: ClassVar[str] = "single"
    role: ClassVar[Literal["joint", "control", "baseline"]] = "control"
    targets: tuple[str, ...] = field(validator=min_len(1))
    observed: tuple[str, ...] = ()
    partial: bool = False

    def fit(self, problem: Problem) -> Fitted:
        experiment = problem.experiment
        names = [name for name in experiment.modalities if name in (*self.observed, *self.targets)]
        if missing := sorted({*self.observed, *self.targets} - set(names)):
            raise UserError(f"method single: the task has no modality named {', '.join(missing)}")
        conditioning = evolve(
            experiment.conditioning,
            observed=1.0 if self.observed else 0.0,
            subsets={"+".join(self.observed): 1.0} if self.observed else {},
            partial=1.0 if self.partial else 0.0,
        )
        alone = evolve(
            experiment,
            modalities={name: experiment.modalities[name] for name in names},
            clocks=None,
            conditioning=conditioning,
            loss=evolve(experiment.loss, readout=said_of(experiment.loss.readout, names)),
            sampling=evolve(experiment.sampling, path=None),
        )
        asked = Query(self.observed, self.targets, 0.5 if self.partial else 0.0)
        return train(problem, alone, asked)


@frozen
class ReplacementConfig(MethodConfig):
    """A model trained on the joint distribution alone, conditioned afterwards by replacing what is known at every step:
    what one does with an unconditional diffusion model (inpainting by replacement)."""

    kind: ClassVar[str] = "replacement"

    def fit(self, problem: Problem) -> Fitted:
        unconditional = without_observations(problem.experiment)
        sampling = evolve(unconditional.sampling, conditioning="replacement")
        return train(problem, evolve(unconditional, sampling=sampling))


@hookimpl
def mtdiffusion_methods() -> list[type]:
    return [JointConfig, SingleConfig, ReplacementConfig]
