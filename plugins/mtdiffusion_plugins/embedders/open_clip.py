"""Frozen open_clip models that embed images and captions as unit vectors of one space."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from mtdiffusion_registry.errors import UserError, did_you_mean, first_line

WEIGHTS = Path(__file__).parents[1] / "weights"
BUILTIN = {f"builtin:{data}": WEIGHTS / f"{data}_clip" for data in ("digits", "shapes", "scenes")}
"""The models that we ship: each a ``.json`` and a ``.safetensors`` file, made by :mod:`.train_clip`."""

_HUB = "hf-hub:"

Tokenizer = Callable[[list[str]], Tensor]


@frozen
class Preprocessing:
    """What an image tower wants to see: pictures of ``size`` (h, w), in [0, 1] before they are normalised.

    ``crop``: whether a picture is scaled by its shorter side and cropped, or else squashed.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop: bool

    @classmethod
    def of(cls, model: Any) -> Preprocessing:
        """What open_clip noted on a model that it made."""
        cfg = model.visual.preprocess_cfg
        size = cfg["size"]
        return cls(
            size=(size, size) if isinstance(size, int) else tuple(size),
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            interpolation="bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
            crop=cfg["resize_mode"] == "shortest",
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``[B, 1 or 3, h, w]`` in [−1, 1] to the tower's input ``[B, 3, *size]``."""
        pixels = (images * 0.5 + 0.5).expand(-1, 3, -1, -1)
        if pixels.shape[-2:] != self.size:
            (height, width), (high, wide) = self.size, pixels.shape[-2:]
            shape = self.size
            if self.crop:  # rounded as torchvision rounds, which open_clip resizes with
                shape = (
                    (height, wide * height // high) if wide * height >= high * width else (high * width // wide, width)
                )
            # A bicubic filter overshoots.
            pixels = interpolate(pixels, size=shape, mode=self.interpolation, antialias=True).clamp(0, 1)
            top, left = round((shape[0] - height) / 2), round((shape[1] - width) / 2)
            pixels = pixels[..., top : top + height, left : left + width]
        mean, std = pixels.new_tensor(self.mean), pixels.new_tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]


class ImageEmbedder:
    """A frozen open_clip model. Not an ``nn.Module``, so that its weights stay out of the checkpoints of its users.

    Attributes:
        dim: D, the width of the embeddings.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocessing, make_tokenizer: Callable[[], Tokenizer]) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self._make_tokenizer = make_tokenizer
        self.dim = self.embed(torch.zeros(1, 3, *preprocess.size)).shape[1]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Captions to tokens ``[B, context]``; made when it is first needed."""
        return self._make_tokenizer()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def to(self, device: torch.device | str) -> ImageEmbedder:
        """Move to a device, in place."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def embed(self, images: Tensor, batch: int = 256) -> Tensor:
        """Unit embeddings ``[B, D]`` of images ``[B, 1 or 3, h, w]`` in [−1, 1], on the images' device.

        Raises:
            ValueError: if the images have another shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be [B, 1 or 3, h, w], got {list(images.shape)}")
        if not len(images):
            return images.new_zeros(0, self.dim)
        parts = torch.split(images, batch)
        codes = [self.model.encode_image(self.preprocess(part.to(self.device))) for part in parts]
        return normalize(torch.cat(codes).to(images.device, torch.float32), dim=1)

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str], batch: int = 256) -> Tensor:
        """Unit embeddings ``[len(captions), D]`` of captions, on the model's device.

        Raises:
            UserError: if the model cannot read a caption.
        """
        if not len(captions):
            return torch.zeros(0, self.dim, device=self.device)
        tokens = self.tokenizer(list(captions)).to(self.device)
        codes = [self.model.encode_text(part) for part in torch.split(tokens, batch)]
        return normalize(torch.cat(codes).to(torch.float32), dim=1)


