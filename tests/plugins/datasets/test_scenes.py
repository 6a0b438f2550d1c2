import numpy as np
import pytest
import torch

from mtdiffusion_plugins.datasets.scenes import CLASSES, COLOURS, STANDS_ON, THINGS, TIMES, ScenesConfig, scene

CONFIG = ScenesConfig(count=150, test_count=60)


def columns(config, split):
    data = config.build(split)
    return {name: [data[index][name] for index in range(len(data))] for name in data[0]}


@pytest.fixture(scope="module")
def train():
    return columns(CONFIG, "train")


def test_fields_are_as_the_conventions_say(train):
    for picture in train["image"]:
        assert picture.shape == (3, 32, 32) and picture.dtype == torch.float32
        levels = (picture + 1) * 127.5
        assert levels.min() >= 0 and levels.max() <= 255 and torch.allclose(levels, levels.round(), atol=1e-4)
    assert all(mask.shape == (32, 32) and mask.dtype == torch.int64 for mask in train["mask"])
    assert all(label.shape == () and label.dtype == torch.int64 for label in train["label"])


def test_builds_are_equal_and_a_longer_one_starts_with_the_shorter(train):
    again = columns(ScenesConfig(count=160), "train")
    for name, values in train.items():
        for first, second in zip(values, again[name], strict=False):
            assert first == second if name == "caption" else torch.equal(first, second)


def test_splits_and_seeds_differ(train):
    seen = {image.numpy().tobytes() for image in train["image"]}
    for other in (columns(CONFIG, "test"), columns(ScenesConfig(count=60, seed=1), "train")):
        assert not seen & {image.numpy().tobytes() for image in other["image"]}


def test_a_mask_shows_the_labels_thing_on_what_the_caption_says_and_no_other(train):
    for mask, label, caption in zip(train["mask"], train["label"], train["caption"], strict=True):
        shown = {CLASSES[index] for index in mask.unique().tolist()}
        assert shown & set(THINGS) == {THINGS[label]} and THINGS[label] in caption.split()
        assert ("water" in shown) == ("water" in caption.split()) == ("land" not in shown)
        assert {"sky", "sun or moon"} <= shown


@pytest.mark.parametrize(("name", "low", "high"), [("at the left", 0, 14), ("at the right", 18, 32)])
def test_the_thing_is_where_the_caption_says(train, name, low, high):
    found = 0
    for mask, label, caption in zip(train["mask"], train["label"], train["caption"], strict=True):
        if name in caption:
            column = (mask == CLASSES.index(THINGS[label])).nonzero()[:, 1].double().mean().item()
            assert low <= column <= high, caption
            found += 1
    assert found > 20


def test_the_thing_has_the_captions_colour_and_nights_are_dark(train):
    """Of the seven colours, the caption's is the nearest to one of the thing's pixels by day."""
    light = {time: [] for time in TIMES}
    for image, mask, label, caption in zip(*(train[k] for k in ("image", "mask", "label", "caption")), strict=True):
        picture = (image.numpy() + 1) / 2
        time = next(time for time in TIMES if caption.endswith(time))
        light[time].append(picture.mean())
        if time == "by day":
            painted = picture[:, (mask == CLASSES.index(THINGS[label])).numpy()]
            off = {c: np.abs(painted - np.array(rgb)[:, None]).sum(0).min() for c, rgb in COLOURS.items()}
            assert min(off, key=off.__getitem__) == caption.split()[2], caption
    assert min(light["by day"]) > max(light["by night"])
    assert np.mean(light["by day"]) > np.mean(light["at dusk"]) > np.mean(light["by night"])


def test_whatever_a_caption_can_say_is_said_and_nothing_stands_where_it_cannot():
    scenes = [scene(np.random.default_rng(index)) for index in range(600)]
    assert {seen.colour for seen in scenes} == set(COLOURS) and {seen.time for seen in scenes} == {0, 1, 2}
    for thing, grounds in STANDS_ON.items():
        assert {seen.ground for seen in scenes if seen.thing == thing} == set(grounds)
    for seen in scenes:
        assert len(seen.caption.split()) == 11
