"""Samples as files: what is written, and that it is the same however and by whomever it is drawn."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image
from rich.console import Console
from safetensors.torch import save

from mtdiffusion_engine import Run, commands, load_run, sampling
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.sampling import Request, shard_name, shards_in, write_folder, write_shards
from mtdiffusion_engine.shards import parquet_shard
from mtdiffusion_plugins.datasets.folder import FolderConfig
from mtdiffusion_plugins.datasets.huggingface import HuggingFaceConfig
from mtdiffusion_plugins.fields import ImageField
from mtdiffusion_plugins.image import ImageModality
from mtdiffusion_registry import UserError
from mtdiffusion_registry.pace import Step

N, SIZE = 26, 8
"""Samples and those of a shard: four shards of two batches, of which the last is not full."""
BATCH = "evaluation.batch_size=4"


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return load_run(tiny_run, device="cpu", overrides=[BATCH])


@pytest.fixture(scope="module", params=["tar", pytest.param("parquet", marks=pytest.mark.long)])
def form(request: pytest.FixtureRequest) -> str:
    """Of shards."""
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return str(request.param)


def options(tiny_run: Path, out: Path, form: str, *more: object) -> list[str]:
    """A command that samples into shards, on what takes turns."""
    asked = [tiny_run, "-n", N, "--shards", form, "--shard-size", SIZE, "--observe", "label=3,7,1", "--device", "cpu"]
    return ["sample", *map(str, [*asked, "--out", out, "--set", BATCH, *more])]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tiny_run: Path, form: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes that is not disturbed."""
    out = tmp_path_factory.mktemp("shards") / "out"
    assert main(options(tiny_run, out, form)) == 0
    return out


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_written_batch_by_batch_and_holds_what_the_run_samples(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []  # pictures in the folder when a batch is drawn
    draw = Run.sample

    def watched(self: Run, n: int, **options: object) -> object:
        written.append(len(list(tmp_path.glob("image/*.png"))))
        return draw(self, n, **options)  # type: ignore[arg-type]

    expected = run.sample(10, seed=3)
    monkeypatch.setattr(Run, "sample", watched)
    told: list[tuple[float, Step | None]] = []
    write_folder(Request(run, 10, seed=3), tmp_path, lambda *each: told.append(each))
    assert (written, [done for done, at in told if at is None]) == ([0, 4, 8], [4, 8, 10])
    steps = [(done, at) for done, at in told if at is not None]  # of three; before the first nothing is told
    assert [done for done, _ in steps] == pytest.approx([4 / 3, 8 / 3, 4 + 4 / 3, 4 + 8 / 3, 8 + 2 / 3, 8 + 4 / 3])
    batches = ((0, 4), (4, 4), (8, 2))
    assert [at for _, at in steps] == [Step(*batch, step, 3) for batch in batches for step in (1, 2)]
    pictures = [np.asarray(Image.open(tmp_path / f"image/{place:04d}.png")) for place in range(10)]
    assert np.array_equal(pictures, ((expected["image"][:, 0] + 1) * 127.5).round().numpy())
    assert (tmp_path / "label.csv").read_text() == "stem,value,name\n" + "".join(
        f"{place:04d},{label},{label}\n" for place, label in enumerate(expected["label"].tolist())
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["image", "mask", "label.csv", "request.json", "samples.png"]
    )


def test_more_samples_than_a_sheet_holds_are_on_pages(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SHOWN", 6)  # of batches of 4
    drawn: list[tuple[int, dict[str, torch.Tensor]]] = []
    draw = Request.sheet

    def watched(self: Request, samples: dict[str, torch.Tensor], first: int = 0) -> Image.Image:
        drawn.append((first, samples))
        return draw(self, samples, first)

    monkeypatch.setattr(Request, "sheet", watched)
    given = torch.arange(3)
    write_folder(Request(run, 14, observed={"label": given}), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["samples-1.png", "samples-2.png", "samples-3.png"]
    assert [first for first, _ in drawn] == [0, 6, 12]
    expected = run.sample(14, observed={"label": given[torch.arange(14) % 3]})
    for name in ("image", "label"):
        assert torch.equal(torch.cat([samples[name] for _, samples in drawn]), expected[name])
    assert sampling.sheet_name(0, 10) == "samples-01.png"


def test_a_data_set_of_kind_folder_reads_it_back(tiny_run: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["sample", str(tiny_run), "-n", "6", "--out", str(out), "--device", "cpu", "--set", BATCH]) == 0
    expected = run.sample(6)
    fields = {"image": ImageField(channels=1), "mask": "mask", "label": "label"}
    data = FolderConfig(root=out, fields=fields, test_fraction=0).build("train")
    assert len(data) == 6
    for place in range(6):
        read = data[place]
        assert isinstance(read["image"], torch.Tensor)
        assert (read["image"] - expected["image"][place]).abs().max() <= 1 / 255 + 1e-6  # of 8 bits
        assert torch.equal(torch.as_tensor(read["mask"]), expected["mask"][place])
        assert read["label"] == expected["label"][place]


def test_a_configuration_trains_on_what_was_sampled(
    tiny_run: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["sample", str(tiny_run), "-n", "16", "--out", str(out), "--device", "cpu"]) == 0
    config = tmp_path / "config.toml"
    data = f'kind = "folder", root = "{out}", fields = {{ image = "image", mask = "mask", label = "label" }}'
    config.write_text(tiny_config.read_text().replace('data.kind = "digits"', f"data = {{ {data} }}"))
    arguments = ["train", str(config), "--out", str(again), "--device", "cpu", "--set", "training.steps=2"]
    grey = '{ kind = "image", channels = 1 }'
    assert main(arguments) == 2  # the message names what mends it, either of two
    assert (
        "image: expected shape [batch, 1, 8, 8], found [1, 3, 8, 8]; set channels = 3 of the modality, or channels = 1 "
        f"of its field in data.fields: {grey}\n"
    ) in capsys.readouterr().err
    assert main([*arguments, "modalities.image.channels=3"]) == 0
    assert load_run(again, device="cpu").sample(1)["image"].shape == (1, 3, 8, 8)
    config.write_text(config.read_text().replace('image = "image"', f"image = {grey}"))
    assert main(["config", "check", str(config)]) == 0
    assert (
        main(["config", "check", str(config), "--set", "modalities.image.size=16", "modalities.image.channels=3"]) == 2
    )
    assert (
        "; set channels = 1 of the modality, or channels = 3 of its field in data.fields: "
        '{ kind = "image", channels = 3 }; set size of the modality'
    ) in capsys.readouterr().err


def test_names_have_as_many_digits_as_the_last() -> None:
    stems = [sampling.stem_of(7, total) for total in (1, 10_000, 10_001, 100_000, 100_001)]
    assert stems == ["0007", "0007", "00007", "00007", "000007"]


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_hold_what_the_run_samples_and_nothing_of_who_wrote_them(whole: Path, form: str, run: Run) -> None:
    if form != "tar":
        pytest.skip("test_rows_of_parquet_hold_what_the_run_samples looks into those")
    names = [f"samples-{shard:05d}.tar" for shard in range(4)]
    assert sorted(path.name for path in whole.iterdir()) == ["request.json", *names, "samples.png"]
    given = torch.tensor([3, 7, 1])[torch.arange(N) % 3]
    expected = run.sample(N, observed={"label": given})  # a shard's size is a multiple of a batch's
    place = 0
    for name in names:
        with tarfile.open(whole / name) as tar:
            members = tar.getmembers()
            for image, mask, label in zip(*[iter(members)] * 3, strict=True):
                stems = [f"{place:04d}.image.png", f"{place:04d}.mask.png", f"{place:04d}.label.json"]
                assert [image.name, mask.name, label.name] == stems
                content = [tar.extractfile(member) for member in (image, mask, label)]
                assert all(content)
                image, mask, label = (each.read() for each in content if each)
                pixels = ((expected["image"][place, 0] + 1) * 127.5).round().numpy()
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), pixels)
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask))), expected["mask"][place].numpy())
                assert json.loads(label)["label"] == given[place]
                place += 1
            assert {(each.mtime, each.uid, each.gid, each.uname, each.mode) for each in members} == {
                (0, 0, 0, "", 0o644)
            }
    assert place == N


