"""``mae``: a masked autoencoder of patches, for the holes of one spatial modality (after He et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion.conditioning import merge_visible
from mtdiffusion_benchmarks.interfaces import Cost, Fitted, Problem
from mtdiffusion_benchmarks.methods._training import fit_module
from mtdiffusion_engine.data import Batch
from mtdiffusion_engine.subsets import random_holes
from mtdiffusion_registry import MethodConfig, Query, UserError, hookimpl

MTDIFFUSION_API = 1

_RANGE_SAMPLES = 1024


class MaskedAutoencoder(nn.Module):
    """Pictures ``[B, C, h, w]`` with holes to whole pictures, a patch of h/H × w/W pixels for a place of the latent.

    The encoder attends to visible patches and a class token only; the decoder, of a quarter of its depth, attends to
    all, a mask token standing where a patch is hidden. The numbers of visible patches differ within a batch, so hidden
    ones are kept out by attention masks, not left out: that costs what He et al. save.

    Args:
        shape: (C, h, w).
        places: (H, W), which divide h and w.
        low, high: the range of the data; answers are clamped to it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        places: tuple[int, int],
        *,
        width: int,
        depth: int,
        heads: int,
        low: float,
        high: float,
    ) -> None:
        super().__init__()
        channels, height, image_width = shape
        patch = (height // places[0], image_width // places[1])
        numbers = channels * patch[0] * patch[1]
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # Of the tokens' own scale: at 0.02, as is usual, a short training hardly tells places apart.
        self.position = nn.Parameter(0.5 * torch.randn(1, places[0] * places[1], width))
        self.encoder = _transformer(width, depth, heads)
        self.bridge = nn.Linear(width, width)
        self.decoder = _transformer(width, max(1, depth // 4), heads)
        self.head = nn.Linear(width, numbers)
        self.fold = nn.Fold((height, image_width), patch, stride=patch)
        self.register_buffer("range", torch.tensor([low, high]))
        self.range: Tensor

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Whole pictures ``[B, C, h, w]`` from what ``visible [B, H, W]`` (1 or 0) lets through of x."""
        x = x * upsampled(visible, x)  # a hidden patch is never a key; nor is its query anything but its place
        tokens = self.embed(x).flatten(2).mT + self.position  # [B, H·W, width]
        class_token = self.class_token.expand(len(x), -1, -1)
        hidden = visible.flatten(1) < 0.5
        ignored = F.pad(hidden, (1, 0), value=False)
        coded = self.bridge(self.encoder(torch.cat([class_token, tokens], 1), src_key_padding_mask=ignored))
        filled = torch.where(hidden[:, :, None], self.mask_token, coded[:, 1:]) + self.position
        decoded = self.decoder(torch.cat([coded[:, :1], filled], 1))[:, 1:]
        return self.fold(self.head(decoded).mT)


def _transformer(width: int, depth: int, heads: int) -> nn.TransformerEncoder:
    """Pre-norm blocks (Dosovitskiy et al. 2021) with a last norm."""
    block = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
    for parameter in blocks.parameters():  # torch makes the blocks copies of one another
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return blocks


def upsampled(visible: Tensor, like: Tensor) -> Tensor:
    """A visibility map ``[B, H, W]`` at a picture's resolution: ``[B, 1, h, w]``."""
    return F.interpolate(visible[:, None].to(like.dtype), like.shape[-2:], mode="nearest")


class Reconstruction(Fitted):
    """A trained masked autoencoder."""

    def __init__(self, model: MaskedAutoencoder, target: str, cost: Cost, curve: list[dict[str, float]]) -> None:
        self.model, self.target, self.cost, self.curve = model, target, cost, curve

    def answers(self, query: Query) -> bool:
        """Its target given in part, and nothing else."""
        return query.hidden > 0 and query.targets == (self.target,) and not query.observed

    @torch.no_grad()
    def generate(
        self, query: Query, x: Mapping[str, Tensor], visible: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        assert visible is not None  # the query is of a target given in part
        device, given = self.model.range.device, x[self.target].cpu()
        low, high = self.model.range.tolist()
        out = self.model(given.to(device), visible.to(device)).cpu().clamp(low, high)
        return {self.target: merge_visible(given, out, visible.cpu())}


@frozen
class MAEConfig(MethodConfig):
    """A masked autoencoder of one spatial modality whose data are floating-point pictures ``[B, C, h, w]``.

    The loss is the squared error of hidden patches, of pixels as they are (not standardised a patch). Holes are drawn
    as in the joint model's training (``conditioning.hidden_share``; He et al. hide a fixed 75 %), so that it is asked
    for what it was trained for. The budget is the joint model's; the network is this one's own.

    Attributes:
        target: the modality.
        width: of tokens.
        depth: blocks of the encoder; the decoder has a quarter as many, at least one.
        heads: of attention; they divide the width.
    """

    kind: ClassVar[str] = "mae"
    target: str
    width: int = field(default=128, validator=ge(1))
    depth: int = field(default=6, validator=ge(1))
    heads: int = field(default=4, validator=ge(1))

    def __attrs_post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide the width {self.width}")

    def fit(self, problem: Problem) -> Fitted:
        experiment = problem.experiment
        low, high = experiment.conditioning.hidden_share
        places = (experiment.latent.height, experiment.latent.width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(experiment.training.seed)
            model = self._build(problem, places)
        column = list(problem.train.modalities).index(self.target)

        def loss(model: MaskedAutoencoder, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
            x = batch.x[self.target]
            share = low + (high - low) * torch.rand(len(x), generator=generator)
            visible = random_holes(share, places, generator).to(x)
            hidden = (1 - upsampled(visible, x)) * batch.presence[:, column, None, None, None]
            error = (model(x, visible) - x).square() * hidden
            return {"loss": error.sum() / (hidden.sum() * x.shape[1]).clamp(min=1)}

        model, cost, curve = fit_module(problem, self, model, loss)
        return Reconstruction(model, self.target, cost, curve)

    def _build(self, problem: Problem, places: tuple[int, int]) -> MaskedAutoencoder:
        if self.target not in problem.modalities:
            raise UserError(
                f"method mae: the task has no modality named {self.target} (it has {', '.join(problem.modalities)})"
            )
        example = problem.modalities[self.target].placeholder(1)
        if example.ndim != 4 or not example.is_floating_point():
            raise UserError(
                f"method mae: target: expected a modality of floating-point pictures [batch, channels, h, w], found "
                f"{self.target}, whose data are {example.dtype} of shape {['batch', *example.shape[1:]]}"
            )
        channels, height, width = example.shape[1:]
        if height % places[0] or width % places[1]:
            raise UserError(
                f"method mae: target: expected pictures whose sides are multiples of the latent's {places[0]} × "
                f"{places[1]}, found {self.target} of {height} × {width}"
            )
        # No modality tells the range of its data; some of the training pictures do.
        step = -(-len(problem.train) // _RANGE_SAMPLES)
        rows = problem.train.batch(range(0, len(problem.train), step)).x[self.target]
        return MaskedAutoencoder(
            (channels, height, width),
            places,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            low=float(rows.min()),
            high=float(rows.max()),
        )


@hookimpl
def mtdiffusion_methods() -> list[type]:
    return [MAEConfig]
