"""Samplers with optimal heads must return the true joint law, and the true conditional for every subset observed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any, Literal

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

import mtdiffusion.model
from mtdiffusion import (
    Backbone,
    Decoder,
    DiffusionProcess,
    DirectWeights,
    Encoder,
    Features,
    FeatureSpec,
    LatentSpec,
    Layout,
    MultimodalDiffusion,
    OwnLayout,
    Params,
    Prediction,
    Retention,
    SamplerSettings,
    SharedLayout,
    SNRMatched,
    WeightSchedule,
    read_out,
    sample,
)
from mtdiffusion.clocks import clock_path
from mtdiffusion.layout import noise_level
from mtdiffusion.model import standard_normal
from mtdiffusion.sampler import Step, ddim, dpmpp_2m
from tests.core.gaussians import (
    NOISE,
    JointGaussian,
    LinearEncoder,
    NoiseBasis,
    VectorModality,
    gaussian_model,
    sampling_errors,
)
from tests.core.toys import (
    CLASSES,
    CategoricalDecoder,
    CodebookEncoder,
    LabelModality,
    PictureModality,
    data,
    picture_and_label,
)

SOLVERS = ("ancestral", "ddim", "dpmpp_2m")
layouts = pytest.mark.parametrize("layout", ["own", "shared"])


# Jointly Gaussian modalities: the law of what is sampled is exact, see NoiseBasis -----------------------------------


@functools.cache  # what the oracle has worked out at a clock serves every solver
def _gaussians(
    layout: str, kind: str = "compensated", schedule: WeightSchedule | None = None
) -> tuple[MultimodalDiffusion, JointGaussian]:
    return gaussian_model(layout, retention=Retention.from_curve("cosine", 1000, 3, kind), schedule=schedule)


def _errors(
    monkeypatch: pytest.MonkeyPatch,
    model: MultimodalDiffusion,
    joint: JointGaussian,
    settings: SamplerSettings,
    subsets: list[tuple[str, ...]] | None = None,
) -> tuple[float, float]:
    """Worst errors of the mean and of the covariance over observed subsets (default: all)."""
    errors = sampling_errors(monkeypatch, model, joint, settings, subsets).values()
    return max(mean for mean, _ in errors), max(covariance for _, covariance in errors)


@layouts
@pytest.mark.parametrize(
    # The mean is exact up to the signal left at t = T (1e-4 here). The covariance error is the discretisation's;
    # measured, of the two layouts the harder one: 10.3, 23.2, 8.9, 20.8, 3.0, 12.2, 1.9, 5.7,
    # 4.2, 11.7, 9.7 and 22.6 %.
    ("solver", "eta", "steps", "covariance_error"),
    [
        ("ancestral", 1.0, 50, 0.12),
        ("ancestral", 1.0, 20, 0.25),
        ("ddim", 0.0, 50, 0.10),
        ("ddim", 0.0, 20, 0.23),
        ("dpmpp_2m", 0.0, 50, 0.04),
        ("dpmpp_2m", 0.0, 20, 0.14),
        ("dpmpp_2m", 1.0, 50, 0.022),
        ("dpmpp_2m", 1.0, 20, 0.065),
        ("dpmpp_2m", 1.4, 50, 0.05),
        ("dpmpp_2m", 1.4, 20, 0.13),
        ("dpmpp_2m", 2.0, 50, 0.11),
        ("dpmpp_2m", 2.0, 20, 0.25),
    ],
)
def test_every_conditional_is_sampled(
    monkeypatch: pytest.MonkeyPatch, layout: str, solver: str, eta: float, steps: int, covariance_error: float
) -> None:
    settings = SamplerSettings(steps, solver, eta)  # type: ignore[arg-type]
    mean, covariance = _errors(monkeypatch, *_gaussians(layout), settings)
    assert mean < 1e-3
    assert covariance < covariance_error


@layouts
def test_many_steps_of_either_solver_reach_the_true_law(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    model, joint = _gaussians(layout)
    for solver, bound in (("ddim", 0.015), ("dpmpp_2m", 0.0015)):  # measured 1.2 % and 0.1 % at worst
        settings = SamplerSettings(400, solver, NOISE[solver])  # type: ignore[arg-type]
        mean, covariance = _errors(monkeypatch, model, joint, settings, [(), ("depth",)])
        assert mean < 1e-3
        assert covariance < bound


def test_many_ancestral_steps_reach_the_true_law(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SamplerSettings(200, "ancestral")
    mean, covariance = _errors(monkeypatch, *_gaussians("own"), settings, [("depth",)])
    assert mean < 1e-3
    assert covariance < 0.03  # 8.5 % at 50 steps, 1.2 % at 400


class _CurveEach(WeightSchedule):
    """Another curve for each modality: one turns to noise sooner than another."""

    def signal(self, retention: Retention, modalities: int) -> Tensor:
        each = (SNRMatched("cosine"), SNRMatched("linear", (2.0,)), SNRMatched("rectified_flow", (0.7,)))
        return torch.cat([schedule.signal(retention, 1) for schedule in each[:modalities]], 1)


@pytest.mark.parametrize("kind", ["compensated", "literal", "rectified_flow"])
@pytest.mark.parametrize("schedule", [_CurveEach(), SNRMatched("rectified_flow")], ids=["curve_each", "flow"])
@pytest.mark.parametrize(("solver", "covariance_error"), [("ddim", 0.13), ("dpmpp_2m", 0.07)])
def test_every_conditional_is_sampled_for_other_schedules(
    monkeypatch: pytest.MonkeyPatch, solver: str, covariance_error: float, schedule: WeightSchedule, kind: str
) -> None:
    settings = SamplerSettings(50, solver, NOISE[solver])  # type: ignore[arg-type]
    mean, covariance = _errors(monkeypatch, *_gaussians("own", kind, schedule), settings)
    assert mean < 0.01  # curves other than cosine leave up to 6e-3 of a standard deviation of signal at t = T
    assert covariance < covariance_error


def test_ddim_is_of_first_order_and_dpmpp_2m_of_second(monkeypatch: pytest.MonkeyPatch) -> None:
    model, joint = _gaussians("own")
    errors = {
        (solver, steps): _errors(monkeypatch, model, joint, SamplerSettings(steps, solver, NOISE[solver]), [()])[1]  # type: ignore[arg-type]
        for solver in ("ddim", "dpmpp_2m")
        for steps in (50, 200)
    }
    assert errors["ddim", 50] / errors["ddim", 200] == pytest.approx(4, rel=0.25)
    assert errors["dpmpp_2m", 50] / errors["dpmpp_2m", 200] == pytest.approx(16, rel=0.35)


@pytest.mark.parametrize("solver", SOLVERS)
@layouts
def test_replacement_is_biased_however_many_the_steps(
    monkeypatch: pytest.MonkeyPatch, layout: str, solver: str
) -> None:
    """With perfect heads: early steps decide before z_t shows what is known (docs/mathematics.md, section 5)."""
    model, joint = _gaussians(layout)
    subsets = [("pose",), ("depth", "sound")]
    right = SamplerSettings(60, solver, NOISE[solver])  # type: ignore[arg-type]
    _, discretisation = _errors(monkeypatch, model, joint, right, subsets)
    for steps in (20, 60):
        biased = SamplerSettings(steps, solver, NOISE[solver], conditioning="replacement")  # type: ignore[arg-type]
        mean, covariance = _errors(monkeypatch, model, joint, biased, subsets)
        assert mean > 0.2  # standard deviations; below 1e-3 where the network is shown what is observed
    assert covariance > 0.14  # measured 0.24, 0.48, 0.52 (own) and 0.18, 0.14, 0.14 (shared)
    assert covariance > 2 * discretisation


@pytest.mark.parametrize("path", [{}, {"depth": 0.3, "sound": 0.6}])
def test_retention_does_not_matter_without_noise_at_matched_snr(path: dict[str, float]) -> None:
    """Only m/σ enters (docs/mathematics.md, section 2), but for the σ_T of the first z: 1 − 1e-9 or 1."""
    out = []
    for kind in ("compensated", "literal", "rectified_flow"):
        model, _ = gaussian_model(retention=Retention.from_curve("cosine", 1000, 3, kind))
        settings = SamplerSettings(30, "dpmpp_2m", 0.0, path=path)
        out.append(sample(model, 20, settings=settings, generator=torch.Generator().manual_seed(0)))
    for name in out[0]:
        torch.testing.assert_close(out[1][name], out[0][name], rtol=0, atol=1e-5)
        torch.testing.assert_close(out[2][name], out[0][name], rtol=0, atol=1e-2)  # its σ_T is 0.999: 1e-3 of z_T


def test_drawn_samples_have_the_true_law() -> None:
    """The same through real noise, all of it: the solver's and the heads' own draws. 8,000 samples."""
    model, joint = gaussian_model("own")
    given = {"depth": torch.tensor([0.8]).double()}
    out = sample(
        model,
        8000,
        observed={name: x.expand(8000, -1) for name, x in given.items()},
        settings=SamplerSettings(25, "dpmpp_2m", 1.0, draw=True),
        generator=torch.Generator().manual_seed(0),
    )
    drawn = torch.cat([out["pose"], out["sound"]], 1)
    mean, covariance = joint.conditional(given)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=5 / 8000**0.5)
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0, atol=5 * 2**0.5 / 8000**0.5 + 0.02)


def test_what_is_not_wanted_is_not_returned_and_the_rest_is_its_marginal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, joint = gaussian_model("own")
    settings = SamplerSettings(50, "dpmpp_2m", 1.0)
    basis = NoiseBasis.of(monkeypatch, model, settings)
    out = sample(model, basis.batch, generate=["sound", "pose"], settings=settings)
    assert list(out) == ["pose", "sound"]
    mean, covariance = basis.law(torch.cat([out["pose"], out["sound"]], 1))
    at = joint.index(["pose", "sound"])
    torch.testing.assert_close(mean, joint.mean[at], rtol=0, atol=1e-3)
    torch.testing.assert_close(covariance, joint.covariance[at][:, at], rtol=0, atol=0.02)


# A mixture of Gaussians and its label -------------------------------------------------------------------------------


class _Mixture(Backbone):
    """The exact posterior of (point, label) given each one's z at its clock; features are log p(k | .) and E[x | .]."""

    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    centres = torch.tensor([[1.2, 0.0], [-0.8, 1.0], [-0.6, -1.2]], dtype=torch.float64)
    spread = torch.tensor([0.5, 0.6, 0.4], dtype=torch.float64)  # standard deviation of each component

    def __init__(self, process: DiffusionProcess, codes: Tensor) -> None:
        super().__init__()
        self.process, self.codes = process, codes
        every = torch.arange(process.steps + 1)
        self.levels = noise_level(process.signal_table, process.variance(every)[:, None])
        self.features = FeatureSpec(1, 1, 2, CLASSES + 2)

    def posterior_of_label(self, x: Tensor) -> Tensor:
        """log p(k | x) ``[B, K]``."""
        distance = (x[:, None] - self.centres).square().sum(2)
        return (self.prior.log() - 2 * self.spread.log() - 0.5 * distance / self.spread**2).log_softmax(1)

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        told = vector[:, 32:34]  # the mean levels of point and label
        assert bool((told == told[0]).all())
        t = (self.levels - told[0]).abs().argmin(0)
        m, variance = self.process.signal(t[None])[0], self.process.variance(t)
        point, label = (z[:, :2].flatten(2) * (m**2 + variance).sqrt()[:, None]).unbind(1)
        # What the point's channel says of the label, and of the point for each label; the point itself at clock 0.
        total = m[0] ** 2 * self.spread**2 + variance[0]
        distance = (point[:, None] - m[0] * self.centres).square().sum(2)
        from_point = self.prior.log() - total.log() - 0.5 * distance / total
        gain = m[0] * self.spread**2 / total
        mean = self.centres + gain[:, None] * (point[:, None] - m[0] * self.centres)
        # What the label's channel says.
        distance = (label[:, None] - m[1] * self.codes.flatten(1)).square().sum(2)
        from_label = -0.5 * distance / variance[1].clamp(min=1e-6)
        logits = (from_point + from_label).log_softmax(1)
        mean = torch.einsum("bk,bkd->bd", logits.exp(), mean)
        return Features(z.new_zeros(len(z), 1, 1, 2), torch.cat([logits, mean], 1))


