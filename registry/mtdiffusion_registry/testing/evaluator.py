"""The contract of evaluators."""

from __future__ import annotations

import math
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
        """Fitted to the first half of the data, or as much of it as it wants.

        Raises:
            Unavailable: if it says that it cannot be, for want of a modality or of weights.
        """
        limit = self.config.train_limit()
        train = {name: x[: len(x) // 2] for name, x in self.data.items()}
        try:
            return self.config.build({name: x[:limit] for name, x in train.items()})
        except UserError as error:
            raise Unavailable(f"it cannot be built here: {error}") from error

    @property
    def held_out(self) -> dict[str, Tensor]:
        return {name: x[len(x) // 2 :] for name, x in self.data.items()}


def _metrics(found: object, contract: str) -> dict[str, float]:
    """What was found, if it is floats by name, each a number or NaN where it is undefined."""
    require(
        isinstance(found, dict)
        and all(isinstance(name, str) and isinstance(value, float) for name, value in found.items()),
        f"{contract} are a dict of floats by name",
        repr(found),
        "convert tensors with .item()",
    )
    assert isinstance(found, dict)
    endless = {name: value for name, value in found.items() if math.isinf(value)}
    require(not endless, f"{contract} are finite, or NaN where undefined", repr(endless), "give math.nan instead")
    return found


@check("entry_point")
def requirements(subject: EvaluatorSubject) -> None:
    """needs gives names, train_limit a number of samples or None, preparation a text."""
    needs, limit, told = subject.config.needs(), subject.config.train_limit(), subject.config.preparation()
    fix = 'return names such as ("image", "label"), a single one as ("image",)'
    named = isinstance(needs, tuple) and all(isinstance(name, str) for name in needs)
    require(named, "needs returns a tuple of names of modalities", repr(needs), fix)
    natural = limit is None or (isinstance(limit, int) and limit >= 0)
    require(natural, "train_limit returns a number of samples, or None for all", repr(limit), "return None or an int")
    require(isinstance(told, str), "preparation returns a text", repr(told), 'return "" if there is nothing to tell')


@check("entry_point")
def build(subject: EvaluatorSubject) -> None:
    """build gives an Evaluator, fitted to tensors by modality name."""
    evaluator = subject.evaluator
    fix = "subclass mtdiffusion_registry.Evaluator"
    require(isinstance(evaluator, Evaluator), "build returns an Evaluator", kind_of(evaluator), fix)


@check("build")
def conditional(subject: EvaluatorSubject) -> None:
    """conditional gives floats by name, finite or NaN where undefined, for every target."""
    x = subject.held_out
    for target in x:
        generated = {**x, target: x[target].roll(1, 0)}
        _metrics(subject.evaluator.conditional(target, generated, x), f"metrics of {target!r} given the rest")


@check("build")
def joint(subject: EvaluatorSubject) -> None:
    """joint gives floats by name, finite or NaN where undefined."""
    _metrics(subject.evaluator.joint(subject.held_out), "metrics of joint samples")


@check("build")
def real(subject: EvaluatorSubject) -> None:
    """real gives floats by name, finite or NaN where undefined."""
    _metrics(subject.evaluator.real(subject.held_out), "metrics of held-out data")


@check("conditional", "joint", "real")
def names(subject: EvaluatorSubject) -> None:
    """A single sample is judged under the same names as many: what is undefined of it is NaN."""
    x, evaluator = subject.held_out, subject.evaluator
    one = {name: values[:1] for name, values in x.items()}
    asked = {f"of {target!r}": [evaluator.conditional(target, given, given) for given in (x, one)] for target in x}
    asked["of joint samples"] = [evaluator.joint(x), evaluator.joint(one)]
    asked["of held-out data"] = [evaluator.real(x), evaluator.real(one)]
    for what, (many, single) in asked.items():
        found = _metrics(single, f"metrics {what}, one sample,").keys() ^ many.keys()
        contract = f"metrics {what} have the same names for one sample as for many"
        require(not found, contract, f"only one of them has {sorted(found)}", "give math.nan where undefined")


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
    same = repr(first) == repr(second)  # NaN is the same as NaN here
    require(same, "the same samples are judged the same every time", f"{first} and {second}", fix)


CHECKS: tuple[Check, ...] = (
    *of_config.CHECKS,
    requirements,
    build,
    conditional,
    joint,
    real,
    names,
    directions,
    determinism,
)
