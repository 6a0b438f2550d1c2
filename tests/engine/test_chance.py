"""What a step leaves to chance: each of its samples has something to denoise, whatever it lacks and is shown."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from mtdiffusion import Draws, composite_loss, left_to_denoise
from mtdiffusion_engine.chance import StepChance
from mtdiffusion_engine.data import load_data
from mtdiffusion_engine.experiment import Experiment, build_model
from tests.engine.tiny import toy

BATCH = 400
OFFSET = 'clocks={kind="offset", ahead={label=0.6, mask=0.3}}'
EDGES = 'clocks={kind="edges_and_diagonal", diagonal=0.2}'
INDEPENDENT = 'clocks.kind="independent"'
ALONE = 'modalities={image={kind="image", size=4, channels=1}}'


def _chance(experiment: Experiment, batch: int = BATCH) -> StepChance:
    return StepChance(build_model(experiment), experiment.conditioning, experiment.loss, 0, batch)


def _presence(modalities: int, missing: float) -> Tensor:
    """Each modality missing by itself, but one of each sample."""
    generator = torch.Generator().manual_seed(1)
    there = torch.rand(BATCH, modalities, generator=generator) >= missing
    return (there | (torch.arange(modalities) == torch.arange(BATCH)[:, None] % modalities)).float()


def _values(experiment: Experiment) -> Mapping[str, Tensor]:
    data = load_data(experiment, build_model(experiment), "train")
    return data.batch([index % len(data) for index in range(BATCH)]).x


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("latent.layout=shared",),
        (ALONE,),
        (ALONE, "conditioning.observed=1.0", "conditioning.partial=0.0"),
        (ALONE, "conditioning={observed=0.0, partial=1.0, hidden_share=[0.01, 0.01]}"),
        ("conditioning={observed=1.0, singleton=1.0, partial=0.3}",),
        ("conditioning={observed=1.0, partial=0.0, subsets={label=1.0}}",),
        ("conditioning={observed=1.0, subsets={label=3.0, image=1.0, 'image+mask'=1.0, 'mask+label'=1.0}}",),
        (INDEPENDENT,),
        (OFFSET,),
        (OFFSET, "loss.readout={image=0.5}"),
        (OFFSET, "loss.readout=0.0", "conditioning.observed=1.0"),
        (EDGES,),
        (EDGES, "loss.readout=0.0", "conditioning.partial=0.5"),
    ],
)
def test_every_sample_has_a_loss(overrides: tuple[str, ...], missing: float) -> None:
    experiment = toy(*overrides)
    model, x = build_model(experiment).eval(), _values(experiment)
    presence = _presence(len(model.names), missing)
    visible, draws = _chance(experiment).draw(0, 0, presence)
    with torch.no_grad():
        terms = composite_loss(model, x, experiment.loss, visible=visible, presence=presence, draws=draws)
    counted = torch.stack([terms.counted[name] for name in model.names], 1)
    assert counted.any(1).all()
    assert torch.equal(left_to_denoise(model, visible, presence, experiment.loss, draws), counted.bool())


@pytest.mark.parametrize("overrides", [(), (OFFSET, "conditioning.observed=1.0"), (EDGES,)])
def test_a_sample_draws_the_same_in_whatever_part_it_is(overrides: tuple[str, ...]) -> None:
    """Whichever process trains it, beside whichever samples: what these lack is nothing to it."""
    chance, presence = _chance(toy(*overrides), 60), _presence(3, 0.5)[:60]

    def draw(start: int, stop: int) -> tuple[Tensor, Draws]:
        return chance.draw(5, start, presence[start:stop])

    parts = [draw(*part) for part in ((0, 7), (7, 40), (40, 60))]
    visible, draws = draw(0, 60)
    assert torch.equal(torch.cat([seen for seen, _ in parts]), visible)
    for i, each in enumerate(draws):
        assert torch.equal(torch.cat([part[i] for _, part in parts]), each)
    full = torch.ones_like(presence)
    presence[1:] = 1
    alike = chance.draw(5, 0, presence), chance.draw(5, 0, full)
    assert torch.equal(alike[0][0][1:], alike[1][0][1:])
    assert not torch.equal(chance.draw(6, 0, full)[0], chance.draw(5, 0, full)[0])


def test_what_a_law_leaves_clean_has_a_clock_where_it_is_alone() -> None:
    """By the offset law the label is clean in 0.6/1.6 of the samples; of those that lack all else, in none, and its
    clock is uniform."""
    chance, presence = _chance(toy(OFFSET), BATCH * 10), torch.ones(BATCH * 10, 3)
    _, draws = chance.draw(0, 0, presence)
    assert (draws.clocks[:, 2] == 0).double().mean().item() == pytest.approx(0.375, abs=0.001)  # stratified
    label_alone = presence * torch.tensor([0.0, 0.0, 1.0])
    alone = chance.draw(0, 0, label_alone)[1].clocks[:, 2].double()
    assert alone.min() > 0
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    shares = torch.histogram(alone, edges).hist / len(alone)
    torch.testing.assert_close(shares, torch.full((10,), 0.1, dtype=torch.float64), atol=0.025, rtol=0)
    clean = draws.clocks[:, 2] == 0
    assert torch.equal(alone[~clean], draws.clocks[~clean, 2])  # the others are as they were


def test_reading_out_is_not_drawn_away() -> None:
    """Read out, a label that its clock leaves clean is denoised from t = T: the image that it is read off is shown."""
    config = "conditioning={observed=1.0, partial=0.0, subsets={'image+mask'=1.0}}"
    presence = torch.ones(BATCH, 3)
    for share in (0.0, 0.5):
        visible, draws = _chance(toy(OFFSET, config, f"loss.readout={share}")).draw(0, 0, presence)
        clean, read = draws.clocks[:, 2] == 0, draws.readout < share
        shown = visible[:, :2].flatten(1).all(1)
        assert torch.equal(shown, ~clean | read)
        assert not visible[~shown].any()
