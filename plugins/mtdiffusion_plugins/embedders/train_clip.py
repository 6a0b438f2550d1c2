"""Trains a built-in embedder: a small open_clip model of a data set's pictures and captions, in minutes on a CPU.

Run as ``python -m mtdiffusion_plugins.embedders.train_clip digits|shapes --out FOLDER``. Only the training split is
seen; the accuracies that are printed, and kept in the configuration file, are those on the test split.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import frozen
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad

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
from mtdiffusion_plugins.embedders.open_clip import CompactTokenizer, ImageEmbedder, build_model, embedder_of
from mtdiffusion_registry.configs import DatasetConfig


@frozen(kw_only=True)
class Recipe:
    """How one built-in embedder is made.

    Attributes:
        data: the data set, a :class:`TensorDataset` with the field ``image``.
        captions: what may be said of each sample: a list a sample, all of one length. A sample matches a caption if it
            is among its own; another sample may share it.
        evaluate: accuracies on the test split, by name.
        embed_dim, vision, text: open_clip's; the vocabulary's size is added.
        preprocess: open_clip's mean, standard deviation and interpolation.
        shift: by how many pixels pictures are shifted at most.
        noise: standard deviation of the noise that is added to pictures in [−1, 1].
        steps, batch: of the training.
        dtype: that the weights are rounded to, and kept in.
    """

    data: DatasetConfig
    captions: Callable[[TensorDataset], list[list[str]]]
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


def columns(config: DatasetConfig, split: Literal["train", "test"]) -> tuple[TensorDataset, Tensor]:
    """A split of a built-in data set, and its images ``[N, C, h, w]``."""
    data = config.build(split)
    assert isinstance(data, TensorDataset)
    images = data.fields["image"]
    assert isinstance(images, Tensor)
    return data, images


# Digits.


def attributes(data: TensorDataset) -> Tensor:
    """Label, weight and slant of every digit: int64 ``[B, 3]``."""
    image, label = data.fields["image"], data.fields["label"]
    assert isinstance(image, Tensor) and isinstance(label, Tensor)
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


def evaluate_shapes(embedder: ImageEmbedder, size: int = 16) -> dict[str, float]:
    """Zero-shot accuracies on the test scenes by day, at ``size`` pixels.

    ``label`` picks among the captions "a large circle", ...; ``colour`` and ``place`` among those that say it of the
    (known) large shape. ``image_to_text_at_k`` and ``text_to_image_at_k`` are retrieval from the whole split: how often
    a scene's whole caption, or a scene of that caption, is among the k nearest.
    """
    data, images = columns(ShapesConfig(size=size), "test")
    label = data.fields["label"]
    assert isinstance(label, Tensor)
    codes = embedder.embed(images)
    rows = shapes_captions(data)
    text = embedder.embed_text([row[-1] for row in rows])
    similarity = codes @ text.T

    def share_right(candidates: list[list[str]], truth: list[str]) -> float:
        """Of the codes whose nearest caption, among a list of their own, is the true one."""
        prompts = sorted({prompt for each in candidates for prompt in each})
        number = {prompt: index for index, prompt in enumerate(prompts)}
        indices = torch.tensor([[number[prompt] for prompt in each] for each in candidates])
        scores = (codes @ embedder.embed_text(prompts).T).gather(1, indices)
        picked = scores.argmax(dim=1).tolist()
        return sum(each[k] == right for each, k, right in zip(candidates, picked, truth, strict=True)) / len(truth)

    kinds = [f"a large {kind}" for kind in SHAPES]
    found = {
        "label": share_right([kinds] * len(rows), [kinds[index] for index in label.tolist()]),
        "colour": share_right(
            [[f"a large {colour} {row[0].split()[-1]}" for colour in COLOURS] for row in rows], [row[2] for row in rows]
        ),
        "place": share_right([[f"{row[0]} {place}" for place in PLACES] for row in rows], [row[1] for row in rows]),
    }
    same = torch.tensor([[row[-1] == other[-1] for other in rows] for row in rows])  # captions of one shape repeat
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        nearer = (scores > scores.masked_fill(~same, -2).amax(dim=1, keepdim=True)).sum(dim=1)
        found |= {f"{name}_at_{k}": (nearer < k).double().mean().item() for k in (1, 5)}
    return found


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
}
"""The built-in embedders, by data set."""


def describe(recipe: Recipe, captions: list[str]) -> dict[str, Any]:
    """The model's configuration: open_clip's format, and the vocabulary of these captions."""
    from open_clip.tokenizer import SimpleTokenizer

    # 0 pads, and is among them: every caption is shorter than the context.
    vocabulary = SimpleTokenizer(context_length=recipe.text["context_length"])(captions).unique().tolist()
    text = dict(recipe.text)
    return {
        "model_cfg": {
            "embed_dim": recipe.embed_dim,
            "vision_cfg": dict(recipe.vision),
            "text_cfg": {"context_length": text.pop("context_length"), "vocab_size": len(vocabulary)} | text,
        },
        "preprocess_cfg": dict(recipe.preprocess),
        "vocabulary": vocabulary,
    }


def augment(images: Tensor, generator: torch.Generator, shift: int, noise: float) -> Tensor:
    """Shift each image ``[B, C, s, s]`` by up to ``shift`` pixels either way, −1 coming in, and add some noise."""
    batch, channels, size, _ = images.shape
    shifts = torch.randint(2 * shift + 1, (2, batch, 1), generator=generator) + torch.arange(size)
    padded = pad(images, (shift,) * 4, value=-1.0)
    index = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
    shifted = padded[*index, shifts[0][:, None, :, None], shifts[1][:, None, None, :]]
    return (shifted + noise * torch.randn(shifted.shape, generator=generator)).clamp(-1, 1)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, matches: Tensor) -> Tensor:
    """CLIP's loss for unit embeddings ``[B, D]`` where more than one caption suits an image: ``matches [B, B]``.

    Captions repeat within a batch, so the targets are spread evenly over all that match.
    """
    logits = scale * image @ text.T
    target = matches.to(logits.dtype)
    by_image = cross_entropy(logits, target / target.sum(dim=1, keepdim=True))
    by_text = cross_entropy(logits.T, (target / target.sum(dim=0)).T)
    return (by_image + by_text) / 2


def train(
    recipe: Recipe, *, steps: int | None = None, batch: int | None = None, seed: int = 0, report: int = 100
) -> tuple[ImageEmbedder, dict[str, Any]]:
    """Train on the training split: the embedder, and its configuration.

    The same seed gives the same weights on the same machine and number of threads.

    Args:
        steps, batch: other than the recipe's.
        report: print the loss every so many steps; 0 for never.
    """
    steps, batch = steps or recipe.steps, batch or recipe.batch
    data, images = columns(recipe.data, "train")
    rows = recipe.captions(data)
    captions = list(dict.fromkeys(text for row in rows for text in row))
    number = {text: index for index, text in enumerate(captions)}
    own = torch.tensor([[number[text] for text in row] for row in rows])  # [N, captions a sample]

    description = describe(recipe, captions)
    tokens = CompactTokenizer(description["vocabulary"], recipe.text["context_length"])(captions)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # open_clip draws its initial weights from the global generator
        model: Any = build_model(description)
    embedder = embedder_of(model, description)
    model.train().requires_grad_(True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        said = own[chosen, torch.randint(own.shape[1], (batch,), generator=generator)]
        matches = (own[chosen][:, None, :] == said[:, None]).any(dim=-1)

        pictures = augment(images[chosen], generator, recipe.shift, recipe.noise)
        image = model.encode_image(embedder.preprocess(pictures))
        text = model.encode_text(tokens[said])
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(normalize(image, dim=1), normalize(text, dim=1), scale, matches)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report and step % report == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    # Rounded here, so that what is measured is what is kept.
    return embedder_of(model.to(recipe.dtype).to(torch.float32), description), description


def save(
    embedder: ImageEmbedder, description: dict[str, Any], accuracy: dict[str, float], stem: Path, dtype: torch.dtype
) -> None:
    """Write ``stem.safetensors``, its weights of ``dtype``, and ``stem.json``; make the folder if there is none."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(dtype) for name, weight in embedder.model.state_dict().items()}
    save_file(weights, stem.with_suffix(".safetensors"))
    stated = description | {"zero_shot_test_accuracy": {name: round(value, 4) for name, value in accuracy.items()}}
    stem.with_suffix(".json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=sorted(RECIPES), help="the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the configuration")
    parser.add_argument("--steps", type=int, help="other than the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    recipe = RECIPES[arguments.data]
    embedder, description = train(recipe, steps=arguments.steps, seed=arguments.seed)
    accuracy = recipe.evaluate(embedder)
    save(embedder, description, accuracy, arguments.out / f"{arguments.data}_clip", recipe.dtype)
    print(f"{time.perf_counter() - start:.0f} s; zero-shot accuracy on the test split:")
    print("\n".join(f"  {name:20}{value:.4f}" for name, value in accuracy.items()))


if __name__ == "__main__":
    main()
