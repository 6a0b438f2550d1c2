"""Figures as data: small PNG sheets inside a cell's JSON, a row a role (given, true, generated), a column a sample; and
the sounds of those whose modality writes its data as such."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import frozen
from PIL import Image
from torch import Tensor

from mtdiffusion import Modality
from mtdiffusion_engine.pictures import tile, tile_size
from mtdiffusion_engine.sounds import is_heard, sound_of
from mtdiffusion_registry import Query

SIDE = 32
"""The longer side of a tile: smaller pictures are enlarged by whole pixels, larger ones are made smaller."""

SCENE = 64
"""The longer side, at most, of tiles that show places: larger pictures of scenes would not be recognised."""

NEIGHBOURS = 3
"""How many held-out samples are shown beside what a person cannot see, such as an embedding."""

HEARD = 4
"""How many samples of a row are heard, the first ones: sounds are large."""


@frozen(eq=False)
class Row:
    """What a row shows.

    Attributes:
        modality: whose values they are.
        x: ``[n, ...]``, on the CPU.
        visible: ``[n, H, W]``, 0 where it is hidden; None: all is seen.
    """

    modality: Modality
    x: Tensor
    visible: Tensor | None = None

    def tiles(self) -> list[Image.Image]:
        """Pictures in their own shape, hatched where they are hidden."""
        pictures = self.modality.render(self.x).float()
        most = SCENE if self.modality.encoder.spatial else SIDE
        size = tile_size(pictures.shape[-2], pictures.shape[-1], SIDE, most)
        seen = [None] * len(self.x) if self.visible is None else self.visible
        return [tile(picture, size, part) for picture, part in zip(pictures, seen, strict=True)]

    def sounds(self, folder: Path) -> Iterator[dict[str, str]]:
        """Of the first samples: media type and base64; none of what cannot be heard, and of what is hidden in part,
        which has no sound of its own."""
        if self.visible is None and is_heard(self.modality, folder):
            for x in self.x[:HEARD]:
                kind, content = sound_of(self.modality, x, folder)
                yield {"type": kind, "data": base64.b64encode(content).decode("ascii")}


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

    def row(name: str, x: Tensor, visible: Tensor | None = None) -> Row:
        return Row(modalities[name], x.cpu()[rows_of], None if visible is None else visible.cpu()[rows_of])

    def nearest(name: str) -> dict[str, Row]:
        return _nearest(name, generated[name].cpu()[rows_of], test, modalities)

    if query.joint:
        rows = {name: row(name, x) for name, x in generated.items()}
        for name in generated:
            rows |= nearest(name)
        return [_figure("joint", "Joint samples, nothing given", "sheet", rows)]
    figures = []
    for target, x in generated.items():
        rows = {f"given {name}": row(name, test[name]) for name in query.observed if name in modalities}
        if visible is not None:
            rows[f"given {target}"] = row(target, test[target], visible)
        rows[f"true {target}"] = row(target, test[target])
        rows[f"generated {target}"] = row(target, x)
        rows |= nearest(target)
        figures.append(_figure(query.key(target), f"{target} given {query.given}", "triptych", rows))
    return figures


def _nearest(name: str, x: Tensor, test: Mapping[str, Tensor], modalities: Mapping[str, Modality]) -> dict[str, Row]:
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
        f"{seen} by nearest {name}, {rank}": Row(modalities[seen], test[seen].cpu()[of])
        for rank, of in enumerate(order.unbind(1), 1)
    }


def _visible(modality: Modality) -> bool:
    one = modality.placeholder(1)
    return modality.similarity(one, one) is None


def _figure(name: str, title: str, kind: str, rows: Mapping[str, Row]) -> dict[str, Any]:
    """A sheet of cells of one size, since the report's names stand beside rows of one height; with ``sounds``, those of
    each row, if any is heard."""
    tiles = [row.tiles() for row in rows.values()]
    every = [picture for line in tiles for picture in line]
    width, height = (max(sizes) + 2 for sizes in zip(*(picture.size for picture in every), strict=True))
    sheet = Image.new("RGB", (max(map(len, tiles)) * width, len(rows) * height), "white")
    for at, line in enumerate(tiles):
        for column, picture in enumerate(line):
            left, top = (width - picture.width) // 2, (height - picture.height) // 2
            sheet.paste(picture, (column * width + left, at * height + top))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    with TemporaryDirectory() as folder:
        sounds = [list(row.sounds(Path(folder))) for row in rows.values()]
    return {
        "name": name,
        "title": title,
        "kind": kind,
        "columns": list(rows),
        "png": base64.b64encode(buffer.getvalue()).decode("ascii"),
        **({"sounds": sounds} if any(sounds) else {}),
    }
