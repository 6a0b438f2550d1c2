"""Sampling on a device in float32 and in bfloat16, with the network compiled, and its kernels played back as a whole,
or not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch._dynamo.utils import counters

from mtdiffusion import SamplerSettings, sample
from mtdiffusion_benchmarks.gpu.measuring import Part, Setting, experiment_of, timed, trainer_of
from mtdiffusion_benchmarks.gpu.step import TINY_BACKEND, toy

Precision = Literal["float32", "bfloat16"]
PRECISIONS: Mapping[Precision, str] = {"float32": "", "bfloat16": ", bfloat16"}
"""How they are told."""
BATCHES = (1, 16, 256)
"""Samples at a time: few of them leave a GPU waiting for its kernels to be launched."""
STEPS = 10


def parts(setting: Setting) -> dict[str, Part]:
    """By how many samples at a time and in which precision, first without a compiler."""
    return {
        f"{batch} at a time{told}{', compiled' if compiled else ''}": partial(_sample, setting, batch, how, compiled)
        for compiled in (False, True)
        for how, told in PRECISIONS.items()
        for batch in (BATCHES[:2] if setting.tiny else BATCHES)
    }


def _sample(setting: Setting, batch: int, precision: Precision, compiled: bool) -> dict[str, Any]:
    """How fast joint samples come, how many graphs the compiler made, and how far samples are from those in float32
    without it."""
    torch._dynamo.reset()
    counters.clear()
    model = trainer_of(experiment_of(toy(setting), setting), setting).model.eval()
    if compiled and setting.tiny:
        model.compiled(backend=TINY_BACKEND)
    settings = SamplerSettings(STEPS, compile=compiled, precision=precision)
    found: dict[str, Any] = timed(partial(sample, model, batch, settings=settings), batch, setting)
    if settings != SamplerSettings(STEPS):
        drawn = [
            sample(model, batch, settings=each, generator=torch.Generator().manual_seed(0))["image"]
            for each in (settings, SamplerSettings(STEPS))
        ]
        found["difference"] = float((drawn[0] - drawn[1]).abs().max())
    if compiled:
        found["graphs"] = counters["stats"]["unique_graphs"]
    return found
