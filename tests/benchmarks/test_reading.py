"""The benchmark of reading, on a few pictures: what it says of memory is what its processes had."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from mtdiffusion_benchmarks import reading
from mtdiffusion_engine.cli import main


@pytest.mark.long
def test_rates_and_memory_of_every_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reading.json"
    assert main(["bench", "reading", "--pictures", "200", "--epochs", "3", "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    rows = {row["data"]: row for row in measured["rows"]}
    assert {"folder, decoded once", "webdataset"} <= rows.keys()
    for row in rows.values():
        assert len(row["rates"]) == len(row["memory"]) == 3 and min(row["rates"]) > 0
        assert row["memory"][2] - row["memory"][0] < 8  # MiB
    assert max(rows["folder, decoded once"]["rates"]) > max(rows["webdataset"]["rates"])
    assert reading.table(measured) in capsys.readouterr().out
    assert reading.table(measured).splitlines()[2].startswith("| folder, decoded once | ")


def test_shards_of_the_benchmark_hold_each_picture_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SHARD", 3)
    pictures = [tmp_path / f"{index}.jpg" for index in range(5)]
    for path in pictures:
        path.write_bytes(path.stem.encode())
    reading._write_shards(pictures, tmp_path / "shards")
    members = {}
    for path in sorted((tmp_path / "shards").iterdir()):
        with tarfile.open(path) as tar:
            members[path.name] = tar.getnames()
    assert list(members) == ["00000.tar", "00001.tar"]
    assert members["00001.tar"] == ["3.image.jpg", "3.label.cls", "4.image.jpg", "4.label.cls"]
