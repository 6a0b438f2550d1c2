"""The report's sections on holes, on fidelity and diversity, and on joint models side by side, from made-up numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.benchmarks.test_report import Reader, broken, cell, write

from mtdiffusion_benchmarks.report import build_report
from mtdiffusion_benchmarks.report.fidelity import fidelity
from mtdiffusion_benchmarks.report.fidelity import sentence as fidelity_sentence
from mtdiffusion_benchmarks.report.markdown import code
from mtdiffusion_benchmarks.report.reconstruction import InPart, parse, reconstruction
from mtdiffusion_benchmarks.report.tables import Results, read_results
from mtdiffusion_benchmarks.report.variants import sentences, variants
from mtdiffusion_benchmarks.results import side_by_side

Values = Mapping[str, float | tuple[float, ...]]
DIRECTIONS = {
    "fid_x": "lower",
    "kid_x": "lower",
    "lpips_x": "lower",
    "x_accuracy": "higher",
    "precision_x": "higher",
    "recall_x": "higher",
    "rmse": "lower",
    "psnr": "higher",
    "ssim": "higher",
    "readout_rmse": "lower",
    "accuracy": "higher",
    "nll": "lower",
    "f1": "higher",
    "readout_f1": "higher",
    "readout_accuracy": "higher",
    "pixel_accuracy": "higher",
}


def made(
    method: str, values: Values, role: str = "control", task: str = "t", kind: str = "", seeds: int = 3
) -> list[dict[str, Any]]:
    """Cells of one method with these values, one a seed, or the same in all but for a little that differs."""
    cells = []
    for seed in range(seeds):
        one = cell("s", task, method, seed, [])
        metrics = {
            key: value[seed] if isinstance(value, tuple) else value * (1 + 1e-3 * ((len(method) + seed) % 3 - 1))
            for key, value in values.items()
        }
        config = {"method": {"kind": kind}} if kind else {}
        one |= {"role": role, "metrics": metrics, "directions": DIRECTIONS, "figures": [], "config": config}
        cells.append(one)
    return cells


def results_of(folder: Path, *groups: list[dict[str, Any]]) -> Results:
    profile = {"title": "made up", "methods": {group[0]["method"]: {} for group in groups}}
    return read_results(write(folder, profile, [each for group in groups for each in group]))


def texts(folder: Path) -> tuple[str, str]:
    page, document = (path.read_text(encoding="utf-8") for path in build_report(folder))
    assert Reader(page).wrong == []
    for table in re.findall(r"(?:^\|.*\|\n)+", document, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    return page, document


def holes(values: Mapping[int, Mapping[str, float]], target: str = "depth", beside: str = "") -> dict[str, float]:
    return {
        f"{target}|{beside}{target}:{share}%box/{metric}": value
        for share, metrics in values.items()
        for metric, value in metrics.items()
    }


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("image|image:75%box", InPart("image", "", "box", 75)),
        ("depth|label+mask+depth:10%patches", InPart("depth", "label+mask", "patches", 10)),
        ("a.b|a.b:50%box", InPart("a.b", "", "box", 50)),
        ("image|label", None),
        ("image|mask:75%box", None),
        ("joint", None),
        ("", None),
    ],
)
def test_queries_given_in_part(query: str, expected: InPart | None) -> None:
    assert parse(query) == expected


JOINT = holes(
    {
        10: {"fid_x": 2.0, "rmse": 0.2, "psnr": 20.0, "x_accuracy": 0.9, "readout_rmse": 1.0},
        50: {"fid_x": 3.0, "rmse": 0.4, "psnr": 15.0, "x_accuracy": 0.8},
        75: {"fid_x": 4.0, "rmse": 0.5, "psnr": 10.0, "x_accuracy": 0.7},
    }
)
REGRESSION = holes(
    {
        10: {"fid_x": 1.0, "rmse": 0.1, "psnr": 19.0},
        50: {"fid_x": 6.0, "rmse": 0.2, "psnr": 17.0},
        75: {"fid_x": 40.0, "rmse": 0.3, "psnr": 12.0},
    }
)


def test_where_the_advantage_begins(tmp_path: Path) -> None:
    rival = {key: value for key, value in REGRESSION.items() if "75%" not in key}
    results = results_of(
        tmp_path / "x", made("joint", JOINT, "joint"), made("regression", REGRESSION), made("mae", rival, "baseline")
    )
    (table,) = reconstruction(results)
    assert table.title == "depth, hidden as box"
    assert [group.method for group in table.rivals] == ["regression", "mae"]
    assert [(block.metric, block.features) for block in table.blocks] == [
        ("fid_x", True),
        ("psnr", False),
        ("rmse", False),
    ]  # no read-outs, and nothing that a judge says but distances
    fid, psnr, rmse = (block.sentence for block in table.blocks)
    assert fid == (
        "fid_x: against “regression” better from 50% hidden on, by a factor of 2 at 50% and a factor of 10 at 75%, "
        "worse at 10%; against “mae” better from 50% hidden on, by a factor of 2 at 50%, worse at 10%."
    )
    assert psnr.startswith("psnr: against “regression” better at 10% alone, worse at 50%, 75%; against “mae” ")
    assert rmse == "rmse: against “regression” worse at every share; against “mae” worse at every share."
    assert [row.percent for row in table.blocks[0].rows] == [10, 50, 75]
    assert table.blocks[0].rows[2].against[1].comparison is None
    page, document = texts(tmp_path / "x")
    for text in (page, document):
        assert "Where the advantage begins" in text
        assert "by a factor of 2 at 50% and a factor of 10 at 75%" in text


def test_a_tie_is_no_advantage_and_one_seed_decides_by_its_mean_and_says_so(tmp_path: Path) -> None:
    noisy = dict(JOINT) | {"depth|depth:50%box/fid_x": (1.0, 6.5, 6.4)}  # its interval contains the rival's 6
    results = results_of(tmp_path / "a", made("joint", noisy, "joint"), made("regression", REGRESSION))
    (table,) = reconstruction(results)
    assert "better from 75% hidden on, by a factor of 10 at 75%, worse at 10%." in table.blocks[0].sentence
    assert "No intervals" not in table.blocks[0].sentence
    one = results_of(tmp_path / "b", made("joint", JOINT, "joint", seeds=1), made("mae", REGRESSION, seeds=1))
    (table,) = reconstruction(one)
    assert "better from 50% hidden on" in table.blocks[0].sentence
    assert table.blocks[0].sentence.endswith(" No intervals: the means decide.")


def test_a_difference_stands_where_a_factor_means_nothing_and_errors_of_shares_have_factors(tmp_path: Path) -> None:
    ours = holes({50: {"psnr": 20.0, "kid_x": -0.001, "ssim": 0.9}}, beside="label+")
    theirs = holes({50: {"psnr": 17.0, "kid_x": 0.004, "ssim": 0.7}}, beside="label+")
    results = results_of(tmp_path / "x", made("joint", ours, "joint"), made("mae", theirs))
    (table,) = reconstruction(results)
    assert table.title == "depth, given label, hidden as box"
    told = {block.metric: block.sentence for block in table.blocks}
    assert re.search(r"by (2\.99|3\.0\d*) at 50%\.$", told["psnr"])
    assert "by 0.00500 at 50%." in told["kid_x"]
    assert re.search(r"by a factor of (2\.9\d|3(\.0\d)?) at 50%\.$", told["ssim"])


def test_rivals_are_of_the_setting_and_preferably_of_the_task(tmp_path: Path) -> None:
    here, there = made("mae", REGRESSION), made("mae", REGRESSION, task="other")
    other_setting = [each | {"setting": "far"} for each in made("replacement", REGRESSION)]
    joint = made("joint", JOINT, "joint")
    results = results_of(tmp_path / "a", joint, there + here, other_setting)
    (table,) = reconstruction(results)
    assert [(group.method, group.task) for group in table.rivals] == [("mae", "t")]
    results = results_of(tmp_path / "b", joint, there)
    assert [group.task for group in next(reconstruction(results)).rivals] == ["other"]
    alone = results_of(tmp_path / "c", joint, other_setting)
    assert list(reconstruction(alone)) == []
    assert "Where the advantage begins" not in "".join(texts(tmp_path / "c"))


SAMPLES = {
    "joint/precision_x": 0.80,
    "joint/recall_x": 0.6,
    "depth|label/precision_x": 0.7,
    "depth|label/recall_x": 0.9,
}


def test_fidelity_and_diversity_against_the_diffusion_model_for_the_query(tmp_path: Path) -> None:
    in_part = holes({50: {"precision_x": 0.5, "recall_x": 0.5}})
    lacking = {"depth|mask/precision_x": 0.5, "real/precision_x": 0.9, "real/recall_x": 0.9}
    ours = SAMPLES | in_part | lacking
    better = {"depth|label/precision_x": 0.6, "depth|label/recall_x": 0.95}
    results = results_of(
        tmp_path / "x",
        made("joint", ours, "joint", kind="joint"),
        made("translation", ours | better, kind="regression"),
        made("conditional", better, kind="single"),
    )
    rows = fidelity(results)
    assert [(row.query, row.control.method, row.features) for row in rows] == [
        ("joint", "translation", "x"),  # nothing else has it
        ("depth|label", "conditional", "x"),
    ]
    precision, recall = rows[1].precision[1], rows[1].recall[1]
    assert precision and recall
    assert precision.effect == pytest.approx(10.0, abs=0.1) and precision.verdict == "helps"
    assert recall.effect == pytest.approx(-5.0, abs=0.1) and recall.verdict == "hurts"
    told = fidelity_sentence(results, rows)
    assert told.startswith("“joint model” against its controls over 2 queries: precision is higher in 1, lower in 0")
    assert "recall is higher in 0, lower in 1, a tie in 1 (mean difference −2.5 points)" in told
    page, document = texts(tmp_path / "x")
    for text in (page, document):
        assert told in text
        assert "▲ +10.0 points" in text


def test_without_a_control_there_is_no_section_on_fidelity(tmp_path: Path) -> None:
    results = results_of(tmp_path / "x", made("joint", SAMPLES, "joint"))
    assert fidelity(results) == []
    assert fidelity_sentence(results, []) == ""
    assert "Fidelity and diversity" not in "".join(texts(tmp_path / "x"))


ASKED = {
    "joint/fid_x": 5.0,
    "joint/x_agreement": 0.9,
    "label|depth/accuracy": 0.9,
    "label|depth/nll": 0.3,
    "depth|label/fid_x": 3.0,
    "depth|label/rmse": 0.5,
    "sound|label/f1": 0.8,
    "sound|label/nll": 0.8,
    "sound|label/readout_f1": 0.8,
}


def variant_results(folder: Path, *others: list[dict[str, Any]]) -> Results:
    controls = (
        made("classifier", {"label|depth/accuracy": 0.92, "label|depth/nll": 0.2}),
        made("conditional", {"depth|label/fid_x": 4.0, "depth|label/rmse": 0.4}),
        made("speaker", {"sound|label/f1": 0.8, "sound|label/nll": 0.5, "sound|label/readout_f1": 0.9}),
    )
    return results_of(folder, made("joint", ASKED, "joint"), *others, *controls)


def test_variants_are_counted_by_the_modalities_in_which_they_keep_up(tmp_path: Path) -> None:
    remedied = ASKED | {"label|depth/accuracy": 0.95, "depth|label/fid_x": 9.0, "sound|label/readout_f1": 0.95}
    results = variant_results(tmp_path / "x", made("joint-remedy", remedied, "joint"))
    (table,) = variants(results)
    plain, remedy = table.variants
    # Of label the accuracy counts, of depth the Fréchet distance; sound has neither, so all but nll: f1, of which both
    # have a read-out.
    assert plain.kept == {"label": False, "depth": True, "sound": False}
    assert (plain.told, plain.lost) == ("1 of 3", ("label", "sound"))
    assert remedy.kept == {"label": True, "depth": False, "sound": True}
    assert table.keys[0] == "joint/fid_x"  # has no control, and is shown
    assert "joint/x_agreement" not in table.keys  # has no direction
    ((which, controls),) = table.controls
    assert which == "one for each question"
    assert set(controls) == set(table.keys) - {"joint/fid_x"}
    assert [query for query, _ in table.queries] == ["joint", "depth|label", "label|depth", "sound|label"]
    page, document = texts(tmp_path / "x")
    assert "<td>1 of 3<small>not label, sound</small></td>" in page
    assert "| 2 of 3 (not depth) |" in document
    assert "▼ 0.9000" in document and "▲ 0.95" in document
    row = next(line for line in document.splitlines() if line.startswith("| control, one for each"))
    assert "0.9200" in row
    expected = """
