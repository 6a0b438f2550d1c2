"""Shards: any data set packed into them and read back the same, and those that litdata made of something else."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.tiny import CONFIG
from torch import Tensor

from mtdiffusion import Dataset
from mtdiffusion_engine.cli import main
from mtdiffusion_plugins.datasets import litdata as plugin
from mtdiffusion_plugins.datasets.digits import DigitsConfig
from mtdiffusion_plugins.datasets.litdata import LitDataConfig, decode, encode
from mtdiffusion_registry import EmptySplit, UserError
from mtdiffusion_registry.looking import look_through


class Listed(Dataset):
    def __init__(self, samples: Sequence[dict[str, Tensor | str]]) -> None:
        self.samples, self.fingerprint = samples, "of a list"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return self.samples[index]


def same(one: dict[str, Tensor | str], other: dict[str, Tensor | str]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype  # type: ignore[union-attr,arg-type]
        if isinstance(value, Tensor)
        else value == other[name]
        for name, value in one.items()
    )


def levels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).float().div_(127.5).sub_(1)


SAMPLES: list[dict[str, Tensor | str]] = [
    {"image": levels(3, 8, 9), "mask": torch.randint(7, (8, 9)), "label": torch.tensor(3), "caption": "né a\n"},
    {"image": levels(3, 4, 4), "embedding": torch.nn.functional.normalize(torch.randn(16), dim=0)},  # of another size
    {"caption": "", "label": torch.tensor(-70000), "mask": torch.full((2, 2), 300)},
    {"image": torch.randn(1, 4, 4), "flag": torch.tensor(True), "half": torch.randn(3).bfloat16()},
    {"image": torch.tensor([[float("nan"), float("inf")]]), "huge": torch.tensor(2**60), "none": torch.empty(0)},
    {"caption": "\udcff /etc/passwd"},
    {},
]


def test_samples_come_back_exactly_and_take_little_room() -> None:
    for sample in SAMPLES[:4] + SAMPLES[5:]:
        assert same(decode(encode(sample)), sample)
    again = decode(encode(SAMPLES[4]))
    assert torch.equal(again["image"].nan_to_num(7), SAMPLES[4]["image"].nan_to_num(7))  # type: ignore[union-attr]
    assert {key: value.dtype for key, value in encode(SAMPLES[0]).items()} == {
        "levels/image": torch.uint8,
        "int64/mask": torch.uint8,
        "int64/label": torch.uint8,
        "text/caption": torch.uint8,
    }
    with pytest.raises(ValueError, match="holds 'newer/image', which this version does not know"):
        decode({"newer/image": torch.zeros(1)})


@pytest.fixture
def litdata() -> Any:
    return pytest.importorskip("litdata")


def packed(folder: Path, **splits: Sequence[dict[str, Tensor | str]]) -> LitDataConfig:
    folder.mkdir(exist_ok=True)
    LitDataConfig.pack({name: Listed(samples) for name, samples in splits.items()}, folder)
    return LitDataConfig(root=folder)


def test_any_samples_are_packed(litdata: Any, tmp_path: Path) -> None:
    config = packed(tmp_path, train=SAMPLES[:4] + SAMPLES[5:])
    data = config.build("train")
    assert [same(data[i], sample) for i, sample in enumerate(SAMPLES[:4] + SAMPLES[5:])] == [True] * 6
    assert data.describe(2) == f"sample 2 of {tmp_path} (train) (chunk-0-0.bin)"
    told = json.loads((tmp_path / "index.json").read_text())["splits"]["train"]
    assert told["count"] == 6 and told["source"] == "of a list" and told["fingerprint"] == data.fingerprint
    assert told["fields"]["label"] == {"dtype": "int64", "shape": [], "count": 2}
    assert told["fields"]["image"] == {"dtype": "float32", "shape": None, "count": 3}  # of several sizes
    assert told["fields"]["caption"] == {"dtype": "text", "shape": None, "count": 3}
    with pytest.raises(EmptySplit, match="there was none when it was packed"):
        config.build("test")


def many(count: int, side: int) -> list[dict[str, Tensor | str]]:
    return [{"image": levels(3, side, side, seed=i), "label": torch.tensor(i)} for i in range(count)]


def labels(data: Dataset, order: Sequence[int]) -> list[int]:
    return [int(data[index]["label"]) for index in order]  # type: ignore[arg-type]


def _in_worker(data: Dataset, order: list[int], queue: Any) -> None:
    queue.put(labels(data, order))


def test_any_order_in_any_process(litdata: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "SHARD", 20_000)
    data = packed(tmp_path, train=many(60, 32)).build("train")
    assert len(list((tmp_path / "train").glob("chunk-*.bin"))) > 5
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    assert labels(data, order) == order  # what is open now must not be shared with the processes below
    context = get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_in_worker, args=(data, order[n:] + order[:n], queue)) for n in (0, 20)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == sorted([order, order[20:] + order[:20]])


def test_an_object_store_is_asked_once_for_each_shard(
    litdata: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plugin, "SHARD", 20_000)
    packed(tmp_path / "store", train=many(30, 32), test=many(2, 32))
    config = LitDataConfig(root=f"local:{tmp_path / 'store'}")
    data = config.build("train")
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    assert labels(data, order) == order
    shards = sorted(path.name for path in (tmp_path / "store/train").glob("*.bin"))
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.bin")) == shards
    for shard in (tmp_path / "store/train").glob("*.bin"):
        shard.unlink()
    assert labels(pickle.loads(pickle.dumps(data)), order) == order  # from the cache
    assert labels(config.build("test"), [1, 0]) == [1, 0]
    packed(tmp_path / "other", train=many(3, 16))
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "other").rename(tmp_path / "store")
    assert labels(config.build("train"), [2, 0]) == [2, 0]  # packed anew: nothing stale is read
    next((tmp_path / "store/train").glob("*.bin")).unlink()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"chunk-0-0.bin of local:.* cannot be read"):
        config.build("train")[0]
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(UserError, match=r"index.json: cannot be fetched .*Check the address"):
        config.build("train")


def test_digits_are_packed_by_the_command_and_read_back_the_same(
    litdata: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "tiny.toml", tmp_path / "packed"
    config.write_text(CONFIG)
    assert main(["data", "pack", str(config), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "packed: 1,437 samples (train), 360 samples (test)" in printed
    assert f'[data]\nkind = "litdata"\nroot = "{out}"\n' in printed
    for split in ("train", "test"):
        digits, again = DigitsConfig().build(split), LitDataConfig(root=out).build(split)  # type: ignore[arg-type]
        assert len(again) == len(digits)
        assert all(same(again[index], digits[index]) for index in range(0, len(digits), 7))
    config.write_text(CONFIG.replace('data.kind = "digits"', f'data = {{ kind = "litdata", root = "{out}" }}'))
    assert main(["config", "check", str(config)]) == 0
    assert "litdata, 1,437 training samples, 360 held out" in capsys.readouterr().out
    assert main(["data", "pack", str(config), "--out", str(out)]) == 2  # it is there already
    assert "already exists" in capsys.readouterr().err


class Broken(Listed):
    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        if index >= 2:
            raise ValueError("is damaged")
        return self.samples[index]


def test_a_failed_packing_leaves_nothing(
    litdata: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.toml").write_text(CONFIG)
    monkeypatch.setattr(DigitsConfig, "build", lambda self, split: Broken(many(4, 4)))
    command = ["data", "pack", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "packed")]
    assert main(command) == 2
    told = capsys.readouterr().err  # of what is left of this split, and of the other
    assert (
        "error: 2 kinds of trouble with the data:\n- data (train): 2 of 4 samples cannot be read:\n  sample 2: " in told
    )
    assert "- data (test): 2 of 4 samples cannot be read:\n  sample 2: is damaged\n  sample 3: is damaged\n" in told
    assert main([*command, "--as", "shapes"]) == 2
    assert "data sets of kind 'shapes' cannot be packed" in capsys.readouterr().err
    assert main([*command, "--as", "litdat"]) == 2
    assert 'did you mean "litdata"' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


@pytest.fixture
def damaged(litdata: Any, tmp_path: Path) -> Iterator[tuple[LitDataConfig, Path]]:
    yield packed(tmp_path, train=many(3, 4)), next((tmp_path / "train").glob("*.bin"))


def test_damaged_shards_are_named(damaged: tuple[LitDataConfig, Path]) -> None:
    config, shard = damaged
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"chunk-0-0.bin: has \d+ bytes, expected \d+; copy the shards anew"):
        config.build("train")
    shard.write_bytes(content[:30] + bytes([255]) * (len(content) - 30))
    with pytest.raises(UserError, match=r"chunk-0-0.bin of .* \(train\): is damaged"):
        config.build("train")[0]
    shard.unlink()
    with pytest.raises(UserError, match=r"chunk-0-0.bin: is missing"):
        config.build("train")
    index = shard.parent / "index.json"
    index.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        config.build("train")
    index.unlink()
    with pytest.raises(UserError, match=r"expected shards in .*train, and there is no index.json"):
        config.build("train")
    (shard.parents[1] / "index.json").write_text('{"chunks": []}')
    with pytest.raises(UserError, match="is not that of 'mtdiffusion data pack'"):
        config.build("train")
    with pytest.raises(UserError, match="there is no such folder"):
        LitDataConfig(root=shard.parent / "nowhere").build("train")
    with pytest.raises(UserError, match=r"data.size: pictures are as they were packed"):
        LitDataConfig(root=config.root, size=8).build("train")


@pytest.mark.parametrize(
    ("chunk", "problem"),
    [
        ({"filename": "../../secret"}, "the filename of chunk 0 is '../../secret'"),
        ({"filename": "/etc/hostname"}, "the filename of chunk 0 is '/etc/hostname'"),
        ({"filename": 3}, "the filename of chunk 0 is 3"),
        ({"chunk_size": "many"}, "chunk_size of chunk 0 is 'many'"),
        ({"chunk_bytes": None}, "chunk_bytes of chunk 0 is None"),
    ],
)
def test_an_index_that_names_files_elsewhere_or_tells_no_numbers_is_refused(
    damaged: tuple[LitDataConfig, Path], chunk: dict[str, Any], problem: str
) -> None:
    config, shard = damaged
    path = shard.with_name("index.json")
    index = json.loads(path.read_text())
    index["chunks"][0] |= chunk
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"train/index\.json is not an index that litdata writes \({problem}\)"):
        config.build("train")


def jpeg(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (255, 0, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


def foreign(folder: Path, samples: Sequence[Any]) -> None:
    from litdata.streaming import Cache

    folder.mkdir(parents=True)
    writer = Cache(str(folder), chunk_bytes=10_000)
    for index, sample in enumerate(samples):
        writer[index] = sample
    writer.done()
    writer.merge()


def test_shards_made_elsewhere_are_read_by_fields(litdata: Any, tmp_path: Path) -> None:
    def sample(index: int) -> dict[str, Any]:
        return {
            "file": jpeg(20),
            "pixels": torch.full((3, 20, 20), 255, dtype=torch.uint8),
            "seg": np.full((20, 20), index, np.int64),
            "cls": index,
            "text": f"number {index}",
            "vector": np.array([3.0, 4.0], np.float32),
        }

    foreign(tmp_path / "train", [sample(index) for index in range(10)])
    columns = {"image": "file", "white": "pixels", "mask": "seg", "label": "cls", "caption": "text", "clip": "vector"}
    kinds = ("image", "image", "mask", "label", "caption", "embedding")
    fields = dict(zip(columns, kinds, strict=True))
    config = LitDataConfig(root=tmp_path, fields=fields, columns=columns, size=8)
    data = config.build("train")
    read = data[7]
    assert read["image"].shape == read["white"].shape == (3, 8, 8)  # type: ignore[union-attr]
    assert read["image"][0].min() > 0.9 and bool((read["white"] == 1).all())  # type: ignore[index,union-attr,operator]
    assert read["mask"].tolist() == [[7] * 8] * 8 and int(read["label"]) == 7  # type: ignore[union-attr,arg-type]
    assert read["caption"] == "number 7" and read["clip"].tolist() == pytest.approx([0.6, 0.8])  # type: ignore[union-attr]
    assert data.fingerprint and data.fingerprint == config.build("train").fingerprint
    assert config.reading(["label"]).build("train")[0].keys() == {"label"}
    with pytest.raises(EmptySplit, match="has none of the folders test, val, validation"):
        config.build("test")
    with pytest.raises(UserError, match=r"has no column 'clas'.* did you mean \"cls\""):
        LitDataConfig(root=tmp_path, fields={"clas": "label"}).build("train")[0]
    with pytest.raises(UserError, match=r"data pack.*data.fields"):
        LitDataConfig(root=tmp_path).build("train")


def test_pickled_samples_are_never_read(litdata: Any, tmp_path: Path) -> None:
    foreign(tmp_path / "train", [{"cls": pickle.loads, "evil": 3}])
    with pytest.raises(UserError, match="its samples are pickled, which can run any code"):
        LitDataConfig(root=tmp_path, fields={"cls": "label"}).build("train")


def test_without_the_library_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(UserError, match=r"pip install 'mtdiffusion\[streaming\]'"):
        LitDataConfig(root=tmp_path).build("train")
    with pytest.raises(UserError, match=r"pip install 'mtdiffusion\[streaming\]'"):
        LitDataConfig.pack({"train": Listed(many(1, 4))}, tmp_path)


def test_keys_that_name_no_field_are_refused() -> None:
    with pytest.raises(ValueError, match="allow_missing names mask"):
        LitDataConfig(root="s3://bucket/data", fields={"image": "image"}, allow_missing=("mask",))
    assert LitDataConfig(root="s3://bucket/data").root == "s3://bucket/data"


def test_all_kinds_of_trouble_of_shards_are_told_in_one_round(litdata: Any, tmp_path: Path) -> None:
    def sample(index: int) -> dict[str, Any]:
        return {"label": -1 if index % 3 == 1 else 2, "image": b"" if index == 2 else jpeg(20), "caption": "x"}

    for split, count in (("train", 9), ("test", 3)):
        foreign(tmp_path / "made" / split, [sample(i) for i in range(count)])
    fields = {"label": "label", "image": "image", "text": "caption"}
    data = LitDataConfig(root=tmp_path / "made", fields=fields).build("train")  # read when they come up
    with pytest.raises(UserError, match=r"found -1\); .*has no column 'text' for the field 'text'"):
        data[1]
    with pytest.raises(UserError) as caught:
        look_through(data, "data")
    told = str(caught.value)
    assert "3 of 9 samples have a field 'label' that cannot be read:\n  sample 1 of" in told
    assert "9 of 9 samples have a field 'text' that cannot be read:\n" in told and "and 4 more" in told
    assert "data: sample 2 of" in told and "3 kinds of trouble" in told

    config = packed(tmp_path / "packed", train=many(60, 64), test=many(60, 64))
    gone = sorted((tmp_path / "packed" / "train").glob("*.bin"))
    whole = sorted((tmp_path / "packed" / "test").glob("*.bin"))
    gone[0].unlink()
    whole[0].write_bytes(whole[0].read_bytes()[:-9])
    with pytest.raises(UserError) as caught:
        config.build("train")
    told = str(caught.value)
    assert f"{gone[0]}: is missing" in told and f"{whole[0]}: has" in told and "2 kinds of trouble" in told
