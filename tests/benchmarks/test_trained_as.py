"""One trained model, sampled in several ways: trained once, whatever the order, and kept until all are done."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from tests.benchmarks.problems import REGISTRY
from tests.benchmarks.test_bench import CONFIG

from mtdiffusion_benchmarks.profile import Profile, load_profile, plan
from mtdiffusion_benchmarks.report import build_report
from mtdiffusion_benchmarks.report.tables import read_results
from mtdiffusion_benchmarks.runner import Runner
from mtdiffusion_benchmarks.stored import expanded
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import UserError

PROFILE = """
title = "sampled in several ways"
seeds = [0]
figures = 0
bound = true
set = ["evaluation.bound_times=3"]
[settings.digits]
config = "config.toml"
[tasks."image+label"]
task = { kind = "combination", modalities = ["image", "label"] }
[methods.joint]
method = { kind = "joint" }
set = ["process.retention=literal"]
[methods.joint-more]
method = { kind = "joint" }
trained_as = "joint"
set = ["sampling.steps=5", "evaluation.steps=4"]
[methods.joint-same]
method = { kind = "joint" }
trained_as = "joint"
[methods.classifier]
method = { kind = "regression", observed = ["image"], target = "label" }
budget = "flops"
[methods.classifier-draws]
method = { kind = "regression", observed = ["image"], target = "label" }
trained_as = "classifier"
set = ["sampling.draw=true"]
[methods.replacement]
method = { kind = "replacement" }
trained_as = "joint"
[[run]]
settings = ["digits"]
tasks = ["image+label"]
methods = ["joint", "joint-more", "joint-same", "classifier", "classifier-draws"]
"""


def profile_of(folder: Path, text: str = PROFILE) -> tuple[Profile, Path]:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "profile.toml").write_text(text)
    return load_profile(str(folder / "profile.toml"), REGISTRY)


def run(folder: Path, out: Path, *methods: str, text: str = PROFILE) -> dict[str, dict[str, Any]]:
    profile, path = profile_of(folder, text)
    cells = {cell.method: cell for cell in plan(profile)}
    chosen = [cells[name] for name in methods or cells]
    runner = Runner(profile, path.parent, out, REGISTRY, say=lambda _: None)
    runner.states = runner.run(chosen)  # type: ignore[attr-defined]
    made = [expanded(json.loads(path.read_text())) for path in (out / "cells").glob("*.json")]
    return {cell["method"]: cell for cell in made}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The run folders of trainings that took a step."""
    took: list[Path] = []
    real = Trainer.advance

    def noted(self: Trainer, *args: Any) -> Any:
        if self.run not in took:
            took.append(self.run)
        return real(self, *args)

    monkeypatch.setattr(Trainer, "advance", noted)
    return took


def asked(cell: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in cell["metrics"].items() if not key.startswith("real/")}


def test_a_model_is_trained_once_and_sampled_in_several_ways(tmp_path: Path, trainings: list[Path]) -> None:
    out = tmp_path / "out"
    made = run(tmp_path / "source", out)
    assert {cell["status"] for cell in made.values()} == {"ok"}
    assert trainings[0] == out / "runs" / "digits__image+label__joint__0"
    # Beside it only the joint model's one step that the classifier's operations are matched to.
    assert [folder.parent.name for folder in trainings[1:]] == ["digits__image+label__classifier__0.probe"]
    assert made["joint-same"]["metrics"] == made["joint"]["metrics"]
    assert asked(made["joint-more"]) != asked(made["joint"])
    assert made["joint-more"]["config"]["experiment"]["process"]["retention"] == "literal"
    assert made["joint-more"]["config"]["experiment"]["sampling"]["steps"] == 5
    assert made["joint"]["curve"] == made["joint-more"]["curve"]
    assert [made[name]["cost"]["trained_as"] for name in ("joint", "joint-more")] == [None, "joint"]
    assert made["classifier-draws"]["cost"]["matched"] == made["classifier"]["cost"]["matched"] is not None
    assert made["classifier-draws"]["cost"]["budget"] == "flops"
    assert len({cell["fingerprint"] for cell in made.values()}) == 5
    assert list((out / "runs").iterdir()) == []
    # The bound is the model's, however it is sampled; a regression has none.
    bound = made["joint"]["metrics"]["joint/bound_bits_per_dim"]
    assert made["joint-more"]["metrics"]["joint/bound_bits_per_dim"] == bound > 0
    assert "joint/bound_bits_per_dim" not in made["classifier"]["metrics"]
    page, document = (path.read_text(encoding="utf-8") for path in build_report(out))
    assert "the model of joint" in page and "the model of classifier" in document
    assert {group.budget for group in read_results(out).groups if "classifier" in group.method} == {"flops"}


def test_the_order_does_not_matter(tmp_path: Path, trainings: list[Path]) -> None:
    first = run(tmp_path / "source", tmp_path / "a", "joint", "joint-more")
    trainings.clear()
    second = run(tmp_path / "source", tmp_path / "b", "joint-more", "joint")
    assert trainings == [tmp_path / "b" / "runs" / "digits__image+label__joint__0"]
    assert {name: cell["metrics"] for name, cell in first.items()} == {n: c["metrics"] for n, c in second.items()}
    # Asked for alone later, when the model is gone, it is trained again, and is the same.
    alone = run(tmp_path / "source", tmp_path / "c", "joint")
    assert list((tmp_path / "c" / "runs").iterdir()) == []
    alone = run(tmp_path / "source", tmp_path / "c", "joint-more")
    assert alone["joint-more"]["metrics"] == first["joint-more"]["metrics"]
    assert list((tmp_path / "c" / "runs").iterdir()) == []


def test_two_processes_never_work_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    lock = out / "locks" / "digits__image+label__joint__0.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(tmp_path / "source", out, "joint-more") == {}
    assert set(run(tmp_path / "source", out, "joint-more")) == {"joint-more"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"sampling.steps=5"', '"training.steps=5"', r"methods\.joint-more\.set: expected keys under sampling"),
        ('"sampling.steps=5"', '"loss.l1=1.0"', "found 'loss.l1=1.0'"),
        ('trained_as = "joint"\nset', 'trained_as = "jiont"\nset', "joint-more.trained_as: .*found 'jiont'"),
        ('trained_as = "joint"\nset', 'trained_as = "joint-same"\nset', "there are joint, classifier"),
        ('trained_as = "joint"\nset', 'trained_as = "joint"\nbudget = "flops"\nset', "that of joint, whose trained"),
    ],
)
def test_what_is_no_other_sampling_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert PROFILE.count(old) == 1
    with pytest.raises(UserError, match=told):
        profile_of(tmp_path, PROFILE.replace(old, new))


def test_a_method_that_would_train_otherwise_fails_its_cell(tmp_path: Path) -> None:
    text = PROFILE.replace('"joint-same", "classifier"', '"replacement", "classifier"')
    made = run(tmp_path / "source", tmp_path / "out", "joint", "replacement", text=text)
    assert made["joint"]["status"] == "ok"
    assert made["replacement"]["status"] == "failed" and "another experiment" in made["replacement"]["reason"]
