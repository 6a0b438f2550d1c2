"""Captions: sequences of words of variable length, with a head that learns where they end.

``x`` is int64 ``[B, length]``: the indices 1, 2, ... of words in the vocabulary, then 0 (no word) to the end. The
caption is read from the left and stops at the first 0: given the features, position i holds word w with probability
p_i(w) and stops the caption with probability p_i(0), if nothing before it has. A caption of n words thus has the
probability

    p_1(w_1) ... p_n(w_n) p_{n+1}(0)          (without the last factor if n = length),

which sums to one over all captions. What comes after the end says nothing, and counts for nothing.
"""

from __future__ import annotations

import difflib
import math
import textwrap
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import ge, gt, min_len
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion_registry import ModalityConfig, UserError, hookimpl

MTDIFFUSION_API = 1

TILE = 96


def cosines(count: int, dim: int) -> Tensor:
    """The first rows of the orthonormal DCT-II, times sqrt(dim): ``[count, dim]``, orthogonal, each of RMS 1."""
    k = torch.arange(count, dtype=torch.float64)[:, None]
    n = torch.arange(dim, dtype=torch.float64)
    rows = math.sqrt(2) * torch.cos(math.pi * k * (n + 0.5) / dim)
    rows[0] = 1
    return rows.float()


class TokenEncoder(Encoder):
    """Position i of the caption fills the i-th run of places of the latent, row by row, with the code of its token.

    Tokens, "no word" among them, have orthogonal codes of RMS 1. They are fixed, so they cannot shrink, and the
    read-out is the inner product with each of them at each position. Places left over hold 0.
    """

    def __init__(self, latent: LatentSpec, length: int, tokens: int) -> None:
        super().__init__(latent)
        places = latent.height * latent.width // length
        self.dim = latent.channels * places
        if self.dim < tokens:
            raise ValueError(f"tokens: {tokens} orthogonal codes need as many numbers a position, found {self.dim}")
        self.length, self.places = length, places
        self.readout_dim = length * tokens
        self.register_buffer("codes", cosines(tokens, self.dim), persistent=False)
        self.codes: Tensor

    def code(self, probabilities: Tensor) -> Tensor:
        """The mean code ``[B, c, H, W]`` of marginal token probabilities ``[B, length, tokens]``."""
        return self._placed(probabilities @ self.codes)

    def _placed(self, codes: Tensor) -> Tensor:
        """Codes of the positions ``[B, length, places · c]``, laid out in the latent."""
        c, h, w = self.latent.shape
        runs = codes.reshape(-1, self.length * self.places, c)
        return F.pad(runs, (0, 0, 0, h * w - runs.shape[1])).transpose(1, 2).reshape(-1, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        return self._placed(F.embedding(x, self.codes))

    def readout(self, z: Tensor) -> Tensor:
        runs = z.flatten(2).transpose(1, 2)[:, : self.length * self.places]
        return (runs.reshape(len(z), self.length, self.dim) @ self.codes.T / self.dim).flatten(1)


class CaptionDecoder(Decoder):
    """The distribution of the module's docstring, from one set of logits a position."""

    def __init__(self, features: FeatureSpec, length: int, tokens: int) -> None:
        super().__init__()
        self.dims = length
        self.net = nn.Sequential(
            nn.Linear(features.vector, features.vector),
            nn.SiLU(),
            nn.Linear(features.vector, length * tokens),
            nn.Unflatten(1, (length, tokens)),
        )

    def forward(self, features: Features) -> Params:
        return {"logits": self.net(features.vector)}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        each = F.cross_entropy(params["logits"].transpose(1, 2), x, reduction="none")  # [B, length]
        return torch.where(reached(x), each, 0.0).sum(1)

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        assert isinstance(encoder, TokenEncoder)
        p = params["logits"].softmax(2)
        goes_on = (1 - p[:, :, 0]).cumprod(1)
        before = F.pad(goes_on[:, :-1], (1, 0), value=1.0)  # that the caption has not ended before this position
        marginal = torch.cat([(1 - goes_on)[:, :, None], before[:, :, None] * p[:, :, 1:]], 2)
        return encoder.code(marginal)

    def mode(self, params: Params) -> Tensor:
        """The most likely caption of any length: the best words, cut where the whole is most likely."""
        log_p = params["logits"].log_softmax(2)
        best, words = log_p[:, :, 1:].max(2)
        of_words = F.pad(best.cumsum(1), (1, 0))  # [B, length + 1]: of the first n words
        of_end = F.pad(log_p[:, :, 0], (0, 1))  # of ending after n words; certain at full length
        return cut(words + 1, (of_words + of_end).argmax(1))

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        p = params["logits"].softmax(2)
        device = p.device if generator is None else generator.device
        drawn = torch.multinomial(p.flatten(0, 1).to(device), 1, generator=generator).to(p.device)
        x = drawn.reshape(p.shape[:2])
        return torch.where(reached(x), x, 0)


def reached(x: Tensor) -> Tensor:
    """Which positions of captions ``[B, length]`` say something: the words, and the 0 that ends them."""
    return F.pad((x > 0).long().cumprod(1)[:, :-1], (1, 0), value=1).bool()


def cut(x: Tensor, count: Tensor) -> Tensor:
    """Captions ``[B, length]`` of which the first ``count [B]`` words are kept."""
    return torch.where(torch.arange(x.shape[1], device=x.device) < count[:, None], x, 0)


class TokensModality(Modality):
    metric_directions = MappingProxyType({"token_accuracy": "higher", "exact_match": "higher"})

    def __init__(self, encoder: Encoder, decoder: Decoder, config: TokensConfig) -> None:
        super().__init__(encoder, decoder)
        self.length = config.length
        self.vocabulary = config.vocabulary
        self.field = config.field
        self.loss_weight = config.loss_weight

    def check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.length or x.dtype != torch.int64:
            raise ValueError(f"tokens: expected int64 [batch, {self.length}], found {x.dtype} of {list(x.shape)}")
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= len(self.vocabulary):
            raise ValueError(
                f"tokens: expected 0 (no word) to {len(self.vocabulary)} (the vocabulary's last), found "
                f"{int(x.min())} to {int(x.max())}"
            )
        if bool(((x[:, :-1] == 0) & (x[:, 1:] > 0)).any()):
            raise ValueError("tokens: expected 0 only after the last word, found a word after a 0")

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.length, dtype=torch.int64)

    def text(self, x: Tensor) -> str:
        """The words of one caption ``[length]``."""
        return " ".join(self.vocabulary[token - 1] for token in x.tolist() if token)

    def render(self, x: Tensor) -> Tensor:
        return torch.stack([tile(self.text(caption)) for caption in x])

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """``token_accuracy``: share of agreeing positions, of those where either caption has a word, pooled over the
        batch (1 if there is none); ``exact_match``: share of captions that agree in every word and in length."""
        either = (generated > 0) | (truth > 0)
        right = (generated == truth) & either
        return {
            "token_accuracy": (right.sum() / either.sum()).item() if bool(either.any()) else 1.0,
            "exact_match": (generated == truth).all(1).double().mean().item(),
        }

    def parse(self, text: str) -> Tensor:
        """Words of the vocabulary, or a .txt file of them."""
        where = ""
        if text.endswith(".txt"):
            where = f"{text}: "
            try:
                text = Path(text).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"tokens: expected a text file, found {where}{error}") from None
        words = text.split()
        if len(words) > self.length:
            raise UserError(f"tokens: {where}expected at most {self.length} words, found {len(words)}")
        for word in words:
            if word not in self.vocabulary:
                near = difflib.get_close_matches(word, self.vocabulary, 1, cutoff=0.75)
                meant = f" (did you mean {near[0]!r}?)" if near else ""
                known = ", ".join(self.vocabulary)
                raise UserError(f"tokens: {where}expected words of the vocabulary ({known}), found {word!r}{meant}")
        tokens = [self.vocabulary.index(word) + 1 for word in words]
        return torch.tensor(tokens + [0] * (self.length - len(words)))

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        path = folder / f"{stem}.txt"
        path.write_text(self.text(x) + "\n", encoding="utf-8")
        return path


