"""``mtdiffusion bench solvers``: how good a run's samples are by each solver and number of evaluations, and which way
of sampling is the cheapest that is as good as a long one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, cast

from attrs import asdict, astuple, evolve, field, fields, frozen

from mtdiffusion import SamplerSettings
from mtdiffusion_benchmarks.report.markdown import code
from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_engine.evaluation import evaluate, fingerprint
from mtdiffusion_engine.judging import build_evaluators
from mtdiffusion_engine.measures import plan
from mtdiffusion_engine.metrics import directions_of
from mtdiffusion_engine.run import Run
from mtdiffusion_engine.samples import Wish, draw_samples, held_out
from mtdiffusion_registry import UserError
from mtdiffusion_registry.errors import did_you_mean

WITHIN = {"lower": 0.05, "higher": 0.02}
"""A figure is as good as the reference's if it is worse by no more than this share of it, by which way it is better."""


@frozen
class Way:
    """A way to sample: a solver, its noise and its steps, and guidance on the part of the path from low to high."""

    solver: str
    eta: float
    steps: int
    guidance: float = 1.0
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Way:
        """Of a row of a result; one made before guidance was compared has none."""
        return cls(**{each.name: row[each.name] for each in fields(cls) if each.name in row})

    @property
    def title(self) -> str:
        """As documents name it: ``dpmpp_2m, eta 1, guidance 2 from 0.2 to 0.8``."""
        parts = [self.solver] + ([f"eta {self.eta:g}"] if self.solver != "ancestral" else [])
        if self.guidance != 1:
            part = f" from {self.low:g} to {self.high:g}" if (self.low, self.high) != (0, 1) else ""
            parts.append(f"guidance {self.guidance:g}{part}")
        return ", ".join(parts)

    @property
    def evaluations(self) -> int:
        """Of the network, of a sample; a step with guidance takes two, where something is given."""
        guided = sum(self.low < k / self.steps <= self.high for k in range(1, self.steps + 1))
        return self.steps + (guided if self.guidance != 1 else 0)

    def settings(self, base: SamplerSettings) -> SamplerSettings:
        """The run's own settings, sampled this way."""
        return evolve(
            base,
            solver=cast(Any, self.solver),
            eta=self.eta,
            steps=self.steps,
            guidance=self.guidance,
            guidance_interval=(self.low, self.high),  # type: ignore[arg-type]  # its converter is generic
        )


def guidance(text: str) -> tuple[float, float, float]:
    """Guidance and the part of the path that has it, from ``G`` or ``G@LOW-HIGH``.

    Raises:
        UserError: if it is neither, or out of range.
    """
    value, given, part = text.partition("@")
    low, _, high = part.partition("-") if given else ("0", "", "1")
    try:
        found = float(value), float(low), float(high)
        SamplerSettings(guidance=found[0], guidance_interval=found[1:])  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(
            f"--guidance {text}: {error.args[0]}; expected a number, 1 for none, or one on a part of the path, such as "
            "2@0.2-0.8"
        ) from error
    return found


def way(text: str, steps: int, guided: tuple[float, float, float] = (1.0, 0.0, 1.0)) -> Way:
    """From ``SOLVER`` or ``SOLVER=ETA``, with guidance.

    Raises:
        UserError: if it is neither, or the solver does not take that eta.
    """
    name, given, eta = text.partition("=")
    try:
        chosen = SamplerSettings(steps=steps, solver=name, eta=float(eta) if given else None)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(
            f"--solver {text}: {error.args[0]}; expected a solver, or SOLVER=ETA, such as ddim=2"
        ) from error
    return Way(name, chosen.noise, steps, *guided)


