"""Every metric against an independent value, and where metrics usually break: copies, collapse, too few samples."""

import math
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import sklearn.metrics
import torch
from skimage.metrics import structural_similarity
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from mtdiffusion import FeatureSpec, LatentSpec, Modality
from mtdiffusion_plugins.clip import ClipConfig
from mtdiffusion_plugins.image import ImageConfig
from mtdiffusion_plugins.label import LabelConfig
from mtdiffusion_plugins.mask import MaskConfig
from mtdiffusion_plugins.metrics.calibration import expected_calibration_error
from mtdiffusion_plugins.metrics.distances import TrainingFeatures
from mtdiffusion_plugins.metrics.features import FeatureDistances, FeaturesConfig
from mtdiffusion_registry import UserError


def gaussian(count: int, shift: float = 0.0, seed: int = 0, dim: int = 8) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def pictures(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def build(config) -> Modality:
    latent = LatentSpec(config.latent_channels(1, 1), 1, 1)
    return config.build(latent, FeatureSpec(4, 1, 1, 4))


# Distances between sets of features


def test_the_frechet_distance_is_the_formula_with_scipy_s_matrix_root() -> None:
    a, b = gaussian(50), gaussian(40, seed=1) @ gaussian(8, seed=2) + 1
    covariances = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(sum(covariances) - 2 * root)
    assert TrainingFeatures(a, "x", 3).metrics(b)["fid_x"] == pytest.approx(expected, rel=1e-6)


def test_a_frechet_distance_of_what_are_no_two_sets_of_features_is_refused() -> None:
    from mtdiffusion_plugins.metrics import frechet_distance

    assert frechet_distance(gaussian(20), gaussian(20)) == pytest.approx(0, abs=1e-6)
    for a, b in ((gaussian(1), gaussian(9)), (gaussian(9)[:, :3], gaussian(9)), (gaussian(9)[0], gaussian(9))):
        with pytest.raises(ValueError, match=r"expected features \[n, D\] and \[m, D\]"):
            frechet_distance(a, b)


def test_the_kernel_distance_is_the_mean_over_pairs_of_different_samples() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = gaussian(40), gaussian(30, 0.5, seed=1)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
        return polynomial_kernel(x.numpy(), y.numpy(), degree=3, gamma=1 / 8, coef0=1)

    within = [kernel(x, x)[~np.eye(len(x), dtype=bool)].mean() for x in (a, b)]
    expected = sum(within) - 2 * kernel(a, b).mean()
    assert TrainingFeatures(a, "x", 3).metrics(b)["kid_x"] == pytest.approx(expected, rel=1e-9)
    # torchmetrics only knows sets of one size
    assert TrainingFeatures(a[:30], "x", 3).metrics(b)["kid_x"] == pytest.approx(poly_mmd(a[:30], b).item(), rel=1e-9)


def test_the_kernel_distance_is_unbiased_for_few_samples() -> None:
    train = TrainingFeatures(gaussian(500), "x", 3)
    fresh = gaussian(4000, seed=1).split(5)
    values = torch.tensor([train.metrics(x)["kid_x"] for x in fresh[:200]])
    assert values.min() < 0 < values.max()
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5  # a biased one is off by 40 of them


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_recall_and_memorisation_are_those_of_a_neighbour_search(neighbours: int) -> None:
    a, b = gaussian(1100, dim=4), 0.8 * gaussian(60, 0.4, seed=1, dim=4)  # more rows than one block holds
    metrics = TrainingFeatures(a + 50, "x", neighbours).metrics(b + 50)

    def radius(x: torch.Tensor, k: int) -> np.ndarray:
        return NearestNeighbors(n_neighbors=k).fit(x).kneighbors()[0][:, -1]

    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        within = scipy.spatial.distance.cdist(points, centres) <= radius(centres, neighbours)
        return within.any(1).mean()

    assert metrics["precision_x"] == pytest.approx(covered(b, a))
    assert metrics["recall_x"] == pytest.approx(covered(a, b))
    assert 0 < metrics["recall_x"] < metrics["precision_x"] < 1
    nearest = NearestNeighbors(n_neighbors=1).fit(a).kneighbors(b)[0][:, 0]
    expected = torch.tensor(nearest).median() / torch.tensor(radius(a, 1)).median()
    assert metrics["memorisation_x"] == pytest.approx(expected.item())


def test_precision_and_recall_by_hand() -> None:
    train = TrainingFeatures(torch.tensor([[0.0], [1.0], [3.0], [10.0]]), "x", 1)  # radii 1, 1, 2, 7
    metrics = train.metrics(torch.tensor([[-1.5], [0.5], [20.0]]))  # radii 2, 2, 19.5
    assert metrics["precision_x"] == pytest.approx(1 / 3)
    assert metrics["recall_x"] == 1.0
    assert train.metrics(torch.tensor([[-1.0], [-0.5], [-5.0]]))["recall_x"] == 1 / 4  # radii 0.5, 0.5, 4
    assert metrics["memorisation_x"] == pytest.approx(1.5)  # of 1.5, 0.5, 10, over that of 1, 1, 2, 7


def test_copies_of_the_training_set_are_perfect_but_for_memorisation() -> None:
    a = gaussian(200)
    metrics = TrainingFeatures(a, "x", 3).metrics(a)
    assert metrics["precision_x"] == metrics["recall_x"] == 1
    assert metrics["fid_x"] == pytest.approx(0, abs=1e-6)
    assert metrics["memorisation_x"] == pytest.approx(0, abs=1e-6)
    fresh = TrainingFeatures(a, "x", 3).metrics(gaussian(200, seed=1))
    assert fresh["memorisation_x"] == pytest.approx(1, abs=0.1)


def test_a_collapsed_generator_has_precision_and_no_recall() -> None:
    a = gaussian(200)
    metrics = TrainingFeatures(a, "x", 3).metrics(torch.zeros(50, 8, dtype=torch.float64))
    assert metrics["precision_x"] == 1
    assert metrics["recall_x"] == 0
    assert metrics["fid_x"] > 5 and metrics["kid_x"] > 0


@pytest.mark.parametrize("jitter", [0.0, 1e-7])
def test_repeated_training_samples_are_no_neighbours_of_one_another(jitter: float) -> None:
    a, b = gaussian(300, dim=4), gaussian(80, 0.3, seed=1, dim=4)
    once = TrainingFeatures(a, "x", 3).metrics(b)
    repeated = a.repeat_interleave(5, 0)
    repeated = repeated + jitter * gaussian(len(repeated), seed=2, dim=4)  # as of one picture in several batches
    often = TrainingFeatures(repeated, "x", 3).metrics(b)
    for metric in ("precision_x", "recall_x", "memorisation_x"):
        assert often[metric] == pytest.approx(once[metric], rel=1e-5)
    samples = TrainingFeatures(a, "x", 3).metrics(b.repeat(4, 1))  # each held-out sample four times
    assert samples == pytest.approx(
        {**samples, **{name: once[name] for name in once if name[:3] not in ("fid", "kid")}}
    )


def test_one_repeated_sample_among_others_has_the_radius_of_the_nearest_others() -> None:
    train = TrainingFeatures(torch.tensor([[0.0], [0.0], [0.0], [1.0], [3.0], [10.0]]), "x", 1)  # 1, 1, 1, 1, 2, 7
    metrics = train.metrics(torch.tensor([[-0.5], [-1.5], [-1.5], [20.0]]))  # 1, 1, 1, 20.5
    assert metrics["precision_x"] == 1 / 4
    assert metrics["recall_x"] == 1.0
    assert metrics["memorisation_x"] == pytest.approx(1.5)  # of 0.5, 1.5, 1.5, 10, the lower of the middle two: 1.5


def undefined(metrics: dict[str, float]) -> set[str]:
    assert metrics.keys() == {f"{name}_x" for name in ("fid", "kid", "precision", "recall", "memorisation")}
    return {name.removesuffix("_x") for name, value in metrics.items() if math.isnan(value)}


def test_what_too_few_samples_cannot_support_is_undefined() -> None:
    train = TrainingFeatures(gaussian(100), "x", 3)
    assert undefined(train.metrics(gaussian(1, seed=1))) == {"fid", "kid", "recall"}
    assert undefined(train.metrics(gaussian(3, seed=1))) == {"recall"}
    everything = train.metrics(gaussian(4, seed=1))
    assert undefined(everything) == set()
    assert all(math.isfinite(value) for value in everything.values())
    assert undefined(TrainingFeatures(gaussian(3), "x", 3).metrics(gaussian(9))) == {"precision"}
    assert undefined(TrainingFeatures(gaussian(1), "x", 3).metrics(gaussian(9))) == {
        "fid",
        "kid",
        "precision",
        "memorisation",
    }
    for same in (torch.ones(9, 8), 0.1 * torch.ones(9, 8) + 1e-8 * gaussian(9)):  # all the same
        assert undefined(TrainingFeatures(same, "x", 3).metrics(gaussian(9))) == {"precision", "memorisation"}


# Inception


@pytest.fixture(scope="module")
def stand_in_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of Inception's weights, of a random network: enough to see that they are loaded."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("weights") / "inception-random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr("torch.load", lambda *_, **__: {})
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("x", ["2048"], "none").train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():  # statistics, so that pictures differ in the last layer
        network((pictures(4, 3, 8, seed=5) * 127.5 + 127.5).byte())
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.long
def test_inception_s_features_are_torchmetrics_s(stand_in_inception: Path) -> None:
    from torchmetrics.image.fid import NoTrainInceptionV3

    x = pictures(4, 1, 8)
    evaluator = FeaturesConfig(weights=str(stand_in_inception), neighbours=1).build({"image": x[:3]})
    # torchmetrics' other way of enlarging is not that of published FIDs.
    reference = NoTrainInceptionV3("x", ["2048"], str(stand_in_inception), antialias=False)
    features = reference(((x + 1) / 2 * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)).double()
    between = scipy.spatial.distance.cdist(features[:3], features[:3]) + np.diag([np.inf] * 3)
    expected = scipy.spatial.distance.cdist(features[3:], features[:3]).min() / np.median(between.min(1))
    one = {"image": x[3:]}  # of one picture there is no FID in 2,048 dimensions to wait for
    metrics = evaluator.conditional("image", one, {})
    assert metrics["memorisation_inception"] == pytest.approx(expected, rel=1e-3)
    defined = {name for name, value in metrics.items() if not math.isnan(value)}
    assert defined == {"precision_inception", "memorisation_inception"}
    assert evaluator.joint(one) == evaluator.real(one) == pytest.approx(metrics, nan_ok=True)
    assert evaluator.conditional("label", one, {}) == {}
    assert evaluator.joint({"image": x[:1]})["memorisation_inception"] == pytest.approx(0, abs=1e-3)
    metrics_of_more = {f"{metric}_inception" for metric in ("fid", "kid", "precision", "recall")}
    assert evaluator.metric_directions.keys() == metrics_of_more


@pytest.mark.long
def test_inception_s_features_of_the_training_pictures_are_kept(
    stand_in_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path))
    seen: list[int] = []
    read = FeatureDistances._features

    def counting(self: FeatureDistances, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return read(self, x)

    monkeypatch.setattr(FeatureDistances, "_features", counting)
    config, x = FeaturesConfig(weights=str(stand_in_inception), neighbours=1), pictures(3, 1, 8)
    first, again = config.build({"image": x}), config.build({"image": x})
    assert seen == [3]
    one = {"image": pictures(1, 1, 8, seed=7)}
    assert again.joint(one) == pytest.approx(first.joint(one), nan_ok=True)
    seen.clear()
    config.build({"image": x[:2]})  # other pictures
    assert seen == [2]


def test_without_inception_s_weights_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", no_network)
    train = {"image": pictures(2, 1, 8)}
    with pytest.raises(UserError, match=r"cannot be downloaded .*no network.* https://\S+\.pth on .* set weights"):
        FeaturesConfig().build(train)
    with pytest.raises(UserError, match=r"none\.pth: no such file; expected https://"):
        FeaturesConfig(weights=str(tmp_path / "none.pth")).build(train)
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: not the weights of https://"):
        FeaturesConfig(weights=str(tmp_path / "other.pth")).build(train)
    with pytest.raises(UserError, match=r"'label' is no modality of pictures; there are image"):
        FeaturesConfig(input="label").build(train)


def test_a_missing_torch_fidelity_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"needs torch-fidelity .*pip install 'mtdiffusion\[inception\]'"):
        FeaturesConfig().build({"image": pictures(2, 1, 8)})


