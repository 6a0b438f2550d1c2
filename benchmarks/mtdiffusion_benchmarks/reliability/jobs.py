"""The commands that faults are tried on, as small as they can be, and what has to be the same in the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from PIL import Image

from mtdiffusion_benchmarks.reliability.children import (
    Child,
    Ended,
    Place,
    command,
    import_noted,
    noting_imports,
)
from mtdiffusion_registry import UserError

CONFIG = """
latent = {{ height = 4, width = 4 }}
process = {{ steps = 20 }}
sampling = {{ steps = 2 }}
evaluation = {{ samples = 16, steps = 2, bound_times = 1, batch_size = 8 }}

[data]
kind = "folder"
root = "{root}"
test_fraction = 0.5
fields = {{ image = {{ kind = "image", channels = 1 }}, label = "label" }}

[modalities]
image = {{ kind = "image", size = 4, channels = 1 }}
label = {{ kind = "label", classes = 4 }}

[backbone]
kind = "unet"
channels = 8
multipliers = [1]
heads = 0
vector = 16

[training]
steps = 6
batch_size = 4
warmup = 2
log_every = 2
checkpoint_every = 2
sample_every = 0
held_out_every = 0
workers = 0
"""

PROFILE = """
title = "tiny"
description = "Two methods, trained for a few steps: what is killed and goes on."
seeds = [0]
figures = 1

[settings.pictures]
config = "config.toml"
set = ["training.steps=4"]

[tasks.all]
task = { kind = "combination", modalities = ["image", "label"] }

[methods.joint]
method = { kind = "joint" }

[methods.classifier]
method = { kind = "regression", observed = ["image"], target = "label" }

[[run]]
settings = ["pictures"]
tasks = ["all"]
methods = ["joint", "classifier"]
"""

SECONDS = ("train_seconds", "seconds_per_step", "evaluate_seconds", "seconds")
"""Keys of a benchmark's cell that tell how long something took."""


@frozen
class Job:
    """A command that is interrupted, and started again as it was.

    Attributes:
        name: for people.
        arguments: of the command line; the same each time.
        all_or_nothing: whether it makes a folder at once: where it was killed after that, it says so, with status 2.
    """

    name: str
    arguments: Sequence[str]
    all_or_nothing: bool = False


_JUDGE = '[{kind = "judge", epochs = 1, width = 4}]'
_DEVICE = ("--device", "cpu")
JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job("training", ("train", "config.toml", "--out", "new", "--resume", *_DEVICE)),
        Job(
            "training from another run's weights",
            ("train", "config.toml", "--out", "new", "--resume", "--init-from", "run", *_DEVICE),
        ),
        Job("sampling into a folder", ("sample", "run", "-n", "16", "--out", "samples", *_DEVICE), True),
        Job(
            "sampling into shards",
            ("sample", "run", "-n", "16", "--out", "samples", "--shards", "tar", "--shard-size", "4", *_DEVICE),
        ),
        Job("evaluation", ("evaluate", "run", *_DEVICE)),
        Job(
            "a judge's cache",
            ("evaluate", "run", "--only", "label|image", "--set", f"evaluation.evaluators={_JUDGE}", *_DEVICE),
        ),
        Job("gallery", ("gallery", "run", *_DEVICE)),
        Job("export", ("export", "run", "--out", "exported", *_DEVICE), True),
        Job("benchmark", ("bench", "run", "profile.toml", "--out", "bench")),
        Job("data cache", ("config", "check", "config.toml")),
    )
}


@frozen
class Bench:
    """A place for trials, with what they start from.

    Attributes:
        place: emptied before each trial.
        given: what is put into it: configurations, and a run trained once.
        data: a folder data set, at one place for all trials.
    """

    place: Place
    given: Path
    data: Path

    @classmethod
    def set_up(cls, folder: Path) -> Bench:
        """Write configurations and data, and train the run that others start from.

        Raises:
            UserError: if it cannot be trained.
        """
        bench = cls(Place(folder / "trial"), folder / "given", folder / "data")
        bench.given.mkdir(parents=True)
        write_pictures(bench.data, 24)
        texts = {"config.toml": CONFIG.format(root=bench.data), "profile.toml": PROFILE}
        for name, text in texts.items():
            (bench.given / name).write_text(text, encoding="utf-8")
        bench.empty()
        to_its_end(bench, Job("the run to start from", ("train", "config.toml", "--out", "run", *_DEVICE)))
        shutil.rmtree(bench.place.work / "run" / "tensorboard")
        shutil.copytree(bench.place.work / "run", bench.given / "run")
        return bench

    def empty(self) -> None:
        """Bring the place to what every trial starts from."""
        shutil.rmtree(self.place.root, ignore_errors=True)
        shutil.copytree(self.given, self.place.work)
        for name in ("cache", "tmp"):
            (self.place.root / name).mkdir()

    def found(self) -> dict[str, Any]:
        """Everything in the place, by its path: bytes of files, None of folders.

        TensorBoard's files are left out, whose names and contents hold the time; and of a benchmark's results the
        seconds that something took.
        """
        contents: dict[str, Any] = {}
        for path in sorted(self.place.root.rglob("*")):
            name = str(path.relative_to(self.place.root))
            if "tensorboard" in path.parts:
                continue
            if not path.is_file():
                contents[name] = None
            elif "cells" in path.parts:
                contents[name] = _without_seconds(json.loads(path.read_bytes()))
            else:
                contents[name] = path.read_bytes()
        return contents


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_seconds(each) for key, each in value.items() if key not in SECONDS}
    return [_without_seconds(each) for each in value] if isinstance(value, list) else value


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """How two states differ, in a sentence; empty if they do not."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is left over" for name in found if name not in expected]
    lines += [f"{name} differs" for name in found if name in expected and found[name] != expected[name]]
    return "; ".join(lines[:4])


def write_pictures(folder: Path, count: int) -> None:
    """A data set of kind ``folder``: pictures of 4 × 4 pixels and a table of labels."""
    rng = np.random.default_rng(0)
    (folder / "image").mkdir(parents=True)
    lines = ["stem,value"]
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).save(folder / "image" / f"{index:03d}.png")
        lines.append(f"{index:03d},{index % 4}")
    (folder / "label.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def to_its_end(bench: Bench, job: Job, before: Callable[[], None] | None = None) -> Ended:
    """Run a job that nothing interrupts.

    Raises:
        UserError: if it fails.
    """
    ended = Child(bench.place, noting_imports(command(job.arguments), bench.given.parent / "imports"), before).wait()
    if ended.status:
        raise UserError(f"reliability: {job.name} failed without a fault: {ended.said[-500:]}")
    import_noted(bench.given.parent / "imports")
    return ended