@frozen(eq=False)
class Comparison:
    """What is compared.

    Attributes:
        keys: figures as ``mtdiffusion evaluate`` names them: ``image|label/fid_judge``.
        ways: the ways to sample; the first is the reference.
        samples: held-out samples, and joint ones, at most.
        seeds: how many draws of each.
    """

    run: Run
    keys: Sequence[str]
    ways: Sequence[Way]
    samples: int = 500
    seeds: int = 2
    say: Callable[[str], None] = field(default=print)

    def measure(
        self, before: Mapping[str, Any] | None = None, keep: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> dict[str, Any]:
        """Every figure of every way, as JSON has it.

        Args:
            before: an earlier result of the same run: what it has is not measured again.
            keep: is given what there is after each way.

        Raises:
            UserError: if there is no such figure, or the run cannot be evaluated.
        """
        model, config = self.run.model, self.run.experiment.evaluation
        modalities = {name: model.modality(name) for name in model.names}
        groups = list(dict.fromkeys(key.partition("/")[0] for key in self.keys))
        measures = plan(model.names, model.spatial, groups, bound=False)
        (test,) = draw_samples(held_out(self.run), [Wish(limit=self.samples)], config.seed)
        evaluators = build_evaluators(
            config.evaluators, modalities, lambda: self.run.data("train"), seed=config.seed, progress=self.say
        )
        directions = directions_of(modalities, evaluators)
        for key in self.keys:
            if key.partition("/")[2] not in directions:
                raise UserError(
                    f"--metric {key}: expected a figure of which it is known which way it is better, as `mtdiffusion "
                    f"evaluate` names it: GROUP/METRIC, METRIC among {', '.join(sorted(directions))}"
                )
        mark = fingerprint(self.run, test)
        same = before is not None and before["fingerprint"] == mark
        rows: list[dict[str, Any]] = list(before["rows"]) if before is not None and same else []
        result = {
            "run": self.run.path.absolute().name,
            "fingerprint": mark,
            "samples": len(test),
            "reference": asdict(self.ways[0]),
            "keys": list(self.keys),
            "directions": {key: directions[key.partition("/")[2]] for key in self.keys},
            "rows": rows,
            "hardware": hardware(str(model.device)),
            "version": version("mtdiffusion"),
        }
        done = {(Way.of(row), row["seed"]): row["metrics"] for row in rows}
        for each in self.ways:
            settings = each.settings(self.run.experiment.sampling)
            for seed in range(self.seeds):
                if all(key in done.get((each, seed), {}) for key in self.keys):
                    continue
                found = evaluate(
                    model,
                    test,
                    evaluators,
                    conditional=settings,
                    joint=settings,
                    measures=measures,
                    batch_size=config.batch_size,
                    seed=seed,
                    progress=lambda _: None,
                    note=self.say,
                )
                metrics = {key: found[key] for key in self.keys if key in found}
                if missing := [key for key in self.keys if key not in found]:
                    raise UserError(
                        f"--metric {missing[0]}: this run has no such figure{did_you_mean(missing[0], sorted(found))}"
                    )
                rows[:] = [row for row in rows if (Way.of(row), row["seed"]) != (each, seed)]
                rows.append({**asdict(each), "seed": seed, "metrics": metrics})
                told = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
                self.say(f"{each.title}, {each.evaluations} evaluations, seed {seed}: {told}")
                keep(result)
        return result


def _means(result: Mapping[str, Any]) -> dict[Way, dict[str, tuple[float, float]]]:
    """Mean and half the range over seeds of each figure, by way."""
    found: dict[Way, list[Mapping[str, float]]] = {}
    for row in result["rows"]:
        found.setdefault(Way.of(row), []).append(row["metrics"])
    return {
        each: {
            key: (statistics.mean(values), (max(values) - min(values)) / 2)
            for key in result["keys"]
            if (values := [metrics[key] for metrics in runs if key in metrics])
        }
        for each, runs in found.items()
    }


def good_enough(value: float, reference: float, direction: str) -> bool:
    """Whether a figure is as good as the reference's, within :data:`WITHIN`."""
    margin = WITHIN[direction] * abs(reference)
    return value >= reference - margin if direction == "higher" else value <= reference + margin


def cheapest(result: Mapping[str, Any]) -> dict[str, Way | None]:
    """By figure, the way of fewest evaluations that is as good as the reference; None if there is none below it."""
    means, reference = _means(result), Way.of(result["reference"])
    found: dict[str, Way | None] = {}
    for key in result["keys"]:
        aim = means[reference][key][0]
        direction = result["directions"][key]
        fits = [
            (each.evaluations, -values[key][0] if direction == "higher" else values[key][0], each)
            for each, values in means.items()
            if each.evaluations < reference.evaluations
            and key in values
            and good_enough(values[key][0], aim, direction)
        ]
        found[key] = min(fits, key=lambda fit: fit[:2])[2] if fits else None
    return found


def table(result: Mapping[str, Any]) -> str:
    """A row a way, a column a figure, with half the range over seeds if there are several; in bold what is as good as
    the reference, which comes first."""
    means, reference = _means(result), Way.of(result["reference"])
    several = len({row["seed"] for row in result["rows"]}) > 1
    arrows = {"higher": "↑", "lower": "↓"}
    heads = [f"{code(key)} {arrows[result['directions'][key]]}" for key in result["keys"]]
    lines = ["| solver | evaluations | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    order = sorted(means, key=lambda each: (each != reference, astuple(evolve(each, steps=0)), each.steps))
    for each in order:
        cells = []
        for key in result["keys"]:
            if key not in means[each]:
                cells.append("")
                continue
            value, spread = means[each][key]
            text = f"{value:.3g} ± {spread:.2g}" if several else f"{value:.3g}"
            good = good_enough(value, means[reference][key][0], result["directions"][key])
            cells.append(f"**{text}**" if good and each != reference else text)
        lines.append(f"| {each.title} | {each.evaluations} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(result: Mapping[str, Any]) -> str:
    """A sentence a figure: how few evaluations are enough, and by which solver."""
    reference = Way.of(result["reference"])
    long = f"{reference.evaluations} of {reference.title}"
    lines = []
    for key, best in cheapest(result).items():
        if best is None:
            lines.append(f"{key}: nothing that was tried is as good as {long}")
        else:
            lines.append(f"{key}: {best.evaluations} evaluations of {best.title} are as good as {long}")
    return "\n".join(lines)
