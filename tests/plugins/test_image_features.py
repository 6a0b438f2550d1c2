"""Features of pictures by a frozen network: what is computed, reduced, learned and kept, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from tests.plugins.tiny_autoencoders import shapes
from tests.plugins.tiny_networks import VIT, random_network, random_weights
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import FeatureSpec, LatentSpec
from mtdiffusion_engine import load_run
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.data import load_data
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_plugins.embedders.vision import Place, load_network, read_spec
from mtdiffusion_plugins.image_features import ImageFeaturesConfig, ImageFeaturesModality
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import apply_overrides, structure
from mtdiffusion_registry.testing import check_modality

REGISTRY = Registry.discover()
SIZE = 32


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return shapes(40, SIZE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("networks"), img_size=SIZE)


def build(weights: Path, latent: int = 8, **values: Any) -> ImageFeaturesModality:
    options: dict[str, Any] = {"size": SIZE, "model": VIT, "weights": weights, "input_size": SIZE, "components": 4}
    config = ImageFeaturesConfig(**options | values)
    spec = LatentSpec(config.latent_channels(latent, latent), latent, latent)
    return config.build(spec, FeatureSpec(16, latent, latent, 8))  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["grid", "vector"])
def test_it_keeps_the_contract(form: Any, weights: Path, pictures: Tensor) -> None:
    check_modality(build(weights, form=form).config, source=pictures)


# What is computed -----------------------------------------------------------------------------------------------------


def test_features_are_those_of_timm_itself(weights: Path, pictures: Tensor) -> None:
    plain = random_network(img_size=SIZE)
    seen = pictures[:3]  # of this network mean and standard deviation are 1/2, so that [−1, 1] is what it sees
    with torch.no_grad():
        tokens = plain.forward_features(seen)
        pooled = plain.forward_head(tokens, pre_logits=True)
    network = load_network(Place(VIT, weights, SIZE))
    (grid,), (vector,) = network.grids(seen), network.vectors(seen)
    torch.testing.assert_close(grid.cpu().flatten(2).mT, tokens[:, 1:], atol=1e-4, rtol=1e-4)  # row by row; 0: class
    torch.testing.assert_close(vector.cpu(), pooled, atol=1e-4, rtol=1e-4)
    assert read_spec(Place(VIT, None, SIZE)).grid == grid.shape[1] == 192


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_tiny_patch16_dinov3_qkvb"]
)
def test_features_of_dinos_are_those_of_their_patches_alone(name: str, tmp_path: Path, pictures: Tensor) -> None:
    """Built as they are, the weights random: a class token and four registers come before the patches, and DINOv3's
    positions are rotary, for any size of picture."""
    size = 2 * int(name.split("patch")[1][:2])
    plain = random_network(name, img_size=size)
    place = Place(name, random_weights(tmp_path, name, img_size=size), size)
    network = load_network(place)
    seen = F.interpolate(pictures[:3], size=(size, size), mode="bilinear")
    (grid,), (vector,) = network.grids(seen), network.vectors(seen)
    config = plain.pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        tokens = plain.forward_features((seen / 2 + 0.5 - mean) / std)
        pooled = plain.forward_head(tokens, pre_logits=True)
    assert tokens.shape[1] == 5 + 2 * 2
    torch.testing.assert_close(grid.cpu().flatten(2).mT, tokens[:, 5:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vector.cpu(), pooled, atol=1e-4, rtol=1e-4)


def test_pictures_are_normalised_and_scaled_as_the_network_wants_them(tmp_path: Path, pictures: Tensor) -> None:
    name = "resnet10t"
    network = load_network(Place(name, random_weights(tmp_path, name), 64))
    mean, std = (torch.tensor(network.network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    assert not torch.allclose(std, torch.full_like(std, 0.5))
    large = F.interpolate(pictures[:2] / 2 + 0.5, size=64, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(network.preprocess(pictures[:2]), (large - mean) / std)
    (grid,) = network.grids(pictures[:2])
    assert grid.shape == (2, 512, 2, 2)  # a convolutional network sees any size


def test_components_are_the_principal_ones(weights: Path, pictures: Tensor) -> None:
    modality = build(weights, latent=2)  # as fine as the network's own grid, so that nothing is resized
    assert modality.fit_samples > 0
    with pytest.raises(ValueError, match="principal components are not known"):
        modality.derive(pictures)
    modality.fit(pictures)
    assert modality.fit_samples == 0
    x = modality.derive(pictures)
    assert x.shape == (40, 4, 2, 2)
    places = torch.cat(list(modality.network.grids(pictures))).cpu().movedim(1, -1).reshape(-1, 192).numpy()
    expected = PCA(4, svd_solver="full").fit_transform(places)
    found = x.movedim(1, -1).reshape(-1, 4).numpy()
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found, expected * signs, atol=1e-3)


def test_components_follow_from_the_pictures_and_are_kept(
    weights: Path, pictures: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / "a"))
    first, again, other = (build(weights) for _ in range(3))
    with caplog.at_level(logging.INFO, "mtdiffusion"):
        first.fit(pictures)
        again.fit(pictures)
    assert caplog.text.count("principal components of") == 1  # the second time as they were kept
    monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / "b"))
    other.fit(pictures)
    for fitted in (again, other):
        assert torch.equal(fitted.components.directions, first.components.directions)  # type: ignore[union-attr]
        assert fitted.derived_by == first.derived_by
    other.fit(pictures[:30])
    assert other.derived_by != first.derived_by


def test_components_of_other_pictures_are_not_put_in_their_place(weights: Path, pictures: Tensor) -> None:
    trained, same, other, fresh = (build(weights) for _ in range(4))
    for modality, part in ((trained, pictures), (same, pictures), (other, pictures[20:])):
        modality.fit(part)
    for modality in (same, fresh):
        modality.load_state_dict(trained.state_dict())
        assert modality.derived_by == trained.derived_by
    with pytest.raises(UserError, match="not those of the checkpoint"):
        other.load_state_dict(trained.state_dict())


def test_a_grid_lies_on_the_picture(weights: Path, pictures: Tensor) -> None:
    """Places of the latent between two of the network's are between their features."""
    coarse, fine = build(weights, latent=2), build(weights, latent=8)
    for modality in (coarse, fine):
        modality.fit(pictures)
    low, high = coarse.derive(pictures), fine.derive(pictures)
    assert high.shape == (40, 4, 8, 8)
    torch.testing.assert_close(high[:, :, 0, 0], low[:, :, 0, 0])
    torch.testing.assert_close(high[:, :, 7, 0], low[:, :, 1, 0])
    assert coarse.derived_by != fine.derived_by


