"""Evaluators: what they need, how they are fitted, what they say of samples, and whose fault it is if one fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from attrs import asdict
from torch import Tensor

from mtdiffusion import Modality, Params
from mtdiffusion_engine.data import ModalityData
from mtdiffusion_engine.samples import Samples, Wish, draw_samples
from mtdiffusion_registry import Evaluator, EvaluatorConfig, ModalityConfig, UserError, pace
from mtdiffusion_registry.errors import did_you_mean

Metrics = dict[str, float | int]
Tell = Callable[[str], None]


def silent(_: str) -> None:
    """Tells nobody."""


class BuiltEvaluator(Evaluator):
    """An evaluator, and what the engine knows of it. It is shown what the modalities have evaluators see
    (:meth:`mtdiffusion.Modality.judged`).

    Attributes:
        title: its place among the configuration's, and its kind.
        kind: its kind.
        needs: the modalities that samples must have to be shown to it; (): all.
    """

    def __init__(
        self, evaluator: Evaluator, title: str, config: EvaluatorConfig, modalities: Mapping[str, Modality]
    ) -> None:
        self.modalities = modalities
        self.evaluator, self.title, self.kind, self.needs = evaluator, title, config.kind, config.needs()
        self.metric_directions = evaluator.metric_directions

    def conditional(
        self, target: str, generated: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> dict[str, float]:
        return self.evaluator.conditional(target, judged(generated, self.modalities), judged(truth, self.modalities))

    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        return self.evaluator.joint(judged(generated, self.modalities))

    def real(self, test: Mapping[str, Tensor]) -> dict[str, float]:
        return self.evaluator.real(judged(test, self.modalities))


def judged(x: Mapping[str, Tensor], modalities: Mapping[str, Modality]) -> dict[str, Tensor]:
    """What evaluators see of samples ``[n, ...]`` by name."""
    return {name: modalities[name].judged(values) if name in modalities else values for name, values in x.items()}


def check_evaluators(evaluators: Sequence[EvaluatorConfig], modalities: Mapping[str, ModalityConfig]) -> None:
    """Whether the modalities that evaluators need are there and fit, which can be told before anything is trained.

    Args:
        evaluators: an experiment's ``evaluation.evaluators``.
        modalities: its modalities by name.

    Raises:
        UserError: if one is not there, or does not fit; it says which evaluator, by its place in the configuration, is
            meant.
    """
    _require_needed(evaluators, list(modalities))
    for place, config in enumerate(evaluators):
        try:
            config.check(modalities)
        except ValueError as error:
            raise UserError(f"evaluation.evaluators[{place}] ({config.kind}): {error}") from error


def _require_needed(evaluators: Sequence[EvaluatorConfig], names: Sequence[str]) -> None:
    for place, config in enumerate(evaluators):
        for name in config.needs():
            if name not in names:
                keys = [key for key, value in asdict(config, recurse=False).items() if value == name]
                where = f"evaluation.evaluators[{place}]"
                change = f"let {where}.{keys[0]} name one of them" if keys else "add it"
                raise UserError(
                    f"{where} ({config.kind}): expected a modality named {name!r}, found {', '.join(names)}"
                    f"{did_you_mean(name, names)} ({change}, or remove the evaluator)"
                )


def build_evaluators(
    configs: Sequence[EvaluatorConfig],
    modalities: Mapping[str, Modality],
    train: Callable[[], ModalityData],
    *,
    seed: int = 0,
    progress: Tell = silent,
    note: Tell | None = None,
) -> list[Evaluator]:
    """Evaluators fitted to training samples that have what they need, as many as they want.

    Args:
        modalities: the model's, by name.
        train: gives the training split; not called if none wants training samples.
        seed: of the draw where they want fewer than there are.
        progress: is told what goes on and how long it took.
        note: is told which evaluators are left out, since no training sample has what they need; None: progress.

    Raises:
        UserError: if the model lacks a modality that one needs, the split cannot be read, or one cannot be built.
    """
    names = list(modalities)
    _require_needed(configs, names)
    wishes = [Wish(config.needs() or names, config.train_limit()) for config in configs]
    none = Samples.complete({name: modality.placeholder(1)[:0] for name, modality in modalities.items()})
    drawn = [none] * len(configs)
    if any(wish.limit != 0 for wish in wishes):
        with timed(progress, "reading training samples"):
            drawn = draw_samples(train(), wishes, seed)
    built: list[Evaluator] = []
    for place, (config, wish, samples) in enumerate(zip(configs, wishes, drawn, strict=True)):
        title = f"evaluators[{place}] ({config.kind})"
        if wish.limit != 0 and len(samples) == 0:
            (note or progress)(f"{title} is left out: no training sample has {_listed(wish.names)}")
            continue
        # What is read for others need not be in a split at all, so none of it is what this one is given.
        x = dict(none.x) if wish.limit == 0 else samples.common()
        told = config.preparation()
        with (
            timed(progress, f"{title}: {told}, {len(samples):,} samples" if told else ""),
            _blaming(title, config.kind),
        ):
            built.append(BuiltEvaluator(config.build(judged(x, modalities)), title, config, modalities))
    return built


def _title(evaluator: Evaluator, place: int) -> str:
    """What an error calls it: its place in the configuration, and its kind or class."""
    if isinstance(evaluator, BuiltEvaluator):
        return evaluator.title
    return f"evaluators[{place}] ({type(evaluator).__name__})"


def _needs(evaluator: Evaluator, names: Iterable[str]) -> Sequence[str]:
    """Modalities that samples must have to be shown to it."""
    return (evaluator.needs if isinstance(evaluator, BuiltEvaluator) else ()) or list(names)


@contextmanager
def _blaming(title: str, kind: str | None) -> Iterator[None]:
    """Makes what an evaluator raises an error that says whose it is. Only its own code runs inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        givers = entry_points(group="mtdiffusion.plugins", name=f"evaluator.{kind}") if kind else ()
        of = next((f", of {point.dist.name} {point.dist.version}" for point in givers if point.dist), "")
        raise UserError(
            f"evaluation.{title[:-1]}{of}): {type(error).__name__}: {error} (change its configuration or the data, or "
            "remove the evaluator; MTDIFFUSION_TRACEBACK=1 shows where in its code)"
        ) from error