# The modalities' own


@pytest.mark.parametrize(("channels", "size", "window"), [(3, 32, 11), (1, 11, 11), (1, 8, 7), (3, 6, 5), (1, 3, 3)])
def test_image_metrics_are_those_of_scikit_image(
    channels: int, size: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtdiffusion_plugins.image._BATCH", 3)  # four pictures are taken in two batches of unequal size
    truth = pictures(4, channels, size)
    generated = (truth + 0.5 * pictures(4, channels, size, seed=1)).clamp(-1, 1)
    metrics = build(ImageConfig(size=size, channels=channels)).metrics(generated, truth)
    settings = {"gaussian_weights": True, "sigma": 1.5} if window == 11 else {"win_size": window}
    expected = [
        structural_similarity(
            a.double().numpy(),
            b.double().numpy(),
            data_range=2,
            channel_axis=0,
            use_sample_covariance=False,
            **settings,
        )
        for a, b in zip(generated, truth, strict=True)
    ]
    assert metrics["ssim"] == pytest.approx(np.mean(expected), abs=1e-5)
    mse = ((generated - truth) / 2).double().square().mean((1, 2, 3))
    assert metrics["mse"] == pytest.approx(mse.mean().item(), rel=1e-5)
    assert metrics["psnr"] == pytest.approx((10 * torch.log10(1 / mse)).mean().item(), rel=1e-5)


def test_image_metrics_at_their_limits() -> None:
    modality = build(ImageConfig(size=8, channels=1))
    flat, x = torch.zeros(1, 1, 8, 8), pictures(1, 1, 8)
    assert modality.metrics(x, x) == {"mse": 0, "psnr": pytest.approx(100), "ssim": pytest.approx(1)}
    assert modality.metrics(flat, flat)["ssim"] == pytest.approx(1)
    assert build(ImageConfig(size=2, channels=1)).metrics(x[..., :2, :2], x[..., :2, :2]).keys() == {"mse", "psnr"}
    mean = 3 * torch.ones(1, 1, 8, 8)  # a readout is a picture: within [−1, 1]
    assert modality.predictive_metrics({"mean": mean}, -torch.ones(1, 1, 8, 8)) == {"readout_mse": 1}


def reference_ece(probabilities: np.ndarray, truth: np.ndarray) -> float:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(confidence[bins == k].sum() - right[bins == k].sum()) for k in range(15)]
    return sum(gaps) / len(truth)


