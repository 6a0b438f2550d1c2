"""The masked autoencoder: it fills holes from what is visible, and sees no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.benchmarks.problems import ask, check_answer, digits, held_out, holes
from torch.nn import functional as F

from mtdiffusion_benchmarks.methods.mae import MAEConfig, MaskedAutoencoder
from mtdiffusion_registry import Query, UserError
from mtdiffusion_registry.testing import check_config

SMALL = MAEConfig("image", width=32, depth=2, heads=2)


def test_it_fills_holes_better_than_the_mean_picture(tmp_path: Path) -> None:
    problem = digits(
        tmp_path / "run",
        "latent={height=4,width=4}",
        "training.steps=200",
        "training.batch_size=32",
        "training.checkpoint_every=0",
    )
    fitted = SMALL.fit(problem)
    x = held_out(problem)
    visible = holes(200, 0.25, side=4)
    hidden = 1 - F.interpolate(visible[:, None], (8, 8), mode="nearest")

    def error(image: torch.Tensor) -> float:
        return float(((image - x["image"]).square() * hidden).sum() / hidden.sum())

    mean = problem.train.batch(range(len(problem.train))).x["image"].mean(0)
    filled = ask(fitted, Query((), ("image",), 0.25), x, visible)["image"]
    assert error(filled) < 0.9 * error(mean)


def test_answers(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run", "training.steps=2")
    fitted = SMALL.fit(problem)
    check_answer(fitted, problem, Query((), ("image",), 0.5, "patches"))
    assert fitted.predict(Query((), ("image",), 0.5), held_out(problem, 4)) == {}
    assert not fitted.answers(Query())
    assert not fitted.answers(Query((), ("mask",), 0.5))
    assert not fitted.answers(Query(("label",), ("image",)))
    assert not fitted.answers(Query(("label",), ("image",), 0.5))


@pytest.mark.parametrize("training", [True, False])
def test_hidden_patches_are_not_seen_and_visible_ones_are(training: bool) -> None:
    model = MaskedAutoencoder((3, 8, 12), (4, 3), width=16, depth=2, heads=2, low=-1.0, high=1.0).train(training)
    x = torch.randn(2, 3, 8, 12)
    visible = torch.ones(2, 4, 3)
    visible[0, 1, 2] = 0
    visible[1] = 0  # nothing at all
    out = model(x, visible)
    assert out.shape == x.shape and bool(out.isfinite().all())
    inside = F.interpolate(visible[:, None], (8, 12), mode="nearest").expand_as(x) < 0.5
    assert torch.equal(model(torch.where(inside, x + 9, x), visible), out)
    assert not torch.allclose(model(torch.where(inside, x, x + 0.1), visible)[0], out[0], atol=1e-4)


def test_patches_come_out_where_they_went_in() -> None:
    model = MaskedAutoencoder((2, 4, 6), (2, 3), width=16, depth=1, heads=2, low=-1.0, high=1.0)
    tokens = torch.zeros(1, 2 * 2 * 2, 6)
    tokens[0, :, 4] = 1  # second row, second column
    picture = model.fold(tokens)
    assert picture[0, :, 2:, 2:4].eq(1).all() and picture.sum() == 8


def test_what_it_cannot_be_is_said(tmp_path: Path) -> None:
    problem = digits(tmp_path / "run")
    with pytest.raises(UserError, match=r"found label, whose data are torch.int64"):
        MAEConfig("label").fit(problem)
    with pytest.raises(UserError, match=r"found mask, whose data are torch.int64"):
        MAEConfig("mask").fit(problem)
    with pytest.raises(UserError, match="no modality named depth"):
        MAEConfig("depth").fit(problem)
    with pytest.raises(ValueError, match="3 do not divide the width 32"):
        MAEConfig("image", width=32, heads=3)
    assert not problem.folder.exists()


def test_config() -> None:
    check_config(SMALL)
