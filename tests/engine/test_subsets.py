"""What a training sample shows: how often anything, which subsets, and holes."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from attrs import evolve
from torch import Tensor

from mtdiffusion_engine.subsets import ConditioningConfig, random_holes

NAMES = ("image", "mask", "label")
SPATIAL = (True, True, False)
BATCH = 20_000


def _draw(distribution: ConditioningConfig, batch: int = BATCH, size: tuple[int, int] = (4, 4)) -> Tensor:
    return distribution.draw(NAMES, SPATIAL, batch, size, torch.Generator().manual_seed(0))


def _assert_share(found: Tensor, expected: float) -> None:
    """A share of BATCH samples, within five standard deviations."""
    assert found.double().mean().item() == pytest.approx(expected, abs=5 * math.sqrt(0.25 / len(found)))


def test_maps_are_0_or_1_for_every_modality() -> None:
    visible = _draw(ConditioningConfig(), 100, (4, 6))
    assert visible.shape == (100, 3, 4, 6)
    assert ((visible == 0) | (visible == 1)).all()


def test_maps_are_drawn_only_if_something_may_be_seen_in_part() -> None:
    assert _draw(ConditioningConfig(partial=0.0), 100).shape == (100, 3, 1, 1)
    nothing_spatial = ConditioningConfig().draw(NAMES, (False,) * 3, 100, (4, 6), torch.Generator().manual_seed(0))
    assert nothing_spatial.shape == (100, 3, 1, 1)


def test_something_is_observed_as_often_as_asked() -> None:
    # Coins show nothing in 1/7 of their draws, as they never show all; a singleton always shows one.
    whole = _draw(ConditioningConfig(observed=0.6, singleton=0.5, partial=0.0)).mean((2, 3))
    _assert_share((whole.sum(1) > 0), 0.6 * (0.5 + 0.5 * 6 / 7))


def test_singletons_have_their_share_and_are_even() -> None:
    whole = _draw(ConditioningConfig(observed=1.0, singleton=0.5, partial=0.0)).mean((2, 3))
    alone = whole[whole.sum(1) == 1]
    _assert_share((whole.sum(1) == 1), 0.5 + 0.5 * 3 / 7)
    for i in range(3):
        _assert_share(alone[:, i], 1 / 3)


def test_without_singletons_every_modality_has_its_own_coin_and_one_is_tails() -> None:
    whole = _draw(ConditioningConfig(observed=1.0, singleton=0.0, partial=0.0)).mean((2, 3))
    subsets, counts = torch.unique(whole, dim=0, return_counts=True)
    assert len(subsets) == 7
    assert not subsets.all(1).any()
    for count in counts:
        assert count.item() / BATCH == pytest.approx(1 / 7, abs=5 * math.sqrt(1 / 7 * 6 / 7 / BATCH))


def _shares(whole: Tensor) -> dict[tuple[int, ...], float]:
    """How often each subset was drawn, by the places of its modalities."""
    subsets, counts = torch.unique(whole.long(), dim=0, return_counts=True)
    return {
        tuple(row.nonzero()[:, 0].tolist()): count / len(whole)
        for row, count in zip(subsets, counts.tolist(), strict=True)
    }


@pytest.mark.parametrize("needed", [(0, 1, 2, 3), (0, 1, 3), (1, 2), (2,)])
@pytest.mark.parametrize(
    "config",
    [
        ConditioningConfig(observed=0.8, singleton=0.4, partial=0.0),
        ConditioningConfig(observed=1.0, singleton=0.0, partial=0.0),
        ConditioningConfig(observed=1.0, singleton=1.0, partial=0.0),
        ConditioningConfig(
            observed=0.9, partial=0.0, subsets={"a": 1.0, "c": 5.0, "b+d": 2.0, "a+b+d": 3.0, "b+c+d": 0.5}
        ),
    ],
)
def test_a_subset_is_drawn_on_condition_that_something_is_left(
    config: ConditioningConfig, needed: tuple[int, ...]
) -> None:
    """The law of all 16 subsets of four modalities, by enumeration, where these alone are there to denoise."""
    subsets = [s for size in range(5) for s in itertools.combinations(range(4), size)]
    kinds: list[tuple[float, dict[tuple[int, ...], float]]]  # the share of each kind, and the weights of its subsets
    if config.subsets:
        listed = {tuple("abcd".index(name) for name in key.split("+")): w for key, w in config.subsets.items()}
        kinds = [(config.observed, listed)]
    else:
        kinds = [
            (config.observed * config.singleton, {(i,): 1.0 for i in range(4)}),
            (config.observed * (1 - config.singleton), dict.fromkeys(subsets, 1.0)),
        ]
    expected = dict.fromkeys(subsets, 0.0)
    expected[()] = 1 - config.observed
    for share, weights in kinds:
        fit = {subset: weight for subset, weight in weights.items() if not set(needed) <= set(subset)}
        for subset, weight in (fit or {(): 1.0}).items():
            expected[subset] += share * weight / sum((fit or {(): 1.0}).values())

    there = torch.tensor([i in needed for i in range(4)])
    generator = torch.Generator().manual_seed(1)
    visible = config.draw(
        "abcd", (False,) * 4, BATCH, (1, 1), generator, left=lambda seen: (seen[..., 0, 0] < 1) & there
    )
    found = _shares(visible[..., 0, 0])
    for subset, share in expected.items():
        margin = 5 * math.sqrt(share * (1 - share) / BATCH)
        assert found.get(subset, 0.0) == pytest.approx(share, abs=margin), subset


@pytest.mark.parametrize("config", [ConditioningConfig(), ConditioningConfig(observed=1.0, singleton=1.0)])
def test_a_lone_modality_is_never_shown_whole(config: ConditioningConfig) -> None:
    """It is shown as if nothing were observed: not at all, or with holes in the share of ``partial``."""
    drawn = [
        each.draw(["image"], [True], BATCH, (4, 4), torch.Generator().manual_seed(0))
        for each in (config, evolve(config, observed=0.0))
    ]
    assert torch.equal(*drawn)
    assert not drawn[0].flatten(1).all(1).any()
    _assert_share(drawn[0].flatten(1).any(1), config.partial)


def test_what_was_drawn_with_something_left_stays() -> None:
    """Only samples that would train nothing are drawn again."""
    config = ConditioningConfig(observed=1.0, partial=0.3)
    any_will_do = config.draw(
        NAMES, SPATIAL, 500, (4, 4), torch.Generator().manual_seed(0), left=lambda seen: torch.ones(len(seen), 3).bool()
    )
    visible = _draw(config, 500)
    whole = any_will_do.flatten(1).all(1)
    assert 0 < whole.sum() < 100
    assert torch.equal(visible[~whole], any_will_do[~whole])


def test_rows_do_not_depend_on_the_part_that_is_asked_for() -> None:
    config = ConditioningConfig(observed=1.0, singleton=0.3, partial=0.3)
    there = torch.rand(60, 3, generator=torch.Generator().manual_seed(1)) < 0.6

    def draw(part: slice) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return config.draw(
            NAMES, SPATIAL, 60, (4, 4), generator, part, lambda seen: (seen.amin((2, 3)) < 1) & there[part]
        )

    assert torch.equal(torch.cat([draw(slice(0, 7)), draw(slice(7, 40)), draw(slice(40, 60))]), draw(slice(None)))


def test_observed_0_shows_nothing_and_singleton_1_shows_one() -> None:
    assert not _draw(ConditioningConfig(observed=0.0, partial=0.0)).any()
    alone = _draw(ConditioningConfig(observed=1.0, singleton=1.0, partial=0.0))
    assert (alone.amax((2, 3)).sum(1) == 1).all()


def test_only_spatial_modalities_are_seen_in_part() -> None:
    visible = _draw(ConditioningConfig(partial=1.0))
    share = visible.mean((2, 3))
    in_part = (share > 0) & (share < 1)
    assert not in_part[:, 2].any()
    assert in_part[:, 0].any()
    assert in_part[:, 1].any()
    assert not (in_part[:, 0] & in_part[:, 1]).any()  # one modality at a time has holes


def test_partial_observation_has_its_share() -> None:
    visible = _draw(ConditioningConfig(partial=0.3, hidden_share=(0.5, 0.5)), size=(8, 8))
    share = visible.mean((2, 3))
    # Half hidden of 64 places: neither all nor none, whether a box or scattered (odds of 2^-64).
    _assert_share(((share > 0) & (share < 1)).any(1), 0.3)


def test_explicit_subsets_are_drawn_by_weight() -> None:
    subsets = {"label": 2.0, "image+mask": 1.0, "mask": 1.0}
    whole = _draw(ConditioningConfig(observed=1.0, partial=0.0, subsets=subsets)).mean((2, 3))
    for names, expected in ((("label",), 0.5), (("image", "mask"), 0.25), (("mask",), 0.25)):
        flags = torch.tensor([float(name in names) for name in NAMES])
        _assert_share((whole == flags).all(1), expected)


def test_a_listed_subset_of_all_is_drawn_no_more() -> None:
    subsets = {"label": 3.0, "image+mask": 1.0, "image+mask+label": 6.0}
    found = _shares(_draw(ConditioningConfig(observed=1.0, partial=0.0, subsets=subsets)).amin((2, 3)))
    assert set(found) == {(2,), (0, 1)}
    assert found[2,] == pytest.approx(0.75, abs=0.02)


def test_explicit_subsets_are_still_hidden_when_nothing_is_observed() -> None:
    whole = _draw(ConditioningConfig(observed=0.25, partial=0.0, subsets={"label": 1.0})).mean((2, 3))
    _assert_share(whole[:, 2], 0.25)
    assert not whole[:, :2].any()


def test_an_unknown_name_in_a_subset_is_named() -> None:
    with pytest.raises(ValueError, match="expected names among image, mask, label, found lable"):
        _draw(ConditioningConfig(subsets={"lable": 1.0}))


@pytest.mark.parametrize("name", ["observed", "singleton", "partial"])
def test_a_probability_above_1_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ConditioningConfig(**{name: 1.5})


def test_the_same_generator_draws_the_same_subsets() -> None:
    assert torch.equal(_draw(ConditioningConfig(), 50), _draw(ConditioningConfig(), 50))


@pytest.mark.parametrize("share", [0.1, 0.4, 0.75])
def test_holes_hide_about_the_share(share: float) -> None:
    hidden = 1 - random_holes(torch.full((4000,), share), (16, 16), torch.Generator().manual_seed(0)).mean((1, 2))
    # A box has whole rows and columns: up to half a place off in each direction, so (√share ± 1/32)² − share.
    assert hidden.mean().item() == pytest.approx(share, abs=0.5 * (share**0.5 / 16 + 1 / 32**2) + 0.005)


@pytest.mark.parametrize("pattern", ["mixed", "box", "patches"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1])
def test_holes_hide_one_place_at_least(pattern: Literal["mixed", "box", "patches"], share: float) -> None:
    hidden = 1 - random_holes(torch.full((2000,), share), (3, 3), torch.Generator().manual_seed(0), pattern)
    assert hidden.sum((1, 2)).min() == 1
    # Scattered, the one place is anywhere.
    assert hidden[hidden.sum((1, 2)) == 1].mean(0).sub(1 / 9).abs().max() < 0.05


def test_half_of_the_holes_are_one_box() -> None:
    hidden = 1 - random_holes(torch.full((BATCH // 4,), 0.3), (12, 12), torch.Generator().manual_seed(0))
    box = hidden.amax(2).sum(1) * hidden.amax(1).sum(1) == hidden.sum((1, 2))  # its rows × its columns
    _assert_share(box, 0.5)


@pytest.mark.parametrize(("pattern", "boxes"), [("box", 1.0), ("patches", 0.0), ("mixed", 0.5)])
def test_holes_are_boxes_or_scattered_as_asked(pattern: str, boxes: float) -> None:
    """A box hides whole runs of rows and columns: what is hidden is the product of its hidden rows and columns."""
    hidden = 1 - random_holes(torch.full((400,), 0.3), (12, 12), torch.Generator().manual_seed(0), pattern)  # type: ignore[arg-type]
    product = hidden.amax(2)[:, :, None] * hidden.amax(1)[:, None, :]
    share = (hidden == product).all(2).all(1).float().mean().item()
    assert share == pytest.approx(boxes, abs=0.08)
