"""The backbones' choices, each against a definition of its own, and all together in the contract and the compiler."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtdiffusion import Backbone
from mtdiffusion_plugins.backbones.dit import SIZES, Block, DiT, DiTConfig, SwiGLU
from mtdiffusion_plugins.backbones.positions import rotate, rotation, sincos
from mtdiffusion_plugins.backbones.unet import SelfAttention, UNet, UNetConfig
from mtdiffusion_registry import ConfigError, Registry
from mtdiffusion_registry.config import structure, unstructure
from mtdiffusion_registry.configs import BackboneConfig
from mtdiffusion_registry.testing import check_backbone

REGISTRY = Registry.discover(block=["*"])
CHANNELS, VECTOR = 5, 7

DITS = [
    {"positions": positions, "qk_norm": qk_norm, "mlp": mlp, "registers": registers}
    for positions, qk_norm, mlp, registers in product(
        ("learned", "sincos", "rope"), (False, True), ("gelu", "swiglu"), (1, 3)
    )
]
UNETS = [
    {"attention": attention, "qk_norm": qk_norm} for attention, qk_norm in product(((), (1,), (0, 1)), (False, True))
] + [{"features": 20}]


def small(**values: Any) -> DiTConfig:
    return DiTConfig(**{"width": 32, "depth": 2, "heads": 2, "channels": 8, **values})


def small_unet(**values: Any) -> UNetConfig:
    return UNetConfig(**{"channels": 8, "heads": 2, "vector": 16, **values})


ALL = [small(**values) for values in DITS] + [small_unet(**values) for values in UNETS]


def name(value: object) -> str | None:
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items())
    if isinstance(value, DiTConfig):
        return f"dit {value.positions} {'qk_norm' if value.qk_norm else ''} {value.mlp} {value.registers}"
    if isinstance(value, UNetConfig):
        return f"unet {list(value.attention)} {'qk_norm' if value.qk_norm else ''}"
    return None


def built(config: BackboneConfig, height: int = 8, width: int = 8) -> Backbone:
    """Seeded, and with nothing left at zero, where what one looks for would not show."""
    torch.manual_seed(0)
    backbone = config.build(CHANNELS, height, width, VECTOR)
    for weight in backbone.parameters():
        if not bool(weight.any()):
            nn.init.normal_(weight, std=0.1)
    return backbone


def inputs(height: int = 8, width: int = 8, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, CHANNELS, height, width, generator=generator)
    return z, torch.linspace(0, 1, batch), torch.randn(batch, VECTOR, generator=generator)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ALL, ids=name)
def test_every_choice_keeps_the_contract(config: BackboneConfig) -> None:
    check_backbone(config)


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


@pytest.mark.parametrize("config", ALL, ids=name)
def test_every_choice_is_one_graph_to_the_compiler(config: BackboneConfig, graphs: list[torch.fx.GraphModule]) -> None:
    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    backbone, given = built(config, 4, 8), inputs(4, 8)
    found, expected = torch.compile(backbone, backend=backend, fullgraph=True)(*given), backbone(*given)
    torch.testing.assert_close((found.map, found.vector), (expected.map, expected.vector))
    assert len(graphs) == 1


@pytest.mark.parametrize("config", ALL, ids=name)
def test_float32_agrees_with_float64(config: BackboneConfig) -> None:
    backbone, given = built(config), inputs()
    single = backbone(*given)
    double = backbone.double()(*(value.double() for value in given))
    for found, expected in zip(single, double, strict=True):
        assert found.dtype == torch.float32 and expected.dtype == torch.float64
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ALL, ids=name)
def test_bfloat16_by_autocast_is_near_float32(config: BackboneConfig) -> None:
    backbone, given = built(config), inputs()
    expected = backbone(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(*given)
    for value, exact in zip(found, expected, strict=True):
        assert (value.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", ALL, ids=name)
def test_16_bits_are_near_float64_of_the_same_weights(config: BackboneConfig, dtype: torch.dtype) -> None:
    """At every noise level: angles of up to 250 turns have to be worked out in more."""
    backbone = built(config).to(dtype)
    z, _, vector = (value.to(dtype) for value in inputs(batch=20))
    noise = torch.linspace(0, 1, 20)
    found = backbone(z, noise, vector)
    expected = backbone.double()(z.double(), noise.double(), vector.double())
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == dtype
        each = (value.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        assert each.amax() < 8 * torch.finfo(dtype).eps


class Dtypes(torch.overrides.TorchFunctionMode):
    """What norms over groups and attention are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.functional.group_norm, nn.functional.scaled_dot_product_attention):
            self.found.setdefault(func.__name__, set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [UNetConfig(channels=16, multipliers=(1, 2), heads=2), small()], ids=["unet", "dit"])
