"""A picture and a label with a small random network: everything a real model has, nothing trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import (
    Backbone,
    ClockLaw,
    Decoder,
    DiffusionProcess,
    Encoder,
    Features,
    FeatureSpec,
    LatentSpec,
    Layout,
    MultimodalDiffusion,
    OwnLayout,
    Params,
    Retention,
    SharedLayout,
    SNRMatched,
    WeightSchedule,
)
from tests.core.gaussians import VectorModality

CLASSES = 3
SIDE = 8


class PatchEncoder(Encoder):
    """A picture ``[B, 1, 2H, 2W]`` to its 2×2 patches ``[B, 4, H, W]``: exact, and place by place."""

    spatial = True

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)


class PictureDecoder(Decoder):
    """p(x | .) = N(mean, I); the mean is the first four feature maps, plus a learnt constant."""

    def __init__(self) -> None:
        super().__init__()
        self.dims = SIDE * SIDE
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Features) -> Params:
        return {"mean": F.pixel_shuffle(features.map[:, :4], 2) + self.bias}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        return -torch.distributions.Normal(params["mean"], 1.0).log_prob(x).sum((1, 2, 3))

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(params["mean"])

    def mode(self, params: Params) -> Tensor:
        return params["mean"]

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        mean = params["mean"]
        return mean + torch.randn(mean.shape, dtype=mean.dtype, generator=generator)


class CodebookEncoder(Encoder):
    """A label ``[B]`` to its code, a fixed row of a codebook; reads out its inner products with the codes."""

    def __init__(self, latent: LatentSpec, codes: Tensor) -> None:
        super().__init__(latent)
        self.register_buffer("codes", codes)  # [K, c, H, W]
        self.codes: Tensor
        self.readout_dim = len(codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.codes[x]

    def readout(self, z: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", z, self.codes)


class CategoricalDecoder(Decoder):
    """p(x | .) over labels; the logits are a slice of the feature vector, plus a learnt constant."""

    def __init__(self, start: int, classes: int) -> None:
        super().__init__()
        self.start = start
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: Features) -> Params:
        return {"logits": features.vector[:, self.start : self.start + len(self.bias)] + self.bias}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        return F.cross_entropy(params["logits"], x, reduction="none")

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        assert isinstance(encoder, CodebookEncoder)
        return torch.einsum("bk,kchw->bchw", params["logits"].softmax(1), encoder.codes)

    def mode(self, params: Params) -> Tensor:
        return params["logits"].argmax(1)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        return torch.multinomial(params["logits"].softmax(1), 1, generator=generator)[:, 0]


class PictureModality(VectorModality):
    def check(self, x: Tensor) -> None:
        if x.shape[1:] != (1, SIDE, SIDE):
            raise ValueError(f"picture: expected [batch, 1, {SIDE}, {SIDE}], found {list(x.shape)}")

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1, SIDE, SIDE)


class LabelModality(VectorModality):
    def check(self, x: Tensor) -> None:
        if x.ndim != 1 or x.dtype != torch.long:
            raise ValueError(f"label: expected int64 [batch], found {x.dtype} {list(x.shape)}")

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, dtype=torch.long)


class SmallNet(Backbone):
    """Every feature depends on every input. Keeps what it was shown last in ``shown``."""

    def __init__(self, in_channels: int, in_vector: int, latent: LatentSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.linear = nn.Linear(in_vector + 1 + 4 * latent.height * latent.width, 4 + CLASSES)
        self.features = FeatureSpec(4, latent.height, latent.width, CLASSES)
        self.shown: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        self.shown = (z, noise, vector)
        grid = torch.tanh(self.conv(z))
        told = torch.cat([vector, noise[:, None].to(vector.dtype), grid.flatten(1)], 1)
        shift, summary = self.linear(told).tensor_split([4], 1)
        return Features(grid + shift[:, :, None, None], summary)


def picture_and_label(
    layout: str = "own",
    *,
    show_clean: bool = False,
    epsilon_head: bool = False,
    steps: int = 20,
    retention: Retention | None = None,
    schedule: WeightSchedule | None = None,
    law: ClockLaw | None = None,
) -> MultimodalDiffusion:
    """A model of ``picture [B, 1, 8, 8]`` and ``label [B]`` with random weights, float32."""
    half = SIDE // 2
    space: Layout
    if layout == "own":
        space = OwnLayout({"picture": 4, "label": 1}, half, half, show_clean)
    else:
        space = SharedLayout(("picture", "label"), LatentSpec(4, half, half))
    process = DiffusionProcess.build(
        retention or Retention.from_curve("cosine", steps, 2), schedule or SNRMatched(), space
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modalities = {
            "picture": PictureModality(PatchEncoder(space.share("picture")), PictureDecoder(), SIDE * SIDE),
            "label": LabelModality(
                CodebookEncoder(space.share("label"), torch.randn(CLASSES, *space.share("label").shape)),
                CategoricalDecoder(0, CLASSES),
                1,
            ),
        }
        backbone = SmallNet(*space.inputs(CLASSES), space.latent)
        return MultimodalDiffusion(modalities, backbone, process, law, epsilon_head=epsilon_head)


def data(batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "picture": torch.randn(batch, 1, SIDE, SIDE, generator=generator),
        "label": torch.randint(CLASSES, (batch,), generator=generator),
    }
