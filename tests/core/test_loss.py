"""The four terms against torch.distributions, masks and gradients, and the bound against the exact −log p(X)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import mtdiffusion.model
from mtdiffusion import (
    ClockLaw,
    DiffusionProcess,
    DirectWeights,
    Draws,
    Heads,
    IndependentClocks,
    LatentSpec,
    Layout,
    LossTerms,
    LossWeights,
    MultimodalDiffusion,
    OffsetClocks,
    OwnLayout,
    Prediction,
    Retention,
    SharedLayout,
    SNRMatched,
    TargetSignal,
    WeightSchedule,
    composite_loss,
    variational_bound,
)
from mtdiffusion.clocks import stratified
from mtdiffusion.loss import prior_kl, snr_weight, transition_kl
from tests.core.gaussians import gaussian_model
from tests.core.toys import PictureDecoder, data, picture_and_label

TINY = {"rtol": 1e-10, "atol": 1e-10}
STEPS = 10
NAMES = ("a", "b", "c")


def _process(schedule: WeightSchedule, kind: str, layout: str) -> DiffusionProcess:
    space: Layout
    if layout == "shared":
        space = SharedLayout(NAMES, LatentSpec(2, 2, 1))
    else:
        space = OwnLayout({"a": 2, "b": 1, "c": 1}, 2, 1)
    return DiffusionProcess.build(Retention.from_curve("cosine", STEPS, 3, kind), schedule, space)


def _tensors(process: DiffusionProcess, batch: int = 4) -> tuple[Tensor, dict[str, Tensor], Prediction]:
    """z, codes, and a prediction that is wrong about both codes and noise."""
    generator = torch.Generator().manual_seed(0)
    layout = process.layout

    def draw(latent: LatentSpec) -> Tensor:
        return torch.randn(batch, *latent.shape, generator=generator, dtype=torch.float64)

    codes, estimated = ({name: draw(layout.share(name)) for name in NAMES} for _ in range(2))
    return draw(layout.latent), codes, Prediction({}, estimated, draw(layout.latent))


def _clocks(process: DiffusionProcess, *, one_step: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Pairs of clocks 0 < s < t ``[4, 3, 1, 1]``, each modality's own if the layout gives it one."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(6):
        s = torch.randint(1, STEPS, (4, 3, 1, 1), generator=generator)
        t = s + 1 + ((STEPS - s) * torch.rand(s.shape, generator=generator)).long() * (not one_step)
        pairs.append((t[:, :1].expand_as(t), s[:, :1].expand_as(s)) if process.layout.shared_clock else (t, s))
    return pairs


PRESENT = torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]])

processes = pytest.mark.parametrize("kind", ["compensated", "literal", "rectified_flow"])
schedules = pytest.mark.parametrize(
    "schedule", [SNRMatched(), DirectWeights(start=0.5)], ids=["snr_matched", "constant"]
)
layouts = pytest.mark.parametrize("layout", ["own", "shared"])


# L0 and L1 in closed form -------------------------------------------------------------------------------------------


@processes
@schedules
@layouts
def test_l0_is_the_kl_of_the_last_marginal_and_the_prior(schedule: WeightSchedule, kind: str, layout: str) -> None:
    process = _process(schedule, kind, layout)
    _, codes, _ = _tensors(process)
    t = torch.full((4, 3), STEPS)
    mean = process.mean(codes, t, PRESENT)
    last = Normal(mean, process.variance(t[0, 0]).sqrt().expand_as(mean))
    expected = kl_divergence(last, Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(prior_kl(process, codes, PRESENT), expected, **TINY)


@processes
@schedules
@layouts
def test_l1_from_codes_is_the_kl_of_the_two_posteriors(schedule: WeightSchedule, kind: str, layout: str) -> None:
    process = _process(schedule, kind, layout)
    z, codes, prediction = _tensors(process)
    for t, s in _clocks(process):
        scale = process.layout.spread(process.posterior_variance(t, s)).sqrt()
        q = Normal(process.posterior_mean(z, codes, t, s, PRESENT), scale)
        p = Normal(process.posterior_mean(z, prediction.codes, t, s, PRESENT), scale)
        found = transition_kl(process, z, codes, prediction, t, s, PRESENT)
        torch.testing.assert_close(found, kl_divergence(q, p).sum((1, 2, 3)), **TINY)
        assert found[2] == 0  # nothing is there, so nothing can be wrong


@processes
@schedules
@layouts
def test_l1_from_an_epsilon_head_is_the_kl_to_the_paper_s_mean(
    schedule: WeightSchedule, kind: str, layout: str
) -> None:
    process = _process(schedule, kind, layout)
    z, codes, prediction = _tensors(process)
    for t, s in _clocks(process, one_step=True):
        a = torch.exp(process.log_alpha_bar[t] - process.log_alpha_bar[s])
        entering = process.layout.meet(process.weight_table[t, torch.arange(3)[:, None, None]], prediction.codes)
        a, now, scale = (
            process.layout.spread(v) for v in (a, process.variance(t), process.posterior_variance(t, s).sqrt())
        )
        mu = (z - (1 - a) / now.sqrt() * prediction.epsilon) / a.sqrt() - entering
        q = Normal(process.posterior_mean(z, codes, t, s), scale)
        found = transition_kl(process, z, codes, prediction, t, s, derived_epsilon=False)
        torch.testing.assert_close(found, kl_divergence(q, Normal(mu, scale)).sum((1, 2, 3)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("derived", [True, False])
def test_l1_of_several_clocks_is_the_sum_over_the_modalities_that_move(derived: bool) -> None:
    """One that stays has none, and one that arrives at 0 has L3 instead; the others' is not changed by either."""
    process = _process(SNRMatched(), "compensated", "own")
    z, codes, wrong = _tensors(process)
    t = torch.tensor([[7, 4, 9], [7, 4, 9], [7, 0, 1], [0, 0, 0]])[:, :, None, None]
    s = torch.tensor([[3, 2, 8], [3, 4, 0], [7, 0, 0], [0, 0, 0]])[:, :, None, None]

    def alone(i: int, row: int) -> Tensor:
        """The KL of one modality, the others standing still."""
        only = t.clone()
        only[:, i] = s[:, i]
        return transition_kl(process, z, codes, wrong, t, only, derived_epsilon=derived)[row]

    found = transition_kl(process, z, codes, wrong, t, s, derived_epsilon=derived)
    torch.testing.assert_close(found[0], alone(0, 0) + alone(1, 0) + alone(2, 0))
    torch.testing.assert_close(found[1], alone(0, 1))
    assert found[:2].all()
    assert not found[2:].any()


