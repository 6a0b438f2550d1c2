"""Distances to the training split in the features of Inception-v3, the network of published FIDs.

It needs torch-fidelity (the ``inception`` extra) and its weights. Without them it says how to get them; it never
measures with a random network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import ge, in_
from torch import Tensor

from mtdiffusion_plugins.metrics.classifiers import digest
from mtdiffusion_plugins.metrics.distances import TrainingFeatures
from mtdiffusion_registry.cache import cached, config_key, load_kept, save_kept
from mtdiffusion_registry.configs import EvaluatorConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.evaluation import Evaluator
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.pace import Pace

MTDIFFUSION_API = 1


def load_inception(weights: str | None) -> Any:
    """torch-fidelity's port of the TensorFlow network, which gives pooled features ``[B, 2048]``.

    Args:
        weights: a file of its weights; None: from torch's cache, or downloaded.

    Raises:
        UserError: if the package is missing, or the weights cannot be had or are another network's.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as inception
    except ImportError as error:
        raise UserError(
            f"features.extractor: 'inception' needs torch-fidelity ({error}): pip install 'mtdiffusion[inception]'"
        ) from error
    try:
        return inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights).eval()
    except FileNotFoundError:
        raise UserError(f"{weights}: no such file; expected {inception.URL_INCEPTION_V3}") from None
    except Exception as error:  # a failing download, and the many ways to refuse a file
        if weights is None:
            raise UserError(
                f"features.weights: Inception's weights cannot be downloaded ({error}). Get "
                f"{inception.URL_INCEPTION_V3} on a machine with a network and set weights to the file's path."
            ) from error
        raise UserError(
            f"{weights}: not the weights of {inception.URL_INCEPTION_V3} ({type(error).__name__}: {error})"
        ) from error


class FeatureDistances(Evaluator):
    """:meth:`TrainingFeatures.metrics` of a modality in an extractor's features."""

    def __init__(self, config: FeaturesConfig, train: Tensor) -> None:
        self.input = config.input
        self.extractor = load_inception(config.weights)
        self.reference = TrainingFeatures(self._kept_features(config, train), config.extractor, config.neighbours)
        self.metric_directions = self.reference.directions

    def _kept_features(self, config: FeaturesConfig, train: Tensor) -> Tensor:
        """Of the training pictures: computed, or as they were kept for the same pictures and weights."""
        key = hashlib.sha256(f"{config_key(config)} {digest(train)}".encode()).hexdigest()[:32]
        path = cached(f"features/{key}.safetensors")
        if (kept := load_kept(path)) is not None:
            return kept["features"]
        features = self._features(train)
        save_kept(path, {"features": features})
        return features

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        """Of pictures ``[B, C, h, w]`` in [−1, 1]; the extractor takes bytes, and enlarges them itself."""
        features, pace = [], Pace(f"inception's features of {self.input}", len(x))
        for start in range(0, len(x), 32):
            pictures = ((x[start : start + 32].cpu() + 1) * 127.5).round().clamp(0, 255).byte()
            features.append(self.extractor(pictures.expand(-1, 3, -1, -1))[0])
            pace.tell(start + len(pictures))
        return torch.cat(features)

    def conditional(
        self, target: str, generated: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> dict[str, float]:
        return self.reference.metrics(self._features(generated[target])) if target == self.input else {}

    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        if self.input not in generated:
            return {}
        return self.reference.metrics(self._features(generated[self.input]))

    def real(self, test: Mapping[str, Tensor]) -> dict[str, float]:
        return self.reference.metrics(self._features(test[self.input]))


@frozen
class FeaturesConfig(EvaluatorConfig):
    """Distances of one modality, pictures, in the features of a named network.

    Attributes:
        input: the modality.
        extractor: the network. For the features of a classifier of one's own data there is the ``judge``.
        weights: a file of its weights; None: torch's cache, or a download.
        neighbours: k of precision and recall.
        train_samples: training samples that distances are taken to, at most: a random draw of as many.
    """

    kind: ClassVar[str] = "features"
    input: str = "image"
    extractor: Literal["inception"] = field(default="inception", validator=in_(("inception",)))
    weights: str | None = None
    neighbours: int = field(default=3, validator=ge(1))
    train_samples: int = field(default=10_000, validator=ge(1))

    def needs(self) -> tuple[str, ...]:
        return (self.input,)

    def train_limit(self) -> int:
        return self.train_samples

    def preparation(self) -> str:
        return f"{self.extractor}'s features of {self.input}"

    def build(self, train: Mapping[str, Tensor]) -> Evaluator:
        if self.input not in train or train[self.input].ndim != 4:
            pictures = ", ".join(name for name, x in train.items() if x.ndim == 4)
            raise UserError(
                f"evaluators.features: {self.input!r} is no modality of pictures; there are {pictures or 'none'}"
            )
        return FeatureDistances(self, train[self.input])


@hookimpl
def mtdiffusion_evaluators() -> list[type]:
    return [FeaturesConfig]
