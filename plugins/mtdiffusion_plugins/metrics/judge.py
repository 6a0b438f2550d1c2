"""An independent judge: a classifier of one modality by another, trained on the training split alone.

Its reading of generated pictures says whether they show what they should; its features are those in which distances to
the training split are taken (never called FID without saying whose: the metric's name is ``fid_judge``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, matches_re
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion_plugins.metrics.classifiers import kept_classifier
from mtdiffusion_plugins.metrics.distances import TrainingFeatures, frechet_distance
from mtdiffusion_registry.configs import EvaluatorConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.evaluation import Evaluator
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

REDRAWS = 20
"""Draws over which a distance with redrawn class counts is a mean."""
_BATCH = 128  # pictures whose feature maps are held at a time: 17 MB a layer of 32 channels at 32 × 32


class Judge(Evaluator):
    """Reads ``target`` off ``input``, and measures distances in the features by which it does."""

    def __init__(self, config: JudgeConfig, train: Mapping[str, Tensor]) -> None:
        self.input, self.target, self.name = config.input, config.target, config.name
        x, y = train[self.input], train[self.target]
        if x.ndim not in (3, 4) or x.is_floating_point() != (x.ndim == 4) or y.ndim != 1 or y.is_floating_point():
            raise UserError(
                "evaluators.judge: expected pictures or masks as input and class indices as target, found "
                f"{self.input!r} {list(x.shape[1:])} of {x.dtype} and {self.target!r} {list(y.shape[1:])} of {y.dtype}"
            )
        # Masks are shown as one channel a class; a class that the training split lacks is no channel.
        self.mask_classes = torch.arange(int(x.max()) + 1) if x.ndim == 3 else None
        self.classifier = kept_classifier(
            self._pictures(x), y, width=config.width, epochs=config.epochs, seed=config.seed
        )
        self.reference = TrainingFeatures(self._features(x), self.name, config.neighbours)
        self.class_shares = torch.bincount(y.cpu()).double() / len(y)
        # The plain name is the first judge's; a second one needs its own.
        self.entropy_name = "class_entropy" if self.name == "judge" else f"{self.name}_class_entropy"
        self.metric_directions = {
            f"{self.name}_accuracy": "higher",
            f"{self.name}_agreement": "higher",
            **self.reference.directions,
            f"perceptual_{self.name}": "lower",
            f"fid_{self.name}_balanced": "lower",
            f"fid_{self.name}_iid": "lower",
        }

    def _pictures(self, x: Tensor) -> Tensor:
        """``[B, channels, h, w]`` of pictures, or of masks ``[B, h, w]``."""
        if self.mask_classes is None:
            return x.cpu().float()
        return (x.cpu()[:, None] == self.mask_classes[:, None, None]).float()

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(self._pictures(part)) for part in torch.split(x, _BATCH)])

    @torch.no_grad()
    def _perceptual(self, generated: Tensor, truth: Tensor) -> float:
        """Mean over samples of Σ_layers mean_places Σ_channels (f̂ − ĝ)², f̂ and ĝ of unit norm over channels."""
        total = 0.0
        for a, b in zip(torch.split(generated, _BATCH), torch.split(truth, _BATCH), strict=True):
            pairs = zip(*(self.classifier.layers(self._pictures(x)) for x in (a, b)), strict=True)
            total += sum((_unit(f) - _unit(g)).square().sum(1).mean((1, 2)).double().sum().item() for f, g in pairs)
        return total / len(generated)

    @torch.no_grad()
    def _read(self, features: Tensor) -> Tensor:
        return self.classifier.head(features).argmax(1)

    def conditional(
        self, target: str, generated: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """``judge_accuracy``: how often the judge reads the true class off the generated; ``perceptual_judge``: the
        perceptual distance of each generated to its truth, that is LPIPS before its linear calibration (Zhang et al.
        2018, equation 1 with w = 1) in the judge's features; and the distances of :meth:`TrainingFeatures.metrics`
        (``fid_judge``, ...) to the training split."""
        if target != self.input:
            return {}
        features = self._features(generated[self.input])
        return {
            f"{self.name}_accuracy": (self._read(features) == truth[self.target].cpu()).double().mean().item(),
            f"perceptual_{self.name}": self._perceptual(generated[self.input], truth[self.input]),
            **self.reference.metrics(features),
        }

    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        """``judge_agreement``: how often the judge reads the class that was generated with the picture;
        ``class_entropy``: of the classes it reads, as a share of the greatest possible (no direction: as real data's
        is best); the distances; and ``fid_judge_balanced``, the Fréchet distance with as many of each class, as the
        judge reads them, as the training split's shares ask for; undefined where it does not read a class of which
        there are to be some. That leaves out the scatter of the class counts, and any bias of theirs, which is
        ``class_entropy``'s to tell (undefined of a single class), and keeps what is within the classes."""
        if self.input not in generated:
            return {}
        features = self._features(generated[self.input])
        read = self._read(features)
        metrics = self.reference.metrics(features)
        if self.target in generated:
            metrics[f"{self.name}_agreement"] = (read == generated[self.target].cpu()).double().mean().item()
        classes = self.classifier.head.out_features
        share = torch.bincount(read, minlength=classes).double() / len(read)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        metrics[self.entropy_name] = (entropy / torch.tensor(float(classes)).log()).item()
        metrics[f"fid_{self.name}_balanced"] = self._balanced_distance(features, read)
        return metrics

    def real(self, test: Mapping[str, Tensor]) -> dict[str, float]:
        """``judge_accuracy`` and the distances of the held-out split as it is; ``fid_judge_iid``: the Fréchet distance
        when its classes are drawn at random, as those of joint samples are; ``fid_judge_balanced``: when there are as
        many of each as the training split's shares ask for.

        A split that holds every class in equal number lies closer to the training split than independent samples of
        the very same distribution do, so ``joint/fid_judge`` is to be read against ``real/fid_judge_iid``, and
        ``joint/fid_judge_balanced`` against ``real/fid_judge_balanced``.
        """
        x, y = test[self.input], test[self.target].cpu()
        features = self._features(x)
        metrics = {
            f"{self.name}_accuracy": (self._read(features) == y).double().mean().item(),
            **self.reference.metrics(features),
            f"fid_{self.name}_iid": math.nan,
            f"fid_{self.name}_balanced": self._balanced_distance(features, y),
        }
        if len(y) > 1:
            generator = torch.Generator().manual_seed(0)
            counts = [torch.bincount(y[torch.randint(len(y), (len(y),), generator=generator)]) for _ in range(REDRAWS)]
            metrics[f"fid_{self.name}_iid"] = self._redrawn_distance(features, y, counts)
        return metrics

    def _balanced_distance(self, features: Tensor, y: Tensor) -> float:
        """:meth:`_redrawn_distance` with the class counts of the training split's shares; NaN where that needs classes
        of which there is none, and of a single sample."""
        counts = _apportioned(len(y), self.class_shares)
        there = torch.bincount(y, minlength=len(counts)) > 0
        if len(y) < 2 or not bool(there[: len(counts)][counts > 0].all()):
            return math.nan
        return self._redrawn_distance(features, y, [counts] * REDRAWS)

    def _redrawn_distance(self, features: Tensor, y: Tensor, counts: Sequence[Tensor]) -> float:
        """Mean distance of features ``[n, D]`` of classes ``y [n]`` over draws with given class counts: of a class,
        samples at random, none twice before all were taken."""
        generator = torch.Generator().manual_seed(0)
        distances = []
        for wanted in counts:
            rows = []
            for label, count in enumerate(wanted.tolist()):
                of_class = (y == label).nonzero()[:, 0]
                while count > 0:
                    rows.append(of_class[torch.randperm(len(of_class), generator=generator)][:count])
                    count -= len(rows[-1])
            distances.append(frechet_distance(self.reference.features, features[torch.cat(rows)]))
        return sum(distances) / len(distances)


