import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mtdiffusion_plugins.datasets import folder
from mtdiffusion_plugins.datasets.folder import FolderConfig
from mtdiffusion_registry.errors import UserError

STEMS = [f"{index:03}" for index in range(40)]


def picture(seed, size=(12, 8), mode="RGB"):
    """width × height"""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode)


@pytest.fixture
def root(tmp_path):
    """40 samples of five fields."""
    (tmp_path / "image").mkdir()
    (tmp_path / "mask").mkdir()
    for index, stem in enumerate(STEMS):
        picture(index).save(tmp_path / "image" / f"{stem}.png")
        Image.fromarray(np.full((8, 12), index % 5, np.uint8)).save(tmp_path / "mask" / f"{stem}.png")
    (tmp_path / "label.csv").write_text("stem,value\n" + "".join(f"{stem},{int(stem) % 3}\n" for stem in STEMS))
    (tmp_path / "caption.json").write_text(json.dumps({stem: f"sample, {stem}" for stem in STEMS}))
    save_file({stem: torch.full((4,), 1.0 + int(stem)) for stem in STEMS}, tmp_path / "clip.safetensors")
    return tmp_path


ALL = {"image": "image", "mask": "mask", "label": "label", "caption": "caption", "clip": "embedding"}


def build(root, fields, split="train", **options):
    return FolderConfig(root=str(root), fields=fields, **{"test_fraction": 0, **options}).build(split)


def fails(root, fields, match, split="train", **options):
    with pytest.raises(UserError, match=match):
        build(root, fields, split, **options)


def test_every_field_is_matched_by_stem(root):
    data = build(root, ALL)
    assert data.stems == STEMS
    for index in (0, 7, 39):
        sample = data[index]
        assert sample.keys() == ALL.keys()
        pixels = torch.from_numpy(np.array(picture(index))).permute(2, 0, 1)
        assert sample["image"].dtype == torch.float32
        assert torch.allclose(sample["image"], pixels / 127.5 - 1, atol=1e-6)
        assert torch.equal(sample["mask"], torch.full((8, 12), index % 5))
        assert sample["label"].dtype == torch.int64 and sample["label"].shape == () and sample["label"] == index % 3
        assert sample["caption"] == f"sample, {index:03}"
        assert torch.allclose(sample["clip"], torch.full((4,), 0.5))


def test_the_other_forms_of_each_field(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "text").mkdir()
    for stem in ("a", "b.c"):
        np.save(tmp_path / "clip" / f"{stem}.npy", np.array([3, 4]))
        (tmp_path / "text" / f"{stem}.txt").write_text(f"é {stem}\n", encoding="utf-8")
    np.savez(tmp_path / "dino.npz", **{"a": np.array([0.0, 2]), "b.c": np.array([2.0, 0])})
    (tmp_path / "label.tsv").write_text("note\tvalue\tstem\n-\t 5 \tb.c\n-\t4\ta\n")
    (tmp_path / "grade.json").write_text('{"a": 1, "b.c": 2}')
    data = build(
        tmp_path,
        {"clip": "embedding", "dino": "embedding", "text": "caption", "label": "label", "grade": "label"},
    )
    assert data.stems == ["a", "b.c"]
    assert data[1]["clip"].tolist() == pytest.approx([0.6, 0.8])
    assert data[0]["dino"].tolist() == [0, 1]
    assert [data[index]["text"] for index in (0, 1)] == ["é a", "é b.c"]
    assert [data[index]["label"].item() for index in (0, 1)] == [4, 5]
    assert [data[index]["grade"].item() for index in (0, 1)] == [1, 2]


