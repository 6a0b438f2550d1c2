"""The framework's own model under the benchmark: laws of clocks, the control of one query, and replacement."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benchmarks.problems import REGISTRY, ask, check_answer, digits, held_out

from mtdiffusion import IndependentClocks, SharedClock
from mtdiffusion_benchmarks.interfaces import Fitted, Problem
from mtdiffusion_benchmarks.methods.joint import Diffusion, JointConfig, ReplacementConfig, SingleConfig
from mtdiffusion_benchmarks.profile import load_profile
from mtdiffusion_registry import Query

READ = Query(("image",), ("label",))


@pytest.fixture(scope="module")
def independent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, Fitted]:
    """As the profiles have it."""
    changes = load_profile("small", REGISTRY)[0].methods["joint-independent"].set
    assert changes == load_profile("smoke", REGISTRY)[0].methods["joint-independent"].set
    folder = tmp_path_factory.mktemp("independent") / "run"
    budget = ("training.steps=100", "training.batch_size=32", "training.checkpoint_every=0")
    problem = digits(folder, *budget, *changes)
    return problem, JointConfig().fit(problem)


def test_a_model_of_independent_clocks_conditions_on_what_it_never_saw_observed(
    independent: tuple[Problem, Fitted],
) -> None:
    problem, method = independent
    assert isinstance(method, Diffusion) and isinstance(method.model.law, IndependentClocks)
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
        Query(("label",), ("image",), 0.5, "patches"),
    ],
    ids=lambda query: query.given or "joint",
)
def test_any_query_is_answered(independent: tuple[Problem, Fitted], query: Query) -> None:
    problem, method = independent
    assert set(check_answer(method, problem, query)) == set(query.targets or problem.modalities)
    told = set() if query.joint or query.hidden else set(query.targets)
    assert set(method.predict(query, held_out(problem, 4))) == told
    assert not method.answers(Query(("depth",), ("label",)))
    assert not method.answers(Query(("image",), ("depth",)))


def test_the_control_of_one_query_has_one_clock_and_its_own_modalities_alone(tmp_path: Path) -> None:
    law = ("clocks.kind=offset", "clocks.ahead={mask=0.3}", "sampling.path={mask=0.2}", "loss.readout={mask=0.5}")
    problem = digits(tmp_path / "run", "training.steps=1", *law)
    method = SingleConfig(("image",), ("label",)).fit(problem)
    assert isinstance(method, Diffusion)
    assert method.model.names == ["image", "label"] and isinstance(method.model.law, SharedClock)
    check_answer(method, problem, Query(("label",), ("image",)))


def test_what_a_network_is_not_shown_it_does_not_read(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run", "training.steps=2")
    method = ReplacementConfig().fit(problem)
    check_answer(method, problem, READ)
    assert method.predict(READ, held_out(problem, 4)) == {}
