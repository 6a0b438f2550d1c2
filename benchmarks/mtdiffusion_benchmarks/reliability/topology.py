"""``mtdiffusion bench topology``: is a training the same run on any number of processes, resumed on any other?

A small training in float64, where what is left is the order of sums. One process without accumulation is what all
others are compared with. Each topology trains the run from its beginning to its end, and half of it; and from each half
each topology goes on.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from attrs import frozen
from safetensors.torch import load_file

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine import trainer as training
from mtdiffusion_engine.experiment import Experiment, build_model, structure_experiment
from mtdiffusion_engine.trainer import Progress, Trainer
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.cache import CACHE_VARIABLE

RESULT = Path("benchmarks/results/topology.json")
WANTED = 1e-10
"""The greatest difference that is wanted."""
STEPS, HALF = 8, 4
FILES = {"weights": "model", "moments": "optimizer", "averages": "ema"}
"""Files of a checkpoint, by what of a run they hold."""
LOGGED = "logged"

# All that is drawn is, but for dropout, which draws where it runs. Every term of the loss counts.
_CONFIG = f"""
data = {{ kind = "shapes", size = 16, count = 64, test_count = 8 }}
latent = {{ height = 8, width = 8 }}
clocks.kind = "independent"
process.steps = 20
sampling.steps = 2
conditioning.partial = 0.5
augmentation.flip = 0.5
loss = {{ l0 = 0.1, l1 = 1.0, l2 = 1.0, l3 = 1.0 }}

[modalities]
image = {{ kind = "image", size = 16 }}
mask = {{ kind = "mask", size = 16, classes = 6 }}
label = {{ kind = "label", classes = 5 }}

[backbone]
kind = "unet"
channels = 8
multipliers = [1]
heads = 0
vector = 16

