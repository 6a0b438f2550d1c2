"""Figures: what a person cannot see is shown by the real samples nearest to it."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from tests.plugins.test_metrics import build
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import Modality
from mtdiffusion_benchmarks.figures import NEIGHBOURS, SIDE, figures_of
from mtdiffusion_plugins.clip import ClipConfig
from mtdiffusion_plugins.image import ImageConfig
from mtdiffusion_plugins.label import LabelConfig
from mtdiffusion_registry import Query

EMBEDDINGS = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [3, 2, 1], [0, 2, 3]]), dim=1)
IMAGES = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4)
GREYS = [0, 64, 128, 191, 255]


def parts() -> dict[str, Modality]:
    return {
        "label": build(LabelConfig(classes=5)),
        "clip": build(ClipConfig(dim=3, source="image", model="builtin:digits")),
        "image": build(ImageConfig(size=4, channels=1)),
    }


def middles(figure: dict[str, str | list[str]]) -> dict[str, list[int]]:
    """Of each row the grey in the middle of each tile."""
    assert isinstance(figure["png"], str)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure["png"]))))
    tile = SIDE + 2
    greys = sheet[tile // 2 :: tile, tile // 2 :: tile, 0]
    return dict(zip(figure["columns"], greys.tolist(), strict=True))


def test_below_an_embedding_are_pictures_of_the_nearest_held_out_samples() -> None:
    test: dict[str, Tensor] = {"label": torch.arange(5), "clip": EMBEDDINGS, "image": IMAGES}
    drawn = F.normalize(torch.tensor([[0.1, 0.2, 9.0], [9.0, 0.1, 0.2]]), dim=1)
    generated = {"clip": torch.cat([drawn, EMBEDDINGS[2:]])}  # those past the shown ones are not looked at
    (figure,) = figures_of(Query(("image",), ("clip",)), generated, test, None, parts(), shown=2)
    names = [f"image by nearest clip, {rank}" for rank in range(1, NEIGHBOURS + 1)]
    assert figure["columns"] == ["given image", "true clip", "generated clip", *names]
    rows = middles(figure)
    assert rows["given image"] == GREYS[:2]
    # By the cosine, by hand: to the first 2, 4 and 3 are nearest; to the second 0, 3 and 4 (0.22; 2 has 0.20).
    assert [rows[name] for name in names] == [
        [GREYS[2], GREYS[0]],
        [GREYS[4], GREYS[3]],
        [GREYS[3], GREYS[4]],
    ]
    (joint,) = figures_of(Query(), {"image": IMAGES, **generated}, test, None, parts(), shown=2)
    assert joint["columns"] == ["image", "clip", *names]


def test_an_embedding_alone_and_what_can_be_seen_have_no_neighbours() -> None:
    modalities = parts()
    (figure,) = figures_of(Query(), {"clip": EMBEDDINGS}, {"clip": EMBEDDINGS}, None, {"clip": modalities["clip"]}, 2)
    assert figure["columns"] == ["clip"]
    test = {"label": torch.arange(5), "image": IMAGES}
    (figure,) = figures_of(Query(("label",), ("image",)), {"image": IMAGES}, test, None, modalities, shown=2)
    assert figure["columns"] == ["given label", "true image", "generated image"]
