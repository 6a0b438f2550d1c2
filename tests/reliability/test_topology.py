"""``mtdiffusion bench topology`` by the real command, on one process and two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtdiffusion_benchmarks.reliability import many
from mtdiffusion_benchmarks.reliability.page import page
from mtdiffusion_benchmarks.reliability.topology import FILES, LOGGED, RESULT, WANTED, topologies

ROOT = Path(__file__).parents[2]
QUANTITIES = (*FILES, LOGGED)


@pytest.mark.long
def test_any_of_one_and_two_processes_go_on_with_what_any_has_begun(tmp_path: Path) -> None:
    out = tmp_path / "topology.json"
    done = subprocess.run(
        [sys.executable, "-m", "mtdiffusion_engine.cli", "bench", "topology", "--processes", "2", "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    ways = [str(each) for each in topologies((1, 2))]
    assert len(ways) == 6
    assert [row["ended"] for row in rows if not row["resumed"]] == ways
    pairs = {(row["begun"], row["ended"]) for row in rows if row["resumed"]}
    assert pairs == {(begun, ended) for begun in ways for ended in ways}
    assert all(row[what] < WANTED for row in rows for what in QUANTITIES)
    # Two processes sum in another order: what is compared is not one and the same.
    assert any(row["weights"] > 0 for row in rows)


def test_the_result_that_ships_is_of_all_pairs_and_what_is_wanted() -> None:
    result = json.loads((ROOT / RESULT).read_text())
    ways = [row["ended"] for row in result["rows"] if not row["resumed"]]
    assert set(ways) >= {str(each) for each in topologies((1, 2))}
    pairs = [(row["begun"], row["ended"]) for row in result["rows"] if row["resumed"]]
    assert sorted(pairs) == sorted((begun, ended) for begun in ways for ended in ways)
    assert all(row[what] < result["wanted"] == WANTED for row in result["rows"] for what in QUANTITIES)


def test_the_page_says_what_is_too_far_apart() -> None:
    reliability = json.loads((ROOT / "benchmarks/results/reliability.json").read_text())
    result = json.loads((ROOT / RESULT).read_text())
    samples = json.loads((ROOT / many.RESULT).read_text())
    assert "below 1e-10" in page(reliability, result, samples)
    result["rows"][-1]["moments"] = 1e-3
    assert "The greatest difference is 1.0e-03, more than is wanted" in page(reliability, result, samples)
