"""The judges' networks: trained once for the same data and configuration, then kept in the cache folder.

::

    CACHE/judges/KEY/classifier.safetensors     weights and statistics
    CACHE/judges/KEY/classifier.json            what they were trained as, and the digest of the file beside
    CACHE/judges/KEY.progress                   where a training is, until it is done

An entry is written under another name and renamed, so it is there whole or not at all. One that is damaged or cannot be
read is made again, without a word: nothing but time depends on it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion_plugins.metrics.fitting import Progress, fit
from mtdiffusion_registry.cache import cache_folder
from mtdiffusion_registry.partial import partial_of

RECIPE = 1
"""Counts the changes of :class:`Classifier` and :func:`train_classifier`: what was trained otherwise does not serve."""

N = TypeVar("N", bound=nn.Module)
_WEIGHTS, _ABOUT = "classifier.safetensors", "classifier.json"


class Classifier(nn.Module):
    """A small convolutional classifier of pictures ``[B, channels, h, w]``."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        """The last pooling layer's output ``[B, 8 · width]``, before the classifier: where Inception's FID is taken."""
        return self.body(x)

    def layers(self, x: Tensor) -> list[Tensor]:
        """Feature maps after each ReLU, each ``[B, C_l, h_l, w_l]``: where LPIPS takes its differences."""
        maps = []
        for part in self.body:
            x = part(x)
            if isinstance(part, nn.ReLU):
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(x), 0.3, self.training))


def train_classifier(
    x: Tensor, y: Tensor, *, width: int, epochs: int, seed: int, progress: Progress | None = None
) -> Classifier:
    """Fit to pictures ``[B, C, h, w]`` and classes ``[B]``, with shifts by a pixel and a little noise; seeded.

    Args:
        progress: of a training with equal arguments, with which it goes on; None: it begins, and none is kept.
    """
    height, width_ = x.shape[-2:]

    def loss_of(rows: Tensor) -> Tensor:
        down, right = torch.randint(-1, 2, (2,)).tolist()
        padded = F.pad(x[rows], (1, 1, 1, 1), mode="replicate")
        moved = padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width_]
        return F.cross_entropy(model(moved + 0.1 * torch.randn_like(moved)), y[rows])

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Classifier(x.shape[1], int(y.max()) + 1, width)
        fit(
            model,
            loss_of,
            len(x),
            batch=128,
            epochs=epochs,
            weight_decay=0.05,
            what="training a judge",
            progress=progress or Progress(),
        )
    return model.eval()


def kept_classifier(x: Tensor, y: Tensor, *, width: int, epochs: int, seed: int) -> Classifier:
    """:func:`train_classifier`, or what it gave for equal arguments before, from the cache folder."""

    def train(progress: Progress) -> Classifier:
        return train_classifier(x, y, width=width, epochs=epochs, seed=seed, progress=progress)

    about = {"recipe": RECIPE, "width": width, "epochs": epochs, "seed": seed, "x": digest(x), "y": digest(y)}
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and forgotten
        model = Classifier(x.shape[1], int(y.max()) + 1, width)
    return kept(model, about, train)


def kept(model: N, about: dict[str, Any], train: Callable[[Progress], N]) -> N:
    """What ``train`` gives, or gave before for an equal ``about``; ``model`` is of that kind, to take the weights.

    Args:
        train: is given the progress of such a training that was stopped, to go on with.
    """
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    entry = cache_folder() / "judges" / key
    if not _load(model, entry, about):
        progress = Progress(entry.with_suffix(".progress"))
        model = train(progress)
        _keep(model, entry, about)
        progress.remove()
    return model.eval()


def digest(x: Tensor) -> str:
    """Of values, shape and dtype."""
    x = x.cpu().contiguous()
    digest = hashlib.sha256(f"{list(x.shape)} {x.dtype} ".encode())
    digest.update(x.numpy().data)
    return digest.hexdigest()


def _load(model: nn.Module, entry: Path, about: dict[str, Any]) -> bool:
    """Give the model the entry's weights; False if they are not there, or damaged."""
    try:
        weights = (entry / _WEIGHTS).read_bytes()
        stored = json.loads((entry / _ABOUT).read_text(encoding="utf-8"))
        if stored != {**about, "sha256": hashlib.sha256(weights).hexdigest()}:
            return False
        model.load_state_dict(load(weights))
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return False
    return True


def _keep(model: nn.Module, entry: Path, about: dict[str, Any]) -> None:
    """Write the entry, whole or not at all; where that cannot be done, the model is trained again the next time."""
    weights = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    stored = {**about, "sha256": hashlib.sha256(weights).hexdigest()}
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with partial_of(entry, folder=True) as partial:
            (partial / _WEIGHTS).write_bytes(weights)
            (partial / _ABOUT).write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            _remove(entry)  # what is damaged
            partial.replace(entry)


def _remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
