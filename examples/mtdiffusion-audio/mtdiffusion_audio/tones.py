"""Two tones a digit, and the matched filters that read them. No plugin: what data set and evaluator share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of a telephone's keypad (ITU-T Q.23), in hertz: the row and the column of each key, 0 to 9.
LOW = (697.0, 770.0, 852.0, 941.0)
HIGH = (1209.0, 1336.0, 1477.0)
PAIRS = ((3, 1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2))
FRAME = 256  # samples; at 8 kHz its Hann window tells tones 70 Hz apart


def synthesise(label: Tensor, samples: int, rate: int, generator: torch.Generator) -> Tensor:
    """The two tones of each digit ``[B]``, as waveforms float32 ``[B, samples]`` in [-1, 1].

    Of each, at random: the phases, the amplitudes (0.2 to 0.4), the onset (in the first quarter), with an attack of
    4 ms, and a little white noise (0.01).
    """
    pairs = torch.tensor(PAIRS)[label]
    frequency = torch.stack([torch.tensor(LOW)[pairs[:, 0]], torch.tensor(HIGH)[pairs[:, 1]]], 1).double()
    phase = 2 * math.pi * torch.rand(len(label), 2, generator=generator, dtype=torch.float64)
    amplitude = 0.2 + 0.2 * torch.rand(len(label), 2, generator=generator, dtype=torch.float64)
    onset = samples / 4 * torch.rand(len(label), 1, generator=generator, dtype=torch.float64)
    time = torch.arange(samples, dtype=torch.float64)
    tones = amplitude[..., None] * torch.sin(2 * math.pi * frequency[..., None] * time / rate + phase[..., None])
    attack = ((time - onset) / (0.004 * rate)).clamp(0, 1)
    noise = 0.01 * torch.randn(len(label), samples, generator=generator, dtype=torch.float64)
    return (tones.sum(1) * attack + noise).clamp(-1, 1).float()


def read(x: Tensor, rate: int) -> Tensor:
    """The digit that each waveform ``[B, samples]`` sounds like, int64 ``[B]``.

    The energy of overlapping Hann frames at each of the seven frequencies, added up over frames without regard to phase
    (so that a tone need not be coherent from frame to frame), and the pair with the largest product.
    """
    time = torch.arange(FRAME, dtype=torch.float64)
    angle = 2 * math.pi * torch.tensor(LOW + HIGH).double()[:, None] * time / rate
    filters = torch.polar(torch.hann_window(FRAME, dtype=torch.float64).expand_as(angle).contiguous(), -angle)
    frames = x.cpu().double().unfold(1, FRAME, FRAME // 2).to(filters.dtype)
    energy = (frames @ filters.T).abs().square().sum(1).clamp(min=1e-12).log()
    pairs = torch.tensor(PAIRS)
    return (energy[:, pairs[:, 0]] + energy[:, len(LOW) + pairs[:, 1]]).argmax(1)