def tile(text: str) -> Tensor:
    """A text on a dark tile: ``[3, TILE, TILE]`` in [0, 1]."""
    picture = Image.new("RGB", (TILE, TILE), (24, 26, 34))
    lines = textwrap.fill(text, 14) or "(empty)"
    ImageDraw.Draw(picture).multiline_text(
        (TILE / 2, TILE / 2), lines, fill=(235, 225, 200), font=ImageFont.load_default(11), anchor="mm", align="center"
    )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


@frozen
class TokensConfig(ModalityConfig):
    """A caption, int64 ``[B, length]``: words by their place in the vocabulary, from 1; 0 after the last word.

    Attributes:
        length: the most words a caption can have; at most as many as the latent has places.
        vocabulary: the words, in the order in which the data set counts them.
        loss_weight: λ of its part of L2.
        field: the data set's field; None: the instance's name.
    """

    kind: ClassVar[str] = "tokens"
    length: int = field(validator=ge(1))
    vocabulary: tuple[str, ...] = field(validator=min_len(1))
    loss_weight: float = field(default=0.3, validator=gt(0.0))
    field: str | None = None

    @vocabulary.validator
    def _words(self, _: object, value: tuple[str, ...]) -> None:
        if repeated := sorted({word for word in value if value.count(word) > 1}):
            raise ValueError(f"'vocabulary': expected different words, found twice: {', '.join(repeated)}")
        if broken := [word for word in value if len(word.split()) != 1 or word != word.strip()]:
            raise ValueError(f"'vocabulary': expected words without spaces, found {broken[0]!r}")

    def latent_channels(self, height: int, width: int) -> int:
        if self.length > height * width:
            raise ValueError(f"tokens: {self.length} words do not fit the {height * width} places of the latent")
        return -(-(len(self.vocabulary) + 1) // (height * width // self.length))

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        self.latent_channels(latent.height, latent.width)  # refuses a caption that does not fit
        tokens = len(self.vocabulary) + 1
        return TokensModality(
            TokenEncoder(latent, self.length, tokens), CaptionDecoder(features, self.length, tokens), self
        )


@hookimpl
def mtdiffusion_modalities() -> list[type[ModalityConfig]]:
    return [TokensConfig]
