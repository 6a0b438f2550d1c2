"""A training that is split over processes is the same run: its steps, its checkpoints, whatever it is resumed on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtdiffusion import sample
from mtdiffusion_benchmarks.reliability.topology import WANTED, apart, in_double
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine import load_run, sharding
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_engine.trainer import Progress, Trainer
from mtdiffusion_registry import UserError
from tests.engine.tiny import REGISTRY, toy

ROOT = Path(__file__).parents[2]
STEPS = 8


def experiment(*overrides: str) -> Experiment:
    """All that is drawn, no dropout (which draws where it runs); a held-out look, samples and a checkpoint on the way,
    each at a step of its own."""
    return toy(
        f"training.steps={STEPS}",
        "training.accumulate=1",
        "training.held_out_every=2",
        "training.sample_every=3",
        "training.checkpoint_every=4",
        "backbone.dropout=0.0",
        "conditioning.partial=0.5",
        "augmentation.flip=0.5",
        *overrides,
    )


def session(
    run: Path, *overrides: str, resume: bool = False, stop_at: int | None = None, init_from: str | Path | None = None
) -> list[dict[str, Any]]:
    """Train in this process, in float64; what it tells."""
    with in_double():
        source = Path(init_from) if init_from else None
        trainer = Trainer(experiment(*overrides), run, REGISTRY, resume=resume, init_from=source, device="cpu")
    told: list[dict[str, Any]] = []

    def progress(report: Progress) -> None:
        told.append({"step": report.step, "norm": float(report.norm), **report.means, "held_out": report.held_out})

    def draw(step: int) -> None:
        settings, generator = trainer.experiment.sampling, torch.Generator().manual_seed(0)
        drawn = sample(trainer.averaged_model, 2, settings=settings, generator=generator)
        told.append({"step": step, "drawn": drawn["image"].flatten().tolist()})

    trainer.train(progress, draw, stop_at=stop_at)
    trainer.accelerator.wait_for_everyone()
    share = held(trainer)
    # Not quite a part in n: some tensors have fewer rows than there are processes.
    assert share <= 1.5 / trainer.accelerator.num_processes if trainer.sharded else share == 1
    return told


def held(trainer: Trainer) -> float:
    """The share of weights, averages and moments that this process has."""
    moments = [x for entry in trainer.optimizer.state.values() for x in entry.values() if x.dim()]
    tensors = [*trainer.model.parameters(), *trainer.ema.module.parameters(), *moments]
    own = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(x.numel() for x in own) / sum(x.numel() for x in tensors)


def flat(told: list[dict[str, Any]]) -> dict[str, float]:
    """Every number that was told, by where it stands."""
    found: dict[str, float] = {}
    for report in told:
        for key, value in report.items():
            if isinstance(value, dict):
                found |= {f"{report['step']}/{key}/{name}": each for name, each in value.items()}
            elif isinstance(value, list):
                found |= {f"{report['step']}/{key}/{i}": each for i, each in enumerate(value)}
            elif value is not None:
                found[f"{report['step']}/{key}"] = value
    return found


SCRIPT = """
import json, os, signal, sys; sys.path.insert(0, {root!r})
from pathlib import Path
from mtdiffusion_engine import sharding
from tests.engine.test_sharding import session

if sys.argv[2] == "kill" and os.environ["RANK"] == "1":
    write = sharding._Writer.write_data

    def write_and_die(self, plan, planner):
        write(self, plan, planner)
        os.kill(os.getpid(), signal.SIGKILL)

    sharding._Writer.write_data = write_and_die
for run, overrides, options in json.loads(sys.argv[1]):
    told = session(Path(run), *overrides, **options)
    if os.environ["RANK"] == "0":
        print("told", json.dumps(told))
"""

Session = tuple[str, list[str], dict[str, Any]]
"""A run's folder, what its configuration changes, and the other arguments of :func:`session`."""