@layouts
@pytest.mark.parametrize("derived", [True, False])
def test_l1_is_0_into_data_and_for_a_perfect_prediction(derived: bool, layout: str) -> None:
    process = _process(SNRMatched(), "compensated", layout)
    z, codes, wrong = _tensors(process)
    for t, s in _clocks(process):
        into_data = transition_kl(process, z, codes, wrong, t, torch.zeros_like(t), derived_epsilon=derived)
        assert not into_data.any()
        perfect = Prediction({}, codes, process.epsilon(z, codes, t))
        found = transition_kl(process, z, codes, perfect, t, s, derived_epsilon=derived)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-20)


@layouts
@pytest.mark.parametrize("derived", [True, False])
def test_l1_of_what_is_missing_is_0_and_has_no_gradient(derived: bool, layout: str) -> None:
    process = _process(SNRMatched(), "compensated", layout)
    z, codes, wrong = _tensors(process)
    epsilon = wrong.epsilon.clone().requires_grad_()
    prediction = Prediction({}, wrong.codes, epsilon)
    for t, s in _clocks(process):
        kl = transition_kl(process, z, codes, prediction, t, s, PRESENT, derived_epsilon=derived)
        assert kl.ne(0).tolist() == [True, True, False, True]
    if not derived:
        kl.sum().backward()
        moved = epsilon.grad.ne(0).flatten(2).any(2).tolist()  # channels of a, a, b, c
        if layout == "own":
            assert moved == [[True] * 4, [True, True, False, True], [False] * 4, [False, False, True, False]]
        else:
            assert moved == [[True] * 2, [True] * 2, [False] * 2, [True] * 2]


