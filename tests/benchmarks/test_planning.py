"""``mtdiffusion bench plan``: what it measures, and that `mtdiffusion plan` can go by it."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path

import pytest
from tests.engine.tiny import CONFIG

from mtdiffusion_benchmarks import planning
from mtdiffusion_engine.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_a_plan_by_what_was_measured_says_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large, out = tmp_path / "small.toml", tmp_path / "large.toml", tmp_path / "plan.json"
    small.write_text(CONFIG)
    large.write_text(CONFIG.replace("channels = 8", "channels = 16"))
    arguments = ["bench", "plan", str(small), str(large), "--rounds", "2", "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--set", "training.batch_size=16"]) == 0
    told = capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = result["trainings"]
    assert [*rows] == [str(small), str(large)]
    assert rows[str(large)]["flops"] > rows[str(small)]["flops"]
    for row in rows.values():
        assert len(row["seconds"]) == len(row["attained"]) == result["rounds"] == 2
        assert row["batch_size"] == 16
        assert 0 < statistics.median(row["attained"]) < 2  # of convolutions against products, which are slower or not
        for step, compute, weights, attained, planned in zip(
            *(row[key] for key in ("seconds", "compute", "weights", "attained", "planned")), strict=True
        ):
            assert compute / attained + weights == pytest.approx(step)
            assert (compute / result["assumed"] + weights) / step == pytest.approx(planned)
    command = shlex.split(told.splitlines()[-1].removeprefix("to plan by this: mtdiffusion"))
    assert main([*command, "--set", "training.batch_size=16", "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["rows"]
    share = min(statistics.median(rows[str(small)]["attained"]), 1.0)
    moved = rows[str(small)]["weights"][0] * result["bandwidths"][0]
    for part, seconds in {
        "compute": rows[str(small)]["flops"] / statistics.median(result["rates"]["float32"]) / share,
        "weights": moved / statistics.median(result["bandwidths"]),
        "communication": 0.0,
    }.items():
        assert planned["seconds"][part] == pytest.approx(seconds, rel=0.02)  # options of three digits


def test_the_table_of_the_documentation_is_of_the_result_that_ships() -> None:
    result = json.loads((ROOT / planning.RESULT).read_text())
    assert len(result["trainings"]) >= 2
    assert planning.table(result) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    assert main(["bench", "plan", str(path), "--rounds", "0"]) == 2
    assert "--rounds 0: expected 1 or more" in capsys.readouterr().err
    assert main(["bench", "plan", str(tmp_path / "none.toml"), "--device", "cpu"]) == 2
    assert "none.toml" in capsys.readouterr().err
