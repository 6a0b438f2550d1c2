"""The CLIP modality: unit-norm embeddings of images or texts by an open_clip model, or those the data set brings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, in_, optional
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion.loss import low_before_high
from mtdiffusion_plugins.drawing import vector_tiles
from mtdiffusion_plugins.embedders.open_clip import ImageEmbedder, load_embedder
from mtdiffusion_plugins.files import read_vector
from mtdiffusion_plugins.heads import (
    VectorEncoder,
    VectorHead,
    check_batch,
    extent,
)
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.errors import UserError, given_file
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.pictures import SUFFIXES, open_picture, to_colour

MTDIFFUSION_API = 1

_LEAST_VARIANCE = 1e-5
_TEXT = "text:"


class UnitVectorDecoder(Decoder):
    """A distribution on the unit sphere with mean m, |m| ≤ 1: the surer, the longer; its mode is m's direction.

    m is fitted by squared error, so it is the posterior mean, which is what re-enters the process. What |m| leaves of
    E|x|² = 1 is variance, spread evenly: (1 − |m|²)/D a dimension.
    """

    def __init__(self, features: FeatureSpec, dim: int) -> None:
        super().__init__()
        self.mean = VectorHead(features, dim)
        self.dims = dim

    def forward(self, features: Features) -> Params:
        # The perceptron's outputs are of order 1; components of a unit vector are of order 1/√D.
        return {"mean": self.mean(features.vector) / self.dims**0.5}

    def moments(self, params: Params) -> tuple[Tensor, Tensor]:
        """m ``[B, D]``, no longer than 1, and the variance a dimension ``[B, 1]``."""
        mean = params["mean"]
        mean = mean / mean.norm(dim=1, keepdim=True).clamp(min=1)
        return mean, ((1 - mean.square().sum(1, keepdim=True)) / self.dims).clamp(min=_LEAST_VARIANCE)

    def nll(self, params: Params, x: Tensor) -> Tensor:
        """Of N(m, (1 − |m|²)/D · I): a density in R^D, not on the sphere."""
        mean, variance = self.moments(params)
        return 0.5 * ((x - mean).square() / variance + torch.log(2 * math.pi * variance)).sum(1)

    def objective(self, params: Params, x: Tensor) -> Tensor:
        return 0.5 * (x - params["mean"]).square().sum(1)  # a dimension of x has variance 1/D: this is per dimension

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(self.moments(params)[0])

    def mode(self, params: Params) -> Tensor:
        return F.normalize(params["mean"], dim=1)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        mean, variance = self.moments(params)
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=device, generator=generator).to(mean.device)
        return F.normalize(mean + variance.sqrt() * noise, dim=1)


class ClipModality(Modality):
    metric_directions: Mapping[str, str] = MappingProxyType(
        {"cosine": "higher", "retrieval_at_1": "higher", "retrieval_at_5": "higher", "readout_cosine": "higher"}
    )

    def __init__(self, encoder: Encoder, decoder: Decoder, config: ClipConfig) -> None:
        super().__init__(encoder, decoder)
        self.dim = config.dim
        self.config = config
        self.field = config.source or config.field
        self.derived = config.source is not None
        self.loss_weight = config.loss_weight
        self.snr_clamp = config.snr_clamp
        self._embedder: ImageEmbedder | None = None

    def check(self, x: Tensor) -> None:
        check_batch("clip", x, (self.dim,), floating=True)
        norms = x.norm(dim=1)
        if x.numel() and float((norms - 1).abs().max()) > 1e-2:
            raise ValueError(f"clip: expected unit norm, found norms of {extent(norms)}")

    def placeholder(self, batch: int) -> Tensor:
        return F.one_hot(torch.zeros(batch, dtype=torch.int64), self.dim).float()

    def render(self, x: Tensor) -> Tensor:
        return vector_tiles(x)

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """``cosine`` to the truth (mean), and :func:`retrieval` by it."""
        similarity = self.similarity(generated, truth)
        return {"cosine": similarity.diagonal().mean().item()} | retrieval(similarity)

    def similarity(self, x: Tensor, candidates: Tensor) -> Tensor:
        """The cosine."""
        return F.normalize(x, dim=1) @ F.normalize(candidates, dim=1).T

    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        """``readout_cosine``: of the mean's direction to the truth."""
        return {"readout_cosine": F.cosine_similarity(self.decoder.mode(params), truth).mean().item()}

    def derive(self, source: Tensor | Sequence[str]) -> Tensor:
        """The embeddings of images ``[B, 1 or 3, h, w]`` in [−1, 1], or of texts, by the tower for them.

        Raises:
            ValueError: if they are not what ``tower`` reads.
        """
        if not self.derived:
            return super().derive(source)
        texts = not isinstance(source, Tensor)
        if texts != (self.config.tower == "text"):
            found, tower = ("texts", "text") if texts else ("tensors", "image")
            raise ValueError(
                f'the field holds {found}, which tower = "{self.config.tower}" does not read; set tower = "{tower}", '
                "or let source name another field"
            )
        return self._loaded().embed(source) if isinstance(source, Tensor) else self._loaded().embed_text(source)

    def _loaded(self) -> ImageEmbedder:
        """The model, loaded when it is first needed."""
        if self._embedder is None:
            # The config requires a model with a source; parse asks before it comes here.
            model, file = (
                str(each.expanduser()) if isinstance(each, Path) else each
                for each in (self.config.model, self.config.checkpoint)
            )
            assert model is not None
            self._embedder = load_embedder(model, self.config.pretrained, file)
            if self._embedder.dim != self.dim:
                found, self._embedder = self._embedder.dim, None
                raise UserError(f"clip.dim: expected {found}, the width of {self.config.model}; found {self.dim}")
        return self._embedder

    def parse(self, text: str) -> Tensor:
        """A file of the embedding itself, a picture to embed, or words to embed, after ``text:``.

        Whichever tower data are embedded with: both lead into one space, though a picture and its caption do not meet
        in it.
        """
        if text.startswith(_TEXT):
            words = text.removeprefix(_TEXT).strip()
            if not words:
                raise UserError(f"expected words after {_TEXT!r}, found none")
            if self.config.model is None:
                raise UserError(f"{text!r}: no clip.model is configured to embed words with; give an embedding file")
            return self._loaded().embed_text([words])[0]
        words = "" if self.config.model is None else f", a picture's file, or words after {_TEXT!r}"
        path = given_file(text, f"an embedding is given as a file (.safetensors, .npy or .json){words}")
        if path.suffix.lower() not in SUFFIXES:
            return F.normalize(read_vector(path, self.dim), dim=0)
        if self.config.model is None:
            raise UserError(f"{path}: no clip.model is configured to embed a picture with; give an embedding file")
        picture = to_colour(open_picture(path), path)
        values = torch.tensor(list(picture.tobytes()), dtype=torch.float32) / 127.5 - 1
        return self._loaded().embed(values.reshape(1, picture.height, picture.width, 3).permute(0, 3, 1, 2))[0]

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        from safetensors.torch import save_file

        path = folder / f"{stem}.safetensors"
        save_file({"embedding": x.detach().float().cpu().contiguous()}, path)
        return path


