"""A diffusion transformer with a training loop as one writes them for class-conditional latents (Peebles & Xie 2023):
one modality, one clock, an ε loss. It is what the framework's DiT of the same size stands beside."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion_engine.optimisation import Average

STEPS = 1000


class Block(nn.Module):
    """adaLN-zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        for weight in self.modulation[1].parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, 2)
        b, n, d = x.shape
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """ε of latents ``[B, channels, side, side]`` at steps ``[B]`` of a class ``[B]``; class ``classes`` is none."""

    def __init__(
        self, width: int, depth: int, heads: int, *, side: int = 32, channels: int = 4, patch: int = 2, classes: int
    ) -> None:
        super().__init__()
        self.grid, self.classes = side // patch, classes
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid**2, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.leave = nn.Linear(width, channels * patch**2)
        self.shuffle = nn.PixelShuffle(patch)
        for weight in (*self.modulation[1].parameters(), *self.leave.parameters()):
            nn.init.zeros_(weight)
        self.register_buffer("rates", torch.exp(-math.log(10000) * torch.arange(128) / 128))
        self.rates: Tensor

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angles = t[:, None] * self.rates
        condition = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)
        x = self.patches(z).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, 2)
        x = self.leave(self.norm(x) * (1 + scale) + shift)
        return self.shuffle(x.transpose(1, 2).reshape(len(z), -1, self.grid, self.grid))


def step_of(model: PlainDiT, z: Tensor, label: Tensor, *, batch: int, compiled: bool) -> Callable[[], object]:
    """A training step on latents ``[n, ...]`` that are on the device: linear β (Ho et al. 2020), a class dropped one
    time in ten, AdamW, an average of the weights, bfloat16 autocast."""
    device = z.device
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, device=device), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    average = Average(model, 0.9999)
    run: Callable[..., Tensor] = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        rows = torch.randint(len(z), (batch,), device=device)
        t = torch.randint(STEPS, (batch,), device=device)
        noise = torch.randn(batch, *z.shape[1:], device=device)
        a = alpha_bar[t][:, None, None, None]
        seen = torch.where(torch.rand(batch, device=device) < 0.1, model.classes, label[rows])
        with torch.autocast(device.type, torch.bfloat16):
            predicted = run(a.sqrt() * z[rows] + (1 - a).sqrt() * noise, t, seen)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(F.mse_loss(predicted.float(), noise))
        optimizer.step()
        average.update(model)

    return step
