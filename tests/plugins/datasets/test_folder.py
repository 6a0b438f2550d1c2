import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image, ImageColor
from safetensors.torch import save_file
from tests.engine.tiny import toy

from mtdiffusion_engine.data import load_watched
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_plugins.datasets import _decoded
from mtdiffusion_plugins.datasets.folder import FolderConfig
from mtdiffusion_plugins.fields import ClassFolderField, ImageField, MaskField
from mtdiffusion_plugins.files import from_levels, read_mask
from mtdiffusion_plugins.label import LabelConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.pictures import picture_size

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
    return FolderConfig(root=root, fields=fields, **{"test_fraction": 0, **options}).build(split)


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


def test_folders_may_have_any_names(root):
    (root / "image").rename(root / "images")
    (root / "mask").rename(root / "segmentation maps")
    config = FolderConfig(root=root, fields={"images": "image", "segmentation maps": "mask"}, test_fraction=0)
    assert config.reading(["images", "segmentation maps"]).build("train")[3].keys() == {"images", "segmentation maps"}
    fails(root, {"image": "images"}, r'Left of the = is the field.*image = "image"')


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
    assert build(root, {"image": ImageField(channels=1)})[0]["image"].shape == (1, 8, 12)


def test_what_the_cache_has_no_room_for_is_decoded_when_it_is_asked_for(root, monkeypatch):
    kept = build(root, {"image": "image", "label": "label"})
    monkeypatch.setattr(_decoded, "CACHE_LIMIT", 1000)
    (root / "image" / "000.png").touch()  # another time: decoded anew
    for _ in range(2):  # the second time its files are not looked through again
        read = build(root, {"image": "image", "label": "label"})
        for index in range(len(STEMS)):
            assert torch.equal(kept[index]["image"], read[index]["image"]) and read[index].keys() == kept[index].keys()
    (root / "image" / "000.png").unlink()
    with pytest.raises(UserError, match=r"000\.png"):
        read[0]


def test_pictures_are_decoded_once(root, monkeypatch):
    fields = {"image": "image", "mask": "mask"}
    first = build(root, fields, size=4)
    monkeypatch.setattr(ImageField, "read", None)  # would fail if it were called
    again = build(root, fields, size=4)
    assert all(torch.equal(first[i]["image"], again[i]["image"]) for i in range(40))
    assert first.fingerprint == again.fingerprint != build(root, {"mask": "mask"}, size=4).fingerprint
    monkeypatch.undo()
    picture(99).save(root / "image" / "007.png")  # a changed file is read again, and what it was is forgotten
    changed = build(root, fields, size=4)
    assert not torch.equal(changed[7]["image"], first[7]["image"]) and changed.fingerprint != first.fingerprint


def test_a_worker_process_maps_the_pictures_again(root):
    data = build(root, {"image": "image"})
    sent = pickle.dumps(data)
    assert len(sent) < 40 * 8 * 12 * 3  # no pixels travel
    assert torch.equal(pickle.loads(sent)[5]["image"], data[5]["image"])


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
    fails(root, {"depth": "label"}, r"expected depth/\*\.txt .*or depth\.csv or depth\.tsv or depth\.json")
    fails(root, {"depth": "image"}, r"found .*image/.*mask/.*of its name: \w+/depth/")


def test_folders_of_classes_without_a_folder_of_the_field_are_told_what_reads_them(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "1.png")
    fails(tmp_path, {"image": "image"}, r"found cat/, dog/\. .*name = \"image_folder\" reads them")


def test_a_field_that_is_read_and_not_listed_is_named_with_those_that_are(root):
    config = FolderConfig(root=root, fields={"image": "image", "masks": "mask"})
    with pytest.raises(UserError, match=r"'mask', but data.fields has only image, masks; did you mean \"masks\"\?"):
        config.reading(["image", "mask"])


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
    fails(root, {"image": "image"}, r"005\.png: the picture is damaged")
    path.write_text("not a picture")
    fails(root, {"image": "image"}, r"005\.png: cannot be read as a picture")
    (root / "image" / "006.png").write_bytes(b"")
    fails(root, {"image": "image"}, r"(?s)2 of 40 files of the field 'image' cannot be used:.*005\.png.*006\.png")


def test_a_mask_in_colour_is_refused(root):
    picture(0).save(root / "mask" / "002.png")
    fails(root, {"mask": "mask"}, r"002\.png: a mask's pixels must be class indices .* mode 'RGB'")


def test_pictures_of_different_sizes_need_the_option(root):
    picture(0, size=(9, 9)).save(root / "image" / "002.png")
    fails(root, {"image": "image"}, r"000\.png is 12×8, .*002\.png is 9×9. Set size")
    assert build(root, {"image": "image"}, size=8)[2]["image"].shape == (3, 8, 8)


@pytest.mark.parametrize("value", ["1.5", "-1", "1e1", "12345678901234567890"])
def test_a_label_that_is_no_index_is_named(root, value):
    (root / "label.csv").write_text(f"stem,value\n000,1\n001,{value}\n")
    fails(root, {"label": "label"}, rf"label\.csv: label of '001': expected a class index .* found '{value}'")


def test_labels_of_other_json_types_are_refused(tmp_path):
    for value in ("true", "[1]", "1.5"):
        (tmp_path / "label.json").write_text(f'{{"a": {value}}}')
        fails(tmp_path, {"label": "label"}, "label of 'a': expected a class index")


