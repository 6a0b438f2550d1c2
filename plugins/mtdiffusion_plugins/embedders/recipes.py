"""What the built-in embedders are trained on, and how it is known what they have learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion_plugins.datasets import scenes
from mtdiffusion_plugins.datasets._tensors import TensorDataset
from mtdiffusion_plugins.datasets.digits import (
    NATIVE_SIZE,
    NUMBERS,
    SLANTS,
    TEMPLATES,
    WEIGHTS,
    DigitsConfig,
    caption,
    handwriting,
)
from mtdiffusion_plugins.datasets.shapes import COLOURS, PLACES, SHAPES, ShapesConfig
from mtdiffusion_plugins.embedders.open_clip import ImageEmbedder
from mtdiffusion_registry.configs import DatasetConfig


@frozen(kw_only=True)
class Recipe:
    """How an embedder is made.

    Attributes:
        data: the data set.
        captions: what may be said of each sample: a list a sample, all of one length. A sample matches a caption if it
            is among its own; another sample may share it.
        evaluate: accuracies on the test split, by name.
        embed_dim, vision, text: open_clip's; the vocabulary's size is added.
        preprocess: open_clip's mean, standard deviation and interpolation.
        shift: by how many pixels pictures are shifted at most.
        flip: whether half of them are mirrored left to right.
        noise: standard deviation of the noise that is added to pictures in [−1, 1].
        steps, batch: of the training.
        image: the field of pictures, all of one size.
        compact: whether the text tower knows no other words than the captions'.
        dtype: that the weights are rounded to, and kept in.
    """

    data: DatasetConfig
    captions: Callable[[Any], list[list[str]]]
    evaluate: Callable[[ImageEmbedder], dict[str, float]]
    embed_dim: int
    vision: dict[str, Any]
    text: dict[str, Any]
    preprocess: dict[str, Any]
    shift: int
    noise: float
    steps: int
    batch: int = 128
    dtype: torch.dtype = torch.float32
    image: str = "image"
    flip: bool = False
    compact: bool = True


def columns(config: DatasetConfig, split: Literal["train", "test"]) -> tuple[TensorDataset, Tensor]:
    """A split of a built-in data set, and its images ``[N, C, h, w]``."""
    data = config.build(split)
    assert isinstance(data, TensorDataset)
    return data, data.tensor("image")


# Digits.


def attributes(data: TensorDataset) -> Tensor:
    """Label, weight and slant of every digit: int64 ``[B, 3]``."""
    image, label = data.tensor("image"), data.tensor("label")
    weight, slant = handwriting(image[:, 0] * 0.5 + 0.5, label)
    return torch.stack((label, weight, slant), dim=1)


def digits_captions(data: TensorDataset) -> list[list[str]]:
    """Each digit in every template."""
    return [[caption(template, *row) for template in range(len(TEMPLATES))] for row in attributes(data).tolist()]


def evaluate_digits(embedder: ImageEmbedder) -> dict[str, float]:
    """Zero-shot accuracies on the test split.

    ``label`` picks among the captions "a handwritten zero", ...; ``weight`` and ``slant`` among the captions that say
    how the (known) digit is written.
    """
    data, images = columns(DigitsConfig(), "test")
    truth = attributes(data)
    codes = embedder.embed(images)

    prompts = embedder.embed_text([caption(0, number, 0, 0) for number in range(len(NUMBERS))])
    label = (codes @ prompts.T).argmax(dim=1)
    told = [
        caption(template, number, weight, slant)
        for template in range(1, len(TEMPLATES))
        for number in range(len(NUMBERS))
        for weight in range(len(WEIGHTS))
        for slant in range(len(SLANTS))
    ]
    prompts = embedder.embed_text(told).reshape(len(TEMPLATES) - 1, len(NUMBERS), -1, embedder.dim)
    manner = torch.einsum("bd,tbmd->bm", codes, prompts[:, truth[:, 0]]).argmax(dim=1)
    return {
        "label": (label == truth[:, 0]).double().mean().item(),
        "weight": (manner // len(SLANTS) == truth[:, 1]).double().mean().item(),
        "slant": (manner % len(SLANTS) == truth[:, 2]).double().mean().item(),
    }


# Shapes.


def shapes_captions(data: TensorDataset) -> list[list[str]]:
    """Of each scene its large shape's kind, also with its place, its colour or both, and the whole caption.

    The data set's captions are whole ones only. The shorter ones let a caption that leaves things open find a scene.
    """
    rows = []
    for whole in data.fields["caption"]:
        assert isinstance(whole, str)
        large = whole.split(",")[0].split(" and ")[0]  # "a large red circle at the top left"
        _, _, colour, kind, place = large.split(" ", 4)
        rows.append([f"a large {kind}", f"a large {kind} {place}", f"a large {colour} {kind}", large, whole])
    return rows


def share_right(embedder: ImageEmbedder, codes: Tensor, candidates: list[list[str]], truth: list[str]) -> float:
    """The share of pictures' codes ``[N, D]`` whose nearest caption, among a list of their own, is the true one."""
    prompts = sorted({prompt for each in candidates for prompt in each})
    number = {prompt: index for index, prompt in enumerate(prompts)}
    indices = torch.tensor([[number[prompt] for prompt in each] for each in candidates])
    scores = (codes @ embedder.embed_text(prompts).T).gather(1, indices)
    picked = scores.argmax(dim=1).tolist()
    return sum(each[k] == right for each, k, right in zip(candidates, picked, truth, strict=True)) / len(truth)