@pytest.mark.parametrize("form", ["grid", "vector"])
def test_features_are_normalised_by_channel(form: str, weights: Path, pictures: Tensor) -> None:
    modality = build(weights, form=form)
    if modality.fit_samples:
        modality.fit(pictures)
    x = modality.derive(pictures)
    modality.measure(x)
    normalised = modality.scale.normalised(x)
    over = [axis for axis in range(x.ndim) if axis != 1]
    torch.testing.assert_close(normalised.std(over, correction=0), torch.ones(x.shape[1]), atol=1e-3, rtol=0)
    assert modality.encoder(x).square().mean().sqrt().item() == pytest.approx(1, abs=0.01 if form == "vector" else 1e-3)
    params = {"mean": torch.randn_like(x), "log_scale": torch.randn(40, 1) * 0.1}
    std = params["log_scale"].exp().reshape(-1, *[1] * (x.ndim - 1)) * modality.scale.std
    exact = -torch.distributions.Normal(modality.scale.restored(params["mean"]), std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(modality.decoder.nll(params, x), exact)


def test_metrics_of_the_truth_and_of_another(weights: Path, pictures: Tensor) -> None:
    for form in ("grid", "vector"):
        modality = build(weights, form=form)
        if modality.fit_samples:
            modality.fit(pictures)
        x = modality.derive(pictures)
        modality.measure(x)
        same, other = modality.metrics(x, x), modality.metrics(x.roll(1, 0), x)
        assert same["mse"] == 0 and same["cosine"] == pytest.approx(1)
        assert other["mse"] > 0.5 and other["cosine"] < 0.5
        assert ("retrieval_at_1" in same) == (form == "vector")
        if form == "vector":
            assert same["retrieval_at_1"] == 1 and other["retrieval_at_1"] < 0.5


def test_a_grid_is_shown_by_its_first_three_components(weights: Path, pictures: Tensor) -> None:
    modality = build(weights)
    modality.fit(pictures)
    modality.measure(modality.derive(pictures))
    x = modality.placeholder(1) + modality.scale.mean
    assert torch.allclose(modality.render(x), torch.full((1, 3, 8, 8), 0.5))
    x[:, 1] += 4 * modality.scale.std[1]
    assert modality.render(x)[0, :, 0, 0].tolist() == pytest.approx([0.5, 1, 0.5])
    assert build(weights, components=1).render(torch.zeros(2, 1, 8, 8)).shape == (2, 3, 8, 8)


# What cannot be had ---------------------------------------------------------------------------------------------------


def test_without_weights_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"could not be downloaded .* hf download timm/vit_small_patch14_dinov2\.lvd142m model\.safetensors "
        r'--local-dir FOLDER; .* set weights = "FOLDER/model\.safetensors"',
    ):
        load_network(Place("vit_small_patch14_dinov2.lvd142m"))
    with pytest.raises(UserError, match=r"configuration .* could not be downloaded .* HF_HOME"):
        load_network(Place("hf-hub:nobody/nothing"))
    with pytest.raises(UserError, match=r"timm has no network of this name .*did you mean \"vit_tiny_patch16_224\""):
        load_network(Place("vit_tiny_patch16_24"))
    with pytest.raises(UserError, match=r"weights = 'none.safetensors': expected a .safetensors file, found no file"):
        load_network(Place(VIT, Path("none.safetensors")))
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected a .safetensors file, found another kind of file"):
        load_network(Place(VIT, tmp_path / "w.pth"))


