"""Processes that read files for this one: Pillow's Python code holds the interpreter's lock, so threads do not help.

They are plain programs at the ends of two pipes, and not :mod:`multiprocessing`'s: they neither run the caller's main
module again nor need shared memory, and a process that may have no children of that kind can have them. They import
what reads the files, and not torch. A process ends when its input does, so none is left behind, however this one ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.pictures import Encoded, Source

if TYPE_CHECKING:
    from mtdiffusion_registry.configs import Reader

WORTH = 1000
"""Files for each process, from which on it reads them in less time than it takes to start."""
_MOST = 16  # each takes 30 MiB
_SMALL = 2**20  # bytes
_BUFFER = 2**18  # bytes; a whole answer for small pictures
_TOGETHER = 2**18  # bytes of arrays that are handed over as one
Read = TypeVar("Read")
_PROGRAM = f"from {__name__} import main; main()"


def count_for(files: int) -> int:
    """How many processes are to read so many files; 0: they are read sooner without."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of a training on this machine, which all read
    count = min(processors // here, files // WORTH, _MOST)
    return count if count > 1 else 0


class ReadingProcess:
    """A process that reads files.

    Args:
        reader: how.
        kind: of the field, for errors.
        size: to which pictures are scaled.

    Raises:
        OSError: if it cannot be started.
    """

    def __init__(self, reader: Reader, kind: str, size: tuple[int, int] | None) -> None:
        self._how = reader, kind, size
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=_BUFFER,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C in a terminal is for this process, which then ends that one
        )

    def read(self, paths: Sequence[str]) -> list[np.ndarray | UserError]:
        """What the files hold, in order, or what is wrong with them; files side by side whose arrays are alike come as
        one, ``[n, ...]``.

        Raises:
            EOFError, OSError, pickle.UnpicklingError: if the process is gone.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((*self._how, paths), self._process.stdin)
        self._process.stdin.flush()
        answers: list[np.ndarray | UserError] = []
        missing = len(paths)
        while missing:
            found = pickle.load(self._process.stdout)
            answers.append(UserError(found) if isinstance(found, str) else found)
            missing -= 1 if isinstance(found, str) else len(found)
        return answers

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        with suppress(OSError):  # what is left to be written to it
            self._process.communicate()


def read_by(
    read: Callable[[Any, tuple[int, int] | None], Read], kind: str, source: Source, size: tuple[int, int] | None
) -> Read:
    """What a file of a kind of fields holds.

    Raises:
        UserError: if it cannot be read; the message names it.
    """
    try:
        return read(source, size)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{source}: cannot be read as {kind} ({error})") from error


def _source(path: str) -> Source:
    """A small file in memory, where Pillow, which reads piece by piece, reads it sooner; another as its path."""
    try:
        file = os.open(path, os.O_RDONLY)  # a file object takes as long to make as a small file to read
        try:
            size = os.fstat(file).st_size
            if size <= _SMALL and len(content := os.read(file, size + 1)) == size:
                return Encoded(content, path)
        finally:
            os.close(file)
    except OSError:
        pass  # the reader runs into it again, and has a sentence for it
    return Path(path)


def _together(answers: Iterable[np.ndarray | str]) -> Iterator[np.ndarray | str]:
    """The same in as few parts as can be, as a part of its own takes longer to hand over than a small picture to
    decode: arrays side by side that are alike as one, ``[n, ...]``, of some size at most."""
    alike: list[np.ndarray] = []
    for each in answers:
        if alike and not (
            isinstance(each, np.ndarray)
            and (each.shape, each.dtype) == (alike[0].shape, alike[0].dtype)
            and each.nbytes * (len(alike) + 1) <= _TOGETHER
        ):
            yield _stacked(alike)
            alike = []
        if isinstance(each, str):
            yield each
        else:
            alike.append(each)
    if alike:
        yield _stacked(alike)


def _stacked(alike: list[np.ndarray]) -> np.ndarray:
    return np.stack(alike) if len(alike) > 1 else alike[0][None]  # a large one is not copied


def _answers(
    reader: Reader, kind: str, size: tuple[int, int] | None, paths: Sequence[str]
) -> Iterator[np.ndarray | str]:
    """What each file holds, or what is wrong with it."""
    for path in paths:
        try:
            yield read_by(reader, kind, _source(path), size)
        except UserError as error:
            yield str(error)


def main() -> None:
    """Be a :class:`ReadingProcess`: read what the standard input names, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb", _BUFFER)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    try:
        while True:
            for found in _together(_answers(*pickle.load(sys.stdin.buffer))):
                pickle.dump(found, out, protocol=pickle.HIGHEST_PROTOCOL)
            out.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # without flushing, which would fail again
