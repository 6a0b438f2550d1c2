"""CIFAR-10 with its labels, trained by the ordinary commands for some minutes, sampled and judged."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from mtdiffusion_benchmarks.gpu.measuring import Part, Setting
from mtdiffusion_engine import checkpoint
from mtdiffusion_registry import UserError

CONFIG = Path("benchmarks/gpu/configs/cifar10.toml")
SECONDS = 240.0
"""Of training."""
AFTER = 100.0
"""Seconds that are left for what comes after training."""
TINY = [
    "latent.height=16",
    "latent.width=16",
    "backbone.channels=8",
    "backbone.multipliers=[1]",
    "backbone.blocks=1",
    "backbone.attention=[]",
    "backbone.vector=16",
    "training.steps=3",
    "training.batch_size=4",
    "training.compile=false",
    "training.workers=0",
    "sampling.steps=2",
    "evaluation.steps=2",
    "evaluation.samples=8",
]


def parts(setting: Setting) -> dict[str, Part]:
    """What needs the run comes after it."""
    run = setting.work / "cifar10"
    return {
        "training": partial(_train, setting, run),
        "samples": partial(_sample, setting, run),
        "evaluation": partial(_evaluate, setting, run),
    }


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "mtdiffusion_engine.cli", *map(str, arguments)]


def _train(setting: Setting, run: Path) -> dict[str, Any]:
    if setting.data is None:
        raise UserError("CIFAR-10 is not here; pack it (benchmarks/gpu/pack.sh --data DIR), or say --data DIR")
    shutil.rmtree(run, ignore_errors=True)  # of a part that was cut
    settings = ["--set", f"data.root={setting.data}", *(TINY if setting.tiny else ())]
    seconds = min(SECONDS, max(setting.deadline - time.monotonic() - AFTER, 20.0))
    log = setting.work / "cifar10.log"
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            _command("train", CONFIG, "--out", run, "--device", setting.device, *settings), stdout=file, stderr=file
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it saves the step that it has come to
            process.wait(60)
    if not (kept := checkpoint.list_checkpoints(run)):
        raise RuntimeError(f"training came to no checkpoint: {log.read_text(errors='replace')[-1500:]}")
    steps = checkpoint.step_of(kept[-1])
    return {"steps": steps, "seconds": time.monotonic() - started, "pictures": _count(setting.data / "train")}


def _count(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _require_training(run: Path) -> None:
    if not checkpoint.list_checkpoints(run):
        raise UserError("left out: the training before it came to no checkpoint")


def _sample(setting: Setting, run: Path) -> dict[str, Any]:
    _require_training(run)
    made = setting.out / "cifar.png"
    _do(_command("gallery", run, "--out", made, "--device", setting.device))
    return {"file": made.name}


def _evaluate(setting: Setting, run: Path) -> dict[str, Any]:
    _require_training(run)
    _do(_command("evaluate", run, "--device", setting.device))
    return checkpoint.read_json(run / "metrics.json")


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:5])}: {done.stderr[-1500:] or done.stdout[-1500:]}")
