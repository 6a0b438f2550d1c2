"""The judge reads real pictures well, says so, and its Fréchet distance is the closed form."""

import pytest
import torch

from mtdiffusion_plugins.metrics.judge import JudgeConfig, frechet_distance
from mtdiffusion_registry import Registry, UserError


def digits(split: str) -> dict[str, torch.Tensor]:
    data = Registry.discover().config_class("dataset", "digits")().build(split)
    samples = [data[i] for i in range(len(data))]
    return {name: torch.stack([s[name] for s in samples]) for name in ("image", "mask", "label")}


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


def test_it_has_nothing_to_say_of_samples_without_what_it_looks_at(judged) -> None:
    judge, _, test = judged
    assert judge.joint({"label": test["label"]}) == {}


def test_noise_and_collapse_are_far_from_the_data(judged) -> None:
    judge, _, test = judged
    real = judge.real(test)["fid_judge"]
    noise = {"image": torch.rand(360, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1}
    one_digit = {"image": test["image"][test["label"] == 3]}
    assert judge.joint(noise)["fid_judge"] > 5 * real
    assert judge.joint(one_digit)["fid_judge"] > 5 * real
    assert judge.joint(noise)["kid_judge"] > 5 * abs(judge.real(test)["kid_judge"])
    assert judge.joint(noise)["memorisation_judge"] > 1.5 * judge.real(test)["memorisation_judge"]
    for metric in ("precision_judge", "recall_judge"):
        assert judge.joint(noise)[metric] < 0.1 < 0.5 < judge.real(test)[metric]
    assert judge.joint(one_digit)["precision_judge"] > 0.5 > 0.2 > judge.joint(one_digit)["recall_judge"]
    assert judge.joint(one_digit)["class_entropy"] < 0.3 < 0.95 < judge.joint(test)["class_entropy"]


def test_the_balanced_distance_sees_within_classes_alone(judged) -> None:
    judge, _, test = judged
    few = (test["label"] >= 5) & (torch.arange(len(test["label"])) % 4 > 0)  # a quarter of half of the classes
    skewed = {name: x[~few] for name, x in test.items()}
    real, joint = judge.real(test), judge.joint(skewed)
    assert real["fid_judge_balanced"] == pytest.approx(real["fid_judge"], rel=0.05)  # the split is balanced as it is
    assert joint["fid_judge"] > 1.7 * real["fid_judge"]
    assert joint["fid_judge_balanced"] < 0.5 * (joint["fid_judge"] + real["fid_judge"])
    worse = {
        "image": test["image"] + 0.3 * torch.randn(test["image"].shape, generator=torch.Generator().manual_seed(0))
    }
    assert judge.joint(worse)["fid_judge_balanced"] > 2 * real["fid_judge_balanced"]
    assert "fid_judge_balanced" not in judge.joint({"image": test["image"][test["label"] == 3]})


def test_the_perceptual_distance_is_that_of_the_lpips_package_without_its_weights(judged) -> None:
    import lpips

    judge, train, test = judged
    a, b = test["image"], train["image"][: len(test["image"])]
    layers = []
    hooks = [
        part.register_forward_hook(lambda *args: layers.append(args[-1]))
        for part in judge.classifier.modules()
        if isinstance(part, torch.nn.ReLU)
    ]
    with torch.no_grad():
        judge.classifier(torch.cat([a, b]))
    for hook in hooks:
        hook.remove()
    assert len(layers) == 3
    expected = torch.zeros(len(a), 1, 1, 1)
    for f, g in (layer.chunk(2) for layer in layers):
        squared = (lpips.normalize_tensor(f) - lpips.normalize_tensor(g)) ** 2
        expected += lpips.spatial_average(squared.sum(1, keepdim=True), keepdim=True)
    found = judge.conditional("image", {"image": a}, {"image": b, "label": test["label"]})["perceptual_judge"]
    assert found == pytest.approx(expected.mean().item(), rel=1e-5)


def test_the_perceptual_distance_is_of_each_to_its_own_truth(judged) -> None:
    judge, _, test = judged
    x = test["image"]

    def distance(generated: torch.Tensor) -> float:
        return judge.conditional("image", {"image": generated}, test)["perceptual_judge"]

    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert distance(x) == 0
    assert 0 < distance(x + 0.05 * noise) < distance(x + 0.3 * noise) < distance(x.roll(1, 0))


def test_training_samples_are_seen_to_be_copies(judged) -> None:
    judge, train, test = judged
    copies = {"image": train["image"][:360], "label": train["label"][:360]}
    assert judge.joint(copies)["memorisation_judge"] < 1e-3 < 0.7 < judge.real(test)["memorisation_judge"] < 1.4
    assert judge.joint(copies)["precision_judge"] == 1


DISTANCES = {"fid_judge", "kid_judge", "precision_judge", "recall_judge", "memorisation_judge"}


def test_its_metrics_and_their_directions(judged) -> None:
    judge, _, test = judged
    conditional, joint, real = judge.conditional("image", test, test), judge.joint(test), judge.real(test)
    assert conditional.keys() == {*DISTANCES, "judge_accuracy", "perceptual_judge"}
    assert joint.keys() == {*DISTANCES, "judge_agreement", "class_entropy", "fid_judge_balanced"}
    assert real.keys() == {*DISTANCES, "judge_accuracy", "fid_judge_iid", "fid_judge_balanced"}
    assert judge.joint({"image": test["image"]}).keys() == joint.keys() - {"judge_agreement"}
    directed = (conditional.keys() | joint.keys() | real.keys()) - {"memorisation_judge", "class_entropy"}
    assert judge.metric_directions.keys() == directed
    lower = {name for name, direction in judge.metric_directions.items() if direction == "lower"}
    assert lower == {"perceptual_judge", "fid_judge", "kid_judge", "fid_judge_iid", "fid_judge_balanced"}


def test_one_sample_is_judged_by_what_one_sample_shows(judged) -> None:
    judge, _, test = judged
    one = {name: x[:1] for name, x in test.items()}
    possible = {"precision_judge", "memorisation_judge"}
    assert judge.conditional("image", one, one).keys() == {*possible, "judge_accuracy", "perceptual_judge"}
    assert judge.joint(one).keys() == {*possible, "judge_agreement", "class_entropy"}
    assert judge.real(one).keys() == {*possible, "judge_accuracy"}


def test_a_second_judge_reads_masks_under_a_name_of_its_own(judged) -> None:
    judge, train, test = judged
    second = JudgeConfig(input="mask", name="mask_judge", epochs=8, width=8).build(train)
    assert second.real(test)["mask_judge_accuracy"] > 0.7
    wrong = {"mask": test["mask"], "label": (test["label"] + 1) % 10}
    assert second.joint(wrong)["mask_judge_agreement"] < 0.1
    assert not judge.joint(test).keys() & second.joint(test).keys()
    assert not judge.real(test).keys() & second.real(test).keys()
    assert not judge.metric_directions.keys() & second.metric_directions.keys()
    assert second.conditional("image", test, test) == {}
    unknown = {"mask": test["mask"][:4] + 5}  # classes that the training split lacks
    assert 0 <= second.joint(unknown)["mask_judge_class_entropy"] <= 1


def test_it_is_the_same_every_time() -> None:
    train = {name: x[:256] for name, x in digits("train").items()}
    first, second = (JudgeConfig(epochs=2, width=8).build(train) for _ in range(2))
    assert first.real(train) == second.real(train)


def test_a_modality_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no modality named 'picture'; there are image, label"):
        JudgeConfig(input="picture").build({"image": torch.zeros(1), "label": torch.zeros(1)})
    train = {"image": torch.zeros(2, 1, 8, 8), "label": torch.zeros(2, dtype=torch.int64), "clip": torch.zeros(2, 32)}
    with pytest.raises(UserError, match=r"pictures or masks as input .* found 'clip' \[32\] of torch.float32"):
        JudgeConfig(input="clip").build(train)
    with pytest.raises(UserError, match=r"class indices as target, found .* 'clip' \[32\] of torch.float32"):
        JudgeConfig(target="clip").build(train)
    with pytest.raises(ValueError, match="name"):
        JudgeConfig(name="a/b")
