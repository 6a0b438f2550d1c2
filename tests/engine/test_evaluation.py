"""Evaluation uses what samples there are, takes no part for the whole, and says what it leaves out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from attrs import evolve, frozen
from PIL import Image
from torch import Tensor

from mtdiffusion import Dataset, SamplerSettings
from mtdiffusion_engine import gallery
from mtdiffusion_engine.data import ModalityData, load_data
from mtdiffusion_engine.evaluation import complete_samples, evaluate, evaluate_run
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_engine.gallery import draw_gallery
from mtdiffusion_engine.judging import (
    build_evaluators,
    check_evaluators,
    defined,
    judge_joint,
    judge_real,
    judge_target,
)
from mtdiffusion_engine.measures import plan
from mtdiffusion_engine.run import Run
from mtdiffusion_engine.samples import Samples, Wish, draw_samples
from mtdiffusion_plugins.metrics.judge import JudgeConfig
from mtdiffusion_registry import DatasetConfig, Evaluator, EvaluatorConfig, UserError, pace
from tests.engine.tiny import REGISTRY, Toy, ToyData, toy


class GapsData(ToyData):
    """Toy samples of which some lack a mask or a label, by their index; it counts what is read."""

    def __init__(self, split: str, gaps: Gaps) -> None:
        super().__init__(gaps.count if split == "train" else gaps.test_count, "", -1)
        self.split, self.gaps = split, gaps
        self.read: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        self.read.append(index)
        if self.split == "train" and index == self.gaps.damaged:
            raise OSError(f"sample {index} is damaged")
        sample = super().__getitem__(index)
        for name, every in (("mask", self.gaps.masks), ("label", self.gaps.labels)):
            if self.split != self.gaps.whole and (every == 0 or index % every):
                del sample[name]
        return sample


@frozen
class Gaps(DatasetConfig):
    """A mask for every ``masks``-th sample alone, a label for every ``labels``-th; 0: for none."""

    kind: ClassVar[str] = "gaps"
    count: int = 24
    test_count: int = 12
    masks: int = 1
    labels: int = 1
    whole: str = "train"
    damaged: int = -1

    def build(self, split: Literal["train", "test"]) -> Dataset:
        return GapsData(split, self)


class Recorder(Evaluator):
    """Says what it is shown."""

    metric_directions: ClassVar[Mapping[str, str]] = {"seen": "higher"}

    def __init__(self, config: RecorderConfig, train: Mapping[str, Tensor]) -> None:
        self.config = config
        self.train = dict(train)
        self.asked = 0

    def conditional(
        self, target: str, generated: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> dict[str, float]:
        assert {len(x) for x in generated.values()} == {len(x) for x in truth.values()}
        assert set(self.config.needs()) <= truth.keys()
        return {"seen": float(len(truth[target]))} if target == self.config.input else {}

    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        self.asked += 1
        value = {"every": 1.0, "some": 1.0 if self.asked % 3 == 1 else math.nan, "never": math.nan}
        return {"drawn": value[self.config.defined] * self.asked, "seen": float(len(generated["image"]))}

    def real(self, test: Mapping[str, Tensor]) -> dict[str, float]:
        if self.config.fails == "real":
            raise KeyError("a class")
        return {"seen": float(len(next(iter(test.values()))))}


@frozen
class RecorderConfig(EvaluatorConfig):
    kind: ClassVar[str] = "recorder"
    input: str = "image"
    also: str = ""
    limit: int = 1000
    defined: str = "every"
    fails: str = ""

    def needs(self) -> tuple[str, ...]:
        return (self.input, self.also) if self.also else ()

    def train_limit(self) -> int:
        return self.limit

    def preparation(self) -> str:
        return "taking notes"

    def build(self, train: Mapping[str, Tensor]) -> Evaluator:
        if self.fails == "build":
            raise ValueError("3 classes expected")
        return Recorder(self, train)


def run_on(data: DatasetConfig, *evaluators: EvaluatorConfig, **changes: Any) -> Run:
    """An untrained model and its data; as quick as can be."""
    experiment = toy()
    evaluation = evolve(experiment.evaluation, steps=1, bound_times=1, evaluators=evaluators, **changes)
    experiment = evolve(experiment, data=data, evaluation=evaluation, sampling=SamplerSettings(steps=1))
    return Run(Path("run"), experiment, build_model(experiment).eval(), Path("run"))


def split(data: DatasetConfig, which: Literal["train", "test"] = "test") -> tuple[ModalityData, list[int]]:
    """A split as an evaluation sees it, and the indices read since."""
    run = run_on(data)
    found = load_data(run.experiment, run.model, which)
    assert isinstance(found.dataset, GapsData)
    found.dataset.read.clear()
    return found, found.dataset.read


# --- draws --------------------------------------------------------------------------------------------------------


def test_fewer_samples_are_a_draw_of_all_and_follow_from_the_seed() -> None:
    data, read = split(Gaps(test_count=100))
    every = complete_samples(data)
    assert len(every["label"]) == 100 and sorted(set(read)) == list(range(100))
    where = []
    for seed in (0, 0, 1):
        read.clear()
        few = complete_samples(data, 10, seed)
        rows = [int((every["image"] == x).flatten(1).all(1).nonzero()) for x in few["image"]]
        assert rows == sorted(rows) == sorted(read)  # in the order of the split, and no other sample was read
        where.append(rows)
    assert where[0] == where[1] != where[2]
    assert max(where[0]) > 50 and where[0] != list(range(10))


def test_only_as_much_is_read_as_the_largest_wish_wants() -> None:
    data, read = split(Gaps(test_count=700, masks=2))
    small, none, large = draw_samples(data, [Wish(["image"], 5), Wish((), 0), Wish(["label"], 40)], seed=3)
    assert (len(small), len(none), len(large)) == (5, 0, 40)
    assert len(set(read)) == len(read) == 40
    assert not large.presence["mask"].all()  # all samples, not those that have everything alone
    masks, whole = draw_samples(data, [Wish(["mask"], 600), Wish(["label"])])
    assert (len(masks), len(whole)) == (350, 700)
    assert masks.common().keys() == {"image", "mask", "label"} and whole.common().keys() == {"image", "label"}
    assert torch.equal(whole.take(whole.having(["mask"])).x["image"], masks.x["image"])


# --- incomplete data ------------------------------------------------------------------------------------------------


def test_each_conditional_uses_the_samples_that_have_what_it_is_of() -> None:
    notes: list[str] = []
    judge = RecorderConfig(input="image", also="label")
    metrics = evaluate_run(run_on(Gaps(masks=2, labels=3), judge), note=notes.append)  # 6 masks, 4 labels, 2 with both
    counts = {key.removesuffix("/samples"): n for key, n in metrics.items() if key.endswith("/samples")}
    assert counts == {
        "mask|image": 6,
        "label|image": 4,
        "image|mask": 6,
        "label|mask": 2,
        "image|label": 4,
        "mask|label": 2,
        "image|mask+label": 2,
        "mask|image+label": 2,
        "label|image+mask": 2,
        "image|image:part": 12,
        "mask|mask:part": 6,
        "joint": 12,
        "real": 12,
    }
    # The evaluator judges those that have a label, too, and says how many these are.
    assert metrics["image|mask/seen"] == metrics["image|mask/seen_samples"] == 2
    assert metrics["image|label/seen"] == 4 and "image|label/seen_samples" not in metrics
    assert metrics["real/seen"] == metrics["real/seen_samples"] == 4
    assert metrics["joint/seen"] == metrics["joint/seen_samples"] == 4  # as many as of the real ones beside it
    assert metrics["joint/bound_bits_per_dim_samples"] == 2 and math.isfinite(metrics["joint/bound_bits_per_dim"])
    assert all(math.isfinite(value) for value in metrics.values())
    assert notes == []


def test_what_no_sample_serves_for_is_left_out_and_said(tmp_path: Path) -> None:
    notes: list[str] = []
    run = run_on(Gaps(masks=0), RecorderConfig(also="mask", defined="never"))  # fitted to samples that have masks
    metrics = evaluate_run(run, note=notes.append)
    assert {key.partition("/")[0] for key in metrics} == {
        "label|image",
        "image|label",
        "image|image:part",
        "joint",
        "real",
    }
    assert "joint/bound_bits_per_dim" not in metrics
    (left,) = [note for note in notes if note.startswith("left out, since no held-out sample has")]
    assert "mask|image, " in left and "label|mask" in left and "joint/bound_bits_per_dim" in left
    assert any("evaluators[0] (recorder) judges nothing of real data: no sample has image and mask" in n for n in notes)
    assert any("left out, since they are undefined for these samples: joint/drawn" in note for note in notes)
    json.dumps(metrics, allow_nan=False)
    notes.clear()
    assert draw_gallery(run, tmp_path / "gallery.png", columns=3, note=notes.append).is_file()
    assert notes == ["the gallery shows nothing given mask: no held-out sample has it"]


def test_complete_data_are_judged_as_a_whole_as_ever() -> None:
    run = run_on(Gaps(), RecorderConfig(also="label"))
    metrics = evaluate_run(run)
    assert metrics == evaluate_run(run)
    assert not any(key.endswith(("_samples", "_draws")) for key in metrics)
    assert metrics["image|label/seen"] == metrics["real/seen"] == metrics["joint/seen"] == 12


def test_an_empty_test_split_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = run_on(Gaps(test_count=0))
    with pytest.raises(
        UserError,
        match=r"set is empty\. There is nothing to measure on: .* set data.test_fraction above 0",
    ):
        evaluate_run(run)
    with pytest.raises(UserError, match=r"set is empty\. There is nothing to measure on"):
        draw_gallery(run, tmp_path / "gallery.png")
    assert list(tmp_path.iterdir()) == []


# --- evaluators -------------------------------------------------------------------------------------------------------


def build(data: DatasetConfig, *configs: EvaluatorConfig, **tell: Any) -> tuple[list[Any], list[int]]:
    """Evaluators, and which training samples were read for them."""
    run, read = run_on(data), []

    def train() -> ModalityData:
        found, indices = split(data, "train")
        read.append(indices)
        return found

    modalities = {name: run.model.modality(name) for name in run.model.names}
    built = build_evaluators(configs, modalities, train, **tell)
    return [each.evaluator for each in built], read[0] if read else []  # type: ignore[attr-defined]


def test_evaluators_are_fitted_to_samples_that_have_what_they_need() -> None:
    gaps = Gaps(masks=2, labels=3, whole="")
    labels, masks, every = build(
        gaps, RecorderConfig(also="label"), RecorderConfig(input="mask", also="image"), RecorderConfig()
    )[0]
    assert {name: len(x) for name, x in labels.train.items()} == {"image": 8, "label": 8}
    assert {name: len(x) for name, x in masks.train.items()} == {"image": 12, "mask": 12}
    assert {name: len(x) for name, x in every.train.items()} == {"image": 4, "mask": 4, "label": 4}


def test_no_more_of_the_training_split_is_read_than_is_wanted() -> None:
    judges, read = build(Gaps(count=600), RecorderConfig(limit=7), RecorderConfig(limit=20), seed=1)
    assert [len(judge.train["image"]) for judge in judges] == [7, 20] and len(read) == len(set(read)) == 20
    assert sorted(read) != list(range(20))
    (judge,), read = build(Gaps(damaged=3), RecorderConfig(limit=0))
    assert {name: list(x.shape) for name, x in judge.train.items()}["image"] == [0, 1, 4, 4] and read == []
    assert evaluate_run(run_on(Gaps(damaged=0)))["real/samples"] == 12  # with no evaluator, none is read


class Disjoint(GapsData):
    """No sample has a mask and a label."""

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        sample = super().__getitem__(index)
        return {name: x for name, x in sample.items() if name != "label" or "mask" not in sample}


def test_an_evaluator_for_which_there_is_no_training_sample_is_left_out_and_said() -> None:
    told: list[str] = []
    modalities = split(Gaps())[0].modalities
    train = ModalityData(Disjoint("train", Gaps(masks=2, whole="")), modalities)
    configs = [RecorderConfig(input="mask", also="label"), RecorderConfig(also="mask")]
    (kept,) = build_evaluators(configs, modalities, lambda: train, progress=told.append)
    assert kept.title == "evaluators[1] (recorder)"  # type: ignore[attr-defined]
    assert "evaluators[0] (recorder) is left out: no training sample has mask and label" in told


PHASES = (
    "reading held-out samples",
    "reading training samples",
    "evaluators[0] (judge): a judge of label by image, trained for 3 epochs unless kept from before, 24 samples",
    "evaluators[1] (recorder): taking notes, 24 samples",
    "real data",
    "given image",
    "given a part of mask",
    "joint samples, draw 1",
    "joint samples, draw 3",
    "the bound",
)


def test_each_phase_says_what_it_does_and_of_what_takes_long_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "EVERY", -1.0)  # everything takes long
    told: list[str] = []
    evaluate_run(run_on(Gaps(), JudgeConfig(epochs=3, width=4), RecorderConfig()), told.append)
    for begun in PHASES:
        (ended,) = [line for line in told if re.fullmatch(rf"{re.escape(begun)}: done in \d+\.\d s", line)]
        assert told.index(begun) < told.index(ended)


def test_a_quick_phase_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "EVERY", 600.0)
    told: list[str] = []
    evaluate_run(run_on(Gaps(), JudgeConfig(epochs=3, width=4), RecorderConfig()), told.append)
    for begun in PHASES:
        assert [line for line in told if line == begun or line.startswith(f"{begun}: ")] == [begun]


def test_a_modality_that_an_evaluator_needs_is_asked_for_before_anything_is_trained() -> None:
    some = run_on(Toy()).experiment.modalities["image"]
    check_evaluators([RecorderConfig(), RecorderConfig(also="label")], dict.fromkeys(["image", "label"], some))
    judges = [RecorderConfig(), JudgeConfig()]
    message = (
        r"evaluation\.evaluators\[1\] \(judge\): expected a modality named 'label', found image, quality "
        r"\(let evaluation\.evaluators\[1\]\.target name one of them, or remove the evaluator\)"
    )
    with pytest.raises(UserError, match=message):
        check_evaluators(judges, dict.fromkeys(["image", "quality"], some))
    with pytest.raises(UserError, match=r"'label', found image, labels; did you mean \"labels\"\?"):
        check_evaluators(judges, dict.fromkeys(["image", "labels"], some))
    for kind, needs in (("judge", ("image", "label")), ("features", ("image",)), ("lpips", ("image",))):
        assert REGISTRY.config_class("evaluator", kind)().needs() == needs
    with pytest.raises(UserError, match=r"evaluators\[0\] \(judge\): expected a modality named 'picture'"):
        evaluate_run(run_on(Toy(), JudgeConfig(input="picture")))


def test_what_an_evaluator_raises_names_it() -> None:
    with pytest.raises(UserError, match=r"^evaluation\.evaluators\[1\] \(recorder\): ValueError: 3 classes") as raised:
        build(Gaps(), RecorderConfig(), RecorderConfig(fails="build"))
    assert isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(UserError, match=r"^evaluation\.evaluators\[0\] \(recorder\): KeyError: 'a class'"):
        evaluate_run(run_on(Gaps(), RecorderConfig(fails="real")))
    one_channel = {"image": torch.zeros(4, 1, 1, 1), "label": torch.zeros(4, dtype=torch.int64)}

    class Tiny(GapsData):  # pictures that the judge's pooling layers leave nothing of
        def __getitem__(self, index: int) -> dict[str, Tensor | str]:
            return {**super().__getitem__(index), "image": one_channel["image"][0]}

    run = run_on(Gaps())
    modalities = {name: run.model.modality(name) for name in ("image", "label")}
    train = ModalityData(Tiny("train", Gaps()), modalities)
    train.modalities["image"].shape = (1, 1, 1)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"^evaluation\.evaluators\[0\] \(judge, of mtdiffusion .*\): RuntimeError: "):
        build_evaluators([JudgeConfig(epochs=1, width=4)], modalities, lambda: train)


class Wrong(Recorder):
    def __init__(self) -> None:
        super().__init__(RecorderConfig(), {})

    def joint(self, generated: Mapping[str, Tensor]) -> Any:
        return {"seen": generated["image"].mean()}

    def real(self, test: Mapping[str, Tensor]) -> Any:
        return None


def test_what_an_evaluator_answers_wrongly_names_it() -> None:
    x = {"image": torch.zeros(2, 1, 4, 4)}
    with pytest.raises(UserError, match=r"evaluators\[0\] \(Wrong\): TypeError: the metric seen is Tensor, expected a"):
        judge_joint([Wrong()], x)
    with pytest.raises(UserError, match=r"evaluators\[0\] \(Wrong\): AttributeError"):
        judge_real([Wrong()], x)


# --- undefined metrics --------------------------------------------------------------------------------------------


def test_means_over_draws_are_over_those_where_a_metric_is_defined() -> None:
    run, settings, notes = run_on(Gaps()), SamplerSettings(steps=1), list[str]()
    model, test = run.model, complete_samples(run.data("test"), 2)

    def drawn(defined: str, draws: int) -> dict[str, float]:
        measures = plan(model.names, model.spatial, ["joint"], joint_draws=draws)
        judges = [Recorder(RecorderConfig(defined=defined), {})]
        found = evaluate(
            model, test, judges, conditional=settings, joint=settings, measures=measures, note=notes.append
        )
        return {key: value for key, value in found.items() if "drawn" in key}

    every = drawn("every", 3)  # 1, 2 and 3
    assert every == {"joint/drawn": 2.0, "joint/drawn_std": 1.0}
    assert drawn("some", 5) == {"joint/drawn": 2.5, "joint/drawn_std": pytest.approx(4.5**0.5), "joint/drawn_draws": 2}
    assert drawn("some", 3) == {"joint/drawn": 1.0, "joint/drawn_draws": 1}  # of one value there is no deviation
    assert drawn("some", 1) == {"joint/drawn": 1.0}
    assert notes == []
    assert drawn("never", 2) == {}
    assert notes == ["left out, since they are undefined for these samples: joint/drawn"]


def test_no_result_is_infinite_or_nan() -> None:
    notes: list[str] = []
    metrics = {"a": 1.0, "b": math.nan, "b_samples": 3, "c": -math.inf, "d": 2}
    assert defined(metrics, notes.append) == {"a": 1.0, "d": 2}
    assert notes == ["left out, since they are undefined for these samples: b, c"]


def test_a_judge_of_single_samples_leaves_its_distances_out() -> None:
    notes: list[str] = []
    run = run_on(Gaps(test_count=1), JudgeConfig(epochs=1, width=4))
    metrics = evaluate_run(run, note=notes.append)
    assert "image|label/judge_accuracy" in metrics and "joint/fid_judge" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert any("joint/fid_judge, " in note for note in notes) and any("real/fid_judge_iid" in note for note in notes)


def test_a_target_is_judged_where_the_evaluator_s_needs_are_met() -> None:
    run = run_on(Gaps())
    x = complete_samples(run.data("test"))
    has = torch.arange(12) % 4 == 0
    truth = Samples(x, {name: has if name == "label" else torch.ones(12, dtype=torch.bool) for name in x})
    (judge,) = build_evaluators(
        [RecorderConfig(also="label")], {n: run.model.modality(n) for n in x}, lambda: run.data("train")
    )
    found = judge_target(run.model.modality("image"), "image", x, truth, [judge])
    assert (found["samples"], found["seen"], found["seen_samples"]) == (12, 3.0, 3)


def test_all_that_a_block_of_the_gallery_generates_is_one_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows stand side by side as though they belonged together."""
    run, calls = run_on(Gaps()), list[tuple[set[str], set[str]]]()
    drawn = gallery.sample

    def watched(*args: Any, **options: Any) -> Any:
        out = drawn(*args, **options)
        calls.append((set(options.get("observed", ())), set(out)))
        return out

    monkeypatch.setattr(gallery, "sample", watched)
    said = list[str]()
    monkeypatch.setattr(gallery, "draw_blocks", lambda *args: said.append(args[3]) or Image.new("RGB", (1, 1)))
    draw_gallery(run, tmp_path / "gallery.png", columns=2, blocks=["joint", "image", "label"])
    names = set(run.model.names)
    assert calls == [(set(), names), ({"image"}, names), ({"label"}, names)] and len(names) > 2
    assert "generated together, as one sample" in said[0]
