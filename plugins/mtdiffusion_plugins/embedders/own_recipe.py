"""How an embedder of a person's own data is made: from pictures with captions, or with classes that have names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import normalize

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins.embedders.open_clip import ImageEmbedder
from mtdiffusion_plugins.embedders.recipes import Recipe
from mtdiffusion_registry.config import load_toml, structure
from mtdiffusion_registry.configs import DatasetConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.registry import Registry

TEMPLATES = ("{}", "a picture of {}", "a small picture of {}", "this is {}")
"""What is said of a picture of a class."""
_COMPARED = 1000  # pictures and captions of the test split among which each looks for its own
_CHUNK = 256  # pictures embedded at a time
_PATCHES = 8  # along a picture's shorter side: an eighth of it is what a patch sees


@frozen
class _Data:
    data: DatasetConfig


def recipe_of(path: Path, registry: Registry, image: str = "image", text: str | None = None) -> Recipe:
    """How an embedder of the data that a configuration names is made.

    Args:
        path: a TOML file with the table ``data``; its modality of classes says what they are called.
        image: the field of pictures, all of one size.
        text: the field of captions, or of classes; None: "caption", or else "label".

    Raises:
        UserError: if there is no such field, or if it holds neither texts nor classes with names.
    """
    tables = load_toml(path)
    if "data" not in tables:
        raise UserError(f"{path}: expected a table [data], which says where the pictures are, found none")
    data = structure(registry, {"data": tables["data"]}, _Data, path).data
    first = data.build("train")[0]
    text = text or ("caption" if "caption" in first else "label")
    for name in (image, text):
        if name not in first:
            raise UserError(f"{path}: expected samples with a field {name!r}, found {', '.join(sorted(first))}")
    picture = first[image]
    if not isinstance(picture, Tensor) or picture.ndim != 3:
        raise UserError(f"{path}: expected pictures in the field {image!r}, found something else")
    names = None if isinstance(first[text], str) else _class_names(path, tables, text)
    height, width = picture.shape[1:]

    def captions(split: Dataset) -> list[list[str]]:
        return [_said(sample[text], names) for sample in _samples(split.without([image]))]

    return Recipe(
        data=data.reading([image, text]),
        captions=captions,
        evaluate=lambda embedder: _evaluate(embedder, data.build("test"), image, text, names),
        embed_dim=64,
        vision={
            "image_size": [height, width],
            "patch_size": max(min(height, width) // _PATCHES, 2),
            "width": 64,
            "head_width": 16,
            "layers": 4,
            "pool_type": "avg",
        },
        text={"context_length": 40 if names is None else 16, "width": 64, "heads": 4, "layers": 2},
        preprocess={"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"},
        shift=max(min(height, width) // 16, 1),
        flip=names is not None,  # captions may say left and right
        compact=names is not None,  # and held-out ones words of their own
        noise=0.0,
        steps=2500,
        dtype=torch.float16,
        image=image,
    )


def _class_names(path: Path, tables: Mapping[str, Any], field: str) -> Sequence[str]:
    """What the configuration's modality of a field calls its classes."""
    for name, table in tables.get("modalities", {}).items():
        if table.get("field", name) == field and table.get("names"):
            return [str(each) for each in table["names"]]
    raise UserError(
        f"{path}: the field {field!r} holds classes by number, and no modality says what they are called; give the "
        f"modality {field!r} names, or --text a field of captions"
    )


def _said(value: Tensor | str, names: Sequence[str] | None) -> list[str]:
    """The captions of a sample: its own, or what is said of its class."""
    if isinstance(value, str) or names is None:
        return [str(value)]
    return [template.format(names[int(value)]) for template in TEMPLATES]


def _samples(data: Dataset) -> Iterator[dict[str, Tensor | str]]:
    return (data[index] for index in range(len(data)))


def _evaluate(
    embedder: ImageEmbedder, data: Dataset, image: str, text: str, names: Sequence[str] | None
) -> dict[str, float]:
    """Of classes the zero-shot accuracy, by the mean embedding of what is said of each; of captions, how often a
    picture's own is the nearest, or among the five nearest, of those of a thousand held-out pictures."""
    if names is not None:
        prompts = embedder.embed_text([template.format(name) for name in names for template in TEMPLATES])
        classes = normalize(prompts.reshape(len(names), len(TEMPLATES), -1).mean(1), dim=1)
        right = 0
        for start in range(0, len(data), _CHUNK):
            samples = [data[index] for index in range(start, min(start + _CHUNK, len(data)))]
            codes = embedder.embed(torch.stack([sample[image] for sample in samples]))  # type: ignore[misc]
            truth = torch.stack([sample[text] for sample in samples])  # type: ignore[misc]
            right += int(((codes @ classes.T).argmax(1) == truth).sum())
        return {"class": right / len(data)}
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:_COMPARED]
    samples = [data[index] for index in chosen.tolist()]
    said = [str(sample[text]) for sample in samples]
    codes = embedder.embed(torch.stack([sample[image] for sample in samples]))  # type: ignore[misc]
    similarity = codes @ embedder.embed_text(said).T
    own = torch.tensor([[one == other for other in said] for one in said])  # captions may repeat
    nearer = (similarity > similarity.masked_fill(~own, -2).amax(1, keepdim=True)).sum(1)
    return {f"image_to_text_at_{k}": (nearer < k).double().mean().item() for k in (1, 5)}
