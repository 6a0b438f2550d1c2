"""The closed forms of the process against the exact joint Gaussian of (z_0, ..., z_T), built from transitions alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mtdiffusion import (
    DiffusionProcess,
    DirectWeights,
    LatentSpec,
    Layout,
    OwnLayout,
    Retention,
    SharedLayout,
    SNRMatched,
    TargetSignal,
    WeightSchedule,
)
from mtdiffusion.layout import noise_level

STEPS = 12
BATCH = 5
SCHEDULES: dict[str, WeightSchedule] = {
    "constant": DirectWeights(start=1.0),
    "linear": DirectWeights("linear", initial=0.5, start=0.1, end=-0.3),
    "target": TargetSignal((1.0, 0.8, 0.3, 0.1)),
    "snr_matched": SNRMatched(),
}
KINDS = ("compensated", "literal", "rectified_flow")
TINY = {"rtol": 1e-12, "atol": 1e-12}
Codes = dict[str, Tensor]


class Chain:
    """(z_0..z_T) of one scalar latent as a linear map of (codes, transition noises), from the definition of q alone.

    Row t of ``of_codes [T + 1, N]`` says how the codes are in z_t, ``covariance [T + 1, T + 1]`` how noise goes with
    noise. Side by side, each modality is a chain of its own at its own clock; upon another, all are one chain.
    """

    def __init__(self, process: DiffusionProcess) -> None:
        weights, log_alpha_bar = process.weight_table, process.log_alpha_bar
        self.shared = process.layout.shared_clock
        a = torch.exp(log_alpha_bar.diff())
        codes, noise = [weights[0]], [torch.zeros(process.steps, dtype=torch.float64)]
        for t in range(1, process.steps + 1):
            fresh = torch.zeros_like(noise[0])
            fresh[t - 1] = (1 - a[t - 1]).sqrt()
            codes.append(a[t - 1].sqrt() * (codes[-1] + weights[t]))
            noise.append(a[t - 1].sqrt() * noise[-1] + fresh)
        self.of_codes, of_noise = torch.stack(codes), torch.stack(noise)
        self.covariance = of_noise @ of_noise.T

    def combine(self, weights: Tensor, codes: Codes) -> Tensor:
        """Codes times their weights ``[B, N]``, where they meet: ``[B, C, H, W]``."""
        parts = [weights[:, i, None, None, None] * code for i, code in enumerate(codes.values())]
        return torch.stack(parts).sum(0) if self.shared else torch.cat(parts, 1)

    def over(self, values: Tensor, codes: Codes) -> Tensor:
        """Values ``[B, N]`` where they apply to z: ``[B, C, H, W]``."""
        if self.shared:
            return values[:, :1, None, None].expand_as(next(iter(codes.values())))
        return self.combine(values, {name: torch.ones_like(code) for name, code in codes.items()})

    def mean(self, codes: Codes, t: Tensor) -> Tensor:
        return self.combine(self.of_codes[t, torch.arange(t.shape[1])], codes)

    def posterior(self, z: Tensor, codes: Codes, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of z_s given z_t and the codes: ``[B, C, H, W]``, clocks ``[B, N]``."""
        gain = self.covariance[s, t] / self.covariance[t, t]
        mean = self.mean(codes, s) + self.over(gain, codes) * (z - self.mean(codes, t))
        return mean, self.over(self.covariance[s, s] - gain * self.covariance[s, t], codes)


def _process(name: str, kind: str, n: int, layout: str = "shared") -> DiffusionProcess:
    names = [f"m{i}" for i in range(n)]
    space: Layout
    if layout == "shared":
        space = SharedLayout(tuple(names), LatentSpec(2, 1, 3))
    else:
        space = OwnLayout({modality: 1 + i % 2 for i, modality in enumerate(names)}, 1, 3)
    return DiffusionProcess.build(Retention.from_curve("cosine", STEPS, n, kind), SCHEDULES[name], space)


def _data(process: DiffusionProcess, seed: int = 0) -> tuple[Tensor, Codes]:
    """z ``[B, C, H, W]`` and codes, any values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(latent: LatentSpec) -> Tensor:
        return torch.randn(BATCH, *latent.shape, generator=generator, dtype=torch.float64)

    layout = process.layout
    return draw(layout.latent), {name: draw(layout.share(name)) for name in layout.names}


def _clocks(process: DiffusionProcess, *, one_step: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of clocks s < t ``[B, N]``, from T and into 0 too; each modality's own if the layout gives it one."""
    generator = torch.Generator().manual_seed(0)
    n = len(process.layout.names)
    shape = (BATCH, 1) if process.layout.shared_clock else (BATCH, n)
    for fixed in (1, STEPS, None, None, None, None):
        t = torch.randint(1, STEPS + 1, shape, generator=generator) if fixed is None else torch.full(shape, fixed)
        s = t - 1 if one_step else (t * torch.rand(shape, generator=generator)).long()
        yield t.expand(BATCH, n), s.expand(BATCH, n)


