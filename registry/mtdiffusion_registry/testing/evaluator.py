"""The contract of evaluators."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion_registry.configs import EvaluatorConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.evaluation import Evaluator
from mtdiffusion_registry.testing import config as of_config
from mtdiffusion_registry.testing.contract import (
    Check,
    Subject,
    Unavailable,
    check,
    finite_metrics,
    kind_of,
    require,
    require_directions,
)

__tracebackhide__ = True


def example_data(n: int = 64, classes: int = 4, size: int = 8) -> dict[str, Tensor]:
    """Modalities that depend on one another, by the names of the field conventions: a bright quarter of a noisy
    ``image [n, 1, size, size]``, its ``mask``, which it is (``label``), and an ``embedding [n, 16]``."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(n) % classes
    half = size // 2
    mask = torch.zeros(n, size, size, dtype=torch.int64)
    for i, k in enumerate(label.tolist()):
        mask[i, half * (k // 2 % 2) :, half * (k % 2) :][:half, :half] = 1
    noise = torch.randn(n, 1, size, size, generator=generator)
    return {
        "image": (mask[:, None] - 0.5 + 0.2 * noise).clamp(-1, 1),
        "mask": mask,
        "label": label,
        "embedding": F.normalize(torch.randn(classes, 16, generator=generator), dim=1)[label],
    }


@frozen(eq=False, slots=False)
class EvaluatorSubject(Subject):
    """An evaluator's config and the data it is to judge."""

    config: EvaluatorConfig
    data: Mapping[str, Tensor]

    @cached_property
    def evaluator(self) -> Evaluator:
        """Fitted to the first half of the data.

        Raises:
            Unavailable: if it says that it cannot be, for want of a modality or of weights.
        """
        try:
            return self.config.build({name: x[: len(x) // 2] for name, x in self.data.items()})
        except UserError as error:
            raise Unavailable(f"it cannot be built here: {error}") from error

    @property
    def held_out(self) -> dict[str, Tensor]:
        return {name: x[len(x) // 2 :] for name, x in self.data.items()}


@check("entry_point")
def build(subject: EvaluatorSubject) -> None:
    """build gives an Evaluator, fitted to tensors by modality name."""
    evaluator = subject.evaluator
    fix = "subclass mtdiffusion_registry.Evaluator"
    require(isinstance(evaluator, Evaluator), "build returns an Evaluator", kind_of(evaluator), fix)


@check("build")
def conditional(subject: EvaluatorSubject) -> None:
    """conditional gives finite floats by name, for every target."""
    x = subject.held_out
    for target in x:
        generated = {**x, target: x[target].roll(1, 0)}
        found = subject.evaluator.conditional(target, generated, x)
        finite_metrics(found, f"metrics of {target!r} given the rest", "leave out what is not defined")


@check("build")
def joint(subject: EvaluatorSubject) -> None:
    """joint gives finite floats by name."""
    finite_metrics(subject.evaluator.joint(subject.held_out), "metrics of joint samples", "leave out what is undefined")


@check("build")
def real(subject: EvaluatorSubject) -> None:
    """real gives finite floats by name."""
    finite_metrics(subject.evaluator.real(subject.held_out), "metrics of held-out data", "leave out what is undefined")


@check("build")
def directions(subject: EvaluatorSubject) -> None:
    """metric_directions says "higher" or "lower" by name."""
    require_directions(subject.evaluator.metric_directions)


@check("conditional", "joint", "real")
def determinism(subject: EvaluatorSubject) -> None:
    """The same samples are judged the same every time."""
    x, evaluator = subject.held_out, subject.evaluator
    torch.manual_seed(1)
    first = evaluator.joint(x), evaluator.real(x)
    torch.manual_seed(2)  # what is drawn from the global generator would now differ
    second = evaluator.joint(x), evaluator.real(x)
    fix = "draw from a generator of a fixed seed"
    require(first == second, "the same samples are judged the same every time", f"{first} and {second}", fix)


CHECKS: tuple[Check, ...] = (*of_config.CHECKS, build, conditional, joint, real, directions, determinism)
