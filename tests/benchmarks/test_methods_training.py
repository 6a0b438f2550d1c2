"""The loop that baselines and controls share: it resumes to the bit, counts its cost, and stops if it diverges."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.benchmarks.problems import digits, lacking, same_weights

from mtdiffusion_benchmarks.interfaces import Diverged, Fitted
from mtdiffusion_benchmarks.methods import _training
from mtdiffusion_benchmarks.methods.mae import MAEConfig
from mtdiffusion_benchmarks.methods.regression import RegressionConfig
from mtdiffusion_registry import MethodConfig, UserError

TINY = ("backbone.channels=8", "training.batch_size=8", "training.accumulate=2", "training.log_every=2")
METHODS: list[MethodConfig] = [
    RegressionConfig("label", ("image",)),
    RegressionConfig("image", ("label",), partial=True),
    MAEConfig("image", width=16, depth=1, heads=2),
]


def trained(fitted: Fitted) -> torch.nn.Module:
    module = fitted.model  # type: ignore[attr-defined]
    assert isinstance(module, torch.nn.Module)
    return module


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process's training as a kill would, in the middle of a step."""
    real = _training._gradient

    def killed(*args: object) -> object:
        if args[-1] == step:
            raise MemoryError
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(_training, "_gradient", killed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_resumed_equals_uninterrupted(
    method: MethodConfig, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*TINY, f"training.optimizer={optimizer}")
    whole = method.fit(digits(tmp_path / "whole", *options))
    problem = digits(tmp_path / "interrupted", *options)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        interrupt_at(6, patch)
        method.fit(problem)
    (checkpoint,) = (problem.folder / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000004"
    torch.manual_seed(99)  # the state of the global generator must not matter
    resumed = method.fit(problem)
    assert same_weights(trained(resumed), trained(whole))

    def losses(fitted: Fitted) -> list[dict[str, float]]:
        return [{key: value for key, value in point.items() if key != "seconds"} for point in fitted.curve]

    assert losses(resumed) == losses(whole)
    assert [point["step"] for point in whole.curve] == [2, 4, 6, 8]
    assert resumed.cost.flops_per_step == whole.cost.flops_per_step > 0


def test_a_finished_folder_is_only_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = digits(tmp_path / "run", *TINY)
    method = RegressionConfig("label", ("image",))
    first = method.fit(problem)
    interrupt_at(0, monkeypatch)
    monkeypatch.setattr(_training, "_train", lambda *_: pytest.fail("trained again"))
    again = method.fit(problem)
    assert same_weights(trained(again), trained(first))
    assert (again.cost, again.curve) == (first.cost, first.curve)


def test_training_seconds_accumulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100000, 10))  # every look at the clock is ten seconds after the one before
    monkeypatch.setattr(_training, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    problem = digits(tmp_path / "run", *TINY)
    method = RegressionConfig("label", ("image",))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        interrupt_at(6, patch)
        method.fit(problem)
    fitted = method.fit(problem)
    assert fitted.cost.train_seconds == 80  # 8 steps: the two that were lost are counted once
    assert [point["seconds"] for point in fitted.curve] == [20, 40, 60, 80]


def test_training_and_counting_leave_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    RegressionConfig("label", ("image",)).fit(digits(tmp_path / "run", *TINY))
    assert torch.equal(before, torch.random.get_rng_state())


def test_cost_is_that_of_the_budget(tmp_path: Path) -> None:
    method = RegressionConfig("label", ("image",))
    cost = method.fit(digits(tmp_path / "two", *TINY)).cost
    assert (cost.steps, cost.batch_size) == (8, 8)  # the whole step's, whatever it is shared out in
    once = method.fit(digits(tmp_path / "one", *TINY, "training.accumulate=1")).cost
    assert cost.flops_per_step == once.flops_per_step


def test_another_method_or_budget_in_the_folder_is_refused(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run", *TINY)
    RegressionConfig("label", ("image",)).fit(problem)
    with pytest.raises(UserError, match="another method"):
        RegressionConfig("label", ("mask",)).fit(problem)
    with pytest.raises(UserError, match=r"training\.steps is 8, asked for 9"):
        RegressionConfig("label", ("image",)).fit(digits(tmp_path / "run", *TINY, "training.steps=9"))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_bfloat16_is_another_training(method: MethodConfig, tmp_path: Path) -> None:
    short = (*TINY, "training.steps=2")
    fitted = [method.fit(digits(tmp_path / p, *short, f"training.precision={p}")) for p in ("float32", "bfloat16")]
    assert not same_weights(trained(fitted[0]), trained(fitted[1]))
    assert fitted[0].curve[-1]["loss"] == pytest.approx(fitted[1].curve[-1]["loss"], rel=0.05)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_divergence_names_the_step(method: MethodConfig, tmp_path: Path) -> None:
    problem = digits(tmp_path / "run", *TINY, "training.learning_rate=1e30", "training.warmup=0")
    with pytest.raises(Diverged, match=r"is (nan|inf) at step \d+"):
        method.fit(problem)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_what_is_missing_is_not_trained_on(
    method: MethodConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands in for it changes nothing."""
    fitted = []
    for value in (0.0, 0.9):
        problem = digits(tmp_path / str(value), *TINY)
        kind = type(problem.modalities["image"])
        monkeypatch.setattr(kind, "placeholder", lambda self, n, value=value: torch.full((n, *self.shape), value))
        fitted.append(method.fit(lacking(problem, "image")))
    assert same_weights(trained(fitted[0]), trained(fitted[1]))


def test_what_the_joint_model_is_shown_varied_a_control_is_too(tmp_path: Path) -> None:
    method = METHODS[0]
    plain = method.fit(digits(tmp_path / "plain", *TINY))
    varied = method.fit(digits(tmp_path / "varied", *TINY, "augmentation.vertical_flip=1.0"))
    assert not same_weights(trained(plain), trained(varied))
