"""MultimodalDiffusion: encoders, backbone and heads wired around one diffusion process. Wiring only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mtdiffusion.clocks import SharedClock, check_path, clock_path
from mtdiffusion.compiled import compiled
from mtdiffusion.conditioning import Observation, pool_visibility
from mtdiffusion.interfaces import Backbone, ClockLaw, Encoder, Modality, Params
from mtdiffusion.layout import Layout
from mtdiffusion.precision import require_computable, without_autocast
from mtdiffusion.process import DiffusionProcess


def standard_normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """N(0, I) in the shape, dtype and device of a tensor, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


class Heads(NamedTuple):
    """What the network says at one point of the process.

    Attributes:
        params: per modality, parameters of p(x_i | z_t, observed).
        epsilon: the ε head's ``[B, C, H, W]``; None without one.
    """

    params: dict[str, Params]
    epsilon: Tensor | None


class Prediction(NamedTuple):
    """What a solver goes by.

    Attributes:
        params: per modality, parameters of p(x_i | z_t, observed).
        codes: ê by name, each ``[B, c_i, H, W]``: the expected codes, the true ones where observed.
        epsilon: ε̂ ``[B, C, H, W]``: derived from the codes, or the ε head's.
    """

    params: dict[str, Params]
    codes: dict[str, Tensor]
    epsilon: Tensor


