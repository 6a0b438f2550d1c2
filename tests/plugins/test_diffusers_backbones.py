"""Backbones of diffusers: the contract, the compiler, what they are given, and what is refused."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtdiffusion import Backbone
from mtdiffusion.loss import Draws, composite_loss
from mtdiffusion_engine import load_run
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.data import load_data
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_plugins.backbones.diffusers_models import DiffusersDiTConfig, DiffusersUNetConfig
from mtdiffusion_registry import ConfigError, Registry, UserError
from mtdiffusion_registry.config import structure
from mtdiffusion_registry.configs import BackboneConfig
from mtdiffusion_registry.testing import check_backbone

pytest.importorskip("diffusers")
REGISTRY = Registry.discover(block=["*"])
CHANNELS, VECTOR = 5, 7
UNET: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8, "vector": 16}
DIT: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "vector": 16}
SMALL: tuple[BackboneConfig, ...] = (
    DiffusersUNetConfig(**UNET, channels=8),
    DiffusersDiTConfig(**DIT, channels=8, patch_size=2),
)


def inputs(height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, CHANNELS, height, width, generator=generator)
    return z, torch.linspace(0, 1, 3), torch.randn(3, VECTOR, generator=generator)


def built(config: BackboneConfig) -> Any:
    torch.manual_seed(0)
    return config.build(CHANNELS, 8, 8, VECTOR)


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.kind)
def test_it_keeps_the_contract(config: BackboneConfig) -> None:
    check_backbone(config)


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.kind)
def test_it_is_one_graph_to_the_compiler(config: BackboneConfig) -> None:
    torch._dynamo.reset()
    backbone, given = built(config), inputs()
    found, expected = torch.compile(backbone, backend="eager", fullgraph=True)(*given), backbone(*given)
    torch.testing.assert_close((found.map, found.vector), (expected.map, expected.vector))


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.kind)
def test_blocks_that_repeat_hold_most_of_the_model(config: BackboneConfig) -> None:
    backbone = built(config)
    within = sum(weight.numel() for block in backbone.repeated_blocks() for weight in block.parameters())
    assert within > 0.8 * sum(weight.numel() for weight in backbone.model.parameters())


@pytest.mark.parametrize(
    "values",
    [
        {"resnet_time_scale_shift": "scale_shift", "layers_per_block": 2},
        {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2},
    ],
)
def test_other_blocks_of_the_unet(values: dict[str, Any]) -> None:
    backbone, given = built(DiffusersUNetConfig(**UNET, channels=8, **values)), inputs()
    plain = backbone(*given)
    assert (plain.map.shape, plain.vector.shape) == ((3, 8, 8, 8), (3, 16))
    assert not torch.allclose(plain.map, backbone(given[0], given[1], given[2].roll(1, 0)).map)
    torch.autograd.backward(plain.map.square().mean() + plain.vector.square().mean())
    assert all(weight.grad is not None for weight in backbone.parameters())


def count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_they_are_the_models_of_diffusers() -> None:
    """Of as many weights, but for the embedding of timestep and class that the transformer is spared."""
    from diffusers import DiTTransformer2DModel, UNet2DModel

    unet = UNet2DModel(
        in_channels=CHANNELS,
        out_channels=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    assert count(built(SMALL[0]).model) == count(unet)
    dit = DiTTransformer2DModel(2, 8, CHANNELS, 8, 2, sample_size=8, patch_size=2)
    embeddings = sum(count(block.norm1.emb) for block in dit.transformer_blocks)
    assert count(built(SMALL[1]).model) == count(dit) - embeddings


def test_the_condition_enters_where_the_embedding_of_the_timestep_does() -> None:
    """The transformer, given what diffusers' own embedding makes of a timestep and a class, is diffusers' own."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    dit = DiTTransformer2DModel(2, 8, CHANNELS, 8, 2, sample_size=8, patch_size=2).eval()
    for block in dit.transformer_blocks[1:]:  # in training each block has its own; here they are to agree
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    backbone = built(SMALL[1]).eval()
    missing = backbone.model.load_state_dict(dit.state_dict(), strict=False)
    assert not missing.missing_keys and all(".norm1.emb." in key for key in missing.unexpected_keys)
    z, t, label = inputs()[0], torch.tensor([0, 500, 999]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        expected = dit(z, t, label).sample
        condition = dit.transformer_blocks[0].norm1.emb(t, label, hidden_dtype=torch.float32)
        torch.testing.assert_close(backbone.map(z, t, condition), expected)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "diffusers_unet", "layers_per_blok": 2}, 'key "layers_per_blok"; did you mean "layers_per_block"'),
        ({"kind": "diffusers_dit", "depth": 2}, 'unknown key "depth"'),
        ({"kind": "diffusers_unet", "block_out_channels": [32]}, "'down_block_types': expected 1, .* found 2"),
        (
            {"kind": "diffusers_unet", "down_block_types": ["DownBlock2D", "AttnDownBlock"]},
            r'down_block_types\[1\]: found "AttnDownBlock".*did you mean "AttnDownBlock2D"',
        ),
    ],
)  # fmt: skip
def test_what_is_no_argument_is_refused_by_name(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structure(REGISTRY, table, BackboneConfig)  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiffusersUNetConfig().build(5, 9, 8, 7), "9 × 8 is not divisible by 2; use fewer levels"),
        (
            lambda: DiffusersUNetConfig(block_out_channels=(32, 48)).build(5, 8, 8, 7),
            "expected multiples of norm_num_groups = 32 and attention_head_dim = 8, found 48",
        ),
        (lambda: DiffusersDiTConfig().build(5, 4, 8, 7), "wants a square latent, found 4 × 8"),
        (lambda: DiffusersDiTConfig(patch_size=3).build(5, 8, 8, 7), "3 does not divide the latent of 8 × 8"),
        (
            lambda: DiffusersDiTConfig(num_attention_heads=1, attention_head_dim=6).build(5, 8, 8, 7),
            "a multiple of 4, .* found 1 × 6",
        ),
    ],
)
def test_what_does_not_fit_is_said(build: Callable[[], Backbone], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r'this backbone needs .* pip install "mtdiffusion\[latent\]"'):
        built(SMALL[0])


