"""MultimodalDiffusion: encoders, backbone and heads wired around one diffusion process. Wiring only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from attrs import frozen
from torch import Tensor, nn

from mtdiffusion.conditioning import Observation, pool_visibility
from mtdiffusion.interfaces import Backbone, LatentSpec, Modality, Params
from mtdiffusion.process import DiffusionProcess, per_sample

TERMINAL_SNR = 1e-3
"""Below it, z_T is taken to tell nothing of any modality, and the network is not shown it (at t = T alone), unless it
has an ε head."""


@frozen
class LatentLayout:
    """Where each modality lives in the diffusion space.

    Attributes:
        latent: the whole space.
        slots: first and past-the-last channel of each modality, in order.
    """

    latent: LatentSpec
    slots: Mapping[str, tuple[int, int]]

    @classmethod
    def own(cls, channels: Mapping[str, int], height: int, width: int) -> LatentLayout:
        """Channels of its own for each modality: their codes are orthogonal."""
        slots, start = {}, 0
        for name, count in channels.items():
            slots[name] = (start, start + count)
            start += count
        return cls(LatentSpec(start, height, width), slots)

    @classmethod
    def shared(cls, names: list[str], latent: LatentSpec) -> LatentLayout:
        """All modalities add up in the same channels."""
        return cls(latent, dict.fromkeys(names, (0, latent.channels)))

    @property
    def disjoint(self) -> bool:
        """Whether no two modalities share a channel."""
        slots = sorted(self.slots.values())
        return all(stop <= start for (_, stop), (start, _) in pairwise(slots))

    def share(self, name: str) -> LatentSpec:
        """One modality's share of the space."""
        start, stop = self.slots[name]
        return LatentSpec(stop - start, self.latent.height, self.latent.width)

    def take(self, name: str, z: Tensor) -> Tensor:
        """One modality's channels ``[B, c, H, W]`` of ``z [B, C, H, W]``."""
        start, stop = self.slots[name]
        return z[:, start:stop]

    def place(self, name: str, code: Tensor) -> Tensor:
        """A modality's code ``[B, c, H, W]`` in the whole space, zero elsewhere: ``[B, C, H, W]``."""
        start, stop = self.slots[name]
        return nn.functional.pad(code, (0, 0, 0, 0, start, self.latent.channels - stop))


class Prediction(NamedTuple):
    """What the network says of X at one time.

    Attributes:
        params: per modality, parameters of p(x_i | z_t, observed).
        codes: ê ``[B, N, C, H, W]``, the expected codes; the true ones where observed.
        epsilon: ε̂ ``[B, C, H, W]``: derived from the codes, or the ε head's.
    """

    params: dict[str, Params]
    codes: Tensor
    epsilon: Tensor


