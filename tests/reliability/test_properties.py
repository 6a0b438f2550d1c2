"""What holds of the core for any sizes, schedules, laws of clocks and missing modalities, not only for those of the
other tests."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from mtdiffusion import (
    ClockLaw,
    DiffusionProcess,
    DirectWeights,
    Draws,
    LossWeights,
    OwnLayout,
    Retention,
    SamplerSettings,
    SNRMatched,
    TargetSignal,
    WeightSchedule,
    composite_loss,
    sample,
)
from mtdiffusion.clocks import (
    EdgesAndDiagonal,
    IndependentClocks,
    MixedClocks,
    OffsetClocks,
    SharedClock,
    check_path,
    clock_path,
)
from tests.core.toys import data, picture_and_label

cases = settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))

floats = partial(st.floats, allow_subnormal=False)  # a trainer sets this process to flush them to zero
gains = floats(0.1, 2.0)
schedules: st.SearchStrategy[WeightSchedule] = st.one_of(
    st.just(SNRMatched()),
    st.lists(gains, min_size=2, max_size=5).map(lambda knots: TargetSignal(tuple(knots))),
    st.builds(
        DirectWeights,
        st.sampled_from(["constant", "linear", "cosine"]),
        floats(0.1, 2.0),
        floats(-0.5, 0.5),
        floats(-0.5, 0.5),
    ),
)
shares = floats(0.0, 1.0)


@st.composite
def processes(draw: st.DrawFn) -> DiffusionProcess:
    count, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layout = OwnLayout({f"m{i}": draw(st.integers(1, 3)) for i in range(count)}, height, width)
    steps, kind = draw(st.integers(2, 30)), draw(st.sampled_from(["compensated", "literal", "rectified_flow"]))
    return DiffusionProcess.build(Retention.from_curve("cosine", steps, count, kind), draw(schedules), layout)


@st.composite
def laws(draw: st.DrawFn, modalities: int) -> ClockLaw:
    kind = draw(st.sampled_from([SharedClock, IndependentClocks, MixedClocks, OffsetClocks, EdgesAndDiagonal]))
    if kind is OffsetClocks:
        return OffsetClocks(tuple(draw(st.lists(shares, min_size=modalities, max_size=modalities))))
    return kind(draw(shares)) if kind in (MixedClocks, EdgesAndDiagonal) else kind()


def codes_of(
    process: DiffusionProcess, batch: int, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    specs = {name: process.layout.share(name).shape for name in process.layout.names}
    return {name: torch.randn(batch, *shape, generator=generator, dtype=dtype) for name, shape in specs.items()}


@seed(0)
@cases
@given(processes(), st.integers(1, 5), st.integers(0, 2**31), st.data())
def test_the_noise_that_a_code_was_corrupted_with_is_found_again(
    process: DiffusionProcess, batch: int, number: int, drawn: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(number)
    count = len(process.layout.names)
    codes = codes_of(process, batch, generator, torch.float64)
    t = torch.randint(1, process.steps + 1, (batch, count), generator=generator)
    presence = torch.randint(2, (batch, count), generator=generator).double()
    noise = torch.randn(batch, *process.layout.latent.shape, generator=generator, dtype=torch.float64)
    z = process.corrupt(codes, t, noise, presence)
    torch.testing.assert_close(process.epsilon(z, codes, t, presence), noise, rtol=1e-8, atol=1e-8)
    absent = {name: code * presence[:, i, None, None, None] for i, (name, code) in enumerate(codes.items())}
    torch.testing.assert_close(process.corrupt(absent, t, noise), z, rtol=1e-12, atol=1e-12)  # what is absent is noise


@seed(0)
@cases
@given(processes(), st.integers(0, 2**31))
def test_single_and_double_precision_agree(process: DiffusionProcess, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    count = len(process.layout.names)
    codes = codes_of(process, 3, generator, torch.float64)
    t = torch.randint(1, process.steps + 1, (3, count), generator=generator)
    s = (t.double() * torch.rand(3, count, generator=generator)).long()
    noise = torch.randn(3, *process.layout.latent.shape, generator=generator, dtype=torch.float64)
    found = {}
    for dtype in (torch.float32, torch.float64):
        e = {name: code.to(dtype) for name, code in codes.items()}
        z = process.corrupt(e, t, noise.to(dtype))
        found[dtype] = z, process.posterior_mean(z, e, t, s)
    for single, double in zip(found[torch.float32], found[torch.float64], strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@seed(0)
@cases
@given(st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), laws(n))), st.integers(1, 40), st.integers(0, 2**31))
def test_clocks_are_shares_of_the_path_and_a_path_never_rises(
    law: tuple[int, ClockLaw], batch: int, number: int
) -> None:
    count, clocks = law
    drawn = clocks.draw(batch, count, torch.Generator().manual_seed(number))
    assert drawn.shape == (batch, count)
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    if clocks.shared:
        assert bool((drawn == drawn[:, :1]).all())
    total, steps = number % 200 + 1, number % 37 + 1
    check_path(clock_path(clocks.ahead(count), steps, total), [f"m{i}" for i in range(count)], total)


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_a_samples_loss_does_not_depend_on_its_batch(layout: str) -> None:
    model = picture_and_label(layout)

    @seed(0)
    @cases
    @given(st.integers(2, 6), st.integers(0, 2**31), floats(0, 1), floats(0, 1))
    def holds(batch: int, number: int, l1: float, l2: float) -> None:
        generator = torch.Generator().manual_seed(number)
        x, draws = data(batch, number), Draws.of(model, batch, generator)
        presence = torch.randint(2, (batch, 2), generator=generator).float()
        visible = torch.randint(2, (batch, 2, 1, 1), generator=generator).float()
        weights = LossWeights(l1=l1, l2=l2 + 0.1)
        whole = composite_loss(model, x, weights, visible=visible, presence=presence, draws=draws).total
        row = number % batch
        part = slice(row, row + 1)
        alone = composite_loss(
            model,
            {name: value[part] for name, value in x.items()},
            weights,
            visible=visible[part],
            presence=presence[part],
            draws=Draws(*(each[part] for each in draws)),
        ).total
        torch.testing.assert_close(alone, whole[part], rtol=1e-4, atol=1e-4)

    holds()


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_what_is_sampled_does_not_depend_on_the_rest_of_the_batch(layout: str) -> None:
    """Of the same noise: without noise on the way, a sample follows from its start and from what it is given."""
    model = picture_and_label(layout)

    @seed(0)
    @cases
    @given(st.integers(2, 5), st.integers(0, 2**31), st.integers(1, 8), st.sampled_from(["ddim", "dpmpp_2m"]))
    def holds(batch: int, number: int, steps: int, solver: str) -> None:
        how = SamplerSettings(steps, solver, eta=0.0)  # type: ignore[arg-type]
        given_ = data(batch, number)["label"]

        def drawn(count: int) -> Tensor:
            generator = torch.Generator().manual_seed(number)
            return sample(model, count, observed={"label": given_[:count]}, settings=how, generator=generator)[
                "picture"
            ]

        torch.testing.assert_close(drawn(1), drawn(batch)[:1], rtol=1e-4, atol=1e-4)

    holds()
