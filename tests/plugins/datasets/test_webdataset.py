"""Samples in tar files: those of the project, those of others, and those that nobody should read."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import wave
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from PIL import Image

from mtdiffusion_engine import load_run
from mtdiffusion_engine.cli import main
from mtdiffusion_plugins.datasets import webdataset
from mtdiffusion_plugins.datasets.folder import FolderConfig
from mtdiffusion_plugins.datasets.webdataset import WebDatasetConfig
from mtdiffusion_plugins.fields import ImageField, MaskField
from mtdiffusion_registry import EmptySplit, UserError
from mtdiffusion_registry.configs import FieldConfig


def png(value: Any, size: tuple[int, int] = (6, 4), kind: str = "png") -> bytes:
    """width × height"""
    buffer = io.BytesIO()
    Image.new("L" if isinstance(value, int) else "RGB", size, value).save(buffer, kind)
    return buffer.getvalue()


def archive(path: Path, members: list[tuple[str, bytes | str]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def vector(*values: float) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, np.float32))
    return buffer.getvalue()


def ours(first: int, count: int) -> list[tuple[str, bytes | str]]:
    return [
        member
        for index in range(first, first + count)
        for member in (
            (f"{index:04d}.image.png", png((index, 0, 0))),
            (f"{index:04d}.mask.png", png(index % 3)),
            (f"{index:04d}.label.json", json.dumps({"label": index % 3, "name": "cat"})),
            (f"{index:04d}.caption.txt", f"number {index}\n"),
            (f"{index:04d}.clip.npy", vector(3, 4, index)),
        )
    ]


ALL = {"image": "image", "mask": "mask", "label": "label", "caption": "caption", "clip": "embedding"}


def build(root: Path, fields: Any = ALL, split: Any = "train", **options: Any) -> webdataset.WebDatasetDataset:
    return WebDatasetConfig(root=root, fields=fields, **{"test_fraction": 0, **options}).build(split)


def fails(root: Path, match: str, fields: Any = ALL, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        build(root, fields, **options)


def test_members_of_one_stem_are_a_sample(tmp_path: Path) -> None:
    archive(tmp_path / "b.tar", ours(3, 2))
    archive(tmp_path / "a.tar", ours(0, 3))
    archive(tmp_path / ".c.tar", ours(5, 1))  # which is being written
    data = build(tmp_path)
    assert len(data) == 5
    for index in (4, 0, 3, 1, 2):  # in any order
        sample = data[index]
        assert torch.allclose(sample["image"][:, 2, 3], torch.tensor([index / 127.5 - 1, -1, -1]))
        assert torch.equal(sample["mask"], torch.full((4, 6), index % 3))
        assert torch.equal(sample["label"], torch.tensor(index % 3))
        assert sample["caption"] == f"number {index}"
        assert torch.allclose(sample["clip"], torch.tensor([3.0, 4.0, index]) / (25 + index**2) ** 0.5)
    assert data.describe(3, "image") == f"0003.image.png ({tmp_path / 'b.tar'})"
    assert data.describe(0) == f"0000 ({tmp_path / 'a.tar'})"
    again = pickle.loads(pickle.dumps(data))  # as for a worker process
    assert torch.equal(again[4]["image"], data[4]["image"])
    assert data.without(["image", "mask", "clip"])[1].keys() == {"label", "caption"}
    assert data[1].keys() == ALL.keys()
    with pytest.raises(IndexError):
        data[5]


def test_archives_of_others_are_read_by_their_suffixes(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str]] = [("./", b""), ("README.md", "about")]
    for index in range(4):
        stem = f"./n01440764/n01440764_{index}"
        members += [
            (f"{stem}.JPG" if index % 2 else f"{stem}.png", png((0, index, 0), kind="jpeg" if index % 2 else "png")),
            (f"{stem}.cls", str(index)),
            (f"{stem}.seg.png", png(index)),
            (f"{stem}.json", json.dumps({"text": f"number {index}", "width": 6})),
            ("__MACOSX/._n01440764.jpg", "no picture"),
        ]
    archive(tmp_path / "train" / "imagenet-train-000000.tar", members, format=tarfile.GNU_FORMAT)
    archive(tmp_path / "val" / "imagenet-val-000000.tar", members[:7], format=tarfile.USTAR_FORMAT)
    options = {
        "fields": {"image": "image", "label": "label", "mask": "mask", "caption": "caption"},
        "columns": {"mask": "seg.png", "caption": "json/text"},
    }
    data = build(tmp_path, **options)
    assert [(int(data[i]["label"]), data[i]["caption"], int(data[i]["mask"][0, 0])) for i in range(4)] == [
        (i, f"number {i}", i) for i in range(4)
    ]
    assert data[3]["image"].shape == (3, 4, 6)
    assert data.describe(3, "image") == (
        f"n01440764/n01440764_3.jpg ({tmp_path / 'train' / 'imagenet-train-000000.tar'})"
    )
    assert len(build(tmp_path, split="test", **options)) == 1
    either = build(tmp_path, {"image": "image"}, columns={"image": "jpg;png"})
    assert len(either) == 4
    text = archive(tmp_path / "one.tar", [("a.jpg", png((1, 1, 1), kind="jpeg")), ("a.txt", "a dog")])
    assert build(text, {"image": "image", "caption": "caption"})[0]["caption"] == "a dog"


@frozen
class _Seconds(FieldConfig):
    """A recording, as a third party's field reads it: its length in seconds. It takes paths alone."""

    kind: ClassVar[str] = "seconds"
    suffixes: ClassVar[tuple[str, ...]] = (".flac", ".wav")

    def read(self, path: Path, size: tuple[int, int] | None = None) -> torch.Tensor:
        assert path.suffix == ".wav"
        try:
            with wave.open(str(path)) as file:
                return torch.tensor(file.getnframes() / file.getframerate())
        except wave.Error as error:
            raise ValueError(f"{path}: {error}") from error


