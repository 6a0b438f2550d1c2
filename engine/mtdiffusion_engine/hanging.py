"""Several processes that wait for one another, one of which hangs: the others end, and say which it is.

Each process notes where it is, which costs an assignment. A thread of it tells the others now and then, in the store in
which they have met. Where the others are is looked at only by a process that has waited for long.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Self

from torch.distributed import distributed_c10d

BEATS = 20
"""How often a process is heard of within the timeout."""


class Place(NamedTuple):
    """Where a process is.

    Attributes:
        arrivals: how many times it came to where all wait for one another.
        patient: whether it may stay here for as long as it likes, so long as it is heard of.
        what: for people.
    """

    arrivals: int = 0
    patient: bool = True
    what: str = "the start"


class HangWatch:
    """While it is entered, this process ends with status 2 if another lets it wait for too long: one that is no longer
    heard of (it was stopped, or its machine is gone), or one that stays where it is while others have gone on (a read
    that does not return). One of those that wait says on the standard error which it is.

    It ends by itself, without cleaning up, since whatever waits cannot be woken; so do NCCL's timeouts. All processes
    enter and leave it alike. It does nothing for one process.

    Args:
        rank, world: which of how many processes this is.
        timeout: seconds to wait for another process.
        remedy: how to go on, in sentences.
    """

    _entered: ClassVar[int] = 0

    def __init__(
        self, rank: int = 0, world: int = 1, timeout: float = float("inf"), remedy: Callable[[], str] = str
    ) -> None:
        self._rank, self._world, self._timeout, self._remedy = rank, world, timeout, remedy
        self._left: threading.Event | None = None
        self._place, self._since = Place(), time.monotonic()

    def at(self, what: str, *, waits: bool = False, patient: bool = False) -> None:
        """Note where this process is.

        Args:
            what: for people, as "step 3, reading its samples".
            waits: whether this is where all processes wait for one another; each comes there as often as the others.
            patient: whether it may take as long as it likes.
        """
        self._place = Place(self._place.arrivals + waits, patient, what)
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        if self._world > 1:
            HangWatch._entered += 1
            store = distributed_c10d._get_default_store().clone()  # its own connection: another's call may block
            self._store = distributed_c10d.PrefixStore(f"mtdiffusion/{HangWatch._entered}", store)
            self._places: dict[int, tuple[str, float]] = {}  # of each process, what was heard last, and since when
            self._place = Place()
            self._told = self._since = time.monotonic()
            self._left, self._done = threading.Event(), False
            self._threads = [
                threading.Thread(target=work, args=(self._left,), daemon=True, name="hang watch")
                for work in (self._tell, self._watch)
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._left is not None:
            self._done = kind is None  # one that failed is missed by the others
            self._left.set()
            for thread in self._threads:
                thread.join(1.0)
            self._left = None

    def _tell(self, left: threading.Event) -> None:
        """Tell where this process is; if it waits for long, look where the others are; if one has spoken, end."""
        beat = 0
        try:
            while not left.wait(self._timeout / BEATS):
                beat += 1
                self._store.set(str(self._rank), json.dumps([beat, *self._place]))
                if self._store.check(["spoken"]):
                    if not left.wait(self._timeout / BEATS):  # the one that speaks ends first
                        os._exit(2)
                    break
                self._places = self._look() if self._waited() > self._timeout / 2 else {}
                self._told = time.monotonic()
            if self._done:
                self._store.set(str(self._rank), "")  # it is not waited for
        except RuntimeError:  # the store is gone, and with it the process that held it: the connections tell
            return

    def _look(self) -> dict[int, tuple[str, float]]:
        there = [rank for rank in range(self._world) if self._store.check([str(rank)])]
        heard = dict(zip(there, self._store.multi_get([str(rank) for rank in there]), strict=True)) if there else {}
        said = {rank: heard[rank].decode() if rank in heard else "null" for rank in range(self._world)}
        before, now = self._places, time.monotonic()
        return {
            rank: before[rank] if rank in before and before[rank][0] == text else (text, now)
            for rank, text in said.items()
        }

    def _waited(self) -> float:
        return time.monotonic() - self._since

    def _watch(self, left: threading.Event) -> None:
        while not left.wait(self._timeout / BEATS):
            if self._place.patient or self._waited() < self._timeout:
                continue
            unanswered = time.monotonic() - self._told > self._timeout / 2
            text = "" if unanswered else _verdict(self._rank, self._places, self._timeout / 3)
            if unanswered:
                text = (
                    "not heard of any more: rank 0, or what started the processes, whichever holds the store at "
                    f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                )
            if text:
                self._end(text, speaks=unanswered or self._store.add("spoken", 1) == 1, left=left)

    def _end(self, text: str, speaks: bool, left: threading.Event) -> None:
        if not speaks:
            left.wait(2 * self._timeout / BEATS)
        elif not left.is_set():
            print(
                f"mtdiffusion: error: {text}. Rank {self._rank} has waited for {self._timeout:g} s (training.timeout), "
                f"at {self._place.what}; all processes end. {self._remedy()}",
                file=sys.stderr,
                flush=True,
            )
        if not left.is_set():
            os._exit(2)


def _verdict(own: int, places: Mapping[int, tuple[str, float]], silence: float) -> str:
    """Which processes let a process wait, in a sentence without its end; empty if it cannot be said, or none does.

    Args:
        own: the rank of the one that waits.
        places: what was heard of each, and since when it is the same.
        silence: seconds after which one that says nothing new is no longer heard of.
    """
    now = time.monotonic()
    found = {rank: json.loads(said) for rank, (said, _) in places.items() if said}
    silent = [rank for rank in found if rank != own and now - places[rank][1] > silence]
    last = {
        rank: f"rank {rank}, last heard of at {each[3]}" if each else f"rank {rank}" for rank, each in found.items()
    }
    if silent:
        return f"not heard of any more: {'; '.join(last[rank] for rank in silent)} (of {len(places)} processes)"
    heard = {rank: Place(*each[1:]) for rank, each in found.items() if each}
    if len(heard) < 2 or own not in heard:
        return ""
    least = min(place.arrivals for place in heard.values())
    behind = [rank for rank, place in heard.items() if place.arrivals == least]
    if any(heard[rank].patient for rank in behind) or (own in behind and len(behind) < len(heard)):
        return ""
    if len(behind) == len(heard):
        where = "; ".join(last.values())
        return f"none of {len(places)} processes gets on, and none is behind the others ({where}): see the network"
    return f"alive, but not getting on: {'; '.join(last[rank] for rank in behind)} (of {len(places)} processes)"
