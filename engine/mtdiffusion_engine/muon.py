"""Muon: steps of which every direction is as long as every other, for the matrices inside of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtdiffusion import Decoder, Encoder
from mtdiffusion_engine.adamw import AdamW
from mtdiffusion_engine.checkpoint import as_it_lies

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose repetition takes singular values from 1e-3 to 1 into about 0.7 to 1.2 (Jordan et al. 2024)."""
REPETITIONS = 5


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trained weights of linear layers and convolutions of a module, but for those in encoders and decoders.

    What is read in and read out, biases, norms, embeddings and convolutions of groups are no matrices from features to
    features.
    """
    if isinstance(module, Encoder | Decoder):
        return []
    plain = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and getattr(module, "groups", 1) == 1
    below = [weight for child in module.children() for weight in hidden_matrices(child)]
    return [module.get_parameter("weight"), *below] if plain and module.get_parameter("weight").requires_grad else below


def orthogonalised(x: Tensor) -> Tensor:
    """U Vᵀ of a matrix x = U S Vᵀ, about: its singular values become 0.7 to 1.2 (but for very small ones): ``[m, n]``.

    By Newton and Schulz's iteration (Jordan et al. 2024). It runs on the smaller of x xᵀ and xᵀ x alone, and x is
    multiplied once, at the end; that needs float32.
    """
    tall = x.shape[0] > x.shape[1]
    wide = x.T if tall else x
    wide = wide / wide.norm().clamp(min=torch.finfo(x.dtype).tiny)
    gram = wide @ wide.T
    product = factor = _factor(gram)
    for _ in range(REPETITIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    wide = product @ wide
    return wide.T if tall else wide


def _factor(gram: Tensor) -> Tensor:
    """What one repetition multiplies with, a + b x xᵀ + c (x xᵀ)²; it exchanges with x xᵀ."""
    a, b, c = COEFFICIENTS
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for some matrices, AdamW for all other parameters, at one learning rate.

    A kernel ``[out, in, ...]`` is taken as a matrix ``[out, in · ...]``. A step has the root mean square that AdamW's
    typically has, 0.2 (Liu et al. 2025, *Muon is Scalable for LLM Training*). Of a matrix that is split over processes,
    each computes the whole step and takes its part of it.

    Attributes:
        found_inf: may be set before a step, as of a fused optimizer: 1 if it is to be left out, else 0, on the device.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, weight_decay: float, beta2: float
    ) -> None:
        groups: list[dict[str, Any]] = [{"params": others}, {"params": matrices}]
        super().__init__(groups, lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each."""
        matrices = self.param_groups.pop()  # which AdamW leaves alone
        try:
            super().step()
        finally:
            self.param_groups.append(matrices)
        weights = [weight for weight in matrices["params"] if weight.grad is not None]
        if not weights:
            return
        never = torch.zeros((), dtype=torch.bool, device=weights[0].device)
        skipped = never if self.found_inf is None else self.found_inf.bool()
        rate = matrices["lr"] * ~skipped
        kept = 1 - rate * matrices["weight_decay"]
        for weight in weights:
            weight.mul_(kept).sub_(self._direction(weight, weight.grad, skipped) * rate)

    def _direction(self, weight: nn.Parameter, gradient: Tensor, skipped: Tensor) -> Tensor:
        """Where a weight goes, of its own shape; its momentum is brought up to date, unless the step is left out."""
        state = self.state[weight]
        if not state:
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
        state["step"] += 1  # without which AdamW does not load a state
        momentum = state["momentum"]
        # Where the step is left out, the gradient may be anything; in its place the momentum leaves itself as it is.
        gradient = torch.where(skipped, momentum, gradient)
        momentum.lerp_(gradient, 1 - MOMENTUM)
        towards = gradient.lerp(momentum, MOMENTUM)
        whole: Tensor = getattr(towards, "full_tensor", lambda: towards)()  # of a DTensor, whose import takes a second
        matrix = whole.flatten(1)
        direction = (orthogonalised(matrix) * (0.2 * max(matrix.shape) ** 0.5)).view_as(whole)
        return as_it_lies(direction, towards)
