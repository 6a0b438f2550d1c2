"""A picture of what a model does: joint samples, and one block for every single modality given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtdiffusion import MultimodalDiffusion, sample
from mtdiffusion_engine.pictures import Block, draw_blocks
from mtdiffusion_engine.samples import Wish, draw_samples, held_out
from mtdiffusion_engine.subsets import random_holes

if TYPE_CHECKING:
    from mtdiffusion_engine.run import Run


def _render(model: MultimodalDiffusion, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: model.modality(name).render(samples[name]).cpu() for name in model.names}


def draw_gallery(
    run: Run, path: Path, seed: int = 0, columns: int = 12, note: Callable[[str], None] = lambda _: None
) -> Path:
    """Write the gallery of a run's model as a picture; what is given comes from its test split.

    Args:
        seed: of the samples and of the draw of those given.
        columns: samples in a block: of those given, fewer where fewer have what is given.
        note: is told which blocks are left out, since no held-out sample has what they are given.

    Raises:
        UserError: if the test split is empty or cannot be read.
    """
    model, settings = run.model, run.experiment.sampling
    names = model.names
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_samples(held_out(run), [Wish([name], columns) for name in names], seed)
    test = {name: samples.x[name] for name, samples in zip(names, drawn, strict=True) if len(samples)}
    if absent := [name for name in names if name not in test]:
        note(f"the gallery shows nothing given {' or '.join(absent)}: no held-out sample has it")

    joint = sample(model, columns, settings=settings, generator=generator)
    blocks = [Block("everything generated together", _render(model, joint))]
    for given in test if len(names) > 1 else []:
        out = sample(model, len(test[given]), observed={given: test[given]}, settings=settings, generator=generator)
        blocks.append(Block(f"given {given} alone (held-out data)", _render(model, out), frozenset([given])))
    latent = model.layout.latent
    for name, spatial in zip(model.names, model.spatial, strict=True):
        if not spatial or name not in test:
            continue
        n = len(test[name])
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