def test_a_caption_that_is_no_text_is_named(tmp_path):
    (tmp_path / "caption.json").write_text('{"a": 3}')
    fails(tmp_path, {"caption": "caption"}, "caption of 'a': expected a text, found 3")


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
    fails(root, {"label": "label"}, r"label\.csv: needs a column 'stem' or 'file_name' .* found 000, 1")
    (root / "label.csv").write_text("stem,grade\n000,1\n")
    fails(root, {"label": "label"}, r"label\.csv: needs a column 'value' or 'label' .* found grade")
    (root / "label.csv").write_text("value,stem\n1,000\n1\n")
    fails(root, {"label": "label"}, r"label\.csv: row 2 has nothing in the column 'stem'")
    (root / "label.csv").unlink()
    for name, text in (("csv", "stem\n000\n"), ("jsonl", '{"stem": 0}'), ("json", '[{"stem": "000"}]')):
        table = root / f"label.{name}"
        for content in (text, '{"000": {}}') if name == "json" else (text,):
            table.write_text(content)
            fails(root, {"label": "label"}, rf"label\.{name}: needs a column 'value' or 'label' beside .* found none")
        table.unlink()
    (root / "caption.json").write_text('{"a": ')
    fails(root, {"caption": "caption"}, r"caption\.json: cannot be read as a table")
    (root / "caption.json").write_text('["a"]')
    fails(root, {"caption": "caption"}, r"caption\.json: must hold one object .* found a list")
    (root / "clip.safetensors").write_bytes(b"junk")
    fails(root, {"clip": "embedding"}, r"cannot read .*clip\.safetensors")


@pytest.mark.parametrize(
    ("vector", "match"),
    [
        ([1.0, 2, 3], r"clip of '001' has shape \[3\], but that of '000' has \[4\]"),
        ([[1.0, 2, 3, 4]], r"'001': expected a vector of numbers, found shape \[1, 4\]"),
        ([0.0, 0, 0, 0], r"'001': expected a vector of finite numbers that are not all zero"),
        ([float("nan"), 0, 0, 1], r"'001': expected a vector of finite numbers that are not all zero"),
    ],
)
def test_a_bad_embedding_is_named(root, vector, match):
    save_file({"000": torch.ones(4), "001": torch.tensor(vector)}, root / "clip.safetensors")
    fails(root, {"clip": "embedding"}, match)


def test_all_kinds_of_trouble_are_told_in_one_round(root):
    """Of samples that lack something, too, and of each split."""
    for stem in ("000", "001", "002", "003", "004", "005", "006"):
        (root / "mask" / f"{stem}.png").unlink()
    for stem in ("001", "020", "021"):  # of the first, the mask is missing as well
        (root / "image" / f"{stem}.png").write_bytes(b"\x89PNG no more")
    picture(1, (4, 8)).save(root / "image" / "030.png")
    picture(2, (8, 12)).save(root / "image" / "031.png")
    (root / "mask" / "040.bmp.bak").write_text("")
    text = "stem,value\n" + "".join(f"{stem},{'' if stem == '033' else 1}\n" for stem in STEMS[:-2])
    (root / "label.csv").write_text(text.replace("022,1", "022,-1").replace("023,1", "023,1.5"))
    fields = {"image": "image", "mask": "mask", "label": "label"}
    with pytest.raises(UserError) as caught:
        build(root, fields)
    told = str(caught.value)
    assert "holds files of another type than" in told and "040.bmp.bak" in told
    assert "2 of 40 samples" in told and "have no 'label': 038, 039" in told
    assert "3 of 40 files of the field 'image' cannot be used" in told
    assert all(f"image/{stem}.png" in told for stem in ("001", "020", "021"))
    assert "'image' has pictures of different sizes" in told
    assert "030.png is 4×8, " in told and "031.png is 8×12. Set size" in told
    assert "2 values of 'label' cannot be used" in told and "'022'" in told and "'023'" in told
    assert told.startswith("5 kinds of trouble with the data:\n- ")

    (root / "mask" / "040.bmp.bak").unlink()
    with pytest.raises(UserError) as caught:
        build(root, fields, size=8)
    told = str(caught.value)
    assert "have no 'mask': 000, 001, 002, 003, 004 and 2 more" in told
    assert "3 of 40 files of the field 'image' cannot be used" in told
    assert "2 of 40 samples have pictures that do not fit" in told and "030: its pictures do not lie" in told


@pytest.mark.parametrize("known", ["a field that is nowhere", "another size"])
def test_files_that_cannot_be_used_yet_are_not_read_for_ever(root, known, monkeypatch):
    monkeypatch.setattr(_decoded, "PATIENCE", 0)
    monkeypatch.setattr(_decoded, "_PART", 8)
    for stem in ("002", "003", "039"):
        (root / "image" / f"{stem}.png").write_bytes(b"\x89PNG no more")
    fields = {"image": "image"}
    if known == "another size":
        picture(1, (4, 8)).save(root / "image" / "001.png")
    else:
        fields["depth"] = "mask"
    with pytest.raises(UserError) as caught:
        build(root, fields)
    told = str(caught.value)
    assert "2 of the first 8 of 40 files of the field 'image' cannot be used" in told and "039.png" not in told
    assert ("001.png is 4×8" if known == "another size" else "no data for field 'depth'") in told


def test_the_trouble_of_the_other_split_is_told_as_well(root):
    fields, share = {"image": "image", "label": "label"}, 0.3
    held_out = FolderConfig(root=root, fields={"caption": "caption"}, test_fraction=share).build("test").stems
    trained = [stem for stem in STEMS if stem not in held_out]
    bad = [trained[0], *held_out[:2]]
    for stem in bad:
        (root / "image" / f"{stem}.png").write_bytes(b"")
    rows = (f"{stem},{-1 if stem == trained[1] else 1}\n" for stem in STEMS)
    (root / "label.csv").write_text("stem,value\n" + "".join(rows))
    for split in ("train", "test"):
        with pytest.raises(UserError, match="3 kinds of trouble") as caught:
            build(root, fields, split, test_fraction=share)
        assert f"label of {trained[1]!r}" in str(caught.value)
        assert all(f"image/{stem}.png" in str(caught.value) for stem in bad)