| joint model | ties or beats the control | `joint/fid_x` ↓ | FID ↓ | ACCURACY ↑ | F1 ↑ |
| --- | --- | --- | --- | --- | --- |
| JOINT | 1 of 3 (not label, sound) | 5.0000 ± 0.0050 | ▲ 3.0000 ± 0.0030 | ▼ 0.90000 ± 0.00090 | ▼ 0.80000 ± 0.00080 |
| REMEDY | 2 of 3 (not depth) | 5.0000 ± 0.0050 | ▼ 9.0000 ± 0.0090 | ▲ 0.95000 ± 0.00095 | ▲ 0.95000 ± 0.00095 |
| control, one for each question |  |  | 4.0000 ± 0.0040 | 0.92000 ± 0.00092 | 0.90000 ± 0.00090 |
"""
    expected = expected.replace("JOINT", "`joint` (3 seeds)").replace("REMEDY", "`joint-remedy` (3 seeds)")
    keys = {"FID": "depth|label/fid_x", "ACCURACY": "label|depth/accuracy", "F1": "sound|label/readout_f1"}
    for short, key in keys.items():
        expected = expected.replace(short, code(key))
    assert side_by_side(results, table) == expected.strip()
    told = "“joint-remedy”, in 2 of 3 (not depth), ties or beats the controls in most modalities; “joint model” in 1"
    assert told in page and told in document


def test_the_headline_names_all_that_keep_up_in_most_modalities(tmp_path: Path) -> None:
    remedied = made("joint-remedy", ASKED | {"label|depth/accuracy": 0.95, "sound|label/readout_f1": 0.95}, "joint")
    other = made("joint-other", ASKED | {"label|depth/accuracy": 0.95, "sound|label/readout_f1": 0.95}, "joint")
    variant_results(tmp_path / "x", remedied, other)
    told = "“joint-remedy”, in 3 of 3, and “joint-other”, in 3 of 3, tie or beat the controls in most modalities"
    for said in texts(tmp_path / "x"):
        assert told in said


def test_where_no_variant_keeps_up_in_more_modalities_the_headline_says_so(tmp_path: Path) -> None:
    variant_results(tmp_path / "x", made("joint-remedy", ASKED | {"depth|label/fid_x": 9.0}, "joint"))
    for said in texts(tmp_path / "x"):
        assert (
            "of 2 joint models, none ties or beats the controls in more modalities than “joint model”, 1 of 3" in said
        )


def test_every_query_of_a_modality_counts_and_a_single_seed_decides_by_its_mean(tmp_path: Path) -> None:
    control = {"label|depth/accuracy": 0.9, "label|sound/accuracy": 0.9}
    results = results_of(
        tmp_path / "x",
        made("joint", {"label|depth/accuracy": 0.95, "label|sound/accuracy": 0.85}, "joint", seeds=1),
        made("joint-b", {"label|depth/accuracy": 0.9, "label|sound/accuracy": 0.91}, "joint", seeds=1),
        made("classifier", control),
    )
    (table,) = variants(results)
    assert [variant.kept["label"] for variant in table.variants] == [False, True]
    assert not list(sentences(results))  # "1 of 1" would say nothing that the table's cells do not


def test_where_there_is_a_readout_what_is_sampled_does_not_count(tmp_path: Path) -> None:
    """Neither the metric that has a read-out nor another of the same answer; other queries are judged by what is
    there."""
    control = {"label|depth/accuracy": 0.9, "label|depth/readout_accuracy": 0.9, "label|depth/pixel_accuracy": 0.9}
    read = {"label|depth/accuracy": 0.8, "label|depth/readout_accuracy": 0.95, "label|depth/pixel_accuracy": 0.8}
    results = results_of(
        tmp_path / "x",
        made("joint", read | {"label|sound/pixel_accuracy": 0.9}, "joint"),
        made("joint-b", read | {"label|sound/pixel_accuracy": 0.7}, "joint"),
        made("classifier", control | {"label|sound/pixel_accuracy": 0.8}),
    )
    (table,) = variants(results)
    assert [variant.kept["label"] for variant in table.variants] == [True, False]


def test_a_variant_that_diverged_keeps_nothing_and_one_model_alone_has_no_table(tmp_path: Path) -> None:
    lost = [broken(each, "diverged", "loss is not finite") for each in made("joint-hot", ASKED, "joint")]
    results = variant_results(tmp_path / "a", lost)
    (table,) = variants(results)
    assert table.variants[1].told == "0 of 3" and table.variants[1].lost == ()
    assert "| `joint-hot` (diverged) | 0 of 3 | diverged |" in side_by_side(results, table)
    page, document = texts(tmp_path / "a")
    assert "diverged" in page and "| 0 of 3 |" in document
    assert list(variants(variant_results(tmp_path / "b"))) == []
    assert "Joint models side by side" not in "".join(texts(tmp_path / "b"))


def test_one_joint_model_of_a_setting_has_a_table_if_another_setting_of_its_task_has_several(tmp_path: Path) -> None:
    elsewhere = [
        [one | {"setting": "other"} for one in made(method, values, role)]
        for method, values, role in (
            ("joint", ASKED, "joint"),
            ("classifier", {"label|depth/accuracy": 0.85}, "control"),
            ("conditional", {"depth|label/fid_x": 2.0}, "control"),
        )
    ]
    results = variant_results(tmp_path / "x", made("joint-remedy", ASKED, "joint"), *elsewhere)
    alone, _ = variants(results)
    assert (alone.setting, len(alone.variants), alone.variants[0].told) == ("other", 1, "1 of 2")
    told = "other, t: “joint model” ties with or beats the controls in 1 of 2 modalities (not depth)."
    assert told in list(sentences(results))


def sampled(cells: list[dict[str, Any]], solver: str, steps: int = 25) -> list[dict[str, Any]]:
    experiment = {"sampling": {"solver": solver}, "evaluation": {"steps": steps}}
    return [one | {"config": one["config"] | {"experiment": experiment}} for one in cells]


def test_a_control_that_is_sampled_alike_comes_before_the_first_of_the_profile(tmp_path: Path) -> None:
    values = {"image|label/fid_x": 3.0, "image|label/precision_x": 0.8, "image|label/recall_x": 0.7}
    other = {"image|label/fid_x": 2.0, "image|label/precision_x": 0.9, "image|label/recall_x": 0.6}
    groups = [
        sampled(made("joint", values, "joint"), "ancestral"),
        sampled(made("joint-ddim", values, "joint"), "ddim"),
        sampled(made("joint-few", values, "joint"), "ancestral", steps=5),
        sampled(made("single", values, kind="single"), "ancestral"),
        sampled(made("single-ddim", other, kind="single"), "ddim"),
    ]
    results = results_of(tmp_path, *groups)
    expected = {"joint": "single", "joint-ddim": "single-ddim", "joint-few": "single"}
    assert {t.group.method: t.control.method for t in results.transfers} == expected
    assert {row.group.method: row.control.method for row in fidelity(results)} == expected
    (table,) = variants(results)
    rows = [(name, {group.method for group in controls.values()}) for name, controls in table.controls]
    assert rows == [("one for each question", {"single"}), ("sampled otherwise", {"single-ddim"})]
    page, document = texts(tmp_path)
    assert "sampled otherwise" in page
    assert "| control, sampled otherwise |" in document
