"""The contract of laws of clocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion.clocks import clock_path
from mtdiffusion.interfaces import ClockLaw
from mtdiffusion_registry.configs import ClockLawConfig
from mtdiffusion_registry.testing import config as of_config
from mtdiffusion_registry.testing.contract import (
    BATCHES,
    Check,
    NotApplicable,
    Subject,
    check,
    contract_error,
    finite,
    kind_of,
    require,
    same_shape,
)

__tracebackhide__ = True

COUNTS = (1, 2, 5)  # of modalities
DRAWS = 2**16
PATH_STEPS = 20


@frozen(eq=False, slots=False)
class ClockLawSubject(Subject):
    """A law's config and the modality instances it is configured for."""

    config: ClockLawConfig
    names: Sequence[str] = ("a", "b")

    @cached_property
    def laws(self) -> list[tuple[int, ClockLaw]]:
        """N, and the law for N modalities: of the names given, which it must take, and of fewer and more, which it may
        refuse."""
        found = []
        names = (*self.names, *(f"other_{i}" for i in range(max(COUNTS))))
        for count in sorted({len(self.names), *COUNTS}):
            try:
                law = self.config.build(names[:count])
            except ValueError as error:
                if count == len(self.names):
                    raise contract_error(
                        f"a law can be built for {', '.join(self.names)}",
                        f"{type(error).__name__}: {error}",
                        "check it with the names that it is configured for",
                    ) from error
                continue
            fix = "subclass mtdiffusion.interfaces.ClockLaw"
            require(isinstance(law, ClockLaw), "build returns a ClockLaw", kind_of(law), fix)
            found.append((count, law))
        return found

    @cached_property
    def draws(self) -> list[tuple[int, ClockLaw, Tensor]]:
        """N, the law, and many clocks ``[DRAWS, N]``."""
        return [(count, law, law.draw(DRAWS, count, _generator())) for count, law in self.laws]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _of(count: int) -> str:
    return f"({count} {'modality' if count == 1 else 'modalities'})"


@check("entry_point")
def build(subject: ClockLawSubject) -> None:
    """build gives a ClockLaw."""
    _ = subject.laws  # says what is wrong


@check("build")
def draw(subject: ClockLawSubject) -> None:
    """draw gives floating [batch, N] on the CPU."""
    for count, law in subject.laws:
        for batch in BATCHES:
            clocks = law.draw(batch, count, _generator())
            same_shape(clocks, (batch, count), f"draw gives [batch, N] {_of(count)}", "draw a clock for each modality")
            found = f"{clocks.dtype} on {clocks.device}"
            kept = clocks.is_floating_point() and clocks.device.type == "cpu"
            require(kept, f"draw gives shares of T, on the CPU {_of(count)}", found, "draw floats, and move nothing")


@check("draw")
def values(subject: ClockLawSubject) -> None:
    """Clocks are finite, in [0, 1], and of no modality always 0."""
    for count, _, clocks in subject.draws:
        finite(clocks, f"clocks are finite {_of(count)}", "look for divisions and logarithms")
        low, high = clocks.min().item(), clocks.max().item()
        contract = f"clocks are shares of T, from 0 to 1 {_of(count)}"
        require(low >= 0 and high <= 1, contract, f"{low:.3g} to {high:.3g}", "clamp them")
        fix = "give each modality clocks above 0 in a share of the samples: one that is always clean is never learned"
        still = (clocks == 0).all(0).nonzero()[:, 0].tolist()
        require(not still, f"each modality has clocks above 0 {_of(count)}", f"0 alone for {still}", fix)


@check("draw")
def generator(subject: ClockLawSubject) -> None:
    """All randomness of draw comes from the generator given."""
    for count, law in subject.laws:
        before = torch.get_rng_state()
        first = law.draw(64, count, _generator())
        fix = "pass generator to every function that draws"
        same = torch.equal(before, torch.get_rng_state())
        require(same, f"draw leaves the global generator alone {_of(count)}", "its state has changed", fix)
        torch.rand(1)
        again = law.draw(64, count, _generator())
        same = torch.equal(first, again)
        require(same, f"draw is repeatable, given a generator {_of(count)}", "clocks that differ", fix)


@check("build")
def ahead(subject: ClockLawSubject) -> None:
    """ahead is [N], finite, at least 0, and the same every time."""
    for count, law in subject.laws:
        shares = law.ahead(count)
        same_shape(shares, (count,), f"ahead is [N] {_of(count)}", "give a share for each modality")
        finite(shares, f"ahead is finite {_of(count)}", "look for divisions and logarithms")
        fix = "count from the slowest modality"
        require(bool((shares >= 0).all()), f"ahead is at least 0 {_of(count)}", f"{shares.tolist()}", fix)
        same = torch.equal(shares, law.ahead(count))
        require(same, f"ahead is the same every time {_of(count)}", "shares that differ", "draw nothing")


@check("values", "ahead")
def shared(subject: ClockLawSubject) -> None:
    """A law that is called shared has one clock for all, in training and in sampling."""
    laws = [(count, law, clocks) for count, law, clocks in subject.draws if law.shared]
    if not laws:
        raise NotApplicable("the law is not shared")
    fix = "leave shared at False, or give all modalities one clock"
    for count, law, clocks in laws:
        apart = int((clocks != clocks[:, :1]).any(1).sum())
        contract = f"the clocks of a shared law are one {_of(count)}"
        require(apart == 0, contract, f"{apart} of {DRAWS} samples with several", fix)
        shares = law.ahead(count)
        require(bool((shares == shares[0]).all()), contract, f"{shares.tolist()} ahead in sampling", fix)


@check("shared")
def reach(subject: ClockLawSubject) -> None:
    """Training comes near all clocks that sampling visits."""
    for count, law, clocks in subject.draws:
        # As near as independent clocks come to (1, ..., 1), which they do worst.
        near = max(0.05, (20 / DRAWS) ** (1 / count))
        for point in clock_path(law.ahead(count), PATH_STEPS, 1000)[:-1] / 1000:  # at 0 for all, all is done
            distance = (clocks - point).abs().amax(1).min().item()
            require(
                distance <= near,
                f"some of many clocks that are drawn are near each place of the path of sampling {_of(count)}",
                f"none of {DRAWS} within {near:.2g} of {[round(clock, 3) for clock in point.tolist()]}",
                "draw clocks along the path that ahead makes, or let ahead make one among what is drawn",
            )


CHECKS: tuple[Check, ...] = (*of_config.CHECKS, build, draw, values, generator, ahead, shared, reach)
