"""AdamW without torch's compiler is torch's AdamW, and a training starts without the compiler."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtdiffusion_engine.adamw import AdamW
from mtdiffusion_engine.optimisation import step_if_finite


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_torchs_to_the_bit_also_from_a_kept_state(fused: bool) -> None:
    found: list[list[torch.Tensor]] = []
    for cls in (torch.optim.AdamW, AdamW):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,))]
        optimizer = cls(weights, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
        for step in range(6):
            optimizer.zero_grad(set_to_none=True)
            assert all(weight.grad is None for weight in weights)
            sum((weight * torch.randn(weight.shape, generator=generator)).exp().sum() for weight in weights).backward()  # type: ignore[union-attr]
            optimizer.step()
            if step == 2:
                kept, optimizer = optimizer.state_dict(), cls(weights, lr=1.0, fused=fused)
                optimizer.load_state_dict(kept)
        moments = [each for entry in optimizer.state_dict()["state"].values() for each in entry.values()]
        found.append([*(weight.detach() for weight in weights), *moments])
    assert len(found[0]) == 2 + 2 * 3
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_step_can_be_left_out() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.full((3,), torch.nan)
    assert step_if_finite(optimizer, torch.tensor(torch.nan)) == 1 and torch.equal(weight, torch.ones(3))
    weight.grad = torch.ones(3)
    assert step_if_finite(optimizer, torch.tensor(1.0)) == 0 and not torch.equal(weight, torch.ones(3))


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_starts_without_the_compiler(tmp_path: Path, optimizer: str) -> None:
    """What imports it takes over a second longer."""
    program = f"""
import sys
from pathlib import Path
from mtdiffusion_engine import commands
from mtdiffusion_engine.trainer import Trainer
from tests.engine.tiny import REGISTRY, toy
experiment = toy("training.steps=1", "training.optimizer={optimizer}")
Trainer(experiment, Path({str(tmp_path / "run")!r}), REGISTRY, device="cpu").train()
print([each for each in ("torch._dynamo", "torch.distributed.tensor", "sympy") if each in sys.modules])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert list((tmp_path / "run" / "checkpoints").iterdir())
