"""Signals, workers that die, two processes in one folder, folders that cannot be written, full disks, clocks."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtdiffusion_benchmarks.reliability.children import Child, as_nobody, command, limit_file_size, run
from mtdiffusion_benchmarks.reliability.jobs import JOBS, Bench, Job, difference
from mtdiffusion_benchmarks.reliability.kills import Wrong, expected_of, lost

STOPPED = {signal.SIGTERM: (143, -signal.SIGTERM), signal.SIGINT: (130, -signal.SIGINT)}
"""Exit statuses of a command that was told to stop."""


def told_to_stop(bench: Bench, job: Job, trials: int, rng: random.Random) -> Wrong:
    """SIGTERM, or SIGINT twice, at a random moment: no traceback, and the same command goes on."""
    expected, seconds = expected_of(bench, job)
    for trial in range(trials):
        number = signal.SIGINT if trial % 2 else signal.SIGTERM
        bench.empty()
        child = Child(bench.place, command(job.arguments))
        moment = rng.uniform(0.1, seconds)
        child.ended_within(moment)
        child.send(number)
        if number == signal.SIGINT and not child.ended_within(rng.uniform(0, 0.3)):
            child.send(number)
        ended = child.wait()
        when = f"{number.name} after {moment:.3f} s"
        wrong = ended.wrong(0, *STOPPED[number])
        if not wrong and (wrong := run(bench.place, job.arguments).wrong(0)) == "":
            # A training that is stopped writes a checkpoint where it is: in the end an older one is of another step.
            wrong = difference(_newest(bench.found()), _newest(expected))
        yield f"{when}: {wrong}" if wrong else ""


def _newest(found: dict[str, Any]) -> dict[str, Any]:
    """What was found, without a new run's checkpoints but the last."""
    old = sorted(name for name in found if re.fullmatch(r"work/new/checkpoints/step-[0-9]+", name))[:-1]
    return {name: value for name, value in found.items() if not name.startswith(tuple(old) or ("\0",))}


def worker_dies(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """SIGKILL to a process that loads data: the training says so, and goes on when it is started again."""
    job = Job("training", (*JOBS["training"].arguments, "--set", "training.workers=1", "training.steps=40"))
    expected, _ = expected_of(bench, job)
    for _ in range(trials):
        bench.empty()
        child = Child(bench.place, command(job.arguments))
        worker = 0
        until = time.monotonic() + 30
        while not worker and time.monotonic() < until and not child.ended_within(0.01):
            worker = next(iter(_children_of(child.pid)), 0)
        time.sleep(rng.uniform(0, 0.5))
        if worker:
            os.kill(worker, signal.SIGKILL)
        ended = child.wait()
        wrong = "" if worker else "no worker was seen"
        wrong = wrong or ended.wrong(0, 2)  # 0: it had given all it had to give
        shutil.rmtree(bench.place.root / "tmp")  # Python keeps files of its own there for such a process
        (bench.place.root / "tmp").mkdir()
        yield wrong or lost(bench, job, expected, "a worker was killed")


def _children_of(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, task.read_text().split())


def two_at_once(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """Two trainings into one folder, started at almost the same time: one trains, the other says that it cannot."""
    job = JOBS["training"]
    expected, seconds = expected_of(bench, job)
    for _ in range(trials):
        bench.empty()
        first = Child(bench.place, command(job.arguments))
        first.ended_within(rng.uniform(0, seconds / 2))
        second = Child(bench.place, command(job.arguments))
        ends = [first.wait(), second.wait()]
        wrong = next((wrong for wrong in (ended.wrong(0, 2) for ended in ends) if wrong), "")
        if not wrong and all(ended.status for ended in ends):
            wrong = f"neither trained: {ends[0].said[-200:]} {ends[1].said[-200:]}"
        yield wrong or lost(bench, job, expected, "two at once")


def read_only(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """A folder in which the user may not write: the command says which, and nothing is changed."""
    for job in list(JOBS.values())[:trials]:
        bench.empty()
        before = bench.found()
        for path in (bench.given.parent.parent, bench.given.parent, bench.place.root):
            path.chmod(0o755)
        for name in ("cache", "tmp"):
            (bench.place.root / name).chmod(0o777)
        ended = run(bench.place, job.arguments, as_nobody)
        # What needs no more than the cache may go well.
        wrong = ended.wrong(*((0,) if job.name == "data cache" else (2,)))
        work = {name: value for name, value in bench.found().items() if name.startswith("work")}
        if not wrong and work != {name: value for name, value in before.items() if name.startswith("work")}:
            wrong = "something was changed"
        yield f"{job.name}: {wrong}" if wrong else ""


def full_disk(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """A disk that is full at some file: said, without a traceback; and with room again the same command goes on."""
    jobs = list(JOBS.values())
    for trial in range(trials):
        job = jobs[trial % len(jobs)]
        expected, _ = expected_of(bench, job)
        bench.empty()
        size = rng.choice((4096, 8192, 16384, 32768, 65536))  # a command's own words fit
        ended = run(bench.place, job.arguments, limit_file_size(size))
        when = f"{job.name}, files of {size} bytes at most"
        wrong = ended.wrong(0, 2)
        yield f"{when}: {wrong}" if wrong else lost(bench, job, expected, when)


def clock_behind(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """The clock was set back: all files there are seem to be from the future."""
    for name, job in list(JOBS.items())[:trials]:
        expected, seconds = expected_of(bench, job)
        bench.empty()
        child = Child(bench.place, command(job.arguments))
        child.ended_within(seconds / 2)
        child.kill()
        child.wait()
        future = time.time() + 10 * 365 * 86400
        for path in bench.place.root.rglob("*"):
            os.utime(path, (future, future))
        yield lost(bench, job, expected, f"{name}, files from the future")
