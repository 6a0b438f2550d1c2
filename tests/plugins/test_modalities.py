"""What the contract does not say: likelihoods against independent values, codes that keep their size, bad input."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mtdiffusion import Features, FeatureSpec, LatentSpec
from mtdiffusion_plugins.clip import ClipConfig
from mtdiffusion_plugins.heads import VectorEncoder, discretised_gaussian_nll, gaussian_objective
from mtdiffusion_plugins.image import ConvEncoder, ImageConfig
from mtdiffusion_plugins.label import LabelConfig
from mtdiffusion_plugins.mask import MaskConfig, simplex
from mtdiffusion_registry import UserError

FEATURES = FeatureSpec(16, 8, 8, 32)


def features(batch: int = 4) -> Features:
    generator = torch.Generator().manual_seed(0)
    return Features(torch.randn(batch, 16, 8, 8, generator=generator), torch.randn(batch, 32, generator=generator))


def test_the_discretised_likelihood_sums_to_one_over_all_levels() -> None:
    levels = 17
    values = torch.linspace(-1, 1, levels).reshape(levels, 1)
    for mean, log_scale in [(0.3, -2.0), (-1.4, -0.5), (0.99, -5.5), (0.0, 1.0)]:
        means = torch.full((levels, 1), mean)
        nll = discretised_gaussian_nll(means, torch.full((levels, 1), log_scale), values, levels)
        assert torch.exp(-nll.double()).sum().item() == pytest.approx(1, abs=1e-5)


def test_the_discretised_likelihood_is_finite_far_out_in_the_tail() -> None:
    nll = discretised_gaussian_nll(torch.tensor([[1.0]]), torch.tensor([[-6.0]]), torch.tensor([[-0.5]]), 256)
    # −log N at (1.5 − half a bin) standard deviations of e⁻⁶ is the leading term.
    assert nll.item() == pytest.approx(0.5 * ((1.5 - 1 / 255) * math.exp(6)) ** 2, rel=1e-3)


def test_a_fine_discretised_likelihood_is_the_density_times_the_bin() -> None:
    x = torch.linspace(-0.6, 0.5, 7).reshape(7, 1)
    mean, scale = torch.full((7, 1), 0.1), torch.full((7, 1), -1.0)
    density = torch.distributions.Normal(0.1, math.exp(-1.0)).log_prob(x[:, 0])
    expected = -(density + math.log(2 / 4095))
    torch.testing.assert_close(discretised_gaussian_nll(mean, scale, x, 4096), expected, rtol=1e-4, atol=1e-4)


def test_the_gaussian_objective_is_never_negative_and_adds_nothing_to_the_error_at_its_best_scale() -> None:
    error, log_scale = torch.meshgrid(torch.logspace(-20, 1, 43), torch.linspace(-7, 3, 41), indexing="ij")
    x, mean = error.sqrt().reshape(-1, 1), torch.zeros(error.numel(), 1)
    objective = gaussian_objective(mean, log_scale.reshape(-1, 1), x)
    assert objective.isfinite().all()
    assert (objective >= x[:, 0].square() / 2).all()
    sure = gaussian_objective(mean[:1], torch.tensor([[-3.0]]), torch.full((1, 1), math.exp(-3)))
    torch.testing.assert_close(sure, torch.full((1,), math.exp(-6) / 2))


@pytest.mark.parametrize("error", [0.0, 1e-6, 0.3, 4.0])
def test_the_scale_follows_the_gaussian_likelihood(error: float) -> None:
    x = torch.full((5, 1), math.sqrt(error), dtype=torch.float64)
    log_scale = torch.linspace(-5.5, 1.5, 5, dtype=torch.float64)[:, None].requires_grad_()
    gaussian_objective(torch.zeros_like(x), log_scale, x).sum().backward()
    found, log_scale.grad = log_scale.grad, None
    (-torch.distributions.Normal(0.0, log_scale.exp()).log_prob(x)).sum().backward()
    torch.testing.assert_close(found, 0.01 * log_scale.grad)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_simplex_corners_are_equally_far_apart_and_of_unit_size(classes: int) -> None:
    corners = simplex(classes)
    distances = torch.pdist(corners)
    torch.testing.assert_close(distances, distances[:1].expand_as(distances))
    torch.testing.assert_close(corners.square().mean(1), torch.ones(classes))


def test_vector_codes_are_an_isometry_and_read_out_exactly() -> None:
    encoder = VectorEncoder(LatentSpec(2, 8, 8), 32)
    x = F.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    code = encoder(x)
    torch.testing.assert_close(code.square().mean((1, 2, 3)), torch.ones(5))
    torch.testing.assert_close(encoder.readout(code), x)


def test_a_learned_code_cannot_shrink_to_please_l1() -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder(LatentSpec(6, 4, 4), 3, 2)
    x = torch.randn(64, 3, 8, 8)
    before = encoder(x).square().mean().item()
    optimizer = torch.optim.Adam(encoder.parameters(), 0.05)
    for _ in range(60):  # the strongest pull that L1 could exert: the size of the code itself
        optimizer.zero_grad()
        encoder(x).square().mean().backward()
        optimizer.step()
    filters = encoder.filters.weight
    torch.testing.assert_close(filters @ filters.T, torch.eye(6), atol=1e-4, rtol=0)
    assert encoder(x).square().mean().item() > 0.8 * before


def test_mask_head_in_patches_returns_to_the_pixels_its_code_came_from() -> None:
    modality = MaskConfig(size=16, classes=6).build(LatentSpec(20, 8, 8), FEATURES)
    x = torch.randint(6, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    logits = 50.0 * F.one_hot(x, 6).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(
        modality.decoder.expected_encoding({"logits": logits}, modality.encoder), modality.encoder(x)
    )
    assert torch.equal(modality.decoder.mode({"logits": logits}), x)


def test_mask_metrics_against_counts_by_hand() -> None:
    modality = MaskConfig(size=2, classes=3).build(LatentSpec(2, 2, 2), FeatureSpec(4, 2, 2, 4))
    truth = torch.tensor([[[0, 0], [1, 1]]])
    generated = torch.tensor([[[0, 1], [1, 1]]])
    metrics = modality.metrics(generated, truth)
    assert metrics["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)  # class 2 occurs in neither
    assert metrics["iou_foreground"] == pytest.approx(2 / 3)
    assert metrics["pixel_accuracy"] == pytest.approx(3 / 4)


def test_a_unit_vector_head_is_never_longer_than_one_and_its_variance_is_what_is_left() -> None:
    decoder = ClipConfig(dim=32).build(LatentSpec(1, 8, 8), FEATURES).decoder
    params = {"mean": torch.tensor([[2.0] + [0.0] * 31, [0.6] + [0.0] * 31])}
    mean, variance = decoder.moments(params)
    torch.testing.assert_close(mean.norm(dim=1), torch.tensor([1.0, 0.6]))
    assert variance[1, 0].item() == pytest.approx((1 - 0.36) / 32)
    draws = decoder.sample({"mean": params["mean"][1:].expand(4000, -1)}, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), mean[1], atol=0.02, rtol=0)


def test_the_scale_head_learns_without_moving_the_mean() -> None:
    modality = ImageConfig(size=8, channels=1).build(LatentSpec(1, 8, 8), FEATURES)
    h = features()
    h.vector.requires_grad_()
    params = modality.decoder(h)
    modality.decoder.objective(params, torch.zeros(4, 1, 8, 8)).sum().backward()
    assert h.vector.grad is None  # the only reader of the vector is the scale head
    assert modality.decoder.log_scale.linear.bias.grad.abs().item() > 0


@pytest.mark.parametrize(
    ("config", "x", "message"),
    [
        (ImageConfig(size=8, channels=1), torch.zeros(2, 3, 8, 8), r"image: expected shape \[batch, 1, 8, 8\], found"),
        (ImageConfig(size=8, channels=1), torch.full((2, 1, 8, 8), 255.0), "expected values from -1.001 to 1.001"),
        (ImageConfig(size=8, channels=1), torch.full((2, 1, 8, 8), torch.nan), r"found NaN or infinity in samples \[0"),
        (ImageConfig(size=8, channels=1), torch.zeros(2, 1, 8, 8).long(), "expected a floating-point dtype"),
        (MaskConfig(size=8, classes=3), torch.full((1, 8, 8), 3), "mask of 3 classes: expected values from 0 to 2"),
        (
            LabelConfig(classes=10),
            torch.tensor([10]),
            "label of 10 classes: expected values from 0 to 9, found 10 to 10",
        ),
        (LabelConfig(classes=10), torch.tensor([1.0]), "label: expected int64, found torch.float32"),
        (ClipConfig(dim=4), torch.ones(1, 4), "clip: expected unit norm, found norms from 2 to 2"),
    ],
)
def test_what_does_not_fit_is_named(config, x: torch.Tensor, message: str) -> None:
    modality = config.build(LatentSpec(config.latent_channels(8, 8), 8, 8), FEATURES)
    with pytest.raises(ValueError, match=message):
        modality.check(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ImageConfig(size=9).build(LatentSpec(3, 8, 8), FEATURES), "size 9 does not fit a latent of 8 × 8"),
        (
            lambda: MaskConfig(size=8, classes=6).build(LatentSpec(2, 8, 8), FEATURES),
            "needs 5 channels of 8 × 8, found 2",
        ),
        (
            lambda: ImageConfig(size=8, channels=1, encoder="conv", code_channels=4).build(
                LatentSpec(4, 8, 8), FEATURES
            ),
            "cannot be orthonormal over patches of 1 numbers",
        ),
        (lambda: LabelConfig(classes=3, names=("a", "b")), "expected 3 different names, found 2"),
        (lambda: ClipConfig(dim=8, source="image"), "needs a model to embed it with"),
    ],
)
def test_configurations_that_cannot_be_built_say_why(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_labels_are_read_by_index_name_and_file(tmp_path: Path) -> None:
    modality = LabelConfig(classes=3, names=("cat", "dog", "fox")).build(LatentSpec(1, 8, 8), FEATURES)
    written = modality.write(torch.tensor(1), tmp_path, "0000")
    assert modality.parse("fox").item() == 2
    assert modality.parse("1").item() == modality.parse(str(written)).item() == 1
    for text in ("3", "-1", "wolf", str(tmp_path / "none.json")):
        with pytest.raises(UserError):
            modality.parse(text)


def test_masks_are_written_as_exact_indices(tmp_path: Path) -> None:
    modality = MaskConfig(size=8, classes=6).build(LatentSpec(5, 8, 8), FEATURES)
    mask = torch.arange(64).reshape(8, 8) % 6
    assert torch.equal(modality.parse(str(modality.write(mask, tmp_path, "0000"))), mask)


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    modality = ImageConfig(size=8, channels=1).build(LatentSpec(1, 8, 8), FEATURES)
    path = modality.write(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, tmp_path, "0000")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"0000\.png"):
        modality.parse(str(path))


def test_an_embedding_of_a_picture_is_that_of_the_shipped_model(tmp_path: Path) -> None:
    images = ImageConfig(size=8, channels=1).build(LatentSpec(1, 8, 8), FEATURES)
    picture = (torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round() / 127.5 - 1
    path = images.write(picture, tmp_path, "0000")
    config = ClipConfig(dim=32, source="image", model="builtin:digits")
    modality = config.build(LatentSpec(1, 8, 8), FEATURES)
    embedded = modality.parse(str(path))
    torch.testing.assert_close(embedded, modality.derive(picture[None])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(modality.parse(str(modality.write(embedded, tmp_path, "0001"))), embedded)
