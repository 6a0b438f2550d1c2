"""An evaluation in several processes measures what one does; a process that dies ends all of them, with a message."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mtdiffusion_engine.cli import main
from mtdiffusion_engine.metrics import METRICS
from mtdiffusion_engine.team import Team, batches_of, chance_at

SCRIPT = """
import os, signal, sys
from mtdiffusion_engine import evaluation
from mtdiffusion_engine.cli import main

real, drawn, rank = evaluation.sample, [], os.environ["RANK"]

def counted(model, n, **options):
    drawn.append(n)
    if sys.argv[1] == rank and len(drawn) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, n, **options)

evaluation.sample = counted
status = main(sys.argv[2:])
print(f"drawn by {rank}: {sum(drawn)}", flush=True)
sys.exit(status)
"""
OVERRIDES = [
    "evaluation.batch_size=3",
    "evaluation.samples=8",
    "evaluation.joint_draws=2",
    'evaluation.evaluators=[{kind = "judge", epochs = 1, train_samples = 24}]',
]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run of its own, since metrics are written into it."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    for name in (METRICS, "metrics.partial.json"):
        (copy / name).unlink(missing_ok=True)
    return copy


def launch(folder: Path, arguments: list[str], kill: str = "") -> subprocess.CompletedProcess[str]:
    """A command in two processes; the one of rank ``kill`` is killed at its third batch."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    return subprocess.run(
        [*start, kill, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def drawn_by(output: str) -> dict[str, int]:
    return {rank: int(count) for rank, count in re.findall(r"drawn by (\d): (\d+)", output)}


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run: Path, tmp_path: Path) -> None:
    asked = ["evaluate", str(run), "--device", "cpu", "--json", "--set", *OVERRIDES]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(asked) == 0
    finally:
        torch.set_num_threads(threads)
    alone = json.loads((run / METRICS).read_text())
    assert {"joint/bound_bits_per_dim", "joint/samples", "joint/fid_judge"} <= set(alone)
    (run / METRICS).unlink()
    done = launch(tmp_path, asked)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / METRICS).read_text()) == alone  # to the last bit: the samples are the same bytes
    assert done.stdout.count('"joint/samples"') == 1  # told once
    drawn = drawn_by(done.stdout)
    conditional = [key for key in alone if key.endswith("/samples") and "|" in key]
    groups = {key.partition("|")[2] for key in conditional}  # targets given the same are drawn together
    assert sum(drawn.values()) == 8 * (len(groups) + 2)  # each sample once, by one of them
    assert drawn["1"] == 3 * sum(drawn.values()) // 8  # of batches of 3, 3 and 2 it has the second


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["0", pytest.param("1", marks=pytest.mark.long)])
def test_a_process_that_dies_ends_the_others(killed: str, run: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = launch(tmp_path, ["evaluate", str(run), "--device", "cpu", "--set", *OVERRIDES], kill=killed)
    assert done.returncode != 0 and time.monotonic() - started < 200
    assert (
        "another process has stopped" in done.stderr
        or "mtdiffusion: terminated" in done.stderr
        or ("mtdiffusion: stopped" in done.stderr)
    )
    assert 'Traceback (most recent call last):\n  File "' + str(tmp_path) not in done.stderr
    assert not (run / METRICS).exists()


@pytest.mark.long
def test_the_gallery_is_drawn_once(run: Path, tmp_path: Path) -> None:
    assert main(["gallery", str(run), "--device", "cpu", "--out", str(tmp_path / "alone.png")]) == 0
    done = launch(tmp_path, ["gallery", str(run), "--device", "cpu", "--out", str(tmp_path / "two.png")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gallery: ") == 1
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_a_batch_has_its_random_numbers_wherever_it_is_drawn() -> None:
    generator = torch.Generator().manual_seed(5)
    first = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.rand(3, generator=chance_at(generator, 0)), first)
    later = torch.rand(3, generator=chance_at(generator, 4))
    torch.rand(9, generator=generator)
    assert torch.equal(torch.rand(3, generator=chance_at(generator, 4)), later)
    assert not torch.equal(torch.rand(3, generator=chance_at(generator, 8)), later)


def test_alone_all_is_done_in_order() -> None:
    batches = batches_of(7, 3)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]] and batches_of(0, 3) == []
    assert Team().shared(batches, len) == [3, 3, 1]
    assert Team().told("word") == "word"
