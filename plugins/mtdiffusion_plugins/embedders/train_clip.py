"""Trains a small open_clip model of a data set's pictures and captions, in minutes on a CPU.

Run as ``python -m mtdiffusion_plugins.embedders.train_clip digits|shapes|scenes|CONFIG.toml --out FOLDER``: a built-in
embedder anew, or one of the data that a configuration names. Only the training split is seen; the accuracies that are
printed, and kept in the configuration file, are those on the test split.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad

from mtdiffusion_plugins.embedders.open_clip import ImageEmbedder, build_model, embedder_of
from mtdiffusion_plugins.embedders.own_recipe import recipe_of
from mtdiffusion_plugins.embedders.recipes import RECIPES, Recipe
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.registry import Registry


def describe(recipe: Recipe, captions: list[str]) -> dict[str, Any]:
    """The model's configuration: open_clip's format, and the vocabulary of these captions if it is to be compact."""
    from open_clip.tokenizer import SimpleTokenizer

    text = dict(recipe.text)
    tokenizer = SimpleTokenizer(context_length=text["context_length"])
    # 0 pads, and is among them: every caption of a compact recipe is shorter than the context.
    vocabulary = tokenizer(captions).unique().tolist() if recipe.compact else None
    words = tokenizer.vocab_size if vocabulary is None else len(vocabulary)
    description = {
        "model_cfg": {
            "embed_dim": recipe.embed_dim,
            "vision_cfg": dict(recipe.vision),
            "text_cfg": {"context_length": text.pop("context_length"), "vocab_size": words} | text,
        },
        "preprocess_cfg": dict(recipe.preprocess),
    }
    return description if vocabulary is None else description | {"vocabulary": vocabulary}


def augment(images: Tensor, generator: torch.Generator, shift: int, noise: float, flip: bool = False) -> Tensor:
    """Shift each image ``[B, C, h, w]`` by up to ``shift`` pixels either way, −1 coming in, and add some noise.

    With ``flip``, half of them are mirrored left to right.
    """
    batch, channels, height, width = images.shape
    moves = torch.randint(2 * shift + 1, (2, batch, 1), generator=generator)
    down, right = moves[0] + torch.arange(height), moves[1] + torch.arange(width)
    if flip:
        right = torch.where(torch.rand(batch, 1, generator=generator) < 0.5, right.flip(1), right)
    padded = pad(images, (shift,) * 4, value=-1.0)
    index = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
    shifted = padded[*index, down[:, None, :, None], right[:, None, None, :]]
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
    data = recipe.data.build("train")
    rows = recipe.captions(data)
    captions = list(dict.fromkeys(text for row in rows for text in row))
    number = {text: index for index, text in enumerate(captions)}
    own = torch.tensor([[number[text] for text in row] for row in rows])  # [N, captions a sample]

    description = describe(recipe, captions)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # open_clip draws its initial weights from the global generator
        model: Any = build_model(description)
    embedder = embedder_of(model, description)
    tokens = embedder.tokenizer(captions)
    model.train().requires_grad_(True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(data), (batch,), generator=generator)
        said = own[chosen, torch.randint(own.shape[1], (batch,), generator=generator)]
        matches = (own[chosen][:, None, :] == said[:, None]).any(dim=-1)

        seen = torch.stack([data[index][recipe.image] for index in chosen.tolist()])  # type: ignore[misc]
        pictures = augment(seen, generator, recipe.shift, recipe.noise, recipe.flip)
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


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="|".join([*RECIPES, "CONFIG.toml"]), help="the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the configuration")
    parser.add_argument("--image", default="image", metavar="FIELD", help="of pictures (default: %(default)s)")
    parser.add_argument(
        "--text", metavar="FIELD", help="of captions, or of classes that have names (default: caption, or else label)"
    )
    parser.add_argument("--steps", type=int, help="other than the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        own = given.data not in RECIPES
        path = Path(given.data)
        recipe = recipe_of(path, Registry.discover(), given.image, given.text) if own else RECIPES[given.data]
        embedder, description = train(recipe, steps=given.steps, seed=given.seed)
        accuracy = recipe.evaluate(embedder)
    except UserError as error:
        print(f"train_clip: error: {error}", file=sys.stderr)
        return 2
    stem = given.out / f"{path.stem}_clip"
    save(embedder, description, accuracy, stem, recipe.dtype)
    print(f"{time.perf_counter() - start:.0f} s; zero-shot accuracy on the test split:")
    print("\n".join(f"  {name:20}{value:.4f}" for name, value in accuracy.items()))
    if own:
        print(f'for the modality clip:\n  model = "{stem}.json"\n  checkpoint = "{stem}.safetensors"')
        print(f"  dim = {embedder.dim}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