def test_a_cpus_autocast_leaves_norms_and_attention_in_float32(config: BackboneConfig) -> None:
    backbone = config.build(CHANNELS, 8, 8, VECTOR)
    given = torch.randn(2, CHANNELS, 8, 8), torch.rand(2), torch.randn(2, VECTOR)
    with Dtypes() as dtypes, torch.autocast("cpu", torch.bfloat16):
        backbone(*given)
    assert dtypes.found and all(found == {torch.float32} for found in dtypes.found.values())


@pytest.mark.parametrize("config", ALL, ids=name)
def test_blocks_that_repeat_hold_most_of_the_weights(config: BackboneConfig) -> None:
    backbone = built(config)
    blocks = backbone.repeated_blocks()
    assert all(isinstance(block, nn.Module) for block in blocks)
    # Each holds weights of its own, and none is left out that is of the kind.
    kinds = {type(block) for block in blocks}
    outside = [part for part in backbone.modules() if type(part) in kinds and not any(part is b for b in blocks)]
    assert all(isinstance(part, SelfAttention) for part in outside)  # which lie within blocks
    assert len(blocks) == (2 if isinstance(config, DiTConfig) else 7)


def test_a_norm_over_groups_is_never_of_single_numbers() -> None:
    """Of which nothing would be left: the answer would not depend on z, and a batch of one would be an error."""
    backbone = built(small_unet(multipliers=(1,), heads=2), 1, 1)
    z, noise, vector = inputs(1, 1)
    features = backbone(z, noise, vector)
    assert not torch.allclose(backbone(z + 1, noise, vector).map, features.map)
    torch.testing.assert_close(backbone(z[:1], noise[:1], vector[:1]).map, features.map[:1])


# --- positions --------------------------------------------------------------------------------------------------------


def test_sincos_is_its_formula() -> None:
    height, width, channels = 3, 5, 16
    found = sincos(height, width, channels)
    quarter = channels // 4
    expected = torch.zeros(height * width, channels, dtype=torch.float64)
    for row, column, k in product(range(height), range(width), range(quarter)):
        omega = 1 / 10000 ** (k / quarter)
        place = row * width + column
        expected[place, k] = math.sin(row * omega)
        expected[place, quarter + k] = math.cos(row * omega)
        expected[place, 2 * quarter + k] = math.sin(column * omega)
        expected[place, 3 * quarter + k] = math.cos(column * omega)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert len(found.unique(dim=0)) == height * width


def test_a_rotation_multiplies_pairs_by_complex_numbers() -> None:
    height, width, channels, registers = 3, 5, 16, 2
    x = torch.randn(2, 3, registers + height * width, channels, generator=torch.Generator().manual_seed(0))
    found = rotate(x, rotation(height, width, channels, still=registers))
    torch.testing.assert_close(found[:, :, :registers], x[:, :, :registers])  # they have no place
    half, quarter = channels // 2, channels // 4
    for row, column, j in product(range(height), range(width), range(half)):
        angle = (row if j < quarter else column) / 100 ** (j % quarter / quarter)
        token = registers + row * width + column
        pair = torch.complex(x[0, 1, token, j], x[0, 1, token, j + half]).item() * cmath.exp(1j * angle)
        assert found[0, 1, token, j].item() == pytest.approx(pair.real, abs=1e-5)
        assert found[0, 1, token, j + half].item() == pytest.approx(pair.imag, abs=1e-5)