def sound(frames: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(2 * frames))
    return buffer.getvalue()


def test_readers_of_plugins_read_members(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [("0.speech.wav", sound(4000)), ("1.speech.wav", b"no sound")])
    data = build(path, {"speech": _Seconds()})
    assert float(data[0]["speech"]) == 0.5
    with pytest.raises(UserError, match=r"^a\.tar: 1\.speech\.wav: file does not start with RIFF id"):
        data[1]


def test_what_sample_writes_is_read_back_as_the_folder_is(tiny_run: Path, tmp_path: Path) -> None:
    asked = ["sample", str(tiny_run), "-n", "10", "--device", "cpu", "--set", "evaluation.batch_size=4"]
    assert main([*asked, "--out", str(tmp_path / "folder")]) == 0
    assert main([*asked, "--shards", "tar", "--shard-size", "4", "--out", str(tmp_path / "shards")]) == 0
    fields = {"image": ImageField(channels=1), "mask": "mask", "label": "label"}
    for split, fraction in (("train", 0.0), ("train", 0.3), ("test", 0.3)):  # the same split by stem, too
        folder = FolderConfig(root=tmp_path / "folder", fields=fields, test_fraction=fraction).build(split)
        data = build(tmp_path / "shards", fields, split, test_fraction=fraction)
        assert len(data) == len(folder) > 0
        for index in range(len(data)):
            expected = folder[index]
            for name, value in data[index].items():
                assert torch.equal(value, expected[name]), name


