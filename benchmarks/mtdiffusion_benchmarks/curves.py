"""``mtdiffusion bench curves``: the held-out loss along training, ours beside diffusers' example, by images and by
seconds.

Networks are those of ``bench perf`` (:mod:`mtdiffusion_benchmarks.peers`): pictures of 32 × 32 alone, equally many
parameters. All are trained on the same batches of the same pictures in the same order.

There is one process for all: betas linear from 1e-4 to 0.02 over 1,000 times, which diffusers' example has and which is
``process = {steps = 1000, curve = "linear"}`` of ours (m_t = √ᾱ_t; a test holds the two tables to one another). So z_t
is the same, and a prediction of either network can be judged as that of the other. diffusers' network states ε̂; ours
states E[x | z_t], of which ε̂ = (z_t − m_t E[x | z_t]) / σ_t, or ε̂ itself where it has a head for it.

Judged is ε̂ of the weights as they are, not of their average, in float32, on held-out pictures, each at one fixed time
with one fixed noise; times are spread evenly over 1..1000. Of the squared errors ‖ε − ε̂‖² a number there are three
means:

- ``epsilon``: over times alike. It is the loss that diffusers' example trains.
- ``image``: weighted by ½ clamp(SNR_t, 0.05, 5) / SNR_t, that is the error of the picture times the clamp. It is the
  loss that ours trains by default.
- ``geometric``: the geometric mean. Weights by time change it by a factor that is the same for all, so that it favours
  neither way to state a prediction.

A network that states ε̂ is at home in the first, one that states the picture in the second. So that network stands
beside network, ours is trained by the very loss of diffusers' example, too: with an ε head and ``loss = {l1 = 2,
l1_clamp = [0, inf], l2 = 0}``, with its AdamW and, but for our own optimizers, its betas and decay.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import asdict, define, evolve, field, frozen
from torch import Tensor, nn

from mtdiffusion.loss import snr_weight
from mtdiffusion.process import DiffusionProcess
from mtdiffusion_benchmarks import peers
from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_benchmarks.timing import Setting, count_parameters, ours
from mtdiffusion_engine.adamw import AdamW
from mtdiffusion_engine.environment import native_bfloat16
from mtdiffusion_engine.experiment import structure_experiment
from mtdiffusion_engine.tally import Tally
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Registry, UserError

TIMES = 1000
PICTURES = 2000
"""That are trained on."""
HELD_OUT = 256
LOOKS = 8
"""At the held-out loss, spread evenly over the training."""
TURN = 5
"""Steps at a time: trainings take turns, so that a machine whose speed drifts leaves their ratios alone."""
CLAMP = (0.05, 5.0)
"""Of SNR_t in the loss that ours trains by default (``image.snr_clamp``)."""
MEASURES = {"epsilon": "error of ε", "image": "error of the picture", "geometric": "geometric mean"}


@frozen
class Recipe:
    """How a network is trained.

    Attributes:
        rate: peak of the learning rate.
        against: the training that it is compared with; "" of diffusers' own.
        precision: of training, "float32" or "bfloat16".
        epsilon: whether ours trains ε by diffusers' loss, not the picture by its own.
        own: the optimizer of ours by ``training.optimizer``, by our defaults; "": AdamW as diffusers' example has it.
    """

    rate: float
    against: str = ""
    precision: Literal["float32", "bfloat16"] = "float32"
    epsilon: bool = True
    own: Literal["", "adamw", "muon"] = ""

    @property
    def theirs(self) -> bool:
        """Whether it is diffusers' network, and its loop."""
        return not self.against


