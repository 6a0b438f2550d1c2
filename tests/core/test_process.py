"""The closed forms of the process against the exact joint Gaussian of (z_0, ..., z_T), built from transitions alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtdiffusion import DiffusionProcess, DirectWeights, Retention, SNRMatched, TargetSignal, WeightSchedule
from mtdiffusion.process import mix

STEPS = 12
SCHEDULES: dict[str, WeightSchedule] = {
    "constant": DirectWeights(start=1.0),
    "linear": DirectWeights("linear", initial=0.5, start=0.1, end=-0.3),
    "target": TargetSignal((1.0, 0.8, 0.3, 0.1)),
    "snr_matched": SNRMatched(),
}
TINY = {"rtol": 1e-12, "atol": 1e-12}


class Chain:
    """(z_0..z_T) of one scalar latent as a linear map of (codes, transition noises), from the definition of q alone.

    Row t of ``of_codes [T + 1, N]`` and ``of_noise [T + 1, T]`` says how z_t comes about.
    """

    def __init__(self, process: DiffusionProcess) -> None:
        weights, log_alpha_bar = process.weight_table, process.log_alpha_bar
        a = torch.exp(log_alpha_bar.diff())
        codes, noise = [weights[0]], [torch.zeros(process.steps, dtype=torch.float64)]
        for t in range(1, process.steps + 1):
            fresh = torch.zeros_like(noise[0])
            fresh[t - 1] = (1 - a[t - 1]).sqrt()
            codes.append(a[t - 1].sqrt() * (codes[-1] + weights[t]))
            noise.append(a[t - 1].sqrt() * noise[-1] + fresh)
        self.of_codes, of_noise = torch.stack(codes), torch.stack(noise)
        self.covariance = of_noise @ of_noise.T

    def posterior(self, s: int, t: int, z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[B]`` and variance of z_s given z_t ``[B]`` and the codes ``[B, N]``."""
        gain = self.covariance[s, t] / self.covariance[t, t]
        mean = codes @ self.of_codes[s] + gain * (z - codes @ self.of_codes[t])
        return mean, self.covariance[s, s] - gain * self.covariance[s, t]


def _process(name: str, kind: str, n: int) -> DiffusionProcess:
    return DiffusionProcess.build(Retention.from_curve("cosine", STEPS, n, kind), SCHEDULES[name], n)


def _data(n: int, batch: int = 5) -> tuple[Tensor, Tensor]:
    """z ``[B, C, H, W]`` and codes ``[B, N, C, H, W]``, any values."""
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(batch, 2, 1, 3, generator=generator, dtype=torch.float64)
    return z, torch.randn(batch, n, 2, 1, 3, generator=generator, dtype=torch.float64)


