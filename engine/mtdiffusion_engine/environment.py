"""What a launcher's environment may not decide: how a run is trained is its configuration's alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mtdiffusion_engine.experiment import TrainingConfig

_DECIDES = (
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DOWNCAST_BF16",
    "ACCELERATE_FP8_",
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
"""Beginnings of the names of variables that tell Accelerate how to train. Those that tell it where to run stay."""
_YES = ("1", "true", "yes", "on")


@contextmanager
def without_training_variables() -> Iterator[None]:
    """The process's environment without the variables that decide how to train; afterwards it is as it was."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(_DECIDES)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def ignored_variables(config: TrainingConfig, environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that asks for another training than the configuration, and is not followed.

    What a launcher sets without being asked is not mentioned.
    """
    said = []
    for name, value in sorted(environment.items()):
        asked = value.strip().lower()
        if name == "ACCELERATE_MIXED_PRECISION" and asked != "no" and (asked, config.precision) != ("bf16", "bfloat16"):
            remedy = f'; set training.precision = "bfloat16" instead (it is "{config.precision}")'
        elif name == "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" and asked not in ("1", str(config.accumulate)):
            remedy = f"; set training.accumulate = {value} instead (it is {config.accumulate})"
        elif name == "ACCELERATE_GRADIENT_CLIPPING" and asked != "none":
            remedy = f"; set training.clip = {value} instead (it is {config.clip})"
        elif name == "ACCELERATE_DYNAMO_BACKEND" and asked != "no":
            if config.compile:
                continue
            remedy = "; set training.compile = true instead (it is false)"
        elif name == "ACCELERATE_USE_FSDP" and asked in _YES:
            if config.parallel == "fsdp":
                continue
            remedy = '; set training.parallel = "fsdp" instead (it is "ddp")'
        elif name.startswith("ACCELERATE_USE_") and name.startswith(_DECIDES) and asked in _YES:
            remedy = ": several processes train in data parallel, as training.parallel says"
        else:
            continue
        said.append(f"the environment's {name}={value} is ignored{remedy}")
    return said
