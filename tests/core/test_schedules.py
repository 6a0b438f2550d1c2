"""Retention and weight schedules: the two ends of a schedule agree, and the named special cases hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from mtdiffusion import (
    DiffusionProcess,
    DirectWeights,
    OwnLayout,
    Retention,
    SNRMatched,
    TargetSignal,
    WeightSchedule,
)
from mtdiffusion.model import Prediction, standard_normal
from mtdiffusion.process import terminal_warning
from mtdiffusion.retention import CURVES, RETENTIONS, curve_log_snr, signal_from_weights, weights_from_signal
from mtdiffusion.sampler import ddim

SCHEDULES: dict[str, WeightSchedule] = {
    "constant": DirectWeights(start=0.7),
    "linear": DirectWeights("linear", initial=0.5, start=0.1, end=-0.3),
    "cosine": DirectWeights("cosine", initial=2.0, start=0.0, end=1.0),
    "target": TargetSignal((1.0, 0.8, 0.1, 0.0)),
    "snr_matched": SNRMatched("linear"),
}
Oracle = TypeVar("Oracle", DDPMScheduler, DDIMScheduler)
TINY = {"rtol": 1e-12, "atol": 1e-12}  # the tables are float64: what is equal on paper is equal to rounding


def _float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _side_by_side(*names: str) -> OwnLayout:
    return OwnLayout(dict.fromkeys(names, 3), 1, 2)


@pytest.mark.parametrize("modalities", [1, 3])
@pytest.mark.parametrize("kind", RETENTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_direct_and_solved_from_target_are_inverses(name: str, kind: str, modalities: int) -> None:
    retention = Retention.from_curve("cosine", 100, modalities, kind)
    signal = SCHEDULES[name].signal(retention, modalities)
    weights = weights_from_signal(signal, retention)
    torch.testing.assert_close(signal_from_weights(weights, retention), signal, **TINY)
    process = DiffusionProcess(retention.log_alpha_bar, signal, _side_by_side(*"abc"[:modalities]))
    torch.testing.assert_close(process.weight_table, weights, **TINY)


@pytest.mark.parametrize("kind", RETENTIONS)
def test_direct_weights_are_the_weights_of_the_process(kind: str) -> None:
    retention = Retention.from_curve("linear", 50, 2, kind)
    schedule = DirectWeights("linear", initial=0.5, start=0.1, end=-0.3, gains=(1.0, 3.0))
    weights = DiffusionProcess.build(retention, schedule, _side_by_side("a", "b")).weight_table
    expected = torch.cat([_float64(0.5), torch.linspace(0.1, -0.3, 50, dtype=torch.float64)])
    torch.testing.assert_close(weights, expected[:, None] * _float64(1.0, 3.0), **TINY)


def test_direct_weight_shapes_run_from_start_to_end() -> None:
    retention = Retention.from_curve("cosine", 5)
    tables = {
        shape: weights_from_signal(DirectWeights(shape, start=1.0, end=3.0).signal(retention, 1), retention)[1:, 0]
        for shape in ("constant", "linear", "cosine")
    }
    half = 1 - 0.5**0.5  # (1 − cos(π/4)) / 2 · 2
    torch.testing.assert_close(tables["constant"], _float64(1.0, 1.0, 1.0, 1.0, 1.0), **TINY)
    torch.testing.assert_close(tables["linear"], _float64(1.0, 1.5, 2.0, 2.5, 3.0), **TINY)
    torch.testing.assert_close(tables["cosine"], _float64(1.0, 1 + half, 2.0, 3 - half, 3.0), **TINY)


def test_target_signal_passes_through_its_knots() -> None:
    signal = TargetSignal((1.0, 0.4, 0.0), gains=(1.0, 2.0)).signal(Retention.from_curve("cosine", 10), 2)
    torch.testing.assert_close(signal[[0, 5, 10], 1], _float64(2.0, 0.8, 0.0), **TINY)
    torch.testing.assert_close(signal[[1, 9], 0], _float64(0.88, 0.08), **TINY)


@pytest.mark.parametrize(("kind", "curve"), list(itertools.product(RETENTIONS, CURVES)))
def test_snr_matched_has_the_chosen_curve_for_every_retention(kind: str, curve: str) -> None:
    process = DiffusionProcess.build(
        Retention.from_curve("cosine", 200, 3, kind), SNRMatched(curve, (1.0, 0.5, 2.0)), _side_by_side(*"abc")
    )
    t = torch.arange(1, 201)[:, None].expand(-1, 3)
    gains = _float64(1.0, 0.5, 2.0)
    torch.testing.assert_close(
        process.snr(t).log(), curve_log_snr(curve, 200)[1:, None] + 2 * gains.log(), rtol=1e-12, atol=1e-10
    )
    torch.testing.assert_close(process.signal_table[0], gains, **TINY)


def test_rectified_flow_is_a_straight_line() -> None:
    process = DiffusionProcess.build(
        Retention.from_curve("cosine", 40, 2, "rectified_flow"), SNRMatched("rectified_flow"), _side_by_side("a", "b")
    )
    t = torch.arange(41)[:, None].expand(-1, 2)
    tau = t.double() / 40 * (1 - 1e-3)  # it stops just short of 1, where log ᾱ does not exist
    torch.testing.assert_close(process.variance(t).sqrt(), tau, **TINY)
    torch.testing.assert_close(process.signal(t), 1 - tau, **TINY)


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_curves_are_those_of_diffusers(ours: str, theirs: str) -> None:
    oracle = DDPMScheduler(1000, beta_schedule=theirs)
    retention = Retention.from_curve(ours, 1000)
    # Their tables are float32 products of 1000 factors.
    torch.testing.assert_close(retention.log_alpha_bar[1:].exp().float(), oracle.alphas_cumprod, rtol=2e-4, atol=1e-8)


def _in_double(scheduler: Oracle) -> Oracle:
    """diffusers' scheduler with float64 tables, so that coefficients can be compared to rounding."""
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = scheduler.final_alpha_cumprod = _float64(1.0)[0]
    return scheduler


