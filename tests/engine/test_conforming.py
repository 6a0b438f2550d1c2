"""``mtdiffusion plugins check --data``: the kit's checks on samples of a configuration's own data."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from mtdiffusion_engine.cli import main
from mtdiffusion_engine.conforming import EXAMPLES, contracts
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_registry import UserError
from mtdiffusion_registry.config import structure
from mtdiffusion_registry.testing import Contract, conformance
from mtdiffusion_registry.testing.contract import sizes
from tests.engine.tiny import CONFIG, REGISTRY, toy

JUDGE = """
[[evaluation.evaluators]]
kind = "judge"
epochs = 1
width = 4
"""


def status(contract: Contract, check: str) -> str:
    (found,) = [each for each in contract.checks if each.id == check]
    return contract.outcome(found).status


def test_a_modality_is_checked_with_the_samples_that_have_it() -> None:
    experiment = toy("data.lacking=image")
    ((title, contract),) = contracts("modality.image", experiment)
    assert title == "modalities.image, 7 samples"
    dataset = experiment.data.build("train")
    there = [dataset[index]["image"] for index in range(len(dataset)) if index % 3 != 1]
    examples = contract.subject.examples  # type: ignore[attr-defined]
    assert all(any(torch.equal(x, y) for y in there) for x in examples)
    assert contract.subject.config is experiment.modalities["image"]
    assert (contract.subject.height, contract.subject.width) == (4, 4)  # type: ignore[attr-defined]
    assert status(contract, "examples") == "ok"


def test_each_instance_of_a_kind_is_checked() -> None:
    again = 'modalities.night={kind="image", size=4, channels=1, field="image"}'
    titles = [title for title, _ in contracts("modality.image", toy(again))]
    assert titles == ["modalities.image, 11 samples", "modalities.night, 11 samples"]


def test_a_derived_modality_is_checked_with_what_it_is_derived_from() -> None:
    tables = tomllib.loads(CONFIG)
    tables["modalities"]["clip"] = {"kind": "clip", "dim": 32, "source": "image", "model": "builtin:digits"}
    ((title, contract),) = contracts("modality.clip", structure(REGISTRY, tables, Experiment))
    assert title == f"modalities.clip, {EXAMPLES} samples"
    assert contract.subject.source.shape == (EXAMPLES, 1, 8, 8)  # type: ignore[attr-defined]
    assert [status(contract, check) for check in ("derive", "code_scale")] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("plugin", "overrides", "message"),
    [
        ("modality.image", ["data.nan_at=3"], "data .train.: sample 3: modality 'image'"),
        ("modality.label", ["modalities.label.classes=2"], "label of 2 classes"),
        ("modality.label", ["data.count=2"], "at least 3 samples that have label, found 2"),
        (
            "modality.label",
            ["modalities.label.field=class"],
            "no sample has the field 'class', which modality 'label' reads; .* Set modalities.NAME.field",
        ),
        ("modality.text", [], "no modality of kind 'text' .it has image, mask, label."),
        ("evaluator.judge", [], "no evaluator of kind 'judge' .it has none."),
        ("evaluator.judge", ['evaluation.evaluators=[{kind="judge", input="sound"}]'], "a modality named 'sound'"),
        ("backbone.unet", [], "backbone.unet is a backbone"),
    ],
)
def test_what_is_wrong_is_said(plugin: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(contracts(plugin, toy(*overrides)))


def test_the_command_line_checks_an_evaluator_on_both_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits.toml").write_text(CONFIG + JUDGE)
    command = ["plugins", "check", "judge", "--data", str(tmp_path / "digits.toml")]
    assert main(command) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("evaluator.judge (evaluation.evaluators[0], 128 samples): 12 ok, 0 failed")
    )
    assert main([*command, "--set", 'evaluation.evaluators=[{kind="judge", target="mask"}]']) == 1
    assert "failed   build              it cannot be built here: evaluators.judge: expected" in capsys.readouterr().out
    assert main([*command, "--latent", "4"]) == 2
    assert "--latent: with --data the configuration says it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("plugin", "given"),
    [
        ("modality.image", "give --set size=VALUE"),
        ("modality.latent_image", "give --set size=VALUE and --set autoencoder=VALUE"),
        ("modality.label", "give --set classes=VALUE"),
        ("dataset.folder", "--set root=VALUE"),
    ],
)
def test_a_key_without_a_default_is_told_with_how_to_give_it(
    plugin: str, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "check", plugin]) == 2
    assert given in capsys.readouterr().err
    with pytest.raises(UserError, match="missing key"):
        conformance(plugin).contract()


def test_latents_of_one_row_are_halved_along_it() -> None:
    assert sizes(1, 8) == ((1, 8), (1, 4))
    assert sizes(8, 8) == ((8, 8), (4, 4), (8, 4))