def test_predictions_of_labels_against_numpy() -> None:
    logits = 2 * gaussian(500, dim=10).float()
    truth = torch.distributions.Categorical(logits=logits / 3).sample()
    metrics = build(LabelConfig(classes=10)).predictive_metrics({"logits": logits}, truth)
    probabilities = scipy.special.softmax(logits.double().numpy(), axis=1)
    assert metrics["ece"] == pytest.approx(reference_ece(probabilities, truth.numpy()), abs=1e-4)
    assert metrics["ece"] > 0.1  # over-confident by construction
    assert metrics["nll"] == pytest.approx(-np.log(probabilities[np.arange(500), truth]).mean(), rel=1e-5)
    assert metrics["readout_accuracy"] == pytest.approx((probabilities.argmax(1) == truth.numpy()).mean())


def test_predictions_of_masks_are_per_pixel() -> None:
    logits = gaussian(2, dim=3 * 16, seed=3).float().reshape(2, 3, 4, 4)
    truth = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    metrics = build(MaskConfig(size=4, classes=3)).predictive_metrics({"logits": logits}, truth)
    pixels, classes = logits.permute(0, 2, 3, 1).reshape(32, 3).double().numpy(), truth.flatten().numpy()
    probabilities = scipy.special.softmax(pixels, axis=1)
    assert metrics["nll"] == pytest.approx(-np.log(probabilities[np.arange(32), classes]).mean(), rel=1e-5)
    assert metrics["ece"] == pytest.approx(reference_ece(probabilities, classes), abs=1e-5)
    overlap = [sklearn.metrics.jaccard_score(classes == k, probabilities.argmax(1) == k) for k in range(3)]
    assert metrics["readout_miou"] == pytest.approx(np.mean(overlap))


