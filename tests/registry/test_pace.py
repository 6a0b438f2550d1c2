"""How far long work is: said now and then, with the time that is left."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from mtdiffusion_registry.pace import Pace, Step, by_step, how_far


def test_what_was_done_before_counts_and_tells_nothing_of_the_pace() -> None:
    said: list[str] = []
    pace = Pace("training", 100, said.append, before=96, every=0)
    time.sleep(0.6)
    pace.tell(96)  # nothing is done yet
    pace.tell(97)  # three to go, of 0.6 s each
    pace.tell(100)  # there is nothing left to tell
    (line,) = said
    assert line.startswith("training: 97 of 100, 0:") and line.endswith(" left")
    assert int(line.removesuffix(" left")[-2:]) >= 2


def test_an_item_under_way_counts_by_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    said: list[str] = []
    pace = Pace("sampling", 16, said.append)
    on_step = by_step(pace.tell, 0, 16)
    for step in range(10):  # a second each
        now = float(step)
        on_step(step, 10, {})
    now = 10.0
    pace.tell(16)
    assert said == ["sampling: 16 samples at step 6 of 10, 0:04 left"]


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (None, "9 of 1,600"),
        (Step(0, 1600, 3, 25), "1,600 samples at step 3 of 25"),
        (Step(1500, 100, 3, 25), "samples 1,501 to 1,600 of 1,600 at step 3 of 25"),
        (Step(8, 1, 3, 25), "sample 9 of 1,600 at step 3 of 25"),
    ],
)
def test_what_is_under_way_is_told_as_one_thought(at: Step | None, told: str) -> None:
    assert how_far(9.5, 1600, at) == told
    assert how_far(0.5, 1, Step(0, 1, 3, 25), "block") == "1 block at step 3 of 25"


def test_what_is_quick_says_nothing() -> None:
    said: list[str] = []
    pace = Pace("sampling", 3, said.append)
    for done in range(1, 4):
        pace.tell(done)
    assert said == []


def test_lines_become_fewer_as_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    at: list[float] = []
    pace = Pace("reading", 4 * 3600, lambda _: at.append(now))
    for second in range(1, 4 * 3600):
        now = float(second)
        pace.tell(second)
    gaps = [later - earlier for earlier, later in pairwise([0.0, *at])]
    assert gaps[:5] == [6.0] * 5  # just over five seconds
    assert sum(moment <= 600 for moment in at) < 30
    assert all(earlier <= later for earlier, later in pairwise(gaps))
    assert gaps[-1] == 61.0  # just over a minute
