"""SIGKILL at random moments and before every operation on files; then the same command again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from mtdiffusion_benchmarks.reliability.children import Child, command, counting, killed_before, run, started_anew
from mtdiffusion_benchmarks.reliability.jobs import Bench, Job, difference, to_its_end

Wrong = Iterator[str]
"""What was lost in each trial: a sentence, or nothing."""


class Skipped(Exception):
    """A fault that cannot be tried here; why, in a few words."""


def expected_of(bench: Bench, job: Job) -> tuple[dict[str, Any], float]:
    """What a job leaves if nothing interrupts it, and how many seconds it takes."""
    for _ in range(2):  # the first imports what the others then need not
        bench.empty()
        ended = to_its_end(bench, job)
    return bench.found(), ended.seconds


def lost(bench: Bench, job: Job, expected: dict[str, Any], when: str) -> str:
    """Start the job again, as it was; what is then not as if nothing had happened."""
    ended = run(bench.place, job.arguments)
    wrong = ended.wrong(0, *([2] if job.all_or_nothing else [])) or difference(bench.found(), expected)
    return f"{when}: {wrong}" if wrong else ""


def at_random(bench: Bench, job: Job, trials: int, rng: random.Random) -> Wrong:
    """Kill at moments drawn uniformly over the time that the job takes, up to four times in a row, then let it end."""
    expected, seconds = expected_of(bench, job)
    done = 0
    while done < trials:
        bench.empty()
        moments: list[float] = []
        for _ in range(min(rng.randint(1, 4), trials - done)):
            moment = rng.uniform(0, seconds)
            child = Child(bench.place, command(job.arguments))
            early = child.ended_within(moment)
            child.kill()
            child.wait()
            if early:  # it was done before: no trial
                seconds *= 0.98
                break
            moments.append(moment)
        if moments:
            done += len(moments)
            yield lost(bench, job, expected, f"killed after {', '.join(f'{moment:.3f} s' for moment in moments)}")
            yield from [""] * (len(moments) - 1)


def at_operations(bench: Bench, job: Job, trials: int, rng: random.Random) -> Wrong:
    """Kill right before an operation on files: each of them, or as many as there are trials, spread evenly; every other
    time once more, before any operation of the second attempt."""
    expected, _ = expected_of(bench, job)
    log = bench.given.parent / "operations"
    log.unlink(missing_ok=True)
    bench.empty()
    to_its_end(bench, job, counting(bench.place.root, log))
    operations = log.read_text(encoding="utf-8").splitlines()
    count = min(trials, len(operations))
    for trial, number in enumerate(round(i * (len(operations) - 1) / max(count - 1, 1)) for i in range(count)):
        bench.empty()
        numbers = [number, *([rng.randrange(len(operations))] if trial % 2 else [])]
        for each in numbers:
            Child(bench.place, command(job.arguments), killed_before(bench.place.root, each)).wait()
        event, _, path = operations[number].partition("\t")
        at = f"operation {number} ({event} of {path.removeprefix(str(bench.place.root))})"
        yield lost(bench, job, expected, f"killed before {at}{', and again' * (len(numbers) - 1)}")


def at_start(bench: Bench, job: Job, trials: int, rng: random.Random) -> Wrong:
    """Kill a process that starts from nothing, at moments drawn uniformly over all of its time, imports included."""
    expected, _ = expected_of(bench, job)
    bench.empty()
    started = time.monotonic()
    started_anew(bench.place, job.arguments).communicate()
    seconds = time.monotonic() - started
    bench.empty()
    for trial in range(trials):
        moment = rng.uniform(0, seconds)
        process = started_anew(bench.place, job.arguments)
        time.sleep(moment)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        yield lost(bench, job, expected, f"killed after {moment:.2f} s") if trial == trials - 1 else ""