def _judged(
    evaluators: Sequence[Evaluator],
    test: Samples,
    ask: Callable[[Evaluator, Tensor], Callable[[], Mapping[str, float]]],
    of: str,
    note: Tell,
    wanted: Callable[[Sequence[str]], bool] = lambda _: True,
) -> list[tuple[str, Metrics]]:
    """Each evaluator's title and metrics of the samples that have what it needs, with ``METRIC_samples`` where these
    are fewer; of those for which there are none, told if it was wanted, nothing.

    Args:
        ask: of an evaluator and the indices of samples, the call of it, made ready.
    """
    found: list[tuple[str, Metrics]] = []
    for place, evaluator in enumerate(evaluators):
        title, needs = _title(evaluator, place), _needs(evaluator, test.presence)
        rows = test.having(needs)
        if len(rows) == 0 and test.x:
            if wanted(needs):
                note(f"{title} judges nothing of {of}: no sample has {_listed(needs)}")
            continue
        metrics = _called(title, evaluator, ask(evaluator, rows))
        if len(rows) < len(test):
            metrics |= {f"{name}_samples": len(rows) for name in list(metrics)}
        found.append((title, metrics))
    return found


def _called(title: str, evaluator: Evaluator, call: Callable[[], Mapping[str, float]]) -> Metrics:
    """What an evaluator answers to a call, if it is numbers by name."""
    with _blaming(title, evaluator.kind if isinstance(evaluator, BuiltEvaluator) else None):
        return {name: _number(value, name) for name, value in call().items()}


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"the metric {name} is {type(value).__name__}, expected a float")
    return value


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)


@contextmanager
def timed(progress: Tell, what: str) -> Iterator[None]:
    """Tells what begins and, of what was not quick (:data:`mtdiffusion_registry.pace.EVERY`), how long it took when it
    is done; nothing if it has no name."""
    started = time.monotonic()
    if what:
        progress(what)
    yield
    seconds = time.monotonic() - started
    if what and seconds > pace.EVERY:
        progress(f"{what}: done in {seconds:.1f} s")


# What they say of samples


def as_samples(test: Samples | Mapping[str, Tensor]) -> Samples:
    return test if isinstance(test, Samples) else Samples.complete(test)


def defined(metrics: Mapping[str, float | int], note: Tell = silent) -> Metrics:
    """Those that are numbers. Of the others (NaN: undefined for these samples; JSON has no word for it, nor for
    infinity) ``note`` is told the names."""
    left_out = [name for name, value in metrics.items() if not math.isfinite(value)]
    if left_out:
        note(f"left out, since they are undefined for these samples: {', '.join(left_out)}")
    counts = {f"{name}_samples" for name in left_out}
    return {name: value for name, value in metrics.items() if name not in left_out and name not in counts}


