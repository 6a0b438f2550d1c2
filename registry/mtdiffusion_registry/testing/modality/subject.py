"""What the checks of a modality are made with: it, built for several latents, and examples of its data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion.interfaces import Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.testing.contract import (
    Subject,
    contract_error,
    kind_of,
    require,
    sizes,
)

__tracebackhide__ = True

DTYPE = "give x one dtype everywhere: in the data, placeholder, mode and sample"
DRAWN = 16  # examples, if none are given


@frozen(eq=False)
class Case:
    """A modality built for one latent."""

    modality: Modality
    latent: LatentSpec
    spec: FeatureSpec

    def features(self, batch: int) -> Features:
        spec = self.spec
        return Features(torch.randn(batch, spec.channels, spec.height, spec.width), torch.randn(batch, spec.vector))

    def params(self, batch: int) -> Params:
        """Of a fresh head that was moved, since it may give the same params for everything, for which much that is
        wrong is right. Params are unconstrained by contract, so they can be moved."""
        params = self.modality.decoder(self.features(batch))
        return {
            name: value + 0.3 * torch.randn_like(value) if value.is_floating_point() else value
            for name, value in params.items()
        }


@frozen(eq=False, slots=False)
class ModalitySubject(Subject):
    """A modality's config and what it is checked with; see :func:`mtdiffusion_registry.testing.check_modality`."""

    config: ModalityConfig
    given: Tensor | None = None
    height: int = 8
    width: int = 8
    encoding_bias: float = 0.05
    source: Tensor | Sequence[str] | None = None

    @cached_property
    def cases(self) -> list[Case]:
        """The modality in every latent that it can fill; it must fill the first."""
        cases: list[Case] = []
        for i, (height, width) in enumerate(sizes(self.height, self.width)):
            try:
                latent = LatentSpec(self.config.latent_channels(height, width), height, width)
                spec = FeatureSpec(max(16, latent.channels), height, width, 32)
                modality = self.config.build(latent, spec)
            except (UserError, ValueError) as error:
                if i == 0:
                    raise contract_error(
                        "a modality can be built for the first latent",
                        f"{type(error).__name__}: {error}",
                        "choose a height and a width that it can fill",
                    ) from error
                continue
            _require_parts(modality, latent)
            if cases and modality.placeholder(1).shape != cases[0].modality.placeholder(1).shape:
                continue  # its data take the latent's shape, and the examples are of the first
            if self.source is not None and modality.fit_samples:
                modality.fit(self.source[: modality.fit_samples])
            cases.append(Case(modality.eval(), latent, spec))
        return cases

    @property
    def real(self) -> bool:
        """Whether the examples are somebody's, not a fresh head's."""
        return self.given is not None or self.source is not None

    @cached_property
    def examples(self) -> Tensor:
        """Those given, or derived from the source given, or a fresh head's: valid and varied, by contract."""
        if self.given is not None:
            return self.given.detach()
        case = self.cases[0]
        with torch.no_grad():
            if self.source is not None:
                x = case.modality.derive(self.source)
                for each in self.cases:
                    each.modality.measure(x)
                return x
            params = case.params(DRAWN)
            x = case.modality.decoder.mode(params)
            rows = x.reshape(DRAWN, -1).tolist() if isinstance(x, Tensor) and x.shape[:1] == (DRAWN,) else []
            if len({*map(tuple, rows)}) == DRAWN:
                return x
            # Of a few classes modes are alike. Where they are not, draws would make the worse data: the scale of a
            # fresh head differs from number to number, and no small model learns such noise in the steps of the checks.
            return case.modality.decoder.sample(params, torch.Generator().manual_seed(0))


def _require_parts(modality: object, latent: LatentSpec) -> None:
    parts = (modality.encoder, modality.decoder) if isinstance(modality, Modality) else None
    require(
        parts is not None and isinstance(parts[0], Encoder) and isinstance(parts[1], Decoder),
        "build returns a Modality of an Encoder and a Decoder",
        ", ".join(kind_of(part) for part in parts or (modality,)),
        "return a subclass of mtdiffusion.Modality, of an mtdiffusion.Encoder and an mtdiffusion.Decoder",
    )
    assert isinstance(modality, Modality)
    require(
        modality.encoder.latent == latent,
        "encoder.latent is the share of the diffusion space it was built for",
        f"{modality.encoder.latent}, built for {latent}",
        "pass latent to Encoder.__init__",
    )


def accepts(modality: Modality, x: Tensor, what: str, fix: str) -> None:
    try:
        modality.check(x.detach())
    except ValueError as error:
        raise contract_error(f"check accepts {what}", str(error), fix) from error