class MultimodalDiffusion(nn.Module):
    """One diffusion model over any number of modalities.

    Args:
        modalities: by instance name, in the order of the process's tables.
        backbone: built for :meth:`backbone_inputs` of the layout.
        process: the forward process.
        layout: where each modality lives in the latent.
        epsilon_head: predict ε with a head of its own (the paper's parameterisation) instead of deriving it from the
            modalities' heads.
        own_channels: show the clean code of what is observed in place of its noisy channels; needs a disjoint layout.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        backbone: Backbone,
        process: DiffusionProcess,
        layout: LatentLayout,
        *,
        epsilon_head: bool = False,
        own_channels: bool = True,
    ) -> None:
        super().__init__()
        self.names = list(modalities)
        if process.signal_table.shape[1] != len(self.names) or list(layout.slots) != self.names:
            raise ValueError(
                f"modalities {self.names}, layout {list(layout.slots)} and a process of "
                f"{process.signal_table.shape[1]} modalities do not belong together"
            )
        self.modalities = nn.ModuleDict(modalities)
        self.backbone = backbone
        self.process = process
        self.layout = layout
        self.own_channels = own_channels and layout.disjoint
        # An ε head needs z at t = T, of which it is to tell the noise.
        self.hides_last = not epsilon_head and bool((process.terminal_snr < TERMINAL_SNR).all())
        self.epsilon_head: nn.Conv2d | None = None
        if epsilon_head:
            self.epsilon_head = nn.Conv2d(backbone.features.channels, layout.latent.channels, 3, padding=1)
            nn.init.zeros_(self.epsilon_head.weight)
            nn.init.zeros_(self.epsilon_head.bias)  # type: ignore[arg-type]
        owner = torch.zeros(len(self.names), layout.latent.channels)
        for i, (start, stop) in enumerate(layout.slots.values()):
            owner[i, start:stop] = 1
        self.register_buffer("owner", owner, persistent=False)
        self.owner: Tensor

    @staticmethod
    def backbone_inputs(layout: LatentLayout, readout: int) -> tuple[int, int]:
        """Channels of the map and width of the vector that a backbone receives.

        The map is z, c and a visibility map per modality; the vector, flags of observation and of presence, and the
        encoders' read-outs (``readout``: the sum of their widths) of z and c.
        """
        n = len(layout.slots)
        return 2 * layout.latent.channels + n, 2 * n + 2 * readout

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.process = self.process.to(self.owner.device)  # its tables stay float64 whatever the module's dtype
        return self

    def modality(self, name: str) -> Modality:
        return self.modalities[name]  # type: ignore[return-value]

    @property
    def spatial(self) -> list[bool]:
        """Per modality, whether it can be observed in part."""
        return [self.modality(name).encoder.spatial for name in self.names]

    def encode(self, x: Mapping[str, Tensor]) -> Tensor:
        """Codes e_i of all modalities in the shared space: ``[B, N, C, H, W]``."""
        return torch.stack([self.layout.place(n, self.modality(n).encoder(x[n])) for n in self.names], 1)

    def observe(self, x: Mapping[str, Tensor], visible: Tensor) -> Observation:
        """What ``visible [B, N, H, W]`` lets through of x; modalities that x lacks must not be visible."""
        codes = visible.new_zeros(visible.shape[0], len(self.names), *self.layout.latent.shape)
        for i, name in enumerate(self.names):
            if name in x and bool(visible[:, i].any()):
                seen = visible[:, i : i + 1]
                codes[:, i] = self.layout.place(name, self.modality(name).encoder.observe(x[name], seen))
        return Observation(codes, visible)

    def visibility(
        self, batch: int, observed: Mapping[str, Tensor], visible: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Visibility maps ``[B, N, H, W]`` of a request: the observed whole, or as maps ``[B, h, w]`` say.

        Raises:
            ValueError: for a map of a modality that is not observed, or that cannot be seen in part, or that does not
                fit the batch or the latent.
        """
        maps = dict(visible or {})
        device = self.owner.device
        latent = self.layout.latent
        seen = torch.zeros(batch, len(self.names), latent.height, latent.width, device=device)
        for name, given in maps.items():
            if name not in observed or name not in self.names or not self.modality(name).encoder.spatial:
                why = "it cannot be observed in part" if name in observed else "it is not among the observed"
                raise ValueError(f"visible: a map was given for {name!r}, but {why}")
            if given.shape[0] != batch:
                raise ValueError(f"visible[{name!r}]: expected a batch of {batch}, found {given.shape[0]}")
        for i, name in enumerate(self.names):
            if name in maps:
                seen[:, i] = pool_visibility(maps[name].to(device), latent.height, latent.width)[:, 0]
            elif name in observed:
                seen[:, i] = 1
        return seen

    def input_scale(self, t: Tensor, presence: Tensor) -> Tensor:
        """c_in ``[B, C, 1, 1]``: 1/√(Var M_t + σ_t²) per channel, for codes of unit variance."""
        signal = self.process.signal(t, presence)
        variance = signal.square() @ self.owner.to(signal.dtype) + self.process.variance(t)[:, None]
        return variance.rsqrt()[:, :, None, None]

    def forward(self, z: Tensor, t: Tensor, observation: Observation, presence: Tensor | None = None) -> Prediction:
        """Predict every modality from z_t.

        Args:
            z: ``[B, C, H, W]``.
            t: ``[B]`` int64 in 1..T. At t = T of a process that ends in noise, the answer does not depend on z.
            observation: what is observed.
            presence: ``[B, N]``, 0 where a sample lacks a modality; None means all are there.
        """
        if presence is None:
            presence = z.new_ones(z.shape[0], len(self.names))
        features = self.backbone(*self._inputs(z, t, observation, presence))
        params: dict[str, Params] = {n: self.modality(n).decoder(features) for n in self.names}
        head = self.epsilon_head(features.map) if self.epsilon_head is not None else None
        return self.complete(z, t, observation, params, head, presence)

    def complete(
        self,
        z: Tensor,
        t: Tensor,
        observation: Observation,
        params: dict[str, Params],
        epsilon: Tensor | None,
        presence: Tensor | None = None,
    ) -> Prediction:
        """A :class:`Prediction` from heads' parameters: expected codes, and ε derived from them unless given.

        Where a modality is seen in channels of its own, ε is known there and a given one is not asked: the network does
        not even see those channels of z.
        """
        codes = torch.stack(
            [
                self.layout.place(n, self.modality(n).decoder.expected_encoding(params[n], self.modality(n).encoder))
                for n in self.names
            ],
            1,
        )
        codes = observation.merge(codes)
        derived = self.process.epsilon(z, codes, t, presence)
        if epsilon is None:
            epsilon = derived
        elif self.own_channels:
            epsilon = torch.where(self._seen(observation) > 0.5, derived, epsilon)
        return Prediction(params, codes, epsilon)

    def _seen(self, observation: Observation) -> Tensor:
        """Which channels and places of z show an observed modality: ``[B, C, H, W]`` of 0 and 1 (disjoint layouts)."""
        return torch.einsum("bnhw,nc->bchw", observation.visible, self.owner)

    def _inputs(
        self, z: Tensor, t: Tensor, observation: Observation, presence: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        aggregate, visible = observation.aggregate, observation.visible
        scaled = z * self.input_scale(t, presence).to(z.dtype)
        if self.hides_last:
            # z_T says nothing: shown, its noise would only have to be learned away by whoever reads what is observed.
            scaled = scaled * per_sample(t < self.process.steps, scaled)
        if self.own_channels:
            # Where a modality is seen, its own channels of z_t say less than its clean code: show that instead.
            seen = self._seen(observation)
            scaled = scaled * (1 - seen) + aggregate * seen
        readouts = [
            self.modality(name).encoder.readout(self.layout.take(name, source))
            for source in (scaled, aggregate)
            for name in self.names
        ]
        vector = torch.cat([observation.flags, presence.to(z.dtype), *readouts], 1)
        noise = self.process.noise_level(t).to(z.dtype)
        return torch.cat([scaled, aggregate, visible], 1), noise, vector
