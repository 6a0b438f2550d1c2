"""What is shown to the network: how often each subset is drawn, and that nothing hidden leaks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtdiffusion import Observation, Prediction, SubsetDistribution
from mtdiffusion.conditioning import merge_visible, pool_visibility, random_holes
from tests.core.toys import SIDE, data, picture_and_label

NAMES = ("image", "mask", "label")
SPATIAL = (True, True, False)
BATCH = 20_000


def _draw(distribution: SubsetDistribution, batch: int = BATCH, size: tuple[int, int] = (4, 4)) -> Tensor:
    return distribution.draw(NAMES, SPATIAL, batch, size, torch.Generator().manual_seed(0))


def _assert_share(found: Tensor, expected: float) -> None:
    """A share of BATCH samples, within five standard deviations."""
    assert found.double().mean().item() == pytest.approx(expected, abs=5 * math.sqrt(0.25 / len(found)))


def test_maps_are_0_or_1_for_every_modality() -> None:
    visible = _draw(SubsetDistribution(), 100, (4, 6))
    assert visible.shape == (100, 3, 4, 6)
    assert ((visible == 0) | (visible == 1)).all()


def test_maps_are_drawn_only_if_something_may_be_seen_in_part() -> None:
    assert _draw(SubsetDistribution(partial=0.0), 100).shape == (100, 3, 1, 1)
    nothing_spatial = SubsetDistribution().draw(NAMES, (False,) * 3, 100, (4, 6), torch.Generator().manual_seed(0))
    assert nothing_spatial.shape == (100, 3, 1, 1)


def test_something_is_observed_as_often_as_asked() -> None:
    # Coins show nothing in 1/8 of their draws; a singleton always shows one.
    whole = _draw(SubsetDistribution(observed=0.6, singleton=0.5, partial=0.0)).mean((2, 3))
    _assert_share((whole.sum(1) > 0), 0.6 * (0.5 + 0.5 * 7 / 8))


def test_singletons_have_their_share_and_are_even() -> None:
    whole = _draw(SubsetDistribution(observed=1.0, singleton=0.5, partial=0.0)).mean((2, 3))
    alone = whole[whole.sum(1) == 1]
    _assert_share((whole.sum(1) == 1), 0.5 + 0.5 * 3 / 8)
    for i in range(3):
        _assert_share(alone[:, i], 1 / 3)


def test_without_singletons_every_modality_has_its_own_coin() -> None:
    whole = _draw(SubsetDistribution(observed=1.0, singleton=0.0, partial=0.0)).mean((2, 3))
    subsets, counts = torch.unique(whole, dim=0, return_counts=True)
    assert len(subsets) == 8
    for count in counts:
        assert count.item() / BATCH == pytest.approx(1 / 8, abs=5 * math.sqrt(1 / 8 * 7 / 8 / BATCH))


def test_observed_0_shows_nothing_and_singleton_1_shows_one() -> None:
    assert not _draw(SubsetDistribution(observed=0.0, partial=0.0)).any()
    alone = _draw(SubsetDistribution(observed=1.0, singleton=1.0, partial=0.0))
    assert (alone.amax((2, 3)).sum(1) == 1).all()


def test_only_spatial_modalities_are_seen_in_part() -> None:
    visible = _draw(SubsetDistribution(partial=1.0))
    share = visible.mean((2, 3))
    in_part = (share > 0) & (share < 1)
    assert not in_part[:, 2].any()
    assert in_part[:, 0].any()
    assert in_part[:, 1].any()
    assert not (in_part[:, 0] & in_part[:, 1]).any()  # one modality at a time has holes


def test_partial_observation_has_its_share() -> None:
    visible = _draw(SubsetDistribution(partial=0.3, hidden_share=(0.5, 0.5)), size=(8, 8))
    share = visible.mean((2, 3))
    # Half hidden of 64 places: neither all nor none, whether a box or scattered (odds of 2^-64).
    _assert_share(((share > 0) & (share < 1)).any(1), 0.3)


def test_explicit_subsets_are_drawn_by_weight() -> None:
    subsets = {("label",): 2.0, ("image", "mask"): 1.0, (): 1.0}
    whole = _draw(SubsetDistribution(observed=1.0, partial=0.0, subsets=subsets)).mean((2, 3))
    for names, expected in ((("label",), 0.5), (("image", "mask"), 0.25), ((), 0.25)):
        flags = torch.tensor([float(name in names) for name in NAMES])
        _assert_share((whole == flags).all(1), expected)


def test_explicit_subsets_are_still_hidden_when_nothing_is_observed() -> None:
    whole = _draw(SubsetDistribution(observed=0.25, partial=0.0, subsets={("label",): 1.0})).mean((2, 3))
    _assert_share(whole[:, 2], 0.25)
    assert not whole[:, :2].any()


def test_an_unknown_name_in_a_subset_is_named() -> None:
    with pytest.raises(ValueError, match="expected names among image, mask, label, found lable"):
        _draw(SubsetDistribution(subsets={("lable",): 1.0}))


@pytest.mark.parametrize("name", ["observed", "singleton", "partial"])
def test_a_probability_above_1_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SubsetDistribution(**{name: 1.5})


def test_the_same_generator_draws_the_same_subsets() -> None:
    assert torch.equal(_draw(SubsetDistribution(), 50), _draw(SubsetDistribution(), 50))


@pytest.mark.parametrize("share", [0.1, 0.4, 0.75])
def test_holes_hide_about_the_share(share: float) -> None:
    hidden = 1 - random_holes(torch.full((4000,), share), (16, 16), torch.Generator().manual_seed(0)).mean((1, 2))
    # A box has whole rows and columns: up to half a place off in each direction, so (√share ± 1/32)² − share.
    assert hidden.mean().item() == pytest.approx(share, abs=0.5 * (share**0.5 / 16 + 1 / 32**2) + 0.005)


def test_half_of_the_holes_are_one_box() -> None:
    hidden = 1 - random_holes(torch.full((BATCH // 4,), 0.3), (12, 12), torch.Generator().manual_seed(0))
    box = hidden.amax(2).sum(1) * hidden.amax(1).sum(1) == hidden.sum((1, 2))  # its rows × its columns
    _assert_share(box, 0.5)


def test_a_place_of_the_latent_is_seen_only_if_all_data_under_it_is() -> None:
    visible = torch.ones(1, 4, 6)
    visible[0, 0, 0] = 0
    visible[0, 3, 5] = 0
    pooled = pool_visibility(visible, 2, 2)
    assert pooled.tolist() == [[[[0.0, 1.0], [1.0, 0.0]]]]


@pytest.mark.parametrize("shape", [(1, 5, 4), (1, 4, 5), (4, 4), (1, 1, 4, 4)])
def test_a_visibility_map_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 2 and 2"):
        pool_visibility(torch.ones(shape), 2, 2)


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 3, 4, 4)])
def test_merging_keeps_what_is_seen_and_fills_in_the_rest(shape: tuple[int, ...]) -> None:
    observed, generated = torch.zeros(shape), torch.ones(shape)
    visible = torch.zeros(2, 2, 2)  # coarser than the data
    visible[0, 0, 1] = 1
    merged = merge_visible(observed, generated, visible)
    expected = torch.ones(shape)
    expected[0, ..., :2, 2:] = 0
    assert torch.equal(merged, expected)


def test_an_observation_knows_what_is_complete_and_merges_what_is_seen() -> None:
    codes = {"a": torch.arange(8.0).reshape(1, 2, 2, 2), "b": torch.arange(8.0, 12.0).reshape(1, 1, 2, 2)}
    seen = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    observation = Observation(codes, seen)
    assert observation.complete.tolist() == [[True, False, False]]
    guess = {"a": torch.full((1, 2, 2, 2), -1.0), "b": torch.full((1, 1, 2, 2), -1.0), "c": torch.ones(1, 3, 2, 2)}
    merged = observation.merge(guess, ["a", "b", "c"])
    assert torch.equal(merged["a"], codes["a"])
    assert merged["b"].flatten().tolist() == [8.0, -1.0, -1.0, -1.0]
    assert merged["c"] is guess["c"]  # nothing of it is known


@pytest.mark.parametrize("epsilon_head", [False, True])
@pytest.mark.parametrize(("layout", "show_clean"), [("own", False), ("own", True), ("shared", False)])
def test_what_is_hidden_never_reaches_the_network(layout: str, show_clean: bool, epsilon_head: bool) -> None:
    """Sample 0 hides half of the picture, sample 1 the picture, sample 2 the label: change that and nothing changes."""
    model = picture_and_label(layout, show_clean=show_clean, epsilon_head=epsilon_head)
    visible = torch.ones(3, 2, 4, 4)
    visible[0, 0, :, 2:] = 0
    visible[1, 0] = 0
    visible[2, 1] = 0
    x, other = data(3, seed=0), data(3, seed=1)
    changed = {"picture": x["picture"].clone(), "label": x["label"].clone()}
    changed["picture"][0, :, :, 4:] = other["picture"][0, :, :, 4:]
    changed["picture"][1] = other["picture"][1]
    changed["label"][2] = (x["label"][2] + 1) % 3
    noise = model.noise(3, torch.Generator().manual_seed(0))
    t = model.layout.clocks(torch.tensor([[5, 5], [10, 10], [20, 20]])[:, :, None, None], visible)

    def predict(batch: dict[str, Tensor]) -> Prediction:
        observation = model.observe(batch, visible)
        z = model.layout.place(noise, observation, model.process.signal(torch.zeros(1, 2, 1, 1).long()))
        return model.complete(model(z, t, observation), z, t, observation)

    seen = {"picture": other["picture"].where(torch.arange(SIDE) < 4, x["picture"]), "label": x["label"]}
    with torch.no_grad():
        before, after, moved = (predict(batch) for batch in (x, changed, seen))
    for name, key in (("picture", "mean"), ("label", "logits")):
        assert torch.equal(before.codes[name], after.codes[name])
        assert torch.equal(before.params[name][key], after.params[name][key])
        assert not torch.equal(before.params[name][key][0], moved.params[name][key][0])  # what is seen does reach it
    assert torch.equal(before.epsilon, after.epsilon)


@pytest.mark.parametrize(("pattern", "boxes"), [("box", 1.0), ("patches", 0.0), ("mixed", 0.5)])
def test_holes_are_boxes_or_scattered_as_asked(pattern: str, boxes: float) -> None:
    """A box hides whole runs of rows and columns: what is hidden is the product of its hidden rows and columns."""
    hidden = 1 - random_holes(torch.full((400,), 0.3), (12, 12), torch.Generator().manual_seed(0), pattern)  # type: ignore[arg-type]
    product = hidden.amax(2)[:, :, None] * hidden.amax(1)[:, None, :]
    share = (hidden == product).all(2).all(1).float().mean().item()
    assert share == pytest.approx(boxes, abs=0.08)
