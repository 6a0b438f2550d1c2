"""What is tried, how often, and what was found: written after each fault, and gone on with where it stopped."""

from __future__ import annotations

import importlib
import platform
import random
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from mtdiffusion_benchmarks.reliability import distributions, faults, fuzzing, hangs, hostile, kills, numbers, shards
from mtdiffusion_benchmarks.reliability.jobs import JOBS, Bench
from mtdiffusion_benchmarks.reliability.kills import Skipped
from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_registry import UserError

NOT_TRIED = (
    "a loss of power, after which what a disk had promised to keep may be gone",
    "processes on several machines, and more than two of them that hang or die",
    "a clock of the whole machine that goes backwards: it does for the command's Python, and of its files",
    "shards in an object store, and the page to play with",
    "CUDA",
)
"""What the page names as not tried."""


@frozen
class Fault:
    """Something that is tried.

    Attributes:
        group: its heading on the page.
        trials: does so many, and yields for each what was lost: a sentence, or "".
        share: how many trials it takes for one that is asked for.
    """

    group: str
    trials: Callable[[Bench, int, random.Random], Iterator[str]]
    share: float = 1.0


def _faults() -> dict[str, Fault]:
    killed, stopped, hurt, wrong, made = "Killed", "Stopped and starved", "Hostile files", "Numbers", "Made-up inputs"
    found = {}
    for name, job in JOBS.items():
        found[f"{name}: SIGKILL at random moments"] = Fault(killed, partial(_of_job, kills.at_random, job.name))
        found[f"{name}: SIGKILL before operations on files"] = Fault(
            killed, partial(_of_job, kills.at_operations, job.name), 0.4
        )
    found["training: SIGKILL while a new process starts"] = Fault(
        killed, partial(_of_job, kills.at_start, "training"), 0.1
    )
    for name in ("training", "sampling into shards", "evaluation"):
        found[f"{name}: SIGTERM, or Ctrl-C twice"] = Fault(stopped, partial(_of_job, faults.told_to_stop, name), 0.2)
    found |= {
        "training: a process that loads data is killed": Fault(stopped, faults.worker_dies, 0.1),
        **{
            f"{name} in two processes: one is {how}": Fault(stopped, partial(_of_job, test, name), 0.1)
            for name in ("training", "evaluation", "sampling into shards")
            for how, test in (("stopped, SIGSTOP", hangs.stopped), ("killed", hangs.killed))
        },
        "training: two processes into one folder": Fault(stopped, faults.two_at_once, 0.2),
        "every command: a folder that cannot be written": Fault(stopped, faults.read_only, len(JOBS) / 50),
        "every command: no room for files": Fault(stopped, faults.full_disk, 0.4),
        "every command: a disk that is full": Fault(stopped, faults.really_full_disk, 0.4),
        "a clock that goes back by an hour while a command runs": Fault(stopped, faults.clock_set_back, 0.4),
        "every command: files from the future": Fault(stopped, faults.clock_behind, len(JOBS) / 50),
        "pickles under every name that is read": Fault(hurt, hostile.unpickled),
        "checkpoints, pictures and tables cut short, flipped, grown": Fault(hurt, hostile.damaged, 2),
        "huge, endless and nested files": Fault(hurt, hostile.oversized),
        "tables that name files elsewhere": Fault(hurt, hostile.outside),
        **{
            f"shards, {name}: {how}": Fault(hurt, partial(_of_form, test, form))
            for form, name in (("tar", "tar"), ("parquet", "Parquet"), ("litdata", "litdata"))
            for how, test in (("cut short, flipped, grown", shards.damaged), ("made to do harm", shards.hostile))
        },
        "sampling goes on among damaged shards": Fault(hurt, shards.resumed, 0.32),
        "distributions whose metadata are damaged, in a new process": Fault(hurt, distributions.in_new_processes, 0.1),
        "codes, losses, gradients and moments that are not finite": Fault(wrong, numbers.in_training, 0.6),
        "checkpoints that are not finite": Fault(wrong, numbers.in_checkpoints, 0.36),
        "data that are not finite": Fault(wrong, numbers.in_data, 0.12),
    }
    for target, share in fuzzing.SHARES.items():
        found[target] = Fault(made, partial(_fuzz, target), share)
    return found