def retrieval(embedder: ImageEmbedder, codes: Tensor, captions: list[str]) -> dict[str, float]:
    """How often a picture's caption, or a picture of that caption, is among the k nearest of all: k of 1 and 5.

    Args:
        codes: of the pictures, ``[N, D]``.
        captions: of the pictures. Captions that repeat are one another's.
    """
    similarity = codes @ embedder.embed_text(captions).T
    same = torch.tensor([[caption == other for other in captions] for caption in captions])
    found: dict[str, float] = {}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        nearer = (scores > scores.masked_fill(~same, -2).amax(dim=1, keepdim=True)).sum(dim=1)
        found |= {f"{name}_at_{k}": (nearer < k).double().mean().item() for k in (1, 5)}
    return found


def evaluate_shapes(embedder: ImageEmbedder, size: int = 16) -> dict[str, float]:
    """Zero-shot accuracies on the test scenes by day, at ``size`` pixels.

    ``label`` picks among the captions "a large circle", ...; ``colour`` and ``place`` among those that say it of the
    (known) large shape. ``image_to_text_at_k`` and ``text_to_image_at_k`` are retrieval from the whole split.
    """
    data, images = columns(ShapesConfig(size=size), "test")
    label = data.tensor("label")
    codes = embedder.embed(images)
    rows = shapes_captions(data)
    kinds = [f"a large {kind}" for kind in SHAPES]
    colours = [[f"a large {colour} {row[0].split()[-1]}" for colour in COLOURS] for row in rows]
    places = [[f"{row[0]} {place}" for place in PLACES] for row in rows]
    return {
        "label": share_right(embedder, codes, [kinds] * len(rows), [kinds[index] for index in label.tolist()]),
        "colour": share_right(embedder, codes, colours, [row[2] for row in rows]),
        "place": share_right(embedder, codes, places, [row[1] for row in rows]),
    } | retrieval(embedder, codes, [row[-1] for row in rows])


# Scenes.


def scenes_captions(data: TensorDataset) -> list[list[str]]:
    """Of each scene what it shows, also with its colour or the time of day, and the whole caption."""
    rows = []
    for whole in data.fields["caption"]:
        assert isinstance(whole, str)
        _, size, colour, thing, *_ = whole.split()
        time = " ".join(whole.split()[-2:])
        rows.append([f"a {thing}", f"a {colour} {thing}", f"a {thing} {time}", f"a {size} {colour} {thing}", whole])
    return rows


def evaluate_scenes(embedder: ImageEmbedder, size: int = 32) -> dict[str, float]:
    """Zero-shot accuracies on the test scenes, at ``size`` pixels.

    ``label`` picks among the captions "a house", ...; ``colour`` and ``time`` among those that say it of the (known)
    thing. ``image_to_text_at_k`` and ``text_to_image_at_k`` are retrieval from the whole split.
    """
    data, images = columns(scenes.ScenesConfig(size=size), "test")
    codes = embedder.embed(images)
    rows = scenes_captions(data)
    things = [f"a {thing}" for thing in scenes.THINGS]
    colours = [[f"a {colour} {row[0].split()[-1]}" for colour in scenes.COLOURS] for row in rows]
    times = [[f"{row[0]} {time}" for time in scenes.TIMES] for row in rows]
    return {
        "label": share_right(embedder, codes, [things] * len(rows), [row[0] for row in rows]),
        "colour": share_right(embedder, codes, colours, [row[1] for row in rows]),
        "time": share_right(embedder, codes, times, [row[2] for row in rows]),
    } | retrieval(embedder, codes, [row[-1] for row in rows])


RECIPES = {
    "digits": Recipe(
        data=DigitsConfig(),
        captions=digits_captions,
        evaluate=evaluate_digits,
        embed_dim=32,
        vision={"image_size": NATIVE_SIZE, "patch_size": 2, "width": 64, "head_width": 16, "layers": 4},
        text={"context_length": 12, "width": 64, "heads": 4, "layers": 2},
        preprocess={"mean": [0.3] * 3, "std": [0.4] * 3, "interpolation": "bilinear"},
        shift=1,
        noise=0.15,
        steps=600,
        dtype=torch.float16,
    ),
    "shapes": Recipe(
        data=ShapesConfig(size=16, count=16000),
        captions=shapes_captions,
        evaluate=evaluate_shapes,
        embed_dim=64,
        vision={
            "image_size": 16,
            "patch_size": 4,
            "width": 64,
            "head_width": 16,
            "layers": 4,
            "pool_type": "avg",
        },
        text={"context_length": 28, "width": 64, "heads": 4, "layers": 2},
        preprocess={"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"},
        shift=0,  # captions say where things are
        noise=0.05,
        steps=1500,
        dtype=torch.float16,
    ),
    "scenes": Recipe(
        data=scenes.ScenesConfig(count=8000),
        captions=scenes_captions,
        evaluate=evaluate_scenes,
        embed_dim=32,
        vision={
            "image_size": 32,
            "patch_size": 8,
            "width": 64,
            "head_width": 16,
            "layers": 3,
            "pool_type": "avg",
        },
        text={"context_length": 14, "width": 48, "heads": 4, "layers": 2},
        preprocess={"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"},
        shift=0,  # captions say where things are
        noise=0.05,
        steps=1000,
        dtype=torch.float16,
    ),
}
"""The built-in embedders, by data set."""
