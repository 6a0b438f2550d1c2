"""What holds of the core for any sizes, layouts, schedules, laws of clocks, precisions and missing modalities, not only
for those of the other tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, seed
from hypothesis import strategies as st
from torch import Tensor

import mtdiffusion.model
import mtdiffusion.sampler
from mtdiffusion import (
    ClockLaw,
    DiffusionProcess,
    Draws,
    LossWeights,
    MultimodalDiffusion,
    SamplerSettings,
    composite_loss,
    sample,
    variational_bound,
)
from mtdiffusion.clocks import check_path, clock_path
from mtdiffusion.interfaces import Params
from mtdiffusion.layout import Codes
from mtdiffusion.model import Prediction
from mtdiffusion.sampler import SOLVERS, Step, ddim, dpmpp_2m
from tests.reliability.made_up import (
    built,
    clocks_of,
    codes_of,
    configurations,
    data_of,
    examples,
    floats,
    laws,
    maps_of,
    processes,
    seeds,
)

T = TypeVar("T")
ROUNDED = (torch.float32, torch.float16, torch.bfloat16)
"""Narrower than the tables, which are float64."""


def many(few: int, more: int) -> pytest.MarkDecorator:
    """How many examples: few by default, more with the long tests."""
    return pytest.mark.parametrize("count", [few, pytest.param(more, marks=pytest.mark.long)])


def generator_of(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# --- the process and its clocks ---------------------------------------------------------------------------------------


@many(20, 500)
def test_the_noise_that_a_code_was_corrupted_with_is_found_again(count: int) -> None:
    @seed(0)
    @examples(count)
    @given(processes(), st.integers(1, 5), seeds)
    def holds(process: DiffusionProcess, batch: int, number: int) -> None:
        generator = generator_of(number)
        codes, t = codes_of(process, batch, generator), clocks_of(process, batch, generator, least=1)
        presence = torch.randint(2, t.shape, generator=generator).double()
        noise = torch.randn(batch, *process.layout.latent.shape, generator=generator, dtype=torch.float64)
        z = process.corrupt(codes, t, noise, presence)
        torch.testing.assert_close(process.epsilon(z, codes, t, presence), noise, rtol=1e-8, atol=1e-8)
        absent = {name: code * presence[:, i, None, None, None] for i, (name, code) in enumerate(codes.items())}
        torch.testing.assert_close(process.corrupt(absent, t, noise), z, rtol=1e-12, atol=1e-12)  # it is noise

    holds()


@many(20, 500)
def test_clocks_are_shares_of_the_path_and_a_path_never_rises(count: int) -> None:
    @seed(0)
    @examples(count)
    @given(st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), laws(n))), st.integers(1, 40), seeds)
    def holds(law: tuple[int, ClockLaw], batch: int, number: int) -> None:
        modalities, clocks = law
        drawn = clocks.draw(batch, modalities, generator_of(number))
        assert drawn.shape == (batch, modalities)
        assert bool(((drawn >= 0) & (drawn <= 1)).all())
        if clocks.shared:
            assert bool((drawn == drawn[:, :1]).all())
        total, steps = number % 200 + 1, number % 37 + 1
        path = clock_path(clocks.ahead(modalities), steps, total)
        check_path(path, [f"m{i}" for i in range(modalities)], total)

    holds()


class Rounding:
    """A process at some clocks t → s, and what each of its sums may be off by in a narrower precision: 4 units in the
    last place of the largest of what it adds up. (At most four codes meet: that many roundings, and those of the
    factors.)"""

    def __init__(self, process: DiffusionProcess, dtype: torch.dtype, t: Tensor, s: Tensor) -> None:
        self.process, self.dtype, self.t, self.s = process, dtype, t, s
        self.kappa = torch.exp(0.5 * (process.log_alpha_bar[s] - process.log_alpha_bar[t]))

    def spread(self, values: Tensor) -> Tensor:
        return self.process.layout.spread(values.reshape(*values.shape[:2], 1, 1))

    def sigma(self, t: Tensor) -> Tensor:
        return self.spread(self.process.variance(t).sqrt())

    def mean(self, codes: Codes, weights: Tensor) -> Tensor:
        """The codes' sizes, each times the size of its weight ``[B, N]``, where they meet."""
        sizes = {name: code.double().abs() for name, code in codes.items()}
        return self.process.layout.meet(weights.abs().reshape(*weights.shape[:2], 1, 1), sizes)

    def check(self, found: Tensor, exact: Tensor, size: Tensor) -> None:
        assert found.dtype == self.dtype
        info = torch.finfo(self.dtype)
        off = (found.double() - exact).abs() / (4 * (info.eps * size + info.tiny))
        assert off.amax() <= 1, f"{float(off.amax()):.3g} times as far off as it may be"


