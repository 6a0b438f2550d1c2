"""``mtdiffusion bench reliability`` by the real command, a few trials of most faults; the page is of the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def reliability(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one has threads, and cannot be forked."""
    return subprocess.run(
        [sys.executable, "-m", "mtdiffusion_engine.cli", "bench", "reliability", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def tried(out: Path, *arguments: str) -> dict[str, dict[str, object]]:
    done = reliability("--out", str(out), *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, dict[str, object]] = json.loads(out.read_text())["faults"]
    assert {name: row["examples"] for name, row in found.items() if row["lost"]} == {}
    return found


@pytest.mark.slow
def test_nothing_is_lost_in_a_few_trials_and_what_is_tried_is_not_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "reliability.json"
    only = (
        "--only",
        "training: SIGKILL*moments",
        "sampling into shards: SIGKILL before*",
        "codes*",
        "training in two*stopped*",
        "huge*",
        "arg*set",
        "a clock*",
    )
    found = tried(out, "--trials", "3", *only)
    assert {name: row["tried"] for name, row in found.items()} == {
        "training: SIGKILL at random moments": 3,
        "sampling into shards: SIGKILL before operations on files": 1,
        "training in two processes: one is stopped, SIGSTOP": 1,
        "codes, losses, gradients and moments that are not finite": 2,
        "huge, endless and nested files": 11,
        "arguments of --set": 60,
        "a clock that goes back by an hour while a command runs": 1,
    }
    again = reliability("--out", str(out), "--trials", "3", *only)
    assert again.stdout.count("there already") == len(found)


@pytest.mark.long
def test_nothing_is_lost_in_some_trials_of_all_faults(tmp_path: Path) -> None:
    assert len(tried(tmp_path / "reliability.json", "--trials", "5")) > 40


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("--only", "nonsense*"), "no fault matches 'nonsense*'"), (("--trials", "0"), "--trials 0: expected 1 or more")],
)
def test_what_cannot_be_tried_is_refused(arguments: tuple[str, ...], told: str) -> None:
    done = reliability(*arguments)
    assert done.returncode == 2
    assert told in done.stderr


def test_the_page_is_made_of_the_results() -> None:
    from mtdiffusion_benchmarks.reliability import many, topology
    from mtdiffusion_benchmarks.reliability.page import PAGE, RESULT, page

    results = (json.loads((ROOT / path).read_text()) for path in (RESULT, topology.RESULT, many.RESULT))
    assert (ROOT / PAGE).read_text() == page(*results)
