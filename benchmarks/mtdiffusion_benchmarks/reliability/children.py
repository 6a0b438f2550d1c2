"""Commands in processes of their own that are killed, stopped, starved or watched.

To import torch takes seconds, and what is tried takes less than one. So one process imports everything, and forks a
child for each trial. A child is a whole process: what SIGKILL does to it is what it does to any.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.util import _exit_function  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from attrs import frozen

from mtdiffusion_registry.cache import CACHE_VARIABLE

LIMIT = 120.0
"""Seconds after which a command is taken to hang."""
MOST_MEMORY = 2 * 2**30
"""Bytes that no command on a hostile file may take."""
_POLL = 0.001
_WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")


@frozen
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status; of one that a signal ended, the signal's number below zero.
        said: what it wrote on both outputs.
        seconds: how long it took.
        memory: bytes resident at most.
        hung: whether it had to be killed after :data:`LIMIT`.
    """

    status: int
    said: str
    seconds: float
    memory: int
    hung: bool = False

    def wrong(self, *statuses: int) -> str:
        """What is wrong with how it ended, if it is not one of these statuses with something said; empty if nothing
        is."""
        if self.hung:
            return f"hung for {LIMIT:.0f} s"
        last = " ".join(self.said.strip().splitlines()[-1:])
        if "Traceback (most recent call last)" in self.said:
            return f"a traceback: {last}"
        if self.status not in statuses:
            return f"ended with {self.status}, expected {' or '.join(map(str, statuses))}: {last}"
        if self.memory > MOST_MEMORY:
            return f"took {self.memory / 2**30:.1f} GiB"
        return ""


@frozen
class Place:
    """Where a trial takes place: a folder that is emptied before each, with all that a command may write in.

    Attributes:
        root: ``work`` in it is where commands run, ``cache`` and ``tmp`` are theirs.
    """

    root: Path

    @property
    def work(self) -> Path:
        return self.root / "work"

    def environment(self) -> dict[str, str]:
        """What tells a command where its folders are."""
        return {CACHE_VARIABLE: str(self.root / "cache"), "TMPDIR": str(self.root / "tmp")}


class Child:
    """A command under way in a child of this process, in a group of its own."""

    def __init__(self, place: Place, work: Callable[[], int | None], before: Callable[[], None] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # it is read when the child has ended
        self._started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(place, work, before)

    def _be(self, place: Place, work: Callable[[], int | None], before: Callable[[], None] | None) -> None:
        status = 70
        try:
            os.setsid()
            os.chdir(place.work)
            os.environ.update(place.environment())
            tempfile.tempdir = None
            for number in (1, 2):
                os.dup2(self._log.fileno(), number)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if before is not None:
                before()
            status = work() or 0
        except SystemExit as leave:
            status = leave.code if isinstance(leave.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                _exit_function()  # what multiprocessing leaves to a process's end; the rest is the parent's
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def send(self, number: int) -> None:
        """Send a signal to the process alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def ended_within(self, seconds: float) -> bool:
        """Wait so long at most; whether it has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
            time.sleep(min(_POLL, max(until - time.monotonic(), 0)))
        return False

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait for its end; a child that takes longer than ``limit`` is killed."""
        hung = not self.ended_within(limit)
        if hung:
            self.kill()
        _, status, used = os.wait4(self.pid, 0)
        seconds = time.monotonic() - self._started
        with contextlib.suppress(ProcessLookupError, PermissionError):  # workers that outlived it
            os.killpg(self.pid, signal.SIGKILL)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")
        self._log.close()
        return Ended(os.waitstatus_to_exitcode(status), said, seconds, used.ru_maxrss * 1024, hung)


def command(arguments: Sequence[str]) -> Callable[[], int]:
    """The command line with these arguments, as a child's work."""

    def work() -> int:
        from mtdiffusion_engine.cli import main

        return main(list(arguments))

    return work


def noting_imports(work: Callable[[], int], into: Path) -> Callable[[], int]:
    """Work that, at its end, writes down what this process has imported."""

    def noting() -> int:
        status = work()
        into.write_text("\n".join(sys.modules), encoding="utf-8")
        return status

    return noting


def import_noted(path: Path) -> None:
    """Import what a child did, so that those to come need not."""
    for name in path.read_text(encoding="utf-8").splitlines():
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(Exception):  # some are no modules of their own
                importlib.import_module(name)


def run(place: Place, arguments: Sequence[str], before: Callable[[], None] | None = None) -> Ended:
    """Run the command line in a child, to its end."""
    return Child(place, command(arguments), before).wait()


def started_anew(place: Place, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """The command line in a process that starts from nothing: ``subprocess.Popen``, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mtdiffusion_engine.cli", *arguments],
        cwd=place.work,
        env={**os.environ, **place.environment(), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def killed_before(root: Path, number: int) -> Callable[[], None]:
    """For a child: SIGKILL itself right before its ``number``-th operation on files below a folder (from 0)."""

    def before() -> None:
        seen = -1

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if _writes(event, arguments, root):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return before


def counting(root: Path, into: Path) -> Callable[[], None]:
    """For a child: note each operation on files below a folder, as a line in a file elsewhere."""

    def before() -> None:
        lines = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if _writes(event, arguments, root):
                os.write(lines, f"{event}\t{arguments[0]}\n".encode())

        sys.addaudithook(hook)

    return before


def _writes(event: str, arguments: tuple[Any, ...], root: Path) -> bool:
    """Whether an audit event is of something that changes what lies below a folder; TensorBoard's own thread apart."""
    if event == "open":
        flags = arguments[2]
        if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return False
    elif event not in _WRITES:
        return False
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.fsdecode(path)
    return (not os.path.isabs(text) or text.startswith(str(root))) and "tensorboard" not in text  # noqa: PTH117


def limit_file_size(size: int) -> Callable[[], None]:
    """For a child: no file may grow beyond so many bytes."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return before


def as_nobody() -> None:
    """For a child of root: go on as a user who may write nowhere that others have not opened."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
