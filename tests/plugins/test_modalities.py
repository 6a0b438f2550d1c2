"""What the contract does not say: likelihoods against independent values, codes that keep their size, bad input."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab
from torch.nn import functional as F

from mtdiffusion import (
    DiffusionProcess,
    Draws,
    Features,
    FeatureSpec,
    LatentSpec,
    LossWeights,
    MultimodalDiffusion,
    OwnLayout,
    Retention,
    SNRMatched,
    composite_loss,
)
from mtdiffusion_plugins.backbones.unet import UNetConfig
from mtdiffusion_plugins.clip import ClipConfig
from mtdiffusion_plugins.files import colour_of_class
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
            "label of 10 classes: expected values from 0 to 9, found 10$",
        ),
        (LabelConfig(classes=10), torch.tensor([1.0]), "label: expected int64, found torch.float32"),
        (ClipConfig(dim=4), torch.ones(1, 4), "clip: expected unit norm, found norms of 2$"),
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


# --- void pixels ------------------------------------------------------------------------------------------------------

VOID = MaskConfig(size=16, classes=3, ignore=255, names=("sky", "road", "car"))


def masks(void: bool) -> torch.Tensor:
    """Four masks; void: with their upper third unlabelled."""
    x = torch.randint(3, (4, 16, 16), generator=torch.Generator().manual_seed(0))
    if void:
        x[:, :5] = 255
    return x


def test_void_pixels_count_in_no_loss_and_no_metric() -> None:
    modality = VOID.build(LatentSpec(8, 8, 8), FEATURES)
    plain = MaskConfig(size=16, classes=3).build(LatentSpec(8, 8, 8), FEATURES)
    plain.load_state_dict(modality.state_dict())
    x, whole = masks(void=True), masks(void=False)
    modality.check(x)
    params = modality.decoder(features())
    counted = F.cross_entropy(params["logits"][:, :, 5:], x[:, 5:], reduction="none").flatten(1)
    torch.testing.assert_close(modality.decoder.nll(params, x), counted.sum(1))
    torch.testing.assert_close(modality.decoder.objective(params, x), counted.mean(1))
    torch.testing.assert_close(modality.decoder.objective(params, whole), plain.decoder.objective(params, whole))
    generated = modality.decoder.mode(params)
    found, below = modality.metrics(generated, x), plain.metrics(generated[:, 5:], x[:, 5:])
    assert all(found[name] == pytest.approx(below[name]) for name in below)
    assert sum(found[f"iou_{name}"] for name in VOID.names) / 3 == pytest.approx(found["miou"])
    nothing = torch.full_like(x, 255)
    assert modality.decoder.dims_of(torch.cat([whole[:1], x[:1], nothing[:1]])).tolist() == [16 * 16, 11 * 16, 0]
    assert modality.decoder.objective(params, nothing).tolist() == [0] * 4
    assert all(math.isnan(value) for value in modality.predictive_metrics(params, nothing).values())
    assert generated.max() < 3  # void is never generated


def test_the_code_of_void_is_the_middle_and_no_term_of_the_loss_asks_for_it() -> None:
    modality = VOID.build(LatentSpec(9, 8, 8), FEATURES)  # one channel to spare
    x = masks(void=True)
    code, known = modality.encoder(x), modality.encoder.known(x)
    assert known is not None and known.shape == code.shape and known.dtype == torch.bool
    assert (code[~known] == 0).all() and known[:, 8].all()
    # A place of the latent holds 2 × 2 pixels: of rows 4 and 5, one is void.
    assert not known[:, :8, :2].any() and known[:, :8, 3:].all() and known[:, :8, 2].float().mean() == 0.5
    process = DiffusionProcess.build(Retention.from_curve("cosine", 20, 1), SNRMatched(), OwnLayout({"mask": 9}, 8, 8))
    channels, vector = process.layout.inputs(0)
    backbone = UNetConfig(channels=8, multipliers=(1,), heads=0, vector=32).build(channels, 8, 8, vector)
    model = MultimodalDiffusion({"mask": VOID.build(LatentSpec(9, 8, 8), backbone.features)}, backbone, process)
    for l1_time in ("snr", "elbo"):
        losses = []
        for other in (0, 1):
            # Whatever the head says of void pixels alone, no term changes.
            bias = torch.zeros(4, 3, 16, 16)
            bias[:, 0, :4] = 9.0 * other
            decoder = model.modality("mask").decoder
            handle = decoder.register_forward_hook(lambda _, __, out, b=bias: {"logits": out["logits"] + b})
            weights = LossWeights(l0=1, l1=1, l2=1, l3=1, l1_time=l1_time)
            draws = Draws.of(model, len(x), torch.Generator().manual_seed(1))
            loss = composite_loss(model, {"mask": x}, weights, draws=draws)
            losses.append(loss.total)
            handle.remove()
        torch.testing.assert_close(losses[0], losses[1])


def test_class_weights_weigh_the_objective_and_not_the_likelihood() -> None:
    modality = MaskConfig(size=8, classes=3, class_weights=(0.0, 1.0, 4.0)).build(LatentSpec(2, 8, 8), FEATURES)
    params = modality.decoder(features())
    for index, weight in enumerate((0.0, 1.0, 4.0)):
        x = torch.full((4, 8, 8), index)
        nll = modality.decoder.nll(params, x)
        torch.testing.assert_close(modality.decoder.objective(params, x), weight * nll / 64)


def test_masks_are_drawn_with_a_legend_and_void_in_grey() -> None:
    modality = VOID.build(LatentSpec(8, 8, 8), FEATURES)
    x = masks(void=True)
    picture = (modality.render(x) * 255).round().long()
    colours = dict(modality.legend)
    assert list(colours) == ["sky", "road", "car", "void"] and len(set(colours.values())) == 4
    for index, name in ((0, "sky"), (2, "car"), (255, "void")):
        row, column = (x[0] == index).nonzero()[0].tolist()
        assert tuple(picture[0, :, row, column].tolist()) == colours[name]


def test_colours_of_classes_can_be_told_apart() -> None:
    """By CIE 1976 from scikit-image, no part of what chooses them: below about 2 nobody sees a difference."""
    assert len({colour_of_class(index) for index in range(200)}) == 200
    colours = np.array([colour_of_class(index) for index in range(30)]) / 255
    lab = rgb2lab(colours[None])[0]
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)[~np.eye(30, dtype=bool)]
    assert apart.min() > 10
    assert [colour_of_class(index) for index in range(200)][:30] == [colour_of_class(index) for index in range(30)]


def test_classes_without_names_go_by_their_numbers_in_a_legend() -> None:
    def legend(**values: int) -> list[str]:
        modality = MaskConfig(size=16, **values).build(LatentSpec(12, 8, 8), FEATURES)
        return [name for name, _ in modality.legend]

    assert legend(classes=3) == ["0", "1", "2"]
    assert legend(classes=2, ignore=255) == ["0", "1", "void"]
    assert legend(classes=2) == []


def test_masks_are_drawn_and_written_in_colours_of_ones_own(tmp_path: Path) -> None:
    config = MaskConfig(size=16, classes=3, names=("sky", "road", "car"), colours=("#87ceeb", "grey", "red"))
    modality = config.build(LatentSpec(8, 8, 8), FEATURES)
    x = masks(void=False)[:1]
    rgb = torch.tensor([(135, 206, 235), (128, 128, 128), (255, 0, 0)])
    assert torch.equal((modality.render(x)[0] * 255).round().long().permute(1, 2, 0), rgb[x[0]])
    assert dict(modality.legend) == dict(zip(config.names, map(tuple, rgb.tolist()), strict=True))
    path = modality.write(x[0], tmp_path, "0000")
    assert torch.equal(modality.parse(str(path)), x[0])  # indices, whatever the colours
    assert torch.equal(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).long(), rgb[x[0]])


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_mask_may_be_painted_in_the_colours_of_its_classes(mode: str, tmp_path: Path) -> None:
    """As a paint program saves what was painted in the colours of the legend; void in its grey."""
    modality = VOID.build(LatentSpec(8, 8, 8), FEATURES)
    x = masks(void=True)[0]
    picture = (modality.render(x[None])[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(picture).convert(mode).resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / "mine.png")
    assert torch.equal(modality.parse(str(tmp_path / "mine.png")), x)


def test_a_mask_of_two_classes_may_be_black_and_white(tmp_path: Path) -> None:
    modality = MaskConfig(size=8).build(LatentSpec(1, 8, 8), FEATURES)
    x = torch.arange(64).reshape(8, 8) % 2
    for name, levels in (("indices", x), ("painted", 255 * x)):
        for mode in ("L", "RGB"):
            path = tmp_path / f"{name}-{mode}.png"
            Image.fromarray(levels.byte().numpy()).convert(mode).save(path)
            assert torch.equal(modality.parse(str(path)), x), path
    Image.fromarray((200 * x).byte().numpy()).save(tmp_path / "grey.png")  # neither indices nor colours
    with pytest.raises(ValueError, match=r"found \[200\]"):
        modality.check(modality.parse(str(tmp_path / "grey.png"))[None])


def test_a_colour_of_no_class_is_named_with_those_of_the_classes(tmp_path: Path) -> None:
    config = MaskConfig(size=8, classes=3, colours=("black", "lime", "red"))
    modality = config.build(LatentSpec(2, 8, 8), FEATURES)
    picture = Image.new("RGB", (8, 8), "lime")
    picture.putpixel((3, 1), (255, 128, 0))
    picture.save(tmp_path / "mine.png")
    expected = r"mine\.png: 1\.6% .* such as #ff8000 in row 1, column 3; .*: #000000, #00ff00, #ff0000$"
    with pytest.raises(UserError, match=expected):
        modality.parse(str(tmp_path / "mine.png"))


@pytest.mark.parametrize(
    ("colours", "message"),
    [
        (("red", "blue"), "colours: expected one for each of 3 classes, found 2"),
        (("red", "blue", "sea"), "colours: expected colours such as '#ff0000' or 'red', found 'sea'"),
        (("red", "blue", "#f00"), "colours: expected a different colour for each class, found one twice"),
        (("red", "blue", "grey"), "colours: expected other colours than grey, #808080"),
    ],
)
def test_colours_of_a_mask_are_checked(colours: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MaskConfig(size=8, classes=3, colours=colours, ignore=255)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ignore": 1}, "ignore: expected a value that is no class, 0 to 2, found 1"),
        ({"names": ("a", "b")}, "names: expected one for each of 3 classes, found 2"),
        ({"names": ("a", "b", "a")}, "names: expected different names"),
        ({"class_weights": (1.0,)}, "class_weights: expected one for each of 3 classes, found 1"),
    ],
)
def test_mask_options_that_contradict_one_another_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskConfig(size=8, classes=3, **values)  # type: ignore[arg-type]


def test_values_that_are_no_class_are_named_with_what_to_do() -> None:
    modality = MaskConfig(size=16, classes=3).build(LatentSpec(8, 8, 8), FEATURES)
    with pytest.raises(ValueError, match=r"found \[255\]\. .*configuration: void pixels .* ignore = 255; .*values of"):
        modality.check(masks(void=True))
    with pytest.raises(
        ValueError, match=r"found \[3, 4\]\. .*if they are classes, set classes = 5; void .*ignore = 4;"
    ):
        modality.check(torch.tensor([3, 4]).repeat(1, 16, 8))
    modality = MaskConfig(size=16, classes=3, ignore=255).build(LatentSpec(8, 8, 8), FEATURES)
    with pytest.raises(ValueError, match=r"found \[200\]\. .*the configuration: where other values stand for classes"):
        modality.check(torch.full((1, 16, 16), 200))


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "latent", "shape"),
    [(32, (8, 12), (32, 48)), ((32, 48), (8, 12), (32, 48)), ((48, 16), (24, 8), (48, 16)), (16, (16, 16), (16, 16))],
)
def test_pictures_and_masks_need_not_be_square(
    size: int | tuple[int, int], latent: tuple[int, int], shape: tuple[int, int]
) -> None:
    spec = FeatureSpec(16, *latent, 32)
    shown = Features(torch.randn(2, 16, *latent), torch.randn(2, 32))
    image, mask = ImageConfig(size=size), MaskConfig(size=size, classes=3)
    for config, lead in ((image, (3,)), (mask, ())):
        modality = config.build(LatentSpec(config.latent_channels(*latent), *latent), spec)
        x = modality.decoder.mode(modality.decoder(shown))
        assert x.shape == (2, *lead, *shape) == modality.placeholder(2).shape
        modality.check(x)
        assert modality.encoder(x).shape[-2:] == latent
        assert modality.render(x).shape == (2, 3, *shape)
        assert modality.metrics(x, x)[{"image": "ssim", "mask": "miou"}[config.kind]] == pytest.approx(1)


@pytest.mark.parametrize("size", [(32, 32), (32, 49), (33, 48), 30])
def test_sizes_that_no_patch_fills_are_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"does not fit a latent of 8 × 12 \(height × width\)"):
        ImageConfig(size=size).build(LatentSpec(48, 8, 12), FeatureSpec(16, 8, 12, 32))


def test_a_picture_that_is_given_is_scaled_and_cropped_or_refused(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(pixels[..., 0] // 255).save(tmp_path / "mask.png")
    image = ImageConfig(size=8).build(LatentSpec(3, 8, 8), FEATURES)
    mask = MaskConfig(size=8).build(LatentSpec(1, 8, 8), FEATURES)
    assert torch.equal(image.parse(str(tmp_path / "photo.png"))[0] > 0, mask.parse(str(tmp_path / "mask.png")) > 0)
    for modality, name in ((image, "photo.png"), (mask, "mask.png")):
        modality.resize = False
        with pytest.raises(UserError, match=rf"{name}: expected 8 × 8 pixels, found 80 × 40"):
            modality.parse(str(tmp_path / name))
