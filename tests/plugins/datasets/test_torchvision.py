"""Published layouts, read from tiny copies of them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from mtdiffusion_plugins.datasets.folder import FolderConfig
from mtdiffusion_plugins.datasets.torchvision import TorchvisionConfig
from mtdiffusion_registry import EmptySplit, UserError


def picture(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def mask(path: Path, left: int, right: int, size: tuple[int, int] = (20, 12)) -> None:
    """A mask whose left half is one value and whose right half is another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((size[1], size[0]), left, np.uint8)
    values[:, size[0] // 2 :] = right
    image = Image.fromarray(values)
    if "Segmentation" in str(path):
        image = image.convert("P")
        image.putdata(values.flatten().tolist())
    image.save(path)


def test_image_folder(tmp_path: Path) -> None:
    picture(tmp_path / "train/cat/a.png")
    picture(tmp_path / "train/dog/b.png", (0, 0, 255))
    picture(tmp_path / "val/dog/c.png")
    train = TorchvisionConfig(name="image_folder", root=tmp_path, size=8).build("train")
    assert len(train) == 2 and int(train[1]["label"]) == 1
    assert train[0]["image"].shape == (3, 8, 8)
    assert torch.allclose(train[0]["image"][:, 4, 4], torch.tensor([1.0, -1.0, -1.0]))
    assert len(TorchvisionConfig(name="image_folder", root=tmp_path, size=8).build("test")) == 1
    assert train.source is not None and train.source.samples == ImageFolder(tmp_path / "train").samples


def test_what_is_no_picture_of_a_class_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "train/cat/a.png")
    picture(tmp_path / "train/loose.png")
    for name in ("cat/b.heic", "cat/.DS_Store", "cat/Thumbs.db", "cat/._a.png"):
        (tmp_path / "train" / name).write_bytes(b"x")
    with caplog.at_level("INFO"):
        assert len(TorchvisionConfig(name="image_folder", root=tmp_path, size=8).build("train")) == 1
    assert "train: 2 files that are no pictures of a class are left out: cat/b.heic, loose.png" in caplog.text


@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_that_leads_back_is_named(tmp_path: Path, target: str) -> None:
    picture(tmp_path / "train/cat/a.png")
    (tmp_path / "train/cat/again").symlink_to(target)
    with pytest.raises(UserError, match=r"cat/again: is a link to .*, which holds it"):
        TorchvisionConfig(name="image_folder", root=tmp_path, size=8).build("train")


def test_a_link_that_leads_back_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them at each turn make as many folders as nobody can wait for."""
    picture(tmp_path / "train/cat/a.png")
    for name in ("again", "once_more"):
        (tmp_path / "train/cat" / name).symlink_to(".")
    seen: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": seen.append(str(path)) or scandir(path))
    with pytest.raises(UserError, match="again: is a link to"):
        TorchvisionConfig(name="image_folder", root=tmp_path, size=8).build("train")
    assert not [path for path in seen if "again" in path or "once_more" in path]


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        entry = {"data": np.full((2, 3072), 255, np.uint8), "labels": [3, 7]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, None] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    train = TorchvisionConfig(name="cifar10", root=tmp_path).build("train")
    assert len(train) == 10 and int(train[1]["label"]) == 7
    assert train[0]["image"].shape == (3, 32, 32) and bool((train[0]["image"] == 1).all())
    assert train.class_names["label"][7] == "7"


def test_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit/VOC2012"
    picture(root / "JPEGImages/one.jpg")
    mask(root / "SegmentationClass/one.png", 15, 255)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("one\n")
    sample = TorchvisionConfig(name="voc", root=tmp_path, size=8).build("test")[0]
    assert sample["mask"].shape == (8, 8) and sample["mask"].dtype == torch.int64
    assert sample["mask"][0, 0] == 15 and sample["mask"][0, 7] == 255  # void is no class


def test_cityscapes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / f"leftImg8bit/{split}/ulm/ulm_0_0_leftImg8bit.png")
        mask(tmp_path / f"gtFine/{split}/ulm/ulm_0_0_gtFine_labelIds.png", 26, 0)  # car; unlabelled
        for rest in ("instanceIds.png", "color.png", "polygons.json"):
            (tmp_path / f"gtFine/{split}/ulm/ulm_0_0_gtFine_{rest}").touch()
    train = TorchvisionConfig(name="cityscapes", root=tmp_path, size=8).build("train")
    assert train[0]["mask"][0, 0] == 13 and train[0]["mask"][0, 7] == 19
    assert len(train.class_names["mask"]) == 19 and train.class_names["mask"][13] == "car"


@pytest.mark.parametrize("name", ["image_folder", "cifar10", "voc", "cityscapes"])
def test_what_is_not_there_is_named_with_the_layout_expected(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.root .*: no {name} \(train\) there: .*Expected root/"):
        TorchvisionConfig(name=name, root=tmp_path).build("train")


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "train/cat/a.png")
    (tmp_path / "train/cat/a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"train/cat/a\.png: cannot be read as a picture"):
        TorchvisionConfig(name="image_folder", root=tmp_path).build("train")


def test_both_splits_number_classes_alike(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cow"):
        picture(tmp_path / f"train/{name}/1.png")
    for name in ("cow", "ant"):
        picture(tmp_path / f"val/{name}/1.png")
    for hidden in ("train/.ipynb_checkpoints", "val/.ipynb_checkpoints", "train/__MACOSX"):
        picture(tmp_path / hidden / "1.png")
    config = TorchvisionConfig(name="image_folder", root=tmp_path, size=8)
    train, test = config.build("train"), config.build("test")
    assert [int(train[i]["label"]) for i in range(3)] == [0, 1, 2]  # type: ignore[arg-type]
    assert [int(test[i]["label"]) for i in range(2)] == [0, 2]  # type: ignore[arg-type]
    assert train.class_names == test.class_names == {"label": ("ant", "bee", "cow")}
    assert test.describe(1).endswith("val/cow/1.png")
    picture(tmp_path / "val/dog/1.png")
    with pytest.raises(UserError, match=r"val: has the class dog, which .*train has not"):
        config.build("test")


def test_an_empty_split_is_told_from_a_missing_one(tmp_path: Path) -> None:
    picture(tmp_path / "train/ant/1.png")
    (tmp_path / "val/ant").mkdir(parents=True)
    with pytest.raises(EmptySplit, match=r"image_folder \(test\) is empty"):
        TorchvisionConfig(name="image_folder", root=tmp_path).build("test")


def test_pictures_are_read_as_by_the_folder_data_set(tmp_path: Path) -> None:
    """Turned as their EXIF data say, transparent parts white, scaled and cropped alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 4), np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    for path in (tmp_path / "a/train/cat/1.png", tmp_path / "b/image/1.png"):
        path.parent.mkdir(parents=True)
        image.save(path, exif=exif)
    one = TorchvisionConfig(name="image_folder", root=tmp_path / "a", size=(8, 6)).build("train")[0]["image"]
    fields = {"image": "image"}
    other = FolderConfig(root=tmp_path / "b", fields=fields, size=(8, 6), test_fraction=0).build("train")[0]["image"]
    assert torch.equal(one, other) and one.shape == (3, 8, 6)  # type: ignore[arg-type,union-attr]