def test_weights_that_do_not_all_fit_are_refused(weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    path = tmp_path / "random.safetensors"
    last = tensors.pop("blocks.11.mlp.fc2.weight")
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"not the weights of vit_tiny.*blocks\.11\.mlp\.fc2\.weight"):
        load_network(Place(VIT, path, SIZE))
    save_file({**tensors, "blocks.11.mlp.fc2.weight": last, "blocks.12.norm1.weight": last[0].clone()}, path)
    with pytest.raises(UserError, match=r"not the weights of vit_tiny.*blocks\.12"):
        load_network(Place(VIT, path, SIZE))
    with pytest.raises(UserError, match=r"not the weights of resnet10t"):
        load_network(Place("resnet10t", weights))
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"not the weights of vit_tiny"):
        load_network(Place(VIT, path, SIZE))


def test_what_does_not_fit_is_said(weights: Path, pictures: Tensor) -> None:
    with pytest.raises(UserError, match=r"input_size: expected a multiple of 16"):
        build(weights, input_size=40)
    with pytest.raises(ValueError, match=r"at most 192 components"):
        build(weights, components=200)
    with pytest.raises(ValueError, match=r"expected pictures \[batch, 1 or 3, 32, 32\], found \[3, 3, 16, 16\]"):
        build(weights).fit(pictures[:3, :, :16, :16])
    with pytest.raises(ValueError, match="vary in fewer than 4 directions; lower components"):
        build(weights).fit(pictures[:1, :, :1, :1].expand(3, -1, SIZE, SIZE) * 0)


# From a configuration to samples --------------------------------------------------------------------------------------

CONFIGURATION = """
data = { kind = "shapes", size = 32, count = 40, test_count = 12 }
latent = { height = 8, width = 8 }
clocks = { kind = "offset", ahead = { features = 0.3 } }

[modalities]
image = { kind = "image", size = 32 }
features = { kind = "image_features", size = 32, model = "vit_tiny_patch16_224", input_size = 32, field = "image" }

[modalities.whole]
kind = "image_features"
size = 32
model = "vit_tiny_patch16_224"
input_size = 32
form = "vector"
field = "image"

[backbone]
kind = "unet"
channels = 8
multipliers = [1]
heads = 0
vector = 16

[process]
steps = 20

[training]
steps = 4
batch_size = 8
sample_every = 4

[sampling]
steps = 2

[evaluation]
samples = 6
steps = 2
joint_draws = 1
bound_times = 1
"""


def overrides(weights: Path) -> list[str]:
    return [f"modalities.{name}.weights={weights}" for name in ("features", "whole")]


