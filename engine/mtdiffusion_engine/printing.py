"""Where commands print: results to the standard output, all else to the standard error. Only the standard library is
imported: the command line is quick."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import cache, wraps
from typing import TYPE_CHECKING

from mtdiffusion_registry.pace import LOGGER

if TYPE_CHECKING:
    from rich.console import Console


@cache
def screen() -> Console:
    """Where progress and messages go. It is one, so that a message does not end up within a bar."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Tell a person something that is no result, on a line of its own, however long."""
    screen().print(message, markup=False, soft_wrap=True)


class _Log(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())


@contextmanager
def log_shown(show: Callable[[str], None]) -> Iterator[None]:
    """What long work below tells of itself is shown so, of several processes the first one's; and in no other way: a
    library may set up the root logger, which would show all of it a second time."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    logger = logging.getLogger(LOGGER)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:], logger.propagate = [_Log(show)], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@contextmanager
def log_of_command() -> Iterator[None]:
    """:func:`log_shown` on the standard error; unless a program that calls the command line shows it already."""
    if logging.getLogger(LOGGER).handlers:
        yield
        return
    with log_shown(say):
        yield


@contextmanager
def json_document(wanted: bool) -> Iterator[Callable[[object], None]]:
    """The standard output is for one JSON document alone. What anything else prints meanwhile, libraries in C and other
    processes among them, goes to the standard error.

    Args:
        wanted: otherwise the standard output stays as it is, and no document is printed.

    Yields:
        what takes the document. It is printed in the end, if all goes well; numbers that are not finite, for which JSON
        has no word, are null in it.
    """
    made: list[object] = []
    if not wanted:
        yield made.append
        return
    with _stdout_to_stderr():
        yield made.append
    for document in made:
        print(json.dumps(_finite(document), indent=1, allow_nan=False))


def with_json(command: Callable[[Namespace], object]) -> Callable[[Namespace], None]:
    """A command that has ``--json``: with it, what the command returns is the document, unless that is None, as of a
    process that has nothing to tell."""

    @wraps(command)
    def run(args: Namespace) -> None:
        with json_document(args.json) as put:
            if (found := command(args)) is not None:
                put(found)

    return run


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    with ExitStack() as stack:
        if sys.stdout is not None:  # as it is where it was closed from the start
            sys.stdout.flush()
            with suppress(OSError):  # the standard error is closed: then what Python prints is redirected, and no more
                kept = os.dup(1)
                stack.callback(os.close, kept)
                os.dup2(2, 1)
                stack.callback(os.dup2, kept, 1)
                stack.callback(sys.stdout.flush)  # who has kept the object prints by it still
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