class _PointDecoder(Decoder):
    dims = 2

    def forward(self, features: Features) -> Params:
        return {"mean": features.vector[:, CLASSES:]}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        raise NotImplementedError

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(params["mean"])

    def mode(self, params: Params) -> Tensor:
        return params["mean"]

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError


@pytest.fixture(scope="module")
def mixture() -> MultimodalDiffusion:
    layout = OwnLayout({"point": 1, "label": 1}, 1, 2)
    process = DiffusionProcess.build(Retention.from_curve("cosine", 1000, 2), SNRMatched(), layout)
    codes = torch.tensor([[1.4, 0.0], [-0.7, 1.2], [-0.7, -1.2]]).double().reshape(CLASSES, 1, 1, 2)
    encoder = LinearEncoder(layout.share("point"), torch.eye(2).double())
    modalities = {
        "point": VectorModality(encoder, _PointDecoder(), 2),
        "label": LabelModality(CodebookEncoder(layout.share("label"), codes), CategoricalDecoder(0, CLASSES), 1),
    }
    return MultimodalDiffusion(modalities, _Mixture(process, codes), process).double()


MANY = 4000  # a share is known to 0.008, a mean to 0.016 σ, a variance to 2.2 %
solvers = pytest.mark.parametrize(("solver", "steps"), [("ancestral", 200), ("ddim", 200), ("dpmpp_2m", 60)])


