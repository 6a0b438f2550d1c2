"""Laws of clocks that ship: the core's, with offsets by modality name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from attrs import field, frozen
from attrs.validators import and_, deep_mapping, ge, le, min_len

from mtdiffusion import ClockLaw, EdgesAndDiagonal, IndependentClocks, MixedClocks, OffsetClocks, SharedClock
from mtdiffusion_registry.configs import ClockLawConfig
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

_share = and_(ge(0.0), le(1.0))


@frozen
class SharedClockConfig(ClockLawConfig):
    """One clock for all modalities: all are equally noisy. The default."""

    kind: ClassVar[str] = "shared"

    def build(self, names: Sequence[str]) -> ClockLaw:
        return SharedClock()


@frozen
class IndependentClocksConfig(ClockLawConfig):
    """A clock for each modality, drawn by itself (UniDiffuser, Bao et al. 2023)."""

    kind: ClassVar[str] = "independent"

    def build(self, names: Sequence[str]) -> ClockLaw:
        return IndependentClocks()


@frozen
class MixedClocksConfig(ClockLawConfig):
    """Some samples with independent clocks, the others with one.

    Attributes:
        independent: share of the samples with independent clocks.
    """

    kind: ClassVar[str] = "mixed"
    independent: float = field(default=0.5, validator=_share)

    def build(self, names: Sequence[str]) -> ClockLaw:
        return MixedClocks(self.independent)


@frozen
class OffsetClocksConfig(ClockLawConfig):
    """Some modalities run ahead: at any moment they are cleaner than the others, in training and in sampling.

    Attributes:
        ahead: how far ahead of the slowest, by modality name, in shares of the path; 0 for those not named.
    """

    kind: ClassVar[str] = "offset"
    ahead: dict[str, float] = field(validator=[min_len(1), deep_mapping(value_validator=ge(0.0))])

    def build(self, names: Sequence[str]) -> ClockLaw:
        if unknown := sorted(set(self.ahead) - set(names)):
            raise ValueError(f"ahead: expected names among {', '.join(names)}, found {', '.join(unknown)}")
        return OffsetClocks(tuple(self.ahead.get(name, 0.0) for name in names))


@frozen
class EdgesAndDiagonalConfig(ClockLawConfig):
    """What sampling visits, and nothing between: one clock for all, or some modalities clean, some noise, the others at
    one clock.

    Attributes:
        diagonal: share of the samples with one clock for all.
    """

    kind: ClassVar[str] = "edges_and_diagonal"
    diagonal: float = field(default=0.5, validator=_share)

    def build(self, names: Sequence[str]) -> ClockLaw:
        return EdgesAndDiagonal(self.diagonal)


@hookimpl
def mtdiffusion_clock_laws() -> list[type]:
    return [
        SharedClockConfig,
        IndependentClocksConfig,
        MixedClocksConfig,
        OffsetClocksConfig,
        EdgesAndDiagonalConfig,
    ]
