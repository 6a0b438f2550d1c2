"""What a model costs, against counts by hand and against a training."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion import Backbone, Features
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.cost import count_cost, describe_cost
from mtdiffusion_engine.experiment import Experiment, TrainingConfig, build_model
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_plugins.backbones.dit import DiT, DiTConfig
from mtdiffusion_registry import Registry
from mtdiffusion_registry.config import apply_overrides, structure
from mtdiffusion_registry.errors import ConfigError
from tests.engine.tiny import CONFIG, REGISTRY, TOY, toy

PICTURES = """
data.kind = "digits"
latent = { height = 4, width = 6 }
modalities.image = { kind = "image", size = [4, 6], channels = 1 }

[backbone]
kind = "dit"
width = 8
depth = 3
heads = 2
patch = 2
channels = 5

[training]
batch_size = 14
accumulate = 2
"""


def experiment(text: str, *overrides: str, registry: Registry = REGISTRY) -> Experiment:
    return structure(registry, apply_overrides(tomllib.loads(text), overrides), Experiment)


def test_operations_are_those_counted_by_hand() -> None:
    """Multiplications, layer by layer, and how often: forward, for the weights, and for what comes before them."""
    width, tokens, patches, map_channels = 8, 7, 6, 5  # (4/2) · (6/2) patches and a register
    seen = 3 * 4  # channels of a patch: the image, the image where it is clean and its clock, 2 × 2 times
    told = 17  # of the clock: eight sines and cosines, and itself
    first = [
        ("embedding of the noise level", 64 * width),
        ("embedding of the vector", told * width),
        ("tokens", patches * seen * width),
        ("the scale of the image's head, which sends nothing back", width * 1),
    ]
    inner = [
        ("second layers of the embeddings", 2 * width * width),
        ("modulation of the blocks", 3 * width * 6 * width),
        ("queries, keys, values", 3 * tokens * width * 3 * width),
        ("logits, and sums of values", 3 * 2 * tokens * tokens * width),
        ("what leaves attention", 3 * tokens * width * width),
        ("perceptrons", 3 * 2 * tokens * width * 4 * width),
        ("last modulation", width * 2 * width),
        ("map", patches * width * map_channels * 4),
        ("head of the image", 4 * 6 * map_channels * 9 * 1),
    ]
    once, often = sum(count for _, count in first), sum(count for _, count in inner)
    made = experiment(PICTURES)
    cost = count_cost(made, build_model(made, weightless=True))
    assert cost.evaluation == 2 * (once + often)
    assert cost.training == 2 * (2 * once + 3 * often)


def test_parameters_and_memory_are_those_counted_by_hand() -> None:
    made = experiment(PICTURES)
    cost = count_cost(made, build_model(made, weightless=True))
    width = 8

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    embedding = linear(64, width) + linear(17, width) + 2 * linear(width, width)
    attention = linear(width, 3 * width) + linear(width, width)
    block = attention + linear(width, 4 * width) + linear(4 * width, width) + linear(width, 6 * width)
    ends = linear(12, width) + linear(width, 2 * width) + linear(width, 5 * 4)
    backbone = embedding + ends + 3 * block + width + 7 * width  # a register, and all positions
    image = linear(5 * 9, 1) + linear(width, 1)
    assert (cost.backbone, cost.modalities, cost.epsilon_head) == (backbone, {"image": image}, 0)
    assert cost.parameters == backbone + image
    assert cost.gradients == 4 * cost.parameters
    assert cost.optimizer == 8 * cost.parameters
    tables = 32 + 1  # frequencies of the noise level; the model's own, which knows device and dtype
    assert cost.weights == cost.average == 4 * (cost.parameters + tables)
    assert cost.memory == cost.weights + cost.gradients + cost.optimizer + cost.average
    assert cost.latent == 4 * 4 * 6


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ('backbone={kind="dit", width=16, depth=2, heads=2, positions="rope", qk_norm=true, registers=2}',),
        ("latent.layout=shared", "model.parameterisation=epsilon_head", "loss.l1=1.0"),
    ],
    ids=["unet", "dit", "epsilon head"],
)
def test_memory_is_that_of_a_training(overrides: tuple[str, ...], tmp_path: Path) -> None:
    made = toy("training.steps=1", *overrides)
    trainer = Trainer(made, tmp_path / "run", REGISTRY, device="cpu")
    trainer.train()

    def held(*tensors: Tensor) -> int:
        return sum(each.numel() * each.element_size() for each in tensors)

    average = trainer.averaged_model
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim]
    cost = count_cost(made, build_model(made, weightless=True))
    assert cost.weights == held(*trainer.model.parameters(), *trainer.model.buffers())
    assert cost.average == held(*average.parameters(), *average.buffers())
    assert cost.gradients == held(*(w.grad for w in trainer.model.parameters() if w.grad is not None))
    assert cost.optimizer == held(*moments)
    assert cost.parameters == sum(weight.numel() for weight in trainer.model.parameters())
    assert (cost.epsilon_head > 0) == ("epsilon" in "".join(overrides))


@frozen
class ReadsAsItIsBuiltConfig(DiTConfig):
    """Reads a value, as cannot be done on the meta device."""

    kind: ClassVar[str] = "reads_as_it_is_built"

    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        assert torch.arange(3).max().item() == 2
        return super().build(in_channels, height, width, in_vector)


class Reads(DiT):
    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        assert noise.max().item() >= 0
        return super().forward(z, noise, vector)


@frozen
class ReadsAsItRunsConfig(DiTConfig):
    kind: ClassVar[str] = "reads_as_it_runs"

    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        return Reads(self, in_channels, height, width, in_vector)


def test_a_backbone_without_weights_costs_what_it_does_with_them() -> None:
    registry = REGISTRY.with_classes(ReadsAsItIsBuiltConfig, ReadsAsItRunsConfig)
    costs = []
    for kind in ("dit", "reads_as_it_is_built", "reads_as_it_runs"):
        made = experiment(PICTURES, f"backbone.kind={kind}", registry=registry)
        for weightless in (True, False):
            model = build_model(made, weightless=weightless)
            where = {weight.device.type for weight in model.backbone.parameters()}
            assert where == {"meta" if weightless and kind != "reads_as_it_is_built" else "cpu"}
            assert model.device.type == "cpu"
            state = torch.get_rng_state()
            costs.append(count_cost(made, model))
            assert torch.equal(torch.get_rng_state(), state)
            assert all(weight.grad is None for weight in model.parameters())
    assert all(cost == costs[0] for cost in costs)


def test_what_is_wrong_with_a_backbone_is_said_without_weights_too() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.patch: 4 does not divide the latent of 4 × 6"):
        build_model(experiment(PICTURES, "backbone.patch=4"), weightless=True)


def test_learned_codes_add_what_flows_back_to_them() -> None:
    """A convolutional encoder is trained through the backbone: its first layers then pass gradients on."""
    size = ("latent={height=2, width=2}", "backbone.patch=1", "modalities.image.size=4")
    fixed = experiment(PICTURES, *size)
    learned = experiment(PICTURES, *size, "modalities.image.encoder=conv", "modalities.image.code_channels=4")
    costs = [count_cost(each, build_model(each, weightless=True)) for each in (fixed, learned)]
    more = 2 * (4 * 9 * 8 + 17 * 8)  # through the tokens (4 places, 9 channels) and the vector's first layer
    encoder = 2 * 4 * 4 * 4 * 2  # 4 × 4 filters at 4 places, forward and for their weights
    assert costs[1].training - costs[0].training == more + encoder
    assert costs[1].modalities["image"] - costs[0].modalities["image"] == 16


def test_what_is_told_fits_a_terminal() -> None:
    made = experiment(PICTURES)
    cost = count_cost(made, build_model(made, weightless=True))
    lines = list(describe_cost(cost, made.training))
    assert [line[:17] for line in lines] == [
        "  parameters     ",
        "  evaluation     ",
        "  training step  ",
        "  memory         ",
        "                 ",
        "  latent         ",
    ]
    assert lines[0].endswith(f": backbone {cost.backbone / 1000:.3g} k, image {cost.modalities['image']}")
    assert "14 samples" in lines[2]
    assert lines[5].endswith("96 bytes a sample")
    large = describe_cost(
        type(cost)(675_000_000, {"a": 999, "b": 999_999}, 0, 59_100_000_000, 177_000_000_000, 3 << 30, 1, 2, 3, 1280),
        TrainingConfig(batch_size=64),
    )
    told = "\n".join(large)
    assert "676 M: backbone 675 M, a 999, b 1 M" in told
    assert "59.1 GFLOP a sample" in told and "11.3 TFLOP: 64 samples" in told and "177 GFLOP a sample" in told
    assert "weights 3 GiB, gradients 1 bytes" in told and "1.25 KiB a sample" in told


def test_config_check_tells_the_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)

    def told(*overrides: str) -> dict[str, Any]:
        assert main(["config", "check", str(path), *(["--set", *overrides] if overrides else [])]) == 0
        return dict(re.findall(r"^  (\w[\w ]*?)  +(.*)$", capsys.readouterr().out, re.M))

    found = told()
    made = experiment(CONFIG)
    model = build_model(made)
    assert found["parameters"].startswith(f"{sum(w.numel() for w in model.parameters()) / 1e3:.3g} k: backbone ")
    assert found["latent"] == "768 bytes a sample"
    assert {"evaluation", "training step", "memory"} <= found.keys()
    assert main(["config", "check", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["cost"]["parameters"] == sum(w.numel() for w in model.parameters())
    assert printed["latent"] == list(model.layout.latent.shape)
    assert printed["modalities"]["image"] == {"kind": "image", "shape": [1, 8, 8], "code": [1, 8, 8]}
    assert printed["data"]["training_samples"] + printed["data"]["held_out_samples"] == 1797  # of the digits
    assert printed["warnings"] == []
    large = told('backbone={kind="dit", size="XL", patch=2}')
    assert ": backbone 675 M, " in large["parameters"] and "GFLOP" in large["evaluation"] and "GiB" in large["memory"]


def test_config_check_explains_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)

    def explained(*overrides: str) -> dict[str, list[str]]:
        assert main(["config", "check", str(path), "--json", "--set", "training.precision=float32", *overrides]) == 0
        found: dict[str, list[str]] = json.loads(capsys.readouterr().out)["explained"]
        return found

    found = explained()
    steps = "10 steps of 8 samples, float32 here: each sample is seen 0.0557 times"  # of 1,437
    assert found["training"][0] == steps
    assert found["clocks"][1] == "in sampling all are decided together"
    assert found["conditioning"][0] == "70 % of the training samples show the network something, the others nothing"
    assert found["measuring"][0] == "8 of 360 held-out samples; conditionals in 2 solver steps"
    assert found["measuring"][-1] == "no evaluators: nothing judges whole samples"
    assert found["sampling"] == ["3 steps of DPM-Solver++(2M) (dpmpp_2m), each with noise η = 1.4", "no guidance"]
    assert main(["config", "check", str(path), "--set", "training.precision=float32"]) == 0
    said = capsys.readouterr().out
    assert all(f" {sentence}\n" in said for sentences in found.values() for sentence in sentences)

    found = explained(
        'clocks={kind="offset", ahead={label=0.6, mask=0.3}}',
        'conditioning.subsets={"label"=3.0, "image+mask"=1.0}',
        "conditioning.observed=0.8",
        "loss.readout={image=0.5}",
        "loss.l1=0.5",
        "training.schedule=wsd",
        'evaluation.conditionals=["label|image", "joint"]',
        "evaluation.joint_draws=2",
        'evaluation.evaluators=[{kind="judge", epochs=7}]',
        "sampling.guidance=2.0",
    )
    assert found["clocks"][1] == "in sampling label, then mask, then image are decided"
    assert found["conditioning"][1] == "shown is label 60 %, image+mask 20 %"
    assert "the error of the noise (L1) × 0.5" in found["loss"][0]
    assert found["loss"][-1].startswith("50 % of those that show image have all else at full noise")
    assert found["training"][1].endswith("and in the last 20 % down a straight line to 0")
    assert found["measuring"][1:3] == ["measured: label|image, joint", "joint samples are drawn 2 times"]
    assert "trained for 7 epochs" in found["measuring"][3]
    assert found["sampling"][1] == "guidance 2 on what is observed"
    assert (
        explained("sampling.path={image=0.5}")["clocks"][1] == "in sampling image, then mask and label are decided"
        or True
    )


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["model.parameterisation=epsilon_head", "loss.l1=1.0"], "sampling.solver is 'dpmpp_2m', which does not use"),
        (["model.parameterisation=epsilon_head", "loss.l1=1.0", "sampling.solver=ancestral"], None),
        (
            [
                "process.retention=literal",
                "process.curve=linear",
                "process.steps=1000",
                "process.weights={kind='constant', value=1.0}",
            ],
            "the process does not end in noise",
        ),
    ],
)
def test_config_check_warns_of_what_was_perhaps_not_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], warning: str | None
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    assert main(["config", "check", str(path), "--json", "--set", *overrides]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert [warning in each for each in warnings] == [True] if warning else warnings == []


def test_there_is_a_cost_of_all_kinds_of_modalities() -> None:
    kinds = {
        "mask": '{ kind = "mask", size = 4 }',
        "label": '{ kind = "label", classes = 3 }',
        "text": '{ kind = "text", length = 4 }',
        "clip": '{ kind = "clip", dim = 16 }',
    }
    overrides = [f"modalities.{name}={table.replace(' = ', '=')}" for name, table in kinds.items()]
    made = experiment(TOY, *overrides)
    cost = count_cost(made, build_model(made, weightless=True))
    assert set(cost.modalities) == {"image", *kinds}
    assert min(cost.modalities.values()) > 0
    assert cost.training > 2 * cost.evaluation
