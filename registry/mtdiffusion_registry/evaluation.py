"""Evaluators: judges of whole samples, where a metric of one modality against its own truth is not enough."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ARROWS: Mapping[str, str] = MappingProxyType({"higher": "↑", "lower": "↓"})
"""How a direction of ``metric_directions`` is written beside its metric."""


class Evaluator(ABC):
    """Judges samples given as a dict of tensors by modality name, each ``[B, ...]``.

    Each method returns metrics by name, the same names whatever the samples. A metric that it means to give but that is
    undefined for these samples (a distance of a single sample, a mean over no class) is NaN; one that is absent is
    never given. Whoever asks leaves NaN out of the results, says so, and takes a mean over draws over those where it is
    defined.

    Attributes:
        metric_directions: "higher" or "lower", whichever is better, by metric, what tells most first. A metric
            without one is reported but never ranked.
    """

    metric_directions: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def conditional(
        self, target: str, generated: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Of a generated target, against the held-out samples whose other modalities it was conditioned on."""

    @abstractmethod
    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        """Of samples generated with nothing observed; {} where what it judges is not among them."""

    @abstractmethod
    def real(self, test: Mapping[str, Tensor]) -> dict[str, float]:
        """Of held-out data: what a perfect model would score, and how good the judge itself is."""
