"""The documents say what the committed results say."""

import json
import math
import shutil
from pathlib import Path

import pytest
from tests.benchmarks.test_report import small, write

from mtdiffusion_benchmarks.profile import load_profile, plan
from mtdiffusion_benchmarks.report import build_report
from mtdiffusion_benchmarks.report.tables import read_results
from mtdiffusion_benchmarks.results import TARGETS, blocks, fill, main, metrics_table
from mtdiffusion_benchmarks.runner import Runner
from mtdiffusion_benchmarks.stored import expanded, write_cell
from mtdiffusion_engine.experiment import load_experiment
from mtdiffusion_registry import Registry, UserError

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "config", sorted((ROOT / "benchmarks/results").glob("*/config.toml")), ids=lambda p: p.parent.name
)
def test_the_configuration_beside_a_result_can_be_trained(config: Path) -> None:
    assert load_experiment(config, [], Registry.discover()).training.steps > 0


def test_a_changed_result_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TARGETS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    folder = tmp_path / "benchmarks/results/digits-demo"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"label|image/accuracy": 0.123}))
    monkeypatch.chdir(tmp_path)
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert "| image → label: accuracy | 0.123 |" in (tmp_path / "docs/results-details.md").read_text()
    assert main(["--check"]) == 0


def test_a_table_has_a_column_a_run_and_leaves_out_what_a_run_lacks() -> None:
    runs = {"a": {"label|image/accuracy": 0.5, "real/fid_judge": 2.0}, "b": {"label|image/accuracy": 0.25}}
    assert metrics_table(runs).splitlines() == [
        "| | a | b |",
        "|---|---|---|",
        "| image → label: accuracy | 0.500 | 0.250 |",
    ]


def test_a_benchmark_that_names_its_columns_has_a_table_made_from_its_cells(tmp_path: Path) -> None:
    profile, cells = small()
    for made in cells:
        made["metrics"] = {"label|image/accuracy": 0.5 + 0.25 * made["seed"]}
        if made["method"] == "joint":
            made["metrics"]["joint/fid_judge"] = 2.0
    write(tmp_path / "plain", profile, cells)
    columns = ["label|image/accuracy", "joint/fid_judge"]
    write(tmp_path / "named", profile | {"table": columns}, cells)
    tables = blocks(tmp_path)
    assert {name for name in tables if not name.startswith("gpu: ")} == {"named"}
    assert tables["named"].splitlines() == [
        r"| variant | seeds | `label\|image/accuracy` | `joint/fid_judge` |",
        "|---|---|---|---|",
        "| joint model | 2 | 0.625 ± 0.177 | 2.000 ± 0.000 |",
        "| image classifier, same backbone | 2 | 0.625 ± 0.177 |  |",
    ]
    twin = [made | {"task": "image+label", "seed": 5} for made in cells[:1]]
    write(tmp_path / "two", profile | {"table": columns[:1]}, cells + twin)
    assert "| Image and label: joint model | 1 | 0." in blocks(tmp_path)["two"]


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    text = "before\n<!-- a -->\nold\n<!-- /a -->\nafter <!-- b -->"
    assert fill(text, {"a": "new", "b": "none"}) == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter <!-- b -->"


BENCHMARKS = sorted(path.parent for path in (ROOT / "benchmarks/results").glob("*/profile.json"))
LARGE = "small-0.1"  # whose report is built and not committed


def test_a_sound_is_stored_once_however_often_it_is_heard(tmp_path: Path) -> None:
    profile, (cell, *_) = small()
    png = cell["figures"][0]["png"]
    said, sung = ({"type": "audio/wav", "data": data} for data in ("c2FpZA==", "c3VuZw=="))
    heard = [[[said, sung], [], [said]], [[said]]]
    cell["figures"] = [
        {"name": "x", "title": "x", "columns": list("abc"), "png": png, "sounds": each} for each in heard
    ]
    cell["figures"].append({"name": "y", "title": "y", "png": png})
    (tmp_path / "cells").mkdir()
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    path = tmp_path / "cells" / "cell.json"
    write_cell(path, cell)
    text = path.read_text()
    assert text.count(said["data"]) == text.count(sung["data"]) == 1
    assert expanded(json.loads(text))["figures"] == cell["figures"]
    first, second, silent = read_results(tmp_path).cells[0].figures
    assert [(name, [each.data for each in sounds]) for name, sounds in first.heard] == [
        ("a", ["c2FpZA==", "c3VuZw=="]),
        ("c", ["c2FpZA=="]),
    ]
    assert [name for name, _ in second.heard] == ["a"] and silent.heard == []
    path.write_text(json.dumps(json.loads(text) | {"sounds": [said["data"]]}))  # it lacks one
    with pytest.raises(UserError, match=r"cell\.json: is damaged .* remove it and run its cell again"):
        read_results(tmp_path)


