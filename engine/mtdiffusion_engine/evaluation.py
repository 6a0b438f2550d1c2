"""Evaluation on held-out data: every modality given every other, given all others and given a part of itself; joint
samples; the bound; and what real data scores.

Keys read ``target|observed/metric``: ``label|image/accuracy``, ``image|label+mask/judge_accuracy``,
``image|image:part/judge_accuracy`` (filled holes), ``joint/fid_judge``, ``real/fid_judge``. Each group says how many
samples its metrics are of (``label|image/samples``); of a metric that is of fewer, which an evaluator gives that needs
more of a sample than the group does, ``..._samples`` says it.

Samples that lack modalities serve wherever they have what is asked for. What no sample serves for, and what is
undefined, is left out of the results and told as a note.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
from attrs import asdict, evolve
from torch import Tensor

from mtdiffusion import Modality, MultimodalDiffusion, Params, SamplerSettings, read_out, sample, variational_bound
from mtdiffusion_engine.data import ModalityData
from mtdiffusion_engine.samples import Samples, Wish, draw_samples, held_out
from mtdiffusion_engine.subsets import random_holes
from mtdiffusion_registry import Evaluator, EvaluatorConfig, UserError
from mtdiffusion_registry.errors import did_you_mean

if TYPE_CHECKING:
    from mtdiffusion_engine.run import Run

Metrics = dict[str, float | int]
Tell = Callable[[str], None]


def _silent(_: str) -> None:
    pass


def complete_samples(data: ModalityData, limit: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Samples that have every modality, ``[n, ...]`` by name, in the order of the split: all or, with a limit, a random
    draw of as many, which follows from the seed.

    Raises:
        UserError: if there is none, or one that is read cannot be.
    """
    (samples,) = draw_samples(data, [Wish(list(data.modalities), limit)], seed)
    if len(samples) == 0:
        raise UserError(f"{data.what}: no sample has every modality, so there is nothing to compare with")
    return dict(samples.x)


# Evaluators: what they need, how they are built, and whose fault it is


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


def check_evaluators(evaluators: Sequence[EvaluatorConfig], names: Sequence[str]) -> None:
    """Whether there are the modalities that evaluators need, which can be told before anything is trained.

    Args:
        evaluators: an experiment's ``evaluation.evaluators``.
        names: of its modalities.

    Raises:
        UserError: if one is not there; it says which evaluator, by its place in the configuration, needs it.
    """
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
    progress: Tell = _silent,
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
    check_evaluators(configs, names)
    wishes = [Wish(config.needs() or names, config.train_limit()) for config in configs]
    none = Samples.complete({name: modality.placeholder(1)[:0] for name, modality in modalities.items()})
    drawn = [none] * len(configs)
    if any(wish.limit != 0 for wish in wishes):
        with _phase(progress, "reading training samples"):
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
            _phase(progress, f"{title}: {told}, {len(samples):,} samples" if told else ""),
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
def _phase(progress: Tell, what: str) -> Iterator[None]:
    """Tells what begins and, when it is done, how long it took; nothing if it has no name."""
    started = time.monotonic()
    if what:
        progress(what)
    yield
    if what:
        progress(f"{what}: {time.monotonic() - started:.1f} s")


# The whole


def evaluate_run(run: Run, progress: Tell = _silent, note: Tell | None = None) -> Metrics:
    """All metrics of a run's model on its test split; the same every time on one machine with one number of threads.

    Args:
        progress: is told what goes on and how long it took.
        note: is told what is left out of the results, and why; None: progress is.

    Raises:
        UserError: if the test split is empty or cannot be read, or an evaluator lacks a modality or fails.
    """
    config = run.experiment.evaluation
    model = run.model
    check_evaluators(config.evaluators, model.names)
    with _phase(progress, "reading held-out samples"):
        (test,) = draw_samples(held_out(run), [Wish(limit=config.samples)], config.seed)
    evaluators = build_evaluators(
        config.evaluators,
        {name: model.modality(name) for name in model.names},
        lambda: run.data("train"),
        seed=config.seed,
        progress=progress,
        note=note,
    )
    return evaluate(
        model,
        test,
        evaluators,
        conditional=evolve(run.experiment.sampling, steps=config.steps),
        joint=run.experiment.sampling,
        hidden_share=config.hidden_share,
        bound_times=config.bound_times,
        joint_draws=config.joint_draws,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=progress,
        note=note,
    )


