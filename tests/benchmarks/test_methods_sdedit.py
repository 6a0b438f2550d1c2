"""SDEdit: what is seen guides by where denoising starts, and strength says how far."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attrs import evolve
from tests.benchmarks.problems import ask, check_answer, digits, held_out, holes, lacking
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import SamplerSettings, sample
from mtdiffusion.loss import standard_normal
from mtdiffusion.model import Prediction
from mtdiffusion_benchmarks.interfaces import Problem
from mtdiffusion_benchmarks.methods.sdedit import SDEdit, SDEditConfig, edit, fill_holes, mean_codes, start_time
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_registry import Query, UserError
from mtdiffusion_registry.testing import check_config

HOLES = Query((), ("image",), 0.5, "patches")
TRAINING = ("training.steps=300", "training.batch_size=32", "training.checkpoint_every=0", "sampling.steps=20")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, SDEdit]:
    folder = tmp_path_factory.mktemp("sdedit") / "run"
    problem = digits(folder, *TRAINING, "evaluation.steps=20")
    made = SDEditConfig("image").fit(problem)
    assert isinstance(made, SDEdit)
    return problem, made


def at(method: SDEdit, strength: float, fill: str = "seen") -> SDEdit:
    """The same trained model, asked otherwise."""
    other = SDEdit.__new__(SDEdit)
    other.__dict__ |= method.__dict__ | {"config": evolve(method.config, strength=strength, fill=fill)}
    return other


def hidden_of(visible: Tensor) -> Tensor:
    return visible[:, None] < 0.5


def test_it_fills_holes_better_than_what_it_starts_from_and_than_samples(fitted: tuple[Problem, SDEdit]) -> None:
    problem, method = fitted
    assert method.curve[-1]["loss"] < 0.7 * method.curve[0]["loss"]
    x = held_out(problem)
    visible = holes(200, 0.25)

    def error(filled: Tensor) -> float:
        return float((filled - x["image"])[hidden_of(visible).expand_as(filled)].square().mean())

    start = fill_holes(x["image"] * visible[:, None], visible[:, None])
    found = error(ask(method, HOLES, x, visible)["image"])
    assert found < 0.9 * error(start)
    assert found < 0.9 * error(ask(at(method, 1.0), HOLES, x, visible)["image"])


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "dpmpp_2m"])
def test_at_strength_1_it_is_unconditional_sampling(fitted: tuple[Problem, SDEdit], solver: str) -> None:
    problem, method = fitted
    settings = SamplerSettings(steps=7, solver=solver)  # type: ignore[arg-type]
    whole = at(method, 1.0)
    whole.settings = settings
    x, visible = held_out(problem, 12), holes(12)
    out = ask(whole, HOLES, x, visible)["image"]
    plain = sample(method.model, 12, settings=settings, generator=torch.Generator().manual_seed(1))["image"]
    hidden = hidden_of(visible).expand_as(out)
    assert torch.equal(out[hidden], plain[hidden])
    assert torch.equal(out[~hidden], x["image"][~hidden])


def test_from_a_small_start_an_oracle_gives_the_filling_back(fitted: tuple[Problem, SDEdit]) -> None:
    """A model that takes z for what it is, and so has e = z / m, undoes the noising up to the noise that is left."""
    _, method = fitted
    process = method.model.process
    single = evolve(process, signal_table=process.signal_table[:, :1])
    guide = torch.randn(4, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def oracle(z: Tensor, t: Tensor) -> Prediction:
        codes = (z / single.signal(t)[:, 0].to(z.dtype)[:, None, None, None])[:, None]
        return Prediction({"image": {"mean": codes[:, 0]}}, codes, single.epsilon(z, codes, t))

    def distance(strength: float) -> float:
        start = start_time(strength, process.steps)
        out = edit(oracle, single, guide, start, SamplerSettings(), generator=torch.Generator().manual_seed(0))
        return float((out.params["image"]["mean"] - guide[:, 0]).abs().max())

    noise = float(single.variance(torch.tensor([1])).sqrt() / single.signal(torch.tensor([1]))[0, 0])
    assert distance(1e-6) < 4.5 * noise < 0.5
    assert distance(1e-6) < 0.1 * distance(0.8)


def test_the_trained_model_keeps_more_of_the_filling_the_smaller_the_strength(fitted: tuple[Problem, SDEdit]) -> None:
    problem, method = fitted
    x, visible = held_out(problem, 64), holes(64)
    start = fill_holes(x["image"] * visible[:, None], visible[:, None])
    changed = []
    for strength in (0.01, 0.1, 0.9):
        out = ask(at(method, strength), HOLES, x, visible)["image"]
        changed.append(float((out - start)[hidden_of(visible).expand_as(out)].abs().mean()))
    assert changed[0] < 0.8 * changed[1] and changed[1] < changed[2]  # a short training copies no picture exactly


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize("fill", ["seen", "training"])
def test_answers(tmp_path: Path, name: str, fill: str) -> None:
    problem = digits(tmp_path / "run", "training.steps=2")
    method = SDEditConfig(name, fill=fill).fit(problem)  # type: ignore[arg-type]
    check_answer(method, problem, Query((), (name,), 0.5, "patches"))
    assert method.predict(HOLES, held_out(problem, 4)) == {}
    assert not method.answers(Query())
    assert not method.answers(Query(("label",), (name,)))
    assert not method.answers(Query(("label",), (name,), 0.5))
    assert method.cost.steps == 2


def test_the_guide_is_what_is_seen_filled_by_its_mean_and_others_training_means(
    fitted: tuple[Problem, SDEdit],
) -> None:
    problem, method = fitted
    x = held_out(problem, 3)["image"]
    visible = torch.ones(3, 8, 8)
    visible[0, :4] = 0
    visible[1] = 0  # nothing at all
    model, seen = method.model, method.guide(x, visible)
    codes = model.encode(held_out(problem, 3))
    column = model.names.index("image")
    assert torch.equal(seen[2, column], codes[2, column])
    assert torch.equal(seen[0, column][:, 4:], codes[0, column][:, 4:])
    mean = codes[0, column][:, 4:].mean((-2, -1))[:, None, None]
    torch.testing.assert_close(seen[0, column][:, :4], mean.expand(-1, 4, 8))
    torch.testing.assert_close(seen[1], method.means)
    other = model.names.index("label")
    torch.testing.assert_close(seen[:, other], method.means[other].expand(3, -1, -1, -1))
    trained = at(method, 0.6, "training").guide(x, visible)
    torch.testing.assert_close(trained[0, column][:, :4], method.means[column][:, :4])
    torch.testing.assert_close(trained[0, column][:, 4:], codes[0, column][:, 4:])


def test_mean_codes_are_of_the_samples_that_have_the_modality(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run")
    model = build_model(problem.experiment)
    rows = list(range(0, len(problem.train), 2))
    codes = model.encode(problem.train.batch(rows).x)
    torch.testing.assert_close(mean_codes(model, problem.train), codes.mean(0))
    has = [row for row in rows if row % 3 != 1]
    without = mean_codes(model, lacking(problem, "image").train)
    expected = model.encode(problem.train.batch(has).x).mean(0)
    torch.testing.assert_close(without[model.names.index("image")], expected[model.names.index("image")])


def test_a_target_without_places_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run")
    with pytest.raises(UserError, match="method sdedit: target: label has no places"):
        SDEditConfig("label").fit(problem)
    with pytest.raises(UserError, match="no modality named depth"):
        SDEditConfig("depth").fit(problem)
    assert not problem.folder.exists()


def test_start_times() -> None:
    assert [start_time(s, 100) for s in (1e-9, 0.006, 0.6, 1.0)] == [1, 1, 60, 100]
    z = standard_normal(torch.zeros(1, 2), torch.Generator().manual_seed(0))
    assert F.mse_loss(fill_holes(z[:, :, None, None], torch.ones(1, 1, 1, 1))[:, :, 0, 0], z) == 0


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_config(strength: float) -> None:
    check_config(SDEditConfig("image"))
    with pytest.raises(ValueError, match="strength"):
        SDEditConfig("image", strength=strength)
