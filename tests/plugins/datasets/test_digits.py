import pytest
import torch

from mtdiffusion_plugins.datasets.digits import NUMBERS, DigitsConfig, handwriting, shear


def fields(config, split):
    data = config.build(split)
    samples = [data[index] for index in range(len(data))]
    return {
        name: [sample[name] for sample in samples]
        if name == "caption"
        else torch.stack([sample[name] for sample in samples])
        for name in samples[0]
    }


@pytest.mark.parametrize("size", [8, 16, 20])
def test_fields_are_as_the_conventions_say(size):
    for split, count in (("train", 1437), ("test", 360)):
        data = fields(DigitsConfig(size=size), split)
        assert data["image"].shape == (count, 1, size, size) and data["image"].dtype == torch.float32
        assert data["image"].min() == -1 and data["image"].max() <= 1
        assert data["mask"].shape == (count, size, size) and data["mask"].dtype == torch.int64
        assert data["label"].shape == (count,) and data["label"].dtype == torch.int64
        # The mask is the strokes: a threshold of the image, and neither empty nor most of the picture.
        assert torch.equal(data["mask"] == 1, data["image"][:, 0] >= 0)
        share = data["mask"].double().mean(dim=(1, 2))
        assert share.min() > 0.1 and share.max() < 0.6


def test_the_pictures_are_scikit_learns():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    known = {tuple(image.ravel()): label for image, label in zip(bunch.images, bunch.target, strict=True)}
    data = fields(DigitsConfig(), "test")
    for image, label in zip(data["image"], data["label"], strict=True):
        assert known[tuple(((image.double() + 1) * 8).flatten().tolist())] == label


def test_splits_are_disjoint_stratified_and_follow_the_seed():
    train, test = fields(DigitsConfig(), "train"), fields(DigitsConfig(), "test")
    seen = {image.numpy().tobytes() for image in train["image"]}
    assert not any(image.numpy().tobytes() in seen for image in test["image"])
    share = train["label"].bincount() / (train["label"].bincount() + test["label"].bincount())
    assert ((share - 0.8).abs() < 0.01).all()
    assert torch.equal(fields(DigitsConfig(), "test")["image"], test["image"])
    assert not torch.equal(fields(DigitsConfig(seed=1), "test")["image"], test["image"])


def test_captions_name_the_number_and_stay_with_their_picture():
    by_seed = []
    for seed in (0, 1):
        captions = {}
        for split in ("train", "test"):
            data = fields(DigitsConfig(seed=seed), split)
            for image, label, caption in zip(data["image"], data["label"], data["caption"], strict=True):
                assert NUMBERS[label] in caption.replace(",", "").split()
                captions[image.numpy().tobytes()] = caption
        by_seed.append(captions)
    assert by_seed[0] == by_seed[1]


def test_every_way_of_writing_is_common():
    data = fields(DigitsConfig(), "train")
    for values in handwriting((data["image"][:, 0] + 1) / 2, data["label"]):
        assert values.bincount(minlength=3).min() > 0.25 * len(values)


def test_shear_is_the_slope_of_a_stroke():
    upright, right = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    upright[0, 1:7, 3] = 1
    for row in range(8):
        right[0, row, 7 - row] = 1
    assert shear(torch.cat((upright, right, right.flip(2)))).tolist() == pytest.approx([0, 1, -1], abs=1e-6)


def test_a_size_below_the_native_one_is_refused():
    with pytest.raises(ValueError, match="size"):
        DigitsConfig(size=7)
