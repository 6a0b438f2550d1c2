"""The judge reads real pictures well, says so, and its Fréchet distance is the closed form."""

import json
import math
from pathlib import Path

import pytest
import torch

from mtdiffusion_plugins.metrics.distances import TrainingFeatures
from mtdiffusion_plugins.metrics.judge import JudgeConfig, frechet_distance
from mtdiffusion_plugins.metrics.segmenter import SegmenterConfig
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


def test_a_picture_that_is_there_with_each_of_many_sounds_is_one_picture(judged) -> None:
    judge, train, test = judged
    some = train["image"][:300]
    single = TrainingFeatures(judge._features(some), "x", 3).metrics(judge._features(test["image"]))
    often = judge._features(some.repeat(4, 1, 1, 1))  # each in other batches, too, where it rounds otherwise
    repeated = TrainingFeatures(often, "x", 3).metrics(judge._features(test["image"]))
    for metric in ("precision_x", "recall_x", "memorisation_x"):
        assert repeated[metric] == pytest.approx(single[metric], abs=1e-4)


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
    assert math.isnan(judge.joint({"image": test["image"][test["label"] == 3]})["fid_judge_balanced"])


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

    def defined(metrics: dict[str, float], names: set[str]) -> bool:
        return {name for name, value in metrics.items() if not math.isnan(value)} == names

    conditional, joint, real = judge.conditional("image", one, one), judge.joint(one), judge.real(one)
    assert defined(conditional, {*possible, "judge_accuracy", "perceptual_judge"})
    assert defined(joint, {*possible, "judge_agreement", "class_entropy"})
    assert defined(real, {*possible, "judge_accuracy"})
    assert conditional.keys() == judge.conditional("image", test, test).keys()  # under the same names as ever
    assert joint.keys() == judge.joint(test).keys()
    assert real.keys() == judge.real(test).keys()


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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def few_digits() -> dict[str, torch.Tensor]:
    return {name: x[:256] for name, x in digits("train").items()}


QUICK = JudgeConfig(epochs=2, width=8)


def test_it_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train, found = few_digits(), []
    for cache in ("a", "b", "b"):  # trained, trained again, and taken from where it was kept
        monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / cache))
        torch.manual_seed(len(found))
        found.append(QUICK.build(train).real(train))
        after = torch.rand(())
        torch.manual_seed(len(found) - 1)
        assert after == torch.rand(())  # it draws nothing from the global generator
    assert found[0] == found[1] == found[2]


