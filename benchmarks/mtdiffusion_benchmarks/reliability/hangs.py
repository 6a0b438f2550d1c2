"""Two processes that train, draw or measure together, one of which is stopped or killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtdiffusion_benchmarks.reliability.children import LIMIT, Child, Ended, command
from mtdiffusion_benchmarks.reliability.jobs import Bench, Job, difference, to_its_end
from mtdiffusion_benchmarks.reliability.kills import Wrong
from mtdiffusion_registry import UserError

TIMEOUT = 10
"""``training.timeout``, in seconds."""
WORLD = 2


def stopped(bench: Bench, job: Job, trials: int, rng: random.Random) -> Wrong:
    """SIGSTOP to one of them at a random moment after they have met: the other ends, and names it."""
    return _tried(bench, job, trials, rng, signal.SIGSTOP)


def killed(bench: Bench, job: Job, trials: int, rng: random.Random) -> Wrong:
    """SIGKILL to one of them at a random moment after they have met: the other ends with a sentence."""
    return _tried(bench, job, trials, rng, signal.SIGKILL)


def _tried(bench: Bench, job: Job, trials: int, rng: random.Random, number: signal.Signals) -> Wrong:
    bench.empty()
    to_its_end(bench, job)  # imports what the others then need not
    for _ in range(2):
        bench.empty()
        ends, seconds = _together(bench, job, lambda _: None)
        if any(ended.status for ended in ends):
            raise UserError(
                f"reliability: {job.name} in {WORLD} processes failed without a fault: {ends[0].said[-500:]}"
            )
    expected = bench.found()
    for _ in range(trials):
        bench.empty()
        rank, moment = rng.randrange(WORLD), rng.uniform(0, seconds)

        def hurt(children: list[Child], rank: int = rank, moment: float = moment) -> None:
            children[rank].ended_within(moment)
            children[rank].send(number)

        ends, _ = _together(bench, job, hurt, waits=1 - rank)
        other, when = ends[1 - rank], f"{number.name} to rank {rank}, {moment:.2f} s after they had met"
        wrong = other.wrong(0, 2)  # 0: it had got all that it needs of the other
        if not wrong and other.status and number == signal.SIGSTOP and f"rank {rank}" not in other.said:
            wrong = f"rank {rank} is not named: {other.said[-300:]}"
        if not wrong:
            again, _ = _together(bench, job, lambda _: None)
            wrong = next((said for said in (ended.wrong(0) for ended in again) if said), "")
            wrong = wrong or difference(bench.found(), expected)
        yield f"{when}: {wrong}" if wrong else ""


def _together(
    bench: Bench, job: Job, hurt: Callable[[list[Child]], object], waits: int = 0
) -> tuple[list[Ended], float]:
    """Run a job in several processes, as a launcher would; how they end, and the seconds since they had met.

    Args:
        hurt: is given them when they have met.
        waits: whose end is waited for; those that have not ended by then are killed, as a launcher would.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (*job.arguments, "--set", f"training.timeout={TIMEOUT}")
    met = [bench.given.parent / f"met-{rank}" for rank in range(WORLD)]
    for path in met:
        path.unlink(missing_ok=True)
    children = [Child(bench.place, command(arguments), _as_rank(rank, port, met[rank])) for rank in range(WORLD)]
    until = time.monotonic() + LIMIT
    while not all(path.exists() for path in met) and time.monotonic() < until:
        if any(child.ended_within(0.005) for child in children):
            break
    started = time.monotonic()
    hurt(children)
    first = children[waits].wait()
    seconds = time.monotonic() - started
    ends = []
    for child in children:
        if child is children[waits]:
            ends.append(first)
        else:
            if not child.ended_within(0 if first.status else LIMIT):
                child.kill()
            ends.append(child.wait())
    return ends, seconds


def _as_rank(rank: int, port: int, met: Path) -> Callable[[], None]:
    """For a child: be one of several processes, and make a file when they have met."""

    def before() -> None:
        meet: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in meet.items()} | {"MASTER_ADDR": "127.0.0.1"})
        from mtdiffusion_engine.hanging import HangWatch

        enter = HangWatch.__enter__

        def entered(watch: HangWatch) -> HangWatch:
            met.touch()
            return enter(watch)

        HangWatch.__enter__ = entered  # type: ignore[method-assign, assignment]

    return before
