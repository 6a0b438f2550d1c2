"""The four terms against torch.distributions, masks and gradients, and the bound against the exact −log p(X)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import mtdiffusion.loss
from mtdiffusion import (
    DiffusionProcess,
    DirectWeights,
    LossTerms,
    LossWeights,
    MultimodalDiffusion,
    Prediction,
    Retention,
    SNRMatched,
    TargetSignal,
    WeightSchedule,
    composite_loss,
    variational_bound,
)
from mtdiffusion.loss import draw_times, prior_kl, snr_weight, transition_kl
from mtdiffusion.process import mix
from tests.core.gaussians import gaussian_model
from tests.core.toys import data, picture_and_label

TINY = {"rtol": 1e-10, "atol": 1e-10}
STEPS = 10


def _process(schedule: WeightSchedule, kind: str, n: int = 3) -> DiffusionProcess:
    return DiffusionProcess.build(Retention.from_curve("cosine", STEPS, n, kind), schedule, n)


def _tensors(n: int = 3, batch: int = 4) -> tuple[Tensor, Tensor, Prediction]:
    """z, codes, and a prediction that is wrong about both codes and noise."""
    generator = torch.Generator().manual_seed(0)
    z, epsilon = torch.randn(2, batch, 2, 2, 1, generator=generator, dtype=torch.float64)
    codes, estimated = torch.randn(2, batch, n, 2, 2, 1, generator=generator, dtype=torch.float64)
    return z, codes, Prediction({}, estimated, epsilon)


processes = pytest.mark.parametrize("kind", ["compensated", "literal", "rectified_flow"])
schedules = pytest.mark.parametrize(
    "schedule", [SNRMatched(), DirectWeights(start=0.5)], ids=["snr_matched", "constant"]
)


# L0 and L1 in closed form -------------------------------------------------------------------------------------------


@processes
@schedules
def test_l0_is_the_kl_of_the_last_marginal_and_the_prior(schedule: WeightSchedule, kind: str) -> None:
    process, (_, codes, _) = _process(schedule, kind), _tensors()
    presence = torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]])
    t = torch.full((4,), STEPS)
    mean = process.mean(codes, t, presence)
    last = Normal(mean, process.variance(t).sqrt()[:, None, None, None].expand_as(mean))
    expected = kl_divergence(last, Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(prior_kl(process, codes, presence), expected, **TINY)


@processes
@schedules
def test_l1_from_codes_is_the_kl_of_the_two_posteriors(schedule: WeightSchedule, kind: str) -> None:
    process, (z, codes, prediction) = _process(schedule, kind), _tensors()
    presence = torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]])
    for step in range(2, STEPS + 1):
        t = torch.full((4,), step)
        scale = process.posterior_variance(t).sqrt()[:, None, None, None]
        q = Normal(process.posterior_mean(z, codes, t, presence), scale)
        p = Normal(process.posterior_mean(z, prediction.codes, t, presence), scale)
        found = transition_kl(process, z, codes, prediction, t, presence)
        torch.testing.assert_close(found, kl_divergence(q, p).sum((1, 2, 3)), **TINY)
        assert found[2] == 0  # nothing is there, so nothing can be wrong


@processes
@schedules
def test_l1_from_an_epsilon_head_is_the_kl_to_the_paper_s_mean(schedule: WeightSchedule, kind: str) -> None:
    process, (z, codes, prediction) = _process(schedule, kind), _tensors()
    for step in range(2, STEPS + 1):
        t = torch.full((4,), step)
        a = torch.exp(process.log_alpha_bar[step] - process.log_alpha_bar[step - 1])
        entering = mix(process.weight_table[step].expand(4, -1), prediction.codes)
        mu = (z - (1 - a) / process.variance(t[0]).sqrt() * prediction.epsilon) / a.sqrt() - entering
        scale = process.posterior_variance(t).sqrt()[:, None, None, None]
        q = Normal(process.posterior_mean(z, codes, t), scale)
        found = transition_kl(process, z, codes, prediction, t, derived_epsilon=False)
        torch.testing.assert_close(found, kl_divergence(q, Normal(mu, scale)).sum((1, 2, 3)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("derived", [True, False])
def test_l1_is_0_at_the_first_step_and_for_a_perfect_prediction(derived: bool) -> None:
    process, (z, codes, wrong) = _process(SNRMatched(), "compensated"), _tensors()
    first = torch.ones(4, dtype=torch.long)
    assert not transition_kl(process, z, codes, wrong, first, derived_epsilon=derived).any()
    t = torch.tensor([2, 5, 9, 10])
    perfect = Prediction({}, codes, process.epsilon(z, codes, t))
    found = transition_kl(process, z, codes, perfect, t, derived_epsilon=derived)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-20)


@pytest.mark.parametrize("derived", [True, False])
def test_l1_has_finite_gradients_at_the_first_step(derived: bool) -> None:
    process, (z, codes, wrong) = _process(SNRMatched(), "compensated"), _tensors()
    estimated = (100 * wrong.codes).float().requires_grad_()  # in float32, whose tiny stands in for β̃ = 0
    epsilon = wrong.epsilon.float().requires_grad_()
    t = torch.tensor([1, 1, 2, 3])
    kl = transition_kl(
        process, z.float(), codes.float(), Prediction({}, estimated, epsilon), t, derived_epsilon=derived
    )
    kl.sum().backward()
    assert estimated.grad is not None
    assert estimated.grad.isfinite().all()
    assert not estimated.grad[:2].any()
    assert estimated.grad[2:].any()


# Time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [5, 30, 4000])
def test_times_are_stratified_and_in_random_order(batch: int) -> None:
    t = draw_times(batch, STEPS, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    assert not torch.equal(t, t.sort().values)
    if batch >= STEPS:  # every time exactly as often
        assert torch.bincount(t, minlength=STEPS + 1).tolist() == [0] + [batch // STEPS] * STEPS
    else:  # one in each of `batch` equal parts
        assert ((t.sort().values - 1) // (STEPS // batch)).tolist() == list(range(batch))


def test_a_small_batch_draws_every_time_equally_often_in_the_long_run() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.cat([draw_times(3, STEPS, generator) for _ in range(4000)])
    share = torch.bincount(t, minlength=STEPS + 1)[1:] / len(t)
    # 12,000 draws: five standard deviations of a share of 0.1 are 0.014.
    torch.testing.assert_close(share, torch.full((STEPS,), 0.1), rtol=0, atol=0.014)


# The training loss --------------------------------------------------------------------------------------------------


def _loss(model: MultimodalDiffusion, x: dict[str, Tensor], weights: LossWeights, **given: Tensor) -> LossTerms:
    return composite_loss(model, x, weights, generator=torch.Generator().manual_seed(0), **given)


ALL = LossWeights(l0=1.0, l1=1.0, l2=1.0, l3=1.0)


@pytest.mark.parametrize("layout", ["own", "shared"])
@pytest.mark.parametrize("epsilon_head", [False, True])
@pytest.mark.parametrize("l1_time", ["snr", "elbo"])
def test_every_term_stays_per_sample(layout: str, epsilon_head: bool, l1_time: str) -> None:
    model = picture_and_label(layout, epsilon_head=epsilon_head, steps=3)
    terms = _loss(model, data(6), LossWeights(1.0, 1.0, 1.0, 1.0, l1_time=l1_time))  # type: ignore[arg-type]
    for per_modality in (terms.l2, terms.l3, terms.counted):
        assert list(per_modality) == ["picture", "label"]
    for term in (terms.total, terms.l0, terms.l1, *terms.l2.values(), *terms.l3.values(), *terms.counted.values()):
        assert term.shape == (6,)
        assert term.isfinite().all()


def test_the_total_is_the_weighted_sum_of_its_terms() -> None:
    model, x = picture_and_label(steps=3), data(6)
    model.modality("label").loss_weight = 0.25
    latent_dims, dims = model.layout.latent.numel, {"picture": 64, "label": 1}
    weights = LossWeights(l0=0.3, l1=0.5, l2=2.0, l3=0.7, l1_time="elbo")
    terms = _loss(model, x, weights)
    expected = (0.3 * terms.l0 + 0.5 * terms.l1) / latent_dims
    expected = expected + 2.0 * (terms.l2["picture"] + 0.25 * terms.l2["label"])
    expected = expected + 0.7 * sum(terms.l3[name] / dims[name] for name in dims)
    torch.testing.assert_close(terms.total, expected)


def test_the_default_loss_is_the_heads_objective_alone() -> None:
    terms = composite_loss(picture_and_label(), data(6), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(terms.total, terms.l2["picture"] + terms.l2["label"])


def test_snr_clamps_weigh_a_modality_s_objective_over_time() -> None:
    model, x = picture_and_label(steps=20), data(20)
    model.modality("picture").snr_clamp = (0.5, 4.0)
    terms = _loss(model, x, LossWeights())
    t = draw_times(20, 20, torch.Generator().manual_seed(0))  # the loss draws its times first
    scale = model.process.snr(t)[:, 0].clamp(0.5, 4.0).float()
    assert scale.unique().numel() > 3
    torch.testing.assert_close(terms.total, scale * terms.l2["picture"] + terms.l2["label"])
    assert torch.equal(snr_weight(torch.tensor([0.1, 2.0, 9.0]), (0.5, 4.0)), torch.tensor([0.5, 2.0, 4.0]))


@pytest.mark.parametrize("clamp", [(0.0, math.inf), (0.05, 5.0), (1.0, 1.0)])
def test_snr_weighted_l1_is_a_clamped_error_of_epsilon(clamp: tuple[float, float]) -> None:
    """With equal gains it is ½ clamp(SNR_t) ‖Σ_i (e_i − ê_i)‖² a latent dimension: finite where the SNR vanishes."""
    model, x = picture_and_label(steps=20), data(20)
    terms = _loss(model, x, LossWeights(l1=1.0, l2=0.0, l1_clamp=clamp, readout=0.0))
    generator = torch.Generator().manual_seed(0)
    t = draw_times(20, 20, generator)
    codes = model.encode(x)
    noise = torch.randn(codes[:, 0].shape, generator=generator)
    z = model.process.corrupt(codes, t, noise)
    error = (codes - model(z, t, model.observe({}, torch.zeros(20, 2, 4, 4))).codes).sum(1)
    expected = 0.5 * model.process.snr(t)[:, 0].clamp(*clamp) * error.square().mean((1, 2, 3))
    torch.testing.assert_close(terms.total, expected.float(), rtol=1e-3, atol=1e-6)  # theirs: a float32 difference of z


def test_a_signal_that_reaches_0_leaves_the_loss_finite() -> None:
    process = DiffusionProcess.build(Retention.from_curve(steps=4), TargetSignal((1.0, 0.0)), 2)
    terms = _loss(picture_and_label(process=process), data(8), ALL)
    assert terms.total.isfinite().all()


def test_l3_is_the_likelihood_at_the_first_time_scaled_up() -> None:
    model, x = picture_and_label(steps=4), data(40)
    terms = _loss(model, x, ALL)
    t = draw_times(40, 4, torch.Generator().manual_seed(0))
    for name, dims in (("picture", 64), ("label", 1)):
        expected = torch.where(t == 1, 4 * dims * terms.l2[name], torch.zeros(40))  # here the objective is nll / dims
        torch.testing.assert_close(terms.l3[name], expected)


def test_means_average_an_objective_over_the_samples_it_counts_for() -> None:
    model, x = picture_and_label(), data(4)
    presence = torch.tensor([[1.0, 1], [1, 0], [1, 0], [1, 0]])
    terms = _loss(model, x, ALL, presence=presence)
    means = terms.means()
    assert set(means) == {"loss", "l0", "l1", "l2/picture", "l2/label", "l3/picture", "l3/label"}
    assert means["l2/label"] == pytest.approx(terms.l2["label"][0].item())
    assert means["l2/picture"] == pytest.approx(terms.l2["picture"].mean().item())
    assert means["loss"] == pytest.approx(terms.total.mean().item())


# Presence and observation -------------------------------------------------------------------------------------------

PRESENCE = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize("epsilon_head", [False, True])
@pytest.mark.parametrize("layout", ["own", "shared"])
def test_values_of_a_missing_modality_change_nothing(layout: str, epsilon_head: bool) -> None:
    model, x = picture_and_label(layout, epsilon_head=epsilon_head, steps=1), data(3)
    changed = {"picture": x["picture"].clone(), "label": x["label"].clone()}
    changed["picture"][2] += 5
    changed["label"][1] = (changed["label"][1] + 1) % 3
    visible = torch.ones(3, 2, 4, 4)
    visible[:, 0, :2] = 0
    before, after = (_loss(model, batch, ALL, visible=visible, presence=PRESENCE) for batch in (x, changed))
    assert torch.equal(before.total, after.total)
    assert before.l2["picture"].ne(0).tolist() == [True, True, False]
    assert before.l3["picture"].ne(0).tolist() == [True, True, False]
    assert before.counted["picture"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("layout", ["own", "shared"])
def test_no_gradient_flows_from_a_missing_modality(layout: str, steps: int) -> None:
    model, x = picture_and_label(layout, steps=steps), data(3)
    x["picture"].requires_grad_()
    _loss(model, x, ALL, presence=torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])).total.sum().backward()
    picture, label = (model.modality(name).decoder for name in model.names)
    assert picture.bias.grad.any()
    assert not label.bias.grad.any()  # no sample has a label
    assert x["picture"].grad[:2].flatten(1).any(1).all()
    assert not x["picture"].grad[2].any()


def test_what_is_observed_whole_has_no_loss_and_what_is_observed_in_part_has() -> None:
    visible = torch.zeros(3, 2, 4, 4)
    visible[1] = 1
    visible[2, 0, 0] = 1
    visible[2, 1] = 1
    terms = _loss(picture_and_label(steps=1), data(3), ALL, visible=visible)
    assert terms.counted["picture"].tolist() == [1, 0, 1]
    assert terms.counted["label"].tolist() == [1, 0, 0]
    for term in (terms.l2, terms.l3):
        for name in ("picture", "label"):
            assert term[name].ne(0).tolist() == terms.counted[name].bool().tolist()
    elbo = LossWeights(l1=1.0, l1_time="elbo", l2=0.0)
    whole = _loss(picture_and_label(steps=20), data(3), elbo, visible=torch.ones(3, 2, 4, 4))
    torch.testing.assert_close(whole.l1, torch.zeros(3), rtol=0, atol=1e-9)  # ê = e where all is seen


def test_a_missing_modality_cannot_be_observed() -> None:
    model, x = picture_and_label(), data(3)
    _loss(model, x, ALL, visible=torch.ones(3, 2, 4, 4), presence=PRESENCE)
    shown = model.backbone.shown  # type: ignore[attr-defined]
    assert torch.equal(shown[2][:, :4], torch.cat([PRESENCE, PRESENCE], 1))  # flags of observation, of presence
    assert torch.equal(shown[0][:, -2:].amax((2, 3)), PRESENCE)


def test_a_float64_model_takes_visibility_and_presence_as_they_are_drawn() -> None:
    model = picture_and_label().double()
    x = data(3)
    x["picture"] = x["picture"].double()
    terms = _loss(model, x, ALL, visible=torch.ones(3, 2, 4, 4), presence=PRESENCE)
    assert terms.total.dtype == torch.float64


# The bound ----------------------------------------------------------------------------------------------------------


class _EvenLogSNR(WeightSchedule):
    """log SNR falls in even steps from 9 to −9. Curves with σ_1² ∝ 1/T keep big steps of log SNR next to the data
    however large T is, and with them a gap of about γ/2 = 0.29 nats a dimension; here the gap vanishes as 1/T."""

    @staticmethod
    def retention(steps: int, modalities: int, kind: str) -> Retention:
        alpha_bar = torch.sigmoid(torch.linspace(9, -9, steps, dtype=torch.float64))
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return Retention.from_alphas(alpha_bar / previous, modalities, kind)

    def signal(self, retention: Retention, modalities: int) -> Tensor:
        snr = torch.linspace(9, -9, retention.steps, dtype=torch.float64).exp()
        signal = torch.cat([torch.ones(1, dtype=torch.float64), (snr * retention.variance[1:]).sqrt()])
        return signal[:, None].repeat(1, modalities)


def _gap(kind: str, steps: int, batch: int = 3000) -> float:
    """Mean of the bound − exact −log p(X), with optimal heads and own channels: its standard error is below 0.05."""
    model, joint = gaussian_model(retention=_EvenLogSNR.retention(steps, 3, kind), schedule=_EvenLogSNR())
    x = joint.draw(batch)
    bound = variational_bound(model, x, generator=torch.Generator().manual_seed(0))
    return (bound.nats - joint.nll(x)).mean().item()


def test_the_bound_closes_on_the_exact_likelihood_as_steps_double() -> None:
    coarse, fine = _gap("compensated", 100), _gap("compensated", 200)
    assert 0.6 < fine < 1.2  # nats over five dimensions, of an exact −log p(X) of 6.0
    assert coarse / fine == pytest.approx(2, abs=0.35)  # first order in 1/T
    assert 2 * fine - coarse == pytest.approx(0, abs=0.3)  # extrapolated to T = ∞; five standard errors


def test_the_literal_retention_has_a_looser_bound_that_steps_do_not_close() -> None:
    literal = {steps: _gap("literal", steps, batch=500) for steps in (50, 100)}
    assert literal[50] > 3 * _gap("compensated", 50, batch=500)
    assert literal[100] > 1.8 * literal[50]  # each step forgets 3/4 of z: its KL does not shrink with the step


def test_the_bound_is_what_the_training_terms_estimate() -> None:
    """E[L0 + L1 + Σ L3] of the one-sample training loss is the bound, every weight of time included."""
    model, joint = gaussian_model(steps=6)
    x = joint.draw(6000)
    bound = variational_bound(model, x, generator=torch.Generator().manual_seed(0))
    terms = composite_loss(model, x, generator=torch.Generator().manual_seed(1))
    estimate = terms.l0 + terms.l1 + sum(terms.l3.values())
    error = ((estimate.var() + bound.nats.var()) / 6000).sqrt().item()
    assert error < 0.5  # small beside the bound of about 11 nats
    assert estimate.mean().item() == pytest.approx(bound.nats.mean().item(), abs=5 * error)
    torch.testing.assert_close(terms.l0, bound.l0)


def test_a_bound_from_some_of_the_terms_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 of 39 terms are one of three combs, by the offset drawn; without noise their mean is the whole, exactly."""
    monkeypatch.setattr(mtdiffusion.loss, "standard_normal", lambda like, generator: torch.zeros_like(like))
    model, joint = gaussian_model(steps=40)
    x = joint.draw(10)
    whole = variational_bound(model, x).l1
    combs = [
        variational_bound(model, x, times=13, generator=torch.Generator().manual_seed(seed)).l1 for seed in range(20)
    ]
    distinct = torch.unique(torch.stack(combs), dim=0)
    assert len(distinct) == 3
    torch.testing.assert_close(distinct.mean(0), whole)