def test_it_is_trained_once_for_the_same_data_and_configuration(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtdiffusion_plugins.metrics import classifiers

    trained = []
    train_classifier = classifiers.train_classifier
    monkeypatch.setattr(
        classifiers,
        "train_classifier",
        lambda *x, **options: trained.append(options) or train_classifier(*x, **options),
    )
    train = few_digits()
    first = QUICK.build(train).real(train)
    for same in (QUICK, JudgeConfig(epochs=2, width=8, neighbours=3, train_samples=300)):
        assert same.build(train).real(train) == first
    assert len(trained) == 1
    other = {**train, "label": train["label"].roll(1)}
    for config, data in ((JudgeConfig(epochs=2, width=8, seed=1), train), (JudgeConfig(epochs=1, width=8), train)):
        assert config.build(data).real(train) != first
    assert QUICK.build(other).real(train) != first
    assert len(trained) == len(list((cache / "judges").iterdir())) == 4


@pytest.mark.parametrize("harm", ["truncated", "flipped", "no json", "other json", "a file", "empty"])
def test_a_damaged_entry_is_made_again(cache: Path, harm: str) -> None:
    train = few_digits()
    first = QUICK.build(train).real(train)
    (entry,) = (cache / "judges").iterdir()
    weights, about = entry / "classifier.safetensors", entry / "classifier.json"
    whole = {path.name: path.read_bytes() for path in (weights, about)}
    content = bytearray(whole[weights.name])
    if harm == "truncated":
        weights.write_bytes(content[:-10])
    elif harm == "flipped":
        content[-5] ^= 64  # a weight's exponent
        weights.write_bytes(content)
    elif harm == "no json":
        about.write_text("{")
    elif harm == "other json":
        about.write_text(json.dumps({**json.loads(about.read_text()), "recipe": 0}))
    else:
        weights.unlink()
        about.unlink()
        if harm == "a file":
            entry.rmdir()
            entry.write_text("")
    assert QUICK.build(train).real(train) == first
    assert list((cache / "judges").iterdir()) == [entry]  # and nothing half-written beside it
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == whole


def test_a_cache_that_cannot_be_written_only_costs_time(cache: Path) -> None:
    cache.mkdir()
    (cache / "judges").write_text("in the way")
    train = few_digits()
    assert QUICK.build(train).real(train)["judge_accuracy"] > 0.1
    assert (cache / "judges").read_text() == "in the way"


def test_it_says_what_it_needs() -> None:
    config = JudgeConfig(input="photo", target="quality", train_samples=50)
    assert config.needs() == ("photo", "quality")
    assert config.train_limit() == 50
    assert JudgeConfig().train_limit() == 10_000
    assert "quality by photo" in config.preparation() and "40 epochs" in config.preparation()


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


def test_no_more_is_held_than_a_block_of_pairs_or_a_batch_of_feature_maps(
    judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, _, test = judged
    whole = judge.conditional("image", test, test)
    pairs, maps = [], []

    def cdist(a: torch.Tensor, b: torch.Tensor, real=torch.cdist) -> torch.Tensor:
        pairs.append(len(a))
        return real(a, b)

    monkeypatch.setattr(torch, "cdist", cdist)
    monkeypatch.setattr("mtdiffusion_plugins.metrics.distances._BLOCK", 50)
    monkeypatch.setattr("mtdiffusion_plugins.metrics.judge._BATCH", 32)
    hook = judge.classifier.body[0].register_forward_hook(lambda _, x, __: maps.append(len(x[0])))
    parts = judge.conditional("image", test, test)
    hook.remove()
    assert max(pairs) == 50 and max(maps) == 32
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-7)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, at a certain step."""


@pytest.mark.parametrize("kind", ["judge", "segmenter"])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mtdiffusion_plugins.metrics import fitting

    train = few_digits()
    config = QUICK if kind == "judge" else SegmenterConfig(epochs=2, width=4)
    monkeypatch.setattr(fitting, "EVERY", 0.0)

    def build(cache: str) -> dict[str, bytes]:
        monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / cache))
        config.build(train)
        (entry,) = (tmp_path / cache / "judges").iterdir()  # and no progress beside it
        return {path.name: path.read_bytes() for path in entry.iterdir()}

    whole = build("whole")
    tell = fitting.Pace.tell
    steps: list[int] = []

    def stop(pace: fitting.Pace, done: int) -> None:
        steps.append(done)
        tell(pace, done)
        if len(steps) % 3 == 0:  # in the middle of an epoch, and at its end
            raise Stopped

    monkeypatch.setattr(fitting.Pace, "tell", stop)
    caplog.set_level("INFO")
    for _ in range(30):
        try:
            again = build("stopped")
            break
        except Stopped:
            continue
    assert again == whole
    assert steps[:5] == [1, 2, 3, 3, 4] and steps[-1] == config.epochs * (256 // (128 if kind == "judge" else 16))
    assert "goes on after 2 of" in caplog.text


@pytest.mark.parametrize("harm", ["truncated", "flipped", "another torch", "no file"])
def test_a_progress_that_cannot_be_read_is_begun_anew(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtdiffusion_plugins.metrics import fitting

    monkeypatch.setattr(fitting, "EVERY", 0.0)
    path = tmp_path / "some.progress"
    fitting.Progress(path).save(lambda: {"done": 3})
    loaded = fitting.Progress(path).load()
    assert loaded is not None and loaded["done"] == 3
    content = bytearray(path.read_bytes())
    if harm == "truncated":
        path.write_bytes(content[:-10])
    elif harm == "flipped":
        content[-20] ^= 64
        path.write_bytes(content)
    elif harm == "another torch":
        monkeypatch.setattr(torch, "__version__", "1.0")
    else:
        path.unlink()
        path.mkdir()
    assert fitting.Progress(path).load() is None