def _of_job(
    how: Callable[..., Iterator[str]], name: str, bench: Bench, trials: int, rng: random.Random
) -> Iterator[str]:
    return how(bench, JOBS[name], trials, rng)


def _of_form(
    how: Callable[..., Iterator[str]], form: str, bench: Bench, trials: int, rng: random.Random
) -> Iterator[str]:
    return how(bench, form, trials, rng)


def _fuzz(target: str, bench: Bench, trials: int, rng: random.Random) -> Iterator[str]:
    return fuzzing.fuzz(bench, trials, rng, target)


FAULTS: Mapping[str, Fault] = _faults()


def chosen(only: Sequence[str]) -> dict[str, Fault]:
    """The faults that match one of the patterns, with ``*`` for anything; without patterns all.

    Raises:
        UserError: if a pattern matches none.
    """
    for pattern in only:
        if not any(fnmatch(name, pattern) for name in FAULTS):
            raise UserError(f"--only: no fault matches {pattern!r}; there are {', '.join(map(repr, FAULTS))}")
    return {name: fault for name, fault in FAULTS.items() if not only or any(fnmatch(name, each) for each in only)}


def measure(
    trials: int,
    seed: int,
    only: Sequence[str],
    before: Mapping[str, Any] | None,
    keep: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All that ``bench reliability`` finds, as JSON.

    Args:
        trials: of each fault; of some more or fewer (:attr:`Fault.share`).
        seed: of the moments and the cases.
        only: try these.
        before: what was found of others; what was tried as often of the same version, and
            lost nothing, is not tried again.
        keep: given all that was found so far after each fault.

    Raises:
        UserError: if a command fails without a fault, or this process has threads.
    """
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "version": version("mtdiffusion"),
        "hypothesis": version("hypothesis"),
        "hardware": hardware("cpu"),
        "system": platform.platform(),
        "trials": trials,
        "seed": seed,
        "not_tried": list(NOT_TRIED),
        "faults": dict(before["faults"]) if before is not None else {},
    }
    _warm_up()
    if threading.active_count() > 1:
        raise UserError("reliability: this process has threads, and cannot be forked; run it on its own")
    with tempfile.TemporaryDirectory(prefix="mtdiffusion-reliability-") as name:
        bench = Bench.set_up(Path(name).resolve())
        for what, fault in chosen(only).items():
            mark = {"of": max(round(trials * fault.share), 1), "seed": seed, "version": result["version"]}
            there = result["faults"].get(what, {})
            if there.get("mark") == mark and not there["lost"]:  # what was lost may have been mended since
                say(f"{what}: there already")
                continue
            started = time.monotonic()
            rng = random.Random(f"{seed} {zlib.crc32(what.encode())}")
            try:
                found = list(fault.trials(bench, mark["of"], rng))
            except Skipped as reason:
                row = {
                    "group": fault.group,
                    "tried": 0,
                    "lost": 0,
                    "examples": [],
                    "seconds": 0,
                    "skipped": str(reason),
                }
                result["faults"][what] = row
                say(f"{what}: skipped: {reason}")
                keep(result)
                continue
            lost = [wrong for wrong in found if wrong]
            result["faults"][what] = {
                "group": fault.group,
                "tried": len(found),
                "lost": len(lost),
                "examples": [text.replace(name, "") for text in lost[:5]],
                "seconds": round(time.monotonic() - started, 1),
                "mark": mark,
            }
            say(f"{what}: {len(found)} tried, {len(lost)} lost, {time.monotonic() - started:.0f} s")
            for text in lost[:5]:
                say(f"    {text}")
            keep(result)
    result["faults"] = {name: result["faults"][name] for name in FAULTS if name in result["faults"]}
    keep(result)
    return result


def _warm_up() -> None:
    """Import what takes longest, before anything is forked; what else a child imports is imported after the first."""
    for name in ("mtdiffusion_engine.commands", "mtdiffusion_engine.evaluation", "torch._dynamo", "hypothesis"):
        importlib.import_module(name)
