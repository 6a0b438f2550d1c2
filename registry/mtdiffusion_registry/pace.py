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

    def tell(self, done: int) -> None:
        """Say how many are done and how long the rest will take, if nothing was said for a while."""
        now = time.monotonic()
        gap = max(EVERY, min(self.seconds * _SHARE, SELDOM)) if self._every is None else self._every
        if self._before < done < self.total and now - self._told > gap:
            self._told = now
            left = self.seconds / (done - self._before) * (self.total - done)
            self.log(f"{done:,} of {self.total:,}, {left // 60:.0f}:{left % 60:02.0f} left")

    def log(self, message: str) -> None:
        """Say something about the work."""
        self._show(f"{self.what}: {message}")
