"""The text modality: a short text as tokens, with a head that learns where it ends.

x is int64 ``[B, length]``: a text's tokens, numbered from 1, then the pad index 0 to the end. It is read from the left
and stops at the first 0: given the features, position i holds token w with probability p_i(w) and ends the text with
probability p_i(0), if nothing before it has. A text of n tokens thus has the probability

    p_1(w_1) ... p_n(w_n) p_{n+1}(0)          (without the last factor if n = length),

which sums to one over all texts of all lengths. What comes after the end says nothing, and counts for nothing.
Positions are independent given the features, and the diffusion makes them agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, in_, optional
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion.loss import low_before_high
from mtdiffusion_plugins.drawing import text_tiles
from mtdiffusion_plugins.files import read_text
from mtdiffusion_plugins.heads import check_batch, check_range, unit_directions
from mtdiffusion_plugins.text_tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    WordTokenizer,
    edit_distances,
    shortened,
)
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.errors import UserError, given_file
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

PAD = 0
_CODE = 32  # numbers a position's code takes at most, unless code_channels asks for more
_HIDDEN = 64


def run_length(latent: LatentSpec, length: int, tokens: int) -> int:
    """How many numbers of the latent a position has for itself.

    Raises:
        ValueError: if they are too few to tell the tokens apart.
    """
    found, least = latent.numel // length, math.ceil(math.log2(tokens))
    if found < least:
        raise ValueError(
            f"text: {length} positions of {tokens - 1} tokens and an end need {least} numbers each, found {found} of a "
            f"latent of {latent.channels} × {latent.height} × {latent.width}; give code_channels more, or length less"
        )
    return found


class TextEncoder(Encoder):
    """Position i fills the i-th run of the latent's numbers, place by place, with the code of its token.

    Tokens, the pad index among them, have fixed codes of RMS 1: orthogonal ones while they fit into the run, else
    random directions. Fixed codes cannot shrink. The few numbers that are left over hold 0. The read-out says for each
    position how much there is of each token's code; or, where tokens are more than numbers, gives these numbers.
    """

    def __init__(self, latent: LatentSpec, length: int, tokens: int, seed: int = 3) -> None:
        super().__init__(latent)
        self.length, self.run = length, run_length(latent, length, tokens)
        codes = unit_directions(tokens, self.run, seed) * math.sqrt(self.run)
        self.register_buffer("codes", codes.float().contiguous())
        self.codes: Tensor
        self.matched = tokens <= self.run
        self.readout_dim = length * min(tokens, self.run)

    def code(self, probabilities: Tensor) -> Tensor:
        """The mean code ``[B, c, H, W]`` of the probabilities of tokens at each position ``[B, length, tokens]``."""
        return self._placed(probabilities @ self.codes)

    def _placed(self, runs: Tensor) -> Tensor:
        """Positions' numbers ``[B, length, run]`` in their places."""
        c, h, w = self.latent.shape
        flat = F.pad(runs.flatten(1), (0, self.latent.numel - self.length * self.run))
        return flat.reshape(-1, h, w, c).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self._placed(self.codes[x])

    def readout(self, z: Tensor) -> Tensor:
        runs = z.permute(0, 2, 3, 1).flatten(1)[:, : self.length * self.run]
        if not self.matched:
            return runs
        return (runs.reshape(len(z), self.length, self.run) @ self.codes.T / self.run).flatten(1)


class TextDecoder(Decoder):
    """The distribution of the module's docstring, from logits ``[B, length, tokens]``.

    Each position reads the feature vector, and the feature map where its code is.
    """

    def __init__(self, features: FeatureSpec, latent: LatentSpec, length: int, tokens: int) -> None:
        super().__init__()
        self.dims = length
        run = run_length(latent, length, tokens)
        # Which share of a position's run lies in which place: [length, H·W].
        places = torch.arange(length * run).reshape(length, run) // latent.channels
        shares = F.one_hot(places, latent.height * latent.width).double().mean(1).float()
        self.register_buffer("shares", shares, persistent=False)
        self.shares: Tensor
        self.of_vector = nn.Sequential(
            nn.Linear(features.vector, features.vector),
            nn.SiLU(),
            nn.Linear(features.vector, length * _HIDDEN),
            nn.Unflatten(1, (length, _HIDDEN)),
        )
        self.of_place = nn.Linear(features.channels, _HIDDEN)
        self.logits = nn.Linear(_HIDDEN, tokens)

    def forward(self, features: Features) -> Params:
        places = self.shares @ features.map.flatten(2).transpose(1, 2)  # [B, length, F]
        return {"logits": self.logits(F.silu(self.of_vector(features.vector) + self.of_place(places)))}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        each = F.cross_entropy(params["logits"].transpose(1, 2), x, reduction="none")  # [B, length]
        return torch.where(said(x), each, 0.0).sum(1)

    def dims_of(self, x: Tensor) -> Tensor:
        """The positions that say something: the tokens and the end, not the padding after it."""
        return said(x).sum(1)

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        assert isinstance(encoder, TextEncoder)
        p = params["logits"].softmax(2)
        goes_on = (1 - p[:, :, PAD]).cumprod(1)
        before = F.pad(goes_on[:, :-1], (1, 0), value=1.0)  # that the text has not ended before this position
        return encoder.code(torch.cat([(1 - goes_on)[:, :, None], before[:, :, None] * p[:, :, 1:]], 2))

    def mode(self, params: Params) -> Tensor:
        """The most likely text of any length: the best tokens, cut where the whole is most likely."""
        log_p = params["logits"].log_softmax(2)
        best, tokens = log_p[:, :, 1:].max(2)
        of_tokens = F.pad(best.cumsum(1), (1, 0))  # [B, length + 1]: of the first n tokens
        of_end = F.pad(log_p[:, :, PAD], (0, 1))  # of ending after n tokens; certain at full length
        count = (of_tokens + of_end).argmax(1)
        kept = torch.arange(tokens.shape[1], device=tokens.device) < count[:, None]
        return torch.where(kept, tokens + 1, PAD)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        p = params["logits"].softmax(2)
        device = p.device if generator is None else generator.device
        drawn = torch.multinomial(p.flatten(0, 1).to(device), 1, generator=generator).to(p.device)
        x = drawn.reshape(p.shape[:2])
        return torch.where(said(x), x, PAD)


