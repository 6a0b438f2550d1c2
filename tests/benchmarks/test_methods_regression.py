"""The single-task control: the joint model's network, trained to predict one target from what is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.benchmarks.problems import ask, check_answer, digits, held_out

from mtdiffusion_benchmarks.methods.regression import RegressionConfig
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_registry import Query, UserError
from mtdiffusion_registry.testing import check_config

CLASSIFY = Query(("image",), ("label",))
FILL = Query((), ("image",), 0.5, "patches")


def test_classifier_learns(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run", "training.steps=50", "backbone.dropout=0.0")
    fitted = RegressionConfig("label", ("image",)).fit(problem)
    x = held_out(problem)
    accuracy = (ask(fitted, CLASSIFY, x)["label"] == x["label"]).double().mean().item()
    assert accuracy > 0.6  # chance is 0.1
    check_answer(fitted, problem, CLASSIFY)
    params = fitted.predict(CLASSIFY, x)["label"]
    assert torch.equal(params["logits"].argmax(1), ask(fitted, CLASSIFY, x)["label"])


def test_it_is_the_joint_models_network(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run", "training.steps=1")
    cost = RegressionConfig("label", ("image",)).fit(problem).cost
    assert cost.parameters == sum(p.numel() for p in build_model(problem.experiment).parameters())


def test_reconstruction_from_a_part(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run", "training.steps=40")
    fitted = RegressionConfig("image", partial=True).fit(problem)
    assert fitted.curve[-1]["loss"] < 0.5 * fitted.curve[0]["loss"]
    check_answer(fitted, problem, FILL)
    assert fitted.predict(FILL, held_out(problem, 4)) == {}


def test_of_several_targets_it_answers_its_own(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run", "training.steps=1")
    fitted = RegressionConfig("label", ("image",)).fit(problem)
    assert set(check_answer(fitted, problem, Query(("image",), ("mask", "label")))) == {"label"}
    assert not fitted.answers(Query())
    assert not fitted.answers(Query(("image",), ("mask",)))
    assert not fitted.answers(Query(("image", "mask"), ("label",)))
    assert not fitted.answers(Query(("image",), ("label",), 0.5))
    filling = RegressionConfig("image", partial=True).fit(digits(tmp_path / "part", "training.steps=1"))
    assert filling.answers(FILL)
    assert not filling.answers(Query((), ("mask",), 0.5))
    assert not filling.answers(Query(("label",), ("image",)))


def test_what_it_cannot_be_is_said(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run")
    with pytest.raises(UserError, match="no modality named depth"):
        RegressionConfig("label", ("depth",)).fit(problem)
    with pytest.raises(UserError, match="label has no places"):
        RegressionConfig("label", ("image",), partial=True).fit(problem)
    with pytest.raises(ValueError, match="label is the target"):
        RegressionConfig("label", ("label",))
    with pytest.raises(ValueError, match="partial = true, found neither"):
        RegressionConfig("label")
    assert not problem.folder.exists()


def test_config() -> None:
    check_config(RegressionConfig("label", ("image",)))
