"""Errors: what is proposed in place of a word that nobody knows, and several at once."""

from __future__ import annotations

import pickle

import pytest

from mtdiffusion_registry.errors import LONGEST, Troubles, did_you_mean


@pytest.mark.parametrize(
    ("word", "known"),
    [
        ("digit.toml", "digits.toml"),
        ("stesp", "steps"),
        ("imgae", "image"),
        ("mes", "mse"),
        ("relu", "gelu"),
        ("training", "train"),
        ("modalities", "modality"),
        ("modality.imge", "modality.image"),
        ("mtdiffusion_datsets", "mtdiffusion_datasets"),
        ("ViT-B-33", "ViT-B-32"),
        ("label|imge", "label|image"),
        ("scenes", "scenes.toml"),
    ],
)
def test_a_slip_is_proposed(word: str, known: str) -> None:
    assert did_you_mean(word, ["another", known]) == f'; did you mean "{known}"?'


@pytest.mark.parametrize(
    ("word", "known"),
    [
        ("nofile.toml", "first.toml"),
        ("a.toml", "b.toml"),
        ("modality.depth", "modality.text"),
        ("evaluator.judge", "evaluator.lpips"),
        ("iou_sky", "iou_car"),
        ("joint/fid_judge", "joint/kid_inception"),
        ("label", "table"),
        ("label|depth", "label|text"),
        ("mse", "fid"),
        ("a" * (LONGEST + 1), "a" * LONGEST),
    ],
)
def test_what_is_far_is_not(word: str, known: str) -> None:
    assert did_you_mean(word, [known]) == ""


def test_the_nearest_is_proposed() -> None:
    assert did_you_mean("mask", ["masked", "masks", "task"]) == '; did you mean "masks"?'


def test_several_errors_are_told_one_after_another_in_any_process() -> None:
    troubles = Troubles()
    troubles.add("one:\na", "two", "two")
    with troubles.gathered():
        raise troubles.error()  # what is told already is not told again
    told = "2 kinds of trouble with the data:\n- one:\n  a\n- two"
    assert str(troubles.error()) == str(pickle.loads(pickle.dumps(troubles.error()))) == told
