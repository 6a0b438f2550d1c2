"""float64 where a device has it: Apple's GPUs ("mps") have none, and do with float32."""

from __future__ import annotations

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """The widest floating point that a device computes with."""
    return torch.float32 if device.type == "mps" else torch.float64


def widened(x: Tensor) -> Tensor:
    """x in the widest floating point of its device."""
    return x.to(widest(x.device))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, made narrower first where the device has no float64."""
    return (x.to(widest(device)) if x.dtype == torch.float64 else x).to(device)
