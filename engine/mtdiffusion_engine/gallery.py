"""A picture of what a model does: joint samples, and one block for every single modality given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtdiffusion import MultimodalDiffusion, sample
from mtdiffusion_engine.evaluation import complete_samples
from mtdiffusion_engine.pictures import Block, draw_blocks
from mtdiffusion_engine.subsets import random_holes

if TYPE_CHECKING:
    from mtdiffusion_engine.run import Run


def _render(model: MultimodalDiffusion, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: model.modality(name).render(samples[name]).cpu() for name in model.names}


def draw_gallery(run: Run, path: Path, seed: int = 0, columns: int = 12) -> Path:
    """Write the gallery of a run's model as a picture; what is given comes from its test split."""
    model, settings = run.model, run.experiment.sampling
    test = complete_samples(run.data("test"))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(next(iter(test.values()))), generator=generator)[:columns]
    test = {name: x[rows] for name, x in test.items()}
    n = len(rows)

    joint = sample(model, n, settings=settings, generator=generator)
    blocks = [Block("everything generated together", _render(model, joint))]
    for given in model.names if len(model.names) > 1 else []:
        out = sample(model, n, observed={given: test[given]}, settings=settings, generator=generator)
        blocks.append(Block(f"given {given} alone (held-out data)", _render(model, out), frozenset([given])))
    latent = model.layout.latent
    for name, spatial in zip(model.names, model.spatial, strict=True):
        if not spatial:
            continue
        share = torch.full((n,), run.experiment.evaluation.hidden_share)
        visible = random_holes(share, (latent.height, latent.width), generator)
        out = sample(
            model, n, observed={name: test[name]}, visible={name: visible}, settings=settings, generator=generator
        )
        rendered = model.modality(name)
        seen = rendered.render(test[name]).cpu()
        holes = torch.nn.functional.interpolate(visible[:, None], size=seen.shape[-2:], mode="nearest")
        grey = torch.tensor([0.55, 0.35, 0.65])[None, :, None, None]
        shown = {
            f"{name} seen": seen * holes + grey * (1 - holes),
            f"{name} filled": rendered.render(out[name]).cpu(),
            f"{name} truth": seen,
        }
        blocks.append(Block(f"given {name} with holes", shown, frozenset([f"{name} seen"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"One model, {len(model.names)} modalities: {', '.join(model.names)}"
    draw_blocks(title, blocks).save(path)
    return path
