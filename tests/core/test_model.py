"""The wiring: where modalities live in the latent, what the backbone is shown, and how tables follow the module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mtdiffusion import (
    DiffusionProcess,
    DirectWeights,
    LatentLayout,
    LatentSpec,
    MultimodalDiffusion,
    Retention,
    SNRMatched,
)
from tests.core.gaussians import gaussian_model
from tests.core.toys import CLASSES, SmallNet, data, picture_and_label


def _shown(model: MultimodalDiffusion) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(model.backbone, SmallNet)
    assert model.backbone.shown is not None
    return model.backbone.shown


def _forward(model: MultimodalDiffusion, visible: Tensor, t: int = 7) -> Tensor:
    """Run the model on data of which ``visible`` is shown; returns z."""
    batch = len(visible)
    z = torch.randn(batch, *model.layout.latent.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(z, torch.full((batch,), t), model.observe(data(batch), visible))
    return z


def test_own_channels_do_not_overlap_and_fill_the_latent() -> None:
    layout = LatentLayout.own({"a": 2, "b": 1, "c": 3}, 4, 5)
    assert layout.latent.shape == (6, 4, 5)
    assert layout.disjoint
    assert [layout.share(name).channels for name in "abc"] == [2, 1, 3]
    total = sum(layout.place(name, torch.ones(1, *layout.share(name).shape)) for name in "abc")
    assert torch.equal(total, torch.ones(1, 6, 4, 5))


def test_shared_channels_are_the_whole_latent_for_all() -> None:
    layout = LatentLayout.shared(["a", "b"], LatentSpec(3, 2, 2))
    assert not layout.disjoint
    assert layout.share("a") == layout.share("b") == layout.latent


def test_channels_that_overlap_in_part_are_not_disjoint() -> None:
    # As many channels as the latent has, counted twice and left out once.
    assert not LatentLayout(LatentSpec(4, 1, 1), {"a": (0, 2), "b": (1, 3)}).disjoint
    assert LatentLayout(LatentSpec(5, 1, 1), {"b": (3, 5), "a": (0, 2)}).disjoint


def test_taking_undoes_placing() -> None:
    layout = LatentLayout.own({"a": 2, "b": 3}, 2, 2)
    code = torch.randn(4, 3, 2, 2)
    assert torch.equal(layout.take("b", layout.place("b", code)), code)
    assert not layout.take("a", layout.place("b", code)).any()


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_encoding_places_every_code_in_its_channels(layout: str) -> None:
    model, x = picture_and_label(layout), data(3)
    codes = model.encode(x)
    assert codes.shape == (3, 2, *model.layout.latent.shape)
    for i, name in enumerate(model.names):
        code = model.modality(name).encoder(x[name])
        assert torch.equal(codes[:, i], model.layout.place(name, code))


@pytest.mark.parametrize("retention", ["compensated", "literal", "rectified_flow"])
@pytest.mark.parametrize("layout", ["own", "shared"])
def test_the_backbone_is_shown_unit_variance_at_every_time(layout: str, retention: str) -> None:
    process = DiffusionProcess.build(Retention.from_curve("cosine", 20, 2, retention), SNRMatched(gains=(1.0, 3.0)), 2)
    model = picture_and_label(layout, process=process)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(4000, 2, *model.layout.latent.shape, generator=generator) * model.owner[:, :, None, None]
    noise = torch.randn(4000, *model.layout.latent.shape, generator=generator)
    presence = torch.ones(4000, 2)
    presence[2000:, 0] = 0  # also where a modality is missing
    for step in (1, 5, 10, 20):
        t = torch.full((4000,), step)
        scaled = process.corrupt(codes, t, noise, presence) * model.input_scale(t, presence).float()
        for half in scaled.chunk(2):
            variance = half.var((0, 2, 3))  # of 2000 × 16 values a channel: 5 σ is 5 √(2/32000) = 0.04
            torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=0.04)


def test_the_backbone_receives_the_shapes_it_was_promised() -> None:
    for layout in ("own", "shared"):
        model = picture_and_label(layout)
        _forward(model, torch.ones(2, 2, 4, 4))
        channels, width = MultimodalDiffusion.backbone_inputs(model.layout, CLASSES)
        z, noise, vector = _shown(model)
        assert z.shape == (2, channels, 4, 4)
        assert noise.shape == (2,)
        assert vector.shape == (2, width)


def test_the_backbone_is_shown_z_then_the_aggregate_then_visibility() -> None:
    model = picture_and_label("shared")
    visible = torch.zeros(2, 2, 4, 4)
    visible[0, 0, :2] = 1
    visible[1, 1] = 1
    z = _forward(model, visible)
    t = torch.full((2,), 7)
    shown, noise, vector = _shown(model)
    codes = model.encode(data(2)) * visible.unsqueeze(2)
    scaled = z * model.input_scale(t, torch.ones(2, 2)).float()
    torch.testing.assert_close(shown, torch.cat([scaled, codes.sum(1), visible], 1))
    torch.testing.assert_close(noise, model.process.noise_level(t).float())
    assert torch.equal(vector[:, :4], torch.tensor([[0.5, 0, 1, 1], [0, 1, 1, 1]]))  # flags, presence


def test_readouts_are_the_matched_filters_of_z_and_of_the_aggregate() -> None:
    model = picture_and_label("own", own_channels=False)
    visible = torch.zeros(2, 2, 4, 4)
    visible[1, 1] = 1
    _forward(model, visible)
    shown, _, vector = _shown(model)
    codebook = model.modality("label").encoder.codes
    of_z, of_aggregate = vector[:, 4:7], vector[:, 7:10]
    torch.testing.assert_close(of_z, torch.einsum("bchw,kchw->bk", shown[:, 4:5], codebook))
    torch.testing.assert_close(of_aggregate, torch.einsum("bchw,kchw->bk", shown[:, 9:10], codebook))
    assert of_aggregate.any(1).tolist() == [False, True]


def test_own_channels_show_the_clean_code_only_where_it_is_seen() -> None:
    model = picture_and_label("own", own_channels=True)
    visible = torch.zeros(1, 2, 4, 4)
    visible[0, 0, :2] = 1
    z = _forward(model, visible)
    shown, codes = _shown(model)[0], model.encode(data(1))
    scaled = z * model.input_scale(torch.tensor([7]), torch.ones(1, 2)).float()
    torch.testing.assert_close(shown[:, :4, :2], codes[:, 0, :4, :2])
    torch.testing.assert_close(shown[:, :4, 2:], scaled[:, :4, 2:])
    torch.testing.assert_close(shown[:, 4], scaled[:, 4])


@pytest.mark.parametrize(("layout", "own_channels"), [("own", False), ("shared", True)])
def test_noisy_channels_stay_where_codes_have_none_of_their_own(layout: str, own_channels: bool) -> None:
    model = picture_and_label(layout, own_channels=own_channels)
    assert not model.own_channels
    z = _forward(model, torch.ones(1, 2, 4, 4))
    scaled = z * model.input_scale(torch.tensor([7]), torch.ones(1, 2)).float()
    torch.testing.assert_close(_shown(model)[0][:, : z.shape[1]], scaled)


@pytest.mark.parametrize("own_channels", [True, False])
def test_a_process_that_ends_in_noise_shows_none_of_it(own_channels: bool) -> None:
    model = picture_and_label(own_channels=own_channels)
    visible = torch.zeros(2, 2, 4, 4)
    visible[0, 0] = 1  # the first sample's picture is observed
    for t, shown in ((20, False), (19, True)):  # T = 20
        z = _forward(model, visible, t)
        scaled, aggregate, _ = _shown(model)[0].split([5, 5, 2], 1)
        unseen = torch.cat([z[1], z[0, 4:]])
        assert bool(torch.cat([scaled[1], scaled[0, 4:]]).any()) == shown
        assert (unseen != 0).all()
        if own_channels:
            assert torch.equal(scaled[0, :4], aggregate[0, :4])


def test_an_epsilon_head_is_shown_the_noise_it_has_to_tell() -> None:
    model = picture_and_label(epsilon_head=True)
    z = _forward(model, torch.zeros(2, 2, 4, 4), 20)
    assert torch.equal(_shown(model)[0][:, :5] != 0, z != 0)


def test_a_process_that_does_not_end_in_noise_shows_z_to_the_last() -> None:
    process = DiffusionProcess.build(Retention.from_curve("linear", 20, 2), DirectWeights(start=1.0), 2)
    assert process.terminal_snr.min() > 1e-3
    model = picture_and_label(process=process)
    z = _forward(model, torch.zeros(2, 2, 4, 4), 20)
    scale = model.input_scale(torch.full((2,), 20), torch.ones(2, 2))
    torch.testing.assert_close(_shown(model)[0][:, :5], z * scale.float())


def test_a_prediction_holds_true_codes_where_seen_and_expected_ones_elsewhere() -> None:
    model, x = picture_and_label("own"), data(2)
    visible = torch.zeros(2, 2, 4, 4)
    visible[:, 0, :2] = 1
    z, t = torch.randn(2, *model.layout.latent.shape), torch.tensor([3, 12])
    prediction = model(z, t, model.observe(x, visible))
    picture, label = (model.modality(name) for name in model.names)
    expected = picture.encoder(prediction.params["picture"]["mean"])
    torch.testing.assert_close(prediction.codes[:, 0, :4, :2], model.encode(x)[:, 0, :4, :2])
    torch.testing.assert_close(prediction.codes[:, 0, :4, 2:], expected[:, :, 2:])
    probabilities = prediction.params["label"]["logits"].softmax(1)
    mixture = sum(probabilities[:, k, None, None, None] * label.encoder.codes[k] for k in range(CLASSES))
    torch.testing.assert_close(prediction.codes[:, 1, 4:], mixture)
    torch.testing.assert_close(prediction.epsilon, model.process.epsilon(z, prediction.codes, t))


def test_an_epsilon_head_is_a_head_of_its_own() -> None:
    model = picture_and_label("own", epsilon_head=True)
    assert model.epsilon_head is not None
    torch.nn.init.constant_(model.epsilon_head.bias, 0.25)
    z, t = torch.randn(1, *model.layout.latent.shape), torch.tensor([3])
    prediction = model(z, t, model.observe({}, torch.zeros(1, 2, 4, 4)))
    torch.testing.assert_close(prediction.epsilon, torch.full_like(z, 0.25))


def test_tables_stay_float64_when_the_module_changes_type() -> None:
    model = picture_and_label().half()
    assert model.owner.dtype == torch.float16
    assert model.process.signal_table.dtype == model.process.log_alpha_bar.dtype == torch.float64


def test_tables_follow_the_module_to_another_device() -> None:
    model = picture_and_label().to("meta")
    assert model.process.signal_table.device.type == model.process.log_alpha_bar.device.type == "meta"
    assert model.process.signal_table.dtype == torch.float64


def test_a_copy_of_a_model_predicts_the_same() -> None:
    model = picture_and_label()
    z, t = torch.randn(1, *model.layout.latent.shape), torch.tensor([3])
    nothing = model.observe({}, torch.zeros(1, 2, 4, 4))
    assert torch.equal(model(z, t, nothing).codes, copy.deepcopy(model)(z, t, nothing).codes)


def test_the_state_holds_no_tables() -> None:
    assert not [key for key in picture_and_label().state_dict() if "owner" in key or "process" in key]


def test_parts_that_do_not_belong_together_are_refused() -> None:
    model = picture_and_label()
    parts = {name: model.modality(name) for name in model.names}
    three = DiffusionProcess.build(Retention.from_curve(steps=5), SNRMatched(), 3)
    with pytest.raises(ValueError, match="a process of 3 modalities do not belong together"):
        MultimodalDiffusion(parts, model.backbone, three, model.layout)
    swapped = dict(reversed(parts.items()))
    with pytest.raises(ValueError, match=r"modalities \['label', 'picture'\], layout \['picture', 'label'\]"):
        MultimodalDiffusion(swapped, model.backbone, model.process, model.layout)


def test_visibility_shows_the_observed_whole_unless_a_map_says_less() -> None:
    model, x = picture_and_label(), data(2)
    seen = torch.zeros(2, 8, 8)
    seen[:, :4] = 1
    assert model.visibility(2, x).mean((2, 3)).tolist() == [[1.0, 1.0]] * 2
    assert model.visibility(2, {"label": x["label"]}).mean((2, 3)).tolist() == [[0.0, 1.0]] * 2
    in_part = model.visibility(2, x, {"picture": seen})
    assert in_part[:, 0].mean((1, 2)).tolist() == [0.5, 0.5]
    assert in_part[:, 0, :2].all()


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


@pytest.mark.parametrize(("layout", "own_channels"), [("own", False), ("own", True), ("shared", False)])
def test_the_oracle_s_heads_are_the_conditional_mean_of_the_truth(layout: str, own_channels: bool) -> None:
    """The exact backbone against regression: on data, E[x_i | z_t, c] leaves errors uncorrelated with z_t and c."""
    model, joint = gaussian_model(layout, own_channels=own_channels, steps=20)
    x = joint.draw(20_000)
    codes = model.encode(x)
    z_noise = torch.randn(codes[:, 0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.full((20_000,), 8)
    z = model.process.corrupt(codes, t, z_noise)
    visible = torch.zeros(20_000, 3, 1, 2, dtype=torch.float64)
    visible[:, 1] = 1
    observation = model.observe(x, visible)
    prediction = model(z, t, observation)
    shown = torch.cat([z.flatten(1), observation.aggregate.flatten(1)], 1)
    for name in ("pose", "sound"):
        error = x[name] - prediction.params[name]["mean"]
        assert error.mean(0).abs().max() < 5 * error.std() / 20_000**0.5
        covariance = (shown - shown.mean(0)).T @ error / 20_000
        assert covariance.abs().max() < 5 * shown.std(0).max() * error.std() / 20_000**0.5
        tril = prediction.params[name]["tril"][0]
        torch.testing.assert_close(error.T @ error / 20_000, tril @ tril.T, rtol=0, atol=0.02)