def evaluate(
    model: MultimodalDiffusion,
    test: Samples | Mapping[str, Tensor],
    evaluators: Sequence[Evaluator],
    *,
    conditional: SamplerSettings,
    joint: SamplerSettings,
    hidden_share: float = 0.25,
    bound_times: int = 0,
    joint_draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    progress: Tell = _silent,
    note: Tell | None = None,
) -> Metrics:
    """Metrics of a model on held-out samples; none of them is infinite or NaN.

    Args:
        test: the samples; as a mapping, of samples that lack nothing: ``[n, ...]`` by modality name.
        conditional, joint: how to sample with something and with nothing observed.
        hidden_share: how much of a spatial modality is hidden to be filled in.
        bound_times: terms of L1 a sample in the bound; 0 leaves it out.
        joint_draws: how many times n joint samples are drawn.
        progress: is told what goes on and how long it took.
        note: is told what is left out of the results, and why; None: progress is.

    Raises:
        UserError: if two evaluators, or an evaluator and a modality, give a metric of one name, or an evaluator fails.
    """
    note = note or progress
    names = model.names
    test = _samples(test)
    count = len(test)
    for name in names:  # one that no sample has
        if name not in test.x:
            lacking = {name: torch.zeros(count, dtype=torch.bool)}
            x = {name: model.modality(name).placeholder(count)}
            test = Samples({**test.x, **x}, {**test.presence, **lacking})
    generator = torch.Generator().manual_seed(seed)
    results: Metrics = {}
    unserved: list[str] = []

    def draw(
        rows: Tensor, observed: list[str], settings: SamplerSettings, visible: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        parts = []
        for part in torch.split(torch.arange(len(rows)), batch_size):
            given = {name: test.x[name][rows[part]] for name in observed}
            maps = {name: v[part] for name, v in (visible or {}).items()}
            out = sample(model, len(part), observed=given, visible=maps, settings=settings, generator=generator)
            parts.append({name: x.cpu() for name, x in out.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    @torch.no_grad()
    def read(rows: Tensor, observed: list[str]) -> dict[str, Params]:
        device = model.device
        parts = []
        for part in torch.split(rows, batch_size):
            given = {name: test.x[name][part].to(device) for name in observed}
            parts.append(read_out(model, model.observe(given, model.visibility(len(part), given))))
        return {
            name: {key: torch.cat([part[name][key].cpu() for part in parts]) for key in parts[0][name]}
            for name in names
        }

    with _phase(progress, "real data"):
        results |= {f"real/{metric}": value for metric, value in judge_real(evaluators, test, note).items()}
        results["real/samples"] = count
    subsets = [[name] for name in names] if len(names) > 1 else []
    if len(names) > 2:
        subsets += [[other for other in names if other != name] for name in names]
    for observed in subsets:
        given = "+".join(observed)
        targets = {name: test.having([*observed, name]) for name in names if name not in observed}
        unserved += [f"{name}|{given}" for name, has in targets.items() if len(has) == 0]
        targets = {name: has for name, has in targets.items() if len(has)}
        if not targets:
            continue
        with _phase(progress, f"given {given}"):
            rows = torch.unique(torch.cat(list(targets.values())))
            generated, params = draw(rows, observed, conditional), read(rows, observed)
            for target, has in targets.items():
                at = torch.isin(rows, has).nonzero()[:, 0]
                made = {name: x[at] for name, x in generated.items()}
                said = {key: value[at] for key, value in params[target].items()}
                judged = judge_target(model.modality(target), target, made, test.take(has), evaluators, said, note)
                results.update({f"{target}|{given}/{metric}": value for metric, value in judged.items()})
    latent = model.layout.latent
    for name, spatial in zip(names, model.spatial, strict=True):
        rows = test.having([name])
        if spatial and len(rows) == 0:
            unserved.append(f"{name}|{name}:part")
        if not spatial or len(rows) == 0:
            continue
        with _phase(progress, f"given a part of {name}"):
            holes = random_holes(torch.full((len(rows),), hidden_share), (latent.height, latent.width), generator)
            generated = draw(rows, [name], conditional, {name: holes})
            judged = judge_target(model.modality(name), name, generated, test.take(rows), evaluators, None, note)
            results.update({f"{name}|{name}:part/{metric}": value for metric, value in judged.items()})
    with _phase(progress, "joint samples"):
        results |= evaluate_joint(
            model,
            count,
            evaluators,
            joint,
            draws=joint_draws,
            batch_size=batch_size,
            seed=seed,
            real=test,
            note=note,
        )
    rows = test.having(names)
    if bound_times and len(rows) == 0:
        unserved.append("joint/bound_bits_per_dim")
    elif bound_times:
        with _phase(progress, "the bound"):
            total = 0.0
            for part in torch.split(rows, batch_size):
                x = {name: test.x[name][part].to(model.device) for name in names}
                total += float(variational_bound(model, x, times=bound_times, generator=generator).bits_per_dim.sum())
            results["joint/bound_bits_per_dim"] = total / len(rows)
            if len(rows) < count:
                results["joint/bound_bits_per_dim_samples"] = len(rows)
    if unserved:
        note(f"left out, since no held-out sample has all that they are of: {', '.join(unserved)}")
    return defined(results, note)


def _samples(test: Samples | Mapping[str, Tensor]) -> Samples:
    return test if isinstance(test, Samples) else Samples.complete(test)


def defined(metrics: Mapping[str, float | int], note: Tell = _silent) -> Metrics:
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
    note: Tell = _silent,
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
    truth = _samples(test)
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


def judge_real(evaluators: Sequence[Evaluator], test: Samples | Mapping[str, Tensor], note: Tell = _silent) -> Metrics:
    """The evaluators' metrics of held-out data that have what they need, by name: NaN where undefined.

    Args:
        note: is told which evaluators have no sample to judge.

    Raises:
        UserError: if two of them give a metric of one name, or an evaluator fails.
    """

    real = _samples(test)

    def ask(evaluator: Evaluator, rows: Tensor) -> Callable[[], Mapping[str, float]]:
        return partial(evaluator.real, real.take(rows).common())

    return merge_metrics(_judged(evaluators, real, ask, "real data", note), "real data")


def evaluate_joint(
    model: MultimodalDiffusion,
    count: int,
    evaluators: Sequence[Evaluator],
    settings: SamplerSettings,
    *,
    draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    real: Samples | None = None,
    note: Tell = _silent,
) -> Metrics:
    """Metrics of samples with nothing observed: keys ``joint/metric``.

    Args:
        count: samples a draw.
        draws: independent draws. Metrics are means over those draws in which they are defined: ``joint/metric_draws``
            says over how many if not all. ``joint/metric_std`` is the standard deviation between them, if at least two.
        real: as of :func:`judge_joint`.
        note: is told which metrics are defined in no draw, and so left out.

    Raises:
        UserError: if two evaluators give a metric of one name, or one fails.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    values: dict[str, list[float]] = {}
    for _ in range(draws):
        parts = [sample(model, size, settings=settings, generator=generator) for size in sizes]
        generated = {name: torch.cat([part[name].cpu() for part in parts]) for name in model.names}
        for metric, value in judge_joint(evaluators, generated, real).items():
            values.setdefault(f"joint/{metric}", []).append(value)
    results: Metrics = {"joint/samples": count, "joint/draws": draws}
    for key, drawn in values.items():
        numbers = [value for value in drawn if math.isfinite(value)]
        if isinstance(drawn[0], int) and key.endswith("_samples"):
            results[key] = drawn[0]
            continue
        results[key] = statistics.mean(numbers) if numbers else math.nan
        if len(numbers) > 1:
            results[f"{key}_std"] = statistics.stdev(numbers)
        if 0 < len(numbers) < draws:
            results[f"{key}_draws"] = len(numbers)
    return defined(results, note)
