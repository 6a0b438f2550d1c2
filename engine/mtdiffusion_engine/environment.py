"""The machine that a run is on: its devices, and what a launcher's environment may not decide, since how a run is
trained is its configuration's alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from mtdiffusion_engine.experiment import TrainingConfig
from mtdiffusion_registry import UserError

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
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers, MPI's among them, say how many processes there are."""


def choose_device(name: str | None) -> torch.device:
    """The device of a name; None: CUDA's if there is one, or else the CPU.

    Args:
        name: "cpu"; "cuda", or one of several GPUs, counted from 0: "cuda:1", which is then CUDA's current device;
            "mps", the GPU of an Apple machine.

    Raises:
        UserError: for another name, or a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise UserError(f'device: expected "cpu", "cuda", a certain GPU such as "cuda:1", or "mps", found "{name}"')
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name}: this machine has no Apple GPU that this PyTorch can use; {_there()}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name}: there is no CUDA device here that this PyTorch can use; {_there()}")
    if colon:
        if int(number) >= torch.cuda.device_count():
            raise UserError(f"device {name}: {_there()}")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"device {name}: of several processes each has a GPU of its own; say cuda")
        torch.cuda.set_device(int(number))  # what says "cuda" alone means this one
        return torch.device("cuda", int(number))
    return torch.device(kind)


_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""What oneDNN, which computes for torch on x86 processors, can be held to by its ``ONEDNN_MAX_CPU_ISA``."""


def native_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32: a GPU of NVIDIA's from compute capability 8.0 (Ampere)
    on; an x86 processor with AVX512-BF16 or AMX, unless ``ONEDNN_MAX_CPU_ISA`` keeps them from being used."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BFLOAT16:
        return False
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not before torch 2.11
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _there() -> str:
    """A sentence's end that says which devices there are."""
    found = []
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found.append("1 GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return f"this machine has {', '.join([*found, 'cpu'])}"


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


def left_alone(environment: Mapping[str, str]) -> list[str]:
    """A sentence if ``accelerate launch`` has started this process alone, though it was asked for several.

    It does so on the CPU, and wherever ``--multi_gpu`` is neither given nor follows from the GPUs that there are: it
    says where the processes are to meet, leaves it to MPI to start them, and starts one.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if not launched or any(name in environment for name in _WORLD):
        return []
    return [
        "this is one process, though the environment's MASTER_ADDR is for several: without --multi_gpu accelerate "
        "launch has started one, whatever --num_processes says. Start them by torchrun --nproc_per_node N -m "
        "mtdiffusion_engine.cli ..., on the CPU with --device cpu"
    ]
