"""The report of a made-up benchmark that has everything a real one may have."""

from __future__ import annotations

import base64
import copy
import io
import itertools
import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mtdiffusion_benchmarks.report import build_report
from mtdiffusion_benchmarks.report.tables import best, count, read_results, split_key
from mtdiffusion_registry import UserError

Tables = dict[str, Any]

DIRECTIONS = {
    "accuracy": "higher",
    "miou": "higher",
    "cosine": "higher",
    "mse": "lower",
    "psnr": "higher",
    "nll": "lower",
    "judge_accuracy": "higher",
    "fid_judge": "lower",
    "kid_judge": "lower",
    "precision_judge": "higher",
}
METRICS = {
    "image": ("mse", "psnr", "judge_accuracy", "fid_judge", "kid_judge", "precision_judge"),
    "mask": ("miou", "nll"),
    "label": ("accuracy", "nll"),
    "clip": ("cosine",),
}
TYPICAL = {
    "accuracy": 0.96,
    "miou": 0.95,
    "cosine": 0.92,
    "mse": 0.03,
    "psnr": 17.0,
    "nll": 0.21,
    "judge_accuracy": 0.95,
    "fid_judge": 3.1,
    "kid_judge": 0.004,
    "precision_judge": 0.88,
}
CONTROLS = {
    "classifier": "label|image",
    "segmentation": "mask|image",
    "class-conditional": "image|label",
    "mask-conditional": "image|mask",
    "image-alone": "joint",
    "reconstruction": "image|image:75%box",
}
TITLES = {
    "joint": "joint model",
    "classifier": "image classifier, same backbone",
    "segmentation": "segmentation net, same backbone",
    "class-conditional": "class-conditional diffusion of images",
    "mask-conditional": "mask-conditional diffusion of images",
    "image-alone": "unconditional diffusion of images",
    "reconstruction": "reconstruction alone",
    "independent": "no shared diffusion space",
    "joint-readout": "joint, read-outs at t = T",
    "joint-shared": "joint, one shared space of channels",
}
TASKS = {
    "image+label": "Image and label",
    "image+mask": "Image and segmentation mask",
    "image+clip": "Image and CLIP embedding",
    "masked-image": "Masked-image training",
    "mask+label": "Mask and label",
    "image+mask+label": "Image, mask and label",
    "all": "Image, mask, label and CLIP embedding",
    "label": "Label alone",
}


def queries(task: str) -> list[str]:
    names = {"all": ["image", "mask", "label", "clip"], "masked-image": ["image"]}.get(task, task.split("+"))
    asked = ["joint"] if "image" in names else []
    if task == "masked-image":
        asked += [f"image|image:{share}%{how}" for share in (10, 50, 75) for how in ("box", "patches")]
    if len(names) > 1:
        asked += [f"{name}|{'+'.join(other for other in names if other != name)}" for name in names]
    if len(names) > 2:
        asked += [f"{name}|{other}" for other in names for name in names if name != other]
    return sorted(set(asked))


def measured(asked: list[str], skill: float, seed: int, where: str) -> dict[str, float]:
    """Metrics of answers to these queries, better with skill, with some noise of the seed."""
    rng = random.Random(f"{seed}{where}")
    made: dict[str, float] = {}
    for query in asked:
        names = METRICS["image"][2:] if query == "joint" else METRICS[query.partition("|")[0]]
        for name in names:
            factor = math.exp(-skill + rng.gauss(0, 0.06))  # of what is wrong
            value = TYPICAL[name]
            if DIRECTIONS[name] == "lower":
                made[f"{query}/{name}"] = value * factor
            elif value < 1:
                made[f"{query}/{name}"] = 1 - (1 - value) * factor
            else:
                made[f"{query}/{name}"] = value / factor
        made[f"{query}/samples"] = 360
    made |= {"real/fid_judge": 2.344, "real/judge_accuracy": 0.994, "real/samples": 360}
    return made


