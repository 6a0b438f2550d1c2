"""A picture of a configuration's noise: its schedules, which clocks are trained together, and the path of sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from attrs import field, frozen
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_engine.experiment import Experiment, build_model

Colour = tuple[int, int, int]
Part = Literal["all", "noise", "clocks"]

DRAWS = 300
"""How many training samples' clocks are drawn."""
_SNR_RANGE = (-4.0, 4.0)  # in decades: below, nothing is seen of the data; above, nothing of the noise

# Told apart by people of any colour vision (Okabe & Ito 2008).
_COLOURS: tuple[Colour, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)
_INK, _QUIET, _RULE, _PAPER = (24, 26, 32), (92, 96, 106), (222, 224, 230), (255, 255, 255)
_DENSITY, _SMOOTH = 2, 2  # pixels for each unit below; drawn so many times as large, and made smaller
_PLOT_WIDTH, _PLOT_HEIGHT = 260, 210
_LEFT, _RIGHT, _ABOVE, _BELOW = 52, 18, 46, 44  # of a panel, around its plot
_MARGIN, _TITLE, _LEGEND = 12, 28, 24
_STRIPE = 9  # a line that several modalities share is of their colours in turn


@frozen(eq=False)
class Series:
    """Points that belong together.

    Attributes:
        x, y: ``[n]``.
        colours: of the modalities that it stands for.
    """

    x: Tensor
    y: Tensor
    colours: Sequence[Colour]


@frozen(eq=False)
class Panel:
    """One plot.

    Attributes:
        title, across, up: what it shows, and its axes.
        lines, dots: what is drawn.
        x_range, y_range: of the axes; what lies outside is not shown.
    """

    title: str
    across: str
    up: str
    lines: Sequence[Series]
    dots: Sequence[Series] = ()
    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = field(default=(0.0, 1.0))


def draw_process(experiment: Experiment, title: str, part: Part = "all", seed: int = 0) -> Image.Image:
    """The noise schedule, the weight schedule, the law of clocks and the path of sampling of an experiment.

    Args:
        experiment: nothing of it is trained or read.
        title: stands above.
        part: "noise": the schedules alone; "clocks": the law and the path alone.
        seed: of the clocks that are drawn.

    Raises:
        ConfigError: if its parts do not fit together.
    """
    model = build_model(experiment, weightless=True)
    panels: list[Panel] = []
    if part != "clocks":
        panels += _noise_panels(model)
    if part != "noise":
        panels += _clock_panels(model, experiment, seed)
    colours = dict(zip(model.names, _palette(len(model.names)), strict=True))
    if part != "clocks":
        colours["noise"] = _INK
    return _draw(title, colours, panels)


def _palette(count: int) -> list[Colour]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _noise_panels(model: MultimodalDiffusion) -> Iterator[Panel]:
    """What is left of each modality and how much noise there is, at each t."""
    process, colours = model.process, _palette(len(model.names))
    time = torch.arange(process.steps + 1, dtype=torch.float64) / process.steps
    noise = (1 - process.log_alpha_bar.exp()).clamp(min=0).sqrt()
    signal = process.signal_table
    yield Panel(
        "Signal and noise in the latent",
        "time t / T (0: data, 1: noise)",
        "factor of the code, of the noise",
        [*_series(time, signal, colours), Series(time, noise, [_INK])],
        y_range=_range(torch.cat([signal.flatten(), noise])),
    )
    decades = 2 * torch.log10(signal[1:].abs().clamp(min=1e-30) / noise[1:, None].clamp(min=1e-30))
    yield Panel(
        "Signal-to-noise ratio",
        "time t / T",
        "decades",
        _series(time[1:], decades, colours),
        y_range=_SNR_RANGE,
    )
    weights = process.weight_table[1:]
    yield Panel(
        "Weight schedule: what enters after t = 0",
        "time t / T",
        "w of each step",
        _series(time[1:], weights, colours),
        y_range=_range(weights.flatten()),
    )


def _clock_panels(model: MultimodalDiffusion, experiment: Experiment, seed: int) -> Iterator[Panel]:
    """Which noise levels training sees together, and how sampling goes from noise to data."""
    names, colours = model.names, _palette(len(model.names))
    settings = experiment.sampling
    path = model.path(settings.steps, settings.path).double() / model.process.steps
    others = len(names) - 1
    if others:
        drawn = model.law.draw(DRAWS, len(names), torch.Generator().manual_seed(seed)).double()
        yield Panel(
            "Trained together (dots), sampled along (lines)",
            f"clock of {names[0]}",
            "clock of another modality",
            _series(path[:, 0], path[:, 1:], colours[1:]),
            # Each sample shows one of the others, in turn: dots that coincide would hide one another.
            [Series(drawn[i - 1 :: others, 0], drawn[i - 1 :: others, i], [colours[i]]) for i in range(1, len(names))],
        )
    done = torch.linspace(0, 1, len(path), dtype=torch.float64)
    yield Panel("The path of sampling", "share of the steps taken", "clock", _series(done, path, colours))


def _series(x: Tensor, table: Tensor, colours: Sequence[Colour]) -> list[Series]:
    """A series for each different column of a table ``[n, N]``, in the colours of those that have it."""
    groups: list[tuple[Tensor, list[Colour]]] = []
    for column, colour in zip(table.T, colours, strict=True):
        same = next((members for other, members in groups if torch.allclose(other, column, atol=1e-9)), None)
        if same is None:
            groups.append((column, [colour]))
        else:
            same.append(colour)
    return [Series(x, column, members) for column, members in groups]


