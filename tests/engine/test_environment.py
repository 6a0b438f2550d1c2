"""What a training finds out of the machine it is on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtdiffusion_engine import trainer as trainers
from mtdiffusion_engine.environment import native_bfloat16
from mtdiffusion_engine.experiment import load_experiment, with_precision
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import UserError
from tests.engine.tiny import REGISTRY, toy

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "held_to", "native"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, "", True),
        ({"avx512_bf16": True}, "ALL", True),
        ({"avx512_bf16": True}, "avx512_core_vnni", False),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "", False),
        ({"amx_bf16": True}, "", True),
        ({}, "", False),
    ],
)
def test_a_processor_says_whether_it_multiplies_bfloat16(
    found: dict[str, bool], held_to: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held_to)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert native_bfloat16(CPU) is native
    assert native_bfloat16(torch.device("mps")) is False


def test_a_torch_that_does_not_know_its_processor_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert native_bfloat16(CPU) is False


def test_a_precision_that_is_said_is_that() -> None:
    for said in ("float32", "bfloat16"):
        experiment = toy(f"training.precision={said}")
        assert with_precision(experiment, native=True) == with_precision(experiment, native=False) == experiment
    assert toy().training.precision == "auto"
    assert [with_precision(toy(), native).training.precision for native in (True, False)] == ["bfloat16", "float32"]


@pytest.mark.parametrize(("native", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_a_run_keeps_the_precision_that_it_began_with(
    native: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(trainers, "native_bfloat16", lambda device: native)
    begun = Trainer(toy("training.steps=2"), run, REGISTRY, device="cpu")
    assert begun.config.precision == precision and begun.autocast()._enabled is native
    begun.train()
    assert load_experiment(run / "config.toml", [], REGISTRY).training.precision == precision
    monkeypatch.setattr(trainers, "native_bfloat16", lambda device: not native)  # on another machine
    resumed = Trainer(toy("training.steps=4"), run, REGISTRY, resume=True, device="cpu")
    assert resumed.config.precision == precision and resumed.step == 2


def test_processes_that_would_compute_in_unlike_precisions_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(toy(), tmp_path / "run", REGISTRY, device="cpu")
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([own, ~own]))
    with pytest.raises(UserError, match=r"rank 0 would compute in float32 and rank 1 in another.*set \"float32\""):
        trainer._require_one_precision()
