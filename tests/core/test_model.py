"""The wiring: encoding, observing, predicting, paths, and how tables follow the module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mtdiffusion import (
    ClockLaw,
    DiffusionProcess,
    EdgesAndDiagonal,
    IndependentClocks,
    LossWeights,
    MixedClocks,
    MultimodalDiffusion,
    OffsetClocks,
    OwnLayout,
    Retention,
    SamplerSettings,
    SharedClock,
    SNRMatched,
    composite_loss,
    sample,
    variational_bound,
)
from tests.core.gaussians import gaussian_model
from tests.core.toys import CLASSES, SmallNet, data, picture_and_label


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_a_code_is_as_large_as_what_it_holds(layout: str) -> None:
    model, x = picture_and_label(layout), data(3)
    codes = model.encode(x)
    assert list(codes) == model.names == ["picture", "label"]
    for name, code in codes.items():
        assert code.shape == (3, *model.layout.share(name).shape)
        assert torch.equal(code, model.modality(name).encoder(x[name]))


def test_observing_encodes_what_is_seen_of_what_is_given() -> None:
    model, x = picture_and_label(), data(2)
    seen = torch.zeros(2, 2, 4, 4)
    seen[:, 0, :2] = 1
    observation = model.observe({"picture": x["picture"]}, seen)
    assert list(observation.codes) == ["picture"]
    torch.testing.assert_close(observation.codes["picture"], model.encode(x)["picture"] * seen[:, :1])
    assert observation.seen is seen
    whole = model.observe(x, torch.ones(2, 2, 1, 1))
    for name, code in model.encode(x).items():
        assert torch.equal(whole.codes[name], code)


def test_a_prediction_holds_true_codes_where_seen_and_expected_ones_elsewhere() -> None:
    model, x = picture_and_label("own"), data(2)
    seen = torch.zeros(2, 2, 4, 4)
    seen[:, 0, :2] = 1
    z, t = torch.randn(2, *model.layout.latent.shape), torch.tensor([[3, 3], [12, 5]])
    observation = model.observe(x, seen)
    clocks = model.layout.clocks(t[:, :, None, None], seen)
    heads = model(z, clocks, observation)
    assert heads.epsilon is None
    prediction = model.complete(heads, z, clocks, observation)
    assert prediction.params is heads.params
    picture, label = (model.modality(name) for name in model.names)
    expected = picture.encoder(prediction.params["picture"]["mean"])
    torch.testing.assert_close(prediction.codes["picture"][:, :, :2], model.encode(x)["picture"][:, :, :2])
    torch.testing.assert_close(prediction.codes["picture"][:, :, 2:], expected[:, :, 2:])
    probabilities = prediction.params["label"]["logits"].softmax(1)
    mixture = sum(probabilities[:, k, None, None, None] * label.encoder.codes[k] for k in range(CLASSES))
    torch.testing.assert_close(prediction.codes["label"], mixture)
    torch.testing.assert_close(prediction.epsilon, model.process.epsilon(z, prediction.codes, clocks))


def test_an_epsilon_head_is_a_head_of_its_own() -> None:
    model = picture_and_label("own", epsilon_head=True)
    assert model.epsilon_head is not None
    torch.nn.init.constant_(model.epsilon_head.bias, 0.25)
    z, t = torch.randn(1, *model.layout.latent.shape), torch.tensor([[3, 3]])
    prediction = model.complete(model(z, t), z, t)
    torch.testing.assert_close(prediction.epsilon, torch.full_like(z, 0.25))


def test_tables_stay_float64_when_the_module_changes_type() -> None:
    model = picture_and_label().half()
    assert model.dtype == torch.float16
    assert model.process.signal_table.dtype == model.process.log_alpha_bar.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_a_model_is_of_16_32_or_64_bits_of_floating_point(dtype: torch.dtype) -> None:
    model = picture_and_label()
    with pytest.raises(ValueError, match=f"a model's dtype: expected float16, .* or float64, found {dtype}"):
        model.to(dtype)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_any_precision_takes_data_as_they_come(dtype: torch.dtype) -> None:
    model, x = picture_and_label().to(dtype), data(3)
    assert {code.dtype for code in model.encode(x).values()} == {dtype}
    assert model.observe(x, torch.ones(3, 2, 1, 1)).codes["picture"].dtype == dtype
    settings = SamplerSettings(3)
    generated = sample(model, 3, observed={"label": x["label"]}, settings=settings)["picture"]
    label = sample(model, 3, observed={"picture": x["picture"]}, strength={"picture": 0.5}, settings=settings)["label"]
    assert generated.dtype == dtype and label.dtype == torch.int64
    terms = composite_loss(model, x, LossWeights(1.0, 1.0, 1.0, 1.0))
    widest = torch.float64 if dtype == torch.float64 else torch.float32  # nats are sums of many squares
    assert {value.dtype for value in (terms.total, terms.l0, terms.l1)} == {widest}  # type: ignore[union-attr]
    assert variational_bound(model, x, times=2).nats.dtype == widest


def test_a_backbone_is_told_the_noise_level_in_single_precision_at_least() -> None:
    for layout in ("own", "shared"):
        model = picture_and_label(layout).bfloat16()
        z = torch.randn(1, *model.layout.latent.shape, dtype=torch.bfloat16)
        levels = []
        for t in (10, 11):
            model(z, torch.tensor([[t, t]]))
            assert isinstance(model.backbone, SmallNet) and model.backbone.shown is not None
            map, noise, vector = model.backbone.shown
            assert (map.dtype, noise.dtype, vector.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
            levels.append(float(noise))
        exact = model.process.standing(torch.tensor([[10, 10]]))
        assert layout == "shared" or abs(levels[0] - float(exact.level.amax())) < 1e-6
        assert levels[0] < levels[1]


def test_tables_follow_the_module_to_another_device() -> None:
    model = picture_and_label().to("meta")
    assert model.device.type == "meta"
    assert model.process.signal_table.device.type == model.process.log_alpha_bar.device.type == "meta"
    assert model.process.signal_table.dtype == torch.float64


def test_noise_has_the_model_s_shape_and_type_and_comes_from_the_generator() -> None:
    model = picture_and_label().double()
    noise = model.noise(3, torch.Generator().manual_seed(1))
    expected = torch.randn(3, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise, expected)


def test_a_copy_of_a_model_predicts_the_same() -> None:
    model = picture_and_label()
    z, t = torch.randn(1, *model.layout.latent.shape), torch.tensor([[3, 3]])
    found, of_copy = (each(z, t).params["label"]["logits"] for each in (model, copy.deepcopy(model)))
    assert torch.equal(found, of_copy)


def test_the_state_holds_weights_and_codebooks_alone() -> None:
    prefixes = {key.split(".")[0] for key in picture_and_label(epsilon_head=True).state_dict()}
    assert prefixes == {"modalities", "backbone", "epsilon_head"}


def test_parts_that_do_not_belong_together_are_refused() -> None:
    model = picture_and_label()
    parts = {name: model.modality(name) for name in model.names}
    other = OwnLayout({"picture": 4, "label": 1, "sound": 1}, 4, 4)
    three = DiffusionProcess.build(Retention.from_curve(steps=5), SNRMatched(), other)
    with pytest.raises(
        ValueError, match=r"layout \['picture', 'label', 'sound'\] and a process of 3 modalities do not"
    ):
        MultimodalDiffusion(parts, model.backbone, three)
    swapped = dict(reversed(parts.items()))
    with pytest.raises(ValueError, match=r"modalities \['label', 'picture'\], layout \['picture', 'label'\]"):
        MultimodalDiffusion(swapped, model.backbone, model.process)


@pytest.mark.parametrize("law", [IndependentClocks(), MixedClocks(), OffsetClocks((0.0, 0.3)), EdgesAndDiagonal()])
def test_a_law_of_several_clocks_needs_channels_for_each(law: ClockLaw) -> None:
    assert picture_and_label("own", law=law).law is law
    with pytest.raises(ValueError, match=f"{type(law).__name__}: in a shared layout codes overlap"):
        picture_and_label("shared", law=law)


def test_one_shared_clock_is_the_law_if_none_is_given() -> None:
    assert picture_and_label("own").law == picture_and_label("shared").law == SharedClock()


# Visibility ---------------------------------------------------------------------------------------------------------


def test_visibility_shows_the_observed_whole_unless_a_map_says_less() -> None:
    model, x = picture_and_label(), data(2)
    seen = torch.zeros(2, 8, 8)
    seen[:, :4] = 1
    assert model.visibility(2, x).tolist() == [[[[1.0]], [[1.0]]]] * 2
    assert model.visibility(2, {"label": x["label"]}).tolist() == [[[[0.0]], [[1.0]]]] * 2
    in_part = model.visibility(2, x, {"picture": seen})
    assert in_part.shape == (2, 2, 4, 4)
    assert in_part[:, 0].mean((1, 2)).tolist() == [0.5, 0.5]
    assert in_part[:, 0, :2].all()
    assert in_part[:, 1].all()


@pytest.mark.parametrize(
    ("observed", "name", "shape", "message"),
    [
        (("picture", "label"), "label", (2, 8, 8), "'label', but it cannot be observed in part"),
        (("label",), "picture", (2, 8, 8), "'picture', but it is not among the observed"),
        (("picture",), "pictrue", (2, 8, 8), "'pictrue', but it is not among the observed"),
        (("picture",), "picture", (2, 7, 8), "multiples of 4 and 4"),
        (("picture",), "picture", (1, 8, 8), "expected a batch of 2, found 1"),
    ],
)
def test_a_map_that_cannot_be_is_refused(
    observed: tuple[str, ...], name: str, shape: tuple[int, ...], message: str
) -> None:
    x = data(2)
    with pytest.raises(ValueError, match=message):
        picture_and_label().visibility(2, {n: x[n] for n in observed}, {name: torch.ones(shape)})


# Paths --------------------------------------------------------------------------------------------------------------


def test_a_path_is_the_law_s_unless_offsets_or_the_path_itself_are_given() -> None:
    model = picture_and_label(law=OffsetClocks((0.0, 0.5)))  # T = 20
    of_law = model.path()
    assert of_law.shape == (31, 2)  # T steps for each modality
    assert torch.equal(of_law[:11, 0], torch.full((11,), 20))
    assert torch.equal(of_law[:, 1] == 0, torch.arange(31) >= 20)
    assert torch.equal(model.path(ahead={"label": 0.5}), of_law)
    assert torch.equal(model.path(ahead={}), torch.arange(20, -1, -1)[:, None].expand(-1, 2))
    assert torch.equal(model.path(4, {}), torch.tensor([20, 15, 10, 5, 0])[:, None].expand(-1, 2))
    assert model.path(6).shape == (7, 2)
    given = torch.tensor([[20, 20], [3, 19], [0, 0]])
    assert torch.equal(model.path(path=given), given)
    assert torch.equal(picture_and_label(law=IndependentClocks()).path(), model.path(ahead={}))


@pytest.mark.parametrize("layout", ["own", "shared"])
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"ahead": {"lable": 0.5}}, "path: no modality named lable; this model has picture, label"),
        ({"ahead": {"label": -0.1}}, r"path: expected shares of T from 0, found \[0.0, -0.1\]"),
        ({"ahead": {"label": float("inf")}}, "path: expected shares of T from 0"),
        ({"ahead": {"label": float("nan")}}, "path: expected shares of T from 0"),
        (
            {"path": torch.tensor([[20], [0]])},
            r"expected integer clocks \[steps \+ 1, 2\].* found torch.int64 \[2, 1\]",
        ),
        ({"path": torch.tensor([[20.0, 20.0], [0.0, 0.0]])}, "expected integer clocks.* found torch.float32"),
        ({"path": torch.tensor([[19, 19], [0, 0]])}, "clocks that fall from T = 20 to 0 and never rise"),
    ],
)
def test_a_path_that_cannot_be_is_refused(layout: str, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        picture_and_label(layout).path(**request_)


@pytest.mark.parametrize("request_", [{"ahead": {"label": 0.3}}, {"path": torch.tensor([[20, 20], [20, 10], [0, 0]])}])
def test_a_shared_layout_has_one_clock(request_: dict[str, Any]) -> None:
    model = picture_and_label("shared")
    with pytest.raises(ValueError, match="in a shared layout all modalities have one clock"):
        model.path(**request_)
    assert model.path(ahead={"picture": 0.3, "label": 0.3}).shape == (21, 2)  # one clock in other words
    assert picture_and_label("own").path(**request_)[-1].tolist() == [0, 0]


# The oracle of the other tests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "clocks"), [("own", (8, 8, 8)), ("own", (8, 3, 15)), ("own", (20, 8, 1)), ("shared", (8, 8, 8))]
)
def test_the_oracle_s_heads_are_the_conditional_mean_of_the_truth(layout: str, clocks: tuple[int, ...]) -> None:
    """The exact backbone against regression: on data, E[x_i | z, what is seen] leaves errors uncorrelated with both."""
    model, joint = gaussian_model(layout, steps=20)
    x = joint.draw(20_000)
    codes = model.encode(x)
    seen = torch.zeros(20_000, 3, 1, 1, dtype=torch.float64)
    seen[:, 1] = 1
    t = model.layout.clocks(torch.tensor(clocks)[None, :, None, None], seen)
    z = model.process.corrupt(codes, t, model.noise(20_000, torch.Generator().manual_seed(1)))
    params = model(z, t, model.observe(x, seen)).params
    shown = torch.cat([z.flatten(1), codes["depth"].flatten(1)], 1)
    for name in ("pose", "sound"):
        error = x[name] - params[name]["mean"]
        assert error.mean(0).abs().max() < 5 * error.std() / 20_000**0.5
        covariance = (shown - shown.mean(0)).T @ error / 20_000
        assert covariance.abs().max() < 5 * shown.std(0).max() * error.std() / 20_000**0.5
        tril = params[name]["tril"][0]
        torch.testing.assert_close(error.T @ error / 20_000, tril @ tril.T, rtol=0, atol=0.02)
