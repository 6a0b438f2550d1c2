"""Data sets of Hugging Face's library, made on the spot; without the library, what is said of it."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtdiffusion_plugins.datasets import huggingface
from mtdiffusion_plugins.datasets.huggingface import HuggingFaceConfig
from mtdiffusion_registry import EmptySplit, UserError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("datasets.arrow_dataset")  # the tests' folder "datasets" can be imported, too
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def picture(colour: tuple[int, int, int], turned: int = 1, size: tuple[int, int] = (20, 12)) -> Image.Image:
    image = Image.new("RGB", size, colour)
    image.putpixel((0, 0), (255, 255, 255))
    image.getexif()[0x0112] = turned
    return image


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=image.getexif())
    return buffer.getvalue()


def parquet(library: Any, path: Path, count: int = 10, **more: Any) -> None:
    features = library.Features(
        img=library.Image(),
        cls=library.ClassLabel(names=["cat", "dog", "ship"]),
        text=library.Value("string"),
        vector=[library.Value("float32")],
        **{name: feature for name, (feature, _) in more.items()},
    )
    columns = {
        "img": [{"bytes": encoded(picture((25 * i, 0, 0))), "path": None} for i in range(count)],
        "cls": [i % 3 for i in range(count)],
        "text": [f"number {i}" for i in range(count)],
        "vector": [[3.0, 4.0, i] for i in range(count)],
        **{name: values for name, (_, values) in more.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    library.Dataset.from_dict(columns, features=features).to_parquet(str(path))


FIELDS = {"image": "image", "label": "label", "caption": "caption", "embedding": "embedding"}
COLUMNS = {"image": "img", "label": "cls", "caption": "text", "embedding": "vector"}


def test_columns_of_parquet_become_fields(library: Any, tmp_path: Path) -> None:
    parquet(library, tmp_path / "data/train.parquet")
    parquet(library, tmp_path / "data/validation.parquet", 4)
    config = HuggingFaceConfig(path=str(tmp_path / "data"), fields=FIELDS, columns=COLUMNS, size=(6, 8))
    train = config.build("train")
    sample = train[4]
    assert len(train) == 10 and len(config.build("test")) == 4
    assert train.class_names == {"label": ("cat", "dog", "ship")}
    assert sample["image"].shape == (3, 6, 8) and sample["image"].dtype == torch.float32
    assert torch.allclose(sample["image"][:, 3, 4], torch.tensor([100 / 127.5 - 1, -1, -1]))
    assert sample["label"].dtype == torch.int64 and sample["label"].shape == () and int(sample["label"]) == 1
    assert sample["caption"] == "number 4"
    assert torch.allclose(sample["embedding"], torch.tensor([3.0, 4.0, 4.0]) / 41**0.5)
    assert train.describe(4, "label") == f"row 4 of {tmp_path / 'data'} (train), column 'cls' (1, which is 'dog')"
    again = pickle.loads(pickle.dumps(train))  # as for a worker process
    assert torch.equal(again[9]["image"], train[9]["image"])
    assert train.without(["image", "embedding"])[4] == {"label": sample["label"], "caption": "number 4"}
    assert train[4].keys() == sample.keys()
    assert config.validation() is None
    parquet(library, tmp_path / "data/test.parquet", 5)
    held_out, watched = config.build("test"), config.validation()
    assert watched is not None and (len(held_out), len(watched)) == (5, 4)


def test_fingerprint_is_of_the_data_and_of_how_they_are_read(library: Any, tmp_path: Path) -> None:
    parquet(library, tmp_path / "data/train.parquet")
    config = HuggingFaceConfig(path=tmp_path / "data", fields={"image": "image"}, columns={"image": "img"}, size=8)
    first = config.build("train").fingerprint
    assert first and first == config.build("train").fingerprint
    assert first != config.build("test").fingerprint
    assert (
        first != HuggingFaceConfig(path=tmp_path / "data", fields={"img": "image"}, size=6).build("train").fingerprint
    )
    parquet(library, tmp_path / "data/train.parquet", 11)
    assert first != config.build("train").fingerprint


def test_one_split_is_divided_by_the_seed(library: Any, tmp_path: Path) -> None:
    parquet(library, tmp_path / "one.parquet")

    def texts(split: Any, **options: Any) -> set[Any]:
        fields = {"text": "caption"}
        data = HuggingFaceConfig(path=str(tmp_path / "one.parquet"), fields=fields, **options).build(split)
        return {data[index]["text"] for index in range(len(data))}

    train, test = texts("train", test_fraction=0.3), texts("test", test_fraction=0.3)
    assert len(train) == 7 and len(test) == 3 and not train & test
    assert test != texts("test", test_fraction=0.3, seed=1)
    assert texts("train", train="train[:20%]", test="train[20%:]") == {"number 0", "number 1"}
    with pytest.raises(EmptySplit, match="change test_fraction"):
        texts("test", test_fraction=0.0)


def test_what_save_to_disk_wrote(library: Any, tmp_path: Path) -> None:
    parquet(library, tmp_path / "one.parquet")
    table = library.load_dataset("parquet", data_files=str(tmp_path / "one.parquet"), split="train")
    table.train_test_split(0.2, seed=0).save_to_disk(str(tmp_path / "saved"))
    config = HuggingFaceConfig(path=tmp_path / "saved", fields={"image": "image"}, columns={"image": "img"})
    assert len(config.build("train")) == 8 and len(config.build("test")) == 2
    assert config.build("test")[0]["image"].shape == (3, 12, 20)


def test_a_folder_of_pictures(library: Any, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for index, name in enumerate(("cat", "dog")):
            path = tmp_path / "data" / split / name / "a.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(encoded(picture((255, 0, 0), turned=6 if index else 1), "jpeg"))
    config = HuggingFaceConfig(path=tmp_path / "data", fields={"image": "image", "label": "label"})
    data = config.build("test")
    assert [int(data[index]["label"]) for index in range(2)] == [0, 1]
    assert data[0]["image"].shape == (3, 12, 20)
    assert data[1]["image"].shape == (3, 20, 12)  # turned upright, as its EXIF data say


def test_blank_cells_are_missing_fields_where_they_may_be(library: Any, tmp_path: Path) -> None:
    features = library.Features(
        text=library.Value("string"), cls=library.ClassLabel(names=["cat", "dog"]), img=library.Image()
    )
    values = {
        "text": ["one", None, "three"],
        "cls": [0, 1, -1],
        "img": [{"bytes": encoded(picture((0, 0, 0))), "path": None}, None, None],
    }
    library.Dataset.from_dict(values, features=features).to_parquet(str(tmp_path / "one.parquet"))
    options = {"path": tmp_path / "one.parquet", "fields": {"text": "caption", "cls": "label", "img": "image"}}
    every = HuggingFaceConfig(**options, test_fraction=0.0, allow_missing=("text", "cls", "img")).build("train")
    assert [set(every[index]) for index in range(3)] == [{"text", "cls", "img"}, {"cls"}, {"text"}]
    assert every.describe(2, "cls") == f"row 2 of {tmp_path / 'one.parquet'} (train), column 'cls'"
    with pytest.raises(UserError, match=r"1 of 3 rows have nothing in the column 'text'.*add 'text' to allow_missing"):
        HuggingFaceConfig(**options, test_fraction=0.0, allow_missing=("cls", "img")).build("train")
    label = HuggingFaceConfig(**options, test_fraction=0.0, allow_missing=("text", "img")).build("train")
    with pytest.raises(UserError, match="column 'cls': is blank"):
        label[2]


def test_masks_are_pictures_or_arrays(library: Any, tmp_path: Path) -> None:
    pixels = np.zeros((12, 20), np.uint8)
    pixels[:, 10:] = 2
    features = library.Features(
        mask=library.Image(), array=library.Array2D((12, 20), "int64"), lossy=library.Image(), img=library.Image()
    )
    values = {
        "mask": [{"bytes": encoded(Image.fromarray(pixels)), "path": None}],
        "array": [pixels.astype(np.int64)],
        "lossy": [{"bytes": encoded(Image.fromarray(pixels), "jpeg"), "path": "a.jpg"}],
        "img": [{"bytes": encoded(picture((0, 0, 0), size=(20, 20))), "path": None}],
    }
    library.Dataset.from_dict(values, features=features).to_parquet(str(tmp_path / "one.parquet"))

    def read(*names: str) -> dict[str, Any]:
        fields = {name: "image" if name == "img" else "mask" for name in names}
        path = tmp_path / "one.parquet"
        return HuggingFaceConfig(path=path, fields=fields, test_fraction=0.0, size=(6, 10)).build("train")[0]

    sample = read("mask", "array")
    assert sample["mask"].dtype == torch.int64 and sample["mask"].tolist() == [[0] * 5 + [2] * 5] * 6
    assert torch.equal(sample["mask"], sample["array"])
    with pytest.raises(UserError, match=r"column 'lossy' \(a.jpg\): a mask saved as JPEG with losses"):
        read("lossy")
    with pytest.raises(UserError, match="do not lie on one another: mask is 20×12, img is 20×20"):
        read("mask", "img")


def test_what_is_wrong_is_said(library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [{"bytes": b"none", "path": None}] * 10
    parquet(library, tmp_path / "one.parquet", broken=(library.Image(), broken))

    def build(path: Any = tmp_path / "one.parquet", fields: Any = None, **options: Any) -> Any:
        return HuggingFaceConfig(path=path, fields=fields or {"text": "caption"}, **options).build("train")

    with pytest.raises(UserError, match=r"has no column 'image' for the field 'image'.*columns are img, cls"):
        build(fields={"image": "image"})
    with pytest.raises(UserError, match="column 'broken': cannot be read as a picture"):
        build(fields={"broken": "image"})[0]
    with pytest.raises(UserError, match=r"column 'text': cannot be read as image .expected the bytes of a file"):
        build(fields={"text": "image"})[0]
    with pytest.raises(UserError, match=r"has no split 'training' \(data.train\); did you mean \"train\""):
        build(train="training")
    with pytest.raises(UserError, match=r"has no split 'tets' \(data.test\)"):
        HuggingFaceConfig(path=tmp_path / "one.parquet", fields={"text": "caption"}, test="tets").build("test")
    with pytest.raises(UserError, match="there is no folder or file"):
        build(path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="reads the names of folders"):
        build(fields={"text": "class_folder"})
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"data.path .*cut.parquet: cannot be read"):
        build(path=tmp_path / "cut.parquet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mine.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="a script of its own, and none is run"):
        build(path=tmp_path / "mine")
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # by version
        monkeypatch.setattr(library.config, name, True, raising=False)
    with pytest.raises(UserError, match=r"data.path nobody/nothing: is not in the cache, and HF_HUB_OFFLINE forbids"):
        build(path="nobody/nothing")


def test_a_table_that_is_huge_when_it_is_unpacked_is_refused(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": ["x" * 2**16] * 10})
    parquet.write_table(table, tmp_path / "big.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "big.parquet").stat().st_size < 2**12
    monkeypatch.setattr(huggingface, "_MOST", 2**19)
    for path in (tmp_path / "big.parquet", tmp_path):
        with pytest.raises(UserError, match=r"big\.parquet: a group of its rows takes 0\.0 GiB unpacked, more than"):
            HuggingFaceConfig(path=path, fields={"text": "caption"}).build("train")


def test_a_large_value_that_rows_share_is_refused(library: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "shared.parquet"
    for size, count in ((2**25, 40), (2**10, 40)):
        values = ["x" * size] * count
        parquet.write_table(pyarrow.table({"text": values}), path, compression="zstd")
        column = parquet.ParquetFile(path).metadata.row_group(0).column(0)
        with path.open("rb") as file:
            assert huggingface._dictionary_bytes(file, column.dictionary_page_offset) == size + 4  # and the length
        config = HuggingFaceConfig(path=path, fields={"text": "caption"}, test_fraction=0)
        if size == 2**25:
            with pytest.raises(
                UserError, match=r"shared\.parquet: the values of text share a dictionary of 32 MiB, which"
            ):
                config.build("train")
        else:
            assert len(config.build("train")) == count


def test_only_what_is_read_is_asked_for(library: Any, tmp_path: Path) -> None:
    parquet(library, tmp_path / "one.parquet")
    config = HuggingFaceConfig(path=tmp_path / "one.parquet", fields=FIELDS, columns=COLUMNS, allow_missing=["label"])
    assert config.reading(["caption"]).build("train")[0].keys() == {"caption"}
    assert config.reading([]) == config


def test_keys_that_name_no_field_are_refused() -> None:
    with pytest.raises(ValueError, match="columns names imag, but the fields are image; did you mean"):
        HuggingFaceConfig(path="a/b", fields={"image": "image"}, columns={"imag": "img"})
    with pytest.raises(ValueError, match="allow_missing names mask"):
        HuggingFaceConfig(path="a/b", fields={"image": "image"}, allow_missing=("mask",))


def test_without_the_library_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'mtdiffusion\[huggingface\]'"):
        HuggingFaceConfig(path="a/b", fields={"image": "image"}).build("train")


def test_palettes_of_a_column_must_agree(library: Any, tmp_path: Path) -> None:
    masks = []
    for palette in ([0, 0, 0, 255, 0, 0], [255, 0, 0, 0, 0, 0]):
        image = Image.fromarray(np.array([[0, 1]], np.uint8))
        image.putpalette(palette)
        masks.append({"bytes": encoded(image), "path": None})
    features = library.Features(mask=library.Image())
    library.Dataset.from_dict({"mask": masks}, features=features).to_parquet(str(tmp_path / "one.parquet"))
    config = HuggingFaceConfig(path=tmp_path / "one.parquet", fields={"mask": "mask"}, test_fraction=0.0)
    expected = r"field 'mask': sample 1, column 'mask': index 0 of its palette is #ff0000, and #000000 in sample 0"
    with pytest.raises(UserError, match=expected):
        config.build("train")


def test_all_kinds_of_trouble_are_told_in_one_round(library: Any, tmp_path: Path) -> None:
    texts = [None if i in (1, 4) else f"number {i}" for i in range(10)]
    images = [{"bytes": b"" if i in (1, 2) else encoded(picture((i, 0, 0))), "path": None} for i in range(10)]
    more = {"text": (library.Value("string"), texts), "img": (library.Image(), images)}
    data = tmp_path / "data"
    features = library.Features(**{name: feature for name, (feature, _) in more.items()})
    for name, kept in (("train", slice(None)), ("test", slice(2, 4)), ("validation", slice(1, 2))):
        columns = {name: values[kept] for name, (_, values) in more.items()}
        data.mkdir(exist_ok=True)
        library.Dataset.from_dict(columns, features=features).to_parquet(str(data / f"{name}.parquet"))
    fields = {"image": "image", "label": "label", "caption": "caption"}
    config = HuggingFaceConfig(path=data, fields=fields, columns={"image": "img", "caption": "text"})
    for split in ("train", "test"):
        with pytest.raises(UserError) as caught:
            config.build(split)  # type: ignore[arg-type]
        told = str(caught.value)
        assert f"{data} (train): has no column 'label' for the field 'label'" in told
        assert f"{data} (train): 2 of 10 rows have nothing in the column 'text'. If" in told
        assert (
            f"train split: 2 of 10 samples have a field 'image' that cannot be read:\n  row 1 of {data} (train): "
            in told
        )
        assert f"test split: row 0 of {data} (test): column 'img'" in told
        assert f"{data} (validation): has no column 'label'" in told
        assert f"{data} (validation): 1 of 1 rows have nothing" in told
