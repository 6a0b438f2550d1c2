"""What the benchmark asks of a method: fit a problem, then answer queries.

A method is a plugin: a config class (:class:`mtdiffusion_registry.MethodConfig`) whose ``fit`` takes a
:class:`Problem` and returns a :class:`Fitted`. Nothing here knows a modality by name or kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from attrs import field, frozen
from torch import Tensor

from mtdiffusion import Modality
from mtdiffusion_engine.data import ModalityData
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_engine.trainer import Diverged
from mtdiffusion_registry import Query, Registry

__all__ = ["Cost", "Curve", "Diverged", "Fitted", "Problem"]


@frozen(eq=False)
class Problem:
    """What one cell of the matrix is about.

    Attributes:
        experiment: data, modalities, backbone and budget (``experiment.training``: steps, batch size, learning rate,
            seed), with the modalities of the task alone.
        modalities: the task's modalities by instance name, as the joint model has them; not to be trained in place.
        queries: what will be asked.
        train: the training split through those modalities.
        folder: where the method may keep checkpoints; what it finds there is its own, from an interrupted run.
        registry: what is installed.
        device: "cpu", "cuda", "cuda:1" or "mps".
        say: tells the user what goes on.
    """

    experiment: Experiment
    modalities: dict[str, Modality]
    queries: tuple[Query, ...]
    train: ModalityData
    folder: Path
    registry: Registry
    device: str
    say: Callable[[str], None]


@frozen
class Cost:
    """What training cost.

    Attributes:
        steps: optimizer steps.
        batch_size: samples a step.
        parameters: trained numbers.
        train_seconds: wall-clock, summed over interruptions.
        flops_per_step: floating-point operations of a step, forward and backward, as
            :class:`torch.utils.flop_counter.FlopCounterMode` counts them.
    """

    steps: int
    batch_size: int
    parameters: int
    train_seconds: float
    flops_per_step: int


class Fitted(ABC):
    """A trained method.

    Attributes:
        cost: what training cost.
        curve: the loss on the way: a list of ``{"step": ..., "loss": ..., term: ...}``.
    """

    cost: Cost
    curve: list[dict[str, float]]

    @abstractmethod
    def answers(self, query: Query) -> bool:
        """Whether it can be asked this."""

    @abstractmethod
    def generate(
        self, query: Query, x: Mapping[str, Tensor], visible: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Answer a query for a batch.

        Args:
            x: held-out samples by modality name, each ``[B, ...]``; only what the query gives may be looked at.
            visible: ``[B, H, W]`` of 1 (seen) and 0 (hidden), at the latent's resolution, for a target given in part.

        Returns:
            What was generated, by name, each ``[B, ...]`` on the CPU, as the modality's ``check`` demands; of a target
            given in part, the whole, with what was seen as it was given.
        """

    def predict(self, query: Query, x: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """Parameters of p(target | given) by modality name, from one evaluation of the network; {} if it has none."""
        return {}

    def bits_per_dim(self, x: Mapping[str, Tensor], times: int, generator: torch.Generator) -> Tensor | None:
        """The variational bound on −log p(x) of held-out samples in bits per dimension, ``[B]``; None if it has none.

        Args:
            x: by modality name, each ``[B, ...]``.
            times: how many of its terms in t are computed, spread evenly and scaled up.
        """
        return None


@frozen
class Curve:
    """Collects a learning curve; pass :meth:`add` what a step reports."""

    points: list[dict[str, float]] = field(factory=list)

    def add(self, step: int, **values: float) -> None:
        self.points.append({"step": step, **{name: round(value, 6) for name, value in values.items()}})
