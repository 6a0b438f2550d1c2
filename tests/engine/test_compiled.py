"""Sampling with a compiled network: it is compiled once for whatever is asked, and samples are the same."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mtdiffusion import MultimodalDiffusion, SamplerSettings, sample
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_engine.run import Run
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import UserError
from tests.engine.tiny import REGISTRY, toy

TOLERANCE = 1e-4
"""Compiled, sums are taken in another order: pictures in [−1, 1] may differ by so much."""
CLOSE = {"atol": TOLERANCE, "rtol": 0.0}
DIT = ('backbone={ kind = "dit", width = 16, depth = 1, heads = 2, channels = 8 }',)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(*overrides: str) -> MultimodalDiffusion:
    torch.manual_seed(0)
    model = build_model(toy(*overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh network's last layers are zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def requests() -> Iterator[tuple[int, dict[str, Any], SamplerSettings]]:
    """Batches, clocks, subsets, parts, guidance, solvers and ends of batches, in turn."""
    image, label = torch.rand(5, 1, 4, 4) * 2 - 1, torch.arange(5) % 3
    half = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(5, 4, 4)
    few = SamplerSettings(3, compile=True)
    yield 5, {}, few
    yield 3, {}, few
    yield 1, {}, few
    yield 5, {"observed": {"label": label}}, few
    yield 5, {"observed": {"image": image, "label": label}}, few
    yield 5, {"observed": {"image": image}, "visible": {"image": half}}, few
    yield 5, {"observed": {"image": image}, "strength": {"image": 0.5}}, few
    yield 5, {"observed": {"label": label}}, SamplerSettings(3, "ddim", guidance=2.0, compile=True)
    yield 5, {}, SamplerSettings(3, "dpmpp_2m", path={"label": 0.5}, compile=True)
    yield 5, {"observed": {"label": label}}, SamplerSettings(3, conditioning="replacement", compile=True)


@pytest.mark.parametrize(
    "overrides", [(), DIT, ("latent.layout=shared",), ("model.parameterisation=epsilon_head", "loss.l1=1.0")]
)
def test_it_is_compiled_once_for_whatever_is_asked(overrides: tuple[str, ...]) -> None:
    model = model_of(*overrides)
    model.compiled(backend="aot_eager")
    shared = "latent.layout=shared" in overrides
    for batch, given, settings in requests():
        if shared and (settings.path or "strength" in given):
            continue  # one clock
        found = sample(model, batch, **given, settings=settings, generator=torch.Generator().manual_seed(1))
        plainly = SamplerSettings(
            settings.steps,
            settings.solver,
            path=settings.path,
            guidance=settings.guidance,
            conditioning=settings.conditioning,
        )
        wanted = sample(model, batch, **given, settings=plainly, generator=torch.Generator().manual_seed(1))
        for name, x in wanted.items():
            torch.testing.assert_close(found[name], x, **CLOSE)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_copy_computes_with_its_own_weights_and_new_weights_need_no_new_graph() -> None:
    model = model_of()
    model.compiled(backend="aot_eager")
    settings = SamplerSettings(2, compile=True)

    def drawn(of: MultimodalDiffusion) -> Tensor:
        return sample(of, 4, settings=settings, generator=torch.Generator().manual_seed(1))["image"]

    first = drawn(model)
    other = copy.deepcopy(model)
    other.compiled(backend="aot_eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(drawn(other), first, **CLOSE)
    assert not torch.allclose(drawn(model), first, atol=1e-2)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    trainer = Trainer(toy("training.steps=1"), tmp_path / "run", REGISTRY, device="cpu", on_message=lambda _: None)
    trainer.train()
    from mtdiffusion_engine.run import load_run

    return load_run(tmp_path / "run", device="cpu", registry=REGISTRY)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) here: the compiler makes C++ for a CPU")
def test_a_runs_samples_are_the_same_compiled_to_machine_code(run: Run) -> None:
    image = torch.zeros(6, 1, 4, 4)
    for given in ({}, {"observed": {"image": image}}):
        found = run.sample(6, **given, compile=True)
        for name, x in run.sample(6, **given).items():
            torch.testing.assert_close(found[name], x, **CLOSE)
    assert counters["stats"]["unique_graphs"] == 1


def test_where_nothing_can_be_compiled_a_sentence_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    with pytest.raises(UserError, match=r"the network cannot be compiled here.*leave compile false"):
        run.sample(2, compile=True)