def test_the_bound_of_one_step_is_l0_and_l3() -> None:
    bound = variational_bound(picture_and_label(steps=1), data(3), generator=torch.Generator().manual_seed(0))
    assert not bound.l1.any()
    torch.testing.assert_close(bound.nats, bound.l0 + bound.l3["picture"] + bound.l3["label"])


def test_bits_per_dimension_count_the_dimensions_of_all_modalities() -> None:
    bound = variational_bound(picture_and_label(steps=3), data(3), generator=torch.Generator().manual_seed(0))
    assert bound.dims == 64 + 1
    torch.testing.assert_close(bound.bits_per_dim, bound.nats / 65 / math.log(2))


def _times(
    monkeypatch: pytest.MonkeyPatch, model: MultimodalDiffusion, visible: Tensor, weights: LossWeights
) -> Tensor:
    """The times ``[B]`` at which the loss of a batch is taken."""
    times: list[Tensor] = []
    forward = type(model).forward

    def note(self: MultimodalDiffusion, z: Tensor, t: Tensor, *rest: Tensor) -> Prediction:
        times.append(t)
        return forward(self, z, t, *rest)

    monkeypatch.setattr(type(model), "forward", note)
    composite_loss(model, data(len(visible)), weights, visible=visible)
    return times[0]


