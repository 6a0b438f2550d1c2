"""Tiny vision networks of timm with random weights, in files that say so; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VIT = "vit_tiny_patch16_224"


def random_network(name: str = VIT, **options: Any) -> Any:
    """A network whose weights are drawn, for what does not depend on what it learned."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, **options).eval()


def random_weights(folder: Path, name: str = VIT, **options: Any) -> Path:
    """The file of such a network's weights, those of its classifier too."""
    from safetensors.torch import save_file

    path = folder / f"random-{name}.safetensors"
    save_file({key: value.contiguous() for key, value in random_network(name, **options).state_dict().items()}, path)
    return path
