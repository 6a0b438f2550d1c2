"""Metrics for a person: what tells most first, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from mtdiffusion_engine.commands import print_metrics
from mtdiffusion_engine.metrics import Row, directions_of, legend, rows
from mtdiffusion_registry import UserError


def giver(**directions: str) -> Any:
    return SimpleNamespace(metric_directions=directions)


class Upward:
    metric_directions: Mapping[str, str] = {"fid_x": "lower", "accuracy": "higher"}


class Downward:
    metric_directions: Mapping[str, str] = {"fid_x": "higher"}


def test_a_name_means_one_direction() -> None:
    modalities = {"image": giver(mse="lower"), "label": giver(accuracy="higher")}
    directions = directions_of(modalities, [Upward(), Upward()])  # type: ignore[list-item]
    assert directions == {"fid_x": "lower", "mse": "lower", "accuracy": "higher"}
    with pytest.raises(UserError, match="fid_x is better lower for Upward and better higher for Downward"):
        directions_of(modalities, [Upward(), Downward()])  # type: ignore[list-item]


def test_evaluators_come_first_and_a_name_where_it_matters_least() -> None:
    modalities = {
        "mask": giver(miou="higher", pixels="higher", more="higher", nll="lower"),
        "label": giver(accuracy="higher", nll="lower"),
    }
    judges = [giver(read="higher", fid="lower"), giver(seen="higher")]
    order = ["read", "seen", "fid", "miou", "accuracy", "pixels", "more", "nll"]
    assert list(directions_of(modalities, judges)) == order


FOUND = {
    "joint/bound_bits_per_dim": 3.25,
    "joint/entropy": 0.5,
    "joint/fid": 8.1234567,
    "joint/fid_std": 0.2134,
    "joint/read": 0.75,
    "joint/draws": 3,
    "label|image/accuracy": 0.875,
    "label|image/samples": 160,
    "real/fid": 4.0,
    "text|image/words": 0.5,
    "text|image/words_samples": 3,
}
SAID = {"read": "higher", "accuracy": "higher", "fid": "lower"}


def test_a_row_tells_first_what_matters_and_which_way_is_better() -> None:
    assert rows(FOUND, SAID) == [
        Row("label|image", ("accuracy=0.875↑",), ("samples=160",)),
        Row("text|image", (), ("words=0.5", "words_samples=3")),
        Row("joint", ("read=0.75↑", "fid=8.123±0.21↓"), ("bound_bits_per_dim=3.25↓", "entropy=0.5", "draws=3")),
        Row("real", ("fid=4↓",), ()),
    ]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_where_there_are_no_arrows_it_is_ascii(encoding: str) -> None:
    label, _, joint, _ = rows({**FOUND, "joint/größe": 1}, SAID, encoding)
    assert label.first == ("accuracy=0.875(^)",)
    assert joint.first == ("read=0.75(^)", "fid=8.123+-0.21(v)")
    assert legend(encoding) == "(^) higher is better, (v) lower is better; what tells most comes first"


def test_the_table_is_written_as_the_output_can_take_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_metrics({"a[b]|c/accuracy": 0.875}, SAID)
    out = capsys.readouterr().out
    assert "a[b] | c" in out and "accuracy=0.875↑" in out and legend() in out
    monkeypatch.setattr("rich.console.Console.encoding", "ascii")
    print_metrics({"a|b/accuracy": 0.875}, SAID)
    out = capsys.readouterr().out
    assert out.isascii() and "accuracy=0.875(^)" in out
