"""The laws of clocks: what each draws, and the paths that sampling takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtdiffusion import (
    ClockLaw,
    EdgesAndDiagonal,
    IndependentClocks,
    MixedClocks,
    OffsetClocks,
    SharedClock,
)
from mtdiffusion.clocks import check_path, clock_path, stratified

MANY = 6000
LAWS: dict[str, ClockLaw] = {
    "shared": SharedClock(),
    "independent": IndependentClocks(),
    "mixed": MixedClocks(),
    "offset": OffsetClocks((0.2, 0.5, 0.8)),
    "edges_and_diagonal": EdgesAndDiagonal(),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw(law: ClockLaw, batch: int = MANY, modalities: int = 3) -> Tensor:
    return law.draw(batch, modalities, _generator())


def _assert_share(found: Tensor, expected: float) -> None:
    """A share of the rows, within five standard deviations."""
    deviation = math.sqrt(max(expected * (1 - expected), 1 / len(found)) / len(found))
    assert found.double().mean().item() == pytest.approx(expected, abs=5 * deviation)


def _assert_uniform(clocks: Tensor) -> None:
    """Each tenth of (0, 1] has its share."""
    for tenth in range(10):
        _assert_share((clocks * 10).ceil() == tenth + 1, 0.1)


# Drawing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5, 4000])
def test_stratified_draws_are_one_in_each_equal_part_in_random_order(batch: int) -> None:
    u = stratified(batch, _generator())
    assert ((u > 0) & (u <= 1)).all()
    assert ((u * batch).ceil().sort().values - 1).tolist() == list(range(batch))
    assert batch == 1 or not torch.equal(u, u.sort().values)


def test_a_small_batch_draws_every_part_equally_often_in_the_long_run() -> None:
    generator = _generator()
    _assert_uniform(torch.cat([stratified(3, generator) for _ in range(4000)]))


@every_law
def test_a_law_draws_clocks_between_data_and_noise_for_any_number_of_modalities(law: ClockLaw) -> None:
    for modalities in (1, 2, 3) if not isinstance(law, OffsetClocks) else (3,):
        clocks = _draw(law, 500, modalities)
        assert clocks.shape == (500, modalities)
        assert clocks.device.type == "cpu"
        assert ((clocks >= 0) & (clocks <= 1)).all()
        assert (clocks > 0).any(1).all()  # something is left to predict


@every_law
def test_a_law_draws_from_the_generator_alone(law: ClockLaw) -> None:
    before = torch.get_rng_state()
    assert torch.equal(_draw(law, 50), _draw(law, 50))
    assert not torch.equal(_draw(law, 50), law.draw(50, 3, _generator(1)))
    assert torch.equal(torch.get_rng_state(), before)


@every_law
def test_only_one_clock_for_all_is_shared(law: ClockLaw) -> None:
    clocks = _draw(law)
    assert law.shared == bool((clocks == clocks[:, :1]).all())


@pytest.mark.parametrize("law", [SharedClock(), IndependentClocks(), MixedClocks(), MixedClocks(0.2)])
def test_each_clock_by_itself_is_uniform(law: ClockLaw) -> None:
    for clocks in _draw(law).unbind(1):
        _assert_uniform(clocks)


@pytest.mark.parametrize("law", [SharedClock(), IndependentClocks()])
def test_each_clock_by_itself_is_stratified(law: ClockLaw) -> None:
    for clocks in _draw(law, 100).unbind(1):
        assert ((clocks * 100).ceil().sort().values - 1).tolist() == list(range(100))


def test_independent_clocks_tell_nothing_of_one_another() -> None:
    correlation = _draw(IndependentClocks()).T.corrcoef() - torch.eye(3)
    assert correlation.abs().max() < 5 / MANY**0.5


@pytest.mark.parametrize("independent", [0.0, 0.3, 1.0])
def test_mixed_clocks_are_independent_for_a_share_and_one_for_the_others(independent: float) -> None:
    clocks = _draw(MixedClocks(independent))
    together = (clocks == clocks[:, :1]).all(1)
    _assert_share(together, 1 - independent)
    apart = clocks[~together]
    assert (apart.sort(1).values.diff(dim=1) > 0).all()  # no two of them alike
    if independent == 0.3:
        assert (apart.T.corrcoef() - torch.eye(3)).abs().max() < 5 / len(apart) ** 0.5


def test_offset_clocks_run_ahead_as_the_formula_says() -> None:
    offsets = torch.tensor([0.3, 0.0, 1.2], dtype=torch.float64)
    clocks = _draw(OffsetClocks(tuple(offsets.tolist())))
    u = 2.2 * stratified(MANY, _generator())
    torch.testing.assert_close(clocks, (u[:, None] - offsets).clamp(0, 1))
    for i, offset in enumerate(offsets.tolist()):
        _assert_share(clocks[:, i] == 0, offset / 2.2)
        _assert_share(clocks[:, i] == 1, (1.2 - offset) / 2.2)
        between = (clocks[:, i] > 0) & (clocks[:, i] < 1)
        _assert_share(between, 1 / 2.2)
        _assert_uniform(clocks[between, i])


def test_only_how_far_offsets_lie_apart_matters() -> None:
    torch.testing.assert_close(_draw(OffsetClocks((0.2, 0.5, 0.8))), _draw(OffsetClocks((0.0, 0.3, 0.6))))
    torch.testing.assert_close(_draw(OffsetClocks((0.5, 0.5, 0.5))), _draw(SharedClock()))


@pytest.mark.parametrize("diagonal", [0.0, 0.4, 1.0])
def test_edges_have_clean_and_noise_beside_those_that_share_a_clock(diagonal: float) -> None:
    clocks = _draw(EdgesAndDiagonal(diagonal))
    clean, noise = clocks == 0, clocks == 1
    active = ~clean & ~noise
    assert active.any(1).all()
    common = clocks.where(active, torch.nan).nanmean(1, keepdim=True)
    torch.testing.assert_close(clocks.where(active, common), common.expand(-1, 3))  # one clock for the active
    _assert_uniform(common[:, 0])
    # Off the diagonal one is active for certain, and each other is clean, noise or active alike.
    _assert_share(active.all(1), diagonal + (1 - diagonal) / 9)
    for i in range(3):
        _assert_share(clean[:, i], (1 - diagonal) * 2 / 9)
        _assert_share(noise[:, i], (1 - diagonal) * 2 / 9)
    _assert_share(clean[:, 0] & noise[:, 1], (1 - diagonal) / 27)


# Running ahead ------------------------------------------------------------------------------------------------------


@every_law
def test_none_runs_ahead_but_with_offsets(law: ClockLaw) -> None:
    expected = [0.0, 0.3, 0.6] if isinstance(law, OffsetClocks) else [0.0, 0.0, 0.0]
    ahead = law.ahead(3)
    assert ahead.dtype == torch.float64
    torch.testing.assert_close(ahead, torch.tensor(expected, dtype=torch.float64))


def test_offsets_are_one_for_each_modality() -> None:
    law = OffsetClocks((0.0, 0.5))
    message = "offsets: expected one for each of 3 modalities, found 2"
    with pytest.raises(ValueError, match=message):
        law.ahead(3)
    with pytest.raises(ValueError, match=message):
        law.draw(4, 3)


# Paths --------------------------------------------------------------------------------------------------------------


def _offsets(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_path_of_one_clock_falls_evenly() -> None:
    assert clock_path(_offsets(0, 0), 4, 1000).tolist() == [[t, t] for t in (1000, 750, 500, 250, 0)]
    assert clock_path(_offsets(0.7, 0.7), 4, 1000).tolist() == [[t, t] for t in (1000, 750, 500, 250, 0)]


@pytest.mark.parametrize(("steps", "total"), [(7, 1000), (25, 40), (39, 40), (40, 40)])
def test_a_path_of_one_clock_never_stands_still(steps: int, total: int) -> None:
    gaps = -clock_path(_offsets(0), steps, total)[:, 0].diff()
    assert len(gaps) == steps
    assert set(gaps.tolist()) <= {math.floor(total / steps), math.ceil(total / steps)}


def test_no_path_has_more_steps_than_its_clocks() -> None:
    assert clock_path(_offsets(0), 1000, 40)[:, 0].tolist() == list(range(40, -1, -1))
    assert len(clock_path(_offsets(0, 1), 1000, 40)) == 81


def test_clocks_ahead_start_and_arrive_sooner() -> None:
    path = clock_path(_offsets(0, 0.5), 6, 100)
    assert path.tolist() == [[100, 100], [100, 75], [100, 50], [75, 25], [50, 0], [25, 0], [0, 0]]


def test_far_enough_ahead_is_one_after_the_other() -> None:
    path = clock_path(_offsets(1, 0, 2), 12, 100)
    moving = path.diff(dim=0) < 0
    assert moving.sum(1).tolist() == [1] * 12
    assert moving.int().argmax(1).tolist() == [2] * 4 + [0] * 4 + [1] * 4


@pytest.mark.parametrize("ahead", [(0, 0, 0), (0, 0.3, 0.6), (0.61, 0.07, 0.333), (2, 0, 1)])
@pytest.mark.parametrize("steps", [1, 7, 100, 5000])
@pytest.mark.parametrize("total", [1, 20, 1000])
def test_every_path_goes_from_noise_to_data_and_never_back(ahead: tuple[float, ...], steps: int, total: int) -> None:
    path = clock_path(_offsets(*ahead), steps, total)
    assert path.dtype == torch.int64
    assert torch.equal(check_path(path, "abc", total), path)
    assert (path.diff(dim=0) < 0).any(1).all()  # no step without a move
    assert len(path) <= steps + 1


@pytest.mark.parametrize(
    "path",
    [
        torch.zeros(0, 2, dtype=torch.long),
        torch.tensor([[20, 20]]),
        torch.tensor([20, 0]),
        torch.tensor([[20, 20, 20], [0, 0, 0]]),
        torch.tensor([[20.0, 20.0], [0.0, 0.0]]),
    ],
)
def test_a_tensor_that_is_no_path_is_refused(path: Tensor) -> None:
    with pytest.raises(ValueError, match=r"path: expected integer clocks \[steps \+ 1, 2\].* image, label.* found"):
        check_path(path, ["image", "label"], 20)


@pytest.mark.parametrize("path", [[[20, 19], [0, 0]], [[20, 20], [0, 1]], [[20, 20], [5, 5], [5, 6], [0, 0]]])
def test_a_path_that_does_not_fall_from_noise_to_data_is_refused(path: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="path: expected clocks that fall from T = 20 to 0 and never rise"):
        check_path(torch.tensor(path), ["image", "label"], 20)