@pytest.fixture(scope="module")
def run_folder(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    (folder / "config.toml").write_text(CONFIGURATION)
    train = ["train", str(folder / "config.toml"), "--out", str(folder / "run"), "--device", "cpu"]
    assert main([*train, "--set", *overrides(weights)]) == 0
    return folder / "run"


def test_a_run_holds_the_components_and_nothing_of_the_network(run_folder: Path) -> None:
    from safetensors.torch import load_file

    run = load_run(run_folder, device="cpu")
    kept = load_file(run.checkpoint / "ema.safetensors")
    assert not any("blocks" in name and "features" in name for name in kept)
    assert sum(name.endswith("components.directions") for name in kept) == 1
    modality = run.modality("features")
    assert modality.fit_samples == 0 and bool(modality.scale.known)  # type: ignore[union-attr]


def test_features_of_a_photo_are_observed(run_folder: Path, pictures: Tensor, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    values = ((pictures[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(values).save(photo)
    out = tmp_path / "given"
    ask = ["sample", str(run_folder), "-n", "2", "--observe", f"features={photo}", "--out", str(out), "--device", "cpu"]
    assert main(ask) == 0
    modality = load_run(run_folder, device="cpu").modality("features")
    seen = modality.parse(str(out / "features/0000.safetensors"))
    torch.testing.assert_close(seen, modality.derive(pictures[:1])[0], atol=0.05, rtol=0.05)
    assert (out / "image/0001.png").is_file()
    with pytest.raises(UserError, match=r"expected features of shape \[192\], found \[8, 8, 8\]"):
        load_run(run_folder, device="cpu").modality("whole").parse(str(out / "features/0000.safetensors"))


def test_they_are_judged(run_folder: Path) -> None:
    assert main(["evaluate", str(run_folder), "--device", "cpu"]) == 0
    metrics = json.loads((run_folder / "metrics.json").read_text())
    for key in ("features|image+whole/cosine", "features|image+whole/mse", "whole|image+features/retrieval_at_5"):
        assert key in metrics, sorted(metrics)


def test_an_exported_run_takes_the_weights_along(run_folder: Path, weights: Path, tmp_path: Path) -> None:
    out = load_run(run_folder, device="cpu").save_pretrained(tmp_path / "out")
    run = load_run(out.rename(tmp_path / "moved"), device="cpu")
    for name in ("features", "whole"):
        copy = run.experiment.modalities[name].weights  # type: ignore[attr-defined]
        assert copy.is_relative_to(tmp_path / "moved") and copy.read_bytes() == weights.read_bytes()
    assert run.sample(1)["features"].shape == (1, 8, 8, 8)


@pytest.mark.slow
def test_features_are_computed_once_by_the_components_of_the_training_split(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / "cache"))
    place = shutil.copy(weights, tmp_path / "random.safetensors")
    tables = apply_overrides(tomllib.loads(CONFIGURATION), overrides(Path(place)))
    experiment = structure(REGISTRY, tables, Experiment)

    def kept(split: Any) -> tuple[set[Path], Tensor]:
        model = build_model(experiment)
        load_data(experiment, model, split)
        directions: Tensor = model.modality("features").components.directions  # type: ignore[union-attr, assignment]
        return set((tmp_path / "cache/derived").iterdir()), directions

    held_out, by_test = kept("test")  # first: it is the training split's all the same
    both, by_train = kept("train")
    assert torch.equal(by_test, by_train)
    assert (len(held_out), len(both)) == (2, 4)
    assert kept("train")[0] == both
    stored = random_network(img_size=SIZE).state_dict()
    from safetensors.torch import save_file

    save_file({name: 1.1 * value for name, value in stored.items()}, place)  # other weights of the same name
    assert len(kept("train")[0] - both) == 2


def test_a_modality_that_cannot_be_fitted_says_so(weights: Path) -> None:
    changes = [*overrides(weights), "modalities.features.size=16", "latent.height=4", "latent.width=4"]
    experiment = structure(REGISTRY, apply_overrides(tomllib.loads(CONFIGURATION), changes), Experiment)
    with pytest.raises(UserError, match=r"modality 'features' cannot be fitted to 'image': .*found \[40, 3, 32, 32\]"):
        load_data(experiment, build_model(experiment), "train")
