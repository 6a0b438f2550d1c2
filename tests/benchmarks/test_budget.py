"""A control at the joint model's operations or seconds: its steps are chosen, told, and kept."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from attrs import evolve, frozen
from tests.benchmarks.problems import REGISTRY, digits
from tests.benchmarks.test_bench import CONFIG
from torch import Tensor

from mtdiffusion_benchmarks import budget, runner
from mtdiffusion_benchmarks.budget import PROBE_ROUNDS, PROBE_START, PROBE_STEPS, Match, joint_of, match
from mtdiffusion_benchmarks.interfaces import Cost, Fitted, Problem
from mtdiffusion_benchmarks.methods import _training
from mtdiffusion_benchmarks.methods.joint import JointConfig
from mtdiffusion_benchmarks.methods.regression import RegressionConfig
from mtdiffusion_benchmarks.profile import Cell, Profile, load_profile, plan
from mtdiffusion_benchmarks.runner import Runner
from mtdiffusion_benchmarks.stored import expanded
from mtdiffusion_registry import MethodConfig, Query, UserError

PROFILE = """
title = "budgets"
seeds = [0]
figures = 0
[settings.digits]
config = "config.toml"
[tasks."image+label"]
task = { kind = "combination", modalities = ["image", "label"] }
[methods.flops]
method = { kind = "regression", observed = ["image"], target = "label" }
budget = "flops"
[methods.seconds]
method = { kind = "regression", observed = ["image"], target = "label" }
budget = "seconds"
[methods.classifier]
method = { kind = "regression", observed = ["image"], target = "label" }
[methods.joint-flops]
method = { kind = "joint" }
budget = "flops"
[methods.joint]
method = { kind = "joint" }
[methods.joint-readout]
method = { kind = "joint" }
set = ["loss.readout=0.25"]
[[run]]
settings = ["digits"]
tasks = ["image+label"]
methods = ["flops", "seconds", "classifier", "joint"]
"""


def profile_of(folder: Path, text: str = PROFILE) -> tuple[Profile, Path]:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "profile.toml").write_text(text)
    return load_profile(str(folder / "profile.toml"), REGISTRY)


def run(folder: Path, out: Path, *methods: str) -> dict[str, Any]:
    profile, path = profile_of(folder)
    cells = [cell for cell in plan(profile) if cell.method in methods]
    Runner(profile, path.parent, out, REGISTRY, say=lambda _: None).run(cells)
    made = [expanded(json.loads(path.read_text())) for path in (out / "cells").glob("*.json")]
    return {cell["method"]: cell for cell in made}


class Costing(Fitted):
    """Nothing but a cost."""

    curve: list[dict[str, float]] = []  # noqa: RUF012

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    def answers(self, query: Query) -> bool:
        return False

    def generate(
        self, query: Query, x: Mapping[str, Tensor], visible: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        raise AssertionError


@frozen
class Foreign(MethodConfig):
    """A third party's method, which knows of no budget; starting takes 30 seconds and a step what it is told to."""

    kind: ClassVar[str] = "foreign"
    asked: ClassVar[list[tuple[str, int, Path]]] = []
    name: str = "own"
    flops: int = 100
    seconds: tuple[float, ...] = (1.0,)

    def fit(self, problem: Problem) -> Fitted:
        assert not problem.folder.exists()
        steps = problem.experiment.training.steps
        mine = [folder for name, _, folder in self.asked if name == self.name]
        self.asked.append((self.name, steps, problem.folder))
        each = self.seconds[len(mine) // 2 % len(self.seconds)]
        return Costing(Cost(steps, 1, 1, 30 + each * steps, self.flops))


@pytest.fixture(autouse=True)
def _forget() -> None:
    Foreign.asked.clear()


def matched(kind: budget.Budget, own: MethodConfig, joint: MethodConfig, folder: Path) -> Match:
    problem = digits(folder / "own", "training.steps=300")
    return match(kind, own, problem, joint, evolve(problem, folder=folder / "joint"), "joint", folder / "scratch")


@pytest.mark.parametrize(("flops", "steps"), [(100, 600), (200, 300), (70, 857), (1_000_000, 1)])
def test_steps_cost_the_same_operations(tmp_path: Path, flops: int, steps: int) -> None:
    found = matched("flops", Foreign(flops=flops), Foreign("joint", 200), tmp_path)
    assert found == Match("flops", "joint", 300, 200, flops, steps)
    assert [(name, asked) for name, asked, _ in Foreign.asked] == [("joint", 1), ("own", 1)]


def test_seconds_are_medians_of_turns_after_a_warm_up(tmp_path: Path) -> None:
    own = Foreign(seconds=(90.0, 1.0, 5.0, 2.0, 2.0, 3.0))  # the first is not counted: the median of the rest is 2
    joint = Foreign("joint", seconds=(70.0, 4.0, 6.0, 5.0, 9.0, 1.0))  # 5
    found = matched("seconds", own, joint, tmp_path)
    assert found == Match("seconds", "joint", 300, 5.0, 2.0, 750)
    assert [name for name, _, _ in Foreign.asked] == ["joint", "joint", "own", "own"] * (1 + PROBE_ROUNDS)
    assert [steps for _, steps, _ in Foreign.asked[:2]] == [PROBE_START, PROBE_START + PROBE_STEPS]


def test_real_methods_are_matched_the_same_every_time(tmp_path: Path) -> None:
    def of(folder: Path) -> Match:
        return matched("flops", RegressionConfig("label", ("image",)), JointConfig(), folder)

    found = of(tmp_path / "a")
    assert found == of(tmp_path / "b")
    assert found.steps > 300  # the way up of the U-Net gets no gradient in a classifier
    assert abs(found.steps * found.per_step - 300 * found.joint_per_step) <= found.per_step / 2


def test_a_method_that_tells_no_cost_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method foreign: budget: it tells no flops of a step"):
        matched("flops", Foreign(flops=0), Foreign("joint"), tmp_path)
    with pytest.raises(UserError, match="it tells no seconds of a step"):
        matched("seconds", Foreign(), Foreign("joint", seconds=(0.0,)), tmp_path)


def test_a_cell_tells_its_steps_and_what_they_were_matched_to(tmp_path: Path) -> None:
    made = run(tmp_path / "source", tmp_path / "out", "flops", "classifier", "joint")
    cost, joint = made["flops"]["cost"], made["joint"]["cost"]
    assert cost["budget"] == "flops"
    assert cost["matched"] == {
        "budget": "flops",
        "joint": "joint",
        "joint_steps": 6,
        "joint_per_step": joint["flops_per_step"],
        "per_step": made["classifier"]["cost"]["flops_per_step"],
        "steps": cost["steps"],
    }
    assert cost["steps"] == round(6 * joint["flops_per_step"] / cost["flops_per_step"]) > 6
    assert made["flops"]["curve"][-1]["step"] == cost["steps"]
    for plain in ("classifier", "joint"):
        assert (made[plain]["cost"]["budget"], made[plain]["cost"]["matched"]) == ("steps", None)
        assert "budget" not in made[plain]["config"]  # results of before keep their fingerprints
    assert made["flops"]["config"]["budget"]["joint"]["method"] == {"kind": "joint"}
    assert made["flops"]["fingerprint"] != made["classifier"]["fingerprint"]
    assert list((tmp_path / "out" / "runs").iterdir()) == []
    told = json.loads((tmp_path / "out" / "profile.json").read_text())["methods"]
    assert (told["flops"]["budget"], told["joint"]["budget"]) == ("flops", "steps")


def test_an_interrupted_cell_keeps_the_steps_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = iter((9, 5))
    monkeypatch.setattr(runner, "match", lambda *_: Match("seconds", "joint", 6, 3.0, 2.0, next(chosen)))
    real = _training._gradient

    def stops(*args: Any) -> object:
        if args[-1] == 7:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(_training, "_gradient", stops)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "source", tmp_path / "out", "seconds")
    found = run(tmp_path / "source", tmp_path / "out", "seconds")["seconds"]
    assert found["status"] == "ok", found["reason"]
    assert found["cost"]["steps"] == found["cost"]["matched"]["steps"] == 9
    assert next(chosen) == 5  # measured once
    assert list((tmp_path / "out" / "runs").iterdir()) == []


