"""In which floating point what is computed: float64 where a device has it, which Apple's GPUs ("mps") have not, and at
least float32 where 16 bits are too few."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

COMPUTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that a model, and what goes through a process, may have."""


def widest(device: torch.device) -> torch.dtype:
    """The widest floating point that a device computes with."""
    return torch.float32 if device.type == "mps" else torch.float64


def widened(x: Tensor) -> Tensor:
    """x in the widest floating point of its device."""
    return x.to(widest(x.device))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, made narrower first where the device has no float64."""
    return (x.to(widest(device)) if x.dtype == torch.float64 else x).to(device)


def single_or_wider(dtype: torch.dtype) -> torch.dtype:
    """A floating point, or float32 in place of one of 16 bits."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def at_least_single(x: Tensor) -> Tensor:
    """x, in float32 if it is narrower: 16 bits hold neither a sum of many squares nor an angle of many turns."""
    return x.to(single_or_wider(x.dtype)) if x.is_floating_point() else x


def require_computable(what: str, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` unless a dtype is one of :data:`COMPUTABLE`: in an integer, coefficients would be 0."""
    if dtype not in COMPUTABLE:
        raise ValueError(f"{what}: expected float16, bfloat16, float32 or float64, found {dtype}")


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """While this lasts, a device computes in the precision of what it is given."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