def test_a_training_on_shards_is_that_on_the_folder_and_goes_on_exactly(
    tiny_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    asked = ["sample", str(tiny_run), "-n", "20", "--device", "cpu", "--set", "evaluation.batch_size=4"]
    assert main([*asked, "--out", str(tmp_path / "folder")]) == 0
    assert main([*asked, "--shards", "tar", "--shard-size", "8", "--out", str(tmp_path / "shards")]) == 0
    weights = []
    for kind, root in (("folder", "folder"), ("webdataset", "shards")):
        data = f'kind = "{kind}", root = "{tmp_path / root}", size = 8, fields = {{ '
        data += 'image = { kind = "image", channels = 1 }, mask = "mask", label = "label" }'
        config = tmp_path / f"{kind}.toml"
        config.write_text(tiny_config.read_text().replace('data.kind = "digits"', f"data = {{ {data} }}"))
        run = tmp_path / f"run-{kind}"
        asked = ["train", str(config), "--out", str(run), "--device", "cpu", "--resume", "--set", "training.steps=4"]
        asked += ["--set", "training.batch_size=8", "--set", "training.checkpoint_every=2"]
        assert main(asked) == 0
        if kind == "webdataset":
            shutil.rmtree(run / "checkpoints" / "step-00000004")
            assert main(asked) == 0
        weights.append(load_run(run, device="cpu").model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.long
def test_a_training_on_shards_goes_on_over_another_number_of_processes(
    tiny_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    asked = ["sample", str(tiny_run), "-n", "40", "--device", "cpu", "--shards", "tar", "--shard-size", "8"]
    assert main([*asked, "--out", str(tmp_path / "shards")]) == 0
    data = f'data = {{ kind = "webdataset", root = "{tmp_path / "shards"}", size = 8, fields = {{ '
    data += 'image = { kind = "image", channels = 1 }, mask = "mask", label = "label" } }'
    config = tmp_path / "config.toml"
    config.write_text(tiny_config.read_text().replace('data.kind = "digits"', data))

    def asks(run: str, steps: int) -> list[str]:
        changes = [
            f"training.steps={steps}",
            "training.batch_size=8",
            "backbone.dropout=0",
            "training.schedule=constant",
        ]
        return ["train", str(config), "--out", str(tmp_path / run), "--device", "cpu", "--resume", "--set", *changes]

    assert main(asks("alone", 6)) == 0
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "mtdiffusion",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*start, *asks("across", 3)], check=True, capture_output=True, timeout=300, env=environment)
    assert main(asks("across", 6)) == 0
    # What weights compute: those that have no effect, such as biases before a norm, go where rounding drives them.
    first, second = (load_run(tmp_path / run, device="cpu").sample(8)["image"] for run in ("alone", "across"))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-3)