@pytest.mark.parametrize("folder", BENCHMARKS, ids=lambda folder: folder.name)
def test_a_committed_report_is_what_its_results_say_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cells", tmp_path / "cells")
    shutil.copy(folder / "profile.json", tmp_path)
    page, document = build_report(tmp_path)
    if folder.name != LARGE:
        assert document.read_bytes() == (folder / document.name).read_bytes(), f"run: mtdiffusion bench report {folder}"
    assert page.stat().st_size > 100_000  # with its pictures; it is not committed


@pytest.mark.parametrize("folder", [each for each in BENCHMARKS if each.name.startswith("real")], ids=str)
def test_no_one_s_data_are_committed(folder: Path) -> None:
    """Of data that do not ship, what is generated is shown, and nothing that is given or true."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "cells").glob("*.json")]
    assert cells
    assert {figure["name"] for cell in cells for figure in cell["figures"]} <= {"joint"}


# Of this version, by their profile. Folders that are not here hold those of an earlier one, which their names tell.
PRESENT: dict[str, str] = {}


@pytest.mark.parametrize(
    ("name", "results"),
    [
        pytest.param(
            name,
            folder,
            marks=pytest.mark.skipif(not (ROOT / "benchmarks/results" / folder).is_dir(), reason="not measured yet"),
        )
        for name, folder in PRESENT.items()
    ],
)
def test_committed_results_are_of_the_benchmark_as_it_stands(
    name: str, results: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    registry = Registry.discover()
    profile, path = load_profile(name, registry)
    cells = plan(profile)
    runner = Runner(profile, path.parent, Path("benchmarks/results") / results, registry, say=lambda _: None)
    found = runner._check(cells)
    assert found
    assert set(found.values()) == {"ok"}


def test_a_cell_is_stored_in_few_bytes_and_read_as_it_was(tmp_path: Path) -> None:
    profile, (cell, *_) = small()
    curve = [{"step": 1, "loss": 123.4567, "l2": 0.0}, {"step": 2, "loss": 1e-7, "late": 2.0}]
    cell |= {"metrics": {"a": 0.1234567890123, "x|y:50%/b": float("nan"), "x/n": 1234567890}, "curve": curve}
    path = tmp_path / "cells" / "cell.json"
    path.parent.mkdir()
    write_cell(path, cell)
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    read = read_results(tmp_path).cells[0]
    assert list(read.metrics) == ["a", "x/n", "x|y:50%/b"] and math.isnan(read.metrics["x|y:50%/b"])
    assert read.metrics["a"] == 0.1234567890123 and read.metrics["x/n"] == 1234567890
    assert read.curve == ({"step": 1, "loss": 123.0, "l2": 0.0}, {"step": 2, "loss": 1e-7, "late": 2.0})
    stored = json.loads(path.read_text())
    assert {key: stored[key] for key in stored if key not in ("metrics", "curve")} == {
        key: cell[key] for key in cell if key not in ("metrics", "curve")
    }
    assert path.read_text().count("\n") == len(cell) + 2
    stored["curve"]["loss"].pop()
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"cell\.json: is damaged \(zip\(\) .* remove it and run its cell again"):
        read_results(tmp_path)


@pytest.mark.parametrize("folder", BENCHMARKS, ids=lambda folder: folder.name)
def test_committed_cells_are_stored_as_new_ones_are(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        write_cell(tmp_path / path.name, expanded(cell))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path