every_process = pytest.mark.parametrize(
    ("name", "kind", "n", "layout"),
    [
        (name, kind, n, layout)
        for name in SCHEDULES
        for kind in KINDS
        for n in (1, 2, 5)
        for layout in ("own", "shared")
    ],
)


@every_process
def test_marginals_are_those_of_the_chain(name: str, kind: str, n: int, layout: str) -> None:
    process = _process(name, kind, n, layout)
    (z, codes), chain = _data(process), Chain(process)
    every = torch.arange(STEPS + 1)[:, None].expand(-1, n)
    torch.testing.assert_close(process.signal(every), chain.of_codes, **TINY)
    torch.testing.assert_close(process.variance(every[:, 0]), chain.covariance.diagonal(), **TINY)
    for t in (clock for pair in _clocks(process) for clock in pair):  # s is at 0 now and then
        expected = chain.mean(codes, t)
        torch.testing.assert_close(process.mean(codes, t), expected, **TINY)
        noisy = expected + chain.over(chain.covariance[t, t].sqrt(), codes) * z
        torch.testing.assert_close(process.corrupt(codes, t, z), noisy, **TINY)


@every_process
def test_the_three_forms_of_the_posterior_are_the_posterior_of_the_chain(
    name: str, kind: str, n: int, layout: str
) -> None:
    process = _process(name, kind, n, layout)
    (z, codes), chain = _data(process), Chain(process)
    for t, s in _clocks(process, one_step=True):
        mean, variance = chain.posterior(z, codes, t, s)
        entering = chain.combine(process.weight_table[t, torch.arange(n)], codes)
        now, before, a = (
            chain.over(values, codes)
            for values in (
                process.variance(t),
                process.variance(s),
                torch.exp(process.log_alpha_bar[t] - process.log_alpha_bar[s]),
            )
        )
        paper = (z - (1 - a) / now.sqrt() * process.epsilon(z, codes, t)) / a.sqrt() - entering
        third = a.sqrt() * before / now * (z - a.sqrt() * entering) + (1 - a) / now * process.mean(codes, s)
        torch.testing.assert_close(process.posterior_mean(z, codes, t, s), mean, **TINY)
        torch.testing.assert_close(third, mean, **TINY)
        torch.testing.assert_close(paper, mean, rtol=1e-10, atol=1e-10)  # it divides by √a and then subtracts
        torch.testing.assert_close(chain.over(process.posterior_variance(t, s), codes), variance, **TINY)


@every_process
def test_a_full_noise_jump_is_the_posterior_over_any_gap(name: str, kind: str, n: int, layout: str) -> None:
    process = _process(name, kind, n, layout)
    (z, codes), chain = _data(process), Chain(process)
    for t, s in _clocks(process):
        mean, variance = chain.posterior(z, codes, t, s)
        now, kept = (process.mean(codes, s), process.epsilon(z, codes, t), s), process.log_noise_kept(t, s)
        still, moved = (process.jump(*now, kept, noise) for noise in (torch.zeros_like(z), torch.ones_like(z)))
        torch.testing.assert_close(still, mean, **TINY)
        torch.testing.assert_close(process.posterior_mean(z, codes, t, s), mean, **TINY)
        torch.testing.assert_close((moved - still).square(), variance, **TINY)


@every_process
def test_what_is_kept_of_the_noise_multiplies_over_steps(name: str, kind: str, n: int, layout: str) -> None:
    process = _process(name, kind, n, layout)
    for t, s in _clocks(process):
        between = (t + s) // 2
        steps = process.log_noise_kept(t, between) + process.log_noise_kept(between, s)
        torch.testing.assert_close(steps, process.log_noise_kept(t, s), **TINY)
        assert bool((steps <= 0).all())


