"""The training step on a device: that it never waits for it, that compiled it computes the same, and how exactly."""

from __future__ import annotations

import copy
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mtdiffusion import Draws
from mtdiffusion_benchmarks.gpu.measuring import (
    Part,
    Setting,
    experiment_of,
    peak_rate,
    product_rate,
    timed,
    trainer_of,
    turn_of,
    wait,
)
from mtdiffusion_engine.data import Batch
from mtdiffusion_engine.tally import Tally
from mtdiffusion_engine.trainer import Objective, Trainer

STEPS = 10
"""Between two lines of a log, here."""
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 1e-1)}
"""By precision: how far the loss and the gradient may be from those in float64, relative to their size (of the
gradient, the norm). bfloat16 keeps 8 bits, 4e-3, of each number."""


TINY_BACKEND = "aot_eager"
"""Of a compiler that finds the graphs and leaves them as they are: generating code takes a CPU minutes."""


def toy(setting: Setting) -> dict[str, Any]:
    """An image, a mask and a label of scenes."""
    size = 16 if setting.tiny else 32
    side = size // 2
    return {
        "data": {"kind": "shapes", "size": size, "count": 32 if setting.tiny else 1024, "test_count": 8},
        "latent": {"height": side, "width": side},
        "modalities": {
            "image": {"kind": "image", "size": size},
            "mask": {"kind": "mask", "size": size, "classes": 6},
            "label": {"kind": "label", "classes": 5},
        },
        "backbone": {
            "kind": "unet",
            "channels": 8 if setting.tiny else 64,
            "multipliers": [1] if setting.tiny else [1, 2, 4],
            "heads": 1 if setting.tiny else 4,
            "vector": 16 if setting.tiny else 256,
        },
        "conditioning": {"observed": 0.7, "partial": 0.3},
        "training": {"log_every": STEPS},
    }


def parts(setting: Setting) -> dict[str, Part]:
    """By name, those that a compiler delays last."""
    found: dict[str, Part] = {"device": partial(_device, setting)}
    for compiled in (False, True):
        for precision in TOLERANCE:
            name = f"{precision}{', compiled' if compiled else ''}"
            found[f"steps: {name}"] = partial(_steps, setting, precision, compiled)
            found[f"exactness: {name}"] = partial(_exactness, setting, precision, compiled)
    return found


def _device(setting: Setting) -> dict[str, Any]:
    peak, source = peak_rate(setting)
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bf16_matmul_flops": product_rate(setting),
        "peak_flops": peak,
        "peak_from": source,
    }
    if setting.cuda:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    return facts


@contextmanager
def _no_waiting(setting: Setting) -> Iterator[None]:
    """An operation that makes the process wait for the GPU raises RuntimeError here."""
    if setting.cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if setting.cuda:
            torch.cuda.set_sync_debug_mode("default")


def _steps(setting: Setting, precision: str, compiled: bool) -> dict[str, Any]:
    """Steps between two lines of a log, of which none may wait; then how fast they are."""
    torch._dynamo.reset()
    counters.clear()
    experiment = experiment_of(toy(setting), setting, precision=precision, compile=compiled and not setting.tiny)
    trainer = trainer_of(experiment, setting)
    if compiled and setting.tiny:
        trainer.objective.compile(backend=TINY_BACKEND, dynamic=False)
    batches, tally = trainer.batches(10**7), Tally(trainer.accelerator)
    trainer.model.train()
    for _ in range(3):
        trainer.advance(batches, tally)
    wait(setting.device)
    graphs = counters["stats"]["unique_graphs"]
    with _no_waiting(setting):
        for _ in range(STEPS):
            trainer.advance(batches, tally)
    means, (left_out, _) = tally.take(), tally.skipped()
    compiled_again = counters["stats"]["unique_graphs"] - graphs
    breaks = sum(counters["graph_break"].values())
    if left_out or compiled_again or breaks:
        raise RuntimeError(
            f"of {STEPS + 3} steps {left_out} were left out; {compiled_again} graphs were compiled after the third "
            f"step, and {breaks} breaks are in {graphs}; expected none of each"
        )
    return {
        "steps_without_a_wait": STEPS if setting.cuda else None,
        "graphs": graphs,
        "compiled_again": compiled_again,
        "graph_breaks": breaks,
        "loss": means["loss"],
        **timed(turn_of(trainer), experiment.training.batch_size, setting),
    }


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Convolutions of float32 keep its 24 bits: by default they may be computed with 11 (TensorFloat-32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _exactness(setting: Setting, precision: str, compiled: bool) -> dict[str, Any]:
    """The loss and gradient of one batch beside those in float64, not compiled, of the same weights and draws, without
    TensorFloat-32."""
    torch._dynamo.reset()
    trainer = trainer_of(experiment_of(toy(setting), setting), setting)
    turn = turn_of(trainer)
    for _ in range(2 if setting.tiny else 20):  # a fresh network's last layers are zeros
        turn()
    device = trainer.accelerator.device
    batch = next(trainer.batches(10**7))
    visible, draws = trainer.chance.draw(trainer.step, 0, batch.presence)
    batch = trainer.data.values(batch.to(device))
    visible, draws = visible.to(device), Draws(*(each.to(device) for each in draws))
    objective = Objective(trainer.model.eval(), trainer.experiment.loss)  # dropout is off
    exact = copy.deepcopy(objective).double()
    if compiled:
        objective.compile(backend=TINY_BACKEND if setting.tiny else "inductor", dynamic=False)
    with _no_tf32(), torch.autocast(setting.device, torch.bfloat16, enabled=precision == "bfloat16"):
        loss, gradient = _gradient(objective, trainer, batch, visible, draws)
    wide = Batch({name: _wide(x) for name, x in batch.x.items()}, batch.presence.double())
    wanted, direction = _gradient(exact, trainer, wide, visible.double(), Draws(*(each.double() for each in draws)))
    of_loss = abs(loss - wanted) / abs(wanted)
    of_gradient = float((gradient - direction).norm() / direction.norm())
    most = TOLERANCE[precision]
    if not (of_loss <= most[0] and of_gradient <= most[1]):
        raise RuntimeError(
            f"beside float64 the loss is off by {of_loss:.1e} and the gradient by {of_gradient:.1e}; expected at most "
            f"{most[0]:g} and {most[1]:g}"
        )
    return {"loss": of_loss, "gradient": of_gradient, "loss_at_most": most[0], "gradient_at_most": most[1]}


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _gradient(
    objective: Objective, trainer: Trainer, batch: Batch, visible: Tensor, draws: Draws
) -> tuple[float, Tensor]:
    """The loss and its gradient, all of it in a row, float64."""
    objective.zero_grad(set_to_none=True)
    loss, _ = objective(batch.x, batch.presence, visible, draws)
    torch.autograd.backward(loss)
    found = [weight.grad for weight in objective.parameters() if weight.grad is not None]
    return loss.item(), torch.cat([each.flatten().double() for each in found])
