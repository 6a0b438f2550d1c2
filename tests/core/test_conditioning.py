"""What is seen of a modality, at the latent's resolution and at the data's, and that nothing hidden leaks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtdiffusion import Observation, Prediction
from mtdiffusion.conditioning import merge_visible, pool_visibility
from tests.core.toys import SIDE, data, picture_and_label


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