def picture(rows: int, seed: int) -> str:
    rng = random.Random(seed)
    image = Image.new("RGB", (10 * 34, rows * 34), "white")
    for row in range(rows):
        for column in range(10):
            colour = tuple(rng.randrange(256) for _ in range(3))
            image.paste(colour, (column * 34 + 1 + 8, row * 34 + 1 + 8, column * 34 + 25, row * 34 + 25))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def cell(setting: str, task: str, method: str, seed: int, asked: list[str], skill: float = 0.0) -> Tables:
    role = "joint" if method.startswith("joint") else "control" if method in CONTROLS else "baseline"
    rng = random.Random(f"{setting}{task}{method}{seed}")
    parts = ("image", "mask", "label")
    curve = [
        {"step": step, "loss": 3 * math.exp(-step / 200) + 0.12 + rng.gauss(0, 0.01)}
        | {f"l2/{name}": (n + 1) * math.exp(-step / 300) + 0.05 + rng.gauss(0, 0.005) for n, name in enumerate(parts)}
        for step in range(20, 801, 20)
    ]
    figures = [
        {
            "name": query,
            "title": f"{query.partition('|')[0]} given {query.partition('|')[2]}" if "|" in query else "Joint samples",
            "kind": "triptych",
            "columns": ["given", "true", "generated"] if "|" in query else ["image", "mask"],
            "png": picture(3 if "|" in query else 2, seed),
        }
        for query in asked[:3]
    ]
    return {
        "schema": 1,
        "setting": setting,
        "task": task,
        "method": method,
        "seed": seed,
        "role": role,
        "title": TITLES.get(method, method),
        "status": "ok",
        "reason": None,
        "fingerprint": "0123",
        "config": {"training": {"steps": 800}},
        "code": {"version": "0.1.0", "source": "0123abcd"},
        "hardware": {"processor": "Processor 9000", "threads": 1, "device": "cpu", "torch": "2.15.0"},
        "cost": {
            "steps": 800,
            "batch_size": 64,
            "parameters": 900_000 + 20_000 * len(asked),
            "train_seconds": 95.0 + seed + len(asked),
            "seconds_per_step": 0.119,
            "flops_per_step": 2_345_678_901 + 10_000_000 * len(asked),
            "evaluate_seconds": 20.0,
        },
        "metrics": measured(asked, skill, seed, f"{setting}{task}{method}"),
        "directions": DIRECTIONS,
        "curve": curve,
        "figures": figures if seed == 0 else [],
    }


def broken(whole: Tables, status: str, reason: str) -> Tables:
    """As a runner might leave it, with the numbers it had."""
    return whole | {"status": status, "reason": reason}


def benchmark() -> tuple[Tables, list[Tables]]:
    """A profile and its cells: two settings, eight tasks, ten methods, three seeds; some broken or missing."""
    cells = []
    for s, setting in enumerate(("digits", "shapes")):
        for seed in (0, 1, 2):
            for t, task in enumerate(TASKS):
                asked = queries(task)
                made = cell(setting, task, "joint", seed, asked, skill=(0.45, -0.2, 0.0, 0.1, 0.0, -0.3, -0.6, 0)[t])
                cells.append(made)
                if task == "all":
                    for n, method in enumerate(("joint-readout", "joint-shared", "independent")):
                        cells.append(cell(setting, task, method, seed, asked, skill=(-0.3, -0.9, -0.5)[n]))
                    for method, query in CONTROLS.items():
                        if query in asked and not (s == 1 and method == "mask-conditional" and seed > 0):
                            cells.append(cell(setting, task, method, seed, [query]))
                if task == "masked-image":
                    cells.append(cell(setting, task, "reconstruction", seed, asked[:-1], skill=0.05))
    for n, made in enumerate(cells):
        name = (made["setting"], made["task"], made["method"], made["seed"])
        if name == ("digits", "all", "joint-shared", 1):
            cells[n] = broken(made, "diverged", "loss is not finite at step 312 (last finite value 88.1)")
            cells[n]["curve"] = [*made["curve"][:15], {"step": 312, "loss": float("nan")}]
        if name[:3] == ("shapes", "image+mask", "joint"):
            cells[n] = broken(made, "diverged", "loss is not finite at step 77")
        if name == ("shapes", "mask+label", "joint", 2):
            cells[n] = broken(made, "failed", "the data set 'shapes' has no field <mask> | none at all")
    planned = [f"{c['setting']}/{c['task']}/{c['method']}/{c['seed']}" for c in cells]
    planned += ["shapes/all/mask-conditional/1", "shapes/all/mask-conditional/2"]
    profile = {
        "name": "small",
        "title": "A small benchmark",
        "description": "Made-up numbers of the shape that real ones have.",
        "seeds": [0, 1, 2],
        "settings": {"digits": {"title": "Handwritten digits, 8 × 8"}, "shapes": {"title": "Shapes, 16 × 16"}},
        "tasks": {
            name: {"title": title, "paper": "joint image and label" if n == 0 else None}
            for n, (name, title) in enumerate(TASKS.items())
        },
        "methods": {name: {"title": title, "role": "baseline"} for name, title in TITLES.items()},
        "cells": sorted(planned),
    }
    return profile, cells


