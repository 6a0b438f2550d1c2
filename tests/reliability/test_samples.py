"""``mtdiffusion bench samples`` by the real command: many samples, drawn by processes that are killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mtdiffusion_benchmarks.reliability.many import RESULT, counted, section
from mtdiffusion_engine.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_all_samples_are_there_once_and_one_process_draws_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "samples.json"
    asked = ["-n", "2048", "--shard-size", "128", "--compared", "16", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "mtdiffusion_engine.cli", "bench", "samples", *asked],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    killed, whole = result["drawings"]
    assert 8 <= killed["shards"] < whole["shards"] == result["shards"] == len(result["again"]) == 16
    assert all(len(look["memory"]) == 2 for drawing in (killed, whole) for look in drawing["looks"])
    assert [result[what] for what in ("missing", "doubled", "foreign", "differ")] == [0, 0, 0, []]
    assert whole["left"] == []


def test_the_result_that_ships_is_of_100000_samples_and_lost_none() -> None:
    result = json.loads((ROOT / RESULT).read_text())
    killed, whole = result["drawings"]
    assert result["n"] == 100_000
    assert 0 < killed["shards"] < whole["shards"] == result["shards"]
    assert len(result["again"]) >= 4
    assert [result[what] for what in ("missing", "doubled", "foreign", "differ")] == [0, 0, 0, []]
    assert whole["left"] == []


def test_files_that_are_missing_doubled_or_foreign_are_counted(tmp_path: Path) -> None:
    def shard(number: int, *names: str) -> Path:
        path = tmp_path / f"samples-{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
        return path

    whole = shard(0, *(f"0000.{name}" for name in ("image.png", "mask.png", "label.json")))
    assert counted([whole], 1) == {"missing": 0, "doubled": 0, "foreign": 0}
    assert counted([whole], 2) == {"missing": 3, "doubled": 0, "foreign": 0}
    assert counted([whole, whole], 1) == {"missing": 0, "doubled": 3, "foreign": 0}
    assert counted([whole, shard(1, "0001.image.png", "0000.sound.wav")], 1)["foreign"] == 2


def test_the_page_says_what_is_wrong() -> None:
    result = json.loads((ROOT / RESULT).read_text())
    told = "\n".join(section(result))
    assert "Each is there once, and nothing else is." in told and "The bytes were the same." in told
    changed = {**result, "missing": 3, "doubled": 1, "differ": ["samples-00002.tar"]}
    told = "\n".join(section(changed))
    assert "Not all is well: 3 files are missing; 1 files are there twice; samples-00002.tar differs." in told
    assert "Each is there once" not in told and "The bytes were the same" not in told


def test_what_cannot_be_tried_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "samples", "-n", "3000"]) == 2
    assert "3000 in shards of 1024 are 3, expected 4 shards or more" in capsys.readouterr().err
    assert main(["bench", "samples", "--compared", "1"]) == 2
    assert "--compared 1: expected 2 or more" in capsys.readouterr().err


def test_a_page_is_not_made_without_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("reliability", "topology"):
        shutil.copy(ROOT / "benchmarks" / "results" / f"{name}.json", tmp_path / "benchmarks" / "results")
    assert main(["bench", "reliability", "--docs"]) == 2
    told = capsys.readouterr().err
    assert "samples.json" in told and "make it by mtdiffusion bench samples --out" in told
    assert not (tmp_path / "docs" / "reliability.md").exists()