CONFIGURATION = """
data = { kind = "shapes", size = 16, count = 32, test_count = 8 }
latent = { height = 8, width = 8 }

[modalities]
image = { kind = "image", size = 16 }
label = { kind = "label", classes = 5 }

[process]
steps = 20

[training]
steps = 4
batch_size = 8

[sampling]
steps = 2
"""
BACKBONES = {
    "diffusers_unet": "block_out_channels = [8, 16]\nnorm_num_groups = 4\nattention_head_dim = 8",
    "diffusers_dit": "num_layers = 2\nnum_attention_heads = 2\nattention_head_dim = 16",
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_some_steps_lower_the_loss(kind: str) -> None:
    """Of the same samples, at the same noise."""
    tables = tomllib.loads(f'{CONFIGURATION}\n[backbone]\nkind = "{kind}"\n{BACKBONES[kind]}\n')
    experiment = structure(REGISTRY, tables, Experiment)
    model = build_model(experiment)
    batch = load_data(experiment, model, "train").batch(range(32))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        draws = Draws.of(model, 32, torch.Generator().manual_seed(0))
        loss = composite_loss(model, batch.x, presence=batch.presence, draws=draws).total.mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("kind", BACKBONES)
def test_it_is_trained_and_loaded_in_a_run(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'{CONFIGURATION}\n[backbone]\nkind = "{kind}"\n{BACKBONES[kind]}\n')
    run_folder = tmp_path / "run"
    assert main(["train", str(path), "--out", str(run_folder), "--device", "cpu"]) == 0
    run, again = load_run(run_folder, device="cpu"), load_run(run_folder, device="cpu")
    assert type(run.model.backbone).__module__.endswith("diffusers_models")
    first, second = run.sample(2, seed=0), again.sample(2, seed=0)
    assert all(torch.equal(first[name], second[name]) for name in first)
