"""Telling a person how far a long piece of work is: a line now and then, none for what is quick."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LOGGER = "mtdiffusion"
"""The logger of what is going on; the command line shows it, and a program may."""
SELDOM = 60.0
"""Seconds between lines about what takes hours."""
EVERY = 5.0
"""Seconds to the first line about what takes less, and between the next ones; what is done sooner says nothing."""
_SHARE = 1 / 6
"""Of the time that has passed until a line, that until the next one: ten minutes take some 25 lines."""

Tell = Callable[[float, str], object]
"""Is told how many items are done, of one under way a share, and where in it the work is ("" between items)."""


def by_step(tell: Tell, done: int, count: int) -> Callable[[int, int, object], None]:
    """An ``on_step`` (:func:`mtdiffusion.sample`) that tells how far the next ``count`` items are, after ``done``."""

    def on_step(step: int, of: int, _: object) -> None:
        if step:
            tell(done + count * step / of, f"step {step} of {of}")

    return on_step


class Pace:
    """Work of a known amount.

    Args:
        what: what is being done, such as "reading image".
        total: how many items there are.
        show: is told the lines; None: the logger of what is going on.
        before: how many were done earlier, in no time of this work.
        every: seconds between lines; None: a few at first, and up to a minute as the work goes on.
    """

    def __init__(
        self,
        what: str,
        total: int,
        show: Callable[[str], None] | None = None,
        *,
        before: int = 0,
        every: float | None = None,
    ) -> None:
        self.what, self.total = what, total
        self._before, self._every = before, every
        self._show = show or logging.getLogger(LOGGER).info
        self._started = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._started

    def tell(self, done: float, where: str = "") -> None:
        """Say how many are done and how long the rest will take, if nothing was said for a while.

        Args:
            done: how many, of those under way a share.
            where: in those under way, such as "step 3 of 32".
        """
        now = time.monotonic()
        gap = max(EVERY, min(self.seconds * _SHARE, SELDOM)) if self._every is None else self._every
        if self._before < done < self.total and now - self._told > gap:
            self._told = now
            left = round(self.seconds / (done - self._before) * (self.total - done))
            at = f", {where}" if where else ""
            self.log(f"{int(done):,} of {self.total:,}{at}, {left // 60}:{left % 60:02d} left")

    def log(self, message: str) -> None:
        """Say something about the work."""
        self._show(f"{self.what}: {message}")