def said(x: Tensor) -> Tensor:
    """Which positions of texts ``[B, length]`` say something: the tokens, and the pad index that ends them."""
    return F.pad((x != PAD).long().cumprod(1)[:, :-1], (1, 0), value=1).bool()


class TextModality(Modality):
    metric_directions: Mapping[str, str] = MappingProxyType(
        {
            "token_accuracy": "higher",
            "exact_match": "higher",
            "edit_distance": "lower",
            "readout_token_accuracy": "higher",
            "nll_per_token": "lower",
        }
    )

    def __init__(self, encoder: Encoder, decoder: Decoder, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__(encoder, decoder)
        self.tokenizer = tokenizer
        self.length = config.length
        self.truncate = config.truncate
        self.field = config.field
        self.loss_weight = config.loss_weight
        self.snr_clamp = config.snr_clamp
        # Weights mean nothing under another numbering of tokens, and the file it came from may have changed since.
        self.register_buffer("numbering", torch.tensor([tokenizer.fingerprint()]))
        self.numbering: Tensor
        self.register_load_state_dict_pre_hook(_same_numbering)  # type: ignore[no-untyped-call]

    def check(self, x: Tensor) -> None:
        check_batch("text", x, (self.length,), floating=False)
        check_range(f"text of {self.tokenizer.size} {self.tokenizer.unit}", x, PAD, self.tokenizer.size)
        if bool(((x[:, :-1] == PAD) & (x[:, 1:] != PAD)).any()):
            raise ValueError(f"text: expected the pad index {PAD} after the last token only, found a token after it")

    def placeholder(self, batch: int) -> Tensor:
        return torch.full((batch, self.length), PAD)

    def text(self, x: Tensor) -> str:
        """The text of one x ``[length]``."""
        return self.tokenizer.decode(_tokens(x))

    def render(self, x: Tensor) -> Tensor:
        return text_tiles([self.text(each) or "(empty)" for each in x])

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """``token_accuracy``: the share of positions that agree, of those where either text has a token, pooled over
        the batch (1 if there is none); ``exact_match``: of texts that agree in all tokens and in length;
        ``edit_distance``: insertions, deletions and substitutions of tokens that lead from one to the other, over the
        length of the longer text (mean)."""
        either = (generated != PAD) | (truth != PAD)
        right = (generated == truth) & either
        pairs = [_tokens(x) for x in generated], [_tokens(x) for x in truth]
        return {
            "token_accuracy": (right.sum() / either.sum()).item() if bool(either.any()) else 1.0,
            "exact_match": (generated == truth).all(1).double().mean().item(),
            "edit_distance": sum(edit_distances(*pairs)) / len(truth),
        }

    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        """``readout_token_accuracy``: how often the most likely token of a position of the truth is its own, pooled
        over the batch, its end included; ``nll_per_token`` in nats, likewise."""
        counts = said(truth)
        right = (params["logits"].argmax(2) == truth) & counts
        return {
            "readout_token_accuracy": (right.sum() / counts.sum()).item(),
            "nll_per_token": (self.decoder.nll(params, truth).sum() / counts.sum()).item(),
        }

    def from_text(self, text: str) -> Tensor:
        """The tokens of a text.

        Raises:
            UserError: if it has more than ``length`` and is not to be truncated, or something that is no token.
        """
        tokens = self.tokenizer.encode(text)
        if len(tokens) > self.length and not self.truncate:
            raise UserError(
                f"text: expected at most {self.length} {self.tokenizer.unit}, found {len(tokens)} in "
                f"{shortened(text)!r}; shorten it, or set length = {len(tokens)} or more, or truncate = true "
                "to cut texts off"
            )
        kept = [token + 1 for token in tokens[: self.length]]
        return torch.tensor(kept + [PAD] * (self.length - len(kept)))

    def parse(self, text: str) -> Tensor:
        """A text, or the path of a .txt file that holds it."""
        if not text.endswith(".txt"):
            return self.from_text(text)
        try:
            return self.from_text(read_text(given_file(text, "a text is given as it is, or as a .txt file")).strip())
        except UserError as error:
            raise error if str(error).startswith(text) else UserError(f"{text}: {error}") from None

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        path = folder / f"{stem}.txt"
        path.write_text(self.text(x) + "\n", encoding="utf-8")
        return path


def _tokens(x: Tensor) -> Sequence[int]:
    """Of one x ``[length]``, from 0."""
    return [token - 1 for token in x.tolist() if token != PAD]


def _same_numbering(
    module: nn.Module,
    state: Mapping[str, Any],
    prefix: str,
    _a: object,
    _b: object,
    _c: object,
    _d: object,
    errors: Any,
) -> None:
    """A hook of ``load_state_dict``, which raises the errors added here."""
    assert isinstance(module, TextModality)
    found = state.get(f"{prefix}numbering")
    if found is not None and found.item() != module.tokenizer.fingerprint():
        errors.append(
            f"{prefix.rstrip('.') or 'text'}: trained with another vocabulary or tokenizer file than it has now; "
            "restore the file of that training"
        )


@frozen
class TextConfig(ModalityConfig):
    """A short text as tokens, int64 ``[B, length]``: numbered from 1, then 0 to the end.

    Attributes:
        length: the most tokens a text can have.
        tokenizer: what a token is. "bytes": a byte of UTF-8; "words": a word or a punctuation mark of a closed
            vocabulary, in lower case; "file": as a ``tokenizer.json`` of the library ``tokenizers`` says.
        vocabulary: of "words": all of them.
        file: of "words", in place of a vocabulary: a text file whose words are it; of "file": the ``tokenizer.json``.
        truncate: whether texts of more than ``length`` tokens are cut off, or refused.
        code_channels: channels of the latent its code fills; None: as many as give each position orthogonal codes of
            its tokens, up to 32 numbers a position.
        loss_weight: λ of its part of L2.
        snr_clamp: λ_t = loss_weight · clamp(SNR_t, low, high). Uniform in t by default, as of labels.
        field: the data set's field of texts; None: the instance's name.
    """

    kind: ClassVar[str] = "text"
    length: int = field(validator=ge(1))
    tokenizer: Literal["bytes", "words", "file"] = field(default="bytes", validator=in_(("bytes", "words", "file")))
    vocabulary: tuple[str, ...] = field(default=())
    file: Path | None = None
    truncate: bool = False
    code_channels: int | None = field(default=None, validator=optional(ge(1)))
    loss_weight: float = field(default=0.3, validator=gt(0.0))
    snr_clamp: tuple[float, float] = field(default=(1.0, 1.0), validator=low_before_high)
    field: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.tokenizer == "bytes" and (self.vocabulary or self.file):
            given = "vocabulary" if self.vocabulary else "file"
            raise ValueError(
                f'{given}: tokenizer = "bytes" needs none; set tokenizer = "words" or "file", or remove it'
            )
        if self.tokenizer == "words" and bool(self.vocabulary) == bool(self.file):
            found = "both" if self.file else "neither"
            raise ValueError(
                f'tokenizer = "words" takes its words from either vocabulary = [...] or file = "texts.txt", '
                f"found {found}"
            )
        if self.tokenizer == "file" and (self.file is None or self.vocabulary):
            raise ValueError(
                'tokenizer = "file" needs the path of a tokenizer.json, file = "...", and no vocabulary, which it holds'
            )
        if self.vocabulary:
            WordTokenizer(self.vocabulary)

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: if its file cannot be read, or its library is not installed.
        """
        if self.tokenizer == "bytes":
            return ByteTokenizer()
        if self.file is None:
            return WordTokenizer(self.vocabulary)
        return WordTokenizer.learned(self.file) if self.tokenizer == "words" else FileTokenizer(self.file)

    def latent_channels(self, height: int, width: int) -> int:
        if self.code_channels is not None:
            return self.code_channels
        tokens = self.make_tokenizer().size + 1
        numbers = max(min(tokens, _CODE), math.ceil(math.log2(tokens)))
        return -(-self.length * numbers // (height * width))

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        tokenizer = self.make_tokenizer()
        tokens = tokenizer.size + 1
        return TextModality(
            TextEncoder(latent, self.length, tokens),
            TextDecoder(features, latent, self.length, tokens),
            self,
            tokenizer,
        )


@hookimpl
def mtdiffusion_modalities() -> list[type]:
    return [TextConfig]
