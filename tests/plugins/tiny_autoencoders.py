"""Tiny autoencoders of diffusers' own classes, written to a folder as save_pretrained does; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss


def shapes(count: int, size: int) -> Tensor:
    """Pictures ``[count, 3, size, size]`` of the data set shapes."""
    from mtdiffusion_plugins.datasets.shapes import ShapesConfig

    data = ShapesConfig(size=size, count=count, test_count=1).build("train")
    return torch.stack([data[index]["image"] for index in range(count)])  # type: ignore[misc]


def untrained(kind: str, **changes: Any) -> Any:
    """A tiny autoencoder of random weights, for what does not depend on what it learned; a place of a latent holds
    2 × 2 pixels of AutoencoderKL, 4 × 4 of the others."""
    import diffusers

    torch.manual_seed(0)
    values: dict[str, dict[str, Any]] = {
        "AutoencoderKL": {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "latent_channels": 4,
        },
        "AutoencoderTiny": {
            "encoder_block_out_channels": (8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8),
            "num_encoder_blocks": (1, 1, 1),
            "num_decoder_blocks": (1, 1, 1),
            "latent_channels": 4,
        },
        "AutoencoderDC": {
            "encoder_block_out_channels": (8, 16, 16),
            "decoder_block_out_channels": (8, 16, 16),
            "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "encoder_layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1),
            "encoder_qkv_multiscales": ((), (), ()),
            "decoder_qkv_multiscales": ((), (), ()),
            "attention_head_dim": 8,
            "latent_channels": 8,
        },
    }
    return getattr(diffusers, kind)(**{**values[kind], **changes}).eval()


def trained_kl(pictures: Tensor, steps: int = 150) -> Any:
    """A tiny AutoencoderKL trained on pictures for some seconds, by the squared error of what its means give back."""
    model = untrained("AutoencoderKL").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = pictures[torch.randint(len(pictures), (16,), generator=generator)]
        loss = mse_loss(model.decode(model.encode(x).latent_dist.mode()).sample, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    """The folder of a model that was written to it."""
    model.save_pretrained(folder)
    return folder