def test_logits_of_rotated_tokens_depend_on_offsets_alone() -> None:
    height, width = 4, 6
    config = small(positions="rope", qk_norm=True)
    backbone = built(config, height, width).double()
    assert isinstance(backbone, DiT) and backbone.rotation is not None
    block = backbone.blocks[0]
    assert isinstance(block, Block)
    token = torch.randn(config.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = token.expand(1, 1 + height * width, -1)  # whatever differs between places is their positions
    q, k, _ = block.project(same, backbone.rotation)
    logits = (q @ k.mT)[0, :, 1:, 1:]
    by_offset: dict[tuple[int, int], list[Tensor]] = {}
    places = list(product(range(height), range(width)))
    for (i, (r, c)), (j, (s, d)) in product(enumerate(places), enumerate(places)):
        by_offset.setdefault((s - r, d - c), []).append(logits[:, i, j])
    spread = max((torch.stack(values).amax(0) - torch.stack(values).amin(0)).max() for values in by_offset.values())
    means = torch.stack([torch.stack(values).mean(0) for values in by_offset.values()])
    assert spread < 1e-5  # the tables' precision
    assert means.std(0).min() > 0.1  # and they do depend on them
    plain, still, _ = block.project(same)
    unturned = (plain @ still.mT)[0, :, 0, 0].expand(len(places), -1)
    torch.testing.assert_close(torch.stack(by_offset[0, 0]), unturned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope"])
def test_where_a_patch_is_matters(positions: str) -> None:
    """Patches that change places change more than the places of the features."""
    backbone = built(small(positions=positions, patch=2))
    z, noise, vector = inputs()
    moved = z.roll(2, 3)
    with torch.no_grad():
        before, after = backbone(z, noise, vector), backbone(moved, noise, vector)
    assert (before.vector - after.vector).abs().max() > 1e-3
    assert (before.map.roll(2, 3) - after.map).abs().max() > 1e-3


@pytest.mark.parametrize("values", DITS[::2], ids=name)
def test_features_lie_where_their_patches_do(values: dict[str, Any]) -> None:
    """Also in a latent that is not square. A fresh block passes on its own tokens: its gates are at zero."""
    torch.manual_seed(0)
    backbone = small(**values, patch=2).build(CHANNELS, 4, 8, VECTOR)
    z, noise, vector = inputs(4, 8)
    changed = z.clone()
    changed[:, :, 2:4, 4:6] += 1
    with torch.no_grad():
        moved = (backbone(changed, noise, vector).map - backbone(z, noise, vector).map).abs().amax((0, 1))
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(moved > 1e-6, expected)


# --- attention --------------------------------------------------------------------------------------------------------


def largest_logit(block: Block) -> float:
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(0))
    q, k, _ = block.project(x)
    return (q @ k.mT / math.sqrt(q.shape[-1])).abs().max().item()


def test_qk_norm_bounds_the_logits_of_attention() -> None:
    found = {}
    for qk_norm in (False, True):
        block = built(small(qk_norm=qk_norm)).repeated_blocks()[0]
        assert isinstance(block, Block)
        with torch.no_grad():
            block.qkv.weight.mul_(1000)
        found[qk_norm] = largest_logit(block)
    assert found[True] <= math.sqrt(16) * (1 + 1e-5)  # Cauchy-Schwarz: |q| = |k| = √16, over √16
    assert found[True] > 1
    assert found[False] > 1e4


def test_qk_norm_has_gains_of_its_own() -> None:
    block = built(small(qk_norm=True)).repeated_blocks()[0]
    assert isinstance(block, Block)
    before = largest_logit(block)
    with torch.no_grad():
        block.query_norm.weight.mul_(3)  # type: ignore[operator]
        block.key_norm.weight.mul_(2)  # type: ignore[operator]
    assert largest_logit(block) == pytest.approx(6 * before, rel=1e-5)


def test_every_register_takes_part() -> None:
    backbone = built(small(registers=3, positions="rope"))
    assert isinstance(backbone, DiT)
    h = backbone(*inputs())
    torch.autograd.backward(h.map.square().mean() + h.vector.square().mean())
    assert backbone.register_token.grad is not None
    gradient = backbone.register_token.grad[0].norm(dim=1)
    assert gradient.shape == (3,) and gradient.min() > 1e-6
    assert len(backbone.register_token.unique(dim=1)[0]) == 3


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "patch", "parameters", "operations"),
    [("S", 2, 33, 6.06), ("B", 2, 130, 23.01), ("B", 4, 130, 5.56), ("L", 2, 458, 80.71), ("XL", 2, 675, 118.64)],
)
def test_sizes_are_those_of_the_paper(size: str, patch: int, parameters: float, operations: float) -> None:
    """Peebles & Xie 2023, tables 1 and 4, for latents of 32 × 32: millions, and billions of multiplications."""
    config = DiTConfig(size=size, patch=patch, positions="sincos", channels=8)  # type: ignore[arg-type]
    with torch.device("meta"):
        backbone = config.build(4, 32, 32, 20)
        given = (torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, 20))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(*given)
    assert sum(weight.numel() for weight in backbone.parameters()) / 1e6 == pytest.approx(parameters, rel=0.03)
    assert counter.get_total_flops() / 2e9 == pytest.approx(operations, rel=0.03)