def retrieval(similarity: Tensor) -> dict[str, float]:
    """``retrieval_at_1`` and ``retrieval_at_5``: how often the truth is among that many nearest (at most n) of the n
    truths in the batch, ties broken at random (in expectation).

    Args:
        similarity: of each generated to each truth, ``[n, n]``, its own on the diagonal.
    """
    own = similarity.diagonal()[:, None]
    nearer = (similarity > own).sum(1)
    tied = (similarity == own).sum(1)  # itself among them
    return {f"retrieval_at_{k}": ((min(k, len(similarity)) - nearer) / tied).clamp(0, 1).mean().item() for k in (1, 5)}


def _place(model: str | Path | None) -> str | Path | None:
    """A model's name, or the path of its configuration."""
    return Path(model) if model is not None and str(model).endswith(".json") else model


@frozen
class ClipConfig(ModalityConfig):
    """A unit-norm embedding, float32 ``[B, dim]``.

    Attributes:
        dim: D, the width of the embedding.
        source: the data set's field of images, or of texts, to embed with the model; None: the data set brings
            embeddings.
        tower: which of the model's two towers reads the source: "image", or "text" where it holds texts.
        model: an open_clip architecture ("ViT-B-32"), a model on the Hub ("hf-hub:OWNER/NAME"), one that ships here:
            "builtin:digits", "builtin:shapes", "builtin:scenes"; or the path of a model's JSON configuration.
        pretrained: an open_clip tag of weights ("laion2b_s34b_b79k").
        checkpoint: a file of weights for the model instead; beside a tag, the file of that tag's weights.
        code_channels: channels of the latent its code fills; None: as many as D orthogonal directions need.
        loss_weight: λ of its part of L2.
        snr_clamp: λ_t = loss_weight · clamp(SNR_t, low, high); uniform in t by default.
        field: the data set's field of embeddings, without a source; None: the instance's name.
    """

    kind: ClassVar[str] = "clip"
    dim: int = field(validator=ge(2))
    source: str | None = None
    tower: Literal["image", "text"] = field(default="image", validator=in_(("image", "text")))
    model: str | Path | None = field(default=None, converter=_place)
    pretrained: str | None = None
    checkpoint: Path | None = None
    code_channels: int | None = field(default=None, validator=optional(ge(1)))
    loss_weight: float = field(default=0.3, validator=gt(0.0))
    snr_clamp: tuple[float, float] = field(default=(1.0, 1.0), validator=low_before_high)
    field: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.source is not None and self.model is None:
            raise ValueError(f"source = {self.source!r} needs a model to embed it with; set model")
        if self.source is None and self.tower != "image":
            raise ValueError(
                f'tower = "{self.tower}" says how a source is embedded, and there is none; set source, the field of '
                "texts, or remove tower"
            )

    def latent_channels(self, height: int, width: int) -> int:
        return self.code_channels or -(-self.dim // (height * width))

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        return ClipModality(VectorEncoder(latent, self.dim, seed=2), UnitVectorDecoder(features, self.dim), self)


@hookimpl
def mtdiffusion_modalities() -> list[type]:
    return [ClipConfig]
