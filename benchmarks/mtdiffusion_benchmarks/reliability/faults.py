"""Signals, workers that die, two processes in one folder, folders that cannot be written, full disks, clocks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mtdiffusion_benchmarks.reliability.children import LIMIT, Child, as_nobody, command, limit_file_size, run
from mtdiffusion_benchmarks.reliability.jobs import JOBS, Bench, Job, difference
from mtdiffusion_benchmarks.reliability.kills import Skipped, Wrong, expected_of, lost

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


def really_full_disk(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """A file system of its own that gets full: said, without a traceback; with more room the same command goes on.

    Raises:
        Skipped: if none can be mounted here.
    """
    jobs = list(JOBS.values())
    for trial in range(trials):
        job = jobs[trial % len(jobs)]
        expected, _ = expected_of(bench, job)
        before, after = (
            _pages(bench.given),
            sum(-(-len(each) // _PAGE) for each in expected.values() if each is not None),
        )
        pages = rng.randrange(before + 1, max(after, before + 2)) + 8  # a tmpfs has some of its own
        bench.empty()
        ended = Child(bench.place, partial(_on_a_small_disk, bench, job, pages, expected)).wait(2 * LIMIT)
        if ended.status == _NOT_MOUNTED:
            raise Skipped("no file system can be mounted here")
        yield f"{job.name}, {pages} pages: {ended.said[-300:]}" if ended.status or ended.hung else ""


_PAGE = 4096  # bytes
_NOT_MOUNTED = 77


def _pages(folder: Path) -> int:
    return sum(-(-path.stat().st_size // _PAGE) for path in folder.rglob("*") if path.is_file())


def _on_a_small_disk(bench: Bench, job: Job, pages: int, expected: dict[str, Any]) -> int:
    """For a child: try a job on a disk of so many pages, then with room; print what is wrong, if anything is."""
    system = ctypes.CDLL(None, use_errno=True)
    root = bench.place.root
    private, new_namespace, remount = 1 << 14 | 1 << 18, 0x20000, 32  # MS_REC | MS_PRIVATE, CLONE_NEWNS, MS_REMOUNT
    size = f"size={pages * _PAGE}".encode()
    os.chdir("/")
    tempfile.tempdir = str(bench.given.parent)  # what the command says is to have room
    if (
        system.unshare(new_namespace)
        or system.mount(b"none", b"/", None, private, None)
        or system.mount(b"tmpfs", os.fsencode(root), b"tmpfs", 0, size)
    ):
        return _NOT_MOUNTED
    shutil.copytree(bench.given, bench.place.work)
    for name in ("cache", "tmp"):
        (root / name).mkdir()
    wrong = run(bench.place, job.arguments).wrong(0, 2)
    system.mount(b"tmpfs", os.fsencode(root), b"tmpfs", remount, b"size=1g")
    wrong = wrong or lost(bench, job, expected, "with room again")
    print(wrong)
    return 1 if wrong else 0


def clock_set_back(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """The clock goes back by an hour while a command runs: for it, and of the files that are there."""
    names = ("training", "sampling into shards", "evaluation", "benchmark", "data cache")[:trials]
    for place, name in enumerate(names):
        job = JOBS[name]
        expected, seconds = expected_of(bench, job)
        for _ in range(place, trials, len(names)):
            bench.empty()
            moment = rng.uniform(0, seconds)
            child = Child(bench.place, command(job.arguments), partial(_set_back, time.monotonic() + moment))
            child.ended_within(moment)
            future = time.time() + _HOUR  # what was written before is from an hour later
            for path in bench.place.root.rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, (future, future))
            wrong = child.wait().wrong(0) or difference(bench.found(), expected)
            yield f"{name}, set back after {moment:.3f} s: {wrong}" if wrong else ""


_HOUR = 3600.0


def _set_back(at: float) -> None:
    """For a child: its clock goes back by an hour at a moment of the clock that only goes on."""
    clock, clock_ns = time.time, time.time_ns

    def back() -> float:
        return _HOUR if time.monotonic() >= at else 0.0

    time.time = lambda: clock() - back()
    time.time_ns = lambda: clock_ns() - int(back() * 1e9)


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
