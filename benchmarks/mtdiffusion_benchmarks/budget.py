"""Budgets: for how many steps a method is trained, so that it costs what the task's joint model costs.

The same optimizer steps are one fair comparison. A control whose step is cheaper than the joint model's then gets less
computing, so there are two more: the same floating-point operations, and the same seconds.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from attrs import evolve, frozen

from mtdiffusion_benchmarks.interfaces import Cost, Problem
from mtdiffusion_benchmarks.profile import Budget, Cell, Profile
from mtdiffusion_registry import MethodConfig, UserError

PROBE_START = 2
"""Optimizer steps of a training that only starts: what that takes is taken off."""
PROBE_STEPS = 8
"""Optimizer steps beyond it that are timed."""
PROBE_ROUNDS = 3
"""How often each of the two is timed, in turn; one more round before warms up and does not count."""


@frozen
class Match:
    """How a method's steps were chosen.

    Attributes:
        budget: what was made equal: "flops" or "seconds".
        joint: the method that it was matched to.
        joint_steps: optimizer steps of that one.
        joint_per_step, per_step: what a step of each costs, in floating-point operations or in seconds.
        steps: the choice: ``joint_steps · joint_per_step / per_step``, rounded, at least one.
    """

    budget: Budget
    joint: str
    joint_steps: int
    joint_per_step: float
    per_step: float
    steps: int


def joint_of(profile: Profile, cell: Cell) -> Cell:
    """The cell of the joint model that a cell's budget is matched to: of the first method of role "joint" that the
    profile runs on the same setting and task, at its own steps.

    Raises:
        UserError: if there is none.
    """
    for name, entry in profile.methods.items():
        planned = any(
            cell.setting in block.settings and cell.task in block.tasks and name in block.methods
            for block in profile.run
        )
        if planned and entry.method.role == "joint" and profile.method(name).budget == "steps":
            return evolve(cell, method=name)
    raise UserError(
        f"{cell.id}: budget: {profile.method(cell.method).budget} is that of a joint model of the same setting and "
        'task, and the profile runs none there; add a method of role joint with budget "steps"'
    )


def match(
    budget: Budget,
    method: MethodConfig,
    problem: Problem,
    joint: MethodConfig,
    joint_problem: Problem,
    name: str,
    folder: Path,
) -> Match:
    """Choose a method's steps, from short trainings of both by their own ``fit``: what any method gives is enough.

    Operations are those of one step as each method counts them (``Cost.flops_per_step``), the same every time. Seconds
    are what more steps take beyond a training that only starts, so that starting (workers that load data, compilation)
    is none of a step's, and the median over some rounds in which the two take turns, so that whatever else the machine
    does meets both.

    Args:
        name: what the profile calls the joint model.
        folder: an empty folder for the trainings.

    Raises:
        UserError: if one of them tells no cost of a step.
    """
    sides = {"joint": (joint, joint_problem), "own": (method, problem)}
    costs: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(1 if budget == "flops" else 1 + PROBE_ROUNDS):
        for side, (trained, asked) in sides.items():
            start = _probe(trained, asked, folder / f"{side}-{number}-start", 1 if budget == "flops" else PROBE_START)
            if budget == "flops":
                costs[side].append(start.flops_per_step)
                continue
            more = _probe(trained, asked, folder / f"{side}-{number}", PROBE_START + PROBE_STEPS)
            costs[side].append((more.train_seconds - start.train_seconds) / PROBE_STEPS)
    per_step = {
        side: values[0] if budget == "flops" else statistics.median(values[1:]) for side, values in costs.items()
    }
    for side, (trained, _) in sides.items():
        if not per_step[side] > 0:
            raise UserError(f"method {trained.kind}: budget: it tells no {budget} of a step, so none can be matched")
    joint_steps = joint_problem.experiment.training.steps
    chosen = max(1, round(joint_steps * per_step["joint"] / per_step["own"]))
    return Match(budget, name, joint_steps, per_step["joint"], per_step["own"], chosen)


def with_steps(problem: Problem, steps: int) -> Problem:
    """The same problem at another number of steps; the learning rate's schedule follows, being a function of it."""
    experiment = problem.experiment
    return evolve(problem, experiment=evolve(experiment, training=evolve(experiment.training, steps=steps)))


def _probe(method: MethodConfig, problem: Problem, folder: Path, steps: int) -> Cost:
    """The cost of a short training, which leaves nothing behind but its folder."""
    short = with_steps(problem, steps)
    training = evolve(short.experiment.training, checkpoint_every=0, sample_every=0, log_every=steps)
    experiment = evolve(short.experiment, training=training)
    cost: Cost = method.fit(evolve(short, experiment=experiment, folder=folder, say=lambda _: None)).cost
    return cost
