"""Ctrl-C and SIGTERM: how a job is told to stop. Only the standard library is imported: the command line is quick.

A scheduler, a container or ``timeout`` ends a job with SIGTERM; to a training it means what Ctrl-C does.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ECHO = 0.1
"""Seconds in which a second SIGTERM counts as the first: ``timeout`` sends it to its child, then to the whole group."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where a KeyboardInterrupt would be."""


STATUS = {KeyboardInterrupt: 130, Terminated: 143}
"""Exit status of a command that was stopped: 128 + the signal's number, as a shell has it."""


def raise_terminated(_signal: int, _frame: FrameType | None) -> None:
    """A handler of SIGTERM.

    Raises:
        Terminated: always.
    """
    raise Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated`, so that what is half done is undone on the way out.

    In another thread than the main one, or where SIGTERM is ignored or has another handler, nothing changes.
    """
    if not _main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Ctrl-C and SIGTERM as a question to ask between steps, so that a checkpoint never holds half a step.

    The answer is the exception to raise, or None. A second signal acts at once, as it would have before. Where one is
    ignored or has a handler of another's, that stays.
    """
    caught: type[KeyboardInterrupt] | None = None
    at = 0.0

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal caught, at
        if caught is None:
            caught, at = kinds[number], time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - at > ECHO:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    kinds: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    ours = (signal.default_int_handler, signal.SIG_DFL, raise_terminated)
    before = {number: signal.getsignal(number) for number in kinds} if _main_thread() else {}
    before = {number: handler for number, handler in before.items() if handler in ours}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: caught
    finally:
        restore()


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until what is inside is done: some imports go astray where an exception hits them.

    A second signal acts at once.

    Raises:
        KeyboardInterrupt: at the end, if there was one; a :class:`Terminated` for SIGTERM.
    """
    with deferred_interrupt() as interrupted:
        yield
    if reason := interrupted():
        raise reason


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