def merge_metrics(parts: Iterable[tuple[str, Mapping[str, float | int]]], of: str) -> Metrics:
    """One table of metrics from several givers', each name given once.

    Args:
        parts: who gives them, as an error is to name it, and the metrics by name.
        of: of what they are, for the error.

    Raises:
        UserError: if two give a metric of one name: one would silently replace the other.
    """
    merged: Metrics = {}
    givers: dict[str, str] = {}
    for giver, metrics in parts:
        for name, value in metrics.items():
            if name in givers:
                raise UserError(
                    f"evaluation.evaluators: {givers[name]} and {giver} both give the metric {name} of {of}; keep one "
                    "of them, or give one another name"
                )
            givers[name], merged[name] = giver, value
    return merged


def judge_target(
    modality: Modality,
    target: str,
    generated: Mapping[str, Tensor],
    test: Samples | Mapping[str, Tensor],
    evaluators: Sequence[Evaluator],
    params: Params | None = None,
    note: Tell = silent,
) -> Metrics:
    """The modality's own metrics of a generated target against the truth, and the evaluators', by name: NaN where
    undefined.

    Args:
        test: the truth, of samples that all have the target. Evaluators judge those that have what they need; where
            these are fewer, ``METRIC_samples`` says how many.
        params: of one evaluation of the network given the same; None leaves out what the modality says of those.
        note: is told which evaluators have no sample to judge.

    Raises:
        UserError: if two of them give a metric of one name, or an evaluator fails.
    """
    truth = as_samples(test)
    own: list[tuple[str, Mapping[str, float | int]]] = [
        (f"the modality {target}", modality.metrics(generated[target], truth.x[target]))
    ]
    if params is not None:
        own.append((f"the predicted {target}", modality.predictive_metrics(params, truth.x[target])))

    def ask(evaluator: Evaluator, rows: Tensor) -> Callable[[], Mapping[str, float]]:
        made = generated if len(rows) == len(truth) else {name: x[rows] for name, x in generated.items()}
        return partial(evaluator.conditional, target, made, truth.take(rows).common())

    judged = _judged(evaluators, truth, ask, target, note, lambda needs: target in needs)
    counted = {"samples": len(truth)}
    return merge_metrics([*own, *judged, ("the count of samples", counted)], target)


def judge_joint(
    evaluators: Sequence[Evaluator],
    generated: Mapping[str, Tensor],
    real: Samples | None = None,
) -> Metrics:
    """The evaluators' metrics of samples generated with nothing observed, by name: NaN where undefined.

    Args:
        real: held-out samples beside which the metrics stand. An evaluator is shown as many of the generated as there
            are of those that have what it needs, so that its distances have the same finite-sample bias, and
            ``METRIC_samples`` says how many where these are fewer. None, or none of those: all of the generated.

    Raises:
        UserError: if two of them give a metric of one name, or an evaluator fails.
    """
    count = len(next(iter(generated.values()))) if generated else 1
    found = []
    for place, evaluator in enumerate(evaluators):
        beside = len(real.having(_needs(evaluator, real.presence))) if real is not None else 0
        shown = min(beside or count, count)
        # Generated independently, any of them are as good as any others.
        part = generated if shown == count else {name: x[:shown] for name, x in generated.items()}
        title = _title(evaluator, place)
        metrics = _called(title, evaluator, partial(evaluator.joint, part))
        if shown < count:
            metrics |= {f"{name}_samples": shown for name in list(metrics)}
        found.append((title, metrics))
    return merge_metrics(found, "joint samples")


def judge_real(evaluators: Sequence[Evaluator], test: Samples | Mapping[str, Tensor], note: Tell = silent) -> Metrics:
    """The evaluators' metrics of held-out data that have what they need, by name: NaN where undefined.

    Args:
        note: is told which evaluators have no sample to judge.

    Raises:
        UserError: if two of them give a metric of one name, or an evaluator fails.
    """

    real = as_samples(test)

    def ask(evaluator: Evaluator, rows: Tensor) -> Callable[[], Mapping[str, float]]:
        return partial(evaluator.real, real.take(rows).common())

    return merge_metrics(_judged(evaluators, real, ask, "real data", note), "real data")