def _scalars(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The same as lists of scalar latents: ``[B·C·H·W]`` and ``[B·C·H·W, N]``."""
    return z.flatten(), codes.movedim(1, -1).reshape(-1, codes.shape[1])


every_process = pytest.mark.parametrize(
    ("name", "kind", "n"),
    [(name, kind, n) for name in SCHEDULES for kind in ("compensated", "literal", "rectified_flow") for n in (1, 2, 5)],
)


@every_process
def test_marginals_are_those_of_the_chain(name: str, kind: str, n: int) -> None:
    process, (z, codes) = _process(name, kind, n), _data(n)
    chain = Chain(process)
    every = torch.arange(STEPS + 1)
    torch.testing.assert_close(process.signal(every), chain.of_codes, **TINY)
    torch.testing.assert_close(process.variance(every), chain.covariance.diagonal(), **TINY)
    for t in range(STEPS + 1):
        at = torch.full((len(z),), t)
        expected = (_scalars(z, codes)[1] @ chain.of_codes[t]).reshape(z.shape)
        torch.testing.assert_close(process.mean(codes, at), expected, **TINY)
        noisy = expected + chain.covariance[t, t].sqrt() * z
        torch.testing.assert_close(process.corrupt(codes, at, z), noisy, **TINY)


@every_process
def test_the_three_forms_of_the_posterior_are_the_posterior_of_the_chain(name: str, kind: str, n: int) -> None:
    process, (z, codes) = _process(name, kind, n), _data(n)
    chain = Chain(process)
    weights = process.weight_table
    for step in range(1, STEPS + 1):
        t = torch.full((len(z),), step)
        mean, variance = chain.posterior(step - 1, step, *_scalars(z, codes))
        mean = mean.reshape(z.shape)
        now, before = process.variance(t[0]), process.variance(t[0] - 1)
        a = torch.exp(process.log_alpha_bar[step] - process.log_alpha_bar[step - 1])
        entering = mix(weights[step].expand(len(z), -1), codes)
        epsilon = process.epsilon(z, codes, t)
        paper = (z - (1 - a) / now.sqrt() * epsilon) / a.sqrt() - entering
        third = a.sqrt() * before / now * (z - a.sqrt() * entering) + (1 - a) / now * process.mean(codes, t - 1)
        torch.testing.assert_close(process.posterior_mean(z, codes, t), mean, **TINY)
        torch.testing.assert_close(third, mean, **TINY)
        torch.testing.assert_close(paper, mean, rtol=1e-10, atol=1e-10)  # it divides by √a and then subtracts
        torch.testing.assert_close(process.posterior_variance(t), variance.expand(len(z)), **TINY)


@every_process
def test_a_full_noise_jump_is_the_posterior_over_any_gap(name: str, kind: str, n: int) -> None:
    process, (z, codes) = _process(name, kind, n), _data(n)
    chain = Chain(process)
    for late, early in [(12, 11), (12, 3), (7, 2), (5, 0), (1, 0)]:
        t, s = torch.full((len(z),), late), torch.full((len(z),), early)
        mean, variance = chain.posterior(early, late, *_scalars(z, codes))
        epsilon = process.epsilon(z, codes, t)
        still = process.jump(process.mean(codes, s), epsilon, t, s, 1.0, torch.zeros_like(z))
        moved = process.jump(process.mean(codes, s), epsilon, t, s, 1.0, torch.ones_like(z))
        torch.testing.assert_close(still, mean.reshape(z.shape), **TINY)
        torch.testing.assert_close((moved - still).square(), variance.expand(z.shape), **TINY)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.7, 1e6])
@every_process
def test_a_jump_of_any_noise_keeps_the_marginal(name: str, kind: str, n: int, eta: float) -> None:
    """If z_t ~ q(z_t | X), then z_s ~ q(z_s | X): its mean is M_s, and the two noises add up to 1 − ᾱ_s."""
    process, (z, codes) = _process(name, kind, n), _data(n)
    t, s = torch.full((len(z),), 9), torch.full((len(z),), 4)
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    mean = process.mean(codes, s)
    kept = process.jump(mean, one, t, s, eta, zero) - mean
    drawn = process.jump(mean, zero, t, s, eta, one) - mean
    torch.testing.assert_close(kept.square() + drawn.square(), process.variance(s)[:, None, None, None] * one, **TINY)
    torch.testing.assert_close(process.jump(mean, zero, t, s, eta, zero), mean, **TINY)


@every_process
def test_a_jump_of_more_noise_than_there_is_starts_afresh(name: str, kind: str, n: int) -> None:
    process, (z, codes) = _process(name, kind, n), _data(n)
    t, s = torch.full((len(z),), 9), torch.full((len(z),), 4)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
    jumped = process.jump(process.mean(codes, s), process.epsilon(z, codes, t), t, s, 1e6, noise)
    torch.testing.assert_close(jumped, process.corrupt(codes, s, noise), **TINY)


def test_literal_retention_s_ancestral_jump_all_but_starts_afresh() -> None:
    """What sets literal retention apart from compensated is how much noise its ancestral jumps put in."""
    z, codes = _data(5)
    literal, compensated = (
        DiffusionProcess.build(Retention.from_curve("cosine", 500, 5, kind), SNRMatched(), 5)
        for kind in ("literal", "compensated")
    )
    t, s = torch.full((len(z),), 260), torch.full((len(z),), 240)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)

    def jumped(process: DiffusionProcess, eta: float) -> Tensor:
        """In units of σ, in which the two conventions are one process."""
        out = process.jump(process.mean(codes, s), z, t, s, eta, noise)
        return out / process.variance(s).sqrt()[:, None, None, None]

    afresh = jumped(compensated, 1e6)
    torch.testing.assert_close(jumped(literal, 1.0), afresh, rtol=1e-5, atol=1e-5)
    assert (jumped(compensated, 1.0) - afresh).abs().max() > 0.1


@every_process
def test_the_mean_from_epsilon_agrees_with_the_mean_from_codes(name: str, kind: str, n: int) -> None:
    process, (z, codes) = _process(name, kind, n), _data(n)
    for late, early in [(12, 11), (7, 2), (5, 0)]:
        t, s = torch.full((len(z),), late), torch.full((len(z),), early)
        found = process.mean_from_epsilon(z, process.epsilon(z, codes, t), codes, t, s)
        # Its κ = √(ᾱ_s/ᾱ_t) is up to 3e4 here (literal, N = 5) and amplifies the rounding.
        kappa = torch.exp(0.5 * (process.log_alpha_bar[early] - process.log_alpha_bar[late])).item()
        torch.testing.assert_close(found, process.mean(codes, s), rtol=0, atol=1e-14 * (100 + 10 * kappa))


@every_process
def test_code_errors_reach_the_posterior_mean_through_their_gain(name: str, kind: str, n: int) -> None:
    process, (z, codes) = _process(name, kind, n), _data(n)
    estimated = _data(n)[1].flip(0)
    for step in range(1, STEPS + 1):
        t = torch.full((len(z),), step)
        difference = process.posterior_mean(z, codes, t) - process.posterior_mean(z, estimated, t)
        torch.testing.assert_close(mix(process.code_error_gain(t), codes - estimated), difference, **TINY)


def test_presence_zero_is_a_process_without_the_modality() -> None:
    three, two = _process("snr_matched", "compensated", 3), _process("snr_matched", "compensated", 2)
    z, codes = _data(3)
    presence = torch.tensor([1.0, 0.0, 1.0]).expand(len(z), -1)
    others = codes[:, [0, 2]]
    t, s = torch.full((len(z),), 8), torch.full((len(z),), 3)
    epsilon = two.epsilon(z, others, t)
    same = [
        (three.signal(t, presence)[:, [0, 2]], two.signal(t)),
        (three.mean(codes, t, presence), two.mean(others, t)),
        (three.corrupt(codes, t, z, presence), two.corrupt(others, t, z)),
        (three.epsilon(z, codes, t, presence), epsilon),
        (three.posterior_mean(z, codes, t, presence), two.posterior_mean(z, others, t)),
        (three.code_error_gain(t, presence)[:, [0, 2]], two.code_error_gain(t)),
        (three.mean_from_epsilon(z, epsilon, codes, t, s, presence), two.mean_from_epsilon(z, epsilon, others, t, s)),
    ]
    for with_presence, without in same:
        torch.testing.assert_close(with_presence, without, **TINY)
    assert not three.signal(t, presence)[:, 1].any()
    assert not three.code_error_gain(t, presence)[:, 1].any()


def test_samples_of_one_batch_may_have_different_modalities_and_times() -> None:
    process, (z, codes) = _process("linear", "literal", 2), _data(2, batch=3)
    presence = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    t = torch.tensor([1, 6, 12])
    together = process.posterior_mean(z, codes, t, presence)
    for i in range(3):
        one = slice(i, i + 1)
        alone = process.posterior_mean(z[one], codes[one], t[one], presence[one])
        torch.testing.assert_close(together[one], alone, **TINY)


@pytest.mark.parametrize("kind", ["compensated", "literal"])
def test_modalities_with_equal_signal_are_one_process_on_their_sum(kind: str) -> None:
    retention = Retention.from_curve("cosine", STEPS, 4, kind)
    many = DiffusionProcess.build(retention, SNRMatched(), 4)
    single = DiffusionProcess.build(retention, SNRMatched(), 1)
    z, codes = _data(4)
    total = codes.sum(1, keepdim=True)
    for step in range(1, STEPS + 1):
        t = torch.full((len(z),), step)
        torch.testing.assert_close(many.corrupt(codes, t, z), single.corrupt(total, t, z), **TINY)
        torch.testing.assert_close(many.posterior_mean(z, codes, t), single.posterior_mean(z, total, t), **TINY)


def test_compensated_snr_matched_on_its_own_curve_is_variance_preserving() -> None:
    process = DiffusionProcess.build(Retention.from_curve("cosine", STEPS, 3), SNRMatched("cosine"), 3)
    total = process.signal_table.square() + process.variance(torch.arange(STEPS + 1))[:, None]
    torch.testing.assert_close(total, torch.ones_like(total), **TINY)
    torch.testing.assert_close(process.weight_table[1:], torch.zeros(STEPS, 3).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "snr_matched"])
def test_the_noise_level_is_0_at_data_and_tells_signal_to_noise(name: str) -> None:
    process = _process(name, "compensated", 2)
    level = process.noise_level(torch.arange(STEPS + 1))
    assert level[0] == 0
    assert ((level >= 0) & (level <= 1)).all()
    snr = process.snr(torch.arange(1, STEPS + 1))[:, 0]
    torch.testing.assert_close(torch.tan(level[1:] * torch.pi / 2) ** -2, snr, rtol=1e-9, atol=1e-9)


def test_the_noise_level_means_the_same_for_another_retention() -> None:
    t = torch.arange(STEPS + 1)
    levels = [_process("snr_matched", kind, 3).noise_level(t) for kind in ("compensated", "literal", "rectified_flow")]
    torch.testing.assert_close(levels[0], levels[1], **TINY)
    torch.testing.assert_close(levels[0], levels[2], **TINY)


def test_means_keep_full_precision_under_autocast() -> None:
    process, (_, codes) = _process("snr_matched", "compensated", 3), _data(3)
    t = torch.ones(len(codes), dtype=torch.long)
    exact = process.mean(codes, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = process.mean(codes.float(), t)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)  # float32; bfloat16 would be 1e-2 off


class _Broken(WeightSchedule):
    def __init__(self, signal: Tensor) -> None:
        self.table = signal

    def signal(self, retention: Retention, modalities: int) -> Tensor:
        return self.table


@pytest.mark.parametrize("table", [torch.ones(STEPS, 2), torch.ones(STEPS + 1, 1), torch.ones(STEPS + 1, 2) / 0])
def test_a_schedule_with_a_wrong_table_is_refused_by_name(table: Tensor) -> None:
    with pytest.raises(ValueError, match=r"_Broken.signal: expected finite values of shape \(13, 2\)"):
        DiffusionProcess.build(Retention.from_curve("cosine", STEPS, 2), _Broken(table), 2)


def test_a_noisy_jump_without_noise_is_refused() -> None:
    process, (z, codes) = _process("snr_matched", "compensated", 2), _data(2)
    t = torch.full((len(z),), 5)
    with pytest.raises(ValueError, match="needs noise"):
        process.jump(process.mean(codes, t - 1), z, t, t - 1, eta=0.5)
