"""The tasks we ship: any combination of modalities, masked training within one, and a transition between two."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import and_, deep_iterable, gt, in_, lt, min_len

from mtdiffusion_registry import Query, TaskConfig, hookimpl

MTDIFFUSION_API = 1


@frozen
class CombinationConfig(TaskConfig):
    """Modalities modelled jointly; asked for all of them, for each given each other and given all others, and for
    spatial ones in part.

    Attributes:
        modalities: names of the instances.
        masked: those of them that are also given in part and filled in (masked-image training, inside one modality).
        hidden: the shares that are hidden then.
        patterns: how: "box" or "patches".
        partial: share of training samples that see a masked modality in part.
    """

    kind: ClassVar[str] = "combination"
    modalities: tuple[str, ...] = field(validator=min_len(1))
    masked: tuple[str, ...] = ()
    hidden: tuple[float, ...] = field(default=(0.1, 0.5, 0.75), validator=deep_iterable(and_(gt(0.0), lt(1.0))))
    patterns: tuple[Literal["box", "patches"], ...] = field(
        default=("box", "patches"), validator=deep_iterable(in_(("box", "patches")))
    )
    partial: float = field(default=0.3, validator=and_(gt(0.0), lt(1.0)))

    def __attrs_post_init__(self) -> None:
        if unknown := sorted(set(self.masked) - set(self.modalities)):
            raise ValueError(f"masked: expected names among {', '.join(self.modalities)}, found {', '.join(unknown)}")

    def instances(self) -> tuple[str, ...]:
        return self.modalities

    def queries(self) -> tuple[Query, ...]:
        names = self.modalities
        others = {name: tuple(other for other in names if other != name) for name in names}
        asked = [Query()]
        if len(names) > 1:
            asked += [Query((name,), others[name]) for name in names]
        if len(names) > 2:
            asked += [Query(others[name], (name,)) for name in names]
        parts = itertools.product(self.masked, self.hidden, self.patterns)
        asked += [Query((), (name,), share, pattern) for name, share, pattern in parts]
        return tuple(asked)

    def training(self) -> Mapping[str, Any]:
        """A lone modality is never observed whole, which a result says; nothing is seen in part unless it is asked."""
        conditioning: dict[str, Any] = {"partial": self.partial if self.masked else 0.0}
        if len(self.modalities) == 1:
            conditioning["observed"] = 0.0
        return {"conditioning": conditioning}


@frozen
class TransitionConfig(TaskConfig):
    """One modality turned into another, as day into night.

    Attributes:
        source, target: names of the instances.
        observed: share of training samples that see the source.
    """

    kind: ClassVar[str] = "transition"
    source: str
    target: str
    observed: float = field(default=0.8, validator=and_(gt(0.0), lt(1.0)))

    def instances(self) -> tuple[str, ...]:
        return (self.source, self.target)

    def queries(self) -> tuple[Query, ...]:
        return (Query((self.source,), (self.target,)),)

    def training(self) -> Mapping[str, Any]:
        return {"conditioning": {"observed": self.observed, "partial": 0.0, "subsets": {self.source: 1.0}}}


@hookimpl
def mtdiffusion_tasks() -> list[type]:
    return [CombinationConfig, TransitionConfig]
