"""Figures as data: small PNG sheets inside a cell's JSON, a row a role (given, true, generated), a column a sample."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mtdiffusion import Modality
from mtdiffusion_engine.pictures import tile, tile_size
from mtdiffusion_registry import Query

SIDE = 32
"""The longer side of a tile: smaller pictures are enlarged by whole pixels, larger ones are made smaller."""

SCENE = 64
"""The longer side, at most, of tiles that show places: larger pictures of scenes would not be recognised."""

Tiles = list[Image.Image]

NEIGHBOURS = 3
"""How many held-out samples are shown beside what a person cannot see, such as an embedding."""


def figures_of(
    query: Query,
    generated: Mapping[str, Tensor],
    test: Mapping[str, Tensor],
    visible: Tensor | None,
    modalities: Mapping[str, Modality],
    shown: int,
) -> list[dict[str, Any]]:
    """Sheets of samples: all modalities of a joint sample together; else one for each target, of held-out samples that
    are spread evenly over the split, since neighbours in it are often alike.

    Below what a person cannot see are the held-out samples nearest to it, by the modality's own similarity, each as its
    picture in another modality of the task.
    """

    count = len(next(iter(generated.values())))
    rows_of = torch.arange(min(shown, count)) * count // max(min(shown, count), 1)

    def render(name: str, x: Tensor, visible: Tensor | None = None) -> Tiles:
        return _tiles(modalities[name], x.cpu()[rows_of], None if visible is None else visible.cpu()[rows_of])

    def nearest(name: str) -> dict[str, Tiles]:
        return _nearest(name, generated[name].cpu()[rows_of], test, modalities)

    if query.joint:
        rows = {name: render(name, x) for name, x in generated.items()}
        for name in generated:
            rows |= nearest(name)
        return [_figure("joint", "Joint samples, nothing given", "sheet", rows)]
    figures = []
    for target, x in generated.items():
        rows = {f"given {name}": render(name, test[name]) for name in query.observed if name in modalities}
        if visible is not None:
            rows[f"given {target}"] = render(target, test[target], visible)
        rows[f"true {target}"] = render(target, test[target])
        rows[f"generated {target}"] = render(target, x)
        rows |= nearest(target)
        figures.append(_figure(query.key(target), f"{target} given {query.given}", "triptych", rows))
    return figures


def _nearest(name: str, x: Tensor, test: Mapping[str, Tensor], modalities: Mapping[str, Modality]) -> dict[str, Tiles]:
    """A row for each of the samples nearest to x: none if x can be seen, or nothing beside it can."""
    similarity = modalities[name].similarity(x, test[name].cpu())
    if similarity is None:
        return {}
    visible = [other for other, modality in modalities.items() if other in test and _visible(modality)]
    if not visible:
        return {}
    field = modalities[name].field  # what it is derived from, if so, shows best what it says
    seen = next((other for other in visible if (modalities[other].field or other) == field), visible[0])
    order = similarity.argsort(dim=1, descending=True)[:, :NEIGHBOURS]  # [n, NEIGHBOURS]
    return {
        f"{seen} by nearest {name}, {rank}": _tiles(modalities[seen], test[seen].cpu()[of])
        for rank, of in enumerate(order.unbind(1), 1)
    }


def _visible(modality: Modality) -> bool:
    one = modality.placeholder(1)
    return modality.similarity(one, one) is None


def _figure(name: str, title: str, kind: str, rows: Mapping[str, Tiles]) -> dict[str, Any]:
    """A sheet of cells of one size, since the report's names stand beside rows of one height."""
    every = [picture for tiles in rows.values() for picture in tiles]
    width, height = (max(sizes) + 2 for sizes in zip(*(picture.size for picture in every), strict=True))
    sheet = Image.new("RGB", (max(map(len, rows.values())) * width, len(rows) * height), "white")
    for row, tiles in enumerate(rows.values()):
        for column, picture in enumerate(tiles):
            left, top = (width - picture.width) // 2, (height - picture.height) // 2
            sheet.paste(picture, (column * width + left, row * height + top))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return {
        "name": name,
        "title": title,
        "kind": kind,
        "columns": list(rows),
        "png": base64.b64encode(buffer.getvalue()).decode("ascii"),
    }


def _tiles(modality: Modality, x: Tensor, visible: Tensor | None = None) -> Tiles:
    """Pictures of x ``[n, ...]`` in their own shape; ``visible [≥ n, H, W]``: hatched where it is 0."""
    pictures = modality.render(x).float()
    most = SCENE if modality.encoder.spatial else SIDE
    size = tile_size(pictures.shape[-2], pictures.shape[-1], SIDE, most)
    return [tile(picture, size, None if visible is None else visible[i]) for i, picture in enumerate(pictures)]
