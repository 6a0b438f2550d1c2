"""An ablation trains what is missing, keeps what is there, and makes its table from the results alone."""

import json
from pathlib import Path

import pytest

from mtdiffusion_benchmarks.ablation import main, tabulate


@pytest.fixture
def spec(tmp_path: Path, tiny_config: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(
        f"""
base = "{tiny_config}"
seeds = [0, 1]
set = ["training.steps=2", "training.checkpoint_every=0", "evaluation.samples=4"]
metrics = ["label|image/accuracy"]

[variants.default]
title = "default"

[variants.literal]
title = "literal"
set = ["process.retention=literal"]

[variants.replacement]
title = "replacement"
trained_as = "default"
set = ["sampling.conditioning=replacement"]
"""
    )
    return path


def test_an_interrupted_ablation_goes_on_and_equals_one_that_was_not(spec: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([str(spec), "--out", str(whole)]) == 0
    assert main([str(spec), "--out", str(parts), "--only", "default", "--seeds", "1"]) == 0
    done = (parts / "cells/default-1.json").stat().st_mtime_ns
    assert main([str(spec), "--out", str(parts)]) == 0
    assert (parts / "cells/default-1.json").stat().st_mtime_ns == done
    assert (parts / "table.md").read_text() == (whole / "table.md").read_text()
    cells = {path.name for path in (whole / "cells").iterdir()}
    assert cells == {f"{name}-{seed}.json" for name in ("default", "literal", "replacement") for seed in (0, 1)}
    literal = json.loads((whole / "cells/literal-0.json").read_text())
    assert literal["config"]["process"]["retention"] == "literal"
    runs = {path.name for path in (whole / "runs").iterdir()}
    assert runs == {"default-0", "default-1", "literal-0", "literal-1"}  # replacement shares the default's models


def test_a_variant_that_is_not_there_is_named(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(spec), "--out", str(tmp_path / "out"), "--only", "litteral"]) == 2
    assert "no variant named 'litteral'; there are default, literal, replacement" in capsys.readouterr().err


def test_the_table_gives_mean_and_spread() -> None:
    cells = [{"title": "a", "metrics": {"x": value}} for value in (1.0, 2.0, 3.0)]
    cells.append({"title": "b", "metrics": {"x": 5.0}})
    assert tabulate([{"title": "a", "metrics": {"b|c": 1}}], ["b|c"]).startswith(r"| variant | seeds | `b\|c` |")
    assert tabulate(cells, ["x"]).splitlines()[2:] == ["| a | 3 | 2.000 ± 1.000 |", "| b | 1 | 5.000 |"]