@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1152])
def test_a_swiglu_has_as_many_parameters_as_the_perceptron(width: int) -> None:
    with torch.device("meta"):
        gelu = DiTConfig(width=width, depth=1, heads=4).build(4, 4, 4, 2).repeated_blocks()[0].mlp
        swiglu = DiTConfig(width=width, depth=1, heads=4, mlp="swiglu").build(4, 4, 4, 2).repeated_blocks()[0].mlp
    assert isinstance(swiglu, SwiGLU)
    counts = [sum(weight.numel() for weight in mlp.parameters()) for mlp in (gelu, swiglu)]  # type: ignore[union-attr]
    assert counts[1] == pytest.approx(counts[0], rel=3e-3)


def test_a_swiglu_is_its_formula() -> None:
    torch.manual_seed(0)
    mlp, x = SwiGLU(24), torch.randn(2, 5, 24)
    (w1, w2), (b1, b2) = mlp.enter.weight.chunk(2), mlp.enter.bias.chunk(2)
    gate, value = x @ w1.T + b1, x @ w2.T + b2
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * value) @ mlp.leave.weight.T + mlp.leave.bias)


def dit(**table: Any) -> BackboneConfig:
    return structure(REGISTRY, {"kind": "dit", **table}, BackboneConfig, "file")  # type: ignore[type-abstract]


def test_a_size_stands_for_its_numbers() -> None:
    assert dit(size="B") == dit(size="B", width=768, depth=12, heads=12) == DiTConfig(size="B")
    assert unstructure(REGISTRY, dit(size="B")).items() >= {"size": "B", "width": 768, "depth": 12}.items()
    default = dit()
    assert isinstance(default, DiTConfig)
    assert (default.size, default.width, default.depth, default.heads) == (None, 192, 6, 6)
    assert {size: tuple(shape) for size, shape in SIZES.items()} == {
        "S": (384, 12, 6),
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "XL": (1152, 28, 16),
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"size": "B", "width": 512}, "file: width: 'width' is 512, but size B means 768; leave out width, or size"),
        ({"size": "S", "depth": 6}, "file: depth: 'depth' is 6, but size S means 12; leave out depth, or size"),
        ({"size": "XL", "heads": 6}, "file: heads: 'heads' is 6, but size XL means 16; leave out heads, or size"),
        ({"size": "M"}, 'file: size: found "M" (str), expected one of "S", "B", "L", "XL"'),
        ({"positions": "alibi"}, 'file: positions: found "alibi" (str), expected one of "learned", "sincos", "rope"'),
        ({"mlp": "relu"}, 'file: mlp: found "relu" (str), expected one of "gelu", "swiglu"; did you mean "gelu"?'),
        ({"registers": 0}, "file: registers: 'registers' must be >= 1: 0"),
    ],
)
def test_what_contradicts_is_said(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        dit(**table)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DiTConfig(patch=3), "backbone.patch: 3 does not divide the latent of 8 × 8"),
        (DiTConfig(heads=5), "backbone.heads: 5 heads do not divide the width 192"),
        (DiTConfig(width=18, heads=2, positions="sincos"), "backbone.width: found 18, expected a multiple of 4"),
        (
            DiTConfig(width=36, heads=6, positions="rope"),
            "backbone.heads: 6 heads of the width 36 have 6 channels each, expected a multiple of 4",
        ),
        (UNetConfig(channels=10, multipliers=(1, 2)), "4 heads do not divide"),
        (
            UNetConfig(channels=10, multipliers=(1, 4), attention=(0,)),
            "backbone.heads: 4 heads do not divide the 10 channels of level 0, where there is attention",
        ),
    ],
)
def test_what_does_not_divide_is_said(config: BackboneConfig, message: str) -> None:
    if isinstance(config, UNetConfig) and not config.attention:
        assert config.build(CHANNELS, 8, 8, VECTOR)  # only where there is attention
        return
    with pytest.raises(ValueError, match=message):
        config.build(CHANNELS, 8, 8, VECTOR)


# --- the U-Net --------------------------------------------------------------------------------------------------------