@many(30, 1000)
def test_a_process_is_rounded_once_in_any_precision(count: int) -> None:
    @seed(0)
    @examples(count)
    @given(processes(), st.sampled_from(ROUNDED), floats(0.0, 4.0), seeds)
    def holds(process: DiffusionProcess, dtype: torch.dtype, eta: float, number: int) -> None:
        generator = generator_of(number)
        t = clocks_of(process, 3, generator, least=1)
        s = (t.double() * torch.rand(3, 1, generator=generator)).long()
        presence = torch.randint(2, t.shape, generator=generator).double()
        e = codes_of(process, 3, generator, dtype)
        noise, more = (torch.randn(3, *process.layout.latent.shape, generator=generator).to(dtype) for _ in range(2))
        exact_e = {name: code.double() for name, code in e.items()}
        exact_noise, exact_more = noise.double(), more.double()
        rounding = Rounding(process, dtype, t, s)
        m_t, m_s = process.signal(t, presence), process.signal(s, presence)
        size_t, size_s = rounding.mean(e, m_t), rounding.mean(e, m_s)

        z = process.corrupt(e, t, noise, presence)
        size = size_t + rounding.sigma(t) * exact_noise.abs()
        rounding.check(z, process.corrupt(exact_e, t, exact_noise, presence), size)
        exact_z = z.double()
        residual = exact_z.abs() + size_t
        found, exact = process.epsilon(z, e, t, presence), process.epsilon(exact_z, exact_e, t, presence)
        rounding.check(found, exact, residual / rounding.sigma(t))
        found = process.posterior_mean(z, e, t, s, presence)
        size = size_s + rounding.spread(process.residual_gain(t, s)) * residual
        rounding.check(found, process.posterior_mean(exact_z, exact_e, t, s, presence), size)
        kept = eta**2 * process.log_noise_kept(t, s)
        found = process.jump(z, noise, s, kept, more)
        size = exact_z.abs() + rounding.sigma(s) * (exact_noise.abs() + exact_more.abs())
        rounding.check(found, process.jump(exact_z, exact_noise, s, kept, exact_more), size)
        if float(rounding.kappa.amax()) < 0.5 / torch.finfo(dtype).eps:  # beyond, an ε head's jumps are refused
            found = process.mean_from_epsilon(z, noise, e, t, s, presence)
            exact = process.mean_from_epsilon(exact_z, exact_noise, exact_e, t, s, presence)
            size = rounding.spread(rounding.kappa) * (exact_z.abs() + rounding.sigma(t) * exact_noise.abs())
            size = size + rounding.mean(e, rounding.kappa * m_t.abs() + m_s.abs())
            rounding.check(found, exact, size)

    holds()