def test_what_was_mended_is_read_as_if_nothing_had_been(root):
    whole = (root / "image" / "003.png").read_bytes()
    (root / "image" / "003.png").write_bytes(b"")
    (root / "mask" / "004.png").rename(root / "004.png")
    fields = {"image": "image", "mask": "mask"}
    fails(root, fields, "2 kinds of trouble")
    (root / "image" / "003.png").write_bytes(whole)
    fails(root, fields, "1 of 40 samples in .* have no 'mask': 004")
    (root / "004.png").rename(root / "mask" / "004.png")
    data = build(root, fields)
    assert torch.equal(data[4]["mask"], torch.full((8, 12), 4)) and len(data) == 40


def test_files_of_another_type_are_not_skipped_silently(root):
    (root / "image" / ".DS_Store").write_text("")
    assert len(build(root, {"image": "image"})) == 40
    (root / "image" / "050.heic").write_text("")
    fails(root, {"image": "image"}, r"another type than .*: 050\.heic")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fields": {}}, "fields"),
        ({"allow_missing": ("y",)}, "allow_missing names y, but the fields are x"),
        ({"size": (4, 0)}, "size"),
        ({"size": 0}, "size"),
        ({"test_fraction": 1.5}, "test_fraction"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        FolderConfig(**{"root": "data", "fields": {"x": "image"}, **options})


def test_a_kind_of_field_that_is_not_installed_is_named(root, caplog):
    fails(
        root,
        {"image": "picture"},
        r"data\.fields\.image: there is no field of kind \"picture\".*installed: caption, class_folder",
    )
    config = FolderConfig(root=root, fields={"image": "image", "x": "picture"}, test_fraction=0)
    with caplog.at_level("INFO", "mtdiffusion"):
        assert config.reading(["image"]).build("train")[0].keys() == {"image"}  # who does not read it does not need it
    assert "data.fields: x left out, since no modality reads it" in caplog.text


# --- as people store things -------------------------------------------------------------------------------------------


def labels(root, text, name="label.csv", encoding="utf-8", **options):
    """The label of each stem, None where there is none, of a table with this text."""
    for path in root.glob("label.*"):
        path.unlink()
    (root / name).write_bytes(text.encode(encoding))
    data = build(root, {"image": "image", "label": "label"}, **options)
    found = (data[i].get("label") for i in range(len(data)))
    return [value.item() if isinstance(value, torch.Tensor) else value for value in found]


@pytest.fixture
def abc(tmp_path):
    """Pictures a, b and c."""
    (tmp_path / "image").mkdir()
    for index, stem in enumerate("abc"):
        picture(index).save(tmp_path / "image" / f"{stem}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("stem,value\na,0\nb,1\nc,1\n", "label.csv"),
        ("stem,value\na,0.0\nb,1.0\nc,1.0\n", "label.csv"),  # after a gap, a column of floats
        ("stem, value\na, 0\nb,1 \nc,+1\n\n", "label.csv"),
        ("value;stem;note\n0;a;x\n1;b;\n1;c;y,z\n", "label.csv"),
        ("stem\tvalue\na\t0\nb\t1\nc\t1\n", "label.tsv"),
        ("file_name,label\na.png,0\nb.png,1\nc.png,1\n", "label.csv"),
        ("file_name,value\nimage/a.png,0\n./image/b.png,1\ndata\\image\\c.png,1\n", "label.csv"),
        ('{"a": 0, "b": 1.0, "c": "1"}', "label.json"),
        ('[{"stem": "a", "label": 0}, {"stem": "b", "label": 1}, {"stem": "c", "label": 1}]', "label.json"),
        ('{"stem": "a", "value": 0}\n{"stem": "b", "value": 1}\n\n{"stem": "c", "value": 1}\n', "label.jsonl"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_as_people_store_them(abc, table, name, encoding):
    assert labels(abc, table, name, encoding) == [0, 1, 1]


def test_blanks_are_missing_values(abc):
    for table, name in (
        ("stem,value\na,0\nb,\nc,cat\n", "label.csv"),
        ('{"a": 0, "b": null, "c": "cat"}', "label.json"),
    ):
        assert labels(abc, table, name, allow_missing=["label"]) == [0, None, "cat"]
        with pytest.raises(UserError, match=rf"{name}: 1 of 3 samples have nothing in 'label': b. .*allow_missing"):
            labels(abc, table, name)


def test_a_table_in_another_encoding_is_named(abc):
    with pytest.raises(UserError, match=r"label\.csv: not UTF-8 \(line 2\); save it as UTF-8"):
        labels(abc, "stem,value\na,é\n", encoding="latin-1")


def test_a_table_in_parquet(abc):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"file_name": ["a.png", "b.png", "c.png"], "label": [0.0, None, 1.0]})
    pytest.importorskip("pyarrow.parquet").write_table(table, abc / "label.parquet")
    data = build(abc, {"image": "image", "label": "label"}, allow_missing=["label"])
    assert [int(data[i]["label"]) if "label" in data[i] else None for i in range(3)] == [0, None, 1]


def test_stems_agree_in_any_form_of_unicode_and_in_none(tmp_path):
    (tmp_path / "image").mkdir()
    picture(0).save(tmp_path / "image" / "cafe\u0301.png")
    (tmp_path / "label.csv").write_text("stem,value\ncaf\u00e9,1\n", encoding="utf-8")
    assert build(tmp_path, {"image": "image", "label": "label"})[0]["label"] == 1
    (tmp_path / "label.csv").unlink()
    picture(1).save(Path(os.fsdecode(bytes(tmp_path / "image") + b"/caf\xe9.png")))  # no UTF-8 at all
    data = build(tmp_path, {"image": "image"}, test_fraction=0.001)  # by a hash of each stem
    assert len(data) == 2 and "caf" in data.describe(0) + data.describe(1)


def test_a_folder_for_each_class(tmp_path):
    for stem in ("cat/1", "cat/2", "dog/1"):
        (tmp_path / "image" / stem).parent.mkdir(parents=True, exist_ok=True)
        picture(len(stem)).save(tmp_path / "image" / f"{stem}.png")
    (tmp_path / "image" / ".ipynb_checkpoints").mkdir()
    picture(0).save(tmp_path / "image" / ".ipynb_checkpoints" / "1.png")
    fields = {"image": "image", "label": ClassFolderField()}
    data = build(tmp_path, fields)
    assert data.stems == ["cat/1", "cat/2", "dog/1"]
    assert [data[i]["label"] for i in range(3)] == ["cat", "cat", "dog"]
    config = FolderConfig(root=tmp_path, fields=fields, test_fraction=0)
    assert config.reading(["label"]).build("train")[2]["label"] == "dog"
    picture(0).save(tmp_path / "image" / "stray.png")
    fails(tmp_path, fields, r"expected the files of 'image' in a folder for each class .* found stray in none")
    fails(tmp_path, {"label": ClassFolderField(of="mask")}, "is the folder of 'mask', which is no field with files")


def test_a_metadata_table_holds_columns_for_several_fields(tmp_path):
    """Hugging Face's imagefolder: file_name names the picture, NAME_file_name another one."""
    (tmp_path / "scans").mkdir()
    for index, stem in enumerate("ab"):
        picture(index).save(tmp_path / "scans" / f"{stem}.png")
        Image.fromarray(np.full((8, 12), index, np.uint8)).save(tmp_path / f"seg{stem}.png")
    rows = [
        {"file_name": f"scans/{s}.png", "mask_file_name": f"seg{s}.png", "text": f"scan {s}", "label": i}
        for i, s in enumerate("ab")
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = build(tmp_path, {"image": "image", "mask": "mask", "text": "caption", "label": "label"})
    assert data.stems == ["scans/a", "scans/b"]
    assert torch.allclose(data[1]["image"], build(tmp_path, {"scans": "image"})[1]["scans"])
    assert (data[1]["mask"].unique().tolist(), data[1]["text"], int(data[1]["label"])) == ([1], "scan b", 1)
    rows[0]["file_name"] = "../outside.png"
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails(tmp_path, {"image": "image"}, r"'\.\./outside\.png' leads out of")


def test_a_validation_folder_stands_for_the_test_split(tmp_path):
    for split, stems in (("train", "abc"), ("val", "d")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "label.json").write_text(json.dumps(dict.fromkeys(stems, 1)))
    assert build(tmp_path, {"label": "label"}, "test").stems == ["d"]
    config = FolderConfig(root=tmp_path, fields={"label": "label"})
    assert config.validation() is None
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "label.json").write_text(json.dumps({"e": 1}))
    assert config.build("test").stems == ["e"]
    assert config.validation().stems == ["d"]
    assert load_watched(watching(config), build_model(watching(config)), None).what == "data (validation)"


def watching(data):
    return evolve(toy(), data=data, modalities={"label": LabelConfig(classes=3)})


# --- pictures and masks -----------------------------------------------------------------------------------------------


def half(path, size=(40, 20), turned=False, **options):
    """A picture (width × height) whose right half is white; turned: what a camera on its side saves of it."""
    scene = np.zeros((size[1], size[0]), np.uint8)
    scene[:, size[0] // 2 :] = 255
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(scene)
    if turned:
        exif = image.getexif()
        exif[0x0112] = 6
        image, options = image.transpose(Image.Transpose.ROTATE_90), {**options, "exif": exif}
    image.save(path, **options)


def test_pictures_of_one_sample_must_lie_on_one_another(tmp_path):
    half(tmp_path / "image" / "x.png")
    half(tmp_path / "mask" / "x.png", (20, 10))  # smaller, but of the same frame
    fields = {"image": "image", "mask": "mask"}
    sample = build(tmp_path, fields, size=8)[0]
    assert torch.equal(sample["image"][0] > 0, sample["mask"] > 0)
    half(tmp_path / "mask" / "x.png", (20, 40))
    for size in (8, None):
        message = r"x: its pictures do not lie on one another: image is 40×20 .*, mask is 20×40 "
        fails(tmp_path, fields, message, size=size)
    half(tmp_path / "mask" / "x.png", turned=True)  # as a viewer shows it, it is 40 × 20 again
    sample = build(tmp_path, fields, size=8)[0]
    assert torch.equal(sample["image"][0] > 0, sample["mask"] > 0)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".jpg", {}), (".webp", {}), (".tif", {"compression": "jpeg"}), (".jp2", {"irreversible": True})],
)
def test_masks_compressed_with_losses_are_refused(tmp_path, suffix, options):
    half(tmp_path / "mask" / f"x{suffix}", **options)
    fails(tmp_path, {"mask": "mask"}, rf"x{suffix}: a mask saved as .* with losses .*as PNG")