@pytest.mark.parametrize("share", [None, 0.0, 0.2, 1.0, 3.0, math.inf])
@every_process
def test_a_jump_of_any_noise_keeps_the_marginal(name: str, kind: str, n: int, layout: str, share: float | None) -> None:
    """If z_t ~ q(z_t | X), then z_s ~ q(z_s | X): its mean is M_s, and the two noises add up to 1 − ᾱ_s."""
    process = _process(name, kind, n, layout)
    (z, codes), chain = _data(process), Chain(process)
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    for t, s in _clocks(process):
        mean = process.mean(codes, s)
        if share is None:
            kept, drawn, still = (process.jump(mean, epsilon, s) for epsilon in (one, zero, zero))
        else:
            log_kept = process.log_noise_kept(t, s) * share if share < math.inf else torch.full(s.shape, -math.inf)
            pairs = ((one, zero), (zero, one), (zero, zero))
            kept, drawn, still = (process.jump(mean, epsilon, s, log_kept, noise) for epsilon, noise in pairs)
        total = chain.over(chain.covariance[s, s], codes)
        torch.testing.assert_close((kept - mean).square() + (drawn - mean).square(), total, **TINY)
        torch.testing.assert_close(still, mean, **TINY)


@every_process
def test_a_jump_that_keeps_nothing_starts_afresh(name: str, kind: str, n: int, layout: str) -> None:
    process = _process(name, kind, n, layout)
    z, codes = _data(process)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
    for t, s in _clocks(process):
        nothing = torch.full(s.shape, -math.inf)
        jumped = process.jump(process.mean(codes, s), process.epsilon(z, codes, t), s, nothing, noise)
        torch.testing.assert_close(jumped, process.corrupt(codes, s, noise), **TINY)


def test_literal_retention_s_ancestral_jump_all_but_starts_afresh() -> None:
    """What sets literal retention apart from compensated is how much noise its ancestral jumps put in."""
    layout = _process("snr_matched", "literal", 5).layout
    literal, compensated = (
        DiffusionProcess.build(Retention.from_curve("cosine", 500, 5, kind), SNRMatched(), layout)
        for kind in ("literal", "compensated")
    )
    z, codes = _data(literal)
    t, s = torch.full((1, 5), 260), torch.full((1, 5), 240)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)

    def jumped(process: DiffusionProcess, log_kept: Tensor) -> Tensor:
        """In units of σ, in which the two conventions are one process."""
        return process.jump(process.mean(codes, s), z, s, log_kept, noise) / process.variance(s[0, 0]).sqrt()

    afresh = jumped(compensated, torch.full(s.shape, -math.inf))
    torch.testing.assert_close(jumped(literal, literal.log_noise_kept(t, s)), afresh, rtol=1e-5, atol=1e-5)
    assert (jumped(compensated, compensated.log_noise_kept(t, s)) - afresh).abs().max() > 0.1


@every_process
def test_the_mean_from_epsilon_agrees_with_the_mean_from_codes(name: str, kind: str, n: int, layout: str) -> None:
    process = _process(name, kind, n, layout)
    (z, codes), chain = _data(process), Chain(process)
    for t, s in _clocks(process):
        found = process.mean_from_epsilon(z, process.epsilon(z, codes, t), codes, t, s)
        # Its κ = √(ᾱ_s/ᾱ_t), large with literal retention, amplifies the rounding.
        kappa = chain.over(torch.exp(0.5 * (process.log_alpha_bar[s] - process.log_alpha_bar[t])), codes)
        assert ((found - process.mean(codes, s)).abs() <= 1e-14 * (100 + 10 * kappa)).all()


