"""What a further modality costs on a device: an image with none to seven masks, or labels, beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mtdiffusion_benchmarks.gpu.measuring import Part, Setting, experiment_of, timed, trainer_of, turn_of
from mtdiffusion_benchmarks.perf import of_modalities

FURTHER = (1, 3, 7)
"""Modalities beside the image."""


def parts(setting: Setting) -> dict[str, Part]:
    """By how many of which kind, first without a compiler."""
    found: dict[str, Part] = {}
    for compiled in (False,) if setting.tiny else (False, True):
        found[f"image alone{', compiled' if compiled else ''}"] = partial(_train, setting, "mask", 0, compiled)
        for kind in ("mask", "label"):
            for further in FURTHER:
                name = f"image + {further} {kind}{'' if further == 1 else 's'}{', compiled' if compiled else ''}"
                found[name] = partial(_train, setting, kind, further, compiled)
    return found


def _train(setting: Setting, kind: str, further: int, compiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    tables = of_modalities(kind, further)
    tables["backbone"] = tables["backbone"] | {"channels": 8 if setting.tiny else 128}
    tables["data"] = tables["data"] | {"count": 32 if setting.tiny else 1024, "test_count": 8}
    experiment = experiment_of(tables | {"training": {}}, setting, precision="bfloat16", compile=compiled)
    trainer = trainer_of(experiment, setting)
    images = experiment.training.batch_size
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    return {
        "modalities": further + 1,
        "batch": images,
        "parameters": parameters,
        **timed(turn_of(trainer), images, setting),
    }