def test_the_index_is_kept_until_an_archive_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / "cache"))
    path = archive(tmp_path / "data" / "a.tar", ours(0, 3))
    first = build(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_scanned", None)  # is not called
        again = build(tmp_path / "data")
    assert first.fingerprint == again.fingerprint and torch.equal(first[2]["image"], again[2]["image"])
    assert build(tmp_path / "data", {"label": "label"}).fingerprint != first.fingerprint
    archive(path, ours(0, 4))
    other = build(tmp_path / "data")
    assert len(other) == 4 and other.fingerprint != first.fingerprint
    path.write_bytes(path.read_bytes()[:1000])  # while it is read
    with pytest.raises(UserError, match=r"^a\.tar: 0002\.image\.png: is cut short; the archive was changed"):
        other.without(["mask", "label", "caption", "clip"])[2]
    path.unlink()
    with pytest.raises(UserError, match=r"a\.tar: cannot be read \(No such file or directory\)"):
        other[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_hostile_archives_are_refused_by_member(tmp_path: Path) -> None:
    for name in ("../0000.image.png", "/etc/0000.image.png", "a/../../0000.image.png"):
        path = archive(tmp_path / "a.tar", [*ours(0, 1), (name, b"")])
        fails(path, rf"a\.tar: its member '{name}' has a name that leads out of the archive; make it anew")
    for kind, said in (
        (tarfile.SYMTYPE, "is a link, to '/etc/passwd'"),
        (tarfile.LNKTYPE, "is a link, to '/etc/passwd'"),
        (tarfile.FIFOTYPE, "is neither a file nor a folder"),
        (tarfile.CHRTYPE, "is neither a file nor a folder"),
    ):
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("0000.caption.txt")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        fails(path, f"a\\.tar: its member '0000.caption.txt' {said}")


def sized(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that says so."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def test_archives_that_say_they_are_huge_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    whole = archive(path, ours(0, 1)).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.write_bytes(sized("0000.image.png", 2**40) + whole)
    fails(path, r"a\.tar: is damaged, cut short or no tar file \('0000\.image\.png' reaches beyond its end\)")
    path.write_bytes(sized("0000.image.png", -512) + whole)  # would be read again and again
    fails(path, r"a\.tar: is damaged, cut short or no tar file")
    with path.open("wb") as file:  # a name of a GiB, of which the file takes no room
        file.write(sized("././@LongLink", 2**30, tarfile.GNUTYPE_LONGNAME))
        file.truncate(2**30 + 4096)
    fails(path, r"a\.tar: is damaged, cut short or no tar file \(a header of 1,073,741,824 bytes\)")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    monkeypatch.setattr(webdataset, "_MOST", 50)
    path.write_bytes(whole)
    fails(path, r"a\.tar: its member '0000\.image\.png' has [0-9]+ bytes, more than 50")


def test_damaged_archives_are_refused_wherever_they_end(tmp_path: Path) -> None:
    whole = archive(tmp_path / "whole.tar", ours(0, 2)).read_bytes()
    path = tmp_path / "a.tar"
    end = max(place for place in range(0, len(whole), 512) if any(whole[place : place + 512])) + 512
    for length in [*range(0, end, 300), end]:
        path.write_bytes(whole[:length])
        fails(path, r"a\.tar: is damaged, cut short or no tar file")
    path.write_bytes(whole[: end + 512])
    assert len(build(path)) == 2
    headers = [place for place in range(0, end, 512) if whole[place + 257 : place + 262] == b"ustar"]
    assert len(headers) == 10
    for place in headers:
        for byte in (0, 100, 130, 150, 156, 260):  # name, mode, size, checksum, type, magic
            path.write_bytes(whole[: place + byte] + bytes([whole[place + byte] ^ 0x10]) + whole[place + byte + 1 :])
            fails(path, r"a\.tar: is damaged, cut short or no tar file")
    picture = whole.index(b"\x89PNG")
    for place in range(picture + 8, picture + len(png((0, 0, 0)))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        data = build(path)
        with pytest.raises(UserError, match=r"^a\.tar: 0000\.image\.png: the picture is damaged"):
            data[0]
        assert data[1]["label"] == 1
    path.write_bytes(gzip.compress(whole))
    fails(path, r"a\.tar: is compressed, so that no sample can be read alone; unpack it to a \.tar")
    path.write_bytes(b"")
    fails(path, r"a\.tar: is damaged, cut short or no tar file")


def test_what_does_not_fit_is_said_in_a_sentence(tmp_path: Path) -> None:
    fails(tmp_path / "none", r"data\.root: there is no folder or archive .*none")
    (tmp_path / "packed.tar.gz").write_bytes(b"")
    fails(tmp_path, r"has no archives \(\*\.tar\); packed\.tar\.gz is compressed")
    archive(tmp_path / "a.tar", ours(0, 3))
    fails(
        tmp_path,
        r"has no member for the field 'depth' \(\.depth\.tif\); its members end in \.caption\.txt, \.clip\.npy, ",
        {"depth": "mask"},
        columns={"depth": "depth.tif"},
    )
    archive(tmp_path / "a.tar", [*ours(0, 2), *ours(2, 1)[1:]])
    fails(
        tmp_path,
        r"1 of 3 samples have no member for 'image': 0002 \(a\.tar\)\. If samples may lack it, add 'image' to allow",
    )
    assert build(tmp_path, allow_missing=["image"])[2].keys() == ALL.keys() - {"image"}
    archive(tmp_path / "a.tar", [("0.png", png(1)), ("0.json", "[1"), ("1.png", png(1)), ("1.json", '{"a": 1}')])
    fails(tmp_path, r"members \.png may be 'image' or 'mask'\. Say which they are", {"image": "image", "mask": "mask"})
    data = build(tmp_path, {"image": "image", "label": "label"}, columns={"label": "json/cls"})
    with pytest.raises(UserError, match=r"^a\.tar: 0\.json: cannot be read as JSON"):
        data[0]
    archive(tmp_path / "b.tar", [("2.png", png(1)), ("2.json", "[" * 200_000)])
    deep = build(tmp_path, {"image": "image", "label": "label"}, columns={"label": "json/cls"})
    with pytest.raises(UserError, match=r"^b\.tar: 2\.json: cannot be read as JSON \(maximum recursion"):
        deep[2]
    archive(tmp_path / "b.tar", [("2.png", png(1)), ("2.cls", "x" * 10**6)])
    with pytest.raises(UserError, match=r"found 1,000,000 characters: 'x{20}'\.\.\."):
        build(tmp_path / "b.tar", {"image": "image", "label": "label"})[0]
    (tmp_path / "b.tar").unlink()
    with pytest.raises(UserError, match=r"^a\.tar: 1\.json: has none of the keys cls; its keys are a"):
        data[1]
    archive(tmp_path / "a.tar", [("0.png", png(1)), ("0.jpg", png(1, kind="jpeg"))])
    fails(tmp_path, r"a\.tar: the sample '0' has two members for one field, '0\.jpg'", {"image": "image"})
    archive(tmp_path / "a.tar", [("0.image.png", png(1)), ("0.mask.png", png(1, (9, 9)))])
    with pytest.raises(UserError, match="its pictures do not lie on one another: image is 6×4, mask is 9×9"):
        build(tmp_path, {"image": "image", "mask": "mask"})[0]
    with pytest.raises(EmptySplit, match=r"the test split of .* is empty: change test_fraction \(now 0\)"):
        build(tmp_path, {"image": "image"}, "test")
    archive(tmp_path / "train" / "a.tar", ours(0, 1))
    fails(tmp_path, r"has the folder train only: it needs both 'train' and 'test', or neither")
    archive(tmp_path / "test" / "a.tar", ours(1, 1))
    archive(tmp_path / "val" / "a.tar", ours(2, 2))
    config = WebDatasetConfig(root=tmp_path, fields=ALL)
    watched = config.validation()
    assert watched is not None and (len(config.build("test")), len(watched)) == (1, 2)
    assert evolve(config, root=tmp_path / "val").validation() is None
    assert list(config.reading(["label"]).fields) == ["label"]


def test_palettes_of_members_must_agree(tmp_path: Path) -> None:
    members = []
    for stem, palette in (("a", [0, 0, 0, 255, 0, 0]), ("b", [255, 0, 0, 0, 0, 0])):
        image = Image.fromarray(np.array([[0, 1]], np.uint8))
        image.putpalette(palette)
        buffer = io.BytesIO()
        image.save(buffer, "png")
        members.append((f"{stem}.mask.png", buffer.getvalue()))
    archive(tmp_path / "a.tar", [*members])
    expected = r"field 'mask': a\.tar: b\.mask\.png: index 0 of its palette is #ff0000, and #000000 in a\.tar: a\.mask"
    fails(tmp_path, expected, {"mask": "mask"})
    colours = MaskField(colours=("black", "red"))
    data = build(tmp_path, {"mask": colours})
    assert [data[i]["mask"].tolist() for i in (0, 1)] == [[[0, 1]], [[1, 0]]]  # type: ignore[union-attr]


def test_all_kinds_of_trouble_are_told_in_one_round(tmp_path: Path) -> None:
    """Of the archives, the members and what these hold, in both splits."""
    members = dict(ours(0, 20))
    for stem in ("0001", "0002", "0003"):
        members[f"{stem}.image.png"] = bytes(members[f"{stem}.image.png"][:-20])  # type: ignore[arg-type]
    members["0003.label.json"] = "{"  # of a sample whose picture is damaged, too
    members["0004.label.json"] = "-1"
    for stem in range(7, 14):
        del members[f"{stem:04d}.caption.txt"]
    members["0005.mask.png"] = png(1, (9, 9))
    archive(tmp_path / "train" / "a.tar", list(members.items()))
    for name in ("b.tar", "c.tar"):
        archive(tmp_path / "train" / name, ours(20, 2)).write_bytes(b"no tar file")
    held_out = dict(ours(30, 3))
    held_out["0031.clip.npy"] = b"no array"
    archive(tmp_path / "test" / "a.tar", list(held_out.items()))
    with pytest.raises(UserError) as caught:
        build(tmp_path)
    told = str(caught.value)
    assert told.startswith("6 kinds of trouble with the data:\n- ")
    assert "2 of 3 archives cannot be read:\n" in told and "b.tar: is damaged" in told and "c.tar: is dam" in told
    assert "7 of 20 samples have no member for 'caption': 0007 (a.tar), 0008 (a.tar), 0009 (a.tar)" in told
    assert "0011 (a.tar) and 2 more. If samples may lack it" in told
    assert "train split: 3 of 20 samples have a field 'image' that cannot be read:\n  0001 (" in told
    assert "train split: 2 of 20 samples have a field 'label' that cannot be read:\n  0003 (" in told
    assert "0003.label.json: cannot be read as JSON" in told and "found -1" in told
    assert "train split: 0005 (" in told and "its pictures do not lie on one another: image is 6×4, mask" in told
    assert "test split: 0031 (" in told
    assert "blank" not in told  # captions that are not there were told

    (tmp_path / "train" / "b.tar").unlink()
    (tmp_path / "train" / "c.tar").unlink()
    with pytest.raises(UserError, match="kinds of trouble") as caught:
        build(tmp_path, {"image": "image", "sound": "image", "depth": "mask"}, columns={"sound": "wav"})
    told = str(caught.value)
    assert "has no member for the field 'sound' (.wav)" in told
    assert "3 of 20 samples have a field 'image' that cannot be read:" in told


def test_a_check_of_a_configuration_tells_the_rows_of_both_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = dict(ours(0, 12))
    for stem in range(7):
        members[f"{stem:04d}.label.json"] = "x"
    members["0008.label.json"] = "77"
    members["0009.image.png"] = b""
    archive(tmp_path / "train" / "a.tar", list(members.items()))
    archive(tmp_path / "test" / "a.tar", [*ours(20, 2), *[(f"002{i}.label.json", "77") for i in (3, 4)]])
    config = tmp_path / "rows.toml"
    config.write_text(
        f"""[data]
kind = "webdataset"
root = "{tmp_path}"
fields = {{ image = "image", label = "label" }}
allow_missing = ["image"]
[modalities]
image = {{ kind = "image", size = [4, 6] }}
label = {{ kind = "label", classes = 3 }}
[backbone]
kind = "unet"
channels = 8
multipliers = [1]
heads = 0
[latent]
height = 4
width = 6
"""
    )
    for command in (["config", "check", str(config)], ["train", str(config), "--out", str(tmp_path / "run")]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert (
            "error: 4 kinds of trouble with the data:\n- data (train): 7 of 12 samples have a field 'label' that"
            in told
        )
        shown = [f"000{i}.label.json: cannot be read as JSON" in told for i in range(7)]
        assert shown == [True] * 5 + [False] * 2 and "  and 2 more\n" in told
        assert "- data (train): 0009 (" in told and "0009.image.png" in told
        assert "- data (train): 0008.label.json (" in told and "modality 'label': label of 3 classes" in told
        assert "- data (test): 2 of 4 samples have a value that modality 'label' refuses:\n  0023.label" in told
        assert not (tmp_path / "run").exists()