@layouts
@pytest.mark.parametrize("derived", [True, False])
def test_l1_has_finite_gradients_where_a_clock_arrives_at_0_or_is_there(derived: bool, layout: str) -> None:
    process = _process(SNRMatched(), "compensated", layout)
    z, codes, wrong = _tensors(process)
    # In float32, whose tiny stands in for β̃ = 0.
    estimated = {name: (100 * code).float().requires_grad_() for name, code in wrong.codes.items()}
    epsilon = wrong.epsilon.float().requires_grad_()
    t = torch.tensor([1, 0, 2, 3])[:, None, None, None].expand(4, 3, 1, 1)
    kl = transition_kl(
        process,
        z.float(),
        {name: code.float() for name, code in codes.items()},
        Prediction({}, estimated, epsilon),
        t,
        (t - 1).clamp(min=0),
        derived_epsilon=derived,
    )
    kl.sum().backward()
    for tensor in [*estimated.values(), *([] if derived else [epsilon])]:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert not tensor.grad[:2].any()
        assert tensor.grad[2:].flatten(1).any(1).all()


# The training loss --------------------------------------------------------------------------------------------------


def _loss(model: MultimodalDiffusion, x: dict[str, Tensor], weights: LossWeights, **given: Tensor) -> LossTerms:
    batch = len(next(iter(x.values())))
    return composite_loss(model, x, weights, draws=Draws.of(model, batch, torch.Generator().manual_seed(0)), **given)


