"""Pictures as latents of a frozen autoencoder: what is encoded, learned, decoded and kept, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugins.tiny_autoencoders import saved, shapes, trained_kl, untrained
from torch import Tensor

from mtdiffusion import FeatureSpec, LatentSpec
from mtdiffusion_engine import load_run
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.data import load_data
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_plugins.autoencoders import CONFIG, WEIGHTS, Place, load_autoencoder, read_spec
from mtdiffusion_plugins.latent_image import LatentImageConfig, LatentImageModality
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import apply_overrides, structure
from mtdiffusion_registry.testing import check_modality

pytest.importorskip("diffusers")
REGISTRY = Registry.discover()
SIZE = 16


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return shapes(256, SIZE)


@pytest.fixture(scope="module")
def kl(pictures: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AutoencoderKL that was trained on shapes for some seconds. Its scaling_factor of 0.18215 does not suit."""
    return saved(trained_kl(pictures), tmp_path_factory.mktemp("autoencoder") / "kl")


def build(folder: Path | str, latent: int = 8, size: int = SIZE, **values: Any) -> LatentImageModality:
    config = LatentImageConfig(size=size, autoencoder=folder, **values)
    spec = LatentSpec(config.latent_channels(latent, latent), latent, latent)
    return config.build(spec, FeatureSpec(16, latent, latent, 8))  # type: ignore[return-value]


def psnr(found: Tensor, truth: Tensor) -> float:
    error = ((found - truth) / 2).square().flatten(1).mean(1)
    return (-10 * error.log10()).mean().item()


def test_it_keeps_the_contract(kl: Path, pictures: Tensor) -> None:
    check_modality(LatentImageConfig(size=SIZE, autoencoder=kl, normalisation="data"), source=pictures[:32])


def test_a_trained_autoencoder_gives_pictures_back(kl: Path, pictures: Tensor) -> None:
    modality = build(kl)
    back = modality.judged(modality.derive(pictures))
    assert back.shape == pictures.shape
    blank = pictures.mean((0, 2, 3), keepdim=True).expand_as(pictures)
    print(f"round trip {psnr(back, pictures):.1f} dB, the mean colour {psnr(blank, pictures):.1f} dB")
    assert psnr(back, pictures) > psnr(blank, pictures) + 2


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
def test_codes_and_pictures_are_those_of_diffusers_itself(kind: str, tmp_path: Path, pictures: Tensor) -> None:
    model = untrained(kind)
    autoencoder = load_autoencoder(Place(saved(model, tmp_path / kind)))
    assert type(autoencoder.model).__name__ == kind
    x = pictures[:5]
    with torch.no_grad():
        out = model.encode(x)
        z = out.latent_dist.mean if kind == "AutoencoderKL" else out[0]
        y = model.decode(z).sample
    found = autoencoder.encode(x).cpu()
    assert found.shape == (
        5,
        autoencoder.spec.channels,
        SIZE // autoencoder.spec.factor,
        SIZE // autoencoder.spec.factor,
    )
    torch.testing.assert_close(found, z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(autoencoder.decode(z).cpu(), y.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    assert autoencoder.encode(x[:0]).shape == found[:0].shape
    assert autoencoder.decode(z[:0]).shape == x[:0].shape


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        ({"_class_name": "AutoencoderKL"}, (0.0,) * 4, (1 / 0.18215,) * 4),  # as sd-vae-ft-mse has it: by its class
        ({"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "shift_factor": 0.1}, (0.1,) * 4, (2.0,) * 4),
        (
            {
                "_class_name": "AutoencoderKL",
                "scaling_factor": 0.5,
                "latents_mean": [1, 2, 3, 4],
                "latents_std": [4] * 4,
            },
            (1.0, 2.0, 3.0, 4.0),
            (8.0,) * 4,
        ),
        ({"_class_name": "AutoencoderDC", "scaling_factor": 0.25, "latent_channels": 2}, (0.0,) * 2, (4.0,) * 2),
    ],
)
def test_latents_are_normalised_by_the_factors_of_the_configuration(
    values: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...], tmp_path: Path
) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(values))
    (tmp_path / WEIGHTS).touch()
    scale = read_spec(Place(tmp_path)).scale
    assert scale is not None
    assert scale[0] == pytest.approx(mean)
    assert scale[1] == pytest.approx(std)