def _ddpm(alphas: Tensor) -> DiffusionProcess:
    return DiffusionProcess.build(Retention.from_alphas(alphas), DirectWeights(), _side_by_side("x"))


def _z_and_code() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 1, 3, 1, 2, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_one_modality_that_only_enters_at_the_start_is_ddpm(beta_schedule: str) -> None:
    options = {"prediction_type": "sample", "clip_sample": False}
    oracle = _in_double(DDPMScheduler(1000, beta_schedule=beta_schedule, **options))
    process = _ddpm(oracle.alphas)
    torch.testing.assert_close(process.signal_table[1:, 0].square(), oracle.alphas_cumprod, **TINY)
    torch.testing.assert_close(process.variance(torch.arange(1, 1001)), 1 - oracle.alphas_cumprod, **TINY)
    z, code = _z_and_code()
    for step in (1, 2, 17, 500, 999, 1000):
        t = torch.tensor([[step]])
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        stepped = oracle.step(code, step - 1, z, generator=torch.Generator().manual_seed(step)).prev_sample
        variance = process.posterior_variance(t, t - 1)[0, 0]
        ours = process.posterior_mean(z, {"x": code}, t, t - 1) + variance.sqrt() * noise
        torch.testing.assert_close(ours, stepped, rtol=1e-9, atol=1e-9)  # they add 1 − ᾱ with cancellation, at t = 1
        if step > 1:
            torch.testing.assert_close(variance, oracle._get_variance(step - 1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("parameterisation", ["codes", "epsilon"])
def test_one_modality_that_only_enters_at_the_start_jumps_like_ddim(eta: float, parameterisation: str) -> None:
    oracle = _in_double(DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=False))
    oracle.set_timesteps(10)  # t − 1 = 900, 800, ..., 0
    process = _ddpm(oracle.alphas)
    z, epsilon = _z_and_code()
    noise = standard_normal(z, torch.Generator().manual_seed(1))
    for timestep in oracle.timesteps.tolist():
        t = torch.tensor([[timestep + 1]])
        s = (t - 100).clamp(min=0)
        # The code for which epsilon is the noise: what a head for x would have said.
        code = {"x": (z - process.variance(t).sqrt() * epsilon) / process.signal(t)}
        if parameterisation == "epsilon":
            code = {"x": torch.full_like(z, 99.0)}  # codes do not matter here
        generator = torch.Generator().manual_seed(1)
        step = ddim(process, eta, epsilon_head=parameterisation == "epsilon", generator=generator)
        found = step(z, Prediction({}, code, epsilon), t, s)
        stepped = oracle.step(epsilon, timestep, z, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(found, stepped, rtol=1e-8, atol=1e-8)


def test_literal_retention_does_not_underflow_with_many_modalities() -> None:
    retention = Retention.from_curve("cosine", 400, 4, "literal")
    assert retention.log_alpha_bar[-1] < -650  # exp of it is far below the least float32, 1e-38: log only
    assert retention.log_alpha_bar.isfinite().all()
    process = DiffusionProcess.build(retention, SNRMatched(), _side_by_side(*"abcd"))
    assert process.signal_table.isfinite().all()
    t = torch.arange(1, 401)
    assert process.posterior_variance(t, t - 1).isfinite().all()


def test_literal_retention_keeps_one_part_in_n_plus_one() -> None:
    alphas = _float64(0.9, 0.5, 0.2)
    torch.testing.assert_close(Retention.from_alphas(alphas, 4, "literal").sqrt_step.square(), alphas / 5, **TINY)


def test_constant_weights_with_literal_retention_end_far_from_noise_and_say_so() -> None:
    retention = Retention.from_curve("linear", 1000, 1, "literal")
    process = DiffusionProcess.build(retention, DirectWeights(initial=1.0, start=1.0), _side_by_side("image"))
    # 0.98/2 is the last a_t, so m = √0.49 (m + 1) = 7/3; m follows a_t with a lag of a few steps.
    assert process.signal_table[-1, 0].item() == pytest.approx(7 / 3, abs=1e-3)
    assert process.terminal_snr.item() == pytest.approx((7 / 3) ** 2, abs=1e-2)
    warning = terminal_warning(process)
    assert warning is not None
    assert "image 5.4" in warning


@pytest.mark.parametrize("kind", RETENTIONS)
@pytest.mark.parametrize("curve", CURVES)
def test_snr_matched_schedules_end_in_noise(curve: str, kind: str) -> None:
    process = DiffusionProcess.build(
        Retention.from_curve(curve, 1000, 2, kind), SNRMatched(curve), _side_by_side("a", "b")
    )
    assert terminal_warning(process) is None


def test_the_terminal_warning_names_only_the_modality_above_the_limit() -> None:
    # σ_T = 1 to rounding, so the SNR is m_T²: 0.005 and 0.02, either side of the default limit of 0.01.
    signal = torch.stack([_float64(1.0, 1.0), _float64(0.005, 0.02).sqrt()])
    process = DiffusionProcess(_float64(0.0, -50.0), signal, _side_by_side("image", "label"))
    warning = terminal_warning(process)
    assert warning is not None
    assert "label 0.02" in warning
    assert "image" not in warning
    assert terminal_warning(process, limit=0.03) is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Retention.from_curve("sine"), "expected one of cosine, linear, rectified_flow, found 'sine'"),
        (lambda: Retention.from_curve(kind="paper"), "expected one of compensated, literal, rectified_flow, found"),
        (lambda: Retention.from_alphas(torch.tensor([0.9]), kind="rectified_flow"), "'compensated' or 'literal'"),
        (lambda: Retention.from_alphas(torch.tensor([0.9, 1.0])), "strictly between 0 and 1"),
        (lambda: Retention.from_alphas(torch.tensor([0.9, 0.0])), "strictly between 0 and 1"),
        (lambda: Retention.from_alphas(torch.full((2, 2), 0.5)), "one-dimensional"),
        (lambda: TargetSignal((1.0,)), "at least two"),
        (lambda: SNRMatched("sine"), "sine"),
        (lambda: DirectWeights("square"), "square"),
        (lambda: SNRMatched(gains=(1.0,)).signal(Retention.from_curve(steps=5), 2), "each of 2 modalities, found 1"),
    ],
)
def test_errors_say_what_was_expected(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
