"""LPIPS (Zhang et al. 2018) by the lpips package: a learned perceptual distance of generated to true pictures.

It needs the trunk's ImageNet weights. Without them it says how to get them; it never measures with a random trunk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import in_
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion_registry.configs import EvaluatorConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.evaluation import Evaluator
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

_SMALLEST = 64  # the trunks pool five times; smaller pictures are enlarged to this side


def load_lpips(net: str, trunk: Path | None) -> nn.Module:
    """LPIPS with real weights.

    Args:
        net: "alex", "vgg" or "squeeze".
        trunk: a file of torchvision's ImageNet weights for it; None: from torch's cache, or downloaded.

    Raises:
        UserError: if the weights cannot be had, or are another network's.
    """
    import lpips

    if trunk is None:
        try:
            return lpips.LPIPS(net=net, verbose=False)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken download a RuntimeError
            raise UserError(
                f"lpips: torchvision's ImageNet weights of {net!r} cannot be downloaded ({error}). Get the file on a "
                "machine with a network and set weights to its path."
            ) from error
    model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # random only until the next lines
    try:
        given: dict[str, Tensor] = torch.load(trunk, map_location="cpu", weights_only=True)
        # The package cuts torchvision's `features` into slices and keeps each layer's number.
        names = {name: "features." + re.sub(r"^slice\d+\.", "", name) for name in model.net.state_dict()}
        model.net.load_state_dict({name: given[source] for name, source in names.items()})
    except FileNotFoundError:
        raise UserError(f"{trunk}: no such file; expected torchvision's ImageNet weights of {net!r}") from None
    except Exception as error:  # torch.load and load_state_dict have many ways to refuse a file
        raise UserError(f"{trunk}: not torchvision's weights of {net!r} ({type(error).__name__}: {error})") from error
    return model


class Lpips(Evaluator):
    """Mean LPIPS of a generated modality to the truth."""

    metric_directions: Mapping[str, str] = MappingProxyType(
        {"lpips_alex": "lower", "lpips_vgg": "lower", "lpips_squeeze": "lower"}
    )

    def __init__(self, config: LpipsConfig) -> None:
        self.input, self.net = config.input, config.net
        self.model: Any = load_lpips(config.net, Path(config.weights) if config.weights else None).eval()

    def conditional(
        self, target: str, generated: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """``lpips_alex`` (or the trunk used): mean distance of generated pictures to the true ones."""
        if target != self.input:
            return {}
        return {f"lpips_{self.net}": self.distance(generated[target], truth[target]).mean().item()}

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS ``[B]`` of pictures ``[B, C, h, w]`` in [−1, 1]."""
        parts = zip(torch.split(a.cpu().float(), 64), torch.split(b.cpu().float(), 64), strict=True)
        return torch.cat([self.model(_enlarged(x), _enlarged(y)).flatten() for x, y in parts])

    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        return {}

    def real(self, test: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


def _enlarged(x: Tensor) -> Tensor:
    rgb = x.expand(-1, 3, -1, -1)
    if min(x.shape[-2:]) >= _SMALLEST:
        return rgb
    return F.interpolate(rgb, scale_factor=-(-_SMALLEST // min(x.shape[-2:])), mode="bilinear")


@frozen
class LpipsConfig(EvaluatorConfig):
    """LPIPS of one modality, pictures, to the truth.

    Attributes:
        input: the modality.
        net: the trunk: alex, vgg or squeeze.
        weights: a file of torchvision's ImageNet weights of the trunk; None: torch's cache, or a download.
    """

    kind: ClassVar[str] = "lpips"
    input: str = "image"
    net: Literal["alex", "vgg", "squeeze"] = field(default="alex", validator=in_(("alex", "vgg", "squeeze")))
    weights: str | None = None

    def needs(self) -> tuple[str, ...]:
        return (self.input,)

    def train_limit(self) -> int:
        return 0  # nothing of it is fitted

    def build(self, train: Mapping[str, Tensor]) -> Evaluator:
        if self.input not in train or train[self.input].ndim != 4:
            pictures = ", ".join(name for name, x in train.items() if x.ndim == 4)
            raise UserError(
                f"evaluators.lpips: {self.input!r} is no modality of pictures; there are {pictures or 'none'}"
            )
        return Lpips(self)


@hookimpl
def mtdiffusion_evaluators() -> list[type]:
    return [LpipsConfig]
