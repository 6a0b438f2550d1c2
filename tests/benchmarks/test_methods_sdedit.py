"""SDEdit: what is seen guides by where denoising starts, and strength says how far."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attrs import evolve
from tests.benchmarks.problems import ask, check_answer, digits, held_out, holes
from torch import Tensor

from mtdiffusion import SamplerSettings, sample
from mtdiffusion_benchmarks.interfaces import Problem
from mtdiffusion_benchmarks.methods.sdedit import SDEdit, SDEditConfig
from mtdiffusion_registry import Query, UserError
from mtdiffusion_registry.testing import check_config

HOLES = Query((), ("image",), 0.5, "patches")
TRAINING = ("training.steps=300", "training.batch_size=32", "training.checkpoint_every=0", "evaluation.steps=20")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, SDEdit]:
    """Of images alone: a hidden pixel is told by others at the same clock."""
    problem = digits(tmp_path_factory.mktemp("sdedit") / "run", *TRAINING)
    images = {"image": problem.experiment.modalities["image"]}
    problem = evolve(
        problem,
        experiment=evolve(problem.experiment, modalities=images),
        modalities={"image": problem.modalities["image"]},
    )
    made = SDEditConfig("image").fit(problem)
    assert isinstance(made, SDEdit)
    return problem, made


def filled(method: SDEdit, x: dict[str, Tensor], visible: Tensor, strength: float = 0.6) -> Tensor:
    """What the same trained model makes of the images from another start."""
    method.strength = strength
    return ask(method, HOLES, x, visible)["image"]


def hidden_of(x: Tensor, visible: Tensor) -> Tensor:
    return x[(visible[:, None] < 0.5).expand_as(x)]


def test_it_fills_holes_better_than_the_mean_it_starts_from_and_than_samples(fitted: tuple[Problem, SDEdit]) -> None:
    problem, method = fitted
    assert method.curve[-1]["loss"] < 0.7 * method.curve[0]["loss"]
    x, visible = held_out(problem), holes(200, 0.25)
    mean = problem.train.batch(range(len(problem.train))).x["image"].mean(0).expand_as(x["image"])

    def error(image: Tensor) -> float:
        return float(hidden_of(image - x["image"], visible).square().mean())

    assert error(filled(method, x, visible, 0.1)) < 0.9 * error(mean)
    assert error(filled(method, x, visible, 0.6)) < 0.9 * error(filled(method, x, visible, 1.0))


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "dpmpp_2m"])
def test_at_strength_1_it_is_unconditional_sampling(
    fitted: tuple[Problem, SDEdit], solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what signal is left at t = T."""
    problem, method = fitted
    monkeypatch.setattr(method, "settings", SamplerSettings(steps=7, solver=solver))  # type: ignore[arg-type]
    x, visible = held_out(problem, 12), holes(12)
    out = filled(method, x, visible, 1.0)
    plain = sample(method.model, 12, settings=method.settings, generator=torch.Generator().manual_seed(1))["image"]
    torch.testing.assert_close(hidden_of(out, visible), hidden_of(plain, visible), atol=0.02, rtol=0)
    other = sample(method.model, 12, settings=method.settings, generator=torch.Generator().manual_seed(2))["image"]
    assert (hidden_of(out, visible) - hidden_of(other, visible)).abs().mean() > 0.2


def test_it_starts_from_about_the_mean_and_keeps_more_of_it_the_smaller_the_strength(
    fitted: tuple[Problem, SDEdit],
) -> None:
    problem, method = fitted
    x, visible = held_out(problem, 64), holes(64)
    train = problem.train.batch(range(len(problem.train))).x["image"]
    mean = train.mean(0).expand_as(x["image"])
    far = [
        float(hidden_of(filled(method, x, visible, strength) - mean, visible).square().mean().sqrt())
        for strength in (0.01, 0.2, 0.9)
    ]
    assert far[0] < 0.4 * float(train.std(0).square().mean().sqrt())
    assert far[0] < 0.8 * far[1] and far[1] < far[2]  # a short training copies no picture exactly


@pytest.mark.parametrize("name", ["image", "mask"])
def test_other_modalities_take_part_and_nothing_else_is_answered(tmp_path: Path, name: str) -> None:
    problem = digits(tmp_path / "run", "training.steps=2")
    method = SDEditConfig(name).fit(problem)
    check_answer(method, problem, Query((), (name,), 0.5, "patches"))
    assert method.predict(HOLES, held_out(problem, 4)) == {}
    assert not method.answers(Query())
    assert not method.answers(Query(("label",), (name,)))
    assert not method.answers(Query(("label",), (name,), 0.5))
    assert method.cost.steps == 2


def test_what_it_cannot_be_is_said(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run")
    with pytest.raises(UserError, match="method sdedit: target: label has no places"):
        SDEditConfig("label").fit(problem)
    with pytest.raises(UserError, match="no modality named depth"):
        SDEditConfig("depth").fit(problem)
    with pytest.raises(UserError, match="method sdedit: in a shared layout all modalities have one clock"):
        SDEditConfig("image").fit(digits(tmp_path / "run", "latent.layout=shared"))
    assert not problem.folder.exists()


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_config(strength: float) -> None:
    check_config(SDEditConfig("image"))
    with pytest.raises(ValueError, match="strength"):
        SDEditConfig("image", strength=strength)
