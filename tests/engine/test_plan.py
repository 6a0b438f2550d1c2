"""The plan of a training, against what trainings take: bytes, operations, and what two processes send one another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from attrs import asdict, evolve
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine import plan as plan_module
from mtdiffusion_engine.cli import ASSUMED, FIGURES, GPUS, main
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_engine.plan import (
    DEVICES,
    Assumptions,
    Device,
    Row,
    count_activations,
    describe_plan,
    device_of,
    plan_training,
)
from mtdiffusion_engine.tally import Tally
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import UserError
from mtdiffusion_registry.config import apply_overrides, structure
from tests.engine.tiny import CONFIG, REGISTRY, toy

ROOT = Path(__file__).parents[2]
DIT = 'backbone={kind="dit", width=32, depth=3, heads=2, patch=2}'
WIDE = """
data = { kind = "shapes", size = 16, count = 64, test_count = 8 }
latent = { height = 16, width = 16 }
modalities.image = { kind = "image", size = 16 }
backbone = { kind = "unet", channels = 16, multipliers = [1, 2], heads = 2 }
training = { steps = 10, batch_size = 32, sample_every = 0 }
"""
H100 = DEVICES["h100"]


def step(trainer: Trainer) -> None:
    """One step."""
    trainer.advance(trainer.batches(trainer.step + 1), Tally(trainer.accelerator))


def held(tensors: Any) -> int:
    """Bytes of what this process has."""
    own = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return sum(x.numel() * x.element_size() for x in own)


def holdings(trainer: Trainer) -> dict[str, int]:
    """What this process has of a model that has made a step, by the names that a plan gives it."""
    model, average = trainer.model, trainer.ema.module
    moments = [x for state in trainer.optimizer.state.values() for x in state.values() if x.ndim]
    return {
        "weights": held([*model.parameters(), *model.buffers()]),
        "gradients": held(x.grad for x in model.parameters() if x.grad is not None),
        "moments": held(moments),
        "average": held([*average.parameters(), *average.buffers()]),
    }


KINDS = {
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class Sent(TorchDispatchMode):
    """Counts the bytes of tensors that collectives carry, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            kind = KINDS.get(name, name)
            whole = args[1] if kind == "reduce_scatter" else args[0]  # of a gather what comes, of a scatter what goes
            size = held([whole] if isinstance(whole, Tensor) else whole)
            if size > 64:  # norms and votes are a few numbers
                self.bytes[kind] = self.bytes.get(kind, 0) + size
        return func(*args, **(kwargs or {}))


def measured(overrides: list[str], run: Path) -> dict[str, Any]:
    """The third step of a training in these processes: what this one holds, and what it sent and got."""
    trainer = Trainer(toy(*overrides), run, REGISTRY, device="cpu", evaluated=False)
    trainer.model.train()
    step(trainer)
    step(trainer)  # after the first one DDP agrees on its buckets
    sent = Sent()
    with sent:
        step(trainer)
    return {"held": holdings(trainer), "collectives": sent.bytes}


SCRIPT = """
import json, os, sys; sys.path.insert(0, {root!r})
from pathlib import Path
from tests.engine.test_plan import measured

for number, overrides in enumerate(json.loads(sys.argv[1])):
    found = measured(overrides, Path(sys.argv[2]) / str(number))
    if os.environ["RANK"] == "0":
        print("found", json.dumps(found))
"""


def wide(*overrides: str) -> Experiment:
    """Activations that are most of the memory, in float32 unless said otherwise."""
    tables = apply_overrides(tomllib.loads(WIDE), ["training.precision=float32", *overrides])
    return structure(REGISTRY, tables, Experiment)


def rows_of(experiment: Experiment, gpus: list[int], device: Device = H100, **assumed: float) -> dict[str, Row]:
    made = plan_training(experiment, gpus, device, Assumptions(**assumed))  # type: ignore[arg-type]
    return {f"{row.gpus} {row.parallel}": row for row in made.rows}


@pytest.mark.long
def test_two_processes_hold_and_send_what_is_planned(tmp_path: Path) -> None:
    """To the byte; of collectives, whole tensors as they are given to them."""
    cases = [
        [DIT, 'training.parallel="ddp"'],
        [DIT, 'training.parallel="fsdp"'],
        ['training.parallel="fsdp"', "training.accumulate=2"],
        ['training.parallel="ddp"', "training.accumulate=2"],
    ]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
         json.dumps(cases), str(tmp_path)],
        capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("found ")]
    assert len(found) == len(cases)
    for overrides, real in zip(cases, found, strict=True):
        experiment = toy(*overrides)
        row = rows_of(experiment, [2])[f"2 {experiment.training.parallel}"]
        planned = {name: getattr(row.memory, name) for name in real["held"]}
        assert planned == real["held"], overrides
        assert row.collectives == real["collectives"], overrides
    assert found[1]["held"]["moments"] < 0.6 * found[0]["held"]["moments"]


