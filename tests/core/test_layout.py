"""Where codes meet, and what a backbone is shown of a diffusion space: side by side, and one upon another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtdiffusion import (
    DirectWeights,
    LatentSpec,
    Layout,
    MultimodalDiffusion,
    Observation,
    OwnLayout,
    Retention,
    SharedLayout,
    SNRMatched,
)
from mtdiffusion.layout import noise_level
from tests.core.toys import CLASSES, SmallNet, data, picture_and_label

T = 20
FREQUENCIES = 8


def _shown(model: MultimodalDiffusion) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(model.backbone, SmallNet)
    assert model.backbone.shown is not None
    return model.backbone.shown


def _seen(batch: int, *, places: bool = True) -> Tensor:
    """Nothing seen ``[B, N, h, w]`` of the picture and the label."""
    return torch.zeros(batch, 2, 4, 4) if places else torch.zeros(batch, 2, 1, 1)


def _forward(model: MultimodalDiffusion, seen: Tensor, t: Tensor | int = 7, presence: Tensor | None = None) -> Tensor:
    """Run the model on z_t of data of which ``seen`` is shown, all else at t; returns z."""
    batch, x = len(seen), data(len(seen))
    t = torch.as_tensor(t).expand(batch, 2)[:, :, None, None]
    clocks = model.layout.clocks(t, seen)
    noise = model.noise(batch, torch.Generator().manual_seed(0))
    z = model.process.corrupt(model.encode(x), clocks, noise, presence)
    with torch.no_grad():
        model(z, clocks, model.observe(x, seen), presence)
    return z


# Places -------------------------------------------------------------------------------------------------------------


def test_own_channels_do_not_overlap_and_fill_the_latent() -> None:
    layout = OwnLayout({"a": 2, "b": 1, "c": 3}, 4, 5)
    assert layout.names == ("a", "b", "c")
    assert layout.latent == LatentSpec(6, 4, 5)
    assert not layout.shared_clock
    assert [layout.share(name) for name in "abc"] == [LatentSpec(c, 4, 5) for c in (2, 1, 3)]
    codes = {name: torch.full((1, *layout.share(name).shape), float(i)) for i, name in enumerate("abc", 1)}
    z = layout.meet(torch.ones(1, 3, 1, 1), codes)
    assert z[0, :, 0, 0].tolist() == [1, 1, 2, 3, 3, 3]
    for name in "abc":
        assert torch.equal(layout.take(name, z), codes[name])


def test_shared_channels_are_the_whole_latent_for_all_and_codes_add_up() -> None:
    layout = SharedLayout(("a", "b"), LatentSpec(3, 2, 2))
    assert layout.names == ("a", "b")
    assert layout.shared_clock
    assert layout.share("a") == layout.share("b") == layout.latent
    a, b = torch.randn(2, 4, 3, 2, 2)
    z = layout.meet(torch.tensor([[2.0, -1.0]])[:, :, None, None], {"b": b, "a": a})
    torch.testing.assert_close(z, 2 * a - b)
    assert layout.take("b", z) is z


def test_values_by_modality_apply_to_its_channels_place_by_place() -> None:
    layout = OwnLayout({"a": 2, "b": 1}, 1, 2)
    values = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    assert torch.equal(layout.spread(values)[0, :, 0], torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]))
    codes = {"a": torch.ones(1, 2, 1, 2), "b": 10 * torch.ones(1, 1, 1, 2)}
    assert layout.meet(values, codes)[0, :, 0].tolist() == [[1, 2], [1, 2], [30, 40]]
    shared = SharedLayout(("a", "b"), LatentSpec(2, 1, 2))
    assert shared.spread(torch.full((1, 2, 1, 1), 7)).item() == 7


@pytest.mark.parametrize("places", [False, True], ids=["whole", "over places"])
@pytest.mark.parametrize("layout", [OwnLayout({"a": 2, "b": 1}, 1, 2), SharedLayout(("a", "b"), LatentSpec(3, 1, 2))])
def test_what_is_scaled_or_added_is_what_spread_values_make_of_it(layout: Layout, places: bool) -> None:
    weights, gains = torch.randn(2, 4, 2, 1, 2 if places else 1, dtype=torch.float64)
    if layout.shared_clock:
        gains = gains[:, :1].expand(-1, 2, -1, -1)
    codes = {name: torch.randn(4, *layout.share(name).shape, dtype=torch.float64) for name in "ab"}
    z = torch.randn(4, *layout.latent.shape, dtype=torch.float64)
    torch.testing.assert_close(layout.scaled(gains, z), layout.spread(gains) * z, rtol=1e-15, atol=0)
    both = layout.meet(weights, codes, (gains, z))
    torch.testing.assert_close(both, layout.meet(weights, codes) + layout.spread(gains) * z, rtol=1e-14, atol=1e-15)
    assert layout.scaled(gains, z.float()).dtype == torch.float32, "values are rounded to z's dtype, not z widened"
    with pytest.raises(ValueError, match="diffusion space"):
        layout.scaled(gains, z.long())


def test_what_is_seen_is_at_clock_0_where_there_is_a_clock_for_it() -> None:
    t, seen = torch.tensor([[5, 9]])[:, :, None, None], _seen(1)
    seen[0, 0, :2] = 1
    clocks = OwnLayout({"a": 2, "b": 1}, 4, 4).clocks(t, seen)
    assert clocks.shape == (1, 2, 4, 4)
    assert clocks[0, 0].tolist() == [[0] * 4] * 2 + [[5] * 4] * 2
    assert (clocks[0, 1] == 9).all()
    assert SharedLayout(("a", "b"), LatentSpec(2, 4, 4)).clocks(t, seen) is t


def test_placing_puts_the_signal_and_the_rest_where_a_modality_is_seen_and_leaves_all_else() -> None:
    layout = OwnLayout({"a": 2, "b": 1}, 1, 2)
    z, rest = torch.randn(2, 3, 1, 2), torch.randn(2, 3, 1, 2)
    codes = {"a": torch.randn(2, 2, 1, 2)}
    seen = torch.zeros(2, 2, 1, 2)
    seen[0, 0, 0, 0] = 1
    seen[1, 0] = 1
    signal = torch.tensor([[0.5, 9.0]])[:, :, None, None]
    for noise in (None, rest):
        placed = layout.place(z, Observation(codes, seen), signal, noise)
        known = 0.5 * codes["a"] + (0 if noise is None else noise[:, :2])
        torch.testing.assert_close(placed[0, :2, :, 0], known[0, :, :, 0])
        torch.testing.assert_close(placed[1, :2], known[1])
        assert torch.equal(placed[0, :2, :, 1], z[0, :2, :, 1])
        assert torch.equal(placed[:, 2], z[:, 2])
    shared = SharedLayout(("a", "b"), LatentSpec(3, 1, 2))
    assert shared.place(z, Observation({"a": rest}, seen), signal) is z


# What is shown ------------------------------------------------------------------------------------------------------

layouts = pytest.mark.parametrize(("layout", "show_clean"), [("own", False), ("own", True), ("shared", False)])


@layouts
def test_the_backbone_receives_the_shapes_it_was_promised(layout: str, show_clean: bool) -> None:
    model = picture_and_label(layout, show_clean=show_clean)
    channels, width = model.layout.inputs(CLASSES)
    clock = 2 * FREQUENCIES + 1  # sines, cosines and the mean level, by modality
    assert (channels, width) == {
        ("own", False): (5 + 2, 2 * clock + CLASSES),
        ("own", True): (10 + 2, 2 * clock + 2 * CLASSES),
        ("shared", False): (8 + 2, 4 + 2 * CLASSES),
    }[layout, show_clean]
    for places in (True, False):
        _forward(model, _seen(3, places=places))
        z, noise, vector = _shown(model)
        assert z.shape == (3, channels, 4, 4)
        assert noise.shape == (3,)
        assert vector.shape == (3, width)


@pytest.mark.parametrize("retention", ["compensated", "literal", "rectified_flow"])
@pytest.mark.parametrize("layout", ["own", "shared"])
def test_the_backbone_is_shown_unit_variance_at_every_time(layout: str, retention: str) -> None:
    model = picture_and_label(
        layout, retention=Retention.from_curve("cosine", T, 2, retention), schedule=SNRMatched(gains=(1.0, 3.0))
    )
    generator = torch.Generator().manual_seed(0)
    codes = {
        name: torch.randn(4000, *model.layout.share(name).shape, generator=generator) for name in model.layout.names
    }
    noise = torch.randn(4000, *model.layout.latent.shape, generator=generator)
    presence = torch.ones(4000, 2)
    presence[2000:, 0] = 0  # also where a modality is missing
    for step in (1, 5, 10, T - 1):
        t = torch.full((4000, 2), step)
        if layout == "own":
            t[2000:, 0] = T  # what is missing is at T
            t[:, 1] = T - step
        z = model.process.corrupt(codes, t, noise, presence)
        with torch.no_grad():
            model(z, t, None, presence)
        for i, half in enumerate(_shown(model)[0][:, : z.shape[1]].chunk(2)):
            variance = half.var((0, 2, 3))  # of 2000 × 16 values a channel: 5 σ is 5 √(2/32000) = 0.04
            expected = torch.ones_like(variance)
            if layout == "own" and i == 1:
                expected[:4] = 0  # missing, and not shown
            torch.testing.assert_close(variance, expected, rtol=0, atol=0.04)


def test_own_channels_show_z_and_the_level_of_each_modality_at_each_place() -> None:
    model = picture_and_label("own")
    seen = _seen(2)
    seen[0, 0, :2] = 1
    seen[1, 1] = 1
    z = _forward(model, seen, torch.tensor([7, 12]))
    shown, noise, vector = _shown(model)
    process, codes = model.process, model.encode(data(2))
    clocks = torch.tensor([[7, 12]])
    level = noise_level(process.signal(clocks), process.variance(clocks))[0].float()
    scaled, levels = shown.split([5, 2], 1)
    torch.testing.assert_close(scaled, z)  # compensated and of one curve: of unit variance as it is
    torch.testing.assert_close(scaled[0, :4, :2], codes["picture"][0, :, :2])  # the clean code where it is seen
    torch.testing.assert_close(scaled[1, 4:], codes["label"][1])
    torch.testing.assert_close(levels, level[None, :, None, None] * (1 - seen))
    # The vector: sines and cosines of what is not seen of each, and the mean level.
    rest = torch.stack([level, level * torch.tensor([1.0, 0.0])])
    torch.testing.assert_close(noise, rest.amax(1))
    angles = math.pi * rest[:, :, None] * 2.0 ** torch.arange(FREQUENCIES)
    sines, cosines, mean, readout = vector.split([2 * FREQUENCIES, 2 * FREQUENCIES, 2, CLASSES], 1)
    torch.testing.assert_close(sines, angles.sin().flatten(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(cosines, angles.cos().flatten(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean, levels.mean((2, 3)))
    codebook = model.modality("label").encoder.codes
    torch.testing.assert_close(readout, torch.einsum("bchw,kchw->bk", scaled[:, 4:], codebook))


def test_the_clean_code_is_shown_a_second_time_if_asked_and_only_where_it_is_seen() -> None:
    model = picture_and_label("own", show_clean=True)
    seen = _seen(2)
    seen[0, 0, :2] = 1
    seen[1, 1] = 1
    z = _forward(model, seen)
    shown, _, vector = _shown(model)
    codes = model.encode(data(2))
    scaled, clean, _ = shown.split([5, 5, 2], 1)
    torch.testing.assert_close(scaled, z)
    expected = torch.zeros_like(z)
    expected[0, :4, :2] = codes["picture"][0, :, :2]
    expected[1, 4:] = codes["label"][1]
    torch.testing.assert_close(clean, expected)
    of_z, of_clean = vector[:, -2 * CLASSES :].split(CLASSES, 1)
    codebook = model.modality("label").encoder.codes
    torch.testing.assert_close(of_z, torch.einsum("bchw,kchw->bk", scaled[:, 4:], codebook))
    torch.testing.assert_close(of_clean, torch.einsum("bchw,kchw->bk", clean[:, 4:], codebook))
    assert of_clean.any(1).tolist() == [False, True]


def test_shared_channels_show_z_then_the_aggregate_then_visibility() -> None:
    model = picture_and_label("shared")
    seen = _seen(2)
    seen[0, 0, :2] = 1
    seen[1, 1] = 1
    z = _forward(model, seen)
    shown, noise, vector = _shown(model)
    codes = model.encode(data(2))
    scaled, aggregate, visible = shown.split([4, 4, 2], 1)
    t = torch.tensor([[7, 7]])
    signal, variance = model.process.signal(t)[0], model.process.variance(t)[0, 0]
    torch.testing.assert_close(scaled, z * (signal.square().sum() + variance).rsqrt().float())
    sums = codes["picture"] * seen[:, :1] + codes["label"] * seen[:, 1:]
    torch.testing.assert_close(aggregate, sums)
    assert torch.equal(visible, seen)
    torch.testing.assert_close(noise, noise_level(signal[0], variance).float().expand(2))
    flags, presence, of_z, of_aggregate = vector.split([2, 2, CLASSES, CLASSES], 1)
    assert flags.tolist() == [[0.5, 0], [0, 1]]
    assert presence.tolist() == [[1, 1], [1, 1]]
    codebook = model.modality("label").encoder.codes
    torch.testing.assert_close(of_z, torch.einsum("bchw,kchw->bk", scaled, codebook))
    torch.testing.assert_close(of_aggregate, torch.einsum("bchw,kchw->bk", aggregate, codebook))


def test_in_shared_channels_the_level_does_not_tell_what_is_missing_but_a_flag_does() -> None:
    model = picture_and_label("shared")
    levels = []
    for presence in (torch.ones(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])):
        _forward(model, _seen(2), presence=presence)
        levels.append(_shown(model)[1])
        assert torch.equal(_shown(model)[2][:, 2:4], presence)
    torch.testing.assert_close(levels[0], levels[1])


def test_in_own_channels_what_is_missing_is_as_what_is_not_seen_at_the_end_of_its_clock() -> None:
    model = picture_and_label("own")
    z = _forward(model, _seen(1), torch.tensor([T, 7]), torch.tensor([[0.0, 1.0]]))
    missing = _shown(model)
    assert z[:, :4].all()
    assert not missing[0][:, :4].any()
    torch.testing.assert_close(missing[0][:, 4], z[:, 4])
    _forward(model, _seen(1), torch.tensor([T, 7]))
    for tensor, unseen in zip(missing, _shown(model), strict=True):
        torch.testing.assert_close(tensor, unseen)


@layouts
def test_a_process_that_ends_in_noise_shows_none_of_it(layout: str, show_clean: bool) -> None:
    model = picture_and_label(layout, show_clean=show_clean)
    assert model.process.ends_in_noise
    seen = _seen(2)
    seen[0, 0] = 1  # the first sample's picture is observed
    for t, is_shown in ((T, False), (T - 1, True)):
        z = _forward(model, seen, t)
        scaled = _shown(model)[0][:, : z.shape[1]]
        unseen = scaled.flatten() if layout == "shared" else torch.cat([scaled[1].flatten(), scaled[0, 4:].flatten()])
        assert bool(unseen.any()) == is_shown
        assert z.all()
        if layout == "own":
            torch.testing.assert_close(scaled[0, :4], model.encode(data(2))["picture"][0])


def test_an_epsilon_head_is_shown_the_noise_it_has_to_tell() -> None:
    for layout in ("own", "shared"):
        model = picture_and_label(layout, epsilon_head=True)
        z = _forward(model, _seen(2), T)
        scaled = _shown(model)[0][:, : z.shape[1]]
        torch.testing.assert_close(scaled, z, rtol=1e-3, atol=1e-3)


def test_a_process_that_does_not_end_in_noise_shows_z_to_the_last() -> None:
    retention = Retention.from_curve("linear", T, 2)
    model = picture_and_label(retention=retention, schedule=DirectWeights(start=1.0))
    assert model.process.terminal_snr.min() > 1e-3
    assert not model.process.ends_in_noise
    z = _forward(model, _seen(2), T)
    t = torch.tensor([[T, T]])
    scale = (model.process.signal(t).square() + model.process.variance(t)).rsqrt()[0, 0].float()
    torch.testing.assert_close(_shown(model)[0][:, :5], z * scale)


@layouts
def test_what_a_sample_shows_does_not_depend_on_the_rest_of_its_batch(layout: str, show_clean: bool) -> None:
    """Sample 0 is seen whole or not at all, sample 1 in part, sample 2 lacks its label."""
    model, x = picture_and_label(layout, show_clean=show_clean), data(3)
    seen = _seen(3)
    seen[0, 1] = 1
    seen[1, 0, 2:] = 1
    presence = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    t = torch.tensor([[9, 9], [15, 15], [4, T if layout == "own" else 4]])[:, :, None, None]
    z = model.noise(3, torch.Generator().manual_seed(0))
    z = model.process.corrupt(model.encode(x), model.layout.clocks(t, seen), z, presence)

    def shown(rows: slice, seen: Tensor) -> tuple[Tensor, ...]:
        batch = {name: values[rows] for name, values in x.items()}
        with torch.no_grad():
            clocks = model.layout.clocks(t[rows], seen)
            model(z[rows], clocks, model.observe(batch, seen), presence[rows])
        return _shown(model)

    together = shown(slice(0, 3), seen)
    for i in range(3):
        rows = slice(i, i + 1)
        alone = seen[rows] if i == 1 else seen[rows, :, :1, :1]  # no map where none is needed
        for whole, part in zip(together, shown(rows, alone), strict=True):
            torch.testing.assert_close(whole[rows], part)