@every_process
def test_code_errors_reach_the_posterior_mean_through_their_gain(name: str, kind: str, n: int, layout: str) -> None:
    process = _process(name, kind, n, layout)
    (z, codes), (_, estimated), chain = _data(process), _data(process, seed=1), Chain(process)
    wrong = {modality: code - estimated[modality] for modality, code in codes.items()}
    for t, s in _clocks(process):
        difference = process.posterior_mean(z, codes, t, s) - process.posterior_mean(z, estimated, t, s)
        torch.testing.assert_close(chain.combine(process.code_error_gain(t, s), wrong), difference, **TINY)


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_presence_zero_is_a_process_without_the_modality(layout: str) -> None:
    three = _process("snr_matched", "compensated", 3, layout)
    z, codes = _data(three)
    there = [0, 2]
    names = [three.layout.names[i] for i in there]
    others = {name: codes[name] for name in names}
    space: Layout
    if layout == "shared":
        space = SharedLayout(tuple(names), three.layout.latent)
    else:
        space = OwnLayout({name: three.layout.share(name).channels for name in names}, 1, 3)
    two = DiffusionProcess(three.log_alpha_bar, three.signal_table[:, there], space)
    presence = torch.tensor([1.0, 0.0, 1.0]).expand(BATCH, -1)

    def of_two(z: Tensor) -> Tensor:
        return z if layout == "shared" else torch.cat([three.layout.take(name, z) for name in names], 1)

    for t, s in _clocks(three):
        t2, s2, z2 = t[:, there], s[:, there], of_two(z)
        epsilon = three.epsilon(z, codes, t, presence)
        same = [
            (three.signal(t, presence)[:, there], two.signal(t2)),
            (of_two(three.mean(codes, t, presence)), two.mean(others, t2)),
            (of_two(three.corrupt(codes, t, z, presence)), two.corrupt(others, t2, z2)),
            (of_two(epsilon), two.epsilon(z2, others, t2)),
            (of_two(three.posterior_mean(z, codes, t, s, presence)), two.posterior_mean(z2, others, t2, s2)),
            (three.code_error_gain(t, s, presence)[:, there], two.code_error_gain(t2, s2)),
            (
                of_two(three.mean_from_epsilon(z, epsilon, codes, t, s, presence)),
                two.mean_from_epsilon(z2, of_two(epsilon), others, t2, s2),
            ),
        ]
        for with_presence, without in same:
            torch.testing.assert_close(with_presence, without, **TINY)
        assert not three.signal(t, presence)[:, 1].any()
        assert not three.code_error_gain(t, s, presence)[:, 1].any()


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_samples_of_one_batch_may_have_different_modalities_and_clocks(layout: str) -> None:
    process = _process("linear", "literal", 2, layout)
    z, codes = _data(process)
    presence = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    t = torch.tensor([1, 6, 12, 3, 8])[:, None].expand(-1, 2)
    together = process.posterior_mean(z, codes, t, t - 1, presence)
    for i in range(BATCH):
        one = slice(i, i + 1)
        alone = {name: code[one] for name, code in codes.items()}
        found = process.posterior_mean(z[one], alone, t[one], t[one] - 1, presence[one])
        torch.testing.assert_close(together[one], found, **TINY)


def test_clocks_over_places_are_a_process_at_each_place() -> None:
    process = _process("linear", "literal", 2, "own")
    z, codes = _data(process)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1, STEPS + 1, (BATCH, 2, 1, 3), generator=generator)
    s = (t * torch.rand(t.shape, generator=generator)).long()

    def everything(t: Tensor, s: Tensor) -> list[Tensor]:
        epsilon = process.epsilon(z, codes, t)
        mean = process.mean(codes, s)
        return [
            mean,
            epsilon,
            process.corrupt(codes, t, z),
            process.posterior_mean(z, codes, t, s),
            process.mean_from_epsilon(z, epsilon, codes, t, s),
            process.jump(mean, epsilon, s, 0.7 * process.log_noise_kept(t, s), noise),
        ]

    over_places = everything(t, s)
    for place in range(3):
        for whole, found in zip(everything(t[..., 0, place], s[..., 0, place]), over_places, strict=True):
            torch.testing.assert_close(found[..., place], whole[..., place], **TINY)


def test_a_clock_at_0_is_the_code_itself_and_stays_finite() -> None:
    """No 0/0 where a modality is seen while others are noisy."""
    process = _process("snr_matched", "compensated", 2, "own")
    z, codes = _data(process)
    t, s = torch.tensor([[0, 7]]).expand(BATCH, -1), torch.tensor([[0, 3]]).expand(BATCH, -1)
    seen = process.layout.take("m0", process.corrupt(codes, t, z))
    torch.testing.assert_close(seen, codes["m0"], **TINY)  # w_0 = 1
    epsilon = process.epsilon(z, codes, t)
    assert not process.layout.take("m0", epsilon).any()
    mean, kept = process.mean(codes, s), process.log_noise_kept(t, s)
    for jumped in (process.jump(mean, epsilon, s), process.jump(mean, epsilon, s, kept, torch.ones_like(z))):
        torch.testing.assert_close(process.layout.take("m0", jumped), codes["m0"], **TINY)
        assert jumped.isfinite().all()
    assert process.posterior_mean(z, codes, t, s).isfinite().all()
    assert not process.posterior_variance(t, s)[:, 0].any()


