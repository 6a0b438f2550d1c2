"""``mtdiffusion bench plan``: what ``mtdiffusion plan`` says of a step's time, beside steps measured on this machine.

A large matrix product, a copy of memory and steps of each training take turns, so that the ratios stand even if the
machine's speed drifts. What is measured is what `plan` has to assume: the device's rates, and which share of its
operations a second the network gets.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_benchmarks.timing import STEPS, Contender, Setting, race, train_ours
from mtdiffusion_engine.environment import native_bfloat16
from mtdiffusion_engine.experiment import Experiment, with_precision
from mtdiffusion_engine.plan import Assumptions, Device, Row, plan_training
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Registry

RESULT = Path("benchmarks/results/plan.json")
_SIDE = {"cpu": 1024, "cuda": 8192}
_BYTES = {"cpu": 2**28, "cuda": 2**32}  # copied, far more than caches hold
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNIT = Device("one of each a second", 1.0, 1.0, memory=1.0, bandwidth=1.0, link=1.0, network=1.0)
"""What a step takes on it is what a step does."""


def _product(precision: str, setting: Setting) -> Contender:
    side, dtype = _SIDE[setting.device], _DTYPES[precision]
    a, b = (torch.randn(side, side, device=setting.device, dtype=dtype) for _ in range(2))
    return Contender(f"matrix product, {precision}", lambda: [a @ b for _ in range(10)], work=10 * 2 * side**3)


def _copy(setting: Setting) -> Contender:
    source = torch.zeros(_BYTES[setting.device] // 4, device=setting.device)
    target = torch.empty_like(source)
    return Contender("copy of memory", lambda: target.copy_(source), work=2 * source.nbytes)  # read and written


def _memory_of(device: str) -> int:
    """Bytes that there are."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure(
    experiments: Mapping[str, Experiment], rounds: int, registry: Registry, device: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """All that ``bench plan`` finds, as JSON.

    Args:
        experiments: by name; each trains in this process, as its configuration says.
        rounds: that are counted.
        device: "cpu" or "cuda".

    Raises:
        UserError: if one of them cannot be trained.
    """
    setting = Setting(device=device)
    native = native_bfloat16(torch.device(device))
    experiments = {title: with_precision(each, native) for title, each in experiments.items()}
    rows = {title: plan_training(each, [1], _UNIT).rows[0] for title, each in experiments.items()}
    precisions = dict.fromkeys(each.training.precision for each in experiments.values())
    with tempfile.TemporaryDirectory(prefix="mtdiffusion-plan-") as name:
        copy, products = _copy(setting), {precision: _product(precision, setting) for precision in precisions}
        trainings = {}
        for number, (title, experiment) in enumerate(experiments.items()):
            folder = Path(name) / str(number)
            trainer = Trainer(experiment, folder, registry, evaluated=False, device=device, on_message=lambda _: None)
            trainings[title] = Contender(title, train_ours(trainer), trainer=trainer)
        race([copy, *products.values(), *trainings.values()], rounds, say, setting)
    bandwidths = _rates(copy)
    found = {
        title: _found(experiment, rows[title], trainings[title], products[experiment.training.precision], bandwidths)
        for title, experiment in experiments.items()
    }
    first = statistics.median(next(iter(found.values()))["attained"])
    for row in found.values():
        row["by_first"] = _over(row, first)
    return {
        "version": version("mtdiffusion"),
        "hardware": hardware(device),
        "system": platform.platform(),
        "rounds": rounds,
        "steps_a_round": STEPS,
        "rates": {name: _rates(each) for name, each in products.items()},
        "bandwidths": bandwidths,
        "memory": _memory_of(device),
        "assumed": Assumptions().attained,
        "trainings": found,
    }


def _rates(contender: Contender) -> list[float]:
    """Work a second, in each round."""
    return [contender.work / seconds for seconds in contender.seconds]


def _found(
    experiment: Experiment, row: Row, steps: Contender, product: Contender, bandwidths: Sequence[float]
) -> dict[str, Any]:
    """Of each round: seconds of a step, those of its operations at the matrix product's rate, and of its weights; the
    share of that rate that it gets; and what `plan` says, assuming the usual share, over what is measured."""
    training = experiment.training
    measured = [seconds / STEPS for seconds in steps.seconds]
    compute = [row.flops / rate for rate in _rates(product)]
    weights = [row.seconds["weights"] / bandwidth for bandwidth in bandwidths]
    found: dict[str, Any] = {
        "precision": training.precision,
        "batch_size": training.batch_size,
        "steps": training.steps,
        "flops": row.flops,
        "seconds": measured,
        "compute": compute,
        "weights": weights,
        # If the weights alone were to take as long as the step, nothing would be left to tell a share from.
        "attained": [
            operations / max(step - weight, 1e-3 * step)
            for operations, step, weight in zip(compute, measured, weights, strict=True)
        ],
    }
    return {**found, "planned": _over(found, Assumptions().attained)}


def _over(row: Mapping[str, Any], attained: float) -> list[float]:
    """Seconds of a step as `plan` has them, by some share of the rate, over those measured, in each round."""
    each = zip(row["compute"], row["weights"], row["seconds"], strict=True)
    return [(compute / attained + weights) / step for compute, weights, step in each]


def table(result: Mapping[str, Any]) -> str:
    """What was found, for people."""
    rates = ", ".join(
        f"{statistics.median(each) / 1e9:,.0f} GFLOP/s in {name}" for name, each in result["rates"].items()
    )
    bandwidth = statistics.median(result["bandwidths"])
    lines = [
        f"Matrix products: {rates}. Memory: {bandwidth / 1e9:.1f} GB/s. Medians of {result['rounds']} rounds, and the "
        "range of the ratios.",
        "",
        f"| training | GFLOP a step | s a step | hours of all steps | share of the matrix product's rate | planned / "
        f"measured, by {result['assumed']:.0%} of it | by the share of the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, row in result["trainings"].items():
        seconds = statistics.median(row["seconds"])
        cells = [
            title,
            f"{row['flops'] / 1e9:.3g}",
            f"{seconds:.3g}",
            f"{row['steps'] * seconds / 3600:.3g}",
            *(_range(row[key]) for key in ("attained", "planned", "by_first")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def options(result: Mapping[str, Any]) -> str:
    """The options by which ``mtdiffusion plan`` goes by what was measured here."""
    rates = {name: statistics.median(each) for name, each in result["rates"].items()}
    flops = rates.get("bfloat16", rates.get("float32"))
    attained = min(statistics.median(next(iter(result["trainings"].values()))["attained"]), 1.0)
    figures = {
        "flops": flops,
        "float32": rates.get("float32", flops),
        "memory": result["memory"],
        "bandwidth": statistics.median(result["bandwidths"]),
        "attained": attained,
    }
    return " ".join(f"--{name} {value:.3g}" for name, value in figures.items())


def _range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
