"""The tables of README.md and of docs/ (results, their details, performance), from the committed results alone.

::

    python -m mtdiffusion_benchmarks.results            # rewrite the tables
    python -m mtdiffusion_benchmarks.results --check    # exit with 1 if they are not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mtdiffusion_benchmarks import curves, perf, reading, solvers, startup
from mtdiffusion_benchmarks.gpu import tables as gpu
from mtdiffusion_benchmarks.report import variants
from mtdiffusion_benchmarks.report.markdown import code, variants_table
from mtdiffusion_benchmarks.report.tables import Results, read_results

ROWS: Mapping[str, str] = {
    "label → image: the judge reads the label given": "image|label/judge_accuracy",
    "mask → image: the judge reads the true label": "image|mask/judge_accuracy",
    "caption → image: the judge reads the true label": "image|text/judge_accuracy",
    "label → image: Fréchet distance in the judge's features": "image|label/fid_judge",
    "mask → image: the same": "image|mask/fid_judge",
    "caption → image: the same": "image|text/fid_judge",
    "mask → image: Fréchet distance in the segmenter's features": "image|mask/fid_segmenter",
    "CLIP embedding → image: the judge reads the true label": "image|clip/judge_accuracy",
    "image with holes → image: the class is kept": "image|image:part/judge_accuracy",
    "image → label: accuracy": "label|image/accuracy",
    "image → label in one evaluation: accuracy": "label|image/readout_accuracy",
    "CLIP embedding → label: accuracy": "label|clip/accuracy",
    "image → caption in one evaluation: words right": "text|image/readout_token_accuracy",
    "image → mask: mean IoU": "mask|image/miou",
    "image → mask in one evaluation: mean IoU": "mask|image/readout_miou",
    "image → CLIP embedding: cosine": "clip|image/cosine",
    "image, mask and label together: judge and label agree": "joint/judge_agreement",
    "joint images: Fréchet distance in the judge's features": "joint/fid_judge",
    "the same, with the training images' share of each class, as the judge reads them": "joint/fid_judge_balanced",
    "image and mask together: the segmenter finds the mask, mean IoU": "joint/segmenter_agreement",
    "joint images: Fréchet distance in the segmenter's features": "joint/fid_segmenter",
    "real held-out images: the judge's accuracy": "real/judge_accuracy",
    "real held-out images: Fréchet distance to the training images": "real/fid_judge",
    "the same, with the training images' share of each class": "real/fid_judge_balanced",
    "the same, their classes drawn at random as joint samples' are": "real/fid_judge_iid",
    "real held-out images: Fréchet distance in the segmenter's features": "real/fid_segmenter",
}
FEW = (
    "image|label/judge_accuracy",
    "image|text/judge_accuracy",
    "label|image/readout_accuracy",
    "text|image/readout_token_accuracy",
    "mask|image/readout_miou",
    "joint/fid_judge",
    "real/fid_judge",
)
"""What of a run stands in README.md."""


class Answer(NamedTuple):
    """A row of the table of answers.

    Attributes:
        title: what was asked.
        where: setting and task.
        key: of the metric.
        control: the method that was trained for this question alone; "": none.
        real: the key of the same metric of real held-out data; "": none.
        joint: the method whose answer it is.
    """

    title: str
    where: str
    key: str
    control: str = ""
    real: str = ""
    joint: str = "joint"


ANSWERS: Sequence[Answer] = (
    Answer(
        "**Street scenes** (CamVid): picture → mask, mean IoU ↑",
        "camvid/image+mask",
        "mask|image/readout_miou",
        "segmentation",
    ),
    Answer(
        "mask → picture, Fréchet distance ↓",
        "camvid/image+mask",
        "image|mask/fid_segmenter",
        "from-mask",
        "real/fid_segmenter",
    ),
    Answer(
        "the same, [guided](sampling.md#more-like-what-was-asked) by the mask",
        "camvid/image+mask",
        "image|mask/fid_segmenter",
        "from-mask",
        "real/fid_segmenter",
        joint="joint-guided",
    ),
    Answer(
        "picture and mask together, Fréchet distance ↓",
        "camvid/image+mask",
        "joint/fid_segmenter",
        real="real/fid_segmenter",
    ),
    Answer(
        "the same: a segmenter agrees with the mask, mean IoU ↑",
        "camvid/image+mask",
        "joint/segmenter_agreement",
        real="real/segmenter_miou",
    ),
    Answer(
        "**Objects** (CIFAR-10): picture → label, accuracy ↑",
        "cifar10/image+label",
        "label|image/readout_accuracy",
        "classifier",
    ),
    Answer(
        "label → picture, Fréchet distance ↓",
        "cifar10/image+label",
        "image|label/fid_judge",
        "from-label",
        "real/fid_judge",
    ),
    Answer("picture → embedding, cosine ↑", "cifar10-embedding/image+clip", "clip|image/readout_cosine", "embedding"),
    Answer(
        "embedding → picture, Fréchet distance ↓",
        "cifar10-embedding/image+clip",
        "image|clip/fid_judge",
        "from-embedding",
        "real/fid_judge",
    ),
    Answer(
        "three quarters hidden and filled in, Fréchet distance ↓",
        "cifar10/masked-image",
        "image|image:75%box/fid_judge",
        "filling",
        "real/fid_judge",
    ),
    Answer(
        "**Spoken digits** (FSDD): speech → label, accuracy ↑",
        "speech/image+label+speech",
        "label|speech/readout_accuracy",
        "hearing",
    ),
    Answer(
        "speech → picture, a judge reads the digit ↑",
        "speech/image+label+speech",
        "image|speech/judge_accuracy",
        "drawing",
        "real/judge_accuracy",
    ),
    Answer(
        "label → speech, a listener hears the digit ↑",
        "speech/image+label+speech",
        "speech|label/listener_accuracy",
        "speaking",
        "real/listener_accuracy",
    ),
    Answer(
        "picture → speech, a listener hears the digit ↑",
        "speech/image+label+speech",
        "speech|image/listener_accuracy",
        real="real/listener_accuracy",
    ),
    Answer(
        "all three together: the listener hears the label ↑",
        "speech/image+label+speech",
        "joint/listener_agreement",
        real="real/listener_accuracy",
    ),
)
"""What the profile of real data answers."""
RESULTS = Path("benchmarks/results")
TARGETS = (Path("README.md"), Path("docs/results.md"), Path("docs/results-details.md"), Path("docs/performance.md"))
START, END = "<!-- {} -->", "<!-- /{} -->"


def metrics_table(runs: Mapping[str, Mapping[str, float]], keys: Collection[str] = tuple(ROWS.values())) -> str:
    """A row a figure, a column a run."""
    lines = ["| | " + " | ".join(runs) + " |", "|---|" + "---|" * len(runs)]
    for title, key in ROWS.items():
        if key not in keys:
            continue
        cells = [f"{run[key]:.3f}" for run in runs.values() if key in run]
        if len(cells) == len(runs):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def benchmark_table(results: Results) -> str:
    """The table of a benchmark whose profile names its columns: a row a method, mean ± standard deviation over seeds.

    Where there are several settings or tasks, a row tells its own.
    """
    columns = results.profile.table
    groups = [group for group in results.groups if group.ok]
    several = [axis for axis in ("setting", "task") if len({getattr(group, axis) for group in groups}) > 1]
    lines = ["| variant | seeds | " + " | ".join(map(code, columns)) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for group in groups:
        where = "".join(f"{results.title(f'{axis}s', getattr(group, axis))}: " for axis in several)
        cells = []
        for column in columns:
            summary = group.summary(column)
            spread = "" if summary is None or summary.std is None else f" ± {summary.std:.3f}"
            cells.append("" if summary is None else f"{summary.mean:.3f}{spread}")
        lines.append(f"| {where}{group.title} | {len(group.ok)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def answers_table(results: Results) -> str:
    """The joint model's answers on real data, each beside a network trained for that question alone and real data."""
    found = {(f"{group.setting}/{group.task}", group.method): group for group in results.groups if group.ok}

    def value(where: str, method: str, key: str) -> str:
        if not (method and key):
            return ""
        summary = found[where, method].summary(key) if (where, method) in found else None
        if summary is None:
            return "not measured"
        spread = f" ± {summary.std:.2g}" if summary.std else ""
        return f"{summary.mean:.3g}{spread}"

    lines = ["| | one joint model | a network for this question alone | real held-out data |", "|---|---|---|---|"]
    for title, where, key, control, real, joint in ANSWERS:
        cells = (value(where, joint, key), value(where, control, key), value(where, "joint", real))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def side_by_side(results: Results, table: variants.Table) -> str:
    """The joint models of a task against their controls, by joint samples' distances and what decides the count."""
    keys = [key for key in table.keys if key.startswith("joint/fid")]
    keys += [key for own in table.primary.values() for key in own]
    return variants_table(results, table, keys, lambda group: f"{code(group.method)} ({group.state})")


