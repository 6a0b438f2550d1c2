"""Files and folders that appear whole or not at all, and of which a killed process leaves nothing that stays.

What is being written has a name of its own, ``.NAME.PID``, until it is whole. Its writer holds a lock on it, which the
system gives back when a process ends, however it ends. So whoever writes the same thing next knows what is abandoned.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def partial_of(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """The name under which to write a file or folder; whoever has written it whole replaces ``path`` by it.

    It is there, empty; at the end it is removed unless it was moved away. What killed processes left of the same file
    is removed first.

    Raises:
        OSError: if it cannot be made.
    """
    remove_abandoned(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    if folder:
        partial.mkdir()
    lock = os.open(partial, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a file system that knows no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
    except OSError as error:
        if error.errno in _OF_WRITING and error.filename is None:  # of a full disk it does not say what was written
            error.filename = str(path)
        raise
    finally:
        os.close(lock)
        _remove(partial)


def remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed left of a file or folder: what nobody holds a lock on.

    Where locks are not known, everything stays, as does what cannot be removed.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+")
    with suppress(OSError):  # there is no such folder, or it cannot be listed
        for found in path.parent.iterdir():
            if pattern.fullmatch(found.name) and not found.is_symlink():
                _remove_unless_locked(found)


def _remove_unless_locked(partial: Path) -> None:
    with suppress(OSError):
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(partial)
        finally:
            os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