@pytest.mark.parametrize(
    ("suffix", "options"), [(".webp", {"lossless": True}), (".tif", {}), (".bmp", {}), (".gif", {})]
)
def test_masks_without_losses_are_read(tmp_path, suffix, options):
    half(tmp_path / "mask" / f"x{suffix}", **options)
    mask = build(tmp_path, {"mask": MaskField(values=(0, 255))})[0]["mask"]
    assert mask.unique().tolist() == [0, 1]


def test_colours_that_stand_for_classes(tmp_path):
    (tmp_path / "mask").mkdir()
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 2:4], pixels[:, 4:] = (255, 0, 0), (0, 0, 255)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "mask" / "a.png")
    image.quantize(8).save(tmp_path / "mask" / "b.png")  # the same by a palette
    row = [0, 0, 1, 1, 2, 2]
    data = build(tmp_path, {"mask": MaskField(colours=("black", "#ff0000", "#00f"))})
    assert [data[i]["mask"].tolist() for i in (0, 1)] == [[row] * 4] * 2
    fails(tmp_path, {"mask": MaskField(colours=("black", "red"))}, r"33.3% of its pixels .* #0000ff in row 0, column 4")
    ignoring = build(tmp_path, {"mask": MaskField(colours=("black", "red"), ignore=255)})
    assert ignoring[0]["mask"][0].tolist() == [0, 0, 1, 1, 255, 255]