def test_a_root_relative_to_the_working_folder(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    assert build(root.name, ALL)[3]["label"] == 0


def test_embeddings_in_half_precision(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        save_file({"a": torch.tensor([3.0, 4], dtype=dtype)}, tmp_path / "clip.safetensors")
        vector = build(tmp_path, {"clip": "embedding"})[0]["clip"]
        assert vector.dtype == torch.float32 and vector.tolist() == pytest.approx([0.6, 0.8])


def test_size_scales_and_crops_and_masks_stay_classes(tmp_path):
    """A picture twice as wide as high: red, then a green square in the middle, then blue."""
    (tmp_path / "image").mkdir()
    (tmp_path / "mask").mkdir()
    classes = np.repeat(np.array([1, 7, 7, 3], np.uint8), 16)[None].repeat(32, axis=0)
    colours = np.zeros((8, 3), np.uint8)
    colours[1], colours[7], colours[3] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(colours[classes]).save(tmp_path / "image" / "a.png")
    Image.fromarray(classes).save(tmp_path / "mask" / "a.png")
    sample = build(tmp_path, {"image": "image", "mask": "mask"}, size=8)[0]
    assert torch.equal(sample["mask"], torch.full((8, 8), 7))
    # The resampling filter blends red and blue into the outermost columns, and no further.
    assert sample["image"].shape == (3, 8, 8)
    assert torch.equal(sample["image"][..., 1:-1], torch.tensor([-1.0, 1, -1])[:, None, None].expand(3, 8, 6))
    assert sample["image"][1].min() > 0.5


def test_masks_with_a_palette_are_read_as_indices(tmp_path):
    (tmp_path / "mask").mkdir()
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    image.putdata([0, 1, 2, 1])
    image.save(tmp_path / "mask" / "a.png")
    assert build(tmp_path, {"mask": "mask"})[0]["mask"].tolist() == [[0, 1], [2, 1]]


def test_channels_says_grey_or_colour(root):
    assert build(root, {"image": "image"}, channels=1)[0]["image"].shape == (1, 8, 12)


def test_big_data_are_decoded_when_they_are_asked_for(root, monkeypatch):
    kept = build(root, {"image": "image", "label": "label"})
    monkeypatch.setattr(folder, "MEMORY_LIMIT", 1000)
    read = build(root, {"image": "image", "label": "label"})
    for index in range(len(STEMS)):
        assert torch.equal(kept[index]["image"], read[index]["image"]) and read[index].keys() == kept[index].keys()
    (root / "image" / "000.png").unlink()
    with pytest.raises(UserError, match=r"000\.png"):
        read[0]


def test_the_split_by_hash_is_stable_and_complete(root):
    train, test = (build(root, {"label": "label"}, split, test_fraction=0.25) for split in ("train", "test"))
    assert sorted(train.stems + test.stems) == STEMS and 3 <= len(test) <= 17
    # One more sample moves no other: the choice depends on its own stem only.
    with (root / "label.csv").open("a") as file:
        file.write("another,1\n")
    again = build(root, {"label": "label"}, "test", test_fraction=0.25)
    assert set(again.stems) - {"another"} == set(test.stems)


def test_folders_train_and_test_are_the_splits(tmp_path):
    for split, stems in (("train", "abc"), ("test", "d")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "label.json").write_text(json.dumps(dict.fromkeys(stems, 1)))
    assert build(tmp_path, {"label": "label"}, "train").stems == ["a", "b", "c"]
    assert build(tmp_path, {"label": "label"}, "test").stems == ["d"]
    (tmp_path / "test" / "label.json").unlink()
    (tmp_path / "test").rmdir()
    fails(tmp_path, {"label": "label"}, "folder 'train' only")


def test_an_allowed_missing_field_is_missing_from_the_sample(root):
    (root / "mask" / "003.png").unlink()
    data = build(root, {"image": "image", "mask": "mask"}, allow_missing=("mask",))
    assert len(data) == 40
    assert data[3].keys() == {"image"} and data[4].keys() == {"image", "mask"}


def test_a_missing_field_is_named_with_its_stems_and_the_option(root):
    for stem in STEMS[:7]:
        (root / "mask" / f"{stem}.png").unlink()
    fails(
        root,
        ALL,
        r"7 of 40 samples .* no 'mask': 000, 001, 002, 003, 004 and 2 more.*'mask' to allow_missing",
    )


def test_a_missing_root_or_field(root):
    fails(root / "nowhere", ALL, "nowhere does not exist")
    fails(root, {"depth": "image"}, r"no data for field 'depth' \(image\).*expected depth/\*\.png or depth/\*\.jpg")
    fails(root, {"depth": "label"}, r"expected depth\.csv or depth\.tsv or depth\.json")


def test_nothing_matched_shows_both_sides(root):
    (root / "label.csv").write_text("stem,value\nimg_000,1\nimg_001,2\n")
    fails(root, {"image": "image", "label": "label"}, r"no stem .*image: 000, .*label: img_000, img_001")


def test_nothing_at_all(root):
    (root / "label.csv").write_text("stem,value\n")
    fails(root, {"label": "label"}, "no data in .*label are all empty")


def test_an_empty_split_names_the_option(root):
    fails(root, {"label": "label"}, r"test split .* is empty: change test_fraction \(now 0\)", split="test")


def test_a_truncated_picture_is_named(root):
    path = root / "image" / "005.png"
    path.write_bytes(path.read_bytes()[:100])
    fails(root, {"image": "image"}, r"cannot read picture .*005\.png")
    path.write_text("not a picture")
    fails(root, {"image": "image"}, r"cannot read picture .*005\.png")


def test_a_mask_in_colour_is_refused(root):
    picture(0).save(root / "mask" / "002.png")
    fails(root, {"mask": "mask"}, r"002\.png: a mask's pixels must be class indices .* mode 'RGB'")


def test_an_image_of_16_bits_is_refused(root):
    Image.fromarray(np.zeros((8, 12), np.uint16)).save(root / "image" / "002.png")
    fails(root, {"image": "image"}, r"002\.png: images must have 8 bits .* mode 'I;16'")


def test_pictures_of_different_sizes_need_the_option(root):
    picture(0, size=(9, 9)).save(root / "image" / "002.png")
    fails(root, {"image": "image"}, r"000\.png is 12×8, .*002\.png is 9×9. Set size")
    assert build(root, {"image": "image"}, size=8)[2]["image"].shape == (3, 8, 8)


@pytest.mark.parametrize("value", ["1.5", "-1", "cat", "", "²"])
def test_a_label_that_is_no_index_is_named(root, value):
    (root / "label.csv").write_text(f"stem,value\n000,1\n001,{value}\n")
    fails(root, {"label": "label"}, rf"label\.csv: the label of '001' must be a class index .* found '{value}'")


def test_labels_of_other_json_types_are_refused(tmp_path):
    for value in ("true", "1.0", "null", "[1]"):
        (tmp_path / "label.json").write_text(f'{{"a": {value}}}')
        fails(tmp_path, {"label": "label"}, "the label of 'a' must be a class index")


def test_a_caption_that_is_no_text_is_named(tmp_path):
    (tmp_path / "caption.json").write_text('{"a": 3}')
    fails(tmp_path, {"caption": "caption"}, "the caption of 'a' must be a text, found 3")


def test_duplicate_stems_are_named(root):
    picture(0).save(root / "image" / "004.jpg")
    fails(root, {"image": "image"}, "image has more than one entry for 1 stems: 004")
    (root / "label.csv").write_text("stem,value\n000,1\n000,2\n")
    fails(root, {"label": "label"}, r"label\.csv has more than one entry for 1 stems: 000")
    (root / "caption.json").write_text('{"a": "one", "a": "two"}')
    fails(root, {"caption": "caption"}, r"caption\.json has more than one entry for 1 stems: a")


def test_a_field_found_twice_is_refused(root):
    (root / "label.json").write_text("{}")
    fails(root, {"label": "label"}, r"'label' is there more than once: keep one of .*label\.csv, .*label\.json")


def test_tables_that_cannot_be_read(root):
    (root / "label.csv").write_text("000,1\n")
    fails(root, {"label": "label"}, r"label\.csv needs columns 'stem' and 'value' .* found 000, 1")
    (root / "label.csv").write_text("value,stem\n1,000\n1\n")
    fails(root, {"label": "label"}, r"label\.csv has a row without a stem")
    (root / "caption.json").write_text('{"a": ')
    fails(root, {"caption": "caption"}, r"cannot read .*caption\.json")
    (root / "caption.json").write_text('["a"]')
    fails(root, {"caption": "caption"}, r"caption\.json must hold one object .* found a list")
    (root / "clip.safetensors").write_bytes(b"junk")
    fails(root, {"clip": "embedding"}, r"cannot read .*clip\.safetensors")


@pytest.mark.parametrize(
    ("vector", "match"),
    [
        ([1.0, 2, 3], r"the embedding of '001' has width 3, but that of '000' has width 4"),
        ([[1.0, 2, 3, 4]], r"'001' must be a vector of numbers, found shape \(1, 4\)"),
        ([0.0, 0, 0, 0], r"'001' is zero or not finite"),
        ([float("nan"), 0, 0, 1], r"'001' is zero or not finite"),
    ],
)
def test_a_bad_embedding_is_named(root, vector, match):
    save_file({"000": torch.ones(4), "001": torch.tensor(vector)}, root / "clip.safetensors")
    fails(root, {"clip": "embedding"}, match)


def test_files_of_another_type_are_not_skipped_silently(root):
    (root / "image" / ".DS_Store").write_text("")
    assert len(build(root, {"image": "image"})) == 40
    (root / "image" / "050.heic").write_text("")
    fails(root, {"image": "image"}, r"another type than .*: 050\.heic")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fields": {}}, "fields"),
        ({"fields": {"x": "picture"}}, "picture"),
        ({"allow_missing": ("y",)}, "allow_missing names y, but the fields are x"),
        ({"channels": 2}, "channels"),
        ({"size": 0}, "size"),
        ({"test_fraction": 1.5}, "test_fraction"),
        ({"root": ""}, "root"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        FolderConfig(**{"root": "data", "fields": {"x": "image"}, **options})
