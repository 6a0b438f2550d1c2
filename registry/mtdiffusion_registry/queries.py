"""Queries: what a model is asked, and by what name its answer's metrics go."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs.validators import and_, ge, in_, lt


@frozen
class Query:
    """One question to a model: some modalities are given, others are to be generated.

    Attributes:
        observed: names of the modalities given whole.
        targets: names of those to be generated and judged; empty, with nothing observed: all of them, jointly.
        hidden: the share of the one target that is hidden, the rest of it being given; 0: nothing of it is given.
        pattern: how it is hidden: one "box", or scattered "patches" (places of the latent).

    Raises:
        ValueError: if a modality is both given and asked for, or more than one is given in part.
    """

    observed: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    hidden: float = field(default=0.0, validator=and_(ge(0.0), lt(1.0)))
    pattern: Literal["box", "patches"] = field(default="box", validator=in_(("box", "patches")))

    def __attrs_post_init__(self) -> None:
        if both := sorted(set(self.observed) & set(self.targets)):
            raise ValueError(f"a modality is either given or asked for, found in both: {', '.join(both)}")
        if self.observed and not self.targets:
            raise ValueError(f"targets: expected what to generate given {'+'.join(self.observed)}, found nothing")
        if self.hidden and len(self.targets) != 1:
            raise ValueError(f"hidden: expected one target that is given in part, found {len(self.targets)}")

    @property
    def joint(self) -> bool:
        """Whether nothing at all is given."""
        return not self.observed and not self.hidden

    @property
    def given(self) -> str:
        """What is given, in the middle of a metric's name: ``image+mask``, ``image:75%box``; "" if nothing is."""
        part = [f"{self.targets[0]}:{self.hidden:.0%}{self.pattern}"] if self.hidden else []
        return "+".join([*self.observed, *part])

    def key(self, target: str) -> str:
        """The first part of its metrics' names: ``label|image``, ``image|image:75%box``, ``joint``."""
        return "joint" if self.joint else f"{target}|{self.given}"