RATE, OUR_RATE = 1e-4, 2e-3
"""The learning rate of diffusers' example, and our default."""
_SLOW, _FAST = "diffusers' example", "diffusers, learning rate 2e-3"
RECIPES: Mapping[str, Recipe] = {
    _SLOW: Recipe(RATE),
    "ours in bfloat16, ε, learning rate 1e-4": Recipe(RATE, _SLOW, "bfloat16"),
    _FAST: Recipe(OUR_RATE),
    "ours, ε": Recipe(OUR_RATE, _FAST),
    "ours in bfloat16, ε": Recipe(OUR_RATE, _FAST, "bfloat16"),
    "ours in bfloat16, ε, Muon": Recipe(OUR_RATE, _FAST, "bfloat16", own="muon"),
    "ours in bfloat16, as by default": Recipe(OUR_RATE, _FAST, "bfloat16", epsilon=False, own="adamw"),
}
"""What is trained, by title. All have one warm-up, after which the learning rate stays."""


@define(eq=False)
class Training:
    """One that is under way.

    Attributes:
        step: an optimizer step on the next batch.
        predict: ε̂ ``[B, 3, 32, 32]`` from z_t and t ``[B]`` in 1..1000.
        network: that is trained.
        seconds: of training so far; looks at the held-out loss are not counted.
        looks: images and seconds so far with all measures, and ε's error by quarters of the times.
    """

    step: Callable[[], object]
    predict: Callable[[Tensor, Tensor], Tensor]
    network: nn.Module
    seconds: float = 0.0
    looks: list[dict[str, Any]] = field(factory=list)

    def advance(self, steps: int) -> None:
        """As many steps, timed."""
        started = time.perf_counter()
        self.network.train()
        for _ in range(steps):
            self.step()
        self.seconds += time.perf_counter() - started


@frozen(eq=False)
class HeldOut:
    """Held-out pictures, each at one time with one noise.

    Attributes:
        z: z_t ``[B, 3, 32, 32]``.
        t: in 1..1000, ``[B]``, rising.
        noise: ε ``[B, 3, 32, 32]``.
        weight: of ε's squared error in the measure ``image``, ``[B]``.
    """

    z: Tensor
    t: Tensor
    noise: Tensor
    weight: Tensor

    @classmethod
    def of(cls, pictures: Tensor, process: DiffusionProcess) -> HeldOut:
        """Of pictures ``[B, 3, 32, 32]`` in [−1, 1]."""
        count = len(pictures)
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
        t = 1 + ((torch.arange(count) + 0.5) * process.steps / count).long()
        snr = process.snr(t[:, None])[:, 0]
        weight = 0.5 * snr_weight(snr, CLAMP) / snr
        return cls(process.corrupt({"image": pictures}, t[:, None], noise), t, noise, weight.float())

    @torch.no_grad()
    def measure(self, training: Training) -> dict[str, Any]:
        """All measures of a network as it is, and ε's error by quarters of the times, from the least noise on."""
        training.network.eval()
        parts = zip(torch.split(self.z, 64), torch.split(self.t, 64), strict=True)
        predicted = torch.cat([training.predict(z, t) for z, t in parts])
        error = (self.noise - predicted).square().flatten(1).mean(1)
        return {
            "epsilon": error.mean().item(),
            "image": (self.weight * error).mean().item(),
            "geometric": error.log().mean().exp().item(),
            "quarters": [part.mean().item() for part in error.chunk(4)],
        }


def our_training(
    recipe: Recipe, folder: Path, registry: Registry, setting: Setting, steps: int, held_out: int = HELD_OUT
) -> Trainer:
    """The peers' configuration under diffusers' process, trained by a recipe.

    Of diffusers' network it is what gives the pictures, and their order.
    """
    tables = peers.our_tables(setting)
    tables["data"] |= {"count": PICTURES, "test_count": held_out}
    tables["process"] = {"steps": TIMES, "curve": "linear"}
    tables["training"] |= {
        "steps": peers.LONG,  # so that the learning rate stays, as it does in the first steps of diffusers' example
        "warmup": warmup_of(steps),
        "learning_rate": recipe.rate,
        "optimizer": recipe.own or "adamw",
    }
    if recipe.epsilon:
        tables["model"] = {"parameterisation": "epsilon_head"}
        tables["loss"] = {"l1": 2.0, "l1_clamp": [0.0, math.inf], "l2": 0.0}  # 2 · ½ of the squared error a number
    experiment = structure_experiment(tables, registry, "curves")
    trainer = ours(experiment, folder, registry, evolve(setting, precision=recipe.precision))
    if not recipe.own:
        trainer.optimizer = AdamW(trainer.model.parameters(), lr=recipe.rate, fused=True, **peers.ADAMW)
    return trainer


