"""Every installed plugin keeps the contract, by the kit that plugin authors use."""

import pytest
import torch
from attrs import evolve

from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_registry import Registry
from mtdiffusion_registry.config import structure
from mtdiffusion_registry.testing import check_backbone, check_clock_law, check_modality, check_weight_schedule

REGISTRY = Registry.discover(block=["*"])  # ours alone, whatever else is installed


def build(group: str, kind: str, **values: object):
    return REGISTRY.config_class(group, kind)(**values)


def pictures(channels: int, size: int, n: int = 24) -> torch.Tensor:
    """Smooth random pictures in [−1, 1]."""
    coarse = torch.randn(n, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").clamp(-1, 1)


def classes(k: int, *shape: int) -> torch.Tensor:
    return torch.randint(k, (24, *shape), generator=torch.Generator().manual_seed(0))


def directions(dim: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(24, dim, generator=torch.Generator().manual_seed(0)), dim=1)


def texts(tokens: int, length: int) -> torch.Tensor:
    """Of every length from 0 on."""
    x = 1 + classes(tokens, length)
    return x * (torch.arange(length) < (torch.arange(24) % (length + 1))[:, None])


MODALITIES = {
    "image identity": (build("modality", "image", size=8, channels=1), pictures(1, 8)),
    "image patch RGB": (build("modality", "image", size=16), pictures(3, 16)),
    "image conv": (build("modality", "image", size=16, encoder="conv", code_channels=6), pictures(3, 16)),
    "mask binary": (build("modality", "mask", size=8), classes(2, 8, 8)),
    "mask of 6 classes in patches": (build("modality", "mask", size=16, classes=6), classes(6, 16, 16)),
    "mask with void pixels": (build("modality", "mask", size=8, classes=3, ignore=255), classes(3, 8, 8)),
    "label": (build("modality", "label", classes=10), classes(10)),
    "label of more classes than directions": (
        build("modality", "label", classes=100, code_channels=1),
        classes(100),
    ),
    "clip": (build("modality", "clip", dim=32), directions(32)),
    "text": (build("modality", "text", length=3, tokenizer="words", vocabulary=tuple("abcdef")), texts(6, 3)),
}


@pytest.mark.parametrize("name", MODALITIES)
def test_modality_keeps_the_contract(name: str) -> None:
    config, examples = MODALITIES[name]
    check_modality(config, examples=examples, encoding_bias=0.15)


@pytest.mark.parametrize("kind", REGISTRY.kinds("backbone"))
def test_backbone_keeps_the_contract(kind: str) -> None:
    check_backbone(build("backbone", kind))


@pytest.mark.parametrize("kind", REGISTRY.kinds("weight_schedule"))
def test_weight_schedule_keeps_the_contract(kind: str) -> None:
    values = {"knots": (1.0, 0.5, 0.0)} if kind == "target" else {}
    check_weight_schedule(build("weight_schedule", kind, **values))


@pytest.mark.parametrize("kind", REGISTRY.kinds("clock_law"))
def test_law_of_clocks_keeps_the_contract(kind: str) -> None:
    values = {"ahead": {"label": 0.5, "mask": 1.0}} if kind == "offset" else {}
    check_clock_law(build("clock_law", kind, **values), names=("image", "mask", "label"))


def test_offsets_are_by_name_and_refuse_others() -> None:
    config = build("clock_law", "offset", ahead={"label": 0.5})
    assert config.build(["label", "image"]).ahead(2).tolist() == [0.5, 0.0]
    assert config.build(["image", "label"]).ahead(2).tolist() == [0.0, 0.5]
    with pytest.raises(ValueError, match="ahead: expected names among image, mask, found label"):
        config.build(["image", "mask"])


def test_every_installed_modality_is_covered_here() -> None:
    covered = {type(config).kind for config, _ in MODALITIES.values()}
    by_files = {"latent_image", "image_features"}  # which have tests of their own
    assert covered | by_files == set(REGISTRY.kinds("modality"))


def test_unet_refuses_a_latent_that_its_levels_do_not_divide() -> None:
    config = evolve(build("backbone", "unet"), multipliers=(1, 2, 2))
    with pytest.raises(ValueError, match="10 × 10 is not divisible by 4"):
        config.build(4, 10, 10, 2)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.long] * kind.startswith("diffusers"))  # half a minute each
        for kind in REGISTRY.kinds("backbone")
    ],
)
def test_a_model_of_every_modality_is_one_graph_to_the_compiler(kind: str) -> None:
    latent = {"height": 8, "width": 8}
    modalities = {
        "image": {"kind": "image", "size": 8, "channels": 1},
        "mask": {"kind": "mask", "size": 8},
        "label": {"kind": "label", "classes": 10},
        "clip": {"kind": "clip", "dim": 32},
        "text": {"kind": "text", "length": 12},
    }
    tables = {"data": {"kind": "digits"}, "latent": latent, "modalities": modalities, "backbone": {"kind": kind}}
    model = build_model(structure(REGISTRY, tables, Experiment)).eval()
    label = torch.arange(4)
    observation = model.observe({"label": label}, model.visibility(4, {"label": label}))
    z = torch.randn(4, *model.layout.latent.shape, generator=torch.Generator().manual_seed(0))
    t = model.layout.clocks(torch.tensor([1, 100, 250, 500]).reshape(-1, 1, 1, 1), observation.seen)
    with torch.no_grad():
        expected = model(z, t, observation)
        # "eager" traces as every backend needs it traced, and spends no time on generating code.
        found = torch.compile(model, backend="eager", fullgraph=True)(z, t, observation)
    torch.testing.assert_close(found.params, expected.params)