def test_a_unet_attends_where_it_is_told_to() -> None:
    for attention, expected in (
        ((), set()),
        ((0,), {"down.0", "up.2"}),
        ((1, 2), {"down.1", "down.2", "up.0", "up.1"}),
    ):
        unet = small_unet(multipliers=(1, 2, 2), blocks=2, attention=attention).build(CHANNELS, 8, 8, VECTOR)
        found = [key for key, part in unet.named_modules() if isinstance(part, SelfAttention) and key != "attention"]
        assert {key.rpartition(".")[0].rpartition(".")[0] for key in found} == expected
        assert len(found) == 2 * len(expected)  # after each block


@pytest.mark.parametrize(
    ("narrow", "shown", "expected"),
    [(None, 32, []), (None, 33, [8]), (0, 33, []), (5, 9, [5])],  # its first level has 8 channels
)
def test_many_codes_are_brought_together_ahead_of_the_first_convolution(
    narrow: int | None, shown: int, expected: list[int]
) -> None:
    unet = small_unet(narrow=narrow).build(shown, 8, 8, VECTOR)
    z, noise, vector = inputs()
    z = z[:, :1].expand(-1, shown, -1, -1)
    layers: list[nn.Conv2d] = []

    def called(module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.Conv2d):
            layers.append(module)

    for module in unet.modules():
        module.register_forward_hook(called)
    unet(z, noise, vector)
    first = layers[: len(expected) + 1]
    assert [layer.in_channels for layer in first] == [shown, *expected]
    assert [layer.out_channels for layer in first] == [*expected, 8]
    assert [layer.kernel_size for layer in first] == [*[(1, 1) for _ in expected], (3, 3)]


def test_a_unets_feature_map_is_as_wide_as_it_is_told_to_be() -> None:
    z, noise, vector = torch.randn(2, CHANNELS, 8, 8), torch.rand(2), torch.randn(2, VECTOR)
    for values, expected in (({}, 8), ({"features": 8}, 8), ({"features": 20}, 20)):
        unet = small_unet(multipliers=(1, 2), **values).build(CHANNELS, 8, 8, VECTOR)
        assert unet.features.channels == expected
        assert unet(z, noise, vector).map.shape == (2, expected, 8, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": (2,)}, "'attention': found level 2, but 2 multipliers make levels 0 to 1"),
        ({"attention": (0,), "heads": 0}, "'attention': needs attention heads, found heads = 0"),
        ({"qk_norm": True, "heads": 0}, "'qk_norm': needs attention heads, found heads = 0"),
    ],
)
def test_attention_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**values)


@pytest.mark.parametrize("values", UNETS, ids=name)
def test_nothing_in_a_unet_leaves_channels_last(values: dict[str, Any]) -> None:
    """On the CPU, where it takes its input so: each layer's answer lies as the next wants it, and none is copied."""
    unet = built(small_unet(**values))
    assert isinstance(unet, UNet)
    wrong = []

    def look(key: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, given: tuple[Tensor], answer: Tensor) -> None:
            if not all(x.is_contiguous(memory_format=torch.channels_last) for x in (given[0], answer)):
                wrong.append(key)

        layer.register_forward_hook(hook)  # type: ignore[arg-type]

    layers = {key: part for key, part in unet.named_modules() if isinstance(part, nn.Conv2d | nn.GroupNorm)}
    for key, layer in layers.items():
        look(key, layer)
    unet(*inputs())
    assert len(layers) > 20 and wrong == []


# --- what is older goes on --------------------------------------------------------------------------------------------


def test_weights_of_older_runs_fit() -> None:
    """The names, which checkpoints go by, of what was there before there were choices."""
    block = {f"{part}.{kind}" for part in ("qkv", "out", "mlp.0", "mlp.2", "modulation") for kind in ("weight", "bias")}
    condition = {
        f"embedding.{part}.{i}.{kind}" for part in ("noise", "vector") for i in (0, 2) for kind in ("weight", "bias")
    }
    ends = {f"{part}.{kind}" for part in ("tokens", "modulation", "to_map") for kind in ("weight", "bias")}
    expected = {f"blocks.{i}.{key}" for i in range(6) for key in block}
    expected |= condition | ends | {"embedding.frequencies", "register_token", "positions"}
    backbone = DiTConfig().build(CHANNELS, 8, 8, VECTOR)
    assert set(backbone.state_dict()) == expected
    assert backbone.state_dict()["positions"].shape == (1, 65, 192)
    assert not any("norm.weight" in key and "query" in key for key in UNetConfig().build(5, 8, 8, 7).state_dict())