@many(20, 600)
def test_a_solver_s_steps_are_rounded_once_in_any_precision(count: int) -> None:
    """Two of them, as DPM-Solver++ goes by the one before, with the same predictions."""

    @seed(0)
    @examples(count)
    @given(processes(), st.sampled_from(ROUNDED), st.sampled_from([ddim, dpmpp_2m]), floats(0.0, 2.0), seeds)
    def holds(
        process: DiffusionProcess, dtype: torch.dtype, solver: Callable[..., Step], eta: float, number: int
    ) -> None:
        generator = generator_of(number)
        clocks = torch.stack([clocks_of(process, 3, generator, least) for least in (1, 0, 0)])
        clocks = clocks.sort(0, descending=True).values[..., None, None]  # [3, B, N, 1, 1]
        steps, shape = [(clocks[0], clocks[1]), (clocks[1], clocks[2])], (3, *process.layout.latent.shape)
        codes = [codes_of(process, 3, generator, dtype) for _ in steps]
        zs, noise = ([torch.randn(shape, generator=generator).to(dtype) for _ in steps] for _ in range(2))

        def taken(dtype: torch.dtype) -> list[Tensor]:
            drawn, step, out = iter(noise), solver(process, eta), []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mtdiffusion.sampler, "standard_normal", lambda like, _: next(drawn).to(dtype))
                for z, e, (t, s) in zip(zs, codes, steps, strict=True):
                    prediction = {name: code.to(dtype) for name, code in e.items()}
                    epsilon = process.epsilon(z.to(dtype), prediction, t)
                    out.append(step(z.to(dtype), Prediction({}, prediction, epsilon), t, s))
            return out

        found, exact = taken(dtype), taken(torch.float64)
        for k, (t, s) in enumerate(steps):
            rounding = Rounding(process, dtype, t, s)
            sizes = {name: code.double().abs() for name, code in codes[k].items()}
            if solver is dpmpp_2m and k:  # it adds to a code a share of what it has changed by
                h, before = (0.5 * (process.snr(s).log() - process.snr(t).log()) for t, s in (steps[k], steps[k - 1]))
                factor = (h / (2 * before)).nan_to_num(0.0, 0.0, 0.0).abs()
                for i, (name, size) in enumerate(sizes.items()):
                    sizes[name] = size + factor[:, i : i + 1] * (size + codes[k - 1][name].double().abs())
            # ε is a residual over σ_t, of which no more than σ_s is kept.
            share = rounding.sigma(s) / rounding.sigma(t)
            size = rounding.mean(sizes, process.signal(s)) + rounding.sigma(s) * noise[k].double().abs()
            size = size + share * (zs[k].double().abs() + rounding.mean(sizes, process.signal(t)))
            moved = process.layout.spread(s < t) > 0  # where no clock moves, no step is taken
            rounding.check(*(torch.where(moved, each, 0) for each in (found[k], exact[k], 2 * size)))

    holds()


# --- small models -----------------------------------------------------------------------------------------------------

loss_weights = st.builds(
    LossWeights,
    *[st.sampled_from([0.0, 0.5])] * 4,
    l1_time=st.sampled_from(["snr", "elbo"]),
    readout=st.sampled_from([0.0, 0.5, 1.0]),
)


@st.composite
def requests(draw: st.DrawFn, tables: dict[str, Any]) -> dict[str, Any]:
    """What is asked of a model: the names of what is observed, of those of them that are seen in part, strengths, and
    settings."""
    names, own = [*tables["modalities"]], tables["latent"]["layout"] == "own"
    observed = draw(st.lists(st.sampled_from(names), unique=True))
    solver, shown = draw(st.sampled_from(SOLVERS)), draw(st.booleans())
    jumps = "parameterisation" in tables["model"] and solver != "dpmpp_2m"  # of an ε head are to be short
    how: dict[str, Any] = {"solver": solver, "steps": tables["process"]["steps"] if jumps else draw(st.integers(1, 6))}
    if solver != "ancestral":
        how["eta"] = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    if shown:
        how["guidance"] = draw(st.sampled_from([1.0, 0.0, 2.5]))
        how["guidance_interval"] = draw(st.sampled_from([(0.0, 1.0), (0.3, 0.8)]))
    else:
        how["conditioning"] = "replacement"
    if own and draw(st.booleans()):
        how["path"] = {name: draw(floats(0.0, 1.0)) for name in names}
    strength = {name: draw(floats(0.05, 1.0)) for name in observed if own and draw(st.booleans())}
    in_part = [name for name in observed if draw(st.booleans())]
    return {"observed": observed, "in_part": in_part, "strength": strength, "how": how}


