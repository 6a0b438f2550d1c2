"""Muon against what it approximates, and as a training has it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.cost import count_cost
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_engine.muon import COEFFICIENTS, REPETITIONS, Muon, hidden_matrices, orthogonalised
from mtdiffusion_engine.optimisation import step_if_finite
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import UserError
from tests.engine.tiny import REGISTRY, toy


def matrix(rows: int, columns: int, smallest: float = 1e-2) -> Tensor:
    """Of singular values from 1 down to ``smallest``, in float64."""
    generator = torch.Generator().manual_seed(rows)
    u, _, v = torch.linalg.svd(
        torch.randn(rows, columns, generator=generator, dtype=torch.float64), full_matrices=False
    )
    return u * torch.logspace(0, torch.tensor(smallest).log10().item(), u.shape[1], dtype=torch.float64) @ v


@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16), (1, 7)])
def test_directions_stay_and_their_lengths_become_one(shape: tuple[int, int]) -> None:
    x = 300 * matrix(*shape)
    found = orthogonalised(x)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    lengths = u.T @ found @ v.T
    assert (lengths - lengths.diag().diag()).abs().max() < 1e-9
    assert lengths.diag().min() > 0.6 and lengths.diag().max() < 1.25
    torch.testing.assert_close(orthogonalised(x.float()).double(), found, rtol=0, atol=2e-4)


def test_the_iteration_is_that_on_the_matrix_itself() -> None:
    x = matrix(20, 50, smallest=1e-4)
    a, b, c = COEFFICIENTS
    expected = x / x.norm()
    for _ in range(REPETITIONS):
        gram = expected @ expected.T
        expected = a * expected + b * gram @ expected + c * gram @ gram @ expected
    torch.testing.assert_close(orthogonalised(x), expected, rtol=0, atol=1e-9)


def test_a_matrix_of_zeros_has_no_direction() -> None:
    assert not orthogonalised(torch.zeros(4, 6)).any()


def test_what_is_read_in_and_out_and_what_is_no_matrix_is_left_to_adamw() -> None:
    model = build_model(toy())
    found = {id(weight) for weight in hidden_matrices(model)}
    names = {name for name, weight in model.named_parameters() if id(weight) in found}
    assert names and all(name.startswith("backbone.") and name.endswith(".weight") for name in names)
    assert all(dict(model.named_parameters())[name].dim() >= 2 for name in names)
    odd = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 3, groups=4), nn.Linear(4, 4))
    assert hidden_matrices(odd) == [odd[3].weight]
    odd.requires_grad_(False)
    assert hidden_matrices(odd) == []


def quadratic() -> tuple[nn.Linear, Muon]:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    optimizer = Muon([layer.weight], [layer.bias], lr=1e-2, weight_decay=0.1, beta2=0.99)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    return layer, optimizer


def test_a_step_has_the_length_of_adamws() -> None:
    layer, optimizer = quadratic()
    before = layer.weight.detach().clone()
    assert not step_if_finite(optimizer, torch.tensor(1.0))
    step = layer.weight.detach() - before * (1 - 1e-2 * 0.1)
    assert 0.2 * 1e-2 * 0.8 < step.square().mean().sqrt() < 0.2 * 1e-2 * 1.2
    assert optimizer.state[layer.weight].keys() == {"step", "momentum"} and "exp_avg" in optimizer.state[layer.bias]


def test_a_step_that_nobody_asked_to_leave_out_is_taken() -> None:
    """As a fused optimizer of torch does, in a loop that does not set ``found_inf``."""
    (told, asked), (plain, untold) = quadratic(), quadratic()
    step_if_finite(asked, torch.tensor(1.0))
    untold.step()
    assert torch.equal(told.weight, plain.weight) and torch.equal(told.bias, plain.bias)


def test_a_network_without_such_matrices_is_trained_by_adamw() -> None:
    layer, plain = nn.LayerNorm(6), nn.LayerNorm(6)
    optimizer = Muon([], list(layer.parameters()), lr=1e-2, weight_decay=0.1, beta2=0.99)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    for parameter in (*layer.parameters(), *plain.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    adamw.step()
    torch.testing.assert_close(list(layer.parameters()), list(plain.parameters()))


def test_a_step_that_is_left_out_changes_nothing() -> None:
    layer, optimizer = quadratic()
    step_if_finite(optimizer, torch.tensor(1.0))
    before = [x.clone() for x in (layer.weight, layer.bias, optimizer.state[layer.weight]["momentum"])]
    assert layer.weight.grad is not None
    layer.weight.grad[2, 3] = torch.nan
    assert step_if_finite(optimizer, torch.tensor(torch.nan))
    after = (layer.weight, layer.bias, optimizer.state[layer.weight]["momentum"])
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


MUON = "training.optimizer=muon"


def train(run: Path, resume: bool = False, stop_at: int | None = None) -> Trainer:
    trainer = Trainer(toy(MUON), run, REGISTRY, resume=resume, device="cpu")
    trainer.train(stop_at=stop_at)
    return trainer


def test_a_run_goes_on_where_it_was_and_with_no_other_optimizer(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(whole)
    train(parted, stop_at=4)
    with pytest.raises(UserError, match=r"training\.optimizer"):
        Trainer(toy(), parted, REGISTRY, resume=True, device="cpu")
    train(parted, resume=True)
    for name in ("model", "ema", "optimizer"):
        first, second = (
            ckpt.load_tensors(ckpt.list_checkpoints(run)[-1] / f"{name}.safetensors") for run in (whole, parted)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_moments_that_are_not_finite_are_named_with_their_weights(tmp_path: Path) -> None:
    trainer = train(tmp_path / "run")
    for kind, moment, name in (("Muon", "momentum", "weight"), ("AdamW", "exp_avg", "bias")):
        name = f"backbone.embedding.noise.0.{name}"
        x = trainer.optimizer.state[trainer.model.get_parameter(name)][moment]
        x.flatten()[0] = torch.inf
        assert trainer.not_finite() == f"{kind}'s {moment} of {name}"
        x.zero_()


def test_memory_counts_one_moment_of_a_matrix() -> None:
    both = {name: count_cost(experiment, build_model(experiment)) for name, experiment in EXPERIMENTS.items()}
    matrices = sum(4 * weight.numel() for weight in hidden_matrices(build_model(toy())))
    assert both["adamw"].optimizer - both["muon"].optimizer == matrices > 0


EXPERIMENTS = {"adamw": toy(), "muon": toy(MUON)}