def warmup_of(steps: int) -> int:
    """Steps of the warm-up: a fifth. diffusers' example has 500, of 100,000 steps."""
    return max(steps // 5, 1)


def _of_ours(trainer: Trainer, steps: int) -> Training:
    model, batches, tally = trainer.model, trainer.batches(steps), Tally(trainer.accelerator)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        clocks = t[:, None]
        return model.complete(model(z, clocks), z, clocks).epsilon

    return Training(lambda: trainer.advance(batches, tally), predict, model)


def _of_diffusers(recipe: Recipe, trainer: Trainer, setting: Setting, steps: int) -> Training:
    """On the batches of a training of ours, which lie in memory."""
    from diffusers import DDPMScheduler

    torch.manual_seed(trainer.config.seed)
    network = peers.diffusers_network(large=False)
    learn = peers.diffusers_training(
        network,
        DDPMScheduler(num_train_timesteps=TIMES),
        trainer.accelerator,
        evolve(setting, precision=recipe.precision),
        rate=recipe.rate,
        warmup=warmup_of(steps),
        generator=torch.Generator().manual_seed(trainer.config.seed),
    )
    every = trainer.data.batch(range(len(trainer.data))).x["image"]
    turns = iter(trainer.sampler(0, steps))
    return Training(
        lambda: learn(every[next(turns).indices]),
        lambda z, t: network(z, t - 1).sample,  # its times begin at 0, with the first noise
        network,
    )


def left_out(recipe: Recipe) -> str:
    """Why it cannot be trained here; "" if it can."""
    if recipe.precision == "bfloat16" and not native_bfloat16(torch.device("cpu")):
        return "this processor does not multiply bfloat16"
    return ""


def measure(
    steps: int,
    batch: int,
    threads: int,
    registry: Registry,
    say: Callable[[str], None],
    recipes: Mapping[str, Recipe] = RECIPES,
    held_out: int = HELD_OUT,
) -> dict[str, Any]:
    """Train all of them, in turn, and look at the held-out loss on the way, as JSON.

    Args:
        steps: of each training; a multiple of :data:`LOOKS`.
        batch: pictures a step.
        recipes: what is trained; each after the one that it is compared with.
        held_out: pictures that the loss is of.

    Raises:
        UserError: if diffusers is not installed, ``steps`` is no such multiple, or the networks are not equally large.
    """
    if find_spec("diffusers") is None:
        raise UserError("bench curves: diffusers is not installed; run: pip install diffusers")
    if steps < 1 or steps % LOOKS:
        raise UserError(f"--steps {steps}: expected a multiple of {LOOKS}, as the loss is looked at {LOOKS} times")
    torch.set_num_threads(threads)
    setting, trainings = Setting(batch=batch), {}
    with tempfile.TemporaryDirectory() as name:
        for number, (title, recipe) in enumerate(recipes.items()):
            if why := left_out(recipe):
                say(f"{title}: left out, since {why}")
                continue
            say(f"{title}: being made")
            trainer = our_training(recipe, Path(name) / str(number), registry, setting, steps, held_out)
            trainings[title] = (
                _of_diffusers(recipe, trainer, setting, steps) if recipe.theirs else _of_ours(trainer, steps)
            )
        sizes = {title: count_parameters(each.network) for title, each in trainings.items()}
        if max(sizes.values()) > (1 + peers.EQUAL) * min(sizes.values()):
            raise UserError(f"bench curves: networks of {sizes} parameters cannot be compared")
        judged = HeldOut.of(_held_out_pictures(trainer), trainer.model.process)
        for look in range(LOOKS + 1):
            if look:
                _train(list(trainings.values()), steps // LOOKS)
            for title, training in trainings.items():
                found = judged.measure(training)
                images = look * steps // LOOKS * batch
                training.looks.append({"images": images, "seconds": round(training.seconds, 2), **found})
                say(f"{title}: {images:,} images, {training.seconds:.0f} s, ε {found['epsilon']:.4f}")
    return {
        "steps": steps,
        "batch": batch,
        "warmup": warmup_of(steps),
        "pictures": PICTURES,
        "held_out": held_out,
        "recipes": {title: asdict(recipes[title]) for title in trainings},
        "parameters": sizes,
        "curves": {title: training.looks for title, training in trainings.items()},
        "hardware": hardware("cpu"),
        "version": version("mtdiffusion"),
    }


def _held_out_pictures(trainer: Trainer) -> Tensor:
    from mtdiffusion_engine.data import load_data

    data = load_data(trainer.experiment, trainer.model, "test")
    return data.batch(range(len(data))).x["image"]


def _train(trainings: Sequence[Training], steps: int) -> None:
    """As many steps of each, a turn at a time."""
    done = 0
    while done < steps:
        turn = min(TURN, steps - done)
        for training in trainings:
            training.advance(turn)
        done += turn


def at(curve: Sequence[Mapping[str, float]], measure: str, where: float, axis: str = "seconds") -> float | None:
    """A measure after so many seconds (or ``images``), in a straight line between two looks; None beyond the last."""
    for before, after in pairwise(curve):
        if before[axis] <= where <= after[axis]:
            share = (where - before[axis]) / (after[axis] - before[axis])
            return before[measure] + share * (after[measure] - before[measure])
    return None


def reached(curve: Sequence[Mapping[str, float]], measure: str, level: float) -> float | None:
    """Seconds after which a measure is at or below a level for the first time; None if it never is."""
    for before, after in pairwise(curve):
        if after[measure] <= level:
            share = (before[measure] - level) / (before[measure] - after[measure])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return None


def table(result: Mapping[str, Any]) -> str:
    """Every training by the images that it has seen: ε's error on the way, and all measures at the end."""
    curves = result["curves"]
    shown = [round(len(next(iter(curves.values()))[1:]) * share) for share in (0.25, 0.5, 1)]
    images = [f"{next(iter(curves.values()))[look]['images']:,}" for look in shown]
    heads = [f"error of ε after {images[0]} images", *images[1:], *list(MEASURES.values())[1:]]
    lines = [f"| training | images a second | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for title, curve in curves.items():
        last = curve[-1]
        cells = [curve[look]["epsilon"] for look in shown] + [last[measure] for measure in list(MEASURES)[1:]]
        lines.append(
            f"| {title} | {last['images'] / last['seconds']:.0f} | {' | '.join(f'{cell:.3g}' for cell in cells)} |"
        )
    return "\n".join(lines)


def seconds_table(result: Mapping[str, Any]) -> str:
    """Ours beside diffusers' by ε's error: after as many images, after as many seconds, and when it is as good."""
    lines = [
        "| training | beside | images a second: times as many | error of ε | of that beside it, after as many images "
        "| after as many seconds | reaches the last of it in |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, curve in result["curves"].items():
        against = result["recipes"][title]["against"]
        if not against:
            continue
        other, last = result["curves"][against], curve[-1]
        then = at(other, "epsilon", last["seconds"])
        met = reached(curve, "epsilon", other[-1]["epsilon"])
        share = "never" if met is None else f"{met / other[-1]['seconds']:.2f} of its seconds"
        lines.append(
            f"| {title} | {against} | {other[-1]['seconds'] / last['seconds']:.2f} | {last['epsilon']:.3g} "
            f"| {other[-1]['epsilon']:.3g} | {'slower' if then is None else f'{then:.3g}'} | {share} |"
        )
    return "\n".join(lines)
