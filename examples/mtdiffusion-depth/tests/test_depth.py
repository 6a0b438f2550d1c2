import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mtdiffusion_depth import DepthConfig, DepthModality
from PIL import Image
from torch import Tensor

from mtdiffusion import FeatureSpec, LatentSpec
from mtdiffusion_registry import Registry
from mtdiffusion_registry.testing import check_modality

CONFIG = DepthConfig(height=16, width=16)


def scenes(count: int = 16, missing: float = 0.1) -> Tensor:
    """Floors that recede, each with a box that stands on it, and a share of the pixels not measured."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.linspace(1, 0.2, 16)[:, None].expand(16, 16)
    depth = (1 + torch.rand(count, 1, 1, 1, generator=draw)) / rows.flip(0)
    for scene in depth:
        top, left = torch.randint(0, 9, (2,), generator=draw).tolist()
        scene[:, top : top + 7, left : left + 7] = 1 + torch.rand(1, generator=draw)
    return depth * (torch.rand(depth.shape, generator=draw) > missing)


def build(config: DepthConfig = CONFIG) -> DepthModality:
    modality = config.build(LatentSpec(4, 8, 8), FeatureSpec(16, 8, 8, 32))
    assert isinstance(modality, DepthModality)
    return modality


def params(batch: int, location: float = 0.3, log_scale: float = -0.7) -> dict[str, Tensor]:
    return {
        "location": torch.full((batch, 1, 16, 16), location),
        "log_scale": torch.full((batch, 1, 16, 16), log_scale),
    }


def test_contract() -> None:
    # The kit compares whole codes, and what a head says of pixels that were not measured is nothing it has learned.
    check_modality(CONFIG, examples=scenes(missing=0.02))


def test_it_is_installed() -> None:
    assert Registry.discover().config_class("modality", "depth").kind == "depth"


def test_the_likelihood_is_a_density_over_metres() -> None:
    one = DepthConfig(height=1, width=1, low=0.001, high=65.0)
    decoder = one.build(LatentSpec(1, 1, 1), FeatureSpec(4, 1, 1, 4)).decoder
    metres = torch.linspace(0.002, 65, 400_000, dtype=torch.float64)
    p = {name: value[..., :1, :1].double() for name, value in params(len(metres)).items()}
    density = torch.exp(-decoder.nll(p, metres.reshape(-1, 1, 1, 1)))
    assert torch.trapezoid(density, metres).item() == pytest.approx(1, abs=1e-3)


def test_pixels_without_a_measurement_count_for_nothing() -> None:
    decoder, x = build().decoder, scenes(4)
    p = params(4)
    moved = {**p, "location": torch.where(x > 0, p["location"], 7.0)}
    assert torch.equal(decoder.nll(moved, x), decoder.nll(p, x))
    assert torch.equal(decoder.objective(moved, x), decoder.objective(p, x))
    assert not decoder.nll(p, torch.zeros_like(x)).any() and not decoder.objective(p, torch.zeros_like(x)).any()


def test_the_scale_is_learned_as_the_mean_absolute_error() -> None:
    decoder, x = build().decoder, scenes()
    u = CONFIG.standardise(x)[x > 0]
    best = (u - 0.3).abs().mean().log().item()
    at, beside = (decoder.nll(params(len(x), log_scale=s), x).sum() for s in (best, best + 0.1))
    assert at < beside
    assert at < decoder.nll(params(len(x), log_scale=best - 0.1), x).sum()


def test_samples_follow_the_distribution() -> None:
    modality = build()
    p = params(500, location=0.0)
    u = CONFIG.standardise(modality.decoder.sample(p, torch.Generator().manual_seed(0)))
    scale = math.exp(-0.7)
    assert u.abs().mean().item() == pytest.approx(scale, rel=0.02)  # of a Laplace
    assert (u.abs() > 3 * scale).double().mean().item() == pytest.approx(math.exp(-3), rel=0.05)


def test_metrics_ignore_what_the_truth_has_not_measured() -> None:
    truth = torch.tensor([[2.0, 4.0, 0.0, 8.0]]).reshape(1, 1, 2, 2)
    generated = torch.tensor([[2.2, 6.0, 5.0, 8.0]]).reshape(1, 1, 2, 2)
    found = build().metrics(generated, truth)
    assert found == pytest.approx({"abs_rel": 0.6 / 3, "rmse": math.sqrt(4.04 / 3), "delta1": 2 / 3})
    assert set(found) == set(DepthModality.metric_directions)
    assert build().metrics(generated, torch.zeros_like(truth)) == {}


def test_near_is_lighter_than_far_and_the_unmeasured_is_black() -> None:
    x = torch.ones(1, 1, 16, 16)
    x[..., 8:], x[..., 0] = 6.0, 0.0
    picture = build().render(x)
    assert picture[..., 1:8].mean() > picture[..., 8:].mean() > 0
    assert not picture[..., 0].any()


def test_files_keep_millimetres(tmp_path: Path) -> None:
    modality, x = build(), scenes(1)[0]
    again = modality.parse(str(modality.write(x, tmp_path, "a")))
    assert (again - x).abs().max().item() <= 0.00051
    assert torch.equal(again == 0, x == 0)
    np.save(tmp_path / "b.npy", x[0].numpy())
    assert torch.equal(modality.parse(str(tmp_path / "b.npy")), x)


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "grey.png")
    np.save(tmp_path / "centimetres.npy", np.full((16, 16), 250.0))
    np.save(tmp_path / "small.npy", np.ones((4, 4)))
    (tmp_path / "text.png").write_text("no picture")
    cases = {
        "grey.png": "16 bits",
        "centimetres.npy": "units",
        "small.npy": "4, 4",
        "text.png": "read",
        "none.png": "no such",
    }
    for name, said in cases.items():
        with pytest.raises(ValueError, match=said) as error:
            build().parse(str(tmp_path / name))
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"low": 0.0}, "low"), ({"high": 70.0}, "65.535"), ({"low": 5.0, "high": 4.0}, "more than low")],
)
def test_bad_ranges_are_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DepthConfig(height=16, width=16, **changes)  # type: ignore[arg-type]