def test_palettes_that_contradict_one_another_are_refused(tmp_path):
    (tmp_path / "mask").mkdir()
    for stem, palette in (("a", [0, 0, 0, 255, 0, 0]), ("b", [0, 0, 0, 0, 255, 0])):
        image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
        image.putpalette(palette)
        image.save(tmp_path / "mask" / f"{stem}.png")
    fails(tmp_path, {"mask": "mask"}, r"b\.png: index 1 of its palette is #00ff00, and #ff0000 in .*a\.png")


def test_an_unknown_colour_is_named_by_its_place_in_the_file(tmp_path):
    (tmp_path / "mask").mkdir()
    image = Image.new("RGB", (40, 20), "black")
    image.paste("red", (24, 8, 40, 20))
    image.save(tmp_path / "mask" / "a.png")
    for size in (4, (8, 16), None):  # whatever it is scaled and cropped to
        config = FolderConfig(root=tmp_path, fields={"mask": MaskField(colours=("black", "blue"))}, size=size)
        with pytest.raises(UserError, match=r"a\.png: 24\.0% .* #ff0000 in row 8, column 24; add it"):
            config.build("train")


def palette_masks(folder, *palettes, indices=(0, 1, 2)):
    """Masks a, b, ... of these indices, with these palettes; None: in grey."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, palette in zip("abc", palettes, strict=False):
        image = Image.fromarray(np.array([indices], np.uint8))
        if palette is not None:
            image.putpalette([value for colour in palette for value in ImageColor.getrgb(colour)[:3]])
        image.save(folder / f"{stem}.png")


RAMP = [f"#{i:02x}{i:02x}{i:02x}" for i in range(256)]


@pytest.mark.parametrize(
    "palettes",
    [
        (("black", "red", "lime"), ("black", "red", "lime", "blue")),  # an index that is not used
        (("black", "red", "lime"), ("black", "#f80203", "#04ff00")),  # saved again by another program
        (("black", "red", "lime"), RAMP),  # Pillow's own
        (("black", "red", "lime"), None),
        (("black", "red", "lime"), ("red", "red", "red")),  # of one colour
        (("black", "#808080", "white"), ("black", "#404040", "#808080")),  # greys that grow with the index
    ],
)
def test_palettes_that_say_no_more_than_the_indices_are_no_contradiction(tmp_path, palettes):
    palette_masks(tmp_path / "mask", *palettes)
    data = build(tmp_path, {"mask": "mask"})
    assert [data[i]["mask"].tolist() for i in (0, 1)] == [[[0, 1, 2]]] * 2


@pytest.mark.parametrize(("first", "second"), [("black", "white"), ("red", "blue")])
def test_a_palette_in_another_order_is_refused(tmp_path, first, second):
    palette_masks(tmp_path / "mask", (first, second), (second, first), indices=(0, 1))
    fails(tmp_path, {"mask": "mask"}, r"b\.png: index 0 of its palette is .*, and .* in .*a\.png.* in grey")


def test_held_out_masks_must_have_the_palette_of_the_training(tmp_path):
    palette_masks(tmp_path / "train" / "mask", ("black", "red", "lime"))
    palette_masks(tmp_path / "test" / "mask", ("black", "lime", "red"))
    config = FolderConfig(root=tmp_path, fields={"mask": "mask"})
    assert len(config.build("train")) == 1
    with pytest.raises(UserError, match=r"test/mask/a\.png: index 1 .* #00ff00, and #ff0000 in .*train/mask/a\.png"):
        config.build("test")


def test_masks_of_many_classes(tmp_path):
    (tmp_path / "mask").mkdir()
    for stem, top in (("a", 3), ("b", 1000)):
        values = np.array([[0, top]], np.uint8 if top < 256 else np.uint16)
        Image.fromarray(values).save(tmp_path / "mask" / f"{stem}.png")
    data = build(tmp_path, {"mask": "mask"})
    assert [data[i]["mask"].tolist() for i in (0, 1)] == [[[0, 3]], [[0, 1000]]]


def test_size_may_be_height_and_width(root):
    assert build(root, {"image": "image", "mask": "mask"}, size=(4, 6))[0]["image"].shape == (3, 4, 6)


def test_labels_as_text_files_may_be_indices_and_names(abc):
    (abc / "label").mkdir()
    for texts, wanted in ((("2", "0", "1"), [2, 0, 1]), (("2", "cat", "0.0"), [2, "cat", 0])):
        for stem, text in zip("abc", texts, strict=True):
            (abc / "label" / f"{stem}.txt").write_text(f"{text}\n")
        data = build(abc, {"image": "image", "label": "label"})
        found = [data[i]["label"] for i in range(3)]
        assert [x.item() if isinstance(x, torch.Tensor) else x for x in found] == wanted


ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("suffix", "options"), [(".tif", {}), (".png", {}), (".webp", {"lossless": True})])
def test_pictures_are_turned_once_whatever_their_format(tmp_path, suffix, options, orientation):
    (tmp_path / "image").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(0, (6, 4))
    image.save(tmp_path / "image" / f"x{suffix}", exif=exif, **options)
    shown = np.array(image.transpose(ORIENTATIONS[orientation]))
    assert picture_size(tmp_path / "image" / f"x{suffix}") == shown.shape[:2]
    pixels = from_levels(torch.from_numpy(shown).permute(2, 0, 1))
    assert torch.equal(build(tmp_path, {"image": "image"})[0]["image"], pixels)


def grey_png(pixels, bits, clear=None):
    """A grey PNG of so many bits a pixel, and of one grey that is transparent: Pillow writes 1, 8 and 16 bits only."""
    height, width = pixels.shape
    lines = (int("".join(f"{value:0{bits}b}" for value in line), 2) for line in pixels.tolist())
    data = b"".join(b"\0" + line.to_bytes(width * bits // 8, "big") for line in lines)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        *([] if clear is None else [(b"tRNS", struct.pack(">H", clear))]),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def levels(folder, name, content):
    """0..255 of a picture that is all there is of a data set."""
    (folder / "image").mkdir(exist_ok=True)
    (folder / "image" / name).write_bytes(content)
    x = build(folder, {"image": ImageField(channels=1)})[0]["image"]
    (folder / "image" / name).unlink()
    return ((x[0] + 1) * 127.5).round().int().tolist()


def test_greys_of_16_bits_are_read_from_each_format_and_transparent_ones_are_white(tmp_path):
    pixels = np.array([[0, 257 * 7], [257 * 200, 65535]])
    assert levels(tmp_path, "x.png", grey_png(pixels, 16)) == [[0, 7], [200, 255]]
    assert levels(tmp_path, "x.png", grey_png(pixels, 16, clear=257 * 7)) == [[0, 255], [200, 255]]
    assert levels(tmp_path, "x.pgm", b"P5 2 2 65535\n" + pixels.astype(">u2").tobytes()) == [[0, 7], [200, 255]]
    assert levels(tmp_path, "x.png", grey_png(np.array([[0, 1, 2, 3]]), 2)) == [[0, 85, 170, 255]]


INDICES = np.array([[0, 1, 2, 1], [2, 0, 1, 0]], np.uint8)


def tiff_0_is_white(path):
    Image.fromarray(INDICES).save(path, tiffinfo={262: 0})


@pytest.mark.parametrize(
    ("name", "write", "why"),
    [
        ("x.png", lambda path: path.write_bytes(grey_png(INDICES, 2)), "its greys have 2 bits"),
        ("x.png", lambda path: path.write_bytes(grey_png(INDICES, 4)), "its greys have 4 bits"),
        ("x.pgm", lambda path: path.write_bytes(b"P5 4 2 2\n" + INDICES.tobytes()), "its greatest grey is 2"),
        ("x.tif", tiff_0_is_white, "it is a TIFF in which 0 is white"),
    ],
)
def test_masks_whose_greys_are_not_the_numbers_that_are_stored_are_refused(tmp_path, name, write, why):
    (tmp_path / "mask").mkdir()
    write(tmp_path / "mask" / name)
    fails(tmp_path, {"mask": "mask"}, rf"{name}: {why}, .* save it as PNG with 8 bits a pixel")


def test_masks_of_exact_greys_are_read_from_every_format(tmp_path):
    (tmp_path / "mask").mkdir()
    for name in ("a.png", "b.bmp", "c.tif", "d.gif", "e.pgm"):
        Image.fromarray(INDICES).save(tmp_path / "mask" / name)
    (tmp_path / "mask" / "f.png").write_bytes(grey_png(INDICES, 8))
    (tmp_path / "mask" / "g.png").write_bytes(grey_png(INDICES.astype(int), 16))
    data = build(tmp_path, {"mask": "mask"})
    assert all(data[i]["mask"].tolist() == INDICES.tolist() for i in range(7))


@pytest.mark.parametrize("values", [(0, 255), (255, 0)])
def test_values_are_shades_where_a_file_numbers_them_anew(tmp_path, values):
    white = INDICES > 0
    (tmp_path / "mask").mkdir()
    for name, image in (("a.png", white), ("b.tif", white), ("c.png", white * np.uint8(255))):
        Image.fromarray(image).save(tmp_path / "mask" / name)
    two = Image.fromarray(white.astype(np.uint8))
    two.putpalette([0, 0, 0, 255, 255, 255])
    two.save(tmp_path / "mask" / "d.gif")
    data = build(tmp_path, {"mask": MaskField(values=values)})
    wanted = np.where(white, values.index(255), values.index(0)).tolist()
    assert [data[i]["mask"].tolist() for i in range(4)] == [wanted] * 4


def test_a_value_that_is_none_of_values_is_not_taken_for_a_class(tmp_path):
    (tmp_path / "mask").mkdir()
    Image.fromarray(np.array([[0, 255, 1, 7]], np.uint8)).save(tmp_path / "mask" / "x.png")
    fails(
        tmp_path, {"mask": MaskField(values=(0, 255))}, r"x\.png: 25\.0% .* 1 in row 0, column 2 .*which is value 255"
    )
    assert build(tmp_path, {"mask": MaskField(values=(0, 255, 1))})[0]["mask"].tolist() == [[0, 1, 2, 7]]


def test_a_palette_of_greys_is_read_by_its_shades_in_a_mask_of_one_class_too(tmp_path):
    """A GIF of white alone numbers it 0."""
    (tmp_path / "mask").mkdir()
    for name, shade in (("a.gif", 255), ("b.gif", 0)):
        Image.new("L", (3, 2), shade).save(tmp_path / "mask" / name)
    Image.new("L", (3, 2), 255).quantize(2).save(tmp_path / "mask" / "c.png")
    data = build(tmp_path, {"mask": MaskField(values=(0, 255))})
    assert [data[i]["mask"].unique().tolist() for i in range(3)] == [[1], [0], [1]]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palettes_of_few_bits_are_read_as_indices(tmp_path, bits):
    classes = np.arange(2**bits, dtype=np.uint8).reshape(1, -1).repeat(2, 0)
    image = Image.fromarray(classes).convert("P")
    image.putpalette([channel for i in range(2**bits) for channel in (i * 37 % 256, i * 91 % 256, 200 - i)])
    (tmp_path / "mask").mkdir()
    image.save(tmp_path / "mask" / "x.png", bits=bits)
    depth, kind = (tmp_path / "mask" / "x.png").read_bytes()[24:26]
    assert (depth, kind) == (bits, 3)
    assert build(tmp_path, {"mask": "mask"})[0]["mask"].tolist() == classes.tolist()
    assert read_mask(tmp_path / "mask" / "x.png", classes.shape).tolist() == classes.tolist()


def test_values_that_are_none_of_a_class_can_be_void(tmp_path):
    (tmp_path / "mask").mkdir()
    Image.fromarray(np.array([[0, 1, 2, 7]], np.uint8)).save(tmp_path / "mask" / "x.png")
    fails(
        tmp_path, {"mask": MaskField(values=(1, 2))}, r"x\.png: .* such as 0 in row 0.* give ignore an index for such"
    )
    mask = build(tmp_path, {"mask": MaskField(values=(1, 2), ignore=255)})[0]["mask"]
    assert mask.tolist() == [[255, 0, 1, 255]]


def painted(folder, *alphas):
    """A mask of white pixels of these alphas after a black one."""
    pixels = np.full((1, 1 + len(alphas), 4), 255, np.uint8)
    pixels[0, 0, :3], pixels[0, 1:, 3] = 0, alphas
    (folder / "mask").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / "mask" / "x.png")


def test_transparent_pixels_of_painted_masks_are_void_or_refused(tmp_path):
    painted(tmp_path, 255, 0, 255)
    colours = ("black", "white")
    match = r"x\.png: 25\.0% of its pixels are transparent, the first in row 0, column 2.* or give ignore an index"
    fails(tmp_path, {"mask": MaskField(colours=colours)}, match)
    mask = build(tmp_path, {"mask": MaskField(colours=colours, ignore=255)})[0]["mask"]
    assert mask.tolist() == [[0, 1, 255, 1]]
    with pytest.raises(UserError, match="are transparent"):
        read_mask(tmp_path / "mask" / "x.png", (1, 4), colours={(0, 0, 0): 0, (255, 255, 255): 1})
    pixels = np.array([[0, 65535]])
    (tmp_path / "mask" / "x.png").write_bytes(grey_png(pixels, 16, clear=65535))
    fails(tmp_path, {"mask": MaskField(colours=colours)}, "50.0% of its pixels are transparent, .* column 1")


def test_what_is_transparent_in_part_has_the_colour_that_is_stored(tmp_path):
    """As a brush with a soft edge, or a layer to be laid over a picture."""
    painted(tmp_path, 255, 128, 3)
    mask = build(tmp_path, {"mask": MaskField(colours=("black", "white"))})[0]["mask"]
    assert mask.tolist() == [[0, 1, 1, 1]]
    colours = {(0, 0, 0): 0, (255, 255, 255): 1}
    assert read_mask(tmp_path / "mask" / "x.png", (1, 4), colours=colours).tolist() == [[0, 1, 1, 1]]


def test_an_index_for_other_colours_may_be_negative(tmp_path):
    (tmp_path / "mask").mkdir()
    Image.fromarray(np.array([[[0, 0, 0], [9, 9, 9]]], np.uint8)).save(tmp_path / "mask" / "x.png")
    mask = build(tmp_path, {"mask": MaskField(colours=("black", "white"), ignore=-100)})[0]["mask"]
    assert mask.tolist() == [[0, -100]]


@pytest.mark.parametrize(
    ("name", "table", "match"),
    [
        (
            "caption.csv",
            "stem,value\na,one\nb,red, and round\nc,two\n",
            r"row 2 has 3 cells and the header 2.*' ?and round'",
        ),
        ("caption.csv", "stem,value,value\na,x,y\nb,x,y\nc,x,y\n", r"has more than one column 'value'"),
        ("caption.csv", "stem,value,caption\na,x,y\nb,x,y\nc,x,y\n", r"has the columns 'value' and 'caption'"),
        ("caption.json", '[{"stem": "a", "value": "x", "value": "y"}]', r"has more than one value of the key 'value'"),
        ("caption.jsonl", '{"stem": "a", "value": "x", "value": "y"}\n', r"has more than one value of the key 'value'"),
    ],
)
def test_tables_that_say_more_than_is_read_are_refused(abc, name, table, match):
    (abc / name).write_text(table)
    fails(abc, {"image": "image", "caption": "caption"}, rf"{name}: {match}")


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_what_ends_a_line_elsewhere_is_part_of_a_text(abc, end):
    rows = [json.dumps({"stem": stem, "value": f"one{end}two"}, ensure_ascii=False) for stem in "abc"]
    (abc / "caption.jsonl").write_text("\r\n".join(rows), encoding="utf-8", newline="")
    assert build(abc, {"image": "image", "caption": "caption"})[1]["caption"] == f"one{end}two"


def test_two_columns_that_say_the_same_are_one(abc):
    (abc / "label.csv").write_text("stem,value,label\na,1,1\nb,0,0\nc,1,1\n")
    data = build(abc, {"image": "image", "label": "label"})
    assert [int(data[i]["label"]) for i in range(3)] == [1, 0, 1]


def test_columns_of_one_name_that_nobody_reads_are_nothing(abc):
    (abc / "label.csv").write_text("stem,note,value,note\na,x,1,y\nb,x,0,y\nc,x,1,y\n")
    data = build(abc, {"image": "image", "label": "label"})
    assert [int(data[i]["label"]) for i in range(3)] == [1, 0, 1]
    (abc / "label.csv").write_text("stem,value,stem\na,1,a\nb,0,b\nc,1,c\n")
    fails(abc, {"image": "image", "label": "label"}, "label.csv: has more than one column 'stem'")


def test_columns_without_a_name_and_empty_cells_beyond_the_last_are_nothing(abc):
    (abc / "label.csv").write_text(",stem,value,,\n0,a,1,,\n1,b,0,,,,\n2,c,1,,\n")
    data = build(abc, {"image": "image", "label": "label"})
    assert [int(data[i]["label"]) for i in range(3)] == [1, 0, 1]


def test_a_blank_embedding_is_a_missing_one(abc):
    (abc / "clip.json").write_text(json.dumps({"a": [3, 4], "b": None, "c": [0, 1]}))
    data = build(abc, {"image": "image", "clip": "embedding"}, allow_missing=["clip"])
    assert [data[i]["clip"].tolist() if "clip" in data[i] else None for i in range(3)] == [
        pytest.approx([0.6, 0.8]),
        None,
        [0, 1],
    ]
    fails(abc, {"image": "image", "clip": "embedding"}, r"1 of 3 samples have nothing in 'clip': b")


def test_embeddings_of_any_real_numbers_are_read_and_others_refused(abc):
    (abc / "clip").mkdir()
    for stem, vector in (("a", np.array([3, 4], ">f8")), ("b", np.array([3e30, 4e30])), ("c", np.array([3, 4], "<u2"))):
        np.save(abc / "clip" / f"{stem}.npy", vector)
    data = build(abc, {"image": "image", "clip": "embedding"})
    assert all(data[i]["clip"].tolist() == pytest.approx([0.6, 0.8]) for i in range(3))
    np.save(abc / "clip" / "b.npy", np.array([3 + 1j, 4]))
    fails(abc, {"image": "image", "clip": "embedding"}, r"b\.npy: expected real numbers, found complex128")


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_that_leads_back_is_named(abc, target):
    (abc / "image" / "again").symlink_to(target)
    fails(abc, {"image": "image"}, r"again: is a link to .*, which holds it; remove the link")


def test_links_that_lead_to_one_another_are_named(abc, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (abc / "image" / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(abc / "image")
    fails(abc, {"image": "image"}, r"more/back: is a link to .*image, which holds it; remove the link")


def test_a_link_to_another_folder_is_followed(abc, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    picture(5).save(elsewhere / "d.png")
    (abc / "image" / "more").symlink_to(elsewhere)
    assert build(abc, {"image": "image"}).stems == ["a", "b", "c", "more/d"]


def test_a_file_in_place_of_the_data_is_told_apart_from_none(tmp_path):
    (tmp_path / "data").write_text("x")
    fails(tmp_path / "data", {"image": "image"}, r"data is no folder")
    fails(tmp_path / "date", {"image": "image"}, r"date does not exist")


def test_a_size_that_no_picture_can_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'size': expected at most 200,000,000 pixels, found 100000 × 100000"):
        FolderConfig(root=tmp_path, fields={"image": "image"}, size=100_000)


def test_files_that_a_metadata_table_does_not_name_are_told(tmp_path, caplog):
    for name in ("a", "b", "c"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture(0).save(tmp_path / "pictures" / f"{name}.png")
    rows = "file_name,label\npictures/a.png,0\n./pictures/b.png,1\n"
    (tmp_path / "metadata.csv").write_text(rows)
    with caplog.at_level("INFO"):
        assert len(build(tmp_path, {"image": "image", "label": "label"})) == 2
    assert "metadata.csv: leaves out 1 of the files beside those that it names: pictures/c.png" in caplog.text
    caplog.clear()
    (tmp_path / "metadata.csv").write_text(rows + "pictures/c.png,2\n")
    assert len(build(tmp_path, {"image": "image", "label": "label"})) == 3
    assert "leaves out" not in caplog.text


def test_files_that_a_metadata_table_names_and_are_not_there_are_told_once(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,0\nb.png,1\nc.png,1\n")
    with pytest.raises(UserError) as caught:
        build(tmp_path, {"image": "image", "label": "label"})
    table = tmp_path / "metadata.csv"
    assert str(caught.value) == f"{table}: names 2 files that are not in {tmp_path}: b.png, c.png"


def test_of_palettes_that_contradict_the_others_it_is_told_how_many_and_which(tmp_path):
    """The odd ones are named, wherever they are: the first file is no more right than others."""
    (tmp_path / "mask").mkdir()
    for number in range(20):
        image = Image.fromarray(np.array([[0, 1]], np.uint8))
        image.putpalette([0, 0, 0, *((0, 255, 0) if number in (0, 3, 8, 9, 11, 12, 15) else (255, 0, 0))])
        image.save(tmp_path / "mask" / f"{number:02d}.png")
    with pytest.raises(UserError) as caught:
        build(tmp_path, {"mask": "mask"})
    told = str(caught.value)
    assert "field 'mask': 7 of 20 masks with a palette contradict the others:\n" in told
    named = [f"{number:02d}.png: index 1 of its palette is #00ff00, and #ff0000 in " in told for number in range(20)]
    assert [number for number, yes in enumerate(named) if yes] == [0, 3, 8, 9, 11]
    assert "in " + str(tmp_path / "mask" / "01.png") in told and "\nand 2 more\nSo they seem to mean" in told
