"""Augmentation: what belongs together moves together, and what is drawn follows from the seed and the sample's turn."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from torch import Tensor

from mtdiffusion_engine.augmentation import Augmentation, AugmentationConfig
from mtdiffusion_engine.data import ModalityData, StepSampler, training_batches
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_plugins.clip import ClipConfig
from mtdiffusion_registry import UserError
from tests.engine.tiny import ToyData, toy

EVERYTHING = AugmentationConfig(flip=0.5, vertical_flip=0.5, crop=0.3, brightness=0.2, contrast=0.2)


def scene(side: int = 32) -> dict[str, Tensor]:
    """A disc off the middle, in the picture and in its mask."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inside = (x - 0.7 * side) ** 2 + (y - 0.4 * side) ** 2 < (0.2 * side) ** 2
    return {"image": inside.float()[None].expand(3, -1, -1) * 2 - 1, "mask": inside.long()}


def varied(config: AugmentationConfig, sample: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    out = Augmentation(config, {"image": "image", "mask": "mask"}, ("image",))({**sample, "label": "a disc"}, seed)
    assert out.pop("label") == "a disc"
    return out  # type: ignore[return-value]


def test_what_moves_the_picture_moves_its_mask() -> None:
    moved = [varied(EVERYTHING, scene(), seed) for seed in range(40)]
    for sample in moved:
        assert sample["mask"].shape == (32, 32) and sample["mask"].dtype == torch.int64
        middle = (sample["image"].min() + sample["image"].max()) / 2
        if sample["mask"].any():  # half a pixel of the edge is the filter's to blend
            assert ((sample["image"][0] > middle) == (sample["mask"] > 0)).float().mean() > 0.97
    assert len({str(sample["mask"].tolist()) for sample in moved}) > 30


def test_a_flip_is_a_mirror_and_its_share_is_kept() -> None:
    original, flipped = scene(), 0
    for seed in range(400):
        mask = varied(AugmentationConfig(flip=0.25), original, seed)["mask"]
        mirrored = torch.equal(mask, original["mask"].flip(-1))
        assert mirrored or torch.equal(mask, original["mask"])
        flipped += mirrored
    assert 70 < flipped < 130


def test_colours_vary_and_stay_in_range_and_masks_do_not() -> None:
    config = AugmentationConfig(brightness=0.5, hue=0.2, saturation=0.5)
    seen = set()
    for seed in range(9):
        sample = varied(config, scene(), seed)
        assert torch.equal(sample["mask"], scene()["mask"])
        assert sample["image"].min() >= -1 and sample["image"].max() <= 1
        seen.add(float(sample["image"].mean()))
    assert len(seen) > 3


def test_what_is_drawn_follows_from_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    first = varied(EVERYTHING, scene(), 7)
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(()))
    again = varied(EVERYTHING, scene(), 7)
    assert all(torch.equal(first[name], again[name]) for name in first)


def data() -> ModalityData:
    model = build_model(toy())
    return ModalityData(ToyData(12, "", -1), {name: model.modality(name) for name in model.names})


def batches(world: int, workers: int = 0) -> list[Tensor]:
    """The pictures of three steps of 8, in the order of their turns."""
    found = data()
    augmented = Augmentation.of(EVERYTHING, found.modalities)
    ranks = [
        list(training_batches(found, StepSampler(12, 8, 5, 0, 3, 1, rank, world), workers, augmented))
        for rank in range(world)
    ]
    return [torch.cat([batch.x["image"] for batch in step]) for step in zip(*ranks, strict=True)]


def test_samples_are_varied_alike_on_any_number_of_processes_and_workers() -> None:
    alone = batches(1)
    for other in (batches(2), batches(4), batches(1, workers=2)):
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))
    plain = [batch.x["image"] for batch in training_batches(data(), StepSampler(12, 8, 5, 0, 3), 0)]
    assert not any(torch.equal(a, b) for a, b in zip(alone, plain, strict=True))
    assert torch.equal(data().batch([0]).x["image"][0], data().dataset[0]["image"])  # type: ignore[arg-type]


def test_what_would_no_longer_belong_together_is_refused() -> None:
    model = build_model(toy())
    modalities = {name: model.modality(name) for name in model.names}
    clip = ClipConfig(dim=16, source="image", model="none").build(model.layout.share("image"), model.backbone.features)
    with pytest.raises(UserError, match="clip is computed once from image"):
        Augmentation.of(EVERYTHING, {**modalities, "clip": clip})
    modalities["image"].moves = None  # as of a third party's that says nothing
    with pytest.raises(UserError, match=r"image has places but does not say how they are to be moved"):
        Augmentation.of(EVERYTHING, modalities)
    assert Augmentation.of(AugmentationConfig(hue=0.1), modalities) is not None
    assert Augmentation.of(AugmentationConfig(), modalities) is None
    small = {**scene(), "mask": torch.zeros(16, 16, dtype=torch.int64)}
    with pytest.raises(UserError, match=r"one size, found image \[32, 32\], mask \[16, 16\]"):
        varied(AugmentationConfig(crop=0.5), small, 0)
    varied(evolve(EVERYTHING, crop=None), small, 0)
