"""``mtdiffusion bench data``: from the command to the first step on many pictures, how long, and how much memory.

Pictures of 32 × 32 pixels as JPEG, once in a folder for each class and once with a table of labels; with an empty cache
and with a full one. Each is a process of its own, which trains one step and saves it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_registry import UserError
from mtdiffusion_registry.cache import CACHE_VARIABLE

CLASSES = 10
TARGETS = {"cold": 20.0, "warm": 8.0, "memory": 1536.0}
"""Seconds with an empty and with a full cache, and MiB, of 50,000 pictures."""

_CONFIG = """
latent = {{ height = 32, width = 32 }}
backbone = {{ kind = "unet", channels = 8, multipliers = [1, 1], heads = 0, vector = 16 }}
training = {{ steps = 1, batch_size = 64, warmup = 0, checkpoint_every = 0, sample_every = 0 }}
data = {data}
[modalities]
image = {{ kind = "image", size = 32 }}
label = {{ kind = "label", classes = {classes} }}
"""


def measure(count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds and peak memory of a training of one step on this many pictures.

    Raises:
        UserError: if a training fails.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="mtdiffusion-bench-data-") as name:
        folder = Path(name)
        say(f"writing {count:,} pictures")
        write_pictures(folder, count)
        kinds = {
            "a folder for each class": f'{{ kind = "torchvision", name = "image_folder", root = "{folder}/classes" }}',
            "a folder and a table": f'{{ kind = "folder", root = "{folder}/table", fields = {{ image = "image", '
            'label = "label" } }',
        }
        for what, data in kinds.items():
            (folder / "config.toml").write_text(_CONFIG.format(data=data, classes=CLASSES), encoding="utf-8")
            cache = folder / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            for state in ("cold", "warm"):
                seconds, memory = _run(folder, cache)
                say(f"{what}, cache {state}: {seconds:.1f} s, {memory:.0f} MiB")
                rows.append({"data": what, "cache": state, "seconds": seconds, "memory": memory})
    return {
        "pictures": count,
        "rows": rows,
        "targets": TARGETS,
        "hardware": hardware("cpu"),
        "version": version("mtdiffusion"),
    }


def write_pictures(folder: Path, count: int) -> None:
    """``classes/{train,val}/CLASS/N.jpg``, and the same under ``table/{train,test}`` with a table of labels; a sixth as
    many are held out."""
    rng = np.random.default_rng(0)
    for split, other, wanted in (("train", "train", count), ("val", "test", max(count // 6, CLASSES))):
        images = folder / "table" / other / "image"
        images.mkdir(parents=True)
        lines = ["stem,value"]
        for index in range(wanted):
            label = index % CLASSES
            small = rng.integers(0, 256, (4, 4, 3), np.uint8)
            picture = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
            path = folder / "classes" / split / str(label) / f"{index:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=90)
            os.link(path, images / path.name)
            lines.append(f"{index:06d},{label}")
        (folder / "table" / other / "label.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run(folder: Path, cache: Path) -> tuple[float, float]:
    """Seconds and peak MiB of one process that trains one step."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "mtdiffusion_engine.cli", "train", str(folder / "config.toml"), "--out", str(run)]
    environment = {**os.environ, CACHE_VARIABLE: str(cache)}
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)  # which tells this process's memory, and no other's
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if process.returncode:
            said.seek(0)
            raise UserError(f"training one step failed: {said.read().decode(errors='replace')[-500:]}")
    return seconds, used.ru_maxrss / 1024


def table(measured: dict[str, Any]) -> str:
    """A row for each way the data are laid out."""
    targets = measured["targets"]
    lines = [
        "| data | empty cache | full cache | most memory |",
        "|---|---|---|---|",
        f"| *wanted at most* | {targets['cold']:.0f} s | {targets['warm']:.0f} s | {targets['memory']:.0f} MiB |",
    ]
    for what in dict.fromkeys(row["data"] for row in measured["rows"]):
        rows = {row["cache"]: row for row in measured["rows"] if row["data"] == what}
        memory = max(row["memory"] for row in rows.values())
        lines.append(
            f"| {what} | {rows['cold']['seconds']:.1f} s | {rows['warm']['seconds']:.1f} s | {memory:.0f} MiB |"
        )
    return "\n".join(lines)