def test_calibration_by_hand() -> None:
    # Logits in [0, 1] are logits all the same: confidence 1 / (1 + 1/e) = 0.73, one of two right.
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    confidence = 1 / (1 + math.exp(-1))
    assert expected_calibration_error(logits, torch.tensor([0, 1])) == pytest.approx(confidence - 0.5)
    assert expected_calibration_error(logits[:1], torch.tensor([0])) == pytest.approx(1 - confidence)
    assert expected_calibration_error(100 * logits, torch.tensor([0, 0])) == pytest.approx(0)


def test_retrieval_of_embeddings_by_hand() -> None:
    modality = build(ClipConfig(dim=8))
    truth = torch.eye(8)[:6]
    # Its nearest truths in order: own rank 1, 1, 2, 3, 6 and 6.
    generated = torch.tensor(
        [
            [9.0, 0, 0, 0, 0, 0, 0, 0],
            [8.0, 9, 0, 0, 0, 0, 0, 0],
            [9.0, 0, 8, 0, 0, 0, 0, 0],
            [9.0, 8, 0, 7, 0, 0, 0, 0],
            [9.0, 8, 7, 6, 0, 5, 0, 0],
            [5.0, 6, 7, 8, 9, 0, 0, 0],
        ]
    )
    metrics = modality.metrics(F.normalize(generated, dim=1), truth)
    assert metrics["retrieval_at_1"] == pytest.approx(2 / 6)
    assert metrics["retrieval_at_5"] == pytest.approx(4 / 6)
    expected = [1 - scipy.spatial.distance.cosine(a, b) for a, b in zip(generated, truth, strict=True)]
    assert metrics["cosine"] == pytest.approx(np.mean(expected), rel=1e-5)
    readout = modality.predictive_metrics({"mean": 0.3 * generated}, truth)
    assert readout == {"readout_cosine": pytest.approx(np.mean(expected), rel=1e-5)}


