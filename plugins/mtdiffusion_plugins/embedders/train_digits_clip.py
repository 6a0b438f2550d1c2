"""Trains ``builtin:digits``, a small open_clip model of the digits' pictures and captions, in about a minute on a CPU.

Run as ``python -m mtdiffusion_plugins.embedders.train_digits_clip --out FOLDER``. Only the training split is seen; the
accuracies that are printed, and kept in the configuration file, are those on the test split.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
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
from mtdiffusion_plugins.embedders.open_clip import CompactTokenizer, ImageEmbedder, build_model, embedder_of

CONTEXT = 12
NAME = "digits_clip"


def every_caption() -> list[str]:
    """All captions there are, by template, number, weight and slant, the last varying fastest."""
    return [
        caption(template, number, weight, slant)
        for template in range(len(TEMPLATES))
        for number in range(len(NUMBERS))
        for weight in range(len(WEIGHTS))
        for slant in range(len(SLANTS))
    ]


def describe() -> dict[str, Any]:
    """The model's configuration: open_clip's format, and the vocabulary of the digits' captions."""
    from open_clip.tokenizer import SimpleTokenizer

    # 0 pads, and is among them: every caption is shorter than the context.
    vocabulary = SimpleTokenizer(context_length=CONTEXT)(every_caption()).unique().tolist()
    return {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": NATIVE_SIZE, "patch_size": 2, "width": 64, "head_width": 16, "layers": 4},
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(vocabulary),
                "width": 64,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"mean": [0.3] * 3, "std": [0.4] * 3, "interpolation": "bilinear"},
        "vocabulary": vocabulary,
    }


def attributes(data: TensorDataset) -> Tensor:
    """Label, weight and slant of every digit: int64 ``[B, 3]``."""
    image, label = data.fields["image"], data.fields["label"]
    assert isinstance(image, Tensor) and isinstance(label, Tensor)
    weight, slant = handwriting(image[:, 0] * 0.5 + 0.5, label)
    return torch.stack((label, weight, slant), dim=1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image ``[B, 1, s, s]`` by up to a pixel either way, and add some noise."""
    batch, _, size, _ = images.shape
    shifts = torch.randint(3, (2, batch, 1), generator=generator) + torch.arange(size)
    padded = pad(images[:, 0], (1, 1, 1, 1), value=-1.0)
    shifted = padded[torch.arange(batch)[:, None, None], shifts[0][:, :, None], shifts[1][:, None, :]]
    noise = torch.randn(shifted.shape, generator=generator)
    return (shifted + 0.15 * noise).clamp(-1, 1)[:, None]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, matches: Tensor) -> Tensor:
    """CLIP's loss for unit embeddings ``[B, D]`` where more than one caption suits an image: ``matches [B, B]``.

    Captions repeat within a batch, so the targets are spread evenly over all that match.
    """
    logits = scale * image @ text.T
    target = matches.to(logits.dtype)
    by_image = cross_entropy(logits, target / target.sum(dim=1, keepdim=True))
    by_text = cross_entropy(logits.T, (target / target.sum(dim=0)).T)
    return (by_image + by_text) / 2


def train(steps: int = 600, batch: int = 128, seed: int = 0, report: int = 100) -> ImageEmbedder:
    """Train on the training split. The same seed gives the same weights on the same machine and number of threads.

    Args:
        report: print the loss every so many steps; 0 for never.
    """
    data = DigitsConfig().build("train")
    assert isinstance(data, TensorDataset)
    images, truth = data.fields["image"], attributes(data)
    assert isinstance(images, Tensor)

    description = describe()
    tokens = CompactTokenizer(description["vocabulary"], CONTEXT)(every_caption())
    tokens = tokens.reshape(len(TEMPLATES), len(NUMBERS), len(WEIGHTS), len(SLANTS), CONTEXT)
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
        template = torch.randint(len(TEMPLATES), (batch,), generator=generator)
        what = truth[chosen]
        plain = template == 0
        same = what[:, None] == what
        matches = same[..., 0] & (plain | same[..., 1:].all(dim=-1))

        image = model.encode_image(embedder.preprocess(augment(images[chosen], generator)))
        text = model.encode_text(tokens[template, *what.unbind(dim=1)])
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(normalize(image, dim=1), normalize(text, dim=1), scale, matches)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report and step % report == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    return embedder_of(model, description)


def evaluate(embedder: ImageEmbedder) -> dict[str, float]:
    """Zero-shot accuracies on the test split.

    ``label`` picks among the captions "a handwritten zero", ...; ``weight`` and ``slant`` among the captions that say
    how the (known) digit is written.
    """
    data = DigitsConfig().build("test")
    assert isinstance(data, TensorDataset)
    images, truth = data.fields["image"], attributes(data)
    assert isinstance(images, Tensor)
    codes = embedder.embed(images)

    prompts = embedder.embed_text([caption(0, number, 0, 0) for number in range(len(NUMBERS))])
    label = (codes @ prompts.T).argmax(dim=1)
    prompts = embedder.embed_text(every_caption()).reshape(len(TEMPLATES), len(NUMBERS), -1, embedder.dim)
    manner = torch.einsum("bd,tbmd->bm", codes, prompts[1:, truth[:, 0]]).argmax(dim=1)
    return {
        "label": (label == truth[:, 0]).double().mean().item(),
        "weight": (manner // len(SLANTS) == truth[:, 1]).double().mean().item(),
        "slant": (manner % len(SLANTS) == truth[:, 2]).double().mean().item(),
    }


def save(embedder: ImageEmbedder, accuracy: dict[str, float], folder: Path) -> None:
    """Write ``digits_clip.safetensors`` and ``digits_clip.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(embedder.model.state_dict(), folder / f"{NAME}.safetensors")
    description = describe() | {"zero_shot_test_accuracy": {name: round(value, 4) for name, value in accuracy.items()}}
    (folder / f"{NAME}.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the configuration")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    embedder = train(steps=arguments.steps, seed=arguments.seed)
    accuracy = evaluate(embedder)
    save(embedder, accuracy, arguments.out)
    print(f"{time.perf_counter() - start:.0f} s; zero-shot accuracy on the test split:")
    print("\n".join(f"  {name:8}{value:.4f}" for name, value in accuracy.items()))


if __name__ == "__main__":
    main()