def test_rows_of_parquet_hold_what_the_run_samples(run: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    expected = run.sample(N, observed={"label": torch.tensor([3, 7, 1])[torch.arange(N) % 3]})
    request = Request(run, N, observed={"label": torch.tensor([3, 7, 1])})
    write_shards(request, tmp_path, SIZE, range(4), form="parquet")
    shards = [parquet.ParquetFile(tmp_path / shard_name(shard, "parquet")) for shard in range(4)]
    assert [shard.metadata.num_rows for shard in shards] == [8, 8, 8, 2]
    assert [shard.num_row_groups for shard in shards] == [2, 2, 2, 1]  # of a batch each
    rows = [row for shard in shards for row in shard.read().to_pylist()]
    assert list(rows[0]) == ["image", "mask", "label", "label_name"]
    for place, row in enumerate(rows):
        assert row["image"]["path"] == f"{place:04d}.image.png" and row["mask"]["path"] == f"{place:04d}.mask.png"
        pixels = ((expected["image"][place, 0] + 1) * 127.5).round().numpy()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), pixels)
        shown = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"])))
        assert np.array_equal(shown, expected["mask"][place].numpy())
        assert (row["label"], row["label_name"]) == (int(expected["label"][place]), str(int(expected["label"][place])))
    told = [json.loads(shard.schema_arrow.metadata[b"huggingface"])["info"]["features"] for shard in shards]
    assert told[1:] == told[:-1]
    assert told[0] == {
        "image": {"_type": "Image"},
        "mask": {"_type": "Image"},
        "label": {"dtype": "int64", "_type": "Value"},
        "label_name": {"dtype": "string", "_type": "Value"},
    }