@solvers
def test_a_label_given_a_point_has_the_exact_posterior(mixture: MultimodalDiffusion, solver: str, steps: int) -> None:
    point = torch.tensor([[0.1, 0.3]], dtype=torch.float64)
    settings = SamplerSettings(steps, solver, NOISE[solver])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    out = sample(mixture, MANY, observed={"point": point.expand(MANY, -1)}, settings=settings, generator=generator)
    truth = mixture.backbone.posterior_of_label(point)[0].exp()  # type: ignore[operator]
    assert truth.max() < 0.7  # a point that two labels share
    share = torch.bincount(out["label"], minlength=CLASSES) / MANY
    torch.testing.assert_close(share.double(), truth, rtol=0, atol=0.04)


@solvers
@pytest.mark.parametrize("label", range(CLASSES))
def test_a_point_given_a_label_has_that_component_s_law(
    mixture: MultimodalDiffusion, solver: str, steps: int, label: int
) -> None:
    settings = SamplerSettings(steps, solver, NOISE[solver])  # type: ignore[arg-type]
    given = {"label": torch.full((MANY,), label)}
    out = sample(mixture, MANY, observed=given, settings=settings, generator=torch.Generator().manual_seed(label))
    assert torch.equal(out["label"], given["label"])
    deviation = _Mixture.spread[label].item()
    torch.testing.assert_close(out["point"].mean(0), _Mixture.centres[label], rtol=0, atol=5 * deviation / MANY**0.5)
    found = out["point"].T.cov() / deviation**2
    torch.testing.assert_close(found, torch.eye(2).double(), rtol=0, atol=0.11 + 0.03)  # 5 standard errors, and steps