class _Watch:
    """What the network is asked in a loss: z ``[B, C, H, W]`` and the clocks ``[B, N, h, w]``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: MultimodalDiffusion) -> None:
        self.z = self.clocks = torch.zeros(0)
        forward = type(model).forward

        def note(asked: MultimodalDiffusion, z: Tensor, t: Tensor, *rest: Any) -> Heads:
            self.z, self.clocks = z, t
            return forward(asked, z, t, *rest)

        monkeypatch.setattr(type(model), "forward", note)

    @property
    def last(self) -> Tensor:
        """The clock ``[B]`` of what is seen least of each sample."""
        return self.clocks.amax((1, 2, 3))


@frozen
class _At(ClockLaw):
    """The same clocks for every sample."""

    clocks: tuple[float, ...]

    def draw(self, batch: int, modalities: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.tensor(self.clocks, dtype=torch.float64).expand(batch, modalities)


ALL = LossWeights(l0=1.0, l1=1.0, l2=1.0, l3=1.0)


@layouts
@pytest.mark.parametrize("epsilon_head", [False, True])
@pytest.mark.parametrize("l1_time", ["snr", "elbo"])
def test_every_term_stays_per_sample(layout: str, epsilon_head: bool, l1_time: str) -> None:
    model = picture_and_label(layout, epsilon_head=epsilon_head, steps=3)
    terms = _loss(model, data(6), LossWeights(1.0, 1.0, 1.0, 1.0, l1_time=l1_time))  # type: ignore[arg-type]
    for per_modality in (terms.l2, terms.l3, terms.counted):
        assert list(per_modality) == ["picture", "label"]
    for term in (terms.total, terms.l0, terms.l1, *terms.l2.values(), *terms.l3.values(), *terms.counted.values()):
        assert term is not None
        assert term.shape == (6,)
        assert term.isfinite().all()


def test_the_total_is_the_weighted_sum_of_its_terms() -> None:
    model, x = picture_and_label(steps=3), data(6)
    model.modality("label").loss_weight = 0.25
    latent_dims, dims = model.layout.latent.numel, {"picture": 64, "label": 1}
    weights = LossWeights(l0=0.3, l1=0.5, l2=2.0, l3=0.7, l1_time="elbo")
    terms = _loss(model, x, weights)
    assert terms.l0 is not None
    assert terms.l1 is not None
    expected = (0.3 * terms.l0 + 0.5 * terms.l1) / latent_dims
    expected = expected + 2.0 * (terms.l2["picture"] + 0.25 * terms.l2["label"])
    expected = expected + 0.7 * sum(terms.l3[name] / dims[name] for name in dims)
    torch.testing.assert_close(terms.total, expected)


def test_the_default_loss_is_the_heads_objective_alone() -> None:
    terms = composite_loss(picture_and_label(), data(6))
    torch.testing.assert_close(terms.total, terms.l2["picture"] + terms.l2["label"])


def test_a_term_that_does_not_count_is_not_computed_and_changes_no_other() -> None:
    model, x = picture_and_label(steps=3), data(6)
    every = _loss(model, x, ALL)
    default = _loss(model, x, LossWeights())
    assert (default.l0, default.l1, default.l3) == (None, None, {})
    assert set(default.sums()) == {"loss", "l2/picture", "l2/label"}
    for name in model.names:
        assert torch.equal(default.l2[name], every.l2[name])
    for term in ("l0", "l1"):
        alone = _loss(model, x, LossWeights(l2=0.0, **{term: 1.0}))
        assert torch.equal(getattr(alone, term), getattr(every, term))
    alone = _loss(model, x, LossWeights(l2=0.0, l3=1.0))
    assert all(torch.equal(alone.l3[name], every.l3[name]) for name in model.names)


def test_snr_clamps_weigh_a_modality_s_objective_over_its_own_clock() -> None:
    model, x = picture_and_label(law=IndependentClocks()), data(20)
    model.modality("picture").snr_clamp = (0.5, 4.0)
    model.modality("label").snr_clamp = (0.0, 2.0)
    terms = _loss(model, x, LossWeights())
    drawn = model.law.draw(20, 2, torch.Generator().manual_seed(0))  # the loss draws its clocks first
    snr = model.process.snr((drawn * 20).ceil().long())
    scale = [snr[:, 0].clamp(0.5, 4.0).float(), snr[:, 1].clamp(0.0, 2.0).float()]
    assert scale[0].unique().numel() > 3
    torch.testing.assert_close(terms.total, scale[0] * terms.l2["picture"] + scale[1] * terms.l2["label"])
    assert torch.equal(snr_weight(torch.tensor([0.1, 2.0, 9.0]), (0.5, 4.0)), torch.tensor([0.5, 2.0, 4.0]))


@layouts
@pytest.mark.parametrize("clamp", [(0.0, math.inf), (0.05, 5.0), (1.0, 1.0)])
def test_snr_weighted_l1_is_a_clamped_error_of_epsilon(
    monkeypatch: pytest.MonkeyPatch, layout: str, clamp: tuple[float, float]
) -> None:
    """With equal gains it is ½ clamp(SNR_t) of the squared error of the codes where they meet, a latent dimension:
    finite where the SNR vanishes."""
    law = IndependentClocks() if layout == "own" else None
    model, x = picture_and_label(layout, law=law), data(20)
    watch = _Watch(monkeypatch, model)
    terms = _loss(model, x, LossWeights(l1=1.0, l2=0.0, l1_clamp=clamp, readout=0.0))
    z, t = watch.z, watch.clocks
    codes, found = model.encode(x), model.complete(model(z, t), z, t).codes
    wrong = {name: codes[name] - found[name] for name in model.names}
    error = model.layout.meet(torch.ones(1, 2, 1, 1), wrong).square()
    weight = model.layout.spread(model.process.snr(t).clamp(*clamp))
    expected = 0.5 * (weight * error).mean((1, 2, 3))
    torch.testing.assert_close(terms.total, expected.float(), rtol=1e-3, atol=1e-6)  # theirs: a float32 difference of z


def test_a_signal_that_reaches_0_leaves_the_loss_finite() -> None:
    model = picture_and_label(retention=Retention.from_curve(steps=4), schedule=TargetSignal((1.0, 0.0)))
    assert _loss(model, data(8), ALL).total.isfinite().all()


def test_l3_is_the_likelihood_at_the_first_time_scaled_up() -> None:
    model, x = picture_and_label(steps=4, law=IndependentClocks()), data(40)
    terms = _loss(model, x, ALL)
    t = (model.law.draw(40, 2, torch.Generator().manual_seed(0)) * 4).ceil()
    assert (t[:, 0] != t[:, 1]).any()
    for i, (name, dims) in enumerate((("picture", 64), ("label", 1))):
        expected = torch.where(t[:, i] == 1, 4 * dims * terms.l2[name], 0)  # here the objective is nll / dims
        torch.testing.assert_close(terms.l3[name], expected)


def test_sums_count_the_samples_that_an_objective_counts_for() -> None:
    model, x = picture_and_label(), data(4)
    presence = torch.tensor([[1.0, 1], [1, 0], [1, 0], [1, 0]])
    terms = _loss(model, x, ALL, presence=presence)
    sums = terms.sums()
    assert set(sums) == {"loss", "l0", "l1", "l2/picture", "l2/label", "l3/picture", "l3/label"}
    assert sums["l2/label"].tolist() == pytest.approx([terms.l2["label"][0].item(), 1])
    assert sums["l2/picture"].tolist() == pytest.approx([terms.l2["picture"].sum().item(), 4])
    assert sums["l3/label"][1] == 4
    assert sums["loss"].tolist() == pytest.approx([terms.total.sum().item(), 4])
    assert not sums["loss"].requires_grad


# Presence, observation and clocks at 0 ------------------------------------------------------------------------------

PRESENCE = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize("epsilon_head", [False, True])
@pytest.mark.parametrize(("layout", "show_clean"), [("own", False), ("own", True), ("shared", False)])
def test_values_of_a_missing_modality_change_nothing(layout: str, show_clean: bool, epsilon_head: bool) -> None:
    model, x = picture_and_label(layout, show_clean=show_clean, epsilon_head=epsilon_head, steps=1), data(3)
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


@pytest.mark.parametrize("epsilon_head", [False, True])
@layouts
def test_the_loss_of_what_is_there_is_of_the_same_size_without_the_rest(layout: str, epsilon_head: bool) -> None:
    """A missing modality's channels are pure noise, of which an ε head is asked nothing."""
    model, x = picture_and_label(layout, epsilon_head=epsilon_head, steps=1000), data(64)
    weights = LossWeights(l1=1.0, l2=0.0, readout=0.0)
    whole = _loss(model, x, weights).total.mean().item()
    presence = torch.tensor([1.0, 0.0]).expand(64, -1)
    assert 0.1 * whole < _loss(model, x, weights, presence=presence).total.mean().item() < 2 * whole


