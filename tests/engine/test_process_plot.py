"""The picture of a configuration's noise: what its panels hold, and that it is drawn."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtdiffusion_engine.cli import main
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_engine.process_plot import Panel, _clock_panels, _noise_panels, _palette, draw_process
from mtdiffusion_registry import Registry
from mtdiffusion_registry.config import apply_overrides, structure
from tests.engine.tiny import CONFIG

REGISTRY = Registry.discover()


def experiment(*changes: str) -> Experiment:
    return structure(REGISTRY, apply_overrides(tomllib.loads(CONFIG), list(changes)), Experiment, "tiny")


def noise_panels(*changes: str) -> list[Panel]:
    return list(_noise_panels(build_model(experiment(*changes))))


def clock_panels(*changes: str) -> list[Panel]:
    described = experiment(*changes)
    return list(_clock_panels(build_model(described), described, seed=0))


def test_signal_and_noise_share_the_variance_of_one() -> None:
    signal, noise = noise_panels("process.retention=compensated")[0].lines
    assert torch.allclose(signal.y**2 + noise.y**2, torch.ones_like(noise.y))
    assert (signal.x[0], signal.x[-1], noise.y[0]) == (0, 1, 0)


def test_modalities_of_one_schedule_share_a_line_and_others_have_their_own() -> None:
    (alike,) = noise_panels()[1].lines
    assert list(alike.colours) == _palette(3)
    gains = ["process.weights.kind=snr_matched", "process.weights.gains.label=0.5"]
    alike, label = noise_panels(*gains)[1].lines
    assert [list(line.colours) for line in (alike, label)] == [_palette(3)[:2], _palette(3)[2:]]
    # Half the signal is a quarter of the ratio: log10(4) decades lower.
    assert torch.allclose(alike.y - label.y, torch.full_like(label.y, 2 * np.log10(2)))


def test_nothing_enters_after_the_start_of_ordinary_diffusion() -> None:
    signal, _, weights = noise_panels()
    assert weights.lines[0].y.abs().max() < 1e-9
    assert weights.y_range == (-0.1, 0.1)
    assert signal.y_range == (0, 1)


def test_dots_of_a_law_with_offsets_lie_on_its_path() -> None:
    ahead = {"label": 0.6, "mask": 0.3}
    pairs, path = clock_panels("clocks.kind=offset", "clocks.ahead={ label = 0.6, mask = 0.3 }")
    for dots, name in zip(pairs.dots, ("mask", "label"), strict=True):
        assert len(dots.x) > 100
        between = (dots.x < 1) & (dots.y > 0)
        assert torch.allclose(dots.y[between], dots.x[between] - ahead[name])
    image, mask, label = (line.y for line in path.lines)
    assert bool((label <= mask).all() and (mask <= image).all())
    assert all(line.y[0] == 1 and line.y[-1] == 0 for line in path.lines)


def test_independent_clocks_are_drawn_all_over() -> None:
    for dots in clock_panels("clocks.kind=independent")[0].dots:
        assert abs(np.corrcoef(dots.x, dots.y)[0, 1]) < 0.3


def test_one_modality_has_no_pairs() -> None:
    (path,) = clock_panels("modalities={ image = { kind = 'image', size = 8, channels = 1 } }")
    assert path.title == "The path of sampling"


def test_lines_of_several_modalities_have_the_colours_of_all() -> None:
    pixels = {colour for _, colour in draw_process(experiment(), "tiny", "noise").getcolors(1 << 24) or ()}
    assert pixels >= set(_palette(3))


def test_the_command_draws_a_picture_and_trains_nothing(tiny_config: Path, tmp_path: Path) -> None:
    sizes = {}
    for part in ("all", "noise", "clocks"):
        out = tmp_path / part / "process.png"
        assert main(["process", "plot", str(tiny_config), "--part", part, "--out", str(out)]) == 0
        sizes[part] = Image.open(out).size
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["process.png"] * 3
    assert sizes["all"][1] > sizes["noise"][1] == sizes["clocks"][1]


def test_another_kind_of_picture_is_refused_by_name(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["process", "plot", str(tiny_config), "--out", str(tmp_path / "process.svg")]) == 2
    assert "process.svg: expected the name of a PNG file, such as" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
