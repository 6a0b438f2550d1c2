"""What an optimizer step takes besides the gradient: the learning rate, the average of the weights, and what is done
where the gradient is not finite. None of it waits for the device."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from mtdiffusion_engine.adamw import AdamW
from mtdiffusion_engine.experiment import TrainingConfig
from mtdiffusion_engine.muon import Muon, hidden_matrices

M = TypeVar("M", bound=nn.Module)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of step 0, 1, ...: a linear warm-up to the peak, then as ``config.schedule`` says."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = min((step - config.warmup) / max(config.steps - config.warmup, 1), 1.0)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "wsd":
        return config.learning_rate * min((1 - done) / config.decay, 1.0)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_of(module: nn.Module, config: TrainingConfig) -> AdamW:
    """As configured: AdamW, or Muon beside it, which :func:`step_if_finite` can skip."""
    rate, decay, beta2 = config.learning_rate, config.weight_decay, config.beta2
    if config.optimizer == "adamw":
        return AdamW(module.parameters(), lr=rate, betas=(0.9, beta2), weight_decay=decay, fused=True)
    matrices = hidden_matrices(module)
    theirs = set(map(id, matrices))
    return Muon(matrices, [each for each in module.parameters() if id(each) not in theirs], rate, decay, beta2)


def clip_gradient(module: nn.Module, largest: float) -> Tensor:
    """Scale a module's gradient down to a norm of ``largest`` at most; its norm before ``[]``.

    Of parameters that are split over processes it is the norm of the whole.
    """
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    norm = getattr(norm, "full_tensor", lambda: norm)()  # of a DTensor, whose import takes a while
    nn.utils.clip_grads_with_norm_(module.parameters(), largest, norm)
    return norm


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> Tensor:
    """One step of a fused optimizer unless its gradient's norm ``[]`` is not finite: 1 if it was skipped, else 0.

    The decision is made on the device, as a gradient scaler's is: neither weights nor moments change.
    """
    skipped = (~norm.isfinite()).float()
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    return skipped


class Average(Generic[M]):
    """An exponential moving average of a module's weights, warmed up: decay min(decay, (1 + n)/(10 + n)) at update n.

    Attributes:
        module: the average, in evaluation mode; its buffers are those of the module at the last update.
        updates: how many there were.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.updates = 0
        self._decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present weights."""
        ours, theirs = ([own_part(p) for p in each.parameters()] for each in (self.module, module))
        if self.updates == 0:
            torch._foreach_copy_(ours, theirs)
        else:
            torch._foreach_lerp_(ours, theirs, 1 - min(self._decay, (1 + self.updates) / (10 + self.updates)))
        if buffers := list(self.module.buffers()):
            torch._foreach_copy_(buffers, list(module.buffers()))
        self.updates += 1


def own_part(parameter: Tensor) -> Tensor:
    """What this process has of a parameter: all of it, unless it is split over processes."""
    local: Tensor = getattr(parameter, "to_local", lambda: parameter)()  # of a DTensor
    return local