def write(folder: Path, profile: Tables, cells: list[Tables], name: Callable[[int], str] = "{:04}.json".format) -> Path:
    (folder / "cells").mkdir(parents=True)
    (folder / "profile.json").write_text(json.dumps(profile), encoding="utf-8")
    for n, made in enumerate(cells):
        (folder / "cells" / name(n)).write_text(json.dumps(made), encoding="utf-8")
    return folder


def small() -> tuple[Tables, list[Tables]]:
    """One task, a joint model and its control, two seeds."""
    profile, cells = benchmark()
    wanted = {("digits", "all", method, seed) for method in ("joint", "classifier") for seed in (0, 1)}
    chosen = [c for c in cells if (c["setting"], c["task"], c["method"], c["seed"]) in wanted]
    return profile | {"cells": []}, copy.deepcopy(chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write(tmp_path_factory.mktemp("benchmark"), *benchmark())
    build_report(made)
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Notes what a page opens and does not close, what it refers to, and its text by element."""

    VOID = frozenset(["meta", "img", "br", "hr", "input", "link", "path", "line", "circle"])

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.wrong: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"{self.getpos()}: </{tag}>")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def test_the_page_is_well_formed(page: str) -> None:
    reader = Reader(page)
    assert reader.wrong == []
    assert reader.open == []


def test_every_row_of_a_table_has_the_same_width(page: str) -> None:
    for table in re.findall(r"<table.*?</table>", page, re.S):
        down: list[int] = []  # cells that reach into the next row
        widths = set()
        for row in re.findall(r"<tr.*?</tr>", table, re.S):
            cells = re.findall(r"<t[hd]\b[^>]*>", row)
            widths.add(sum(int((re.search(r'colspan="(\d+)"', c) or [0, 1])[1]) for c in cells) + sum(down))
            down = [1 for c in cells if 'rowspan="2"' in c]
        assert len(widths) == 1, table[:300]


def test_the_page_loads_nothing(page: str) -> None:
    for tag, attributes in Reader(page).tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_links_lead_somewhere_and_tables_and_pictures_are_named(page: str) -> None:
    tags = Reader(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in tags:
        if tag == "a":
            assert attributes["href"][1:] in ids
        if tag == "th":
            assert attributes["scope"] in ("col", "row", "colgroup", "rowgroup")
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg" and attributes.get("class") == "curve":
            assert "steps" in attributes["aria-label"]
    headings = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


def test_the_sections_stand_in_order(page: str) -> None:
    order = re.findall(r'<h2 id="(\w+)"', page)
    sections = "headline run transfer reconstruction remedies tasks cost curves figures troubles reading"
    assert order == sections.split()


def test_what_was_found_stands_before_what_was_run(page: str) -> None:
    """The first screen is a sentence and a picture."""
    places = [page.index(part) for part in ('class="lede"', "<figure>", '<dl class="facts">', '<h2 id="transfer">')]
    assert places == sorted(places)


def test_without_controls_joint_models_are_compared_and_transfer_is_no_section(tmp_path: Path) -> None:
    profile, cells = benchmark()
    joint = [made for made in cells if made["role"] == "joint"]
    page, document = (path.read_text(encoding="utf-8") for path in build_report(write(tmp_path / "x", profile, joint)))
    count = len({made["method"] for made in joint})
    for made in (page, document):
        assert f"there is no control. {count} joint models are compared with one another." in made
        assert "There is nothing to compare" not in made
    assert 'id="transfer"' not in page and "#transfer" not in page and "## Transfer" not in document
    assert page.index("<figure>") < page.index('<dl class="facts">')


def test_the_same_results_give_the_same_bytes_in_whatever_order_they_are_read(folder: Path, tmp_path: Path) -> None:
    profile, cells = benchmark()
    shuffled = [dict(sorted(c.items(), reverse=True)) for c in cells]
    random.Random(0).shuffle(shuffled)
    write(tmp_path / "other", profile, shuffled, lambda n: f"{(n * 37) % 101:03}-x.json")
    for one, other in zip(
        (folder / "report.html", folder / "report.md"), build_report(tmp_path / "other"), strict=True
    ):
        assert one.read_bytes() == other.read_bytes()


def test_the_headline_counts_every_cell_and_verdict(folder: Path, page: str) -> None:
    assert "95 ok, 4 diverged, 1 failed, 2 missing" in page
    results = read_results(folder)
    lead = [t for t in results.transfers if t.group.method == "joint"]
    found = count(lead)
    assert found.total == len(lead) == found.helps + found.hurts + found.free + found.undecided
    assert (
        f"better in {found.helps}, worse in {found.hurts}, a tie in {found.free}, undecided in {found.undecided}"
        in page
    )
    assert min(found.helps, found.hurts, found.free, found.undecided) > 0


def test_a_gain_and_a_loss_come_out_as_they_were_made(folder: Path) -> None:
    found = {(t.group.id, t.key): t for t in read_results(folder).transfers}
    gain = found[("digits", "image+label", "joint"), "label|image/accuracy"]
    loss = found[("digits", "all", "joint"), "label|image/accuracy"]
    assert gain.comparison
    assert loss.comparison
    assert gain.control.method == "classifier"
    assert (gain.comparison.verdict, loss.comparison.verdict) == ("helps", "hurts")
    assert gain.comparison.effect == pytest.approx(1 - math.exp(-0.45), abs=0.1)  # errors fall by that factor
    assert (gain.comparison.scale, found[gain.group.id, "label|image/nll"].comparison.scale) == ("error", "value")


def test_the_control_is_the_first_of_the_profile_and_of_the_same_task(tmp_path: Path) -> None:
    profile, cells = small()
    other = [c | {"task": "image+label"} for c in cells if c["method"] == "classifier"]
    rival = [c | {"method": "a-rival", "title": "rival"} for c in cells if c["method"] == "classifier"]
    profile["methods"] = {"classifier": {"title": "classifier"}, "a-rival": {}, "joint": {}}
    results = read_results(write(tmp_path / "a", profile, cells + other + rival))
    assert {(t.control.task, t.control.method) for t in results.transfers} == {("all", "classifier")}
    without = [c for c in cells if c["method"] != "classifier"] + other
    results = read_results(write(tmp_path / "b", profile, without + rival))
    assert {(t.control.task, t.control.method) for t in results.transfers} == {("image+label", "classifier")}


def at_budget(cells: list[Tables], budget: str, steps: int, skill: float) -> list[Tables]:
    """The classifier once more, at another budget."""
    made = []
    for one in cells:
        if one["method"] == "classifier":
            where = (one["setting"], one["task"], f"classifier-{budget}", one["seed"])
            cost = one["cost"] | {
                "steps": steps,
                "budget": budget,
                "matched": {
                    "budget": budget,
                    "joint": "joint",
                    "joint_steps": 800,
                    "joint_per_step": 3.0,
                    "per_step": 2.0,
                    "steps": steps,
                },
            }
            made.append(cell(*where, ["label|image"], skill) | {"role": "control", "title": "", "cost": cost})
    return made


def test_controls_at_other_budgets_have_rows_of_their_own_and_are_in_no_count_but_theirs(tmp_path: Path) -> None:
    profile, cells = small()
    plain = read_results(write(tmp_path / "plain", profile, cells))
    # First in the profile: it would be the control if budgets were not kept apart.
    names = {"classifier-flops": {"title": "image classifier", "budget": "flops"}, "classifier-seconds": {}}
    profile["methods"] = names | profile["methods"]
    others = at_budget(cells, "flops", 1200, 2.0) + at_budget(cells, "seconds", 555, 0.0)
    folder = write(tmp_path / "x", profile, cells + others)
    results = read_results(folder)
    assert [(t.key, t.comparison) for t in results.transfers] == [(t.key, t.comparison) for t in plain.transfers]
    assert count(results.transfers) == count(plain.transfers)
    assert results.uncontrolled == plain.uncontrolled
    rows = [(t.key, t.control.method) for t in results.rows if t.key == "label|image/nll"]
    names = ["classifier", "classifier-flops", "classifier-seconds"]
    assert rows == [("label|image/nll", name) for name in names]
    assert {t.control.budget for t in results.matched} == {"flops", "seconds"}
    page, document = (path.read_text(encoding="utf-8") for path in build_report(folder))
    assert Reader(page).wrong == []
    for made in (page, document):
        assert "controls at equal FLOPs" in made
        assert "image classifier, at equal FLOPs" in made
        assert "the FLOPs of 800 steps of joint" in made
        assert "the seconds of 800 steps of joint" in made
        assert "1,200 × 64" in made
        assert "2 cells at equal FLOPs, 2 cells at equal seconds" in made
        assert "800 steps of 64 samples" in made
        assert "1,200 steps" not in made
    assert "(classifier-seconds, at equal seconds)" in document
    assert "against controls at equal seconds" in page


def test_a_metric_whose_only_control_is_at_another_budget_is_uncontrolled_and_shown(tmp_path: Path) -> None:
    profile, cells = small()
    plain = read_results(write(tmp_path / "plain", profile, cells))
    others = at_budget(cells, "flops", 1200, 0.0)
    folder = write(tmp_path / "x", profile, [c for c in cells if c["method"] != "classifier"] + others)
    results = read_results(folder)
    assert results.transfers == ()
    assert len(results.rows) == len(plain.transfers)
    assert results.uncontrolled == plain.uncontrolled + len(plain.transfers)
    page, document = (path.read_text(encoding="utf-8") for path in build_report(folder))
    assert "Every comparison with its interval" in page
    assert "(classifier-flops, at equal FLOPs)" in document


def test_an_unknown_budget_is_told(tmp_path: Path) -> None:
    profile, cells = small()
    cells[0]["cost"]["budget"] = "minutes"
    with pytest.raises(UserError, match=r"0000\.json: .*budget"):
        build_report(write(tmp_path / "x", profile, cells))


def test_a_metric_with_negative_values_is_compared_plainly(tmp_path: Path) -> None:
    profile, cells = small()
    for made in cells:
        made["metrics"]["image|label/kid_judge"] = -0.001 if made["method"] == "joint" else 0.002
        made["metrics"]["image|label/mse"] = 0.4
    folder = write(tmp_path / "x", profile, cells)
    results = read_results(folder)
    assert {m: results.scales[m] for m in ("kid_judge", "mse", "accuracy", "nll")} == {
        "kid_judge": "absolute",
        "mse": "value",
        "accuracy": "error",
        "nll": "value",
    }
    assert "+0.00300" in build_report(folder)[1].read_text(encoding="utf-8")


def test_the_headline_tells_the_values_where_a_share_is_beyond_telling(tmp_path: Path) -> None:
    profile, cells = small()
    for made in cells:
        joint = made["method"] == "joint"
        made["metrics"]["label|image/accuracy"] = (0.7 if joint else 0.99) + 0.01 * made["seed"] * joint
    document = build_report(write(tmp_path / "x", profile, cells))[1].read_text(encoding="utf-8")
    (losses,) = (line for line in document.splitlines() if line.startswith("Greatest losses"))
    assert "label|image/accuracy in digits, all: 0.705 to the control's 0.990" in losses.replace("\\", "")
    assert "999%" not in losses


def test_a_perfect_control_does_not_rule_the_median_or_the_headline(tmp_path: Path) -> None:
    profile, cells = small()
    _, third = benchmark()
    cells += [c for c in third if c["seed"] == 2 and c["setting"] == "digits" and c["task"] == "all"]
    cells = [c for c in cells if c["method"] in ("joint", "classifier")]
    plain = count(read_results(write(tmp_path / "plain", profile, cells)).transfers)
    for made in cells:
        worse = 0.01 * made["seed"]
        perfect = made["method"] == "classifier"
        made["metrics"] |= {f"label|image/{m}": 1.0 if perfect else 0.5 - worse for m in ("f1", "miou", "recall_x")}
        made["metrics"] |= {f"label|image/{m}": 1e-4 if perfect else 0.3 + worse for m in ("ece", "readout_nll")}
        made["directions"] = made["directions"] | {"f1": "higher", "recall_x": "higher"}
        made["directions"] |= {"ece": "lower", "readout_nll": "lower"}
    folder = write(tmp_path / "x", profile, cells)
    results = read_results(folder)
    scales = {split_key(t.key)[1]: t.comparison.scale for t in results.transfers if t.comparison}
    assert scales == {
        **dict.fromkeys(("f1", "miou", "recall_x", "ece"), "points"),
        "readout_nll": "absolute",
        "accuracy": "error",
        "nll": "value",
    }
    found = count(results.transfers)
    assert found.median == plain.median
    assert found.hurts == plain.hurts + 5
    page, document = (path.read_text(encoding="utf-8") for path in build_report(folder))
    for made in (page, document):
        assert "999%" not in made
        assert "points: control nearly perfect" in made
        assert "−51.0 points" in made
    (named,) = (line for line in document.splitlines() if line.startswith("Where the control is nearly perfect"))
    assert named.count("−51.0 points (") == 3
    greatest = [line for line in document.splitlines() if line.startswith("Greatest")]
    assert not any("image/f1" in line or "readout" in line for line in greatest)


def test_real_data_and_what_has_no_direction_are_never_compared_or_ranked(folder: Path) -> None:
    results = read_results(folder)
    assert {split_key(t.key)[1] for t in results.transfers} <= DIRECTIONS.keys()
    assert not any(t.key.startswith("real/") for t in results.transfers)
    for _, _, groups in results.by_task():
        for key in {key for group in groups for key in group.keys}:
            if key.startswith("real/") or key.endswith("/samples"):
                assert best(results, groups, key) == frozenset()


def test_the_best_mean_follows_the_direction(folder: Path) -> None:
    results = read_results(folder)
    for setting, task, groups in results.by_task():
        if (setting, task) == ("digits", "all"):
            assert best(results, groups, "image|label/fid_judge") == {"class-conditional"}
            assert best(results, groups, "label|image/accuracy") == {"classifier"}
            assert best(results, groups, "clip|image/cosine") == {"joint-readout"}


def test_a_diverged_cell_is_diverged_and_never_a_number(tmp_path: Path) -> None:
    profile, cells = small()
    for made in cells:
        if made["method"] == "joint":
            made["metrics"] = dict.fromkeys(made["metrics"], 0.123456)
            made |= {"status": "diverged", "reason": "loss is not finite at step 5", "figures": []}
    page, document = (path.read_text(encoding="utf-8") for path in build_report(write(tmp_path / "x", profile, cells)))
    for made in (page, document):
        assert "0.1235" not in made
        assert "0.123456" not in made
        assert "loss is not finite at step 5" in made
        assert "digits/all/joint/0" in made
        assert "2 ok, 2 diverged" in made
        assert "There is nothing to compare" in made
    assert '<td class="lost">diverged</td>' in page
    assert "| diverged |" in document


def test_a_lost_seed_is_told_and_left_out(tmp_path: Path) -> None:
    profile, cells = small()
    key = "label|image/accuracy"
    for made in cells:
        made["metrics"][key] = 0.75 if made["seed"] == 0 else 0.5
    broken_one = next(c for c in cells if c["method"] == "joint" and c["seed"] == 1)
    broken_one |= {"status": "diverged", "reason": "loss is not finite"}
    folder = write(tmp_path / "x", profile, cells)
    transfer = next(t for t in read_results(folder).transfers if t.key == key)
    assert transfer.comparison
    assert (transfer.comparison.seeds, transfer.comparison.difference) == (1, 0.0)
    assert transfer.comparison.verdict == "undecided"
    assert "1 of 2 seeds, 1 diverged" in build_report(folder)[0].read_text(encoding="utf-8")


def test_a_model_that_diverged_keeps_its_row_of_the_heat_map(page: str) -> None:
    shapes = page[page.index("<h3>Shapes, 16 × 16</h3>") : page.index('<h2 id="tasks"')]
    row = re.search(r"<tr>(?:(?!</tr>).)*Image and segmentation mask(?:(?!</tr>).)*</tr>", shapes, re.S)
    assert row
    assert re.search(r'<td class="lost" colspan="\d+">diverged</td>', row[0])


def test_values_that_are_not_finite_are_shown_as_such_and_not_compared(tmp_path: Path) -> None:
    profile, cells = small()
    cells[0]["metrics"]["label|image/nll"] = float("inf")
    folder = write(tmp_path / "x", profile, cells)
    results = read_results(folder)
    assert [t.comparison for t in results.transfers if t.key == "label|image/nll"] == [None]
    assert results.scales["nll"] == "value"
    assert all("not finite" in path.read_text(encoding="utf-8") for path in build_report(folder))


def test_missing_cells_are_named(page: str, document: str) -> None:
    for made in (page, document):
        assert "shapes/all/mask-conditional/2" in made


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object, found list"),
        ('{"schema": 2}', "schema 2, this version reads 1"),
        ("{}", "schema None, this version reads 1"),
        ('{"schema": 1, "setting": "digits"}', "required field"),
    ],
)
def test_a_damaged_cell_is_an_error_that_names_its_file(tmp_path: Path, content: str, told: str) -> None:
    folder = write(tmp_path / "x", *small())
    (folder / "cells/bad.json").write_text(content)
    with pytest.raises(UserError, match=rf"bad\.json: .*{re.escape(told)}"):
        build_report(folder)
    assert not (folder / "report.html").exists()


def sounding(kind: str, data: str) -> Tables:
    """A change of a cell: a figure that is heard."""
    sounds = [[{"type": kind, "data": data}]]
    return {"figures": [{"name": "x", "title": "x", "png": picture(1, 0), "columns": ["x"], "sounds": sounds}]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metrics": {"a/accuracy": "high"}}, "metrics['a/accuracy']"),
        ({"status": "fine"}, "status"),
        ({"directions": {"accuracy": "up"}}, "directions['accuracy']"),
        ({"directions": {"accuracy": "lower"}}, "better lower, other cells higher"),
        ({"figures": [{"name": "x", "title": "x", "png": "AAAA"}]}, "figure 'x': expected a PNG"),
        (sounding("text/html", "AAAA"), "invalid value @ file.figures[0].sounds[0][0]"),
        (sounding("audio/wav", '"onload="'), "invalid value @ file.figures[0].sounds[0][0]"),
        ({"figures": [{"name": "x", "title": "x", "png": "<svg>"}]}, "figure 'x': expected a PNG"),
        ({}, "remove one of them"),
    ],
)
def test_what_is_not_as_expected_is_told_with_its_file(tmp_path: Path, change: Tables, told: str) -> None:
    profile, cells = small()
    folder = write(tmp_path / "x", profile, cells)
    twin = cells[0] | ({"seed": 7} if change else {}) | change
    (folder / "cells/zz.json").write_text(json.dumps(twin))
    with pytest.raises(UserError, match=rf"zz\.json: .*{re.escape(told)}"):
        build_report(folder)


def test_a_folder_without_profile_or_cells_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile\.json: no such file"):
        build_report(tmp_path)
    with pytest.raises(UserError, match="no results there"):
        build_report(write(tmp_path / "x", small()[0], []))


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    profile, cells = small()
    profile |= {"title": "<b>1 | 2</b>", "description": "a & <i>b</i>"}
    for made in cells:
        made["metrics"]["<x>|image/acc<u>r"] = 0.5
        made["directions"] = made["directions"] | {"acc<u>r": "higher"}
        made["title"] = "t<script>alert(1)</script>|`"
        if made["method"] == "classifier" and made["seed"] == 1:
            made |= {"status": "failed", "reason": "no <field> | none\nsecond line"}
    profile["methods"] = {}
    page, document = (path.read_text(encoding="utf-8") for path in build_report(write(tmp_path / "x", profile, cells)))
    reader = Reader(page)
    assert reader.wrong == []
    assert not {"script", "b", "i", "x", "u", "field"} & ({tag for tag, _ in reader.tags} - {"b"})
    text = "".join(reader.text)
    for shown in ("<b>1 | 2</b>", "<x>|image/acc<u>r", "t<script>alert(1)</script>|`", "no <field> | none"):
        assert shown in text
    assert "`<x>\\|image/acc<u>r`" in document
    assert r"# \<b\>1 \| 2\</b\>" in document
    assert r"no \<field\> \| none second line" in document


def test_the_tables_of_the_document_are_whole(document: str) -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", document, re.M)
    assert (
        len(tables) == 26
    )  # counts, transfer, holes of two shapes and two joint tables in two settings; eight tasks in
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_no_distance_goes_without_its_features(page: str, document: str) -> None:
    for made in (page, document):
        text = re.sub(r"<style>.*?</style>|base64,[^\"]*", "", made, flags=re.S)
        assert not re.search(r"\b(FID|LPIPS)\b", text)
        assert "in the features of “judge”" in text


def test_what_is_heard_has_players_below_its_figure(tmp_path: Path) -> None:
    profile, cells = small()
    figure = next(each for each in cells if each["figures"])["figures"][0]
    sounds = [{"type": "audio/wav", "data": data} for data in ("UklG", "RklV")]
    figure["sounds"] = [[], sounds, *[[]] * (len(figure["columns"]) - 2)]
    page, _ = build_report(write(tmp_path / "x", profile, cells))
    text = page.read_text(encoding="utf-8")
    players = [attributes for tag, attributes in Reader(text).tags if tag == "audio"]
    assert {a["src"] for a in players} == {"data:audio/wav;base64,UklG", "data:audio/wav;base64,RklV"}
    assert {a["aria-label"] for a in players} == {f"{figure['columns'][1]}, sample {n}" for n in (1, 2)}
    assert all("controls" in a and a["preload"] == "none" for a in players)


def test_figures_are_in_the_page_enlarged_by_whole_pixels(page: str) -> None:
    shown = [attributes for tag, attributes in Reader(page).tags if tag == "img"]
    assert shown
    assert {(a["width"], a["height"]) for a in shown} == {("340", "102"), ("340", "68")}
    assert Image.open(io.BytesIO(base64.b64decode(shown[0]["src"].partition(",")[2]))).width == 340