def blocks(results: Path) -> dict[str, str]:
    """Every table by the name of its place in the documents."""
    runs = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(results.glob("*/metrics.json"))
    }
    made = {f"{name}: few": metrics_table({name: run}, FEW) for name, run in runs.items()}
    for family in ("digits", "scenes", "camvid", "cifar10"):
        if several := {name: run for name, run in runs.items() if name.startswith(family)}:
            made[family] = metrics_table(several)
    for path in sorted(results.glob("*/perf.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        made["perf"], made["perf: work"] = perf.table(measured), perf.flops_table(measured)
    for path in sorted(results.glob("*/curves.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        made["curves"], made["curves: seconds"] = curves.table(measured), curves.seconds_table(measured)
    made |= gpu.tables(results / "gpu")
    for path in sorted(results.glob("solvers/*.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        made[f"solvers: {path.stem}"] = solvers.table(measured)
    for path in sorted(results.glob("*/data.json")):
        made["data"] = startup.table(json.loads(path.read_text(encoding="utf-8")))
    for path in sorted(results.glob("*/reading.json")):
        made["reading"] = reading.table(json.loads(path.read_text(encoding="utf-8")))
    for path in sorted(results.glob("*/table.md")):
        made[path.parent.name] = path.read_text(encoding="utf-8").strip()
    for path in sorted(results.glob("*/profile.json")):
        benchmark = read_results(path.parent)
        if benchmark.profile.table:
            made[path.parent.name] = benchmark_table(benchmark)
        if benchmark.profile.name == "real":
            made[f"{path.parent.name}: answers"] = answers_table(benchmark)
        for table in variants.variants(benchmark):
            made[f"{path.parent.name}: {table.setting}/{table.task}"] = side_by_side(benchmark, table)
    return made


def fill(text: str, tables: Mapping[str, str]) -> str:
    """A document with each table between its two markers."""
    for name, table in tables.items():
        start, end = START.format(name), END.format(name)
        if start in text and end in text:
            head, _, rest = text.partition(start)
            text = head + start + "\n" + table + "\n" + end + rest.partition(end)[2]
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mtdiffusion_benchmarks.results", description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    tables, stale = blocks(RESULTS), []
    for path in TARGETS:
        old = path.read_text(encoding="utf-8")
        new = fill(old, tables)
        if new != old:
            stale.append(str(path))
            if not options.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'out of date' if options.check else 'rewritten'}: {', '.join(stale) or 'none'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
