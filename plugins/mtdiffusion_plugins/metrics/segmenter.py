"""An independent judge of pictures and masks: a network that reads one off the other, trained on the training split.

What it reads off a generated picture says whether the picture shows what the mask says; its features are those in which
distances to the training split are taken (``fid_segmenter``), where there is no label to train a classifier by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, matches_re
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion_plugins.mask import MaskConfig
from mtdiffusion_plugins.metrics.classifiers import digest, kept
from mtdiffusion_plugins.metrics.distances import TrainingFeatures
from mtdiffusion_plugins.metrics.fitting import Progress, fit
from mtdiffusion_registry.configs import EvaluatorConfig, ModalityConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.evaluation import Evaluator
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

RECIPE = 1
"""Counts the changes of :class:`SegmentationNetwork` and of its training: what was trained otherwise does not serve."""


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class SegmentationNetwork(nn.Module):
    """A small U-Net of two halvings, from pictures ``[B, channels, h, w]`` to logits ``[B, classes, h, w]``."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.first, self.second = _block(channels, width), _block(width, 2 * width)
        self.bottom = _block(2 * width, 4 * width)
        self.up, self.last = _block(6 * width, 2 * width), _block(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def _down(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        return first, second, self.bottom(F.max_pool2d(second, 2))

    def features(self, x: Tensor) -> Tensor:
        """``[B, 16 · width]``: means over the quarters of the bottom, so that it counts where things are."""
        return F.adaptive_avg_pool2d(self._down(x)[2], 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        first, second, bottom = self._down(x)
        up = self.up(torch.cat([F.interpolate(bottom, size=second.shape[-2:]), second], 1))
        return self.head(self.last(torch.cat([F.interpolate(up, size=first.shape[-2:]), first], 1)))


def train_network(
    x: Tensor, y: Tensor, *, classes: int, width: int, epochs: int, seed: int, progress: Progress | None = None
) -> SegmentationNetwork:
    """Fit to pictures ``[n, C, h, w]`` and masks ``[n, h, w]``, −1 where they do not count; mirrored at random, with a
    little noise; seeded.

    Args:
        progress: of a training with equal arguments, with which it goes on; None: it begins, and none is kept.
    """

    def loss_of(rows: Tensor) -> Tensor:
        pictures, masks = x[rows], y[rows]
        if torch.rand(()) < 0.5:
            pictures, masks = pictures.flip(-1), masks.flip(-1)
        logits = model(pictures + 0.05 * torch.randn_like(pictures))
        return F.cross_entropy(logits, masks, ignore_index=-1)

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = SegmentationNetwork(x.shape[1], classes, width)
        fit(
            model,
            loss_of,
            len(x),
            batch=min(16, len(x)),
            epochs=epochs,
            weight_decay=0.01,
            what="training a segmentation network",
            progress=progress or Progress(),
        )
    return model.eval()


class Segmenter(Evaluator):
    """Reads ``target`` off ``input``, and measures distances in the features by which it does."""

    def __init__(self, config: SegmenterConfig, train: Mapping[str, Tensor]) -> None:
        self.input, self.target, self.name, self.ignore = config.input, config.target, config.name, config.ignore
        x, y = train[self.input].cpu(), train[self.target].cpu()
        if x.ndim != 4 or not x.is_floating_point() or y.ndim != 3 or y.is_floating_point():
            raise UserError(
                "evaluators.segmenter: expected pictures as input and masks as target, found "
                f"{self.input!r} {list(x.shape[1:])} of {x.dtype} and {self.target!r} {list(y.shape[1:])} of {y.dtype}"
            )
        if x.shape[-2:] != y.shape[-2:]:
            raise UserError(
                f"evaluators.segmenter: expected pictures and masks of one size, found {list(x.shape[-2:])} and "
                f"{list(y.shape[-2:])}"
            )
        if self.ignore is not None:
            y = torch.where(y == self.ignore, -1, y)
        if int(y.max()) < 0:
            raise UserError("evaluators.segmenter: all pixels of the training masks are to be ignored")
        self.classes = int(y.max()) + 1
        width, epochs, seed = config.width, config.epochs, config.seed
        with torch.random.fork_rng(devices=[]):
            network = SegmentationNetwork(x.shape[1], self.classes, width)
        about = {"recipe": RECIPE, "width": width, "epochs": epochs, "seed": seed, "x": digest(x), "y": digest(y)}
        self.network = kept(
            network,
            {"segmenter": about},
            lambda progress: train_network(
                x, y, classes=self.classes, width=width, epochs=epochs, seed=seed, progress=progress
            ),
        )
        self.reference = TrainingFeatures(self._features(x), self.name, config.neighbours)
        self.metric_directions = {
            f"{self.name}_miou": "higher",
            f"{self.name}_agreement": "higher",
            **self.reference.directions,
        }

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.network.features(part) for part in torch.split(x.cpu(), 64)])

    @torch.no_grad()
    def _miou(self, pictures: Tensor, masks: Tensor) -> float:
        """Mean intersection over union of what is read off pictures with masks, over the classes that occur."""
        read = torch.cat([self.network(part).argmax(1) for part in torch.split(pictures.cpu(), 64)])
        masks = masks.cpu()
        known = (masks >= 0) & (masks < self.classes)
        pairs = masks[known] * self.classes + read[known]
        confusion = torch.bincount(pairs, minlength=self.classes**2).reshape(self.classes, self.classes).double()
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        return (confusion.diagonal() / union)[union > 0].mean().item()

    def conditional(
        self, target: str, generated: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Of pictures: ``segmenter_miou``, of what is read off them with the true masks, and the distances of
        :meth:`TrainingFeatures.metrics` (``fid_segmenter``, ...) to the training split."""
        if target != self.input:
            return {}
        x = generated[self.input]
        return {
            f"{self.name}_miou": self._miou(x, truth[self.target]),
            **self.reference.metrics(self._features(x)),
        }

    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        """``segmenter_agreement``: the mean intersection over union of what is read off the pictures with the masks
        that were generated with them; and the distances of the pictures."""
        if self.input not in generated:
            return {}
        metrics = self.reference.metrics(self._features(generated[self.input]))
        if self.target in generated:
            metrics[f"{self.name}_agreement"] = self._miou(generated[self.input], generated[self.target])
        return metrics

    def real(self, test: Mapping[str, Tensor]) -> dict[str, float]:
        """``segmenter_miou`` and the distances of the held-out split: how good the judge is, and what to compare
        with."""
        x = test[self.input]
        return {
            f"{self.name}_miou": self._miou(x, test[self.target]),
            **self.reference.metrics(self._features(x)),
        }


@frozen
class SegmenterConfig(EvaluatorConfig):
    """A segmentation network of ``input`` (pictures), taught by ``target`` (masks of the same size).

    Attributes:
        input: the modality it looks at.
        target: the modality it reads off it.
        ignore: the index of pixels that do not count; None: all do.
        name: in its metrics' names, to tell several apart.
        neighbours: k of precision and recall.
        epochs, width, seed: of its training.
        train_samples: how many training samples it is fitted to and compared with at most, a random draw.
    """

    kind: ClassVar[str] = "segmenter"
    input: str = "image"
    target: str = "mask"
    ignore: int | None = None
    name: str = field(default="segmenter", validator=matches_re(r"\w+"))
    neighbours: int = field(default=3, validator=ge(1))
    epochs: int = field(default=40, validator=ge(1))
    width: int = field(default=16, validator=gt(0))
    seed: int = field(default=0, validator=ge(0))
    train_samples: int = field(default=10000, validator=ge(1))

    def needs(self) -> tuple[str, ...]:
        return (self.input, self.target)

    def check(self, modalities: Mapping[str, ModalityConfig]) -> None:
        mask = modalities[self.target]
        if isinstance(mask, MaskConfig) and mask.ignore is not None and mask.ignore != self.ignore:
            found = "not set" if self.ignore is None else self.ignore
            raise ValueError(
                f"ignore: modalities.{self.target} ignores index {mask.ignore}, which would be learned as a class "
                f"here; expected ignore = {mask.ignore}, found {found}"
            )

    def train_limit(self) -> int:
        return self.train_samples

    def preparation(self) -> str:
        what = f"a segmentation network of {self.target} by {self.input}"
        return f"{what}, trained for {self.epochs} epochs unless kept from before"

    def build(self, train: Mapping[str, Tensor]) -> Evaluator:
        return Segmenter(self, train)


@hookimpl
def mtdiffusion_evaluators() -> list[type]:
    return [SegmenterConfig]