class MultimodalDiffusion(nn.Module):
    """One diffusion model over any number of modalities.

    Args:
        modalities: by instance name, in the order of the layout.
        backbone: built for :meth:`Layout.inputs`.
        process: the forward process, and the layout in which it runs.
        law: which clocks are trained together, and the path that sampling takes.
        epsilon_head: predict ε with a head of its own (the paper's parameterisation) instead of deriving it from the
            modalities' heads.

    Raises:
        ValueError: if the modalities are not the layout's, or the law has clocks that the layout cannot; from ``to``
            and the like, if the dtype is not a floating point of 16, 32 or 64 bits.
    """

    _network: Callable[..., Heads] | None = None  # of :meth:`compiled`: what computes in place of :meth:`heads`
    _compiled: Callable[..., Heads] | None = None

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        backbone: Backbone,
        process: DiffusionProcess,
        law: ClockLaw | None = None,
        *,
        epsilon_head: bool = False,
    ) -> None:
        super().__init__()
        self.names = list(modalities)
        self.law = law or SharedClock()
        layout = process.layout
        if list(layout.names) != self.names or process.signal_table.shape[1] != len(self.names):
            raise ValueError(
                f"modalities {self.names}, layout {list(layout.names)} and a process of "
                f"{process.signal_table.shape[1]} modalities do not belong together"
            )
        if layout.shared_clock and not self.law.shared:
            raise ValueError(
                f"{type(self.law).__name__}: in a shared layout codes overlap, so all modalities have one clock; use "
                "the law of one shared clock, or a layout of own channels"
            )
        self.modalities = nn.ModuleDict(modalities)
        self.backbone = backbone
        self.process = process
        self.epsilon_head: nn.Conv2d | None = None
        if epsilon_head:
            self.epsilon_head = nn.Conv2d(backbone.features.channels, layout.latent.channels, 3, padding=1)
            nn.init.zeros_(self.epsilon_head.weight)
            nn.init.zeros_(self.epsilon_head.bias)  # type: ignore[arg-type]
        self.register_buffer("_like", torch.zeros(()), persistent=False)  # knows the device and dtype
        self._like: Tensor

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        require_computable("a model's dtype", fn(self._like).dtype)  # before anything is changed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.process = self.process.to(self.device)  # its tables stay float64 whatever the module's dtype
        self._compiled = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled: a copy has weights of its own."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_compiled", None)
        return state

    def compiled(self, **options: Any) -> Self:
        """The same model, weights and all, whose :meth:`heads` are compiled, for sampling and other use without
        gradients.

        They are compiled once, at the first call; later ones may differ in their batch, clocks and observations.

        Args:
            options: of torch.compile, the first time.
        """
        if self._compiled is None:
            self._compiled = compiled(self.heads, self.device, **options)
        view = copy(self)
        view._network = self._compiled
        return view

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def layout(self) -> Layout:
        return self.process.layout

    def modality(self, name: str) -> Modality:
        return self.modalities[name]  # type: ignore[return-value]

    @property
    def spatial(self) -> list[bool]:
        """Per modality, whether it can be observed in part."""
        return [self.modality(name).encoder.spatial for name in self.names]

    def encode(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Codes e_i by name of the modalities that x has, each ``[B, c_i, H, W]``, in the model's own precision."""
        with without_autocast(self.device):  # what it rounds off a code is not small beside σ_t near t = 0
            return {name: self.modality(name).encoder(self._given(x[name])) for name in self.names if name in x}

    def _given(self, x: Tensor) -> Tensor:
        """x of a modality as its encoder takes it: of floating point, in the model's."""
        return x.to(self.dtype) if x.is_floating_point() else x

    def observe(self, x: Mapping[str, Tensor], seen: Tensor, codes: Mapping[str, Tensor] | None = None) -> Observation:
        """What ``seen [B, N, h, w]`` lets through of x; modalities that x lacks must not be visible.

        Args:
            codes: of the whole of x, if they are there already.
        """
        found = {}
        for i, name in enumerate(self.names):
            if name not in x:
                continue
            encoder = self.modality(name).encoder
            if codes is not None and type(encoder).observe is Encoder.observe:  # a place shows its own patch alone
                found[name] = codes[name]
            else:
                visible = seen[:, i : i + 1].to(self.dtype)
                visible = visible.expand(-1, -1, encoder.latent.height, encoder.latent.width)
                with without_autocast(self.device):
                    found[name] = encoder.observe(self._given(x[name]), visible)
        return Observation(found, seen)

    def visibility(
        self, batch: int, observed: Mapping[str, Tensor], visible: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Visibility ``[B, N, h, w]`` of a request: the observed whole, or as maps ``[B, h', w']`` of the data say.

        Raises:
            ValueError: for a map of a modality that is not observed, or that cannot be seen in part, or that does not
                fit the batch or the latent.
        """
        maps = dict(visible or {})
        size = (self.layout.latent.height, self.layout.latent.width) if maps else (1, 1)
        seen = torch.zeros(batch, len(self.names), *size, device=self.device, dtype=self.dtype)
        for name, given in maps.items():
            if name not in observed or name not in self.names or not self.modality(name).encoder.spatial:
                why = "it cannot be observed in part" if name in observed else "it is not among the observed"
                raise ValueError(f"visible: a map was given for {name!r}, but {why}")
            if given.shape[0] != batch:
                raise ValueError(f"visible[{name!r}]: expected a batch of {batch}, found {given.shape[0]}")
        for i, name in enumerate(self.names):
            if name in maps:
                seen[:, i] = pool_visibility(maps[name].to(self.device), *size)[:, 0]
            elif name in observed:
                seen[:, i] = 1
        return seen

    def _readout(self, z: Tensor) -> Tensor:
        """The encoders' read-outs ``[B, R]`` of a z, side by side."""
        return torch.cat([self.modality(n).encoder.readout(self.layout.take(n, z)) for n in self.names], 1)

    def noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """N(0, I) in the diffusion space ``[batch, C, H, W]``."""
        return standard_normal(self._like.expand(batch, *self.layout.latent.shape), generator)

    def path(
        self, steps: int | None = None, ahead: Mapping[str, float] | None = None, path: Tensor | None = None
    ) -> Tensor:
        """Clocks ``[K + 1, N]`` (int64, on the CPU) from T for all to 0 for all.

        Args:
            steps: K; None: as many as leave each clock T steps.
            ahead: how far ahead of the slowest each modality runs, in shares of T, 0 for those not named; {}: one clock
                for all; None: as the law says.
            path: the path itself, instead.

        Raises:
            ValueError: if it is no path, names no modality, or has several clocks where the layout has one.
        """
        total = self.process.steps
        if path is not None:
            path = check_path(path.cpu(), self.names, total)
        else:
            if unknown := sorted(set(ahead or {}) - set(self.names)):
                raise ValueError(
                    f"path: no modality named {', '.join(unknown)}; this model has {', '.join(self.names)}"
                )
            offsets = self.law.ahead(len(self.names))
            if ahead is not None:
                offsets = torch.tensor([ahead.get(name, 0.0) for name in self.names], dtype=torch.float64)
            if bool((offsets < 0).any() or not offsets.isfinite().all()):
                raise ValueError(f"path: expected shares of T from 0, found {offsets.tolist()}")
            spread = float(offsets.max() - offsets.min())
            path = clock_path(offsets, math.ceil(total * (1 + spread)) if steps is None else steps, total)
        if self.layout.shared_clock and bool((path != path[:, :1]).any()):
            raise ValueError("path: in a shared layout all modalities have one clock; expected the same for all")
        return path

    def forward(
        self, z: Tensor, t: Tensor, observation: Observation | None = None, presence: Tensor | None = None
    ) -> Heads:
        """Predict every modality from z_t.

        Args:
            z: ``[B, C, H, W]``.
            t: clocks, int64 ``[B, N]`` or over places ``[B, N, h, w]``, in 0..T; B may be 1. At t = T of a process that
                ends in noise, the answer does not depend on z there.
            observation: what is observed; a layout of own channels reads it off z and the clocks, at 0 there.
            presence: ``[B, N]``, 0 where a sample lacks a modality (whose clock, if it has its own, is at T); None: all
                are there.
        """
        standing = self.process.standing(t, presence)
        if self.epsilon_head is not None:  # which is to tell the noise, at t = T too
            standing = standing._replace(hidden=torch.zeros_like(standing.hidden))
        shown = self.layout.show(z, standing, observation, presence, self._readout)
        return (self._network or self.heads)(*shown)

    def heads(self, map: Tensor, noise: Tensor, vector: Tensor) -> Heads:
        """What the network says of what a layout shows (:class:`mtdiffusion.layout.Shown`)."""
        features = self.backbone(map, noise, vector)
        params: dict[str, Params] = {n: dict(self.modality(n).decoder(features)) for n in self.names}
        return Heads(params, None if self.epsilon_head is None else self.epsilon_head(features.map))

    def complete(
        self,
        heads: Heads,
        z: Tensor,
        t: Tensor,
        observation: Observation | None = None,
        presence: Tensor | None = None,
        blanks: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Prediction:
        """What a solver goes by: the heads' expected codes, and ε derived from them unless a head tells it.

        Args:
            blanks: by modality, its codes and where they are known (:meth:`Encoder.known`): elsewhere they stand for
                what is predicted, so that a loss finds nothing wrong there.
        """
        codes = {}
        for name in self.names:
            modality = self.modality(name)
            codes[name] = modality.decoder.expected_encoding(heads.params[name], modality.encoder)
        if observation is not None:
            codes = observation.merge(codes, self.names)
        for name, (code, known) in (blanks or {}).items():
            codes[name] = torch.where(known, codes[name], code)
        epsilon = heads.epsilon
        if epsilon is None:
            epsilon = self.process.epsilon(z, codes, t, presence)
        return Prediction(heads.params, codes, epsilon)