@pytest.mark.parametrize(
    ("overrides", "least"), [((), 0.9), ((DIT,), 0.9), ((DIT, "training.checkpoint_activations=true"), 0.7)]
)
def test_memory_of_a_step_is_what_is_planned(overrides: tuple[str, ...], least: float, tmp_path: Path) -> None:
    """The most that a step allocates, from a tenth below to a quarter above: beside what is kept there is what is being
    worked on. Where blocks are computed again it may be three tenths less: what comes behind them is free by then."""
    experiment = wide(*overrides)
    trainer = Trainer(experiment, tmp_path / "run", REGISTRY, device="cpu", evaluated=False)
    trainer.model.train()
    step(trainer)
    for weight in trainer.model.parameters():
        weight.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measuring:
        step(trainer)
    total = peak = 0
    for event in sorted(measuring.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    memory = rows_of(experiment, [1])["1 ddp"].memory
    assert memory.activations > 5 * memory.gradients
    assert least < peak / (memory.activations + memory.gradients) < 1.25


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shapes_alone_keep_what_values_keep(precision: str) -> None:
    """The backbone's part, counted without weights and counted in a forward pass with them."""
    experiment = wide(DIT, f"training.precision={precision}")
    real = build_model(experiment)
    halved = precision == "bfloat16"
    with_values = plan_module._kept_by_backbone(real, real.backbone, 8, halved).bytes()
    kept = count_activations(experiment, build_model(experiment, weightless=True))
    around = build_model(wide(DIT, f"training.precision={precision}", "backbone.depth=1"))
    assert kept.of(8, False) > with_values[0] > 0
    # Of one block more, and nothing else: the rest is the same.
    less = plan_module._kept_by_backbone(around, around.backbone, 8, halved).bytes()
    fewer = count_activations(wide(DIT, f"training.precision={precision}", "backbone.depth=1"), around)
    assert kept.of(8, False) - fewer.of(8, False) == with_values[0] - less[0]


def test_operations_are_those_of_a_step(tmp_path: Path) -> None:
    experiment = wide(DIT)
    trainer = Trainer(experiment, tmp_path / "run", REGISTRY, device="cpu", evaluated=False)
    trainer.model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(trainer)
    rows = rows_of(experiment, [1, 4])
    assert counter.get_total_flops() == rows["1 ddp"].flops == 4 * rows["4 fsdp"].flops


def test_a_checkpoint_has_the_bytes_that_are_planned(tmp_path: Path) -> None:
    experiment = toy(DIT, "training.steps=1")
    trainer = Trainer(experiment, tmp_path / "run", REGISTRY, device="cpu", evaluated=False)
    trainer.train()
    (folder,) = ckpt.list_checkpoints(tmp_path / "run")
    files = sorted(folder.glob("*.safetensors"))
    assert [path.stem for path in files] == ["ema", "model", "optimizer"]
    made = plan_training(experiment, [1], H100, Assumptions(disk=1e3))
    assert made.checkpoint == sum(held(load_file(path).values()) for path in files)
    assert made.checkpoint_seconds == made.checkpoint / 1e3
    assert 0 < sum(path.stat().st_size for path in files) - made.checkpoint < 32_000  # their heads


def test_time_follows_from_the_device_and_what_is_assumed() -> None:
    experiment = wide(DIT, "training.steps=3600", "training.checkpoint_every=0")
    device = Device("mine", flops=4e9, float32=1e9, memory=1e9, bandwidth=1e9, link=1e6, network=1e5)
    free = {"attained": 0.5, "link_attained": 0.5, "overlap": 0.0, "disk": 1e15}
    rows = rows_of(experiment, [1, 4, 16], device, **free)
    one, four, many = rows["1 ddp"], rows["4 ddp"], rows["16 ddp"]
    assert one.seconds["compute"] == pytest.approx(one.flops / 0.5e9)
    assert one.seconds["communication"] == 0 and one.limit == "compute" and one.hours == pytest.approx(one.step)
    gradients = four.memory.gradients
    sent = 2 * gradients * 3 / 4 + four.collectives["broadcast"] * 3 / 4
    assert four.traffic == pytest.approx(sent)
    assert four.seconds["communication"] == pytest.approx(sent / 0.5e6)
    # To other machines eight GPUs have eight times 1e5 together, less than the link.
    assert many.seconds["communication"] == pytest.approx(many.traffic / 0.4e6)
    hidden = rows_of(experiment, [4], device, **(free | {"overlap": 1.0}))["4 ddp"]
    assert hidden.seconds["communication"] == pytest.approx(max(0.0, sent / 0.5e6 - four.seconds["compute"]))
    fast = rows_of(wide(DIT, "training.precision=bfloat16"), [1], device, **free)["1 ddp"]
    assert fast.seconds["compute"] == pytest.approx(fast.flops / 2e9)
    native = rows_of(wide(DIT, "training.precision=auto"), [1], device, **free)["1 ddp"]
    assert native.seconds["compute"] == fast.seconds["compute"]  # as the device is faster so
    slow = rows_of(experiment, [1], device, **(free | {"disk": 1e3}))["1 ddp"]
    assert slow.hours > one.hours  # a checkpoint at the end is waited for


def test_what_fits_follows_from_the_memory() -> None:
    experiment = wide(DIT, "backbone.width=64", "training.batch_size=4")
    ddp, fsdp = (rows_of(experiment, [4])[f"4 {name}"] for name in ("ddp", "fsdp"))
    assert fsdp.memory.total < ddp.memory.total
    between = evolve(H100, memory=(ddp.memory.total + fsdp.memory.total) / 2)
    rows = rows_of(experiment, [4, 8], between, reserve=0.0)
    assert [rows[f"4 {name}"].fits for name in ("ddp", "fsdp")] == [False, True]
    assert rows["4 ddp"].limit == "memory" and rows["8 fsdp"].limit == "batch" and not rows["8 fsdp"].fits
    told = "\n".join(describe_plan(plan_training(experiment, [4, 8], between, Assumptions(reserve=0.0))))
    assert '4 GPUs: training.parallel = "fsdp"' in told
    assert "4 GPUs, ddp: does not fit: weights" in told
    assert "8 GPUs: training.batch_size = 4 cannot be shared out; give a multiple of 8" in told
    small = evolve(H100, memory=1e3)
    told = "\n".join(describe_plan(plan_training(experiment, [1], small)))
    assert "1 GPU: none fits; less memory: training.checkpoint_activations = true" in told


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    start = ["plan", str(path), "--gpus", "1,8"]
    assert main([*start, "--device", "a100", "--set", "training.batch_size=16"]) == 0
    told = capsys.readouterr().out
    assert "on a100 of 80 GB" in told and "assumed: 35% of 312 TFLOP/s (bfloat16)" in told
    assert 'training.parallel = "ddp"' in told and "device: NVIDIA A100 data sheet" in told
    by_hand = [
        "--flops",
        "1e15",
        "--memory",
        "1e11",
        "--bandwidth",
        "1e12",
        "--attained",
        "0.5",
        "--link-attained",
        "1",
    ]
    assert main([*start, *by_hand, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["gpus"], row["parallel"]) for row in found["rows"]] == [(1, "ddp"), (8, "ddp"), (8, "fsdp")]
    assert found["device"]["memory"] == 1e11 and found["device"]["float32"] == 1e15
    assert found["device"]["source"] == "given by hand, but link and network of the h100"
    assert found["assumptions"]["attained"] == 0.5 and found["assumptions"]["link_attained"] == 1
    row = found["rows"][0]
    assert row["memory"]["total"] == sum(size for name, size in row["memory"].items() if name != "total")
    for arguments, said in [
        ([], "--flops is missing; without --device give --flops, --memory and --bandwidth"),
        (["--flops", "1e15", "--memory", "1e11"], "--bandwidth is missing"),
        (["--device", "h100", "--memory", "-1"], "--memory -1: expected a number above 0"),
        (["--device", "h100", "--attained", "1.5"], "--attained 1.5: expected"),
    ]:
        assert main([*start, *arguments]) == 2
        assert said in capsys.readouterr().err
    for arguments, said in [
        (["--gpus", "1,0"], "argument --gpus: expected a whole number, 1 or more, found '0'"),
        (["--gpus", "4", "--overlap", "nan"], "argument --overlap: expected a finite number, found 'nan'"),
    ]:
        with pytest.raises(SystemExit):
            main(["plan", str(path), "--device", "h100", *arguments])
        assert said in capsys.readouterr().err


def test_the_command_knows_the_same_names() -> None:
    assert list(DEVICES) == list(GPUS)
    assert {*FIGURES, "name", "source"} == asdict(H100).keys()
    assert {name.replace("-", "_") for name in ASSUMED} == asdict(Assumptions()).keys()
    for name, value in asdict(Assumptions()).items():
        assert f"(default: {value:g})".replace("e+0", "e") in ASSUMED[name.replace("_", "-")]
    with pytest.raises(UserError, match="--device b7: expected one of h100, h200, a100"):
        device_of("b7", {})
