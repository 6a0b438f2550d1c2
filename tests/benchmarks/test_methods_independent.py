"""The joint model with a time for each modality: any from any by choice of times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.benchmarks.problems import ask, check_answer, digits, held_out

from mtdiffusion_benchmarks.interfaces import Fitted, Problem
from mtdiffusion_benchmarks.methods.independent import IndependentConfig, build_independent, independent_loss
from mtdiffusion_registry import Query
from mtdiffusion_registry.testing import check_config

READ = Query(("image",), ("label",))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, Fitted]:
    folder = tmp_path_factory.mktemp("independent") / "run"
    problem = digits(folder, "training.steps=100", "training.batch_size=32", "training.checkpoint_every=0")
    return problem, IndependentConfig().fit(problem)


def test_it_learns(fitted: tuple[Problem, Fitted]) -> None:
    problem, method = fitted
    first, last = method.curve[0], method.curve[-1]
    assert last["loss"] < 0.4 * first["loss"]
    x = held_out(problem)
    read = ask(method, READ, x)["label"]
    assert (read == x["label"]).double().mean() > 0.4  # chance is 0.1
    told = method.predict(READ, x)["label"]["logits"].argmax(1)
    assert (told == x["label"]).double().mean() > 0.4


@pytest.mark.parametrize(
    "query",
    [
        Query(),
        READ,
        Query(("label",), ("image", "mask")),
        Query(("image", "label"), ("mask",)),
        Query((), ("image",), 0.5, "patches"),
        Query((), ("mask",), 0.5, "patches"),
        Query(("label",), ("image",), 0.5, "patches"),
    ],
    ids=lambda query: query.given or "joint",
)
def test_answers(fitted: tuple[Problem, Fitted], query: Query) -> None:
    problem, method = fitted
    assert set(check_answer(method, problem, query)) == set(query.targets or problem.modalities)
    assert set(method.predict(query, held_out(problem, 4))) == (
        set() if query.joint or query.hidden else set(query.targets)
    )


def test_what_it_is_given_matters(fitted: tuple[Problem, Fitted]) -> None:
    problem, method = fitted
    x = held_out(problem, 12)
    other = {name: value.roll(1, 0) for name, value in x.items()}
    query = Query(("label",), ("image",))
    assert not torch.equal(ask(method, query, x)["image"], ask(method, query, other)["image"])


def test_questions_it_cannot_be_asked(fitted: tuple[Problem, Fitted]) -> None:
    _, method = fitted
    assert not method.answers(Query(("depth",), ("label",)))
    assert not method.answers(Query(("image",), ("depth",)))
    assert not method.answers(Query((), ("label",), 0.5))


def test_every_modality_has_channels_and_a_time_of_its_own(tmp_path: Path) -> None:
    """Also where the experiment has them share channels: what is at t = 0 is seen as it is, whatever else is noisy."""
    problem = digits(tmp_path / "run", "latent.layout=shared")
    model = build_independent(problem.experiment).eval()
    assert model.layout.disjoint
    x = held_out(problem, 6)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args))
    z = {name: model.modality(name).encoder(x[name]) for name in model.names}
    for late in ("mask", "label"):
        times = {name: torch.full((6,), 60 if name == late else 0) for name in model.names}
        model(z, times)
    (first, _, told), (second, _, told_later) = seen
    assert torch.equal(model.layout.take("image", first), z["image"])
    assert torch.equal(model.layout.take("image", second), z["image"])
    assert not torch.equal(told, told_later)  # the same times in another order are told apart


def test_loss_draws_times_independently_and_predicts_nothing_clean(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run")
    model = build_independent(problem.experiment)
    times: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda _, args: times.append(args[1]))
    generator = torch.Generator().manual_seed(0)
    batch = problem.train.batch(range(300))
    independent_loss(model, batch, generator)
    (drawn,) = times
    assert all(int(t.min()) == 0 and int(t.max()) == model.steps for t in drawn.values())
    together = torch.corrcoef(torch.stack([t.double() for t in drawn.values()]))
    assert (together - torch.eye(3)).abs().max() < 0.2


def test_config() -> None:
    check_config(IndependentConfig())