def noise_by_row(number: int, batch: int, rows: slice, call: Callable[[], T]) -> T:
    """What a call gives if these rows of a batch are all that it is asked for, each with the noise it has there."""
    drawn = 0

    def noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        nonlocal drawn
        drawn += 1
        whole = torch.randn(batch, *like.shape[1:], generator=generator_of(number + drawn), dtype=torch.float64)
        return whole[rows].to(like.dtype)

    with pytest.MonkeyPatch.context() as patch:
        for module in (mtdiffusion.model, mtdiffusion.sampler):
            patch.setattr(module, "standard_normal", noise)
        return call()


@many(12, 300)
def test_a_sample_s_loss_does_not_depend_on_its_batch(count: int) -> None:
    @seed(0)
    @examples(count)
    @given(configurations(), st.integers(2, 4), loss_weights, seeds)
    @torch.no_grad()
    def holds(tables: dict[str, Any], batch: int, weights: LossWeights, number: int) -> None:
        model, generator = built(tables), generator_of(number)
        x, draws, visible = (
            data_of(model, batch, number),
            Draws.of(model, batch, generator),
            maps_of(model, batch, generator),
        )
        presence = (torch.rand(batch, len(model.names), generator=generator) < 0.7).double()

        def terms(rows: slice) -> dict[str, Tensor]:
            return composite_loss(
                model,
                {name: value[rows] for name, value in x.items()},
                weights,
                visible=visible[rows],
                presence=presence[rows],
                draws=Draws(*(each[rows] for each in draws)),
            ).each()

        whole = terms(slice(None))
        for row in range(batch):
            for name, value in terms(slice(row, row + 1)).items():
                assert bool(value.isfinite().all())
                torch.testing.assert_close(value[0], whole[name][row], rtol=1e-9, atol=1e-9)

    holds()


@many(12, 300)
def test_what_is_sampled_does_not_depend_on_the_rest_of_the_batch(count: int) -> None:
    """With the same noise, to begin with and on the way."""

    @seed(0)
    @examples(count)
    @given(
        configurations().flatmap(lambda tables: st.tuples(st.just(tables), requests(tables))), st.integers(2, 4), seeds
    )
    def holds(asked: tuple[dict[str, Any], dict[str, Any]], batch: int, number: int) -> None:
        tables, request = asked
        model = built(tables)
        x, visible = data_of(model, batch, number), maps_of(model, batch, generator_of(number))
        places = [i for i, name in enumerate(model.names) if model.spatial[i] and name in request["in_part"]]

        def drawn(rows: slice) -> dict[str, Tensor]:
            def call() -> dict[str, Tensor]:
                return sample(
                    model,
                    len(range(batch)[rows]),
                    observed={name: x[name][rows] for name in request["observed"]},
                    visible={model.names[i]: visible[rows, i] for i in places},
                    strength=request["strength"],
                    settings=SamplerSettings(**request["how"]),
                )

            return noise_by_row(number, batch, rows, call)

        whole = drawn(slice(None))
        for row in range(batch):
            for name, value in drawn(slice(row, row + 1)).items():
                assert bool(value.double().isfinite().all())
                torch.testing.assert_close(value[0], whole[name][row], rtol=1e-7, atol=1e-7)

    holds()