class Stored:
    """A modality as far as shards know one: what it writes."""

    def __init__(self, suffix: str, content: Callable[[float], bytes], **cells: Any) -> None:
        self.suffix, self.content, self.told = suffix, content, cells

    def write(self, x: torch.Tensor, folder: Path, stem: str) -> Path:
        path = folder / f"{stem}{self.suffix}"
        path.write_bytes(self.content(float(x)))
        return path

    def cells(self, x: torch.Tensor) -> dict[str, Any]:
        return self.told


def array(suffix: str, **tensors: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, next(iter(tensors.values())).numpy())
        return buffer.getvalue()
    return save(tensors)


def test_the_library_datasets_takes_columns_of_parquet_for_what_they_are(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    modalities: Any = {
        "sound": Stored(".wav", lambda x: b"RIFF%d" % x),
        "text": Stored(".txt", lambda x: f"number {x:.0f}\n".encode()),
        "clip": Stored(".safetensors", lambda x: array(".safetensors", embedding=torch.tensor([x, 1]))),
        "half": Stored(".npy", lambda x: array(".npy", x=torch.tensor([x], dtype=torch.float16))),
        "two": Stored(".safetensors", lambda x: array(".safetensors", a=torch.tensor([x]), b=torch.tensor([x]))),
        "grade": Stored("", lambda x: b"", value=2.5, name="good", two="hidden by the modality of its column's name"),
        "grade_two": Stored(".odd", lambda x: b"odd"),
    }
    path = tmp_path / "shard.parquet"
    with path.open("wb") as file, parquet_shard(file, tmp_path, modalities) as write:
        for start in (0, 2):
            write([(f"{n}", {name: torch.tensor(float(n)) for name in modalities}) for n in (start, start + 1)])
        with pytest.raises(UserError, match=r"sample 4: its columns are sound struct<.*>, and others' differ"):
            write([("4", {"sound": torch.tensor(1.0)})])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.parquet"]
    from pyarrow import parquet

    rows = parquet.read_table(path).to_pylist()
    assert rows[3] == {
        "sound": {"bytes": b"RIFF3", "path": "3.sound.wav"},
        "text": "number 3",
        "clip": [3.0, 1.0],
        "half": [3.0],
        "two": modalities["two"].content(3.0),
        "grade": 2.5,
        "grade_name": "good",
        "grade_two": b"odd",
    }
    pytest.importorskip("datasets.arrow_dataset")  # the tests' folder "datasets" can be imported, too
    import datasets

    table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    features = table.features
    assert isinstance(features["sound"], datasets.Audio)
    assert [features[name].dtype for name in ("text", "two", "grade", "grade_name", "grade_two")] == [
        "string",
        "binary",
        "float64",
        "string",
        "binary",
    ]
    assert features["clip"].feature.dtype == "float32" and features["half"].feature.dtype == "float16"
    raw = table.cast_column("sound", datasets.Audio(decode=False))
    assert raw[3] == rows[3]


def test_the_library_datasets_shows_pictures_of_parquet(run: Run, tmp_path: Path) -> None:
    """And the kind ``huggingface`` reads the shards back."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("datasets.arrow_dataset")
    import datasets

    write_shards(Request(run, N), tmp_path, SIZE, range(4), form="parquet")
    expected = run.sample(N)
    many = str(tmp_path / "*.parquet")
    table = datasets.load_dataset("parquet", data_files=many, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == N and isinstance(table[9]["image"], Image.Image)
    assert np.array_equal(np.asarray(table[9]["mask"]), expected["mask"][9].numpy())
    fields = {"image": ImageField(channels=1), "mask": "mask", "label": "label"}
    data = HuggingFaceConfig(path=tmp_path, data_files={"train": "*.parquet"}, fields=fields, test_fraction=0).build(
        "train"
    )
    for place in range(N):
        read = data[place]
        assert (torch.as_tensor(read["image"]) - expected["image"][place]).abs().max() <= 1 / 255 + 1e-6  # of 8 bits
        assert torch.equal(torch.as_tensor(read["mask"]), expected["mask"][place])
        assert read["label"] == expected["label"][place]


def test_parquet_without_pyarrow_is_a_sentence(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(options(tiny_run, tmp_path / "out", "parquet")) == 2
    assert "--shards parquet needs pyarrow: pip install 'mtdiffusion[parquet]'" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_missing_is_drawn_again_byte_for_byte(
    whole: Path, form: str, tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(options(tiny_run, out, form)) == 0
    (out / shard_name(1, form)).unlink()
    (out / shard_name(3, form)).rename(out / f".{shard_name(3, form)}")  # as a process leaves it that is killed
    (out / f".{shard_name(3, form)}").write_bytes(b"half")
    kept = (out / shard_name(0, form)).stat().st_mtime_ns
    capfd.readouterr()
    assert main(options(tiny_run, out, form)) == 0
    assert "2 of 4 shards are there; the others are drawn" in capfd.readouterr().err
    assert files(out) == files(whole)
    assert (out / shard_name(0, form)).stat().st_mtime_ns == kept
    assert main(options(tiny_run, out, form)) == 0  # nothing is left to do
    assert files(out) == files(whole)


def test_processes_share_the_shards_out(run: Run, whole: Path, form: str, tmp_path: Path) -> None:
    """Whichever are there already, and however many processes there were before."""
    request = Request(run, N, observed={"label": torch.tensor([3, 7, 1])})
    record = {"n": N, "shard_size": SIZE, "shards": form}
    told: list[tuple[float, Step | None]] = []
    with shards_in(tmp_path, record, 0, 1) as missing:
        assert missing == [0, 1, 2, 3]
        write_shards(request, tmp_path, SIZE, missing[1::2], lambda *each: told.append(each), form)
    assert sorted(set(files(tmp_path)) - {"request.json"}) == [shard_name(1, form), shard_name(3, form)]
    assert [done for done, at in told if at is None] == [4, 8, 10]
    assert len(told) == 3 * 3 and [done for done, _ in told] == sorted(done for done, _ in told)
    (tmp_path / shard_name(3, form)).unlink()
    with shards_in(tmp_path, record, 0, 1) as missing:
        assert missing == [0, 2, 3]
        write_shards(request, tmp_path, SIZE, missing, form=form)
    expected = files(whole)
    assert {name: content for name, content in files(tmp_path).items() if name.endswith(form)} == {
        name: content for name, content in expected.items() if name.endswith(form)
    }


SCRIPT = """
import os, signal, sys
from pathlib import Path
from mtdiffusion_engine.cli import main
from mtdiffusion_plugins.image import ImageModality

write, rank = ImageModality.write, os.environ["RANK"]

def write_or_die(self, x, folder, stem):
    if sys.argv[1] == "kill" and rank == "1" and stem == "0025":
        os.kill(os.getpid(), signal.SIGKILL)  # in the midst of its second shard
    if sys.argv[1] == "tell":
        print(f"rank {rank} draws {stem}", flush=True)
    return write(self, x, folder, stem)

ImageModality.write = write_or_die
sys.exit(main(sys.argv[2:]))
"""


def launch(folder: Path, arguments: list[str], do: str = "") -> subprocess.CompletedProcess[str]:
    """A command in two processes, of which the second is to be killed ("kill"), or which say who draws ("tell")."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    return subprocess.run(
        [*start, do, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(whole: Path, form: str, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(tmp_path, options(tiny_run, out, form))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("26 samples of image, mask, label") == 1
    assert files(out) == files(whole)


@pytest.mark.slow
def test_what_a_killed_process_left_is_gone_on_with(whole: Path, form: str, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(tmp_path, options(tiny_run, out, form), "kill")
    assert done.returncode != 0
    left = files(out)
    assert shard_name(1, form) in left and shard_name(3, form) not in left and f".{shard_name(3, form)}" in left
    assert main(options(tiny_run, out, form)) == 0
    assert files(out) == files(whole)


@pytest.mark.slow
def test_processes_share_what_is_missing_evenly_whoever_had_it_before(
    whole: Path, form: str, tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for shard in (1, 3):  # both were the second process's
        (out / shard_name(shard, form)).unlink()
    done = launch(tmp_path, options(tiny_run, out, form), "tell")
    assert done.returncode == 0, done.stderr
    drawn = [(int(rank), int(stem) // SIZE) for rank, stem in re.findall(r"rank (\d) draws (\d+)", done.stdout)]
    assert sorted(set(drawn)) == [(0, 1), (1, 3)]
    assert files(out) == files(whole)


@pytest.mark.slow
def test_several_processes_need_shards_and_torchrun(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(each) for each in ("sample", tiny_run, "-n", 2, "--out", tmp_path / "out")]
    done = launch(tmp_path, arguments)
    assert "2 processes can only sample into shards: add --shards tar" in done.stderr
    assert main([*arguments, "--shard-size", "2"]) == 2
    assert "--shard-size 2: only shards have a size; add --shards tar" in capfd.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(options(tiny_run, tmp_path / "out", "tar")) == 2
    assert "WORLD_SIZE is 2 in the environment, but there is no MASTER_ADDR" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_request_is_refused_by_name(
    whole: Path, form: str, tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(whole)
    other = {"tar": "parquet", "parquet": "tar"}[form]
    for more, said in [
        (["--seed", "1"], "(seed is 0, asked for 1)"),
        (["-n", "30", "--shard-size", "4"], "(n is 26, asked for 30; shard_size is 8, asked for 4)"),
        (["--observe", "image=none.png"], "none.png: no such file"),
        (["--set", "evaluation.batch_size=8"], "(batch_size is 4, asked for 8)"),
        (["--shards", other], f'(shards is "{form}", asked for "{other}")'),
    ]:
        assert main(options(tiny_run, whole, form, *more)) == 2
        assert said in capfd.readouterr().err
    assert files(whole) == before
    plain = tmp_path / "plain"
    assert main(["sample", str(tiny_run), "-n", "1", "--out", str(plain), "--device", "cpu"]) == 0
    before = files(plain)
    assert main(options(tiny_run, plain, form)) == 2
    assert f"{plain}: already exists; nothing was written" in capfd.readouterr().err
    assert files(plain) == before


def test_a_request_that_cannot_be_met_leaves_nothing(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(options(tiny_run, tmp_path / "out", "tar", "--strength", "image=0.5")) == 2
    assert "'image', but it is not among the observed" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def interrupt_at(stem: str, error: BaseException) -> Callable[..., Path]:
    write = ImageModality.write

    def fail(self: ImageModality, x: torch.Tensor, folder: Path, at: str) -> Path:
        if at == stem:
            raise error
        return write(self, x, folder, at)

    return fail


def test_ctrl_c_keeps_whole_shards_and_says_how_to_go_on(
    whole: Path,
    form: str,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ImageModality, "write", interrupt_at("0021", KeyboardInterrupt()))
        assert main(options(tiny_run, out, form)) == 130
    said = capfd.readouterr().err
    assert "mtdiffusion: stopped; 2 of 4 shards are there. The same command goes on with the others" in said
    assert sorted(files(out)) == ["request.json", shard_name(0, form), shard_name(1, form), "samples.png"]
    assert main(options(tiny_run, out, form)) == 0
    assert files(out) == files(whole)


def test_before_the_first_shard_ctrl_c_leaves_nothing(
    form: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageModality, "write", interrupt_at("0003", KeyboardInterrupt()))
    assert main(options(tiny_run, tmp_path / "out", form)) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_whole_shards_are_kept(
    form: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(ImageModality, "write", interrupt_at("0009", full))
    out = tmp_path / "out"
    assert main(options(tiny_run, out, form)) == 2
    said = capfd.readouterr().err
    assert f"{out / shard_name(1, form)}: cannot be written (No space left on device)" in said
    assert "the same command goes on with the others" in said
    assert sorted(files(out)) == ["request.json", shard_name(0, form), "samples.png"]


def test_two_commands_do_not_sample_into_one_folder_at_once(whole: Path, form: str, run: Run) -> None:
    refused = pytest.raises(UserError, match=r"another process is sampling into this folder\. Wait until it is done")
    with ckpt.alone_in(whole, "sampling into this folder"), refused, shards_in(whole, {}, 0, 1):
        raise AssertionError


def test_a_batch_depends_on_its_place_alone(run: Run) -> None:
    longer = run.sample(10, seed=5)
    for first, n in ((0, 4), (4, 4), (8, 2), (4, 6)):
        part = run.sample(n, seed=5, first=first)
        for name, x in part.items():
            assert torch.equal(x, longer[name][first : first + n]), name
    assert not torch.equal(longer["image"][:4], longer["image"][4:8])
    assert torch.equal(run.sample(6, seed=-1)["image"], run.sample(6, seed=-1)["image"])
    larger = evolve(run, experiment=evolve(run.experiment, evaluation=evolve(run.experiment.evaluation, batch_size=5)))
    assert not torch.equal(larger.sample(10, seed=5)["image"], longer["image"])  # as the docstring says
    with pytest.raises(UserError, match="first: expected the place of a sample, 0 or more, found -1"):
        run.sample(1, first=-1)


def test_a_terminal_gets_a_bar(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(commands, "screen", lambda: Console(file=shown, force_terminal=True, width=80))
    assert main(options(tiny_run, tmp_path / "out", "tar")) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "26 of 26" in plain and re.search(r"\d:\d\d:\d\d", plain)
