"""DiT-B/2 and DiT-L/2 on latents of 32 × 32 × 4, in bfloat16 and compiled, beside a plain loop of the same size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mtdiffusion_benchmarks.gpu.measuring import (
    Part,
    Setting,
    SyntheticConfig,
    experiment_of,
    operations,
    timed,
    trainer_of,
    turn_of,
    utilisation,
)
from mtdiffusion_benchmarks.gpu.plain_dit import PlainDiT, step_of
from mtdiffusion_engine.cost import count_cost
from mtdiffusion_engine.experiment import build_model

SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16)}
"""Width, depth and heads (Peebles & Xie 2023, table 1)."""
TINY = (32, 2, 2)
BATCH = {"B": 256, "L": 128}
CLASSES = 1000


def parts(setting: Setting) -> dict[str, Part]:
    """Ours and the plain one, size by size."""
    found: dict[str, Part] = {}
    for size in SIZES:
        for compiled in (False,) if setting.tiny else (True, False):
            name = f"{size}/2{', compiled' if compiled else ''}"
            found[f"plain DiT-{name}"] = partial(_plain, setting, size, compiled)
            found[f"DiT-{name}"] = partial(_ours, setting, size, compiled)
    return found


def _shape(setting: Setting, size: str) -> tuple[int, int, int]:
    return TINY if setting.tiny else SIZES[size]


def _batch(setting: Setting, size: str) -> int:
    return 2 if setting.tiny else BATCH[size]


def _ours(setting: Setting, size: str, compiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    width, depth, heads = _shape(setting, size)
    tables = {
        "data": {
            "kind": "synthetic",
            "size": 64,
            "channels": 1,
            "classes": CLASSES,
            "count": 64 if setting.tiny else 2048,
        },
        "latent": {"height": 32, "width": 32},
        "modalities": {
            # Patches of 2 × 2 of one channel: four channels at 32 × 32, at the price of a reshape.
            "image": {"kind": "image", "size": 64, "channels": 1},
            "label": {"kind": "label", "classes": CLASSES},
        },
        "backbone": {"kind": "dit", "width": width, "depth": depth, "heads": heads, "patch": 2},
    }
    batch = _batch(setting, size)
    experiment = experiment_of(tables, setting, precision="bfloat16", compile=compiled, batch_size=batch)
    cost = count_cost(experiment, build_model(experiment, weightless=True))
    measured = timed(turn_of(trainer_of(experiment, setting)), batch, setting)
    return {
        "batch": batch,
        "parameters": cost.parameters,
        **measured,
        **utilisation(cost.training, measured, setting),
    }


def _plain(setting: Setting, size: str, compiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    width, depth, heads = _shape(setting, size)
    batch = _batch(setting, size)
    with torch.device("meta"):
        shape = PlainDiT(width, depth, heads, classes=CLASSES)
        given = torch.zeros(1, 4, 32, 32), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        work = operations(lambda: torch.autograd.backward(shape(*given).sum()))
    model = PlainDiT(width, depth, heads, classes=CLASSES).to(setting.device)
    data = SyntheticConfig(64, 1, CLASSES, batch).build("train")
    images = torch.stack([torch.as_tensor(data[i]["image"]) for i in range(batch)])
    labels = torch.tensor([int(data[i]["label"]) for i in range(batch)], device=setting.device)
    z = torch.nn.functional.pixel_unshuffle(images, 2).to(setting.device)
    measured = timed(step_of(model, z, labels, batch=batch, compiled=compiled), batch, setting)
    return {
        "batch": batch,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        **measured,
        **utilisation(work, measured, setting),
    }