def _unit(features: Tensor) -> Tensor:
    """``[B, C, h, w]`` of unit norm over channels; 0 where all are 0."""
    return F.normalize(features, dim=1, eps=1e-10)


def _apportioned(total: int, shares: Tensor) -> Tensor:
    """Whole counts that add up to a total in given shares, by largest remainder: ``[K]`` int64."""
    exact = total * shares
    counts = exact.long()
    counts[(exact - counts).argsort(descending=True)[: total - int(counts.sum())]] += 1
    return counts


@frozen
class JudgeConfig(EvaluatorConfig):
    """A classifier of ``target`` (class indices) by ``input`` (pictures or masks).

    Attributes:
        input: the modality it looks at.
        target: the modality it reads off it.
        name: in its metrics' names, to tell several judges apart.
        neighbours: k of precision and recall.
        epochs, width, seed: of its training. What it learned is kept in the cache folder
            (:func:`mtdiffusion_registry.cache.cache_folder`) and serves again where all of this and the data are equal.
        train_samples: training samples that it is trained on and distances are taken to, at most: a random draw of as
            many.
    """

    kind: ClassVar[str] = "judge"
    input: str = "image"
    target: str = "label"
    name: str = field(default="judge", validator=matches_re(r"\w+"))
    neighbours: int = field(default=3, validator=ge(1))
    epochs: int = field(default=40, validator=ge(1))
    width: int = field(default=32, validator=gt(0))
    seed: int = field(default=0, validator=ge(0))
    train_samples: int = field(default=10_000, validator=ge(1))

    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.input, self.target)))

    def train_limit(self) -> int:
        return self.train_samples

    def preparation(self) -> str:
        return f"a judge of {self.target} by {self.input}, trained for {self.epochs} epochs unless kept from before"

    def build(self, train: Mapping[str, Tensor]) -> Evaluator:
        for role in (self.input, self.target):
            if role not in train:
                raise UserError(f"evaluators.judge: no modality named {role!r}; there are {', '.join(train)}")
        return Judge(self, train)


@hookimpl
def mtdiffusion_evaluators() -> list[type]:
    return [JudgeConfig]
