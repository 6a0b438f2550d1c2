"""Samplers with optimal heads must return the true joint law, and the true conditional for every subset observed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

import mtdiffusion.sampler
from mtdiffusion import (
    Backbone,
    Decoder,
    DiffusionProcess,
    DirectWeights,
    Encoder,
    Features,
    FeatureSpec,
    LatentLayout,
    MultimodalDiffusion,
    Params,
    Prediction,
    Retention,
    SamplerSettings,
    SNRMatched,
    WeightSchedule,
    read_out,
    sample,
)
from mtdiffusion.sampler import solve_ddim, solve_dpmpp_2m, time_steps
from tests.core.gaussians import JointGaussian, LinearEncoder, NoiseBasis, VectorModality, gaussian_model
from tests.core.toys import CLASSES, CategoricalDecoder, CodebookEncoder, LabelModality, data, picture_and_label

LAYOUTS = (("own", False), ("own", True), ("shared", False))
layouts = pytest.mark.parametrize(("layout", "own_channels"), LAYOUTS)


# Jointly Gaussian modalities: the law of what is sampled is exact, see NoiseBasis -----------------------------------


def _errors(
    monkeypatch: pytest.MonkeyPatch,
    model: MultimodalDiffusion,
    joint: JointGaussian,
    settings: SamplerSettings,
    subsets: list[tuple[str, ...]] | None = None,
) -> tuple[float, float]:
    """Worst error over observed subsets (default: all) of the mean, in standard deviations of the data, and of the
    covariance, relative in the Frobenius norm."""
    value = {name: x[0] for name, x in joint.draw(1, seed=3).items()}
    noisy = settings.solver == "ancestral" or settings.eta > 0
    worst_mean = worst_covariance = 0.0
    for subset in joint.proper_subsets() if subsets is None else subsets:
        basis = NoiseBasis(1 + settings.steps * noisy, model.layout.latent.numel)
        monkeypatch.setattr(mtdiffusion.sampler, "standard_normal", basis)
        given = {name: value[name] for name in subset}
        observed = {name: x.expand(basis.batch, -1) for name, x in given.items()}
        out = sample(model, basis.batch, observed=observed, settings=settings)
        assert basis.drawn == basis.draws
        mean, covariance = basis.law(torch.cat([out[name] for name in joint.dims if name not in subset], 1))
        true_mean, true_covariance = joint.conditional(given)
        relative = (covariance - true_covariance).norm() / true_covariance.norm()
        worst_mean = max(worst_mean, (mean - true_mean).abs().max().item())
        worst_covariance = max(worst_covariance, relative.item())
    return worst_mean, worst_covariance


@layouts
@pytest.mark.parametrize(
    # The mean is exact up to the signal left at t = T (1e-4 here). The covariance error is the discretisation's;
    # measured on the shared layout, which is the harder one: 10.3, 23.2, 8.9, 20.8, 3.0 and 12.2 %.
    ("solver", "steps", "covariance_error"),
    [
        ("ancestral", 50, 0.12),
        ("ancestral", 20, 0.25),
        ("ddim", 50, 0.10),
        ("ddim", 20, 0.23),
        ("dpmpp_2m", 50, 0.04),
        ("dpmpp_2m", 20, 0.14),
    ],
)
def test_every_conditional_is_sampled(
    monkeypatch: pytest.MonkeyPatch, layout: str, own_channels: bool, solver: str, steps: int, covariance_error: float
) -> None:
    model, joint = gaussian_model(layout, own_channels=own_channels)
    settings = SamplerSettings(steps, solver)  # type: ignore[arg-type]
    mean, covariance = _errors(monkeypatch, model, joint, settings)
    assert mean < 1e-3
    assert covariance < covariance_error


@layouts
def test_many_steps_of_either_solver_reach_the_true_law(
    monkeypatch: pytest.MonkeyPatch, layout: str, own_channels: bool
) -> None:
    model, joint = gaussian_model(layout, own_channels=own_channels)
    for solver, bound in (("ddim", 0.015), ("dpmpp_2m", 0.0015)):  # measured 1.2 % and 0.1 % at worst
        mean, covariance = _errors(monkeypatch, model, joint, SamplerSettings(400, solver), [(), ("depth",)])
        assert mean < 1e-3
        assert covariance < bound


def test_many_ancestral_steps_reach_the_true_law(monkeypatch: pytest.MonkeyPatch) -> None:
    model, joint = gaussian_model("own")
    mean, covariance = _errors(monkeypatch, model, joint, SamplerSettings(200, "ancestral"), [("depth",)])
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
    model, joint = gaussian_model("own", retention=Retention.from_curve("cosine", 1000, 3, kind), schedule=schedule)
    mean, covariance = _errors(monkeypatch, model, joint, SamplerSettings(50, solver))  # type: ignore[arg-type]
    assert mean < 0.01  # curves other than cosine leave up to 6e-3 of a standard deviation of signal at t = T
    assert covariance < covariance_error


def test_ddim_is_of_first_order_and_dpmpp_2m_of_second(monkeypatch: pytest.MonkeyPatch) -> None:
    model, joint = gaussian_model("own")
    errors = {
        (solver, steps): _errors(monkeypatch, model, joint, SamplerSettings(steps, solver), [()])[1]
        for solver in ("ddim", "dpmpp_2m")
        for steps in (50, 200)
    }
    assert errors["ddim", 50] / errors["ddim", 200] == pytest.approx(4, rel=0.25)
    assert errors["dpmpp_2m", 50] / errors["dpmpp_2m", 200] == pytest.approx(16, rel=0.35)


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("layout", ["own", "shared"])
def test_replacement_is_biased_however_many_the_steps(
    monkeypatch: pytest.MonkeyPatch, layout: str, solver: str
) -> None:
    """With perfect heads: early steps decide before z_t shows what is known (docs/mathematics.md, section 5)."""
    model, joint = gaussian_model(layout)
    subsets = [("pose",), ("depth", "sound")]
    right = SamplerSettings(60, solver)  # type: ignore[arg-type]
    _, discretisation = _errors(monkeypatch, model, joint, right, subsets)
    for steps in (20, 60):
        biased = SamplerSettings(steps, solver, conditioning="replacement")  # type: ignore[arg-type]
        mean, covariance = _errors(monkeypatch, model, joint, biased, subsets)
        assert mean > 0.2  # standard deviations; the observed aggregate's is below 1e-3
    assert covariance > 0.14  # measured 0.24, 0.48, 0.52 (own) and 0.18, 0.14, 0.14 (shared)
    assert covariance > 2 * discretisation


def test_retention_does_not_matter_without_noise_at_matched_snr() -> None:
    """Only m/σ enters (docs/mathematics.md, section 2), but for the σ_T of the first z: 1 − 1e-9 or 1."""
    out = []
    for kind in ("compensated", "literal", "rectified_flow"):
        model, _ = gaussian_model(retention=Retention.from_curve("cosine", 1000, 3, kind))
        out.append(
            sample(model, 20, settings=SamplerSettings(30, "dpmpp_2m"), generator=torch.Generator().manual_seed(0))
        )
    for name in out[0]:
        torch.testing.assert_close(out[1][name], out[0][name], rtol=0, atol=1e-5)
        torch.testing.assert_close(out[2][name], out[0][name], rtol=0, atol=1e-2)  # its σ_T is 0.999: 1e-3 of z_T


def test_drawn_samples_have_the_true_law() -> None:
    """The same through real noise, all of it: the solver's and the heads' own draws. 8,000 samples."""
    model, joint = gaussian_model("own", own_channels=True)
    given = {"depth": torch.tensor([0.8]).double()}
    out = sample(
        model,
        8000,
        observed={name: x.expand(8000, -1) for name, x in given.items()},
        settings=SamplerSettings(25, "dpmpp_2m", draw=True),
        generator=torch.Generator().manual_seed(0),
    )
    drawn = torch.cat([out["pose"], out["sound"]], 1)
    mean, covariance = joint.conditional(given)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=5 / 8000**0.5)
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0, atol=5 * 2**0.5 / 8000**0.5 + 0.02)


def test_what_is_not_wanted_is_not_returned_and_the_rest_is_its_marginal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, joint = gaussian_model("own")
    basis = NoiseBasis(1, model.layout.latent.numel)
    monkeypatch.setattr(mtdiffusion.sampler, "standard_normal", basis)
    out = sample(model, basis.batch, generate=["sound", "pose"], settings=SamplerSettings(50, "dpmpp_2m"))
    assert list(out) == ["pose", "sound"]
    mean, covariance = basis.law(torch.cat([out["pose"], out["sound"]], 1))
    at = joint.index(["pose", "sound"])
    torch.testing.assert_close(mean, joint.mean[at], rtol=0, atol=1e-3)
    torch.testing.assert_close(covariance, joint.covariance[at][:, at], rtol=0, atol=0.02)


# A mixture of Gaussians and its label -------------------------------------------------------------------------------


class _Mixture(Backbone):
    """The exact posterior of (point, label) given z_t and what is observed; features are log p(k | .) and E[x | .]."""

    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    centres = torch.tensor([[1.2, 0.0], [-0.8, 1.0], [-0.6, -1.2]], dtype=torch.float64)
    spread = torch.tensor([0.5, 0.6, 0.4], dtype=torch.float64)  # standard deviation of each component

    def __init__(self, process: DiffusionProcess, codes: Tensor) -> None:
        super().__init__()
        self.process, self.codes = process, codes
        self.levels = process.noise_level(torch.arange(process.steps + 1))
        self.features = FeatureSpec(1, 1, 2, CLASSES + 2)

    def posterior_of_label(self, x: Tensor) -> Tensor:
        """log p(k | x) ``[B, K]``."""
        distance = (x[:, None] - self.centres).square().sum(2)
        return (self.prior.log() - 2 * self.spread.log() - 0.5 * distance / self.spread**2).log_softmax(1)

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        t = (self.levels - noise[0]).abs().argmin()
        m, variance = self.process.signal_table[t, 0], self.process.variance(t)
        point, label, seen_point, seen_label = z[:, :4].flatten(2).unbind(1)
        scale = (m**2 + variance).sqrt()
        point, label = point * scale, label * scale
        has_point, has_label = vector[:, 0:1], vector[:, 1:2]
        # What the point's channel says of the label, and of the point for each label.
        total = m**2 * self.spread**2 + variance
        distance = (point[:, None] - m * self.centres).square().sum(2)
        from_point = self.prior.log() - total.log() - 0.5 * distance / total
        gain = m * self.spread**2 / total
        mean = self.centres + gain[:, None] * (point[:, None] - m * self.centres)
        # What the label's channel says.
        from_label = -0.5 * (label[:, None] - m * self.codes.flatten(1)).square().sum(2) / variance
        given_label = -1e3 * (seen_label[:, None] - self.codes.flatten(1)).square().sum(2)
        logits = torch.where(has_point > 0, self.posterior_of_label(seen_point), from_point)
        logits = (logits + torch.where(has_label > 0, given_label, from_label)).log_softmax(1)
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
    process = DiffusionProcess.build(Retention.from_curve("cosine", 1000, 2), SNRMatched(), 2)
    codes = torch.tensor([[1.4, 0.0], [-0.7, 1.2], [-0.7, -1.2]]).double().reshape(CLASSES, 1, 1, 2)
    layout = LatentLayout.own({"point": 1, "label": 1}, 1, 2)
    encoder = LinearEncoder(layout.share("point"), torch.eye(2).double())
    modalities = {
        "point": VectorModality(encoder, _PointDecoder(), 2),
        "label": LabelModality(CodebookEncoder(layout.share("label"), codes), CategoricalDecoder(0, CLASSES), 1),
    }
    return MultimodalDiffusion(modalities, _Mixture(process, codes), process, layout, own_channels=False).double()


MANY = 4000  # a share is known to 0.008, a mean to 0.016 σ, a variance to 2.2 %
solvers = pytest.mark.parametrize(("solver", "steps"), [("ancestral", 200), ("ddim", 200), ("dpmpp_2m", 60)])


@solvers
def test_a_label_given_a_point_has_the_exact_posterior(mixture: MultimodalDiffusion, solver: str, steps: int) -> None:
    point = torch.tensor([[0.1, 0.3]], dtype=torch.float64)
    settings = SamplerSettings(steps, solver)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    out = sample(mixture, MANY, observed={"point": point.expand(MANY, -1)}, settings=settings, generator=generator)
    truth = mixture.backbone.posterior_of_label(point)[0].exp()
    assert truth.max() < 0.7  # a point that two labels share
    share = torch.bincount(out["label"], minlength=CLASSES) / MANY
    torch.testing.assert_close(share.double(), truth, rtol=0, atol=0.04)


@solvers
@pytest.mark.parametrize("label", range(CLASSES))
def test_a_point_given_a_label_has_that_component_s_law(
    mixture: MultimodalDiffusion, solver: str, steps: int, label: int
) -> None:
    settings = SamplerSettings(steps, solver)  # type: ignore[arg-type]
    given = {"label": torch.full((MANY,), label)}
    out = sample(mixture, MANY, observed=given, settings=settings, generator=torch.Generator().manual_seed(label))
    assert torch.equal(out["label"], given["label"])
    deviation = _Mixture.spread[label].item()
    torch.testing.assert_close(out["point"].mean(0), _Mixture.centres[label], rtol=0, atol=5 * deviation / MANY**0.5)
    found = out["point"].T.cov() / deviation**2
    torch.testing.assert_close(found, torch.eye(2).double(), rtol=0, atol=0.11 + 0.03)  # 5 standard errors, and steps


@solvers
def test_points_and_labels_sampled_together_belong_together(
    mixture: MultimodalDiffusion, solver: str, steps: int
) -> None:
    settings = SamplerSettings(steps, solver)  # type: ignore[arg-type]
    out = sample(mixture, MANY, settings=settings, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(out["label"], minlength=CLASSES) / MANY
    torch.testing.assert_close(share.double(), _Mixture.prior, rtol=0, atol=0.04)
    for k in range(CLASSES):
        points, deviation = out["point"][out["label"] == k], _Mixture.spread[k].item()
        torch.testing.assert_close(points.mean(0), _Mixture.centres[k], rtol=0, atol=5 * deviation / len(points) ** 0.5)
        assert points.var(0).mean().sqrt().item() == pytest.approx(deviation, rel=0.1)


# One modality, against diffusers ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_one_modality_is_sampled_like_diffusers_dpm_solver(beta_schedule: str, steps: int) -> None:
    oracle = DPMSolverMultistepScheduler(1000, beta_schedule=beta_schedule, prediction_type="sample")
    oracle.set_timesteps(steps)
    assert (oracle.config.algorithm_type, oracle.config.solver_order) == ("dpmsolver++", 2)
    process = DiffusionProcess.build(Retention.from_alphas(oracle.alphas), DirectWeights(), 1)
    visited: list[Tensor] = []

    def head(z: Tensor) -> Tensor:  # no network, but as far from linear
        return torch.tanh(2 * z) + 0.3 * torch.sin(3 * z)

    def predict(z: Tensor, t: Tensor) -> Prediction:
        visited.append(z)
        codes = head(z)[:, None]
        return Prediction({}, codes, process.epsilon(z, codes, t))

    start = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = [t + 1 for t in oracle.timesteps.tolist()] + [0]
    last = solve_dpmpp_2m(predict, process, start, times)
    z = start
    for found, timestep in zip(visited, oracle.timesteps, strict=True):
        torch.testing.assert_close(found, z, rtol=0, atol=2e-4)  # they step in float32
        z = oracle.step(head(z), timestep, z).prev_sample
    torch.testing.assert_close(last.codes[:, 0], z, rtol=0, atol=2e-4)  # z_0 is the last expected code


def test_modalities_with_equal_signal_are_solved_as_one_on_their_sum() -> None:
    retention = Retention.from_curve("cosine", 100)
    start = torch.randn(3, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def run(n: int) -> Tensor:
        process = DiffusionProcess.build(retention, SNRMatched(), n)
        split = shares if n == 3 else torch.ones(1, dtype=torch.float64)

        def predict(z: Tensor, t: Tensor) -> Prediction:
            codes = split[:, None, None, None] * torch.tanh(2 * z)[:, None]
            return Prediction({}, codes, process.epsilon(z, codes, t))

        both = [solve(predict, process, start, time_steps(12, 100)).codes for solve in (solve_ddim, solve_dpmpp_2m)]
        return torch.stack(both).sum(2)

    torch.testing.assert_close(run(3), run(1), rtol=1e-10, atol=1e-10)


def test_an_exact_epsilon_head_samples_what_exact_codes_do() -> None:
    process = DiffusionProcess.build(Retention.from_curve("cosine", 50, 2), DirectWeights(start=-0.01), 2)
    start = torch.randn(3, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def predict(z: Tensor, t: Tensor) -> Prediction:
        codes = torch.stack([torch.tanh(z), 0.5 - z], 1)
        return Prediction({}, codes, process.epsilon(z, codes, t))

    for eta in (0.0, 1.0):
        derived, head = (
            solve_ddim(
                predict,
                process,
                start,
                time_steps(10, 50),
                eta=eta,
                epsilon_head=epsilon_head,
                generator=torch.Generator().manual_seed(1),
            ).codes
            for epsilon_head in (False, True)
        )
        torch.testing.assert_close(derived, head, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("given", [("pose",), ("depth", "sound")])
def test_a_read_out_is_the_conditional_law_given_what_is_observed(given: tuple[str, ...]) -> None:
    model, joint = gaussian_model(own_channels=True)
    x = {name: values for name, values in joint.draw(3).items() if name in given}
    params = read_out(model, model.observe(x, model.visibility(3, x).double()))
    rest = [name for name in joint.dims if name not in given]
    for row in range(3):
        mean, covariance = joint.conditional({name: values[row] for name, values in x.items()})
        found = torch.cat([params[name]["mean"][row] for name in rest])
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-3)
        width = joint.dims[rest[0]]
        tril = params[rest[0]]["tril"][row]
        torch.testing.assert_close(tril @ tril.T, covariance[:width, :width], rtol=0, atol=1e-3)


# Guidance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_on_logits_is_a_power_of_bayes_rule(monkeypatch: pytest.MonkeyPatch, guidance: float) -> None:
    """p ∝ p(k | z) · (p(k | z, seen) / p(k | z))^g, for a network's own p."""
    model, x = picture_and_label(), data(5)
    decoder = model.modality("label").decoder
    monkeypatch.setattr(decoder, "mode", lambda params: params["logits"])
    settings = SamplerSettings(1, "dpmpp_2m", guidance=guidance)
    given = {"picture": x["picture"]}
    found = sample(model, 5, observed=given, settings=settings, generator=torch.Generator().manual_seed(0))["label"]
    z = torch.randn(5, *model.layout.latent.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((5,), model.process.steps)
    seen = model.observe(given, model.visibility(5, given))
    with torch.no_grad():
        conditional, blind = (
            model(z, t, shown).params["label"]["logits"].softmax(1) for shown in (seen, seen.without())
        )
    assert not torch.allclose(conditional, blind, atol=1e-3)
    expected = blind * (conditional / blind) ** guidance
    torch.testing.assert_close(found.softmax(1), expected / expected.sum(1, keepdim=True))


def test_guidance_extrapolates_an_epsilon_head_too() -> None:
    torch.manual_seed(0)
    model, x = picture_and_label(epsilon_head=True), data(5)
    assert model.epsilon_head is not None
    torch.nn.init.normal_(model.epsilon_head.weight)
    seen_epsilon: list[Tensor] = []
    complete = model.complete

    def spy(*given: object) -> Prediction:
        seen_epsilon.append(given[4])  # type: ignore[arg-type]
        return complete(*given)  # type: ignore[arg-type]

    model.complete = spy  # type: ignore[method-assign]
    settings = SamplerSettings(1, "ddim", guidance=3.0)
    sample(model, 5, observed={"label": x["label"]}, settings=settings)
    conditional, blind = seen_epsilon[0].chunk(2)
    # In the label's own channel, the last, ε is known and no head's is asked.
    torch.testing.assert_close(seen_epsilon[1][:, :4], (blind + 3 * (conditional - blind))[:, :4])
    assert not torch.allclose(conditional[:, :4], blind[:, :4])


def test_epsilon_is_known_where_a_modality_is_seen_in_channels_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = picture_and_label(epsilon_head=True), data(5)
    assert model.epsilon_head is not None
    torch.nn.init.normal_(model.epsilon_head.weight)
    observation = model.observe(x, model.visibility(5, {"label": x["label"]}))
    z, t = torch.randn(5, *model.layout.latent.shape), torch.full((5,), 7)
    prediction = model(z, t, observation)
    truth = model.process.epsilon(z, model.encode(x), t)
    torch.testing.assert_close(prediction.epsilon[:, 4:], truth[:, 4:])
    assert not torch.allclose(prediction.epsilon[:, :4], truth[:, :4])


def test_jumps_too_long_for_an_epsilon_head_are_refused() -> None:
    model, _ = picture_and_label(epsilon_head=True), data(1)
    literal = Retention.from_curve("cosine", 400, 2, "literal")
    model.process = DiffusionProcess.build(literal, SNRMatched(), 2)
    with pytest.raises(
        ValueError, match=r"longest of 5 steps would multiply errors by .* more steps \(up to T = 400\)"
    ):
        sample(model, 1, settings=SamplerSettings(5, "ddim"))


# Requests -----------------------------------------------------------------------------------------------------------

SOLVERS = ("ancestral", "ddim", "dpmpp_2m")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("epsilon_head", [False, True])
def test_the_same_seed_gives_the_same_sample_and_another_seed_another(
    solver: str, draw: bool, epsilon_head: bool
) -> None:
    model = picture_and_label(epsilon_head=epsilon_head)
    settings = SamplerSettings(5, solver, draw=draw)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("layout", ["own", "shared"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_pixels_that_are_seen_are_kept_and_hidden_ones_do_not_matter(layout: str, solver: str) -> None:
    model, x = picture_and_label(layout), data(4)
    visible = torch.ones(4, 8, 8)
    visible[:, 2:7, 1:5] = 0  # not along the latent's 2×2 places
    hidden = (visible == 0)[:, None]
    settings = SamplerSettings(5, solver)  # type: ignore[arg-type]
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


def test_what_is_observed_whole_is_returned_as_given() -> None:
    model, x = picture_and_label(), data(4)
    out = sample(model, 4, observed={"picture": x["picture"]}, settings=SamplerSettings(3))
    assert torch.equal(out["picture"], x["picture"])
    assert out["label"].shape == (4,)
    everything = sample(model, 4, observed=x, settings=SamplerSettings(3))
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
    presence = model.backbone.shown[2][:, 2:4]  # type: ignore[attr-defined]
    assert torch.equal(presence, torch.ones(4, 2))


def test_observed_modalities_come_back_even_if_others_are_asked_for() -> None:
    x = data(4)
    out = sample(picture_and_label(), 4, observed={"label": x["label"]}, generate=["picture"])
    assert list(out) == ["picture", "label"]
    assert torch.equal(out["label"], x["label"])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("solver", "per_step"), [("ddim", 1), ("ancestral", 1), ("dpmpp_2m", 1)])
def test_a_step_is_one_call_of_the_network(solver: str, per_step: int, guidance: float) -> None:
    model, x = picture_and_label(), data(2)
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda _module, inputs, _out: calls.append(len(inputs[0])))
    settings = SamplerSettings(7, solver, guidance=guidance)  # type: ignore[arg-type]
    sample(model, 2, observed={"label": x["label"]}, settings=settings)
    assert calls == [2 * int(guidance)] * 7 * per_step


def test_times_fall_evenly_from_the_last_to_0_and_never_repeat() -> None:
    assert time_steps(4, 1000) == [1000, 750, 500, 250, 0]
    for steps, total in ((7, 1000), (25, 40), (39, 40), (40, 40)):
        times = time_steps(steps, total)
        assert (len(times), times[0], times[-1]) == (steps + 1, total, 0)
        gaps = [a - b for a, b in pairwise(times)]
        assert set(gaps) <= {math.floor(total / steps), math.ceil(total / steps)}
    assert time_steps(1000, 40) == list(range(40, -1, -1))


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
    ],
)
def test_a_wrong_request_is_named(request_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(picture_and_label(), 2, **request_)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"solver": "euler"},
        {"eta": -0.5, "solver": "ddim"},
        {"guidance": -1.0},
        {"conditioning": "inpainting"},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplerSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.5}, "eta: 0.5 is a setting of the solver ddim, found ancestral"),
        ({"guidance": 2.0, "conditioning": "replacement"}, "guidance: 2.0 needs the observed aggregate"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSettings(**settings)  # type: ignore[arg-type]