[training]
steps = {STEPS}
batch_size = 8
warmup = 2
log_every = 1
held_out_every = 4
checkpoint_every = 0
sample_every = 0
"""


@frozen
class Topology:
    """How a training is shared out.

    Attributes:
        processes: how many.
        accumulate: micro-batches of each, ``training.accumulate``.
        parallel: ``training.parallel``; of one process it makes no difference.
    """

    processes: int
    accumulate: int
    parallel: str

    def __str__(self) -> str:
        if self.processes == 1:
            return f"1 process × {self.accumulate}"
        return f"{self.processes} processes × {self.accumulate}, {self.parallel}"

    @property
    def settings(self) -> dict[str, Any]:
        """What the configuration says of it."""
        return {"accumulate": self.accumulate, "parallel": self.parallel}


@frozen
class Session:
    """A training from where a run is to some step.

    Attributes:
        run: the folder, which is resumed if it is there.
        settings: changes of ``[training]``.
    """

    run: str
    settings: Mapping[str, Any]
    stop_at: int


def topologies(processes: Sequence[int] = (1, 2, 4)) -> list[Topology]:
    """All that are tried; the first is what the others are compared with."""
    return [
        Topology(count, accumulate, parallel)
        for count, accumulate, parallel in product(processes, (1, 2), ("ddp", "fsdp"))
        if count > 1 or parallel == "ddp"
    ]


@contextmanager
def in_double() -> Iterator[None]:
    """While this lasts, a :class:`Trainer` that is made has weights, moments and averages in float64."""

    def double(experiment: Experiment) -> MultimodalDiffusion:
        return build_model(experiment).double()

    built = training.build_model  # type: ignore[attr-defined]
    training.build_model = double  # type: ignore[attr-defined, assignment]
    try:
        yield
    finally:
        training.build_model = built  # type: ignore[attr-defined]


def apart(checkpoint: Path, other: Path) -> dict[str, float]:
    """The greatest difference between two checkpoints' values: of weights, moments and averages.

    Raises:
        UserError: if they do not hold the same tensors.
    """
    found = {}
    for what, file in FILES.items():
        ours, theirs = (load_file(folder / f"{file}.safetensors") for folder in (checkpoint, other))
        layouts = [{name: (x.dtype, x.shape) for name, x in tensors.items()} for tensors in (ours, theirs)]
        if layouts[0] != layouts[1]:
            raise UserError(f"{checkpoint}: {file} does not hold the tensors of {other}")
        differences = (float((x.double() - theirs[name].double()).abs().max()) for name, x in ours.items())
        found[what] = max(differences, default=0.0)  # before the first step there are no moments
    return found


def train(session: Session) -> list[dict[str, Any]]:
    """A session in this process, or in all that a launcher has started; what it logs."""
    tables = tomllib.loads(_CONFIG)
    tables["training"] |= session.settings
    registry = Registry.discover()
    run = Path(session.run)
    with in_double():
        trainer = Trainer(
            structure_experiment(tables, registry, "topology"),
            run,
            registry,
            resume=(run / "config.toml").is_file(),
            device="cpu",
            on_message=lambda _: None,
        )
    told: list[dict[str, Any]] = []

    def progress(report: Progress) -> None:
        held_out = {f"held_out/{name}": value for name, value in (report.held_out or {}).items()}
        told.append({"step": report.step, "gradient_norm": report.norm, **report.means, **held_out})

    trainer.train(progress, stop_at=session.stop_at)
    trainer.accelerator.wait_for_everyone()
    return told


def main(sessions: Path, told: Path) -> None:
    """What each of several processes does: sessions one after another. The first writes down what each logs."""
    found = [train(Session(**session)) for session in json.loads(sessions.read_text(encoding="utf-8"))]
    if os.environ.get("RANK", "0") == "0":
        told.write_text(json.dumps(found), encoding="utf-8")


def _launch(processes: int, sessions: Sequence[Session], folder: Path) -> list[list[dict[str, Any]]]:
    """Sessions one after another in so many processes; what each logs."""
    asked, told = folder / "sessions.json", folder / "told.json"
    tables = [{"run": each.run, "settings": dict(each.settings), "stop_at": each.stop_at} for each in sessions]
    asked.write_text(json.dumps(tables), encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*start, "-m", __spec__.name, str(asked), str(told)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", CACHE_VARIABLE: str(folder / "cache")},
    )
    if done.returncode:
        raise UserError(f"topology: a training in {processes} processes failed: {done.stderr.strip()[-1000:]}")
    found: list[list[dict[str, Any]]] = json.loads(told.read_text(encoding="utf-8"))
    return found


def _by_processes(tried: Sequence[Topology]) -> Iterator[tuple[int, list[Topology]]]:
    for count in dict.fromkeys(each.processes for each in tried):
        yield count, [each for each in tried if each.processes == count]


def measure(processes: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """All that ``bench topology`` finds, as JSON: a row for each topology that trains alone, and for each pair of which
    the second goes on with what the first has begun.

    Raises:
        UserError: if a training fails, or logs other things than the first.
    """
    started = time.monotonic()
    tried = topologies(processes)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mtdiffusion-topology-") as name:
        folder = Path(name).resolve()
        whole, halves = (dict[Topology, Any]() for _ in range(2))
        for count, ours in _by_processes(tried):
            runs = [(each, stop_at) for each in ours for stop_at in (STEPS, HALF)]
            sessions = [Session(str(folder / f"{stop_at} {each}"), each.settings, stop_at) for each, stop_at in runs]
            for (each, stop_at), found in zip(runs, _launch(count, sessions, folder), strict=True):
                (whole if stop_at == STEPS else halves)[each] = found
            say(f"{len(sessions)} trainings in {count} process{'es' * (count > 1)}")
        first = folder / f"{STEPS} {tried[0]}"

        def compare(begun: Topology, ended: Topology, run: Path, logged: list[dict[str, Any]]) -> None:
            checkpoints = [ckpt.list_checkpoints(each)[-1] for each in (first, run)]
            if len({checkpoint.name for checkpoint in checkpoints}) > 1:
                raise UserError(f"topology: {run.name} ends with {checkpoints[1].name}, expected {checkpoints[0].name}")
            found = {**apart(*checkpoints), LOGGED: _apart_in_log(whole[tried[0]], logged)}
            rows.append({"begun": str(begun), "ended": str(ended), "resumed": " to " in run.name, **found})

        for each in tried:
            compare(each, each, folder / f"{STEPS} {each}", whole[each])
        for count, ours in _by_processes(tried):
            pairs = list(product(tried, ours))
            runs_of = {pair: folder / f"{pair[0]} to {pair[1]}" for pair in pairs}
            for (begun, _), run in runs_of.items():
                shutil.copytree(folder / f"{HALF} {begun}", run)
            sessions = [Session(str(run), ended.settings, STEPS) for (_, ended), run in runs_of.items()]
            for (begun, ended), found in zip(pairs, _launch(count, sessions, folder), strict=True):
                compare(begun, ended, runs_of[begun, ended], [*halves[begun], *found])
            say(f"{len(sessions)} trainings resumed in {count} process{'es' * (count > 1)}")
    return {
        "version": version("mtdiffusion"),
        "hardware": hardware("cpu"),
        "system": platform.platform(),
        "steps": STEPS,
        "resumed_at": HALF,
        "wanted": WANTED,
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
    }


def _apart_in_log(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
    """The greatest difference between two logs' values, as a share of the value if that is above 1."""
    if [each.keys() for each in expected] != [each.keys() for each in found]:
        raise UserError("topology: a training logs other things, or at other steps, than that in one process")
    pairs = ((ours[key], theirs[key]) for ours, theirs in zip(expected, found, strict=True) for key in ours)
    return max(abs(ours - theirs) / max(abs(ours), 1.0) for ours, theirs in pairs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
