"""Figures: what a person cannot see is shown by the real samples nearest to it."""

from __future__ import annotations

import base64
import io
import wave

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tests.engine.test_sounds import write_as_sound
from tests.plugins.test_metrics import build
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import FeatureSpec, LatentSpec, Modality
from mtdiffusion_benchmarks.figures import HEARD, NEIGHBOURS, SCENE, SIDE, figures_of
from mtdiffusion_plugins.clip import ClipConfig
from mtdiffusion_plugins.image import ImageConfig, ImageModality
from mtdiffusion_plugins.label import LabelConfig
from mtdiffusion_plugins.mask import MaskConfig
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


def pixels(figure: dict[str, str | list[str]]) -> NDArray[np.uint8]:
    assert isinstance(figure["png"], str)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(figure["png"]))))


def middles(figure: dict[str, str | list[str]]) -> dict[str, list[int]]:
    """Of each row the grey in the middle of each tile."""
    sheet = pixels(figure)
    tile = SIDE + 2
    greys = sheet[tile // 2 :: tile, tile // 2 :: tile, 0]
    return dict(zip(figure["columns"], greys.tolist(), strict=True))


def test_below_an_embedding_are_pictures_of_the_nearest_held_out_samples() -> None:
    test: dict[str, Tensor] = {"label": torch.arange(5), "clip": EMBEDDINGS, "image": IMAGES}
    drawn = F.normalize(torch.tensor([[0.1, 0.2, 9.0], [9.0, 0.1, 0.2]]), dim=1)
    # Of five, two are shown: the first and the third.
    generated = {"clip": torch.stack([drawn[0], EMBEDDINGS[1], drawn[1], EMBEDDINGS[3], EMBEDDINGS[4]])}
    (figure,) = figures_of(Query(("image",), ("clip",)), generated, test, None, parts(), shown=2)
    names = [f"image by nearest clip, {rank}" for rank in range(1, NEIGHBOURS + 1)]
    assert figure["columns"] == ["given image", "true clip", "generated clip", *names]
    rows = middles(figure)
    assert rows["given image"] == [GREYS[0], GREYS[2]]
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


def test_scenes_keep_their_shape_masks_their_colours_and_holes_are_hatched() -> None:
    mask = torch.randint(2, (2, 96, 192), generator=torch.Generator().manual_seed(0))
    config = MaskConfig(size=(96, 192))
    shown = config.build(LatentSpec(config.latent_channels(24, 48), 24, 48), FeatureSpec(4, 24, 48, 4))
    modalities = {"mask": shown, "label": build(LabelConfig(classes=5))}
    visible = torch.ones(2, 24, 48)
    visible[:, :, 24:] = 0
    test = {"mask": mask, "label": torch.arange(2)}
    query = Query(("label",), ("mask",), hidden=0.5)
    (figure,) = figures_of(query, {"mask": 0 * mask}, test, visible, modalities, shown=2)
    assert figure["columns"] == ["given label", "given mask", "true mask", "generated mask"]
    sheet = pixels(figure)
    height, width = SCENE // 2 + 2, SCENE + 2  # of a cell, the picture's shape; a label is as high
    assert sheet.shape[:2] == (4 * height, 2 * width)
    label, seen, true, generated = (sheet[i * height + 1 : (i + 1) * height - 1, 1 : width - 1, 0] for i in range(4))
    inside = (label != 255).any(0).nonzero()[0]
    assert (inside[0], inside[-1]) == ((SCENE - SIDE) // 2, (SCENE + SIDE) // 2 - 1)
    assert set(np.unique(true)) == {0, 255} and set(np.unique(generated)) == {0}
    half = SCENE // 2
    assert (seen[:, :half] == true[:, :half]).all()
    assert not np.isin(seen[:, half:], [0, 255]).any() and len(np.unique(seen[:, half:])) == 2


def test_what_is_written_as_sound_is_heard_of_the_first_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageModality, "write", write_as_sound)
    modalities = parts()
    count = HEARD + 2
    images = torch.linspace(-1, 1, count).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    test: dict[str, Tensor] = {"image": images, "label": torch.arange(count) % 5}

    def levels(sounds: list[dict[str, str]]) -> list[float]:
        """Each is of one level throughout, which the whole of it has."""
        found = []
        for sound in sounds:
            assert sound["type"].startswith("audio/")
            with wave.open(io.BytesIO(base64.b64decode(sound["data"]))) as file:
                (level,) = set(np.frombuffer(file.readframes(file.getnframes()), "<i2").tolist())
                found.append(level / 32767)
        return found

    (figure,) = figures_of(Query(("label",), ("image",)), {"image": -images}, test, None, modalities, shown=count)
    sounds = dict(zip(figure["columns"], figure["sounds"], strict=True))
    assert sounds["given label"] == []
    first = images[:HEARD, 0, 0, 0]
    assert np.allclose(levels(sounds["true image"]), first, atol=1e-4)
    assert np.allclose(levels(sounds["generated image"]), -first, atol=1e-4)
    # As it is given, with a hole, it has no sound: the whole would be heard.
    query = Query((), ("image",), hidden=0.5)
    (figure,) = figures_of(query, {"image": images}, test, torch.ones(count, 4, 4), modalities, shown=2)
    heard = {name: len(row) for name, row in zip(figure["columns"], figure["sounds"], strict=True)}
    assert heard == {"given image": 0, "true image": 2, "generated image": 2}
    (figure,) = figures_of(Query(), {"label": torch.arange(3)}, test, None, modalities, shown=2)
    assert "sounds" not in figure
