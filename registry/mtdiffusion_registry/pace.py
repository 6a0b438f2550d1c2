"""Telling a person how far a long piece of work is: a line now and then, none for what is quick."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

LOGGER = "mtdiffusion"
"""The logger of what is going on; the command line shows it, and a program may."""
SELDOM = 60.0
"""Seconds between lines about what takes hours."""
EVERY = 5.0
"""Seconds to the first line about what takes less, and between the next ones; what is done sooner says nothing."""
_SHARE = 1 / 6
"""Of the time that has passed until a line, that until the next one: ten minutes take some 25 lines."""


class Step(NamedTuple):
    """Where work is that takes the same steps with some items at once: the next ``items`` after the ``first`` ones."""

    first: int
    items: int
    step: int
    of: int


Tell = Callable[[float, Step | None], object]
"""Is told how many items are done, of those under way a share, and where the work is with these; None between them."""


def by_step(tell: Tell, done: int, count: int) -> Callable[[int, int, object], None]:
    """An ``on_step`` (:func:`mtdiffusion.sample`) that tells how far the next ``count`` items are, after ``done``."""

    def on_step(step: int, of: int, _: object) -> None:
        if step:
            tell(done + count * step / of, Step(done, count, step, of))

    return on_step


def how_far(done: float, total: int, at: Step | None, item: str = "sample") -> str:
    """What is done of a total, or where those items are that are under way."""
    if at is None:
        return f"{int(done):,} of {total:,}"
    if at.items == total:
        which = f"{total:,} {item}{'s' * (total != 1)}"
    elif at.items == 1:
        which = f"{item} {at.first + 1:,} of {total:,}"
    else:
        which = f"{item}s {at.first + 1:,} to {at.first + at.items:,} of {total:,}"
    return f"{which} at step {at.step} of {at.of}"


class Pace:
    """Work of a known amount.

    Args:
        what: what is being done, such as "reading image".
        total: how many items there are.
        show: is told the lines; None: the logger of what is going on.
        before: how many were done earlier, in no time of this work.
        every: seconds between lines; None: a few at first, and up to a minute as the work goes on.
        item: what one item is called.
    """

    def __init__(
        self,
        what: str,
        total: int,
        show: Callable[[str], None] | None = None,
        *,
        before: int = 0,
        every: float | None = None,
        item: str = "sample",
    ) -> None:
        self.what, self.total, self.item = what, total, item
        self._before, self._every = before, every
        self._show = show or logging.getLogger(LOGGER).info
        self._started = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._started

    def tell(self, done: float, at: Step | None = None) -> None:
        """Say how many are done and how long the rest will take, if nothing was said for a while.

        Args:
            done: how many, of those under way a share.
            at: where the work is with those under way.
        """
        now = time.monotonic()
        gap = max(EVERY, min(self.seconds * _SHARE, SELDOM)) if self._every is None else self._every
        if self._before < done < self.total and now - self._told > gap:
            self._told = now
            left = round(self.seconds / (done - self._before) * (self.total - done))
            self.log(f"{how_far(done, self.total, at, self.item)}, {left // 60}:{left % 60:02d} left")

    def log(self, message: str) -> None:
        """Say something about the work."""
        self._show(f"{self.what}: {message}")
