"""The judge reads real pictures well, says so, and its Fréchet distance is the closed form."""

import pytest
import torch

from mtdiffusion_plugins.metrics.judge import JudgeConfig, frechet_distance
from mtdiffusion_registry import Registry, UserError


def digits(split: str) -> dict[str, torch.Tensor]:
    data = Registry.discover().config_class("dataset", "digits")().build(split)
    samples = [data[i] for i in range(len(data))]
    return {name: torch.stack([s[name] for s in samples]) for name in ("image", "label")}


@pytest.fixture(scope="module")
def judged():
    train, test = digits("train"), digits("test")
    return JudgeConfig(epochs=12, width=16).build(train), train, test


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    b = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * scale + torch.tensor([1.0, 0.0, -2.0])
    expected = 1 + 4 + ((scale - 1) ** 2).sum().item()  # |μ₁ − μ₂|² + Σ (σ₁ − σ₂)² for diagonal covariances
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_it_reads_held_out_digits_and_says_how_well(judged) -> None:
    judge, _, test = judged
    assert judge.real(test)["judge_accuracy"] > 0.93


def test_it_tells_right_from_wrong(judged) -> None:
    judge, _, test = judged
    wrong = {"image": test["image"], "label": (test["label"] + 1) % 10}
    assert judge.conditional("image", test, test)["judge_accuracy"] > 0.93
    assert judge.conditional("image", test, wrong)["judge_accuracy"] < 0.05
    assert judge.joint(wrong)["judge_agreement"] < 0.05
    assert judge.conditional("label", test, test) == {}


def test_noise_and_collapse_are_far_from_the_data(judged) -> None:
    judge, _, test = judged
    real = judge.real(test)["fid_judge"]
    noise = {"image": torch.rand(360, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1}
    one_digit = {"image": test["image"][test["label"] == 3]}
    assert judge.joint(noise)["fid_judge"] > 5 * real
    assert judge.joint(one_digit)["fid_judge"] > 5 * real
    assert judge.joint(one_digit)["class_entropy"] < 0.3 < 0.95 < judge.joint(test)["class_entropy"]


def test_it_is_the_same_every_time() -> None:
    train = {name: x[:256] for name, x in digits("train").items()}
    first, second = (JudgeConfig(epochs=2, width=8).build(train) for _ in range(2))
    assert first.real(train) == second.real(train)


def test_a_modality_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no modality named 'picture'; there are image, label"):
        JudgeConfig(input="picture").build({"image": torch.zeros(1), "label": torch.zeros(1)})
