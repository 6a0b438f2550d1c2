"""Variants of one configuration at one budget over several seeds: a JSON result a cell, a table from those alone.

::

    python -m mtdiffusion_benchmarks.ablation SPEC.toml --out FOLDER [--only VARIANT ...] [--seeds 0 1]

A cell whose result is there is not run again, so an interrupted ablation goes on where it stopped, and several
processes can share one folder if they are given different variants or seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen

from mtdiffusion_engine.checkpoint import write_json
from mtdiffusion_engine.evaluation import complete_samples, evaluate, evaluate_joint
from mtdiffusion_engine.experiment import Experiment, load_experiment, resolved
from mtdiffusion_engine.run import Run, load_run
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import load_toml, structure


@frozen
class Variant:
    """One row of the table.

    Attributes:
        title: what the table calls it.
        set: ``table.key=value`` changes to the base.
        trained_as: the variant whose trained model it uses; None: its own.
    """

    title: str
    set: tuple[str, ...] = ()
    trained_as: str | None = None


@frozen
class Ablation:
    """A specification file.

    Attributes:
        base: the configuration that variants change.
        seeds: each variant is trained once with each.
        set: changes common to all variants.
        metrics: columns of the table; the default is every metric that a run reports.
    """

    base: str
    variants: dict[str, Variant]
    seeds: tuple[int, ...] = (0, 1, 2)
    set: tuple[str, ...] = field(default=())
    metrics: tuple[str, ...] = ()


def run_cell(
    spec: Ablation, name: str, seed: int, folder: Path, registry: Registry, say: Callable[[str], None]
) -> None:
    """Train (or find trained) and evaluate one variant with one seed; writes ``cells/NAME-SEED.json``."""
    result = folder / "cells" / f"{name}-{seed}.json"
    if result.exists():
        return
    variant = spec.variants[name]
    changes = [*spec.set, *variant.set, f"training.seed={seed}", f"evaluation.seed={seed}"]
    experiment = load_experiment(Path(spec.base), changes, registry)
    run_folder = folder / "runs" / f"{variant.trained_as or name}-{seed}"
    seconds = 0.0
    if variant.trained_as is None:
        say(f"{name} seed {seed}: training {experiment.training.steps} steps")
        started = time.monotonic()
        resume = (run_folder / "config.toml").is_file()
        Trainer(experiment, run_folder, registry, resume=resume, on_message=say, device="cpu").train()
        seconds = time.monotonic() - started
    elif not (folder / "cells" / f"{variant.trained_as}-{seed}.json").exists():
        raise UserError(f"variant {name!r} uses the model of {variant.trained_as!r}; run that one first")
    run = load_run(run_folder, registry=registry)
    say(f"{name} seed {seed}: evaluating")
    metrics = _evaluate(run, experiment)
    write_json(
        result,
        {
            "variant": name,
            "title": variant.title,
            "seed": seed,
            "train_seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "machine": {
                "processor": platform.machine(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "config": resolved(experiment, registry),
            "metrics": metrics,
        },
    )


def _evaluate(run: Run, experiment: Experiment) -> dict[str, float | int]:
    """A run's metrics with the variant's own sampling, and joint samples by DDIM beside them."""
    config = experiment.evaluation
    train = complete_samples(run.data("train"))
    test = complete_samples(run.data("test"), config.samples)
    judges = [evaluator.build(train) for evaluator in config.evaluators]
    metrics = evaluate(
        run.model,
        test,
        judges,
        conditional=evolve(experiment.sampling, steps=config.steps),
        joint=experiment.sampling,
        hidden_share=config.hidden_share,
        bound_times=config.bound_times,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    ddim = evolve(experiment.sampling, solver="ddim")
    count = int(metrics["joint/samples"])
    joint = evaluate_joint(run.model, count, judges, ddim, batch_size=config.batch_size, seed=config.seed)
    return metrics | {f"ddim/{key}": value for key, value in joint.items()}


BAR = r"\|"  # a bar inside a cell of a Markdown table


def tabulate(cells: Iterable[Mapping[str, Any]], metrics: Iterable[str]) -> str:
    """A Markdown table: a row a variant, mean ± standard deviation over seeds."""
    columns = list(metrics)
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        rows.setdefault(str(cell["title"]), []).append(cell)
    lines = ["| variant | seeds | " + " | ".join(f"`{c.replace('|', BAR)}`" for c in columns) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for title, group in rows.items():
        values = [[float(cell["metrics"][column]) for cell in group] for column in columns]
        texts = [
            f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in values
        ]
        lines.append(f"| {title} | {len(group)} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def write_table(spec: Ablation, folder: Path) -> Path:
    """``table.md`` from the cells that are there, variants in the specification's order."""
    order = list(spec.variants)
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cells").glob("*.json"))]
    cells.sort(key=lambda cell: (order.index(cell["variant"]), cell["seed"]))
    path = folder / "table.md"
    path.write_text(tabulate(cells, spec.metrics or sorted(cells[0]["metrics"])), encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mtdiffusion_benchmarks.ablation", description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="variants to run; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds to run; the specification's by default")
    options = parser.parse_args(arguments)
    try:
        registry = Registry.discover()
        spec = structure(registry, load_toml(options.spec), Ablation, str(options.spec))
        for name in options.only or spec.variants:
            if name not in spec.variants:
                raise UserError(f"--only: no variant named {name!r}; there are {', '.join(spec.variants)}")
            for seed in options.seeds or spec.seeds:
                run_cell(spec, name, seed, options.out, registry, lambda text: print(text, flush=True))
        print(f"table: {write_table(spec, options.out)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