def test_where_it_states_none_they_are_measured_on_what_is_trained_on(tmp_path: Path, pictures: Tensor) -> None:
    modality = build(saved(untrained("AutoencoderTiny"), tmp_path), latent=4)
    x = modality.derive(pictures)
    modality.measure(x)
    e = modality.encoder(x)
    torch.testing.assert_close(e.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(e.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)
    before = modality.scale.mean.clone()
    modality.measure(0.9 * x)  # of a model that was trained: as it was
    assert torch.equal(modality.scale.mean, before)
    loaded = build(tmp_path, latent=4)
    loaded.load_state_dict(modality.state_dict())
    torch.testing.assert_close(loaded.encoder(x), e)


def test_factors_that_do_not_suit_the_latents_are_refused(kl: Path, pictures: Tensor) -> None:
    modality = build(kl)
    with pytest.raises(ValueError, match=r'root mean square of 0\.\d+, expected about 1; set normalisation = "data"'):
        modality.measure(modality.derive(pictures))


def test_the_head_is_a_density_of_latents_in_their_own_units(kl: Path, pictures: Tensor) -> None:
    modality = build(kl, normalisation="data")
    x = modality.derive(pictures[:8])
    modality.measure(x)
    params = {"mean": torch.randn(8, *modality.shape), "log_scale": torch.randn(8, 1) * 0.1}
    std = modality.scale.std * params["log_scale"].exp()[..., None, None]
    mean = modality.scale.mean + modality.scale.std * params["mean"]
    expected = -torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(modality.decoder.nll(params, x), expected)


def test_places_of_a_latent_may_be_packed_into_fewer(kl: Path, pictures: Tensor) -> None:
    modality = build(kl, latent=4)
    x = modality.derive(pictures[:3])
    assert x.shape == (3, 4, 8, 8)
    assert modality.encoder(x).shape == (3, 16, 4, 4)
    with pytest.raises(ValueError, match=r"holds 1 × 1 pixels .* expected a latent of 8 × 8, or a whole part"):
        build(kl, latent=16)


def test_grey_pictures_are_shown_in_grey_to_one_of_colours(kl: Path, pictures: Tensor) -> None:
    grey = pictures[:4].mean(1, keepdim=True)
    modality = build(kl)
    torch.testing.assert_close(modality.derive(grey), modality.derive(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r"expected pictures \[batch, 3, 16, 16\], found \[4, 3, 8, 8\]; set size"):
        modality.derive(pictures[:4, :, :8, :8])


# What cannot be had ---------------------------------------------------------------------------------------------------


def test_without_diffusers_it_says_what_to_install(kl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r'pip install "mtdiffusion\[latent\]"'):
        build(kl)


def test_without_a_network_it_says_how_to_get_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"could not be downloaded .* hf download nobody/nothing vae/config\.json .*FOLDER"
    ):
        build("nobody/nothing", subfolder="vae")
    with pytest.raises(UserError, match="expected a folder, and there is none of this name, or OWNER/NAME"):
        build("sd")
    with pytest.raises(UserError, match=r"no/such/folder.*expected a folder, and there is none"):
        build("no/such/folder")


def test_weights_that_are_missing_damaged_or_another_s_are_refused(kl: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "a").mkdir()
    shutil.copy(kl / CONFIG, tmp_path / "a")
    with pytest.raises(UserError, match=f"found no {WEIGHTS}"):
        build(tmp_path / "a")
    tensors = load_file(kl / WEIGHTS)
    tensors.pop("decoder.conv_out.weight")
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(UserError, match=r"missing_keys: decoder\.conv_out\.weight"):  # which diffusers would draw anew
        load_autoencoder(Place(tmp_path / "a"))
    (tmp_path / "a" / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read as AutoencoderKL"):
        load_autoencoder(Place(tmp_path / "a"))
    (tmp_path / "a" / CONFIG).write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(
        UserError, match=r"expected one of AutoencoderKL, AutoencoderTiny, AutoencoderDC, found .*VQModel"
    ):
        build(tmp_path / "a")


# From a configuration to pictures -------------------------------------------------------------------------------------

CONFIGURATION = """
data = { kind = "shapes", size = 16, count = 40, test_count = 12 }
latent = { height = 8, width = 8 }

[modalities]
image = { kind = "latent_image", size = 16, autoencoder = "nobody/nothing", normalisation = "data" }
mask = { kind = "mask", size = 16, classes = 6 }
label = { kind = "label", classes = 5 }

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

[[evaluation.evaluators]]
kind = "judge"
epochs = 1
"""


@pytest.fixture(scope="module")
def run_folder(kl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    (folder / "config.toml").write_text(CONFIGURATION)
    train = ["train", str(folder / "config.toml"), "--out", str(folder / "run"), "--device", "cpu"]
    assert main([*train, "--set", f"modalities.image.autoencoder={kl}"]) == 0
    return folder / "run"


def test_a_run_holds_nothing_of_the_autoencoder(run_folder: Path) -> None:
    from safetensors.torch import load_file

    run = load_run(run_folder, device="cpu")
    of_image = {name for name in load_file(run.checkpoint / "ema.safetensors") if ".image." in f".{name}"}
    heads = ("decoder.mean.conv.", "decoder.log_scale.linear.", "decoder.scale.", "encoder.scale.")
    assert of_image
    assert {name for name in of_image if not any(head in name for head in heads)} == set()
    assert bool(run.modality("image").scale.known)  # type: ignore[union-attr]


def test_samples_and_what_is_observed_are_pictures(run_folder: Path, pictures: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    assert main(["sample", str(run_folder), "-n", "3", "--out", str(out), "--device", "cpu"]) == 0
    made = Image.open(out / "image/0000.png")
    assert (made.mode, made.size) == ("RGB", (SIZE, SIZE))
    photo = tmp_path / "photo.png"
    values = ((pictures[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(values).resize((3 * SIZE, 2 * SIZE)).save(photo)
    given = tmp_path / "given"
    ask = ["sample", str(run_folder), "-n", "2", "--observe", f"image={photo}", "--out", str(given), "--device", "cpu"]
    assert main(ask) == 0
    seen = torch.from_numpy(np.array(Image.open(given / "image/0000.png"), np.float32)).permute(2, 0, 1) / 127.5 - 1
    modality = load_run(run_folder, device="cpu").modality("image")
    torch.testing.assert_close(seen, modality.judged(modality.parse(str(photo))[None])[0], atol=0.005, rtol=0)
    assert (given / "label.csv").is_file()


def test_it_is_observed_whole_or_not_at_all(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(run_folder, device="cpu")
    x = run.sample(1)["image"][0]
    with pytest.raises(UserError, match="has no places, so it cannot be observed in part"):
        run.sample(1, observed={"image": x}, visible={"image": torch.ones(SIZE, SIZE)})


def test_evaluators_and_galleries_see_pictures(run_folder: Path, pictures: Tensor) -> None:
    assert main(["evaluate", str(run_folder), "--device", "cpu"]) == 0
    metrics = json.loads((run_folder / "metrics.json").read_text())
    for key in ("image|label/judge_accuracy", "image|label/psnr", "image|label/latent_mse", "joint/fid_judge"):
        assert key in metrics
    assert "real/judge_accuracy" in metrics
    assert "joint/bound_bits_per_dim" in metrics
    assert main(["gallery", str(run_folder), "--device", "cpu"]) == 0
    run = load_run(run_folder, device="cpu")
    modality, data = run.modality("image"), run.data("test")
    shown = modality.render(data.batch([0, 1]).x["image"])
    real = torch.stack([data.dataset[i]["image"] for i in range(2)])  # type: ignore[misc]
    assert psnr(2 * shown - 1, real) > 14  # the very pictures, as far as the autoencoder keeps them


def test_latents_are_computed_once_and_anew_for_other_weights(
    kl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / "cache"))
    place = shutil.copytree(kl, tmp_path / "ae")
    tables = apply_overrides(tomllib.loads(CONFIGURATION), [f"modalities.image.autoencoder={place}"])
    experiment = structure(REGISTRY, tables, Experiment)

    def kept() -> set[Path]:
        load_data(experiment, build_model(experiment), "train")
        return set((tmp_path / "cache/derived").iterdir())

    with caplog.at_level(logging.INFO, "mtdiffusion"):
        first = kept()
    assert len(first) == 1
    assert "gives back the first 16 pictures with a PSNR of" in caplog.text
    before = {path: path.stat().st_mtime_ns for path in first}
    assert kept() == first
    assert {path: path.stat().st_mtime_ns for path in first} == before
    saved(untrained("AutoencoderKL"), place)  # other weights of the same name
    assert len(kept() - first) == 1


def test_pictures_are_not_read_in_training(kl: Path, pictures: Tensor, tmp_path: Path) -> None:
    for name in ("image", "mask"):
        (tmp_path / name).mkdir()
    for index, picture in enumerate(pictures[:20]):
        values = ((picture + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        if index != 3:
            Image.fromarray(values).save(tmp_path / f"image/{index}.png")
        Image.fromarray(values[..., 0] // 128).save(tmp_path / f"mask/{index}.png")
    overrides = [f"modalities.image.autoencoder={kl}", f"data.root={tmp_path}"]
    tables = apply_overrides(tomllib.loads(CONFIGURATION), overrides)
    del tables["modalities"]["label"], tables["evaluation"]["evaluators"]
    fields = {"image": "image", "mask": "mask"}
    tables["data"] = {"kind": "folder", "root": str(tmp_path), "fields": fields, "allow_missing": ["image"]}
    experiment = structure(REGISTRY, tables, Experiment)
    data = load_data(experiment, build_model(experiment), "train")
    assert {key for i in range(len(data)) for key in data.source.raw(i)} == {"mask"}
    assert {key for i in range(len(data)) for key in data.dataset[i]} == {"image", "mask"}
    has = torch.tensor(["image" in data.dataset[i] for i in range(len(data))])
    batch = data.batch(range(len(data)))
    assert 0 < int((~has).sum()) < 2
    assert torch.equal(batch.presence[:, 0] > 0, has)
    expected = build(kl, normalisation="data").derive(
        torch.stack([data.dataset[int(i)]["image"] for i in has.nonzero()])
    )
    torch.testing.assert_close(batch.x["image"][has], expected)


def test_augmentation_is_refused(kl: Path, tmp_path: Path) -> None:
    overrides = [f"modalities.image.autoencoder={kl}", "augmentation.flip=0.5"]
    tables = apply_overrides(tomllib.loads(CONFIGURATION), overrides)
    with pytest.raises(UserError, match="image is computed once from"):
        Trainer(structure(REGISTRY, tables, Experiment), tmp_path / "run", REGISTRY, device="cpu")


def test_an_exported_run_takes_its_autoencoder_along(run_folder: Path, kl: Path, tmp_path: Path) -> None:
    out = load_run(run_folder, device="cpu").save_pretrained(tmp_path / "out")
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["modalities"]["image"]["autoencoder"] == "files/modalities/image/autoencoder/kl"
    expected = load_run(run_folder, device="cpu").sample(2)
    moved = out.rename(tmp_path / "moved")
    run = load_run(moved, device="cpu")
    for name, x in run.sample(2).items():
        assert torch.equal(x, expected[name]), name
    copy = moved / "files/modalities/image/autoencoder/kl"
    assert run.experiment.modalities["image"].autoencoder == copy  # type: ignore[attr-defined]
    assert (copy / WEIGHTS).read_bytes() == (kl / WEIGHTS).read_bytes()


def test_an_autoencoder_that_has_moved_is_named_for_once(run_folder: Path, kl: Path, tmp_path: Path) -> None:
    place = shutil.copytree(kl, tmp_path / "elsewhere")
    run = load_run(run_folder, device="cpu", overrides=[f"modalities.image.autoencoder={place}"])
    assert run.sample(1)["image"].shape == (1, 4, 8, 8)


def test_the_configuration_for_pictures_of_256_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, autoencoder = tmp_path / "data", saved(untrained("AutoencoderTiny"), tmp_path / "tiny")
    rng = np.random.default_rng(0)
    for name in ("image", "mask"):
        (root / name).mkdir(parents=True)
    for index in range(24):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(root / f"image/{index}.png")
        Image.fromarray(rng.integers(0, 2, (256, 256), np.uint8)).save(root / f"mask/{index}.png")
    path = Path(__file__).parents[2] / "configs/latent-256.toml"
    settings = [f"data.root={root}", f"modalities.image.autoencoder={autoencoder}"]
    assert main(["config", "check", str(path), "--set", *settings]) == 0
    said = capsys.readouterr().out
    assert "image (latent_image): 4 × 64 × 64, as a code of 16 channels" in said  # of 8 pixels a place: 4 × 32 × 32
    assert "ready: mtdiffusion train" in said