def test_the_joint_model_is_the_first_at_its_own_steps_that_is_run_on_the_task(tmp_path: Path) -> None:
    profile, _ = profile_of(tmp_path)
    cell = Cell("digits", "image+label", "flops", 3)
    assert joint_of(profile, cell) == Cell("digits", "image+label", "joint", 3)
    last = PROFILE.replace('"classifier", "joint"]', '"joint-flops", "joint-readout"]')
    assert joint_of(profile_of(tmp_path, last)[0], cell).method == "joint-readout"


def test_a_budget_without_a_joint_model_is_said_at_once(tmp_path: Path) -> None:
    profile, path = profile_of(tmp_path / "source", PROFILE.replace(', "joint"]', "]"))
    with pytest.raises(UserError, match="digits/image\\+label/flops/0: budget: flops is that of a joint model"):
        Runner(profile, path.parent, tmp_path / "out", REGISTRY, say=lambda _: None).run(plan(profile))
    assert not (tmp_path / "out" / "cells").exists()


def test_another_budget_is_another_configuration(tmp_path: Path) -> None:
    run(tmp_path / "source", tmp_path / "out", "classifier")
    text = PROFILE.replace(
        'target = "label" }\n[methods.joint-flops]', 'target = "label" }\nbudget = "flops"\n[methods.joint-flops]'
    )
    assert tomllib.loads(text)["methods"]["classifier"]["budget"] == "flops"
    profile, path = profile_of(tmp_path / "source", text)
    cells = [cell for cell in plan(profile) if cell.method == "classifier"]
    with pytest.raises(UserError, match="another configuration"):
        Runner(profile, path.parent, tmp_path / "out", REGISTRY, say=lambda _: None).run(cells)
    with pytest.raises(UserError, match="budget"):
        profile_of(tmp_path / "source", PROFILE.replace('"seconds"\n', '"minutes"\n'))
