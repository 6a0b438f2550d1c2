"""Stages one after another, each in a process of its own with a time limit, each part's figures kept at once.

It can be cut anywhere: a part that is done is not measured again, one that failed or was cut is.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attrs import frozen

from mtdiffusion_engine.checkpoint import read_json, write_json
from mtdiffusion_registry import UserError


@frozen
class Stage:
    """What is measured in one process.

    Attributes:
        module: whose ``parts(setting)`` it is.
        limit: seconds that it takes at most.
        least: seconds below which it is not worth starting.
    """

    module: str
    limit: float
    least: float


STAGES: Mapping[str, Stage] = {
    "step": Stage("mtdiffusion_benchmarks.gpu.step", 130, 20),
    "speed": Stage("mtdiffusion_benchmarks.gpu.speed", 110, 20),
    "dit": Stage("mtdiffusion_benchmarks.gpu.dit", 150, 30),
    "modalities": Stage("mtdiffusion_benchmarks.gpu.modalities", 60, 20),
    "sampling": Stage("mtdiffusion_benchmarks.gpu.sampling", 90, 20),
    "cifar": Stage("mtdiffusion_benchmarks.gpu.cifar", 360, 150),
}
"""By name, those worth most first."""
AGAIN = 3
"""Exit status of a stage that has more to do, but not in this process: a failure has left its GPU unusable."""


def kept(path: Path) -> dict[str, Any]:
    """What is known of a stage."""
    return read_json(path) if path.is_file() else {"parts": {}}


def run_stages(
    names: list[str], arguments: list[str], out: Path, *, limit: float, tiny: bool = False
) -> dict[str, str]:
    """Measure what is not measured yet, within so many seconds in all.

    Args:
        arguments: of a stage's own process, which says where and how it measures.
        tiny: a stage may take all that is left, and is started however little it is: a CPU is slow.

    Returns:
        What became of each stage.
    """
    end, became = time.monotonic() + limit, {}
    for name in names:
        stage = STAGES[name]
        left = end - time.monotonic()
        if left < (1 if tiny else stage.least):
            became[name] = f"not started, {max(left, 0):.0f} s are left"
        else:
            became[name] = _run_stage(name, arguments, out / f"{name}.json", left if tiny else min(left, stage.limit))
        print(f"{name}: {became[name]}", flush=True)
    return became


def _run_stage(name: str, arguments: list[str], path: Path, limit: float) -> str:
    since, end = time.time(), time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        command = [sys.executable, "-m", "mtdiffusion_benchmarks.gpu", *arguments, "--stage", name]
        command += ["--since", str(since), "--limit", str(left)]
        process = subprocess.Popen(command, process_group=0)
        try:
            status = process.wait(left)
            reason = f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            status, reason = None, f"stopped at the limit of {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it has started
            process.wait()
        cut = _close(path, reason)
        if status is None or (status != AGAIN and not cut):
            break
    found = [record["status"] for record in kept(path)["parts"].values()]
    if not found:
        return f"failed before its first part: {reason}"
    return ", ".join(f"{found.count(status)} {status}" for status in sorted(set(found)))


def _close(path: Path, reason: str) -> bool:
    """Say of the part that was under way why it is not done; whether there was one."""
    known = kept(path)
    running = [record for record in known["parts"].values() if record["status"] == "running"]
    for record in running:
        record.update(status="cut", error=reason)
    if running:
        write_json(path, known, sort_keys=False)
    return bool(running)


def run_parts(name: str, setting: Any, since: float) -> int:
    """In a stage's own process: its parts that are neither done nor were tried since a time."""
    path = setting.out / f"{name}.json"
    todo = importlib.import_module(STAGES[name].module).parts(setting)
    for part, measure in todo.items():
        known = kept(path)
        before = known["parts"].get(part, {})
        if before.get("status") == "ok" or before.get("at", 0.0) >= since:
            continue
        record: dict[str, Any] = {"status": "running", "at": time.time()}
        order = dict.fromkeys((*todo, *known["parts"]))
        known |= {"stage": name, "version": version("mtdiffusion"), "tiny": setting.tiny, **_where(setting)}

        def write(record: dict[str, Any], part: str = part, known: dict[str, Any] = known, order: Any = order) -> None:
            parts = known["parts"] | {part: record}
            known["parts"] = {each: parts[each] for each in order if each in parts}
            write_json(path, known, sort_keys=False)

        write(record)
        print(f"{name}: {part}", flush=True)
        started = time.monotonic()
        try:
            found: dict[str, Any] = {"status": "ok", "measured": measure()}
        except Exception as error:
            said = str(error) if isinstance(error, UserError) else traceback.format_exc()
            print(f"{name}: {part}: {said}", file=sys.stderr, flush=True)
            found = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        write({**record, **found, "seconds": round(time.monotonic() - started, 1)})
        if found["status"] == "failed" and not _usable(setting):
            return AGAIN
    return 0


def _where(setting: Any) -> dict[str, Any]:
    from mtdiffusion_benchmarks.runner import hardware

    return {"hardware": hardware(setting.device)}


def _usable(setting: Any) -> bool:
    """Whether the GPU still answers this process; gives back what a failed part held."""
    import torch

    if not setting.cuda:
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