@pytest.mark.parametrize(
    ("solver", "steps", "path"),
    [
        ("ancestral", 200, {}),
        ("ancestral", 200, {"label": 1.0}),
        ("ddim", 200, {}),
        ("dpmpp_2m", 60, {}),
        ("dpmpp_2m", 60, {"label": 1.0}),
        ("dpmpp_2m", 60, {"point": 0.5}),
    ],
)
def test_points_and_labels_sampled_together_belong_together(
    mixture: MultimodalDiffusion, solver: str, steps: int, path: dict[str, float]
) -> None:
    settings = SamplerSettings(steps, solver, NOISE[solver], path=path)  # type: ignore[arg-type]
    out = sample(mixture, MANY, settings=settings, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(out["label"], minlength=CLASSES) / MANY
    torch.testing.assert_close(share.double(), _Mixture.prior, rtol=0, atol=0.04)
    for k in range(CLASSES):
        points, deviation = out["point"][out["label"] == k], _Mixture.spread[k].item()
        torch.testing.assert_close(points.mean(0), _Mixture.centres[k], rtol=0, atol=5 * deviation / len(points) ** 0.5)
        assert points.var(0).mean().sqrt().item() == pytest.approx(deviation, rel=0.1)


# One modality, against diffusers, and solvers by themselves ---------------------------------------------------------

Predict = Callable[[Tensor, Tensor], Prediction]


def _solve(step: Step, predict: Predict, z: Tensor, path: Tensor) -> Tensor:
    """z at the end of a path ``[K + 1, N]``."""
    for t, s in zip(path[:-1, None, :, None, None], path[1:, None, :, None, None], strict=True):
        z = step(z, predict(z, t), t, s)
    return z


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_one_modality_is_sampled_like_diffusers_dpm_solver(beta_schedule: str, steps: int, algorithm: str) -> None:
    """η = 0 is the solver of the differential equation, η = 1 that of the stochastic one with the same noise."""
    oracle = DPMSolverMultistepScheduler(
        1000, beta_schedule=beta_schedule, prediction_type="sample", algorithm_type=algorithm
    )
    oracle.set_timesteps(steps)
    assert (oracle.config.algorithm_type, oracle.config.solver_order) == (algorithm, 2)
    layout = OwnLayout({"x": 2}, 3, 3)
    process = DiffusionProcess.build(Retention.from_alphas(oracle.alphas), DirectWeights(), layout)
    visited: list[Tensor] = []

    def head(z: Tensor) -> Tensor:  # no network, but as far from linear
        return torch.tanh(2 * z) + 0.3 * torch.sin(3 * z)

    def predict(z: Tensor, t: Tensor) -> Prediction:
        visited.append(z)
        codes = {"x": head(z)}
        return Prediction({}, codes, process.epsilon(z, codes, t))

    start = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = torch.tensor([t + 1 for t in oracle.timesteps.tolist()] + [0])[:, None]
    eta, generator = float(algorithm.startswith("sde")), torch.Generator().manual_seed(1)
    last = _solve(dpmpp_2m(process, eta, generator=generator), predict, start, path)
    z = start
    generator = torch.Generator().manual_seed(1)
    for found, timestep in zip(visited, oracle.timesteps, strict=True):
        torch.testing.assert_close(found, z, rtol=0, atol=2e-4)  # they step in float32
        noise = standard_normal(z, generator) if eta else None
        z = oracle.step(head(z), timestep, z, variance_noise=noise).prev_sample
    torch.testing.assert_close(last, z, rtol=0, atol=2e-4)


def test_modalities_with_equal_signal_are_solved_as_one_on_their_sum() -> None:
    retention = Retention.from_curve("cosine", 100)
    start = torch.randn(3, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent = LatentSpec(1, 1, 2)

    def run(shares: dict[str, float]) -> Tensor:
        process = DiffusionProcess.build(retention, SNRMatched(), SharedLayout(tuple(shares), latent))

        def predict(z: Tensor, t: Tensor) -> Prediction:
            codes = {name: share * torch.tanh(2 * z) for name, share in shares.items()}
            return Prediction({}, codes, process.epsilon(z, codes, t))

        path = clock_path(torch.zeros(len(shares)), 12, 100)
        return torch.stack([_solve(step, predict, start, path) for step in (ddim(process), dpmpp_2m(process))])

    torch.testing.assert_close(run({"a": 0.2, "b": 0.5, "c": 0.3}), run({"sum": 1.0}), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", [(0.0, 0.0), (0.3, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_modalities_that_tell_nothing_of_each_other_are_solved_each_by_itself(
    solver: str, path: tuple[float, float]
) -> None:
    """Whatever the other's clock does meanwhile."""
    retention = Retention.from_curve("cosine", 100)
    steps: dict[str, Callable[[DiffusionProcess], Step]] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}
    start = torch.randn(3, 2, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heads = {"a": lambda z: torch.tanh(2 * z), "b": lambda z: torch.sin(z) - 0.3}
    clocks = clock_path(torch.tensor(path, dtype=torch.float64), 24, 100)

    def run(names: str, z: Tensor, clocks: Tensor) -> Tensor:
        layout = OwnLayout(dict.fromkeys(names, 1), 1, 2)
        process = DiffusionProcess.build(retention, SNRMatched(), layout)
        step = steps[solver](process)

        def moving(z: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
            return torch.where(layout.spread(s < t), step(z, prediction, t, s), z)

        def predict(z: Tensor, t: Tensor) -> Prediction:
            codes = {name: heads[name](layout.take(name, z)) for name in names}
            return Prediction({}, codes, process.epsilon(z, codes, t))

        return _solve(moving, predict, z, clocks)

    both = run("ab", start, clocks)
    for i, name in enumerate("ab"):
        own = torch.unique_consecutive(clocks[:, i])[:, None]
        torch.testing.assert_close(both[:, i : i + 1], run(name, start[:, i : i + 1], own), rtol=1e-10, atol=1e-10)


@layouts
def test_an_exact_epsilon_head_samples_what_exact_codes_do(layout: str) -> None:
    space: Layout = OwnLayout({"a": 1, "b": 1}, 1, 2)
    if layout == "shared":
        space = SharedLayout(("a", "b"), LatentSpec(1, 1, 2))
    process = DiffusionProcess.build(Retention.from_curve("cosine", 50, 2), DirectWeights(start=-0.01), space)
    start = torch.randn(3, *space.latent.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def predict(z: Tensor, t: Tensor) -> Prediction:
        codes = {"a": torch.tanh(space.take("a", z)), "b": 0.5 - space.take("b", z)}
        return Prediction({}, codes, process.epsilon(z, codes, t))

    ahead = torch.zeros(2) if layout == "shared" else torch.tensor([0.0, 0.05])  # its jumps grow with κ
    path = clock_path(ahead, 10, 50)
    for eta in (0.0, 1.0):
        derived, head = (
            _solve(
                ddim(process, eta, epsilon_head=epsilon_head, generator=torch.Generator().manual_seed(1)),
                predict,
                start,
                path,
            )
            for epsilon_head in (False, True)
        )
        torch.testing.assert_close(derived, head, rtol=1e-8, atol=1e-8)


@layouts
def test_jumps_too_long_for_an_epsilon_head_are_refused(layout: str) -> None:
    literal = Retention.from_curve("cosine", 400, 2, "literal")
    model, x = picture_and_label(layout, epsilon_head=True, retention=literal), data(1)
    message = r"longest of 5 steps would multiply errors by .* more steps \(up to T = 400\)"
    for solver in ("ancestral", "ddim"):
        with pytest.raises(ValueError, match=message):
            sample(model, 1, observed={"label": x["label"]}, settings=SamplerSettings(5, solver, NOISE[solver]))  # type: ignore[arg-type]
    assert sample(model, 1, settings=SamplerSettings(5, "dpmpp_2m"))["picture"].isfinite().all()


def test_jumps_of_an_epsilon_head_are_shorter_where_more_is_rounded_off() -> None:
    """Of 8 bits, 64 times as much as is rounded off of a number is a quarter of it."""
    model, settings = picture_and_label(epsilon_head=True, steps=1000), SamplerSettings(100, "ddim")
    assert sample(model, 1, settings=settings)["picture"].isfinite().all()
    with pytest.raises(ValueError, match=r"longest of 100 steps .* expected at most 64 in bfloat16"):
        sample(model.bfloat16(), 1, settings=settings)


@layouts
@pytest.mark.parametrize("given", [("pose",), ("depth", "sound")])
def test_a_read_out_is_the_conditional_law_given_what_is_observed(layout: str, given: tuple[str, ...]) -> None:
    model, joint = gaussian_model(layout)
    x = {name: values for name, values in joint.draw(3).items() if name in given}
    params = read_out(model, model.observe(x, model.visibility(3, x)))
    rest = [name for name in joint.dims if name not in given]
    for row in range(3):
        mean, covariance = joint.conditional({name: values[row] for name, values in x.items()})
        found = torch.cat([params[name]["mean"][row] for name in rest])
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-3)
        width = joint.dims[rest[0]]
        tril = params[rest[0]]["tril"][row]
        torch.testing.assert_close(tril @ tril.T, covariance[:width, :width], rtol=0, atol=1e-3)


# Guidance -----------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_on_logits_is_a_power_of_bayes_rule(
    monkeypatch: pytest.MonkeyPatch, layout: str, guidance: float
) -> None:
    """p ∝ p(k | z) · (p(k | z, seen) / p(k | z))^g, for a network's own p."""
    model, x = picture_and_label(layout), data(5)
    decoder = model.modality("label").decoder
    monkeypatch.setattr(decoder, "mode", lambda params: params["logits"])
    settings = SamplerSettings(1, "dpmpp_2m", guidance=guidance)
    given = {"picture": x["picture"]}
    found = sample(model, 5, observed=given, settings=settings, generator=torch.Generator().manual_seed(0))["label"]
    z = model.noise(5, torch.Generator().manual_seed(0))
    t = torch.full((1, 2, 1, 1), model.process.steps)
    seen = model.observe(given, model.visibility(5, given))
    with torch.no_grad():
        blind = model(z, t).params["label"]["logits"].softmax(1)
        shown = model.layout.place(z, seen, model.process.signal(torch.zeros_like(t)))
        heads = model(shown, model.layout.clocks(t, seen.seen), seen)
        conditional = heads.params["label"]["logits"].softmax(1)
    assert not torch.allclose(conditional, blind, atol=1e-3)
    expected = blind * (conditional / blind) ** guidance
    torch.testing.assert_close(found.softmax(1), expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("interval", "guided"), [((0.0, 1.0), [1] * 5), ((0.2, 0.6), [0, 0, 1, 1, 0]), ((0.5, 1.0), [1, 1, 1, 0, 0])]
)
def test_outside_its_interval_guidance_is_none_and_costs_nothing(
    interval: tuple[float, float], guided: list[int]
) -> None:
    model, x = picture_and_label(), data(2)
    calls: list[int] = []
    hook = model.backbone.register_forward_hook(lambda _module, inputs, _out: calls.append(len(inputs[0])))

    def drawn(settings: SamplerSettings) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return sample(model, 2, observed={"label": x["label"]}, settings=settings, generator=generator)["picture"]

    found = drawn(SamplerSettings(5, guidance=3.0, guidance_interval=interval))
    assert calls == [2 + 2 * each for each in guided]
    hook.remove()
    everywhere, nowhere = drawn(SamplerSettings(5, guidance=3.0)), drawn(SamplerSettings(5))
    assert torch.equal(found, everywhere) == all(guided)
    assert not torch.equal(found, nowhere)


@pytest.mark.parametrize("how", [{}, {"guidance": 2.0}, {"conditioning": "replacement"}])
def test_in_bfloat16_the_network_alone_is_rounded(how: dict[str, Any]) -> None:
    model, x = picture_and_label(), data(2)
    seen: list[tuple[bool, torch.dtype]] = []
    model.backbone.register_forward_hook(
        lambda _module, inputs, _out: seen.append((torch.is_autocast_enabled("cpu"), inputs[1].dtype))
    )

    def drawn(precision: Literal["float32", "bfloat16"]) -> Tensor:
        settings, generator = SamplerSettings(6, precision=precision, **how), torch.Generator().manual_seed(0)
        return sample(model, 2, observed={"label": x["label"]}, settings=settings, generator=generator)["picture"]

    exact, rounded = drawn("float32"), drawn("bfloat16")
    assert [rounds for rounds, _ in seen] == [False] * 6 + [True] * 6
    assert {dtype for _, dtype in seen} == {torch.float32}  # the clocks it is told
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("in_part", [False, True])
@pytest.mark.parametrize("path", [{}, {"picture": 0.5}, {"label": 0.5}])
@pytest.mark.parametrize("show_clean", [False, True])
def test_unconditionally_what_is_observed_is_as_noisy_as_the_path_has_it(
    show_clean: bool, path: dict[str, float], in_part: bool
) -> None:
    model, x = picture_and_label(show_clean=show_clean), data(3)
    shown: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    visible = torch.ones(3, 8, 8)
    visible[:, :, 4:] = 0
    settings = SamplerSettings(6, "ddim", guidance=2.0, path=path)
    sample(
        model,
        3,
        observed={"picture": x["picture"]},
        visible={"picture": visible} if in_part else None,
        settings=settings,
        generator=torch.Generator().manual_seed(0),
    )
    code, process = model.encode(x)["picture"], model.process
    noise = model.noise(3, torch.Generator().manual_seed(0))
    level = noise_level(process.signal_table[:, 0], process.variance(torch.arange(21))).float()
    assert len(shown) == 6
    clocks = []
    for both in shown:
        seen, unseen = both.chunk(2)
        assert torch.equal(seen[:, :4, :, :2], code[:, :, :, :2])
        assert not seen[:, -2, :, :2].any()
        t = int((level - unseen[0, -2, 0, 0]).abs().argmin())
        clocks.append(t)
        torch.testing.assert_close(unseen[:, -2], level[t].expand(3, 4, 4))
        z = process.signal_table[t, 0] * code + process.variance(torch.tensor(t)).sqrt() * noise[:, :4]
        expected = torch.zeros_like(code) if t == 20 else z.float()
        torch.testing.assert_close(unseen[:, :4, :, :2], expected[:, :, :, :2])
        torch.testing.assert_close(seen[:, 4], unseen[:, 4])  # what is not observed is the same in both
        if show_clean:
            assert torch.equal(seen[:, 5:9, :, :2], code[:, :, :, :2])
            assert bool(unseen[:, 5:9].any()) == (t == 0)
    assert clocks == sorted(clocks, reverse=True)
    if not path:
        assert clocks == [20, 17, 13, 10, 7, 3]
    if path == {"picture": 0.5} and not in_part:
        assert clocks == [10, 7, 3, 0, 0, 0]  # no step is spent before the label moves


def test_unconditionally_a_shared_layout_shows_no_aggregate() -> None:
    model, x = picture_and_label("shared"), data(3)
    shown: list[tuple[Tensor, ...]] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: shown.append(inputs))
    sample(model, 3, observed={"label": x["label"]}, settings=SamplerSettings(3, guidance=2.0))
    for z, _, vector in shown:
        torch.testing.assert_close(z[:3, :4], z[3:, :4])
        torch.testing.assert_close(z[:3, 4:8], model.encode(x)["label"])
        assert not z[3:, 4:].any()
        assert vector[:, :2].tolist() == [[0, 1]] * 3 + [[0, 0]] * 3


@layouts
def test_guidance_extrapolates_an_epsilon_head_too(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    model, x = picture_and_label(layout, epsilon_head=True), data(5)
    assert model.epsilon_head is not None
    torch.nn.init.normal_(model.epsilon_head.weight, generator=torch.Generator().manual_seed(0))
    said: list[Tensor] = []
    gone_by: list[Tensor] = []
    model.epsilon_head.register_forward_hook(lambda _module, _inputs, out: said.append(out))
    complete = model.complete

    def note(*given: Any) -> Prediction:
        gone_by.append(given[0].epsilon)
        return complete(*given)

    monkeypatch.setattr(model, "complete", note)
    sample(model, 5, observed={"label": x["label"]}, settings=SamplerSettings(1, "ddim", guidance=3.0))
    conditional, blind = said[0].chunk(2)
    assert not torch.allclose(conditional, blind)
    torch.testing.assert_close(gone_by[0], blind + 3 * (conditional - blind))


def test_nothing_is_guided_where_nothing_is_observed() -> None:
    model = picture_and_label()
    guided, plain = (
        sample(model, 3, settings=SamplerSettings(4, guidance=g), generator=torch.Generator().manual_seed(0))
        for g in (3.0, 1.0)
    )
    assert torch.equal(guided["picture"], plain["picture"])


# Requests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("epsilon_head", [False, True])
def test_the_same_seed_gives_the_same_sample_and_another_seed_another(
    solver: str, draw: bool, epsilon_head: bool
) -> None:
    model = picture_and_label(epsilon_head=epsilon_head)
    settings = SamplerSettings(5, solver, NOISE[solver], draw=draw, path={"label": 0.5})  # type: ignore[arg-type]
    first, again, other = (
        sample(model, 3, settings=settings, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    for name in first:
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["picture"], other["picture"])


def test_global_randomness_is_left_alone_when_a_generator_is_given() -> None:
    model, before = picture_and_label(), torch.get_rng_state()
    sample(model, 3, settings=SamplerSettings(5, "ancestral", draw=True), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("conditioning", ["observed", "replacement"])
@layouts
@pytest.mark.parametrize("solver", SOLVERS)
def test_pixels_that_are_seen_are_kept_and_hidden_ones_do_not_matter(
    layout: str, solver: str, conditioning: str
) -> None:
    model, x = picture_and_label(layout), data(4)
    visible = torch.ones(4, 8, 8)
    visible[:, 2:7, 1:5] = 0  # not along the latent's 2×2 places
    hidden = (visible == 0)[:, None]
    settings = SamplerSettings(5, solver, NOISE[solver], conditioning=conditioning)  # type: ignore[arg-type]
    out = [
        sample(
            model,
            4,
            observed={"picture": picture},
            visible={"picture": visible},
            settings=settings,
            generator=torch.Generator().manual_seed(0),
        )
        for picture in (x["picture"], x["picture"].where(~hidden, torch.tensor(7.0)))
    ]
    assert torch.equal(out[0]["picture"][~hidden], x["picture"][~hidden])
    assert not torch.isclose(out[0]["picture"][hidden], x["picture"][hidden]).any()
    for name in out[0]:
        assert torch.equal(out[0][name], out[1][name])


def test_what_is_put_together_of_seen_and_filled_in_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = picture_and_label(), data(4)
    visible = torch.ones(4, 8, 8)
    visible[:, :4] = 0
    ask: dict[str, Any] = {"observed": {"picture": x["picture"]}, "settings": SamplerSettings(5)}

    def drawn() -> Tensor:
        return sample(model, 4, visible={"picture": visible}, generator=torch.Generator().manual_seed(0), **ask)[
            "picture"
        ]

    def unit(self: PictureModality, x: Tensor, visible: Tensor) -> Tensor:
        assert torch.equal(visible, where)
        return x / x.flatten(1).norm(dim=1)[:, None, None, None]

    where, plain = visible, drawn()
    monkeypatch.setattr(PictureModality, "mend", unit)
    torch.testing.assert_close(drawn(), plain / plain.flatten(1).norm(dim=1)[:, None, None, None])
    whole = sample(model, 4, **ask)["picture"]  # what is given whole is nobody's to mend
    assert torch.equal(whole, x["picture"])


@pytest.mark.parametrize("epsilon_head", [False, True])
@pytest.mark.parametrize("path", [{}, {"picture": 0.5}, {"label": 0.5}])
@pytest.mark.parametrize("solver", SOLVERS)
def test_places_that_are_seen_are_the_clean_code_at_every_step(
    solver: str, path: dict[str, float], epsilon_head: bool
) -> None:
    model, x = picture_and_label(epsilon_head=epsilon_head), data(2)
    generator = torch.Generator().manual_seed(0)
    if model.epsilon_head is not None:
        torch.nn.init.normal_(model.epsilon_head.weight, generator=generator)
    shown: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    visible = torch.ones(2, 8, 8)
    visible[0, :4] = 0
    visible[1, :, 6:] = 0
    given = {"picture": x["picture"]}
    settings = SamplerSettings(6, solver, NOISE[solver], path=path)  # type: ignore[arg-type]
    sample(model, 2, observed=given, visible={"picture": visible}, settings=settings, generator=generator)
    code = model.encode(x)["picture"]
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    seen[0, 0, :2] = False
    seen[1, 0, :, 3:] = False
    assert len(shown) == 6
    for z in shown:
        picture, level = z[:, :4], z[:, 5:6]
        assert torch.equal(picture[seen.expand_as(picture)], code[seen.expand_as(code)])
        assert not level[seen].any()
    # All else moves when its clock does, and only then.
    unseen = [(z[:, :4][~seen.expand(-1, 4, -1, -1)], z[:, 5:6][~seen]) for z in shown]
    for (before, level_before), (after, level_after) in pairwise(unseen):
        assert torch.equal(before, after) == torch.equal(level_before, level_after)
    assert not torch.equal(unseen[0][1], unseen[-1][1])


@pytest.mark.parametrize("in_part", [False, True])
@layouts
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_what_else_is_in_its_batch(
    monkeypatch: pytest.MonkeyPatch, solver: str, layout: str, in_part: bool
) -> None:
    model, x = picture_and_label(layout), data(3)
    visible = torch.ones(3, 8, 8)
    visible[0, :, :4] = 0
    visible[1] = 0  # nothing of it is seen; of sample 2, all

    def run(rows: slice) -> dict[str, Tensor]:
        drawn = 0

        def noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
            nonlocal drawn
            drawn += 1
            return torch.randn(3, *like.shape[1:], generator=torch.Generator().manual_seed(drawn))[rows]

        for module in (mtdiffusion.model, mtdiffusion.sampler):
            monkeypatch.setattr(module, "standard_normal", noise)
        settings = SamplerSettings(5, solver, NOISE[solver], guidance=1.5)  # type: ignore[arg-type]
        return sample(
            model,
            len(range(3)[rows]),
            observed={"picture": x["picture"][rows]},
            visible={"picture": visible[rows]} if in_part else None,
            settings=settings,
        )

    together = run(slice(0, 3))
    for i in range(3):
        alone = run(slice(i, i + 1))
        for name, value in alone.items():
            torch.testing.assert_close(together[name][i : i + 1], value, rtol=1e-4, atol=1e-4)


def test_what_is_observed_whole_is_returned_as_given() -> None:
    model, x = picture_and_label(), data(4)
    out = sample(model, 4, observed={"picture": x["picture"]}, settings=SamplerSettings(3))
    assert torch.equal(out["picture"], x["picture"])
    assert out["label"].shape == (4,)
    for conditioning, epsilon_head in product(("observed", "replacement"), (False, True)):
        model = picture_and_label(epsilon_head=epsilon_head)
        settings = SamplerSettings(3, conditioning=conditioning)  # type: ignore[arg-type]
        everything = sample(model, 4, observed=x, settings=settings)
        assert all(torch.equal(everything[name], x[name]) for name in x)


def test_a_modality_not_wanted_takes_part_and_is_not_returned() -> None:
    """A model that was trained on complete data has never seen a process without one of its modalities."""
    model = picture_and_label()
    out, whole = (
        sample(model, 4, generate=wanted, settings=SamplerSettings(3), generator=torch.Generator().manual_seed(0))
        for wanted in (["picture"], None)
    )
    assert list(out) == ["picture"]
    assert torch.equal(out["picture"], whole["picture"])


def test_observed_modalities_come_back_even_if_others_are_asked_for() -> None:
    x = data(4)
    out = sample(picture_and_label(), 4, observed={"label": x["label"]}, generate=["picture"])
    assert list(out) == ["picture", "label"]
    assert torch.equal(out["label"], x["label"])


@pytest.mark.parametrize("path", [{}, {"label": 0.4}, {"picture": 1.0}])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_is_one_call_of_the_network(solver: str, guidance: float, path: dict[str, float]) -> None:
    model, x = picture_and_label(), data(2)
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda _module, inputs, _out: calls.append(len(inputs[0])))
    settings = SamplerSettings(7, solver, NOISE[solver], guidance=guidance, path=path)  # type: ignore[arg-type]
    sample(model, 2, observed={"label": x["label"]}, settings=settings)
    assert calls == [2 * int(guidance)] * 7
    calls.clear()
    sample(model, 2, settings=settings)
    assert calls == [2] * 7


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_step_tells_what_is_expected_and_may_end_the_sampling(solver: str) -> None:
    model, x = picture_and_label(), data(3)
    told: list[tuple[int, int, Tensor]] = []

    def on_step(done: int, of: int, params: Any) -> None:
        assert set(params) == {"picture", "label"}
        told.append((done, of, model.modality("picture").decoder.mode(params["picture"])))
        if limit == len(told):
            raise StopIteration

    limit = 0
    settings, observed = SamplerSettings(4, solver, NOISE[solver]), {"label": x["label"]}  # type: ignore[arg-type]
    out = sample(model, 3, observed=observed, settings=settings, on_step=on_step)
    assert [step[:2] for step in told] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert torch.equal(told[-1][2], out["picture"])
    assert not torch.equal(told[0][2], out["picture"])
    told.clear()
    limit = 2
    with pytest.raises(StopIteration):
        sample(model, 3, observed=observed, settings=settings, on_step=on_step)
    assert len(told) == 2


@layouts
def test_steps_beyond_those_of_the_process_are_not_taken(layout: str) -> None:
    model = picture_and_label(layout, steps=4)
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    sample(model, 1, settings=SamplerSettings(50))
    assert len(calls) == 4


# Starting from what is given (its law is in test_paths.py) ----------------------------------------------------------


@pytest.mark.parametrize("given", [("picture",), ("picture", "label")])
@pytest.mark.parametrize("strength", [1e-9, 0.02, 0.5, 1.0])
def test_any_strength_generates_what_it_was_given_for(strength: float, given: tuple[str, ...]) -> None:
    model, x = picture_and_label(), data(3)
    observed = {name: x[name] for name in given}
    out = sample(model, 3, observed=observed, strength={"picture": strength}, settings=SamplerSettings(5))
    assert list(out) == ["picture", "label"]
    assert out["picture"].shape == x["picture"].shape
    assert not torch.equal(out["picture"], x["picture"])
    assert ("label" not in given) or torch.equal(out["label"], x["label"])


def test_a_strength_starts_at_the_noise_of_its_clock_and_spends_all_steps_from_there() -> None:
    model, x = picture_and_label(), data(3)  # T = 20
    shown: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    sample(
        model,
        3,
        observed=x,
        strength={"picture": 0.5},
        settings=SamplerSettings(5, "ddim"),
        generator=torch.Generator().manual_seed(0),
    )
    code, noise, process = model.encode(x), model.noise(3, torch.Generator().manual_seed(0)), model.process
    start = process.signal_table[10, 0] * code["picture"] + process.variance(torch.tensor(10)).sqrt() * noise[:, :4]
    torch.testing.assert_close(shown[0][:, :4], start.float())
    level = noise_level(process.signal_table[[10, 8, 6, 4, 2], 0], process.variance(torch.tensor([10, 8, 6, 4, 2])))
    assert len(shown) == 5
    for z, expected in zip(shown, level.float(), strict=True):
        torch.testing.assert_close(z[:, 5], expected.expand(3, 4, 4))
        torch.testing.assert_close(z[:, 4:5], code["label"])
        assert not z[:, 6].any()


def test_what_is_seen_stays_and_what_is_hidden_starts_from_what_was_given() -> None:
    """Inpainting that keeps something of what is under the hole."""
    model, x = picture_and_label(), data(3)
    visible = torch.ones(3, 8, 8)
    visible[:, :, :4] = 0
    hidden = (visible == 0)[:, None]
    covered = x["picture"].where(~hidden, torch.tensor(3.0))

    def run(picture: Tensor, strength: float | None) -> Tensor:
        out = sample(
            model,
            3,
            observed={"picture": picture},
            visible={"picture": visible},
            strength=None if strength is None else {"picture": strength},
            settings=SamplerSettings(5, "ddim"),
            generator=torch.Generator().manual_seed(0),
        )["picture"]
        assert torch.equal(out[~hidden], picture[~hidden])
        return out

    assert torch.equal(run(x["picture"], None), run(covered, None))
    assert not torch.isclose(run(x["picture"], 0.3)[hidden], run(covered, 0.3)[hidden]).any()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"observed": {"lable": torch.zeros(2).long()}}, "no modality named lable; this model has picture, label"),
        ({"generate": ["image"]}, "no modality named image; this model has picture, label"),
        ({"observed": {"label": torch.zeros(3).long()}}, r"observed\['label'\]: expected a batch of 2, found 3"),
        ({"observed": {"label": torch.zeros(2)}}, "label: expected int64"),
        ({"observed": {"picture": torch.zeros(2, 1, 8, 9)}}, r"picture: expected \[batch, 1, 8, 8\], found"),
        ({"visible": {"picture": torch.ones(2, 8, 8)}}, "'picture', but it is not among the observed"),
        (
            {"observed": {"label": torch.zeros(2).long()}, "visible": {"label": torch.ones(2, 8, 8)}},
            "'label', but it cannot be observed in part",
        ),
        ({"strength": {"lable": 0.5}}, "no modality named lable; this model has picture, label"),
        ({"strength": {"label": 0.5}}, "strength: 0.5 was given for 'label', but it is not among the observed"),
        *(
            (
                {"observed": {"label": torch.zeros(2).long()}, "strength": {"label": share}},
                r"strength\['label'\]: expected a share of the path above 0 and up to 1, found",
            )
            for share in (0.0, -0.5, 1.5, float("nan"))
        ),
        ({"settings": SamplerSettings(path={"lable": 0.5})}, "path: no modality named lable"),
        ({"settings": SamplerSettings(path={"label": -0.5})}, "path: expected shares of T from 0"),
        ({"path": torch.tensor([[20, 20], [0, 3]])}, "path: expected clocks that fall from T = 20 to 0"),
    ],
)
def test_a_wrong_request_is_named(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(picture_and_label(), 2, **request_)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"observed": {"label": torch.zeros(2).long()}, "strength": {"label": 0.5}}, "none can start from another"),
        ({"settings": SamplerSettings(path={"label": 0.5})}, "path: in a shared layout all modalities have one clock"),
        ({"path": torch.tensor([[20, 20], [9, 8], [0, 0]])}, "path: in a shared layout all modalities have one clock"),
    ],
)
def test_a_shared_layout_has_no_clocks_to_set_apart(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(picture_and_label("shared"), 2, **request_)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"solver": "euler"},
        {"eta": -0.5, "solver": "ddim"},
        {"eta": 1e200},
        {"guidance": -1.0},
        {"guidance_interval": (0.5, 0.5)},
        {"guidance_interval": (-0.1, 0.5)},
        {"guidance_interval": (0.2, 1.5)},
        {"conditioning": "inpainting"},
        {"precision": "float16"},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplerSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "ancestral", "eta": 0.5}, "eta: 0.5 is a setting of the solvers ddim and dpmpp_2m"),
        ({"guidance": 2.0, "conditioning": "replacement"}, "guidance: 2.0 has nothing to guide by"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSettings(**settings)
