import math

import numpy as np
import pytest
import torch

from mtdiffusion_plugins.datasets.shapes import (
    COLOURS,
    SHAPES,
    Shape,
    ShapesConfig,
    caption,
    draw,
    grid,
    inside,
    scene,
    topmost,
)

CONFIG = ShapesConfig(count=60, test_count=60)


def columns(config, split):
    data = config.build(split)
    return {name: [data[index][name] for index in range(len(data))] for name in data[0]}


@pytest.fixture(scope="module")
def train():
    return columns(CONFIG, "train")


def test_fields_are_as_the_conventions_say(train):
    for name in ("image", "night"):
        for picture in train[name]:
            assert picture.shape == (3, 32, 32) and picture.dtype == torch.float32
            assert picture.min() >= -1 and picture.max() <= 1
            levels = (picture + 1) * 127.5
            assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert all(mask.shape == (32, 32) and mask.dtype == torch.int64 for mask in train["mask"])
    assert all(label.shape == () and label.dtype == torch.int64 for label in train["label"])


def test_builds_are_equal_and_a_longer_one_starts_with_the_shorter(train):
    again = columns(ShapesConfig(count=70), "train")
    for name, values in train.items():
        for first, second in zip(values, again[name], strict=False):
            assert first == second if name == "caption" else torch.equal(first, second)


def test_splits_and_seeds_differ(train):
    seen = {image.numpy().tobytes() for image in train["image"]}
    for other in (columns(CONFIG, "test"), columns(ShapesConfig(count=60, seed=1), "train")):
        assert not seen & {image.numpy().tobytes() for image in other["image"]}


def test_the_label_is_the_kind_that_most_of_the_mask_shows():
    data = columns(ShapesConfig(count=300), "train")
    for mask, label in zip(data["mask"], data["label"], strict=True):
        assert mask.flatten().bincount(minlength=6)[1:].argmax() == label
    assert torch.stack(data["label"]).bincount(minlength=len(SHAPES)).min() > 30


def test_masks_show_what_is_painted(train):
    """Where a pixel and its neighbours are of one shape alone, its colour is that shape's; each caption names it."""
    config = ShapesConfig(count=60)
    for index in range(config.count):
        shapes = scene(np.random.default_rng([config.seed, 0, index]))
        seen = topmost(shapes, config.size)
        classes = np.array([0, *(shape.kind + 1 for shape in shapes)])
        assert np.array_equal(classes[seen], train["mask"][index].numpy())
        image = (train["image"][index].numpy() + 1) / 2
        core = seen[1:-1, 1:-1].copy()
        for dy in (0, 1, 2):
            for dx in (0, 1, 2):
                core[seen[dy : dy + 30, dx : dx + 30] != seen[1:-1, 1:-1]] = -1
        for place, shape in enumerate(shapes):
            painted = image[:, 1:-1, 1:-1][:, core == place + 1]
            if painted.size:
                distance = {name: np.abs(painted.mean(axis=1) - colour).sum() for name, colour in COLOURS.items()}
                assert min(distance, key=distance.get) == shape.colour
            assert f"{shape.colour} {SHAPES[shape.kind]}" in train["caption"][index]


AREAS = {"circle": math.pi, "square": 1.7**2, "triangle": 0.55**2 * 3 * math.sqrt(3), "ring": 0.75 * math.pi}
AREAS["cross"] = 2 * 1.9 * 0.66 - 0.66**2


@pytest.mark.parametrize("kind", range(len(SHAPES)))
@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_shapes_have_their_area_and_fit_their_radius(kind, angle):
    shape = Shape(kind=kind, colour="red", x=0.5, y=0.45, radius=0.3, angle=angle)
    x, y = grid(800)
    points = inside(shape, x, y)
    assert points.mean() == pytest.approx(AREAS[SHAPES[kind]] * 0.3**2, rel=0.01)
    assert not points[np.hypot(x - shape.x, y - shape.y) > 1.3 * shape.radius].any()


def test_captions_read_as_sentences():
    circle = Shape(kind=0, colour="red", x=0.2, y=0.2, radius=0.3, angle=0)
    square = Shape(kind=1, colour="blue", x=0.5, y=0.5, radius=0.15, angle=0)
    cross = Shape(kind=4, colour="pink", x=0.8, y=0.5, radius=0.15, angle=0)
    assert caption([circle]) == "a large red circle at the top left"
    assert caption([circle, square, cross]) == (
        "a large red circle at the top left, a small blue square in the centre and a small pink cross at the right"
    )


def test_night_is_dark_and_blue_and_not_told_by_the_day():
    shapes = [Shape(kind=1, colour="red", x=0.5, y=0.6, radius=0.3, angle=0)]
    nights = []
    for seed in range(12):
        day, night = draw(shapes, np.random.default_rng(seed), 32)
        background = topmost(shapes, 32) == 0
        assert night[background].mean() < 0.5 * day[background].mean()
        red, _, blue = np.median(night[background], axis=0) / np.median(day[background], axis=0)
        assert blue > red
        nights.append(night[topmost(shapes, 32) == 1].mean())
    # The same red square is lit in some nights and dark in others.
    assert min(nights) < 0.15 and max(nights) > 0.3