def test_retrieval_at_its_limits() -> None:
    modality = build(ClipConfig(dim=8))
    x = torch.eye(8)
    assert modality.metrics(x, x) == {"cosine": 1, "retrieval_at_1": 1, "retrieval_at_5": 1}
    assert modality.metrics(x[:1], x[1:2]) == {"cosine": 0, "retrieval_at_1": 1, "retrieval_at_5": 1}
    same = x[:1].expand(8, -1)  # one truth, eight times: found by chance alone
    assert modality.metrics(same, same)["retrieval_at_1"] == pytest.approx(1 / 8)
    assert modality.metrics(same, same)["retrieval_at_5"] == pytest.approx(5 / 8)
    assert modality.metrics(same, x)["retrieval_at_1"] == pytest.approx(1 / 8)  # collapsed: right once


@pytest.mark.parametrize(
    ("config", "x", "params"),
    [
        (ImageConfig(size=8, channels=1), pictures(4, 1, 8), {"mean": torch.zeros(4, 1, 8, 8)}),
        (MaskConfig(size=2), torch.zeros(4, 2, 2, dtype=torch.int64), {"logits": torch.zeros(4, 2, 2, 2)}),
        (LabelConfig(classes=3), torch.zeros(4, dtype=torch.int64), {"logits": torch.zeros(4, 3)}),
        (ClipConfig(dim=8), torch.eye(8)[:4], {"mean": torch.ones(4, 8)}),
    ],
)
def test_every_metric_has_a_direction_and_one_meaning(config, x: torch.Tensor, params) -> None:
    modality = build(config)
    metrics, predictive = modality.metrics(x, x).keys(), modality.predictive_metrics(params, x).keys()
    assert not metrics & predictive
    assert modality.metric_directions.keys() == metrics | predictive
    assert set(modality.metric_directions.values()) <= {"higher", "lower"}