@pytest.mark.parametrize("kind", ["compensated", "literal"])
def test_modalities_with_equal_signal_are_one_process_on_their_sum(kind: str) -> None:
    many = _process("snr_matched", kind, 4)
    single = DiffusionProcess(many.log_alpha_bar, many.signal_table[:, :1], SharedLayout(("sum",), many.layout.latent))
    z, codes = _data(many)
    total = {"sum": torch.stack(list(codes.values())).sum(0)}
    for t, s in _clocks(many):
        t1, s1 = t[:, :1], s[:, :1]
        torch.testing.assert_close(many.corrupt(codes, t, z), single.corrupt(total, t1, z), **TINY)
        found = many.posterior_mean(z, codes, t, s)
        torch.testing.assert_close(found, single.posterior_mean(z, total, t1, s1), **TINY)


def test_compensated_snr_matched_on_its_own_curve_is_variance_preserving() -> None:
    process = _process("snr_matched", "compensated", 3)
    total = process.signal_table.square() + process.variance(torch.arange(STEPS + 1))[:, None]
    torch.testing.assert_close(total, torch.ones_like(total), **TINY)
    torch.testing.assert_close(process.weight_table[1:], torch.zeros(STEPS, 3).double(), rtol=0, atol=1e-12)


def _levels(name: str, kind: str) -> Tensor:
    process = _process(name, kind, 2)
    t = torch.arange(STEPS + 1)[:, None].expand(-1, 2)
    return noise_level(process.signal(t), process.variance(t))


@pytest.mark.parametrize("name", ["constant", "linear", "snr_matched"])
def test_the_noise_level_is_0_at_data_and_tells_signal_to_noise(name: str) -> None:
    level = _levels(name, "compensated")
    assert not level[0].any()
    assert ((level >= 0) & (level <= 1)).all()
    process = _process(name, "compensated", 2)
    snr = process.snr(torch.arange(1, STEPS + 1)[:, None].expand(-1, 2))
    torch.testing.assert_close(torch.tan(level[1:] * torch.pi / 2) ** -2, snr, rtol=1e-9, atol=1e-9)


def test_the_noise_level_means_the_same_for_another_retention() -> None:
    compensated, literal, flow = (_levels("snr_matched", kind) for kind in KINDS)
    torch.testing.assert_close(compensated, literal, **TINY)
    torch.testing.assert_close(compensated, flow, **TINY)


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_means_keep_full_precision_under_autocast(layout: str) -> None:
    process = _process("snr_matched", "compensated", 3, layout)
    _, codes = _data(process)
    t = torch.ones(1, 3, dtype=torch.long)
    exact = process.mean(codes, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = process.mean({name: code.float() for name, code in codes.items()}, t)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)  # float32; bfloat16 would be 1e-2 off


class _Broken(WeightSchedule):
    def __init__(self, signal: Tensor) -> None:
        self.table = signal

    def signal(self, retention: Retention, modalities: int) -> Tensor:
        return self.table


@pytest.mark.parametrize("table", [torch.ones(STEPS, 2), torch.ones(STEPS + 1, 1), torch.ones(STEPS + 1, 2) / 0])
def test_a_schedule_with_a_wrong_table_is_refused_by_name(table: Tensor) -> None:
    layout = OwnLayout({"a": 1, "b": 1}, 1, 1)
    with pytest.raises(ValueError, match=r"_Broken.signal: expected finite values of shape \(13, 2\)"):
        DiffusionProcess.build(Retention.from_curve("cosine", STEPS, 2), _Broken(table), layout)


def test_a_noisy_jump_without_noise_is_refused_and_noise_without_a_share() -> None:
    process = _process("snr_matched", "compensated", 2)
    z, codes = _data(process)
    t = torch.full((1, 2), 5)
    for given in ({"log_kept": process.log_noise_kept(t, t - 1)}, {"noise": z}):
        with pytest.raises(ValueError, match="expected log_kept and noise, or neither"):
            process.jump(process.mean(codes, t - 1), z, t - 1, **given)


@pytest.mark.parametrize("layout", ["own", "shared"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_what_is_not_of_floating_point_is_refused_by_name(dtype: torch.dtype, layout: str) -> None:
    """In an integer, every coefficient would be 0."""
    process = _process("snr_matched", "compensated", 2, layout)
    z, codes = _data(process)
    t = torch.full((1, 2), 5)
    name = process.layout.names[1]
    with pytest.raises(ValueError, match=rf"codes\['{name}'\]: expected float16, .* or float64, found {dtype}"):
        process.corrupt({**codes, name: codes[name].to(dtype)}, t, z)
    with pytest.raises(ValueError, match=f"what is in the diffusion space: expected float16, .*, found {dtype}"):
        process.corrupt(codes, t, z.to(dtype))