def test_readouts_are_trained_at_the_last_time_where_something_is_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``readout = 1`` every sample with an observation is taken at t = T, and no other."""
    model = picture_and_label()
    latent = model.layout.latent
    visible = torch.zeros(64, len(model.names), latent.height, latent.width)
    visible[:32, 0] = 1
    t = _times(monkeypatch, model, visible, LossWeights(readout=1.0))
    assert bool((t[:32] == model.process.steps).all())
    assert len(t[32:].unique()) > model.process.steps // 4


def test_readouts_by_name_are_of_samples_that_see_that_modality_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label alone, or a part of the picture, is no reason; the picture is, whatever is seen beside it."""
    model = picture_and_label()
    latent = model.layout.latent
    visible = torch.zeros(256, len(model.names), latent.height, latent.width)
    visible[:64, 0] = 1
    visible[32:128, 1] = 1
    visible[128:192, 0, 0] = 1
    picture, label = model.names
    last = _times(monkeypatch, model, visible, LossWeights(readout={picture: 1.0, label: 0.0})) == model.process.steps
    assert bool(last[:64].all())
    assert not bool(last[64:].float().mean() > 0.2)
    half = _times(monkeypatch, model, visible, LossWeights(readout={label: 0.5})) == model.process.steps
    assert 0.25 < float(half[32:128].float().mean()) < 0.75
    assert float(half[128:].float().mean()) < 0.2


def test_a_readout_of_no_modality_is_refused() -> None:
    model = picture_and_label()
    with pytest.raises(ValueError, match="readout: expected names among picture, label, found sound"):
        composite_loss(model, data(4), LossWeights(readout={"sound": 0.5}))
    with pytest.raises(ValueError, match=r"'readout': expected a share in \[0, 1\], found 1.5"):
        LossWeights(readout={"picture": 1.5})
