"""Figures as data: small PNG sheets inside a cell's JSON, a row a role (given, true, generated), a column a sample."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import Modality
from mtdiffusion_registry import Query

SIDE = 32
"""Pictures smaller than this are enlarged by whole pixels, larger ones are made smaller."""

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
    """Sheets of the first samples: all modalities of a joint sample together; else one for each target.

    Below what a person cannot see are the held-out samples nearest to it, by the modality's own similarity, each as its
    picture in another modality of the task.
    """

    def render(name: str, x: Tensor) -> Tensor:
        return modalities[name].render(x[:shown].cpu())

    def nearest(name: str) -> dict[str, Tensor]:
        return _nearest(name, generated[name][:shown].cpu(), test, modalities)

    if query.joint:
        rows = {name: render(name, x) for name, x in generated.items()}
        for name in generated:
            rows |= nearest(name)
        return [_figure("joint", "Joint samples, nothing given", "sheet", rows)]
    figures = []
    for target, x in generated.items():
        rows = {f"given {name}": render(name, test[name]) for name in query.observed if name in modalities}
        if visible is not None:
            picture = render(target, test[target])
            seen = F.interpolate(visible[:shown, None], picture.shape[-2:], mode="nearest")
            rows[f"given {target}"] = picture * seen + 0.5 * (1 - seen)
        rows[f"true {target}"] = render(target, test[target])
        rows[f"generated {target}"] = render(target, x)
        rows |= nearest(target)
        figures.append(_figure(query.key(target), f"{target} given {query.given}", "triptych", rows))
    return figures


def _nearest(name: str, x: Tensor, test: Mapping[str, Tensor], modalities: Mapping[str, Modality]) -> dict[str, Tensor]:
    """A row for each of the samples nearest to x, ``[n, 3, h, w]``: none if x can be seen, or nothing beside it can."""
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
        f"{seen} by nearest {name}, {rank}": modalities[seen].render(test[seen].cpu()[of])
        for rank, of in enumerate(order.unbind(1), 1)
    }


def _visible(modality: Modality) -> bool:
    one = modality.placeholder(1)
    return modality.similarity(one, one) is None


def _figure(name: str, title: str, kind: str, rows: Mapping[str, Tensor]) -> dict[str, Any]:
    tiles = torch.stack([_squares(pictures) for pictures in rows.values()])  # [rows, n, 3, SIDE, SIDE]
    padded = F.pad(tiles, (1, 1, 1, 1), value=1.0)
    r, n, _, h, w = padded.shape
    sheet = padded.permute(0, 3, 1, 4, 2).reshape(r * h, n * w, 3)
    buffer = io.BytesIO()
    Image.fromarray((sheet * 255).round().to(torch.uint8).numpy()).save(buffer, format="PNG", optimize=True)
    return {
        "name": name,
        "title": title,
        "kind": kind,
        "columns": list(rows),
        "png": base64.b64encode(buffer.getvalue()).decode("ascii"),
    }


def _squares(pictures: Tensor) -> Tensor:
    """``[n, 3, h, w]`` in [0, 1] on squares of SIDE pixels."""
    side = max(pictures.shape[-2:])
    factor = max(SIDE // side, 1)
    large = pictures.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    if side > SIDE:
        large = F.interpolate(pictures, scale_factor=SIDE / side, mode="area")
    height, width = large.shape[-2:]
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    return F.pad(large, (left, SIDE - width - left, top, SIDE - height - top), value=1.0).clamp(0, 1)