class CompactTokenizer:
    """open_clip's tokenizer over few words: ``vocabulary`` lists the tokens in use, in ascending order.

    A model of a narrow subject then has an embedding table of some dozen rows, not 49,408. The order is kept, so the
    end token remains the largest, which is how open_clip finds it.
    """

    def __init__(self, vocabulary: Sequence[int], context: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._tokenize = SimpleTokenizer(context_length=context)
        self._vocabulary = torch.tensor(vocabulary)

    def __call__(self, captions: list[str]) -> Tensor:
        """Tokens int64 ``[B, context]``, the end token cut off where a caption is too long, as open_clip does.

        Raises:
            UserError: if a caption has a word that is not in the vocabulary.
        """
        tokens: Tensor = self._tokenize(captions)
        known = torch.isin(tokens, self._vocabulary).all(dim=1)
        if not known.all():
            raise UserError(f"this text tower does not know every word of {captions[int((~known).nonzero()[0])]!r}")
        return torch.searchsorted(self._vocabulary, tokens)


def load_embedder(model: str, pretrained: str | None = None, checkpoint: str | None = None) -> ImageEmbedder:
    """A frozen embedder; there is always just one source of weights, and never random ones.

    Args:
        model: a name in BUILTIN, the name of an open_clip architecture, ``hf-hub:OWNER/NAME``, or the path of a model's
            JSON configuration.
        pretrained: the tag of open_clip's weights for that architecture, downloaded on first use.
        checkpoint: a file of weights instead; beside a tag it holds that tag's weights, and pictures are prepared as
            for the tag.

    Raises:
        UserError: if the model, the tag or a file is not known, or if weights cannot be had or do not fit.
    """
    if model in BUILTIN:
        if pretrained or checkpoint:
            raise UserError(f"{model} comes with its weights: leave out pretrained and checkpoint")
        stem = BUILTIN[model]
        return _from_files(stem.with_suffix(".json"), stem.with_suffix(".safetensors"))
    if model.startswith("builtin:"):
        raise UserError(f"no embedder {model!r}; there is {', '.join(BUILTIN)}")
    if model.startswith(_HUB):
        if pretrained or checkpoint:
            raise UserError(f"{model} comes with its weights: leave out pretrained and checkpoint")
        return _from_open_clip(model, None, None)
    if pretrained is None and checkpoint is None:
        raise UserError(f"embedder {model!r} needs its weights from pretrained or checkpoint, found neither")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise UserError(f"checkpoint {checkpoint} of embedder {model!r} does not exist")
    if checkpoint is not None and model.endswith(".json"):
        if pretrained:
            raise UserError(f"{model} says how pictures are prepared: leave out pretrained, found {pretrained!r}")
        return _from_files(Path(model), Path(checkpoint))
    return _from_open_clip(model, pretrained, checkpoint)


def _from_open_clip(model: str, pretrained: str | None, checkpoint: str | None) -> ImageEmbedder:
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import merge_preprocess_dict

    if not model.startswith(_HUB) and model not in open_clip.list_models():
        near = did_you_mean(model, open_clip.list_models())
        raise UserError(f"open_clip has no model {model!r}{near} (open_clip.list_models() has them all)")
    tag: dict[str, Any] = {}
    if pretrained is not None:
        tags = open_clip.list_pretrained_tags_by_model(model)
        if pretrained not in tags:
            raise UserError(f"open_clip has no weights {pretrained!r} for {model}; it has: {', '.join(tags) or 'none'}")
        tag = open_clip.pretrained.get_pretrained_cfg(model, pretrained)
    # Only warned of by open_clip: with the wrong activation the embeddings are subtly bad.
    quick_gelu = bool(tag.get("quick_gelu", False))
    try:
        with torch.random.fork_rng(devices=[]):
            network = open_clip.create_model(
                model, pretrained=checkpoint or pretrained, require_pretrained=True, force_quick_gelu=quick_gelu
            )
    except Exception as error:  # downloads and checkpoints fail in ways that no list covers
        if checkpoint is not None:
            raise UserError(f"cannot load {checkpoint} as {model}: {error}") from error
        if model.startswith(_HUB):
            raise UserError(
                f"cannot get {model}: {first_line(error)}. Run this once where there is a network, or fetch it there "
                f"(hf download {model.removeprefix(_HUB)} --local-dir FOLDER) and set model to the file "
                "open_clip_config.json of the folder, checkpoint to open_clip_model.safetensors"
            ) from error
        raise UserError(
            f"cannot get the weights {pretrained!r} of {model}: {error}. Run this once where there is a network, or "
            "copy the weights here and give their file as checkpoint, beside pretrained"
        ) from error
    if checkpoint is not None:  # of which open_clip does not know how its pictures were prepared
        set_model_preprocess_cfg(network, merge_preprocess_dict(network.visual.preprocess_cfg, tag))
    return ImageEmbedder(network, Preprocessing.of(network), lambda: _open_clip_tokenizer(model))


def _open_clip_tokenizer(model: str) -> Tokenizer:
    import open_clip

    try:
        tokenizer: Tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # some tokenizers are downloaded too
        raise UserError(f"cannot get the tokenizer of {model}: {error}") from error
    return tokenizer


def _from_files(config: Path, weights: Path) -> ImageEmbedder:
    from open_clip.factory import load_checkpoint

    try:
        description = json.loads(config.read_text(encoding="utf-8"))
        network = build_model(description)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read the embedder's configuration {config}: {error}") from error
    try:
        load_checkpoint(network, str(weights))
    except Exception as error:  # whatever a broken or foreign file makes torch or safetensors say
        raise UserError(f"cannot load {weights} as the model of {config}: {error}") from error
    return embedder_of(network, description)


def build_model(description: dict[str, Any]) -> nn.Module:
    """The untrained model of a configuration in open_clip's format: ``{"model_cfg": ..., "preprocess_cfg": ...}``."""
    from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    cfg = dict(description["model_cfg"])
    tower = CustomTextCLIP if cfg.pop("custom_text", False) else CLIP
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = tower(**cfg)
    given = description.get("preprocess_cfg", {})
    preprocess = merge_preprocess_dict(vars(PreprocessCfg()), {"size": cfg["vision_cfg"]["image_size"], **given})
    set_model_preprocess_cfg(model, preprocess)
    return model


def embedder_of(model: nn.Module, description: dict[str, Any]) -> ImageEmbedder:
    """An embedder of a model that :func:`build_model` made from this description.

    With an entry ``vocabulary``, captions are read by a :class:`CompactTokenizer`.
    """
    context = description["model_cfg"]["text_cfg"].get("context_length", 77)

    def make_tokenizer() -> Tokenizer:
        from open_clip.tokenizer import SimpleTokenizer

        if "vocabulary" in description:
            return CompactTokenizer(description["vocabulary"], context)
        tokenizer: Tokenizer = SimpleTokenizer(context_length=context)
        return tokenizer

    return ImageEmbedder(model, Preprocessing.of(model), make_tokenizer)
