"""Sampling on a device, with the network compiled, and its kernels played back as a whole, or not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from mtdiffusion import SamplerSettings, sample
from mtdiffusion_benchmarks.gpu.measuring import Part, Setting, experiment_of, timed, trainer_of
from mtdiffusion_benchmarks.gpu.step import TINY_BACKEND, toy

BATCHES = (1, 16, 256)
"""Samples at a time: few of them leave a GPU waiting for its kernels to be launched."""
STEPS = 10


def parts(setting: Setting) -> dict[str, Part]:
    """By how many samples at a time, first without a compiler."""
    return {
        f"{batch} at a time{', compiled' if compiled else ''}": partial(_sample, setting, batch, compiled)
        for compiled in (False, True)
        for batch in (BATCHES[:2] if setting.tiny else BATCHES)
    }


def _sample(setting: Setting, batch: int, compiled: bool) -> dict[str, Any]:
    """How fast joint samples come, how many graphs the compiler made, and how far samples are from those without."""
    torch._dynamo.reset()
    counters.clear()
    model = trainer_of(experiment_of(toy(setting), setting), setting).model.eval()
    if compiled and setting.tiny:
        model.compiled(backend=TINY_BACKEND)
    settings = SamplerSettings(STEPS, compile=compiled)
    found: dict[str, Any] = timed(partial(sample, model, batch, settings=settings), batch, setting)
    if compiled:
        drawn = [
            sample(model, batch, settings=each, generator=torch.Generator().manual_seed(0))["image"]
            for each in (settings, SamplerSettings(STEPS))
        ]
        found |= {
            "graphs": counters["stats"]["unique_graphs"],
            "difference": float((drawn[0] - drawn[1]).abs().max()),
        }
    return found
