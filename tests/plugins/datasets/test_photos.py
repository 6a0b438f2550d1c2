import numpy as np
import pytest
import torch

from mtdiffusion_plugins.datasets import photos
from mtdiffusion_plugins.datasets.photos import PHOTOGRAPHS, PhotosConfig


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_every_photograph_is_bundled_and_in_colour(name, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a photograph would be downloaded")

    monkeypatch.setattr("socket.socket.connect", refuse)
    picture = photos.load(name)
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
    assert np.abs(picture[..., 0].astype(int) - picture[..., 2]).mean() > 1


def test_fields_are_as_the_conventions_say():
    data = PhotosConfig(count=40, size=24).build("train")
    assert len(data) == 40
    for index in range(40):
        sample = data[index]
        assert sample["image"].shape == (3, 24, 24) and sample["image"].dtype == torch.float32
        assert sample["image"].min() >= -1 and sample["image"].max() <= 1
        assert sample["label"].dtype == torch.int64 and sample["label"] == index % 8
        assert sample["caption"].endswith(list(PHOTOGRAPHS.values())[index % 8])


@pytest.mark.parametrize(("split", "inked", "blank"), [("train", 0, 1), ("test", 1, 0)])
@pytest.mark.parametrize("size", [8, 32])
def test_train_and_test_crops_share_no_pixel(monkeypatch, split, inked, blank, size):
    """In these pictures only the test strip has green and only the rest has red."""

    def marked(name):
        height, width = 300, 452
        picture = np.zeros((height, width, 3), np.uint8)
        noise = np.random.default_rng(0).integers(100, 256, (height, width))
        strip = np.arange(width) >= width - int(width * 0.25)
        picture[..., 0], picture[..., 1] = noise * ~strip, noise * strip
        return picture

    monkeypatch.setattr(photos, "load", marked)
    data = PhotosConfig(count=200, test_count=200, size=size).build(split)
    for index in range(200):
        image = data[index]["image"]
        assert (image[blank] == -1).all()
        assert image[inked].mean() > -0.5


def test_builds_are_equal_and_follow_the_seed():
    first, again, other = (PhotosConfig(count=16, seed=seed).build("train") for seed in (0, 0, 1))
    for index in range(16):
        assert torch.equal(first[index]["image"], again[index]["image"])
        assert not torch.equal(first[index]["image"], other[index]["image"])


def test_no_crop_is_flat():
    data = PhotosConfig(count=10, test_count=400).build("test")
    assert min(float(data[index]["image"].std(dim=(1, 2)).max()) for index in range(400)) > 6 / 127.5


@pytest.mark.parametrize("options", [{"size": 4}, {"size": 97}, {"count": 0}, {"seed": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PhotosConfig(**options)
