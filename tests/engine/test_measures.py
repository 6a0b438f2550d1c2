"""What an evaluation measures can be chosen, and what is measured is kept when it is stopped."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from mtdiffusion_engine import evaluation
from mtdiffusion_engine.checks import check_held_out
from mtdiffusion_engine.evaluation import DEFAULT_SAMPLES, evaluate_run
from mtdiffusion_engine.measures import Kept, Measure, groups, plan
from mtdiffusion_engine.run import Run
from mtdiffusion_engine.samples import joined
from mtdiffusion_plugins.metrics.judge import JudgeConfig
from mtdiffusion_registry import UserError, pace
from tests.engine.test_evaluation import Gaps, RecorderConfig, run_on
from tests.engine.tiny import Toy

NAMES, SPATIAL = ["image", "mask", "label", "clip"], [True, True, False, False]


def groups_of(metrics: dict[str, Any]) -> set[str]:
    return {key.rpartition("/")[0] for key in metrics}


def changed(run: Run, **changes: Any) -> Run:
    return evolve(run, experiment=evolve(run.experiment, evaluation=evolve(run.experiment.evaluation, **changes)))


# --- what is measured ---------------------------------------------------------------------------------------------


def test_where_nothing_is_chosen_every_group_is_measured() -> None:
    there = groups(["image", "mask", "label"], [True, True, False])
    metrics = evaluate_run(run_on(Gaps(), RecorderConfig()))
    assert groups_of(metrics) == set(there) - {"bound"} and "joint/bound_bits_per_dim" in metrics
    assert groups(["image"], [True]) == ["real", "image|image:part", "joint", "bound"]


def test_what_is_chosen_alone_is_measured_and_its_numbers_are_those_of_the_whole() -> None:
    run = run_on(Gaps(), RecorderConfig(), joint_draws=2)
    whole = evaluate_run(run)
    for chosen in (("label|image",), ("mask|image + label", "joint"), ("image|image:part", "bound"), ("real",)):
        some = evaluate_run(changed(run, conditionals=chosen))
        names = {"joint" if name == "bound" else name.replace(" ", "") for name in chosen}
        assert groups_of(some) == names
        assert some == {key: whole[key] for key in some}


def test_joint_samples_alone_are_those_of_a_whole_evaluation() -> None:
    run = run_on(Gaps(), JudgeConfig(epochs=1, width=4), joint_draws=3)
    whole = evaluate_run(run)
    judge = run.experiment.evaluation.evaluators[0].build(evaluation.complete_samples(run.data("train")))
    count = int(whole["joint/samples"])
    alone = evaluation.evaluate_joint(run.model, count, [judge], run.experiment.sampling, draws=3)
    assert alone == {name: value for name, value in whole.items() if name in alone}
    assert {"joint/draws", "joint/fid_judge", "joint/fid_judge_std"} <= alone.keys()


def test_any_modality_may_be_given_any_others_in_any_order() -> None:
    assert plan(NAMES, SPATIAL, ["image|clip+label", "mask|label+clip", "image|label + clip"]) == [
        Measure("given label+clip", "given", ("image", "mask"), ("label", "clip"))
    ]
    assert [measure.name for measure in plan(NAMES, SPATIAL, ["bound", "joint", "real"], joint_draws=2)] == [
        "real data",
        "joint samples, draw 1",
        "joint samples, draw 2",
        "the bound",
    ]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("lable|image", 'cannot measure "lable|image": no modality is named lable; did you mean "label"? (there are '),
        ("mask|image+depth", "no modality is named depth (there are real, mask|image, "),
        ("mask|mask+image", 'cannot measure "mask|mask+image"'),
        ("label|label:part", 'cannot measure "label|label:part"'),
        ("joints", '"joints"; did you mean "joint"?'),
        ("image", 'cannot measure "image"'),
        ("image|", "no modality is named  (there"),
        ("bound", 'found "bound", but evaluation.bound_times is 0'),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_there_is(chosen: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        plan(NAMES, SPATIAL, [chosen], bound=False)
    assert str(refused.value).startswith("evaluation.conditionals: ")
    if chosen != "bound":
        assert "image|image:part, mask|mask:part, joint, bound; and any modality given" in str(refused.value)
        assert str(refused.value).endswith("of image, mask, label, clip)")


def test_it_is_refused_before_anything_is_trained() -> None:
    run = run_on(Toy(), conditionals=("label|images",))
    with pytest.raises(UserError, match=r'no modality is named images; did you mean "image"\?'):
        check_held_out(run.experiment, run.model)


def test_of_many_held_out_samples_a_random_draw_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DEFAULT_SAMPLES == 1000
    monkeypatch.setattr(evaluation, "DEFAULT_SAMPLES", 8)
    notes: list[str] = []
    run = run_on(Gaps(), conditionals=("label|image",))
    assert evaluate_run(run, note=notes.append)["label|image/samples"] == 8
    (said,) = notes
    assert said.startswith("8 of 12 held-out samples are taken, a random draw") and "--samples all" in said
    notes.clear()
    for samples, count in (("all", 12), (5, 5)):  # what was asked for needs no word
        found = evaluate_run(changed(run, samples=samples), note=notes.append)
        assert found["label|image/samples"] == count
    monkeypatch.setattr(evaluation, "DEFAULT_SAMPLES", 12)
    assert evaluate_run(run, note=notes.append)["label|image/samples"] == 12
    assert notes == []


# --- what is kept ---------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stopped(run: Run, kept: Kept, at: str) -> None:
    """An evaluation that is stopped when it is told that a measure begins."""

    def progress(told: str) -> None:
        if told == at:
            raise Stopped

    with pytest.raises(Stopped):
        evaluate_run(run, progress, lambda _: None, kept)


def test_an_evaluation_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    run = run_on(Gaps(masks=2), RecorderConfig(also="label", defined="never"))
    whole = evaluate_run(run)
    path = tmp_path / "partial.json"
    for at in ("given label", "joint samples, draw 2", "the bound"):
        stopped(run, Kept(path), at)
        stored = json.loads(path.read_text())
        assert stored["partial"] is True and stored["missing"][0] == at
        assert not {*stored["done"]} & {*stored["missing"]}
    told: list[str] = []
    notes: list[str] = []
    assert evaluate_run(run, told.append, notes.append, Kept(path)) == whole
    assert [line for line in told if not line.endswith(" s")] == ["reading held-out samples", "the bound"]
    assert any(
        note.startswith("going on with an evaluation that was stopped: real data, given image") for note in notes
    )


def test_what_another_model_data_or_settings_gave_is_not_taken_for_this_one_s(tmp_path: Path) -> None:
    run, path = run_on(Gaps(), RecorderConfig()), tmp_path / "partial.json"
    stopped(run, Kept(path), "given image")
    before = path.read_text()
    others = [changed(run, steps=2), run_on(Gaps(labels=2), RecorderConfig()), run_on(Gaps(), RecorderConfig(limit=5))]
    other = run_on(Gaps(), RecorderConfig())
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    for each in (*others, other):
        path.write_text(before)
        told: list[str] = []
        notes: list[str] = []
        assert evaluate_run(each, told.append, notes.append, Kept(path)) == evaluate_run(each)
        assert "real data" in told
        assert notes[0] == f"{path}: of another checkpoint or other settings; it will be replaced"
    path.write_text(before[:-20])  # damaged
    assert evaluate_run(run, note=lambda _: None, kept=Kept(path)) == evaluate_run(run)


def test_what_is_undefined_is_kept_as_that(tmp_path: Path) -> None:
    path = tmp_path / "partial.json"
    kept = Kept(path)
    kept.begin([Measure("a", "joint"), Measure("b", "joint")], "mark")
    kept.add("a", {"x": math.nan, "y": 1.5, "samples": 2})
    json.loads(path.read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    again = Kept(path)
    assert again.begin([Measure("a", "joint"), Measure("b", "joint")], "mark") is False
    assert again.done["a"].keys() == {"x", "y", "samples"} and math.isnan(again.done["a"]["x"])
    assert again.missing == ["b"] and isinstance(again.done["a"]["samples"], int)
    again.remove()
    assert not path.exists()


# --- how long it takes, and what it holds ---------------------------------------------------------------------------


def test_each_measure_and_a_judge_s_training_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "EVERY", -1.0)
    told: list[str] = []
    logger = pace.logging.getLogger(pace.LOGGER)
    monkeypatch.setattr(logger, "info", told.append)
    evaluate_run(run_on(Gaps(), JudgeConfig(epochs=3, width=4, seed=123), batch_size=5), told.append)
    for line in (
        "training a judge: 2 of 3, ",
        "given image: 5 of 12, ",
        "given a part of mask: 10 of 12, ",
        "joint samples, draw 3: 10 of 12, ",
        "the bound: 5 of 12, ",
    ):
        assert any(each.startswith(line) and re.search(r" \d+:\d\d left$", each) for each in told), line


def test_batches_are_joined_in_their_places() -> None:
    x = torch.randn(7, 2)
    places = torch.split(torch.randperm(7), 3)
    whole = joined(7, ((at, {"x": x[at], "i": at}) for at in places))
    assert torch.equal(whole["x"], x) and torch.equal(whole["i"], torch.arange(7))