OFF = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""How far a loss, and a code that is sampled, may be from float64's with the same weights, in units of 1 plus its
size: of 16 bits, some ten units in the last place."""


def least(tables: dict[str, Any], dtype: torch.dtype) -> float:
    """The same of a configuration's L1, which of an ε head is a difference of what is wrong with ε and with the codes,
    each large where the two make up for one another."""
    return OFF[dtype] * (5 if "parameterisation" in tables["model"] else 1)


def rounded(model: MultimodalDiffusion, dtype: torch.dtype) -> tuple[MultimodalDiffusion, MultimodalDiffusion]:
    """A model in a narrower precision, and one in float64 of the same weights."""
    narrow = deepcopy(model).to(dtype)
    return narrow, deepcopy(narrow).double()


def in_precision(x: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in x.items()}


def far(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).abs() / (1 + exact.abs())).amax())


@many(12, 300)
def test_a_loss_is_the_same_in_any_precision(count: int) -> None:
    @seed(0)
    @examples(count)
    @given(configurations(), st.sampled_from(ROUNDED), st.sampled_from(["snr", "elbo"]), seeds)
    @torch.no_grad()
    def holds(tables: dict[str, Any], dtype: torch.dtype, l1_time: str, number: int) -> None:
        model, generator = built(tables), generator_of(number)
        x, draws, visible = data_of(model, 3, number), Draws.of(model, 3, generator), maps_of(model, 3, generator)
        presence = (torch.rand(3, len(model.names), generator=generator) < 0.7).double()
        draws = draws._replace(noise=draws.noise.to(dtype))
        x = in_precision(x, dtype)
        weights = LossWeights(1.0, 1.0, 1.0, 1.0, l1_time=l1_time)  # type: ignore[arg-type]
        narrow, exact = (
            composite_loss(each, x, weights, visible=visible, presence=presence, draws=draws).each()
            for each in rounded(model, dtype)
        )
        for name, value in narrow.items():
            assert value.dtype in (torch.float32, dtype)
            assert far(value, exact[name]) < least(tables, dtype), name

    holds()


@many(6, 200)
def test_a_bound_is_the_same_in_any_precision(count: int) -> None:
    @seed(0)
    @examples(count)
    @given(configurations(), st.sampled_from(ROUNDED), seeds)
    def holds(tables: dict[str, Any], dtype: torch.dtype, number: int) -> None:
        model = built(tables)
        x = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in data_of(model, 3, number).items()
        }

        def nats(model: MultimodalDiffusion) -> Tensor:
            call = partial(variational_bound, model, x, times=4, generator=generator_of(number))
            return noise_by_row(number, 3, slice(None), lambda: call().nats)

        narrow, exact = (nats(each) for each in rounded(model, dtype))
        assert narrow.dtype == torch.float32
        assert far(narrow, exact) < least(tables, dtype)

    holds()


@many(6, 200)
def test_what_is_sampled_is_the_same_in_any_precision(count: int) -> None:
    """What is expected of each modality in the end: of near ties, the most likely one may be another. All clocks run
    together, so that nothing follows from such a choice. Not of an ε head, whose jumps multiply what is rounded off."""

    @seed(0)
    @examples(count)
    @given(configurations(), st.sampled_from(ROUNDED), st.sampled_from(SOLVERS), st.integers(1, 6), seeds)
    def holds(tables: dict[str, Any], dtype: torch.dtype, solver: str, steps: int, number: int) -> None:
        if solver != "dpmpp_2m":
            tables["model"].pop("parameterisation", None)
        model = built(tables)
        settings = SamplerSettings(steps, solver, path={})  # type: ignore[arg-type]

        def expected(model: MultimodalDiffusion) -> dict[str, Tensor]:
            last: dict[str, Params] = {}
            call = partial(sample, model, 3, settings=settings, on_step=lambda _k, _n, params: last.update(params))
            noise_by_row(number, 3, slice(None), call)
            decoders = {name: model.modality(name).decoder for name in model.names}
            with torch.no_grad():
                return {
                    name: decoders[name].expected_encoding(params, model.modality(name).encoder)
                    for name, params in last.items()
                }

        narrow, exact = (expected(each) for each in rounded(model, dtype))
        for name, code in narrow.items():
            assert code.dtype == dtype
            assert far(code, exact[name]) < OFF[dtype], name

    holds()


@many(6, 200)
def test_a_code_is_the_same_under_autocast(count: int) -> None:
    """What that rounds off would not be small beside the noise near t = 0."""

    @seed(0)
    @examples(count)
    @given(configurations(), seeds)
    def holds(tables: dict[str, Any], number: int) -> None:
        model = built(tables).float()
        x, generator = data_of(model, 3, number), generator_of(number)
        noise, t = model.noise(3, generator), clocks_of(model.process, 3, generator)
        z = model.process.corrupt(model.encode(x), t, noise)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.process.corrupt(model.encode(x), t, noise), z)

    holds()
