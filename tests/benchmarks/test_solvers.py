"""The comparison of solvers measures what ``evaluate`` measures, goes on where it stopped, and draws the right end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtdiffusion import sample
from mtdiffusion_benchmarks import solvers
from mtdiffusion_benchmarks.solvers import Way
from mtdiffusion_engine import load_run
from mtdiffusion_engine.checkpoint import read_json
from mtdiffusion_engine.cli import main
from mtdiffusion_registry import UserError

KEYS = ("label|image/accuracy", "image|label/mse")


def result(**figures: list[float]) -> dict[str, Any]:
    """A result of one figure, ``d``, better lower: by SOLVER_STEPS, a value a seed."""
    rows = []
    for name, values in figures.items():
        solver, _, steps = name.rpartition("_")
        each = {"solver": solver, "eta": 1.0 if solver == "ancestral" else 0.0, "steps": int(steps)}
        rows += [{**each, "seed": seed, "metrics": {"joint/d": value}} for seed, value in enumerate(values)]
    reference = {"solver": "ancestral", "eta": 1.0, "steps": 100}
    return {"rows": rows, "reference": reference, "keys": ["joint/d"], "directions": {"joint/d": "lower"}}


def test_the_cheapest_is_of_the_fewest_evaluations_that_are_as_good() -> None:
    found = result(ancestral_100=[9.0, 11.0], ddim_8=[10.6, 10.6], ddim_16=[10.4, 10.5], ancestral_16=[9.0, 9.0])
    assert solvers.cheapest(found) == {"joint/d": Way("ancestral", 1.0, 16)}, "of equally many, the better"
    assert solvers.verdict(found) == "joint/d: 16 evaluations of ancestral are as good as 100 of ancestral"
    lines = solvers.table(found).splitlines()
    assert lines[0] == "| solver | evaluations | `joint/d` ↓ |"
    assert lines[2] == "| ancestral | 100 | 10 ± 1 |"
    assert lines[3:] == [
        "| ancestral | 16 | **9 ± 0** |",
        "| ddim, eta 0 | 8 | 10.6 ± 0 |",
        "| ddim, eta 0 | 16 | **10.4 ± 0.05** |",
    ]


def test_where_nothing_is_as_good_it_is_said() -> None:
    found = result(ancestral_100=[10.0], ddim_8=[12.0])
    assert solvers.cheapest(found) == {"joint/d": None}
    assert solvers.verdict(found) == "joint/d: nothing that was tried is as good as 100 of ancestral"


def test_a_figure_that_is_better_higher_is_as_good_within_two_hundredths() -> None:
    assert solvers.good_enough(0.981, 1.0, "higher")
    assert not solvers.good_enough(0.979, 1.0, "higher")
    assert solvers.good_enough(1.049, 1.0, "lower")
    assert not solvers.good_enough(1.051, 1.0, "lower")


def test_the_figures_are_those_of_evaluate(tiny_run: Path) -> None:
    from mtdiffusion_engine.evaluation import evaluate_run

    overrides = ["sampling.solver=dpmpp_2m", "sampling.eta=1.0", "evaluation.steps=3", "evaluation.samples=20"]
    overrides += [f"evaluation.conditionals=[{', '.join(repr(key.partition('/')[0]) for key in KEYS)}]"]
    expected = evaluate_run(load_run(tiny_run, overrides=overrides))
    ways = [Way("ancestral", 1.0, 5), Way("dpmpp_2m", 1.0, 3)]
    found = solvers.Comparison(load_run(tiny_run), KEYS, ways, samples=20, seeds=1, say=lambda _: None).measure()
    assert [row["metrics"] for row in found["rows"] if row["solver"] == "dpmpp_2m"] == [
        {key: expected[key] for key in KEYS}
    ]
    assert found["samples"] == 20
    assert found["directions"] == {"label|image/accuracy": "higher", "image|label/mse": "lower"}


def test_a_second_call_goes_on_with_what_is_there(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "solvers.json"
    command = ["bench", "solvers", str(tiny_run), "--metric", *KEYS, "--samples", "16", "--reference", "4"]
    command += ["--solver", "ancestral", "ddim=2", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--steps", "2", "--seeds", "1"]) == 0
    first = read_json(out)["rows"]
    assert [(row["solver"], row["eta"], row["steps"]) for row in first] == [
        ("ancestral", 1.0, 4),
        ("ancestral", 1.0, 2),
        ("ddim", 2.0, 2),
    ]
    told = capsys.readouterr().out
    assert "| ddim, eta 2 | 2 |" in told
    assert "image|label/mse: " in told

    asked: list[object] = []
    evaluate = solvers.evaluate
    monkeypatch.setattr(solvers, "evaluate", lambda *args, **kw: asked.append(kw["seed"]) or evaluate(*args, **kw))
    assert main([*command, "--steps", "2", "3", "--seeds", "2", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == read_json(out) and said.err  # the progress
    assert asked == [1, 1, 0, 1, 1, 0, 1], "a seed more of three ways, and two of each new one"
    assert [row for row in read_json(out)["rows"] if row in first] == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "joint/fdi", "--steps", "2"], "--metric joint/fdi: expected a figure of which it is known"),
        (["--metric", "image|mask+label/accuracy"], "--metric image|mask+label/accuracy: this run has no such figure"),
        (["--metric", "image|nothing/mse"], '"image|nothing"'),
        (["--solver", "euler"], "--solver euler: 'solver' must be in ('ancestral', 'ddim', 'dpmpp_2m')"),
        (["--solver", "ancestral=2"], "--solver ancestral=2: eta: 2.0 is a setting of the solvers ddim and dpmpp_2m"),
        (["--solver", "ddim=much"], "--solver ddim=much: could not convert"),
        (
            ["--guidance", "2@0.8"],
            "--guidance 2@0.8: could not convert string to float: ''; expected a number, 1 for none",
        ),
        (["--guidance", "2@0.8-0.2"], "--guidance 2@0.8-0.2: 'guidance_interval': expected two shares of the path"),
        (["--guidance", "-1"], "--guidance -1: 'guidance' must be >= 0"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    if "--metric" not in options:
        options = ["--metric", "image|label/mse", *options]
    options += ["--reference", "2", "--samples", "8", "--device", "cpu"]
    assert main(["bench", "solvers", str(tiny_run), *options]) != 0
    assert message in capsys.readouterr().err


def test_what_guidance_costs_is_counted(tiny_run: Path) -> None:
    """By the evaluations that the sampler makes of its network, half of each batch of them where there is guidance."""
    run = load_run(tiny_run)
    asked: list[int] = []
    run.model.backbone.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    for text in ("1", "3", "3@0.2-0.8", "3@0.29-1", "3@0-0.5"):
        for steps in (5, 8):
            way = solvers.way("ddim", steps, solvers.guidance(text))
            asked.clear()
            sample(run.model, 2, observed={"label": torch.tensor([0, 1])}, settings=way.settings(run.settings()))
            assert way.evaluations == sum(asked) / 2, (text, steps)


def test_guidance_is_compared(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "solvers.json"
    command = ["bench", "solvers", str(tiny_run), "--metric", "image|label/mse", "--samples", "8", "--seeds", "1"]
    command += ["--solver", "dpmpp_2m", "--steps", "4", "--reference", "8", "--guidance", "2", "2@0.25-0.75"]
    assert main([*command, "--device", "cpu", "--out", str(out)]) == 0
    lines = capsys.readouterr().out
    assert "| ancestral, guidance 2 | 16 |" in lines
    assert "| dpmpp_2m, eta 1.4, guidance 2 | 8 |" in lines
    assert "| dpmpp_2m, eta 1.4, guidance 2 from 0.25 to 0.75 | 6 |" in lines
    found = [row["metrics"] for row in read_json(out)["rows"]]
    assert len({tuple(metrics.values()) for metrics in found}) == 3


def test_a_way_is_read() -> None:
    assert solvers.way("dpmpp_2m", 8) == Way("dpmpp_2m", 1.4, 8)
    assert solvers.way("ddim", 8, solvers.guidance("2@0.2-0.8")) == Way("ddim", 0.0, 8, 2.0, 0.2, 0.8)
    assert solvers.way("dpmpp_2m=1", 8) == Way("dpmpp_2m", 1.0, 8)
    assert solvers.way("ancestral", 8) == Way("ancestral", 1.0, 8)
    with pytest.raises(UserError):
        solvers.way("dpmpp_2m=-1", 8)
