"""One of several processes that hangs ends all of them, and is named; the last checkpoint stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.hanging import Place, _verdict

ROOT = Path(__file__).parents[2]
TIMEOUT = 40
"""Seconds; on a machine with much else to do, a process may be silent for a third of it."""

SCRIPT = """
import os, signal, sys, time; sys.path.insert(0, {root!r})
from mtdiffusion_engine import evaluation
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.trainer import Trainer

rank, how = sys.argv[1:3]
batches, draw, done = Trainer.batches, evaluation.sample, []

def hang():
    done.append(None)
    if os.environ["RANK"] == rank and len(done) == 6:
        if how == "stuck":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

def read(self, stop):
    for batch in batches(self, stop):
        hang()
        yield batch

def drawn(*given, **options):
    hang()
    return draw(*given, **options)

Trainer.batches, evaluation.sample = read, drawn
sys.exit(main(sys.argv[3:]))
"""


def hangs(folder: Path, rank: int, how: str, arguments: list[str]) -> str:
    """Run a command in two processes; when it has read or drawn five batches one hangs. What the other says."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), how, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | meet | {"RANK": str(each), "LOCAL_RANK": str(each)},
        )
        for each in (0, 1)
    ]
    try:
        said = processes[1 - rank].communicate(timeout=300)[0]
        assert processes[1 - rank].returncode == 2, said
        assert how != "stopped" or processes[rank].poll() is None, processes[rank].communicate()[0]
        return said
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize(
    ("rank", "how"),
    [
        pytest.param(1, "stopped", marks=pytest.mark.long),
        pytest.param(0, "stopped", marks=pytest.mark.long),
        pytest.param(1, "stuck", marks=pytest.mark.long),
    ],
)
def test_a_training_ends_and_names_the_process_that_hangs(
    rank: int, how: str, tiny_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ["--set", f"training.timeout={TIMEOUT}", "training.sample_every=0", "training.held_out_every=0"]
    train = ["train", str(tiny_config), "--out", str(run), "--resume", "--device", "cpu", *settings]
    said = hangs(tmp_path, rank, how, train)
    assert "Traceback" not in said
    message = said.splitlines()[-1]
    assert message.startswith("mtdiffusion: error: "), said
    assert f"rank {rank}" in message and f"Rank {1 - rank} has waited for {TIMEOUT} s (training.timeout)" in message
    if how == "stuck":
        assert (
            "alive, but not getting on: rank 1, last heard of at step 6, reading its samples (of 2 processes)"
            in message
        )
    assert "at step 6, the gradient; all processes end. The last checkpoint is of step 4." in message
    assert f"--resume --out {run}" in message
    assert [path.name for path in ckpt.list_checkpoints(run)] == ["step-00000004"]
    assert main(train) == 0
    assert ckpt.list_checkpoints(run)[-1].name == "step-00000010"


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training_with_a_sentence(tiny_config: Path, tmp_path: Path) -> None:
    train = ["train", str(tiny_config), "--out", str(tmp_path / "run"), "--device", "cpu"]
    said = hangs(tmp_path, 1, "killed", [*train, "--set", "training.sample_every=0", "training.held_out_every=0"])
    assert "Traceback" not in said
    message = said.splitlines()[-1]
    assert "rank 0 of 2 processes: another has ended, at step 6 or before it" in message
    assert "The last checkpoint is of step 4." in message


@pytest.mark.long
def test_an_evaluation_ends_and_names_the_process_that_hangs(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    settings = ["--set", f"training.timeout={TIMEOUT}", "evaluation.batch_size=1"]
    said = hangs(tmp_path, 1, "stopped", ["evaluate", str(run), "--device", "cpu", *settings])
    assert "Traceback" not in said
    assert "not heard of any more: rank 1, last heard of at batch " in said.splitlines()[-1]
    assert "the same command goes on with the rest" in said
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize("command", ["evaluate", "sample"])
@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1, 2 (of 3 processes)"), (1, "rank 0")])
def test_processes_that_do_not_come_are_named(
    command: str,
    rank: int,
    missing: str,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "RANK": str(rank)}
    for key, value in meet.items():
        monkeypatch.setenv(key, value)
    out = tmp_path / "samples"
    more = [] if command == "evaluate" else ["-n", "2", "--out", str(out), "--shards", "tar"]
    assert main([command, str(tiny_run), "--device", "cpu", "--set", "training.timeout=1", *more]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    told = f"rank {rank} has waited for 1 s (training.timeout), and not all processes came; missing is {missing}. Look"
    assert said.startswith(f"mtdiffusion: error: {told}")
    assert not out.exists()


def heard(*places: Place | None, silent: int = -1) -> dict[int, tuple[str, float]]:
    """What was heard of each, and the seconds since it is the same."""
    return {
        rank: ("null" if place is None else json.dumps([7, *place]), 10.0 * (rank == silent))
        for rank, place in enumerate(places)
    }


WAITS, READS = Place(5, False, "the gradient"), Place(4, False, "reading")


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (
            heard(WAITS, WAITS, silent=1),
            "not heard of any more: rank 1, last heard of at the gradient (of 2 processes)",
        ),
        (heard(WAITS, None, WAITS, silent=1), "not heard of any more: rank 1 (of 3 processes)"),
        (heard(WAITS, READS, WAITS), "alive, but not getting on: rank 1, last heard of at reading (of 3 processes)"),
        (heard(READS, WAITS), ""),  # it is the one that is waited for
        (heard(WAITS, Place(4, True, "judging")), ""),
        (heard(WAITS, WAITS), "none of 2 processes gets on"),
        ({**heard(WAITS), 1: ("", 10.0)}, ""),  # the other has left
    ],
)
def test_who_is_named(places: dict[int, tuple[str, float]], said: str) -> None:
    now = time.monotonic()
    verdict = _verdict(0, {rank: (text, now - ago) for rank, (text, ago) in places.items()}, silence=5.0)
    assert verdict.startswith(said)
    assert bool(verdict) == bool(said)