def launch(count: int, folder: Path, sessions: list[Session], kill: bool = False) -> list[list[dict[str, Any]]]:
    """Sessions one after another in several processes; what the first process tells of each."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    done = subprocess.run(
        [*start, str(script), json.dumps(sessions), "kill" if kill else ""],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode != 0) == kill, done.stderr
    lines = done.stdout.splitlines()
    return [json.loads(line.removeprefix("told ")) for line in lines if line.startswith("told ")]


def assert_close(run: Path, other: Path) -> None:
    """All checkpoints of two runs hold the same: weights, average, moments, and the number of updates."""
    names = [folder.name for folder in ckpt.list_checkpoints(run)]
    assert names == [folder.name for folder in ckpt.list_checkpoints(other)]
    for name in names:
        first, second = (each / "checkpoints" / name for each in (run, other))
        assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
        assert max(apart(second, first).values()) < WANTED, name
        updates, samples = (
            [ckpt.load_state(folder)[key] for folder in (first, second)] for key in ("ema_updates", "samples")
        )
        assert len({*updates}) == len({*samples}) == 1


Told = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The run in one process that knows nothing of sharding."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    return run, session(run)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    """In two processes, sharded: a run in small parts with blocks that are computed again, and the beginning of another
    one, which goes on unsharded."""
    folder = tmp_path_factory.mktemp("two")
    small = ["training.accumulate=2", "training.checkpoint_activations=true"]
    told = launch(
        2,
        folder,
        [
            (str(folder / "whole"), ["training.parallel=fsdp", *small], {}),
            (str(folder / "across"), ["training.parallel=fsdp"], {"stop_at": 2}),
            (str(folder / "across"), [], {"resume": True, "stop_at": 4}),
        ],
    )
    return folder, told


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_process(alone: Told, in_two: tuple[Path, list[list[dict[str, Any]]]]) -> None:
    """Its loss, gradient, held-out loss and samples, and what its checkpoints hold, which are written as it goes on."""
    expected, told = alone
    run, found = in_two[0] / "whole", in_two[1][0]
    assert flat(found) == pytest.approx(flat(told), rel=1e-6, abs=1e-9)  # some of the log is float32
    assert {report["step"] for report in found if report.get("held_out")} == {2, 4, 6, 8}
    assert {report["step"] for report in found if "drawn" in report} == {3, 6}
    assert_close(expected, run)
    # What comes after a training reads it as any other.
    first, second = (load_run(each, registry=REGISTRY, device="cpu").sample(2)["image"] for each in (expected, run))
    torch.testing.assert_close(second, first)


@pytest.mark.long
def test_muon_orthogonalises_whole_matrices_wherever_their_parts_are(tmp_path: Path) -> None:
    run, split = tmp_path / "run", tmp_path / "split"
    muon = "training.optimizer=muon"
    told = session(run, muon, stop_at=4)
    found = launch(2, tmp_path, [(str(split), ["training.parallel=fsdp", muon], {"stop_at": 4})])[0]
    assert flat(found) == pytest.approx(flat(told), rel=1e-6, abs=1e-9)
    assert_close(run, split)


@pytest.mark.long
def test_a_run_goes_on_over_any_number_of_processes_sharded_or_not(
    tmp_path: Path, alone: Told, in_two: tuple[Path, list[list[dict[str, Any]]]]
) -> None:
    """Two, sharded; the same two, not; one; four, sharded."""
    expected, told = alone
    run = shutil.copytree(in_two[0] / "across", tmp_path / "run")
    found = [report for each in in_two[1][1:] for report in each]
    found += session(run, "training.parallel=fsdp", resume=True, stop_at=6)
    found += launch(4, tmp_path, [(str(run), ["training.parallel=fsdp"], {"resume": True})])[0]
    assert flat(found) == pytest.approx(flat(told), rel=1e-6, abs=1e-9)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    shutil.copytree(in_two[0] / "across" / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000004")
    assert_close(expected, run)


@pytest.mark.long
def test_processes_killed_as_they_write_leave_the_checkpoint_before(tmp_path: Path) -> None:
    """Here the weights that the run started from: the first process had them whole."""
    source, expected, run = (tmp_path / name for name in ("source", "expected", "run"))
    session(source, stop_at=1)
    session(expected, init_from=source)
    launch(2, tmp_path, [(str(run), ["training.parallel=fsdp"], {"init_from": str(source)})], kill=True)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [".step-00000004.0", "step-00000000"]
    session(run, resume=True)
    assert_close(expected, run)
    assert not list((run / "checkpoints").glob(".*"))


def test_one_process_has_all_of_a_sharded_model(tmp_path: Path, alone: Told) -> None:
    run = tmp_path / "run"
    assert session(run, "training.parallel=fsdp") == alone[1]
    assert_close(alone[0], run)


def test_what_cannot_be_split_is_named() -> None:
    model = build_model(toy())
    sharding.require_shardable(model)
    model.backbone.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(
        UserError, match=r"the parameter backbone\.temperature is a scalar.*training\.parallel = \"ddp\""
    ):
        sharding.require_shardable(model)


def test_a_file_that_is_written_in_parts_is_one_of_safetensors() -> None:
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {
        "flag": torch.tensor(True),
        "scalar": torch.tensor(3.5),
        "half": torch.randn(3, 5).bfloat16(),
        "double": torch.randn(2, 3, 4, dtype=torch.float64),
        "numbers": torch.arange(7),
        "none": torch.empty(0, 4),
    }
    head, starts = sharding._layout(tensors)
    written = bytearray(head)
    for name in sorted(starts, key=starts.__getitem__):
        assert len(written) <= starts[name]
        written += tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
    found = load(bytes(written))
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x)
        assert starts[name] % x.element_size() == 0
