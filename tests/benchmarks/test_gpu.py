"""What ``benchmarks/gpu/run.sh`` promises, at tiny sizes on the CPU: nothing here has seen a GPU."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch

from mtdiffusion_benchmarks.gpu import tables
from mtdiffusion_benchmarks.gpu.measuring import PEAKS, Setting, operations
from mtdiffusion_benchmarks.gpu.plain_dit import PlainDiT
from mtdiffusion_benchmarks.gpu.stages import STAGES, run_parts
from mtdiffusion_benchmarks.startup import write_pictures

ROOT = Path(__file__).parents[2]
KIT = runpy.run_path(str(ROOT / "benchmarks/mtdiffusion_benchmarks/gpu/kit.py"))
PEERS = ("diffusers", "denoising-diffusion-pytorch")


def run(folder: Path, *arguments: str | Path) -> dict[str, dict[str, Any]]:
    """The script at tiny sizes; the parts of each stage that left something."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MTDIFFUSION_GPU_KIT": str(folder / "kit"),
        "OMP_NUM_THREADS": "1",
    }
    command = [ROOT / "benchmarks/gpu/run.sh", folder / "out", "--device", "cpu", "--tiny", *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return {path.stem: json.loads(path.read_text())["parts"] for path in (folder / "out").glob("*.json")}


def states(parts: dict[str, Any]) -> set[str]:
    return {record["status"] for record in parts.values()}


@pytest.mark.long
def test_every_stage_leaves_its_figures_and_is_not_measured_twice(tmp_path: Path) -> None:
    write_pictures(tmp_path, 60)
    data = ("--data", tmp_path / "classes", "--limit", "3000")  # a busy machine is no failure
    found = run(tmp_path, *data)
    assert set(found) == set(STAGES)
    absent = {f"{name}: float32" for name in PEERS}
    for stage, parts in found.items():
        for part, record in parts.items():
            if part in absent and record["status"] == "failed":
                assert "not installed" in record["error"]
            else:
                assert record["status"] == "ok", (stage, part, record)
    assert (tmp_path / "out/cifar.png").is_file()
    assert found["step"]["steps: float32, compiled"]["measured"]["graphs"] == 1
    assert sum(path.is_file() for path in (tmp_path / "out").rglob("*")) == len(STAGES) + 1
    assert run(tmp_path, *data, "--only", "modalities")["modalities"] == found["modalities"]


@pytest.mark.long
def test_a_stage_that_fails_and_one_that_is_cut_leave_the_others_be(tmp_path: Path) -> None:
    found = run(tmp_path, "--only", "cifar", "modalities")  # there are no pictures
    assert states(found["cifar"]) == {"failed"}
    assert "CIFAR-10 is not here" in found["cifar"]["training"]["error"]
    for part in ("samples", "evaluation"):  # which is not their fault
        assert found["cifar"][part]["error"] == "UserError: left out: the training before it came to no checkpoint"
    assert states(found["modalities"]) == {"ok"}
    cut = run(tmp_path / "cut", "--only", "step", "dit", "--limit", "12")
    assert "cut" in states(cut["step"]) or not cut["step"]
    assert "dit" not in cut  # nothing was left for it
    for record in cut["step"].values():
        assert record["status"] == "ok" or "the limit of 12 s" in record["error"]


def test_a_failed_part_is_recorded_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    setting = Setting("cpu", True, tmp_path / "out", tmp_path / "work")
    assert run_parts("cifar", setting, since=1.0) == 0
    kept = json.loads((setting.out / "cifar.json").read_text())
    assert list(kept["parts"]) == ["training", "samples", "evaluation"]
    assert states(kept["parts"]) == {"failed"}
    assert kept["tiny"]
    assert kept["hardware"]["device"] == "cpu"
    before = (setting.out / "cifar.json").read_bytes()
    assert run_parts("cifar", setting, since=1.0) == 0  # in the same call it is not tried twice
    assert (setting.out / "cifar.json").read_bytes() == before


def test_what_is_not_measured_says_so_and_tiny_figures_are_none(tmp_path: Path) -> None:
    empty = tables.tables(tmp_path)
    assert all("not measured" in table for table in empty.values())
    record = {"status": "ok", "measured": {"batch": 256, "images_per_second": 1234.4, "mfu": 0.417, "peak_mib": 2048.0}}
    kept = {"tiny": True, "parts": {"DiT-B/2, compiled": record, "DiT-L/2": {"status": "failed", "error": "no memory"}}}
    (tmp_path / "dit.json").write_text(json.dumps(kept))
    assert tables.tables(tmp_path) == empty
    (tmp_path / "dit.json").write_text(json.dumps(kept | {"tiny": False}))
    lines = tables.tables(tmp_path)["gpu: dit"].splitlines()
    assert "| DiT-B/2, compiled | 256 | 1,234 | 41.7% | 2,048 MiB |" in lines
    assert "| DiT-L/2 | not measured | not measured | not measured | not measured |" in lines


def test_operations_of_the_plain_transformer_are_those_of_its_matrix_products() -> None:
    width, depth, tokens = 16, 3, 256
    model = PlainDiT(width, depth, 2, classes=5)
    given = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    blocks = depth * (12 * width**2 * tokens + 2 * tokens**2 * width + 6 * width**2)
    ends = 16 * width * tokens * 2 + 256 * width + width**2 + 2 * width**2
    assert operations(lambda: model(*given)) == 2 * (blocks + ends)
    assert PEAKS["H100"] > PEAKS["H100 PCIe"]


def test_an_uninstalled_checkout_has_the_entry_points_of_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    KIT["_write_metadata"](tmp_path)
    KIT["_write_metadata"](tmp_path)  # a second time over the first
    monkeypatch.syspath_prepend(str(tmp_path))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = distribution("mtdiffusion")
    assert found.version == project["version"]
    points = {(point.group, point.name): point.value for point in found.entry_points}
    wanted = {(group, name): value for group, rows in project["entry-points"].items() for name, value in rows.items()}
    assert points == wanted | {("console_scripts", name): value for name, value in project["scripts"].items()}


@pytest.mark.parametrize(("kib", "expected"), [(1000, 60 + 10), (25, None)])
def test_pictures_are_packed_evenly_over_classes_as_many_as_fit(kib: int, expected: int | None, tmp_path: Path) -> None:
    write_pictures(tmp_path, 60)
    source = tmp_path / "classes"
    (source / "val").rename(source / "test")
    KIT["_pack_pictures"](source, tmp_path / "kit.tar.gz", kib * 1024)
    with tarfile.open(tmp_path / "kit.tar.gz") as tar:
        names = [Path(name) for name in tar.getnames()]
    counts = count(names, "train")
    assert len(set(counts)) == 1
    assert len(counts) == 10
    assert count(names, "test") == [1] * 10
    if expected is None:
        assert 0 < len(names) < 70
        assert (tmp_path / "kit.tar.gz").stat().st_size <= kib * 1024
    else:
        assert len(names) == expected


def count(names: Sequence[Path], split: str) -> list[int]:
    """Pictures a class."""
    classes = [name.parts[1] for name in names if name.parts[0] == split]
    return [classes.count(each) for each in sorted(set(classes))]
