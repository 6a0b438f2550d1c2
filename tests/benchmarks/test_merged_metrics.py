"""Two that give a metric of one name are told so: neither silently replaces the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests.benchmarks.problems import digits, held_out
from torch import Tensor

from mtdiffusion import SamplerSettings
from mtdiffusion_benchmarks.interfaces import Cost, Fitted
from mtdiffusion_benchmarks.runner import Held, measure
from mtdiffusion_engine.evaluation import evaluate
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_engine.judging import judge_joint, judge_real, judge_target, merge_metrics
from mtdiffusion_engine.measures import plan
from mtdiffusion_registry import Evaluator, Query, UserError


class First(Evaluator):
    """Gives one metric of each kind of sample."""

    names = ("fid_x", "fid_x", "fid_x")

    def conditional(
        self, target: str, generated: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> dict[str, float]:
        return {self.names[0]: 1.0}

    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        return {self.names[1]: 2.0}

    def real(self, test: Mapping[str, Tensor]) -> dict[str, float]:
        return {self.names[2]: 3.0}


class OfJoint(First):
    names = ("a", "fid_x", "b")


class OfReal(First):
    names = ("a", "b", "fid_x")


class Counts(First):
    names = ("samples", "b", "c")


class Answers(Fitted):
    """Gives the truth, and its logits if asked."""

    cost = Cost(1, 1, 1, 1.0, 1)
    curve: list[dict[str, float]] = []  # noqa: RUF012

    def answers(self, query: Query) -> bool:
        return True

    def generate(
        self, query: Query, x: Mapping[str, Tensor], visible: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {name: x[name] for name in query.targets or x}

    def predict(self, query: Query, x: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        return {"label": {"logits": torch.zeros(len(x["label"]), 10)}}


class OfLabels(First):
    names = ("nll", "b", "c")


def test_metrics_are_merged_and_a_second_giver_is_named() -> None:
    assert merge_metrics([("a", {"x": 1.0}), ("b", {"y": 2})], "images") == {"x": 1.0, "y": 2}
    with pytest.raises(UserError, match=r"a and c both give the metric x of images; keep one"):
        merge_metrics([("a", {"x": 1.0}), ("b", {"y": 2}), ("c", {"x": 1.0})], "images")


def test_evaluators_that_give_one_metric_of_joint_samples_or_real_data_are_both_named() -> None:
    who = r"evaluators\[0\] \(First\) and evaluators\[1\] "
    with pytest.raises(UserError, match=who + r"\(OfJoint\) both give the metric fid_x of joint samples"):
        judge_joint([First(), OfJoint()], {})
    assert judge_joint([First(), OfReal()], {}) == {"fid_x": 2.0, "b": 2.0}
    with pytest.raises(UserError, match=who + r"\(OfReal\) both give the metric fid_x of real data"):
        judge_real([First(), OfReal()], {})
    assert judge_real([First(), OfJoint()], {}) == {"fid_x": 3.0, "b": 3.0}


def test_the_engine_refuses_both(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run")
    model, x = build_model(problem.experiment).eval(), held_out(problem, 2)
    settings = SamplerSettings(steps=1)
    joint = plan(model.names, model.spatial, ["joint"])
    with pytest.raises(UserError, match="of joint samples"):
        evaluate(model, x, [First(), OfJoint()], conditional=settings, joint=settings, measures=joint)
    found = evaluate(model, x, [First()], conditional=settings, joint=settings, measures=joint)
    assert found == {"joint/fid_x": 2.0, "joint/samples": 2, "joint/draws": 1}
    label = model.modality("label")
    with pytest.raises(UserError, match=r"\(First\) and evaluators\[1\] \(First\) both give the metric fid_x of label"):
        judge_target(label, "label", x, x, [First(), First()])
    with pytest.raises(UserError, match=r"\(Counts\) and the count of samples both give the metric samples of label"):
        judge_target(label, "label", x, x, [Counts()])


def test_the_benchmark_refuses_both(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run")
    x = held_out(problem, 4)

    def measured(query: Query, *evaluators: Evaluator) -> dict[str, float]:
        return measure(Answers(), problem.experiment, problem.modalities, [query], Held(x, list(evaluators)))[0]

    assert measured(Query(), First()) == {"joint/fid_x": 2.0, "joint/samples": 4, "real/fid_x": 3.0}
    with pytest.raises(UserError, match="of joint samples"):
        measured(Query(), First(), OfJoint())
    with pytest.raises(UserError, match="of real data"):
        measured(Query(), First(), OfReal())
    read = Query(("image",), ("label",))
    assert measured(read, First())["label|image/nll"] > 2
    with pytest.raises(
        UserError, match=r"the predicted label and evaluators\[0\] \(OfLabels\) both give the metric nll of label"
    ):
        measured(read, OfLabels())


class Undefined(First):
    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        return {"fid_x": math.nan, "kid_x": math.inf, "precision_x": 0.5}


def test_a_cell_holds_numbers_alone(tmp_path: Path) -> None:
    problem, told = digits(tmp_path / "run"), list[str]()
    held = Held(held_out(problem, 4), [Undefined()])
    metrics, _ = measure(Answers(), problem.experiment, problem.modalities, [Query()], held, note=told.append)
    assert metrics == {"joint/precision_x": 0.5, "joint/samples": 4, "real/fid_x": 3.0}
    assert told == ["left out, since they are undefined for these samples: joint/fid_x, joint/kid_x"]
