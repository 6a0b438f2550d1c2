"""Layouts: where the codes of the modalities meet in the diffusion space, and what of it a backbone is shown.

Values by modality (clocks, coefficients, visibility) are ``[B, N, h, w]``, where h, w are 1 or the latent's own, and B
may be 1: they broadcast. A code is as large as what it holds: ``[B, c_i, H, W]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from attrs import field, frozen
from attrs.validators import ge, min_len
from torch import Tensor

from mtdiffusion.conditioning import Observation
from mtdiffusion.interfaces import LatentSpec
from mtdiffusion.precision import require_computable, single_or_wider, widened

Codes = Mapping[str, Tensor]
"""Codes by modality name, each ``[B, c_i, H, W]``."""

_FREQUENCIES = 8  # of a clock's features: periods from twice the whole range to 1/64 of it


class Standing(NamedTuple):
    """Where the clocks of the modalities stand; each ``[B, N, h, w]``.

    Attributes:
        signal: m_t, 0 for what is missing.
        variance: σ_t²; 0 where the clock is at 0.
        level: :func:`noise_level` of each modality by itself.
        hidden: whether z tells nothing there, which is then not shown: it would only have to be learned away.
    """

    signal: Tensor
    variance: Tensor
    level: Tensor
    hidden: Tensor


def noise_level(signal: Tensor, variance: Tensor) -> Tensor:
    """arctan(σ_t / |m_t|) · 2/π in [0, 1].

    What a backbone is told instead of t: it means the same for another T, curve or retention.
    """
    return torch.atan2(variance.sqrt(), signal.abs()) * (2 / math.pi)


class Shown(NamedTuple):
    """A backbone's inputs: a map ``[B, in_channels, H, W]``, a noise level ``[B]`` of at least 32 bits, a vector
    ``[B, in_vector]``."""

    map: Tensor
    noise: Tensor
    vector: Tensor


class Layout(ABC):
    """Where each modality lives in the diffusion space.

    Attributes:
        latent: the whole space.
        names: of the modalities, in order.
        shared_clock: whether all modalities must have one clock, because their codes overlap.
    """

    latent: LatentSpec
    names: tuple[str, ...]
    shared_clock: bool

    @abstractmethod
    def share(self, name: str) -> LatentSpec:
        """The share of the space that a modality's code fills."""

    @abstractmethod
    def meet(self, weights: Tensor, codes: Codes, rest: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The codes, each times its weight ``[B, N, h, w]``, in the whole space, plus the rest: ``[B, C, H, W]``.

        Args:
            rest: gains ``[B, N, h, w]`` and the z ``[B, C, H, W]`` that they scale; None: nothing is added.

        Raises:
            ValueError: if a code or z is not of 16, 32 or 64 bits of floating point.
        """

    @abstractmethod
    def scaled(self, values: Tensor, z: Tensor) -> Tensor:
        """z ``[B, C, H, W]`` times values by modality ``[B, N, h, w]``, rounded to its dtype first.

        Raises:
            ValueError: if z is not of 16, 32 or 64 bits of floating point.
        """

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """Values by modality ``[B, N, h, w]``, as they apply to z ``[B, C, H, W]``: ``[B, C or 1, h, w]`` of the same
        dtype."""

    @abstractmethod
    def take(self, name: str, z: Tensor) -> Tensor:
        """The channels ``[B, c_i, H, W]`` of z that a modality's code fills."""

    @abstractmethod
    def clocks(self, t: Tensor, seen: Tensor) -> Tensor:
        """The clocks ``[B, N, h, w]`` of what is seen in part or whole (``seen [B, N, h, w]``), t being all others'."""

    @abstractmethod
    def place(self, z: Tensor, observation: Observation, signal: Tensor, rest: Tensor | None = None) -> Tensor:
        """z ``[B, C, H, W]`` with signal ``[B, N, h, w]`` · code + rest ``[B, C, H, W]`` (None: 0) where a modality is
        seen and z shows it by itself."""

    @abstractmethod
    def inputs(self, readout: int) -> tuple[int, int]:
        """Channels of the map and width of the vector that a backbone is shown; readout: the encoders' together."""

    @abstractmethod
    def show(
        self,
        z: Tensor,
        standing: Standing,
        observation: Observation | None,
        presence: Tensor | None,
        readout: Callable[[Tensor], Tensor],
    ) -> Shown:
        """What a backbone is shown of z ``[B, C, H, W]``, scaled to unit variance for codes of unit variance.

        Args:
            observation: None: nothing is observed.
            presence: ``[B, N]``, 0 where a sample lacks a modality; None: all are there.
            readout: the encoders' read-outs ``[B, R]`` of something that lies as z does.
        """


def _weighted(weights: Tensor, codes: Codes, names: tuple[str, ...]) -> list[Tensor]:
    """The codes in order, each times its weight ``[B, N, h, w]``."""
    for name in names:
        require_computable(f"codes[{name!r}]", codes[name].dtype)
    parts = zip(torch.split(weights, 1, 1), (codes[name] for name in names), strict=True)
    return [weight.to(code.dtype) * code for weight, code in parts]


@frozen(eq=False)
class OwnLayout(Layout):
    """Side by side: each modality has channels of its own, and a clock of its own (docs/mathematics.md, section 7).

    What is observed is a modality whose clock is at 0, place by place, and what is missing one whose clock is at T; the
    backbone is told each modality's noise level and needs no more.

    Attributes:
        channels: c_i, by name.
        height, width: of the space.
        show_clean: show the code of what is at 0 a second time, in channels that are empty elsewhere.
    """

    channels: Mapping[str, int] = field(validator=min_len(1))
    height: int = field(validator=ge(1))
    width: int = field(validator=ge(1))
    show_clean: bool = True
    shared_clock = False
    names: tuple[str, ...] = field(init=False)
    latent: LatentSpec = field(init=False)

    @names.default
    def _names(self) -> tuple[str, ...]:
        return tuple(self.channels)

    @latent.default
    def _latent(self) -> LatentSpec:
        return LatentSpec(sum(self.channels.values()), self.height, self.width)

    def share(self, name: str) -> LatentSpec:
        return LatentSpec(self.channels[name], self.height, self.width)

    # Block by block: one modality's fits a processor's cache where the whole space does not.

    def meet(self, weights: Tensor, codes: Codes, rest: tuple[Tensor, Tensor] | None = None) -> Tensor:
        blocks = _weighted(weights, codes, self.names)
        if rest is not None:
            added = zip(blocks, *self._blocks(*rest), strict=True)
            blocks = [torch.addcmul(block, gain, share) for block, gain, share in added]
        return torch.cat(blocks, 1)

    def scaled(self, values: Tensor, z: Tensor) -> Tensor:
        return torch.cat([value * share for value, share in zip(*self._blocks(values, z), strict=True)], 1)

    def _blocks(self, values: Tensor, z: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Values by modality in z's dtype, and each one's share of z."""
        require_computable("what is in the diffusion space", z.dtype)
        return torch.split(values.to(z.dtype), 1, 1), torch.split(z, list(self.channels.values()), 1)

    def spread(self, values: Tensor) -> Tensor:
        shares = zip(torch.split(values, 1, 1), self.channels.values(), strict=True)
        return torch.cat([value.expand(-1, count, -1, -1) for value, count in shares], 1)

    def take(self, name: str, z: Tensor) -> Tensor:
        counts = list(self.channels.values())
        i = self.names.index(name)
        return z.narrow(1, sum(counts[:i]), counts[i])

    def clocks(self, t: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen > 0.5, 0, t)

    def place(self, z: Tensor, observation: Observation, signal: Tensor, rest: Tensor | None = None) -> Tensor:
        blocks = []
        for i, name in enumerate(self.channels):
            block = self.take(name, z)
            if name in observation.codes:
                known = signal[:, i : i + 1].to(z.dtype) * observation.codes[name]
                if rest is not None:
                    known = known + self.take(name, rest)
                block = torch.where(observation.seen[:, i : i + 1] > 0.5, known, block)
            blocks.append(block)
        return torch.cat(blocks, 1)

    def inputs(self, readout: int) -> tuple[int, int]:
        n, shown = len(self.channels), 1 + self.show_clean
        return shown * self.latent.channels + n, (2 * _FREQUENCIES + 1) * n + shown * readout

    def show(
        self,
        z: Tensor,
        standing: Standing,
        observation: Observation | None,
        presence: Tensor | None,
        readout: Callable[[Tensor], Tensor],
    ) -> Shown:
        batch, n = len(z), len(self.channels)
        scale = (standing.signal.square() + standing.variance).rsqrt() * ~standing.hidden
        level = standing.level.to(single_or_wider(z.dtype))  # of which there are up to 64 turns below
        maps = [value * share for value, share in zip(*self._blocks(scale, z), strict=True)]
        if self.show_clean:
            clean = torch.split(standing.variance == 0, 1, 1)
            maps += [torch.where(there, share, 0) for there, share in zip(clean, maps, strict=True)]
        shown = torch.cat([*maps, level.to(z.dtype).expand(batch, n, self.height, self.width)], 1)
        sources = [shown.narrow(1, k * z.shape[1], z.shape[1]) for k in range(1 + self.show_clean)]
        clock = level.amax((2, 3)).expand(batch, n)  # of what is not seen of a modality
        angles = math.pi * clock[:, :, None] * 2.0 ** torch.arange(_FREQUENCIES, device=z.device, dtype=clock.dtype)
        told = [angles.sin().flatten(1), angles.cos().flatten(1), level.mean((2, 3)).expand(batch, n)]
        vector = torch.cat([*(each.to(z.dtype) for each in told), *(readout(source) for source in sources)], 1)
        return Shown(shown, clock.amax(1), vector)


@frozen(eq=False)
class SharedLayout(Layout):
    """One upon another, as in the paper: all codes add up in the same channels, under one clock.

    z_t cannot show what is observed by itself, so the backbone is shown the *observed aggregate* beside it: the sum of
    the codes of what is seen, visibility maps, and flags of what is seen and of what is there.

    Attributes:
        names: of the modalities.
        latent: the space, which is each modality's whole share.
    """

    names: tuple[str, ...] = field(validator=min_len(1))
    latent: LatentSpec
    shared_clock = True

    def share(self, name: str) -> LatentSpec:
        return self.latent

    def meet(self, weights: Tensor, codes: Codes, rest: tuple[Tensor, Tensor] | None = None) -> Tensor:
        # Products and a sum, not an einsum: autocast would run that in half precision, and 1e-3 of M_t is not small
        # beside σ_t near t = 0.
        mean = torch.stack(_weighted(weights, codes, self.names)).sum(0)
        return mean if rest is None else mean + self.scaled(*rest)

    def scaled(self, values: Tensor, z: Tensor) -> Tensor:
        require_computable("what is in the diffusion space", z.dtype)
        return self.spread(values.to(z.dtype)) * z

    def spread(self, values: Tensor) -> Tensor:
        return widened(values).mean(1, keepdim=True).to(values.dtype)

    def take(self, name: str, z: Tensor) -> Tensor:
        return z

    def clocks(self, t: Tensor, seen: Tensor) -> Tensor:
        return t

    def place(self, z: Tensor, observation: Observation, signal: Tensor, rest: Tensor | None = None) -> Tensor:
        return z

    def inputs(self, readout: int) -> tuple[int, int]:
        n = len(self.names)
        return 2 * self.latent.channels + n, 2 * n + 2 * readout

    def show(
        self,
        z: Tensor,
        standing: Standing,
        observation: Observation | None,
        presence: Tensor | None,
        readout: Callable[[Tensor], Tensor],
    ) -> Shown:
        batch, n, (_, height, width) = len(z), len(self.names), self.latent.shape
        there = z.new_ones(1, n) if presence is None else presence.to(z.dtype)
        variance, power = standing.variance[:, :1], standing.signal.square()
        scale = (power.sum(1, keepdim=True) + variance).rsqrt() * ~standing.hidden[:, :1]
        scaled = z * scale.to(z.dtype)
        aggregate, visible = torch.zeros_like(z), z.new_zeros(batch, n, height, width)
        if observation is not None:
            visible = observation.seen.to(z.dtype).expand(batch, n, height, width)
            for name, code in observation.codes.items():
                aggregate = aggregate + code * visible[:, self.names.index(name)][:, None]
        present = there.sum(1).clamp(min=1)[:, None, None, None]
        level = noise_level((power.sum(1, keepdim=True) / present).sqrt(), variance)
        vector = torch.cat([visible.mean((2, 3)), there.expand(batch, n), readout(scaled), readout(aggregate)], 1)
        noise = level.to(single_or_wider(z.dtype)).amax((1, 2, 3)).expand(batch)
        return Shown(torch.cat([scaled, aggregate, visible], 1), noise, vector)
