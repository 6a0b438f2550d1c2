"""What the kit tries a modality with: a second modality that depends on it, and a backbone that any two can share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import Tensor, nn

from mtdiffusion.interfaces import Backbone, Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion.model import standard_normal
from mtdiffusion_registry.configs import ModalityConfig


class VectorEncoder(Encoder):
    """x ``[B, D]`` spread over the latent along orthonormal directions: lossless, linear, RMS 1 for N(0, I)."""

    def __init__(self, latent: LatentSpec, dims: int) -> None:
        super().__init__(latent)
        if dims > latent.numel:
            raise ValueError(f"expected a latent of at least {dims} numbers, found {latent.numel}")
        generator = torch.Generator().manual_seed(0)
        directions = torch.linalg.qr(torch.randn(latent.numel, dims, generator=generator))[0].T
        self.register_buffer("directions", directions * math.sqrt(latent.numel / dims))
        self.directions: Tensor
        self.readout_dim = dims

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.directions).view(-1, *self.latent.shape)

    def readout(self, z: Tensor) -> Tensor:
        return z.flatten(1) @ self.directions.T * (self.readout_dim / self.latent.numel)


class GaussianHead(Decoder):
    """p(x | h) = N(mean, scale²), independent in each of D dimensions."""

    def __init__(self, features: FeatureSpec, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.head = nn.Linear(features.vector, 2 * dims)

    def forward(self, features: Features) -> Params:
        mean, log_scale = self.head(features.vector).chunk(2, 1)
        return {"mean": mean, "log_scale": log_scale}

    def _log_scale(self, params: Params) -> Tensor:
        return params["log_scale"].clamp(-3, 2)

    def nll(self, params: Params, x: Tensor) -> Tensor:
        log_scale = self._log_scale(params)
        error = (x - params["mean"]) * torch.exp(-log_scale)
        return (error.square() / 2 + log_scale + math.log(2 * math.pi) / 2).sum(1)

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(params["mean"])

    def mode(self, params: Params) -> Tensor:
        return params["mean"]

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        return params["mean"] + self._log_scale(params).exp() * standard_normal(params["mean"], generator)


class EchoModality(Modality):
    """A vector ``[B, D]`` of about N(0, I)."""

    def __init__(self, latent: LatentSpec, features: FeatureSpec, config: EchoConfig) -> None:
        super().__init__(VectorEncoder(latent, config.dims), GaussianHead(features, config.dims))
        self.dims = config.dims
        self.loss_weight = config.loss_weight

    def check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.dims or not x.is_floating_point() or not x.isfinite().all():
            raise ValueError(f"echo: expected finite numbers [batch, {self.dims}], found {x.dtype} {list(x.shape)}")

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.dims)

    def render(self, x: Tensor) -> Tensor:
        return x.sigmoid()[:, None, None].expand(-1, 3, 4, -1)

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        return {"mse": (generated - truth).square().mean().item()}

    def parse(self, text: str) -> Tensor:
        try:
            return torch.tensor(json.loads(Path(text).read_text()), dtype=torch.float32)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"echo: expected a .json file of numbers, found {text!r}") from error

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        path = folder / f"{stem}.json"
        path.write_text(json.dumps(x.tolist()))
        return path


@frozen
class EchoConfig(ModalityConfig):
    """Numbers that depend on another modality: what :func:`echo_of` makes of its code."""

    kind: ClassVar[str] = "echo"
    dims: int = field(default=8, validator=ge(1))
    loss_weight: float = field(default=0.1, validator=gt(0.0))

    def latent_channels(self, height: int, width: int) -> int:
        return -(-self.dims // (height * width))

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        return EchoModality(latent, features, self)


def echo_of(codes: Tensor, dims: int) -> Tensor:
    """A random projection of codes ``[B, c, H, W]`` to ``[B, dims]``, standardised over the batch."""
    flat = codes.flatten(1)
    x = flat @ torch.randn(flat.shape[1], dims, dtype=flat.dtype)
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)


class Perceptron(Backbone):
    """All that goes in through two hidden layers to all that comes out: small, and blind to nothing."""

    WIDTH = 256

    def __init__(self, in_channels: int, in_vector: int, features: FeatureSpec) -> None:
        super().__init__()
        self.features = features
        places = features.height * features.width
        self.hidden = nn.Sequential(
            nn.Linear(in_channels * places + 1 + in_vector, self.WIDTH),
            nn.LayerNorm(self.WIDTH),
            nn.SiLU(),
            nn.Linear(self.WIDTH, self.WIDTH),
            nn.LayerNorm(self.WIDTH),
            nn.SiLU(),
        )
        self.map = nn.Linear(self.WIDTH, features.channels * places)
        self.here = nn.Conv2d(in_channels, features.channels, 1)
        self.vector = nn.Linear(self.WIDTH, features.vector)

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        h = self.hidden(torch.cat([z.flatten(1), noise[:, None].to(z.dtype), vector], 1))
        spec = self.features
        return Features(
            self.map(h).unflatten(1, (spec.channels, spec.height, spec.width)) + self.here(z), self.vector(h)
        )