@pytest.mark.parametrize("steps", [1, 20])
@layouts
def test_no_gradient_flows_from_a_missing_modality(layout: str, steps: int) -> None:
    model, x = picture_and_label(layout, steps=steps), data(3)
    x["picture"].requires_grad_()
    _loss(model, x, ALL, presence=torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])).total.sum().backward()
    picture, label = (model.modality(name).decoder for name in model.names)
    assert picture.bias.grad.any()
    assert not label.bias.grad.any()  # no sample has a label
    assert x["picture"].grad[:2].flatten(1).any(1).all()
    assert not x["picture"].grad[2].any()


@layouts
def test_a_missing_modality_is_at_the_end_of_its_own_clock_and_leaves_a_shared_one_alone(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    model, x = picture_and_label(layout), data(3)
    watch = _Watch(monkeypatch, model)
    _loss(model, x, LossWeights(), presence=PRESENCE)
    t = (stratified(3, torch.Generator().manual_seed(0)) * 20).ceil().long()
    assert (t < 20).all()
    if layout == "own":
        expected = torch.where(PRESENCE > 0, t[:, None], 20)
    else:
        expected = t[:, None].expand(-1, 2)
    assert torch.equal(watch.clocks[:, :, 0, 0], expected)
    # What is in z of a sample is its modalities at their clocks, and noise of that clock.
    generator = torch.Generator().manual_seed(0)
    stratified(3, generator), torch.rand(3, generator=generator)  # what is drawn before
    noise = model.noise(3, generator)
    codes = model.encode(x)
    for row, clock in enumerate(t.tolist()):
        signal, variance = model.process.signal_table[clock], model.process.variance(t[row])
        if layout == "shared":
            kept = sum(PRESENCE[row, i] * signal[i] * codes[name][row] for i, name in enumerate(model.names))
            torch.testing.assert_close(watch.z[row], (kept + variance.sqrt() * noise[row]).float())
        elif not PRESENCE[row, 1]:
            torch.testing.assert_close(watch.z[row, 4:], noise[row, 4:])


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


@layouts
def test_nothing_is_left_to_lose_where_all_is_observed(layout: str) -> None:
    elbo = LossWeights(l1=1.0, l1_time="elbo", l2=0.0)
    whole = _loss(picture_and_label(layout), data(3), elbo, visible=torch.ones(3, 2, 4, 4))
    assert whole.l1 is not None
    torch.testing.assert_close(whole.l1, torch.zeros(3), rtol=0, atol=1e-9)  # ê = e where all is seen


@pytest.mark.parametrize("epsilon_head", [False, True])
def test_a_modality_whose_clock_is_drawn_at_0_is_seen_and_has_no_loss(
    monkeypatch: pytest.MonkeyPatch, epsilon_head: bool
) -> None:
    model, x = picture_and_label(epsilon_head=epsilon_head, law=_At((0.05, 0.0))), data(5)
    watch = _Watch(monkeypatch, model)
    x["picture"].requires_grad_()
    terms = _loss(model, x, ALL)
    assert watch.clocks.flatten(1).tolist() == [[1, 0]] * 5
    torch.testing.assert_close(watch.z[:, 4:], model.encode(x)["label"])
    assert not terms.counted["label"].any()
    assert terms.counted["picture"].all()
    for term in (terms.l2, terms.l3):
        assert not term["label"].any()
        assert term["picture"].all()
    assert terms.l1 is not None
    assert not terms.l1.any()  # the picture's step into data is L3's, and the label takes none
    terms.total.sum().backward()
    assert not model.modality("label").decoder.bias.grad.any()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert x["picture"].grad.isfinite().all()


def test_a_clock_law_reaches_each_modality_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    model = picture_and_label(law=OffsetClocks((0.0, 0.5)))
    watch = _Watch(monkeypatch, model)
    terms = _loss(model, data(90), LossWeights())
    t = watch.clocks[:, :, 0, 0]
    expected = (model.law.draw(90, 2, torch.Generator().manual_seed(0)) * 20).ceil().long()
    assert torch.equal(t, expected)
    assert (t[:, 1] == 0).sum() == 30  # a third of the way the label is there
    assert torch.equal(terms.counted["label"] == 0, t[:, 1] == 0)


@layouts
def test_a_missing_modality_cannot_be_observed(layout: str) -> None:
    model, x = picture_and_label(layout), data(3)
    _loss(model, x, ALL, visible=torch.ones(3, 2, 4, 4), presence=PRESENCE)
    shown = model.backbone.shown  # type: ignore[attr-defined]
    if layout == "own":  # noise levels: as of what is not seen at t = T
        model(model.noise(1), torch.tensor([[20, 20]]))
        last = model.backbone.shown[0][:, -2:, :1, :1]  # type: ignore[attr-defined]
        torch.testing.assert_close(shown[0][:, -2:], (last * (1 - PRESENCE)[:, :, None, None]).expand(-1, -1, 4, 4))
    else:  # visibility, flags of observation and of presence
        assert torch.equal(shown[0][:, -2:], PRESENCE[:, :, None, None].expand(-1, -1, 4, 4))
        assert torch.equal(shown[2][:, :4], torch.cat([PRESENCE, PRESENCE], 1))


def test_a_float64_model_takes_visibility_and_presence_as_they_are_drawn() -> None:
    model = picture_and_label().double()
    x = data(3)
    x["picture"] = x["picture"].double()
    terms = _loss(model, x, ALL, visible=torch.ones(3, 2, 4, 4), presence=PRESENCE)
    assert terms.total.dtype == torch.float64


@layouts
def test_readouts_are_trained_at_the_last_time_where_something_is_observed(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """With ``readout = 1`` all else of every sample with an observation is taken at t = T, and of no other."""
    model = picture_and_label(layout)
    watch = _Watch(monkeypatch, model)
    visible = torch.zeros(64, 2, 4, 4)
    visible[:16, 0] = 1
    visible[16:32, 0, 0] = 1
    composite_loss(model, data(64), LossWeights(readout=1.0), visible=visible)
    assert bool((watch.last[:32] == model.process.steps).all())
    assert len(watch.last[32:].unique()) > model.process.steps // 4
    if layout == "own":
        assert torch.equal(watch.clocks[:32] == 0, visible[:32] > 0)


def test_readouts_by_name_are_of_samples_that_see_that_modality_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label alone, or a part of the picture, is no reason; the picture is, whatever is seen beside it."""
    model = picture_and_label("shared")  # whose clock goes on where all is seen
    watch = _Watch(monkeypatch, model)
    visible = torch.zeros(256, 2, 4, 4)
    visible[:64, 0] = 1
    visible[32:128, 1] = 1
    visible[128:192, 0, 0] = 1
    picture, label = model.names
    composite_loss(model, data(256), LossWeights(readout={picture: 1.0, label: 0.0}), visible=visible)
    last = watch.last == model.process.steps
    assert bool(last[:64].all())
    assert not bool(last[64:].float().mean() > 0.2)
    composite_loss(model, data(256), LossWeights(readout={label: 0.5}), visible=visible)
    half = watch.last == model.process.steps
    assert 0.25 < float(half[32:128].float().mean()) < 0.75
    assert float(half[128:].float().mean()) < 0.2


def test_a_readout_of_no_modality_is_refused() -> None:
    model = picture_and_label()
    with pytest.raises(ValueError, match="readout: expected names among picture, label, found sound"):
        composite_loss(model, data(4), LossWeights(readout={"sound": 0.5}))
    with pytest.raises(ValueError, match=r"'readout': expected a share in \[0, 1\], found 1.5"):
        LossWeights(readout={"picture": 1.5})


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


def _gaps(kind: str, steps: int, batch: int, ahead: dict[str, float] | None = None) -> Tensor:
    """Bound − exact −log p(X) of each sample ``[batch]``, with optimal heads and own channels."""
    model, joint = gaussian_model(retention=_EvenLogSNR.retention(steps, 3, kind), schedule=_EvenLogSNR())
    x = joint.draw(batch)
    path = model.path(None, ahead)
    return variational_bound(model, x, path=path, generator=torch.Generator().manual_seed(0)).nats - joint.nll(x)


def _gap(kind: str, steps: int, batch: int = 3000) -> float:
    """The mean: its standard error is below 0.05 at 3,000 samples."""
    return _gaps(kind, steps, batch).mean().item()


def test_the_bound_closes_on_the_exact_likelihood_as_steps_double() -> None:
    coarse, fine = _gap("compensated", 100), _gap("compensated", 200)
    assert 0.6 < fine < 1.2  # nats over five dimensions, of an exact −log p(X) of 6.0
    assert coarse / fine == pytest.approx(2, abs=0.35)  # first order in 1/T
    assert 2 * fine - coarse == pytest.approx(0, abs=0.3)  # extrapolated to T = ∞; five standard errors


def test_the_literal_retention_has_a_looser_bound_that_steps_do_not_close() -> None:
    literal = {steps: _gap("literal", steps, batch=500) for steps in (50, 100)}
    assert literal[50] > 3 * _gap("compensated", 50, batch=500)
    assert literal[100] > 1.8 * literal[50]  # each step forgets 3/4 of z: its KL does not shrink with the step


def test_along_any_path_the_bound_is_one_and_with_perfect_heads_nearly_the_same() -> None:
    paths: dict[str, dict[str, float]] = {
        "shared": {},
        "offset": {"depth": 0.3, "sound": 0.6},
        "sequential": {"depth": 1.0, "sound": 2.0},
    }
    batch = 400
    gaps = {name: _gaps("compensated", 100, batch, ahead) for name, ahead in paths.items()}
    error = {name: (gap.std() / batch**0.5).item() for name, gap in gaps.items()}
    for name, gap in gaps.items():
        assert error[name] < 0.15
        assert gap.mean().item() > 5 * error[name]  # above the exact −log p(X), beyond any doubt
        apart = gap.mean().item() - gaps["shared"].mean().item()
        assert abs(apart) < 5 * (error[name] + error["shared"])


def test_the_bound_goes_along_the_law_s_path_if_none_is_given() -> None:
    model, joint = gaussian_model(steps=10, law=OffsetClocks((0.0, 0.3, 0.6)))
    x = joint.draw(5)
    found, along, shared = (
        variational_bound(model, x, path=path, generator=torch.Generator().manual_seed(0))
        for path in (None, model.path(None, {"depth": 0.3, "sound": 0.6}), model.path(None, {}))
    )
    assert torch.equal(found.nats, along.nats)
    assert not torch.isclose(found.nats, shared.nats).any()
    torch.testing.assert_close(found.l0, shared.l0)  # the end in noise is the same by any path


def test_a_bound_along_no_path_is_refused() -> None:
    model, joint = gaussian_model("shared", steps=10)
    with pytest.raises(ValueError, match="in a shared layout all modalities have one clock"):
        variational_bound(model, joint.draw(2), path=torch.tensor([[10, 10, 10], [5, 4, 3], [0, 0, 0]]))
    with pytest.raises(ValueError, match="never rise"):
        variational_bound(model, joint.draw(2), path=torch.tensor([[10, 10, 10], [5, 5, 5]]))


def test_the_bound_is_what_the_training_terms_estimate() -> None:
    """E[L0 + L1 + Σ L3] of the one-sample training loss is the bound, every weight of time included."""
    model, joint = gaussian_model(steps=6)
    x = joint.draw(6000)
    bound = variational_bound(model, x, generator=torch.Generator().manual_seed(0))
    terms = composite_loss(model, x, ALL, draws=Draws.of(model, 6000, torch.Generator().manual_seed(1)))
    assert terms.l0 is not None
    assert terms.l1 is not None
    estimate = terms.l0 + terms.l1 + sum(terms.l3.values())
    error = ((estimate.var() + bound.nats.var()) / 6000).sqrt().item()
    assert error < 0.5  # small beside the bound of about 11 nats
    assert estimate.mean().item() == pytest.approx(bound.nats.mean().item(), abs=5 * error)
    torch.testing.assert_close(terms.l0, bound.l0)


@pytest.mark.parametrize(
    ("ahead", "times"),
    # A third of the steps between arrivals: of 39 with one clock, and of 60 − 3 with several.
    [({}, 13), ({"depth": 0.25, "sound": 0.5}, 19)],
    ids=["shared", "offset"],
)
def test_a_bound_from_some_of_the_terms_is_unbiased(
    monkeypatch: pytest.MonkeyPatch, ahead: dict[str, float], times: int
) -> None:
    """A third of the terms is one of three combs, by the offset drawn; without noise their mean is the whole."""
    monkeypatch.setattr(mtdiffusion.model, "standard_normal", lambda like, generator: torch.zeros_like(like))
    model, joint = gaussian_model(steps=40)
    x = joint.draw(10)
    path = model.path(None, ahead)
    whole = variational_bound(model, x, path=path)
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    combs = [
        variational_bound(model, x, path=path, times=times, generator=torch.Generator().manual_seed(seed))
        for seed in range(20)
    ]
    assert len(calls) == 20 * (times + (3 if ahead else 1))  # and each arrival
    distinct = torch.unique(torch.stack([comb.l1 for comb in combs]), dim=0)
    assert len(distinct) == 3
    torch.testing.assert_close(distinct.mean(0), whole.l1)
    for name in joint.dims:
        torch.testing.assert_close(combs[0].l3[name], whole.l3[name])


def test_the_bound_of_one_step_is_l0_and_l3() -> None:
    bound = variational_bound(picture_and_label(steps=1), data(3), generator=torch.Generator().manual_seed(0))
    assert not bound.l1.any()
    torch.testing.assert_close(bound.nats, bound.l0 + bound.l3["picture"] + bound.l3["label"])


def test_bits_per_dimension_count_the_dimensions_of_all_modalities() -> None:
    bound = variational_bound(picture_and_label(steps=3), data(3), generator=torch.Generator().manual_seed(0))
    assert bound.dims.tolist() == [64 + 1] * 3
    torch.testing.assert_close(bound.bits_per_dim, bound.nats / 65 / math.log(2))


class HalfBlank(PictureDecoder):
    """A picture whose pixels count where they are not 9."""

    def dims_of(self, x: Tensor) -> Tensor:
        return (x != 9).flatten(1).sum(1)


def test_samples_may_have_different_numbers_of_dimensions() -> None:
    model, x = picture_and_label(steps=3), data(3)
    decoder = model.modality("picture").decoder
    decoder.__class__ = HalfBlank
    x["picture"][0, :, :4] = 9  # half of it
    x["picture"][1] = 9
    bound = variational_bound(model, x, generator=torch.Generator().manual_seed(0))
    assert bound.dims.tolist() == [32 + 1, 0 + 1, 64 + 1]
    torch.testing.assert_close(bound.bits_per_dim, bound.nats / torch.tensor([33.0, 1.0, 65.0]) / math.log(2))
    params = {"mean": torch.zeros_like(x["picture"])}
    torch.testing.assert_close(
        decoder.objective(params, x["picture"]), decoder.nll(params, x["picture"]) / torch.tensor([32.0, 1.0, 64.0])
    )
    terms = _loss(model, x, LossWeights(l2=0, l3=1))
    per_dimension = terms.l3["picture"] / torch.tensor([32.0, 1.0, 64.0]) + terms.l3["label"]
    torch.testing.assert_close(terms.total, per_dimension)