def _range(values: Tensor) -> tuple[float, float]:
    """Ends of an axis on which all values are seen, 0 among them."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if high - low < 1e-9:
        return -0.1, 0.1
    step = _step(low, high)
    return math.floor(low / step - 1e-9) * step if low < 0 else 0.0, math.ceil(high / step - 1e-9) * step


def _step(low: float, high: float) -> float:
    """Between ticks: 1, 2 or 5 times a power of ten, for about five of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _draw(title: str, colours: Mapping[str, Colour], panels: Sequence[Panel]) -> Image.Image:
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    wide, high = _LEFT + _PLOT_WIDTH + _RIGHT, _ABOVE + _PLOT_HEIGHT + _BELOW
    canvas = _Canvas(2 * _MARGIN + columns * wide, 2 * _MARGIN + _TITLE + _LEGEND + rows * high)
    canvas.text(_MARGIN, _MARGIN, title, 16, _INK)
    canvas.legend(_MARGIN, _MARGIN + _TITLE, colours)
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        canvas.panel(_MARGIN + column * wide + _LEFT, _MARGIN + _TITLE + _LEGEND + row * high + _ABOVE, panel)
    return canvas.image()


class _Canvas:
    """A page in units of which the picture has ``_DENSITY`` pixels each."""

    def __init__(self, width: int, height: int) -> None:
        self._scale = _DENSITY * _SMOOTH
        self._page = Image.new("RGB", (width * self._scale, height * self._scale), _PAPER)
        self._pen = ImageDraw.Draw(self._page)

    def image(self) -> Image.Image:
        return self._page.reduce(_SMOOTH)

    def text(self, x: float, y: float, text: str, size: int, colour: Colour, anchor: str = "la") -> float:
        """Writes a text; how wide it is."""
        font = ImageFont.load_default(size * self._scale)
        self._pen.text((x * self._scale, y * self._scale), text, fill=colour, font=font, anchor=anchor)
        return font.getlength(text) / self._scale

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float = 1.0) -> None:
        at = [(x * self._scale, y * self._scale) for x, y in points]
        self._pen.line(at, fill=colour, width=max(round(width * self._scale), 1), joint="curve")

    def dot(self, x: float, y: float, colour: Colour, radius: float = 2.4) -> None:
        box = [(value + side) * self._scale for side in (-radius, radius) for value in (x, y)]
        self._pen.ellipse(box, fill=colour)

    def legend(self, x: float, y: float, colours: Mapping[str, Colour]) -> None:
        for name, colour in colours.items():
            self.line([(x, y + 8), (x + 18, y + 8)], colour, 3)
            x += 24 + self.text(x + 24, y, name, 13, _INK) + 18

    def panel(self, left: float, top: float, panel: Panel) -> None:
        """A plot whose upper left corner is there."""
        (x0, x1), (y0, y1) = panel.x_range, panel.y_range
        right, bottom = left + _PLOT_WIDTH, top + _PLOT_HEIGHT

        def place(x: float, y: float) -> tuple[float, float]:
            return left + (x - x0) / (x1 - x0) * _PLOT_WIDTH, bottom - (y - y0) / (y1 - y0) * _PLOT_HEIGHT

        self.text(left, top - 38, panel.title, 13, _INK)
        for value in _ticks(x0, x1):
            x, _ = place(value, y0)
            self.line([(x, top), (x, bottom)], _RULE)
            self.text(x, bottom + 6, _number(value), 11, _QUIET, "ma")
        for value in _ticks(y0, y1):
            _, y = place(x0, value)
            self.line([(left, y), (right, y)], _RULE)
            self.text(left - 6, y, _number(value), 11, _QUIET, "rm")
        self.text((left + right) / 2, bottom + 22, panel.across, 12, _QUIET, "ma")
        self.text(left, top - 4, panel.up, 11, _QUIET, "ld")
        for series in panel.dots:
            for x, y in _inside(series, panel):
                self.dot(*place(x, y), series.colours[0])
        for series in panel.lines:
            width = 1.2 if panel.dots else 2.4
            self._striped([place(x, y) for x, y in _inside(series, panel)], series.colours, width)

    def _striped(self, points: Sequence[tuple[float, float]], colours: Sequence[Colour], width: float) -> None:
        """A line in the colours in turn, each for a stretch."""
        length = 0.0
        for start, end in pairwise(points):
            parts = max(math.ceil(math.dist(start, end) / _STRIPE), 1) if len(colours) > 1 else 1
            for k in range(parts):
                a, b = (
                    (start[0] + (end[0] - start[0]) * s / parts, start[1] + (end[1] - start[1]) * s / parts)
                    for s in (k, k + 1)
                )
                self.line([a, b], colours[int(length / _STRIPE) % len(colours)], width)
                length += math.dist(a, b)


def _inside(series: Series, panel: Panel) -> list[tuple[float, float]]:
    """The points within the panel's ranges."""
    (x0, x1), (y0, y1) = panel.x_range, panel.y_range
    pairs = zip(series.x.tolist(), series.y.tolist(), strict=True)
    slack = 1e-9
    return [(x, y) for x, y in pairs if x0 - slack <= x <= x1 + slack and y0 - slack <= y <= y1 + slack]


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) > 1e-12 else "0"
