"""A picture of what a model does: joint samples, and one block for every single modality given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from mtdiffusion import MultimodalDiffusion, sample
from mtdiffusion_engine.pictures import Block, Row, draw_blocks, legends, rendered, sheet_columns
from mtdiffusion_engine.samples import Samples, Wish, draw_samples, held_out
from mtdiffusion_engine.sounds import page_with_players
from mtdiffusion_engine.subsets import random_holes
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.pace import Pace, by_step
from mtdiffusion_registry.partial import partial_of

if TYPE_CHECKING:
    from mtdiffusion_engine.run import Run


def draw_gallery(
    run: Run,
    path: Path,
    seed: int = 0,
    columns: int = 12,
    note: Callable[[str], None] = lambda _: None,
    show: Sequence[str] | None = None,
    blocks: Sequence[str] | None = None,
) -> Path:
    """Write the gallery of a run's model as a picture; what is given comes from its test split, and so does the truth
    below what is read off it. Where a modality writes sounds, there is a page beside it on which they are heard, of the
    same name but for ``.html``.

    Args:
        seed: of the samples and of the draw of those given.
        columns: samples in a block at most: of those given, fewer where fewer have what is given; of large pictures,
            fewer.
        note: is told which blocks are left out, since no held-out sample has what they are given.
        show: the modalities that are shown and given; None: all. The others are generated all the same.
        blocks: what is drawn, in this order: "joint", a modality's name where it is given, "NAME:part" where it has
            holes; None: all of these.

    Raises:
        UserError: if the test split is empty or cannot be read, the path is a folder's, or for a name that is no
            modality's or no block's.
    """
    model = run.model
    if path.is_dir():
        raise UserError(f"{path}: expected a picture's file to write, such as gallery.png, found a folder")
    if unknown := sorted(set(show or ()) - set(model.names)):
        raise UserError(f"show: no modality named {', '.join(unknown)}; this model has {', '.join(model.names)}")
    names = [name for name in model.names if show is None or name in show]
    several = len(model.names) > 1
    every = ["joint", *(names if several else ())]
    every += [f"{name}:part" for name in names if model.modality(name).encoder.spatial]
    wanted = every if blocks is None else list(blocks)
    if unknown := sorted(set(wanted) - set(every)):
        raise UserError(f"blocks: expected some of {', '.join(every)}; found {', '.join(unknown)}")
    columns = sheet_columns(model, columns)
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_samples(held_out(run), [Wish([name], columns) for name in names], seed)
    test = {name: samples for name, samples in zip(names, drawn, strict=True) if len(samples)}
    if absent := [name for name in names if name not in test]:
        note(f"the gallery shows nothing given {' or '.join(absent)}: no held-out sample has it")

    drawable = [block for block in wanted if block == "joint" or block.removesuffix(":part") in test]
    pace = Pace("drawing the gallery", len(drawable), item="block")
    drawn_blocks: list[Block] = []
    for block in drawable:
        name = block.removesuffix(":part")
        on_step = by_step(pace.tell, len(drawn_blocks), 1)
        if block == "joint":
            drawn_blocks.append(_joint(run, names, columns, generator, on_step))
        elif block == name:
            drawn_blocks.append(_given(run, names, name, test[name], generator, on_step))
        else:
            drawn_blocks.append(_with_holes(run, name, test[name], generator, on_step))
        pace.tell(len(drawn_blocks))
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"One model, {len(model.names)} modalities: {', '.join(model.names)}"
    title = title if several else f"A model of {names[0]}"
    told = (
        "Given is what held-out samples have; truth is the rest of the same samples, which the model was not shown. "
        "What is generated in a column was generated together, as one sample."
    )
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    with partial_of(path) as partial:
        draw_blocks(title, drawn_blocks, legends(model), told).save(partial, kind)
        partial.replace(path)
    with partial_of(path.with_suffix(".sounds"), folder=True) as scratch:
        page = page_with_players(title, drawn_blocks, model, scratch)
    if page is not None:
        with partial_of(path.with_suffix(".html")) as partial:
            partial.write_text(page, encoding="utf-8")
            partial.replace(path.with_suffix(".html"))
    return path


OnStep = Callable[[int, int, object], None]


def _joint(run: Run, names: Sequence[str], count: int, generator: torch.Generator, on_step: OnStep) -> Block:
    out = sample(run.model, count, settings=run.experiment.sampling, generator=generator, on_step=on_step)
    rows = [rendered(run.model.modality(name), name, out[name]) for name in names]
    return Block("everything generated together", rows)


def _given(
    run: Run, names: Sequence[str], given: str, samples: Samples, generator: torch.Generator, on_step: OnStep
) -> Block:
    out = sample(
        run.model,
        len(samples),
        observed={given: samples.x[given]},
        settings=run.experiment.sampling,
        generator=generator,
        on_step=on_step,
    )
    return Block(f"given only this {given}", list(_read_off(run.model, names, given, samples, out)))


def _with_holes(run: Run, name: str, samples: Samples, generator: torch.Generator, on_step: OnStep) -> Block:
    model, truth, latent = run.model, samples.x[name], run.model.layout.latent
    share = torch.full((len(truth),), run.experiment.evaluation.hidden_share)
    visible = random_holes(share, (latent.height, latent.width), generator)
    out = sample(
        model,
        len(truth),
        observed={name: truth},
        visible={name: visible},
        settings=run.experiment.sampling,
        generator=generator,
        on_step=on_step,
    )
    modality = model.modality(name)
    rows = [
        rendered(modality, name, truth, "given", "seen", visible),
        rendered(modality, name, out[name], role="filled"),
        rendered(modality, name, truth, "truth"),
    ]
    return Block(f"given only this {name} with holes", rows)


def _read_off(
    model: MultimodalDiffusion, names: Sequence[str], given: str, samples: Samples, out: Mapping[str, Tensor]
) -> Iterator[Row]:
    """Rows of one modality given, of each other as generated, and below of its truth, where any sample has it."""
    yield rendered(model.modality(given), given, samples.x[given], "given")
    for name in names:
        if name == given:
            continue
        yield rendered(model.modality(name), name, out[name])
        if bool((present := samples.presence[name]).any()):
            yield rendered(model.modality(name), name, samples.x[name], "truth", present=present)
