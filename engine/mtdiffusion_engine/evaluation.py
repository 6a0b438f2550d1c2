"""Evaluation on held-out data: every modality given every other, given all others and given a part of itself; joint
samples; the bound; and what real data scores.

Keys read ``target|observed/metric``: ``label|image/accuracy``, ``image|label+mask/judge_accuracy``,
``image|image:part/judge_accuracy`` (filled holes), ``joint/fid_judge``, ``real/fid_judge``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import evolve
from torch import Tensor

from mtdiffusion import Modality, MultimodalDiffusion, Params, SamplerSettings, read_out, sample, variational_bound
from mtdiffusion_engine.data import ModalityData
from mtdiffusion_engine.subsets import random_holes
from mtdiffusion_registry import Evaluator, UserError

if TYPE_CHECKING:
    from mtdiffusion_engine.run import Run

Metrics = dict[str, float | int]


def complete_samples(data: ModalityData, limit: int | None = None) -> dict[str, Tensor]:
    """The first samples that have every modality, by name.

    Raises:
        UserError: if there is none.
    """
    batch = data.batch(range(len(data)))
    rows = (batch.presence.amin(1) > 0).nonzero()[:limit, 0]
    if len(rows) == 0:
        raise UserError(f"{data.what}: no sample has every modality, so there is nothing to compare with")
    return {name: x[rows] for name, x in batch.x.items()}


def evaluate_run(run: Run, progress: Callable[[str], None] = lambda _: None) -> Metrics:
    """All metrics of a run's model on its test split; the same every time on one machine with one number of threads."""
    config = run.experiment.evaluation
    train = complete_samples(run.data("train"))
    test = complete_samples(run.data("test"), config.samples)
    progress("training the judges")
    evaluators = [evaluator.build(train) for evaluator in config.evaluators]
    return evaluate(
        run.model,
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
    )


def evaluate(
    model: MultimodalDiffusion,
    test: Mapping[str, Tensor],
    evaluators: Sequence[Evaluator],
    *,
    conditional: SamplerSettings,
    joint: SamplerSettings,
    hidden_share: float = 0.25,
    bound_times: int = 0,
    joint_draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Metrics:
    """Metrics of a model on held-out samples ``test`` (by modality name, each ``[n, ...]``).

    Args:
        conditional, joint: how to sample with something and with nothing observed.
        hidden_share: how much of a spatial modality is hidden to be filled in.
        bound_times: terms of L1 a sample in the bound; 0 leaves it out.
        joint_draws: how many times n joint samples are drawn.
    """
    names = model.names
    count = len(next(iter(test.values())))
    generator = torch.Generator().manual_seed(seed)
    batches = torch.split(torch.arange(count), batch_size)
    results: Metrics = {}

    def draw(
        observed: list[str], settings: SamplerSettings, visible: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        parts = []
        for rows in batches:
            given = {name: test[name][rows] for name in observed}
            maps = {name: v[rows] for name, v in (visible or {}).items()}
            out = sample(model, len(rows), observed=given, visible=maps, settings=settings, generator=generator)
            parts.append({name: x.cpu() for name, x in out.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    @torch.no_grad()
    def read(observed: list[str]) -> dict[str, Params]:
        device = model.device
        parts = []
        for rows in batches:
            given = {name: test[name][rows].to(device) for name in observed}
            parts.append(read_out(model, model.observe(given, model.visibility(len(rows), given))))
        return {
            name: {key: torch.cat([part[name][key].cpu() for part in parts]) for key in parts[0][name]}
            for name in names
        }

    def judge(target: str, given: str, generated: dict[str, Tensor], params: Params | None = None) -> None:
        judged = judge_target(model.modality(target), target, generated, test, evaluators, params)
        results.update({f"{target}|{given}/{metric}": value for metric, value in judged.items()})

    subsets = [[name] for name in names] if len(names) > 1 else []
    if len(names) > 2:
        subsets += [[other for other in names if other != name] for name in names]
    for observed in subsets:
        given = "+".join(observed)
        progress(f"given {given}")
        generated, params = draw(observed, conditional), read(observed)
        for target in names:
            if target not in observed:
                judge(target, given, generated, params[target])
    latent = model.layout.latent
    for name, spatial in zip(names, model.spatial, strict=True):
        if not spatial:
            continue
        progress(f"given a part of {name}")
        holes = random_holes(torch.full((count,), hidden_share), (latent.height, latent.width), generator)
        generated = draw([name], conditional, {name: holes})
        judge(name, f"{name}:part", generated)
    progress("joint samples")
    results |= evaluate_joint(model, count, evaluators, joint, draws=joint_draws, batch_size=batch_size, seed=seed)
    results |= {f"real/{metric}": value for metric, value in judge_real(evaluators, test).items()}
    results["real/samples"] = count
    if bound_times:
        progress("the bound")
        device = model.device
        total = 0.0
        for rows in batches:
            x = {name: test[name][rows].to(device) for name in names}
            total += float(variational_bound(model, x, times=bound_times, generator=generator).bits_per_dim.sum())
        results["joint/bound_bits_per_dim"] = total / count
    return results


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
    test: Mapping[str, Tensor],
    evaluators: Sequence[Evaluator],
    params: Params | None = None,
) -> Metrics:
    """The modality's own metrics of a generated target against the truth, and the evaluators', by name.

    Args:
        params: of one evaluation of the network given the same; None leaves out what the modality says of those.

    Raises:
        UserError: if two of them give a metric of one name.
    """
    own = [(f"the modality {target}", modality.metrics(generated[target], test[target]))]
    if params is not None:
        own.append((f"the predicted {target}", modality.predictive_metrics(params, test[target])))
    judged = [(who, each.conditional(target, generated, test)) for who, each in _named(evaluators)]
    counted = {"samples": len(test[target])}
    return merge_metrics([*own, *judged, ("the count of samples", counted)], target)


def judge_joint(evaluators: Sequence[Evaluator], generated: Mapping[str, Tensor]) -> Metrics:
    """The evaluators' metrics of samples generated with nothing observed, by name.

    Raises:
        UserError: if two of them give a metric of one name.
    """
    return merge_metrics([(who, each.joint(generated)) for who, each in _named(evaluators)], "joint samples")


def judge_real(evaluators: Sequence[Evaluator], test: Mapping[str, Tensor]) -> Metrics:
    """The evaluators' metrics of held-out data, by name.

    Raises:
        UserError: if two of them give a metric of one name.
    """
    return merge_metrics([(who, each.real(test)) for who, each in _named(evaluators)], "real data")


def _named(evaluators: Sequence[Evaluator]) -> list[tuple[str, Evaluator]]:
    """Evaluators with what an error calls them: their place in the configuration, and their class."""
    return [(f"evaluators[{place}] ({type(each).__name__})", each) for place, each in enumerate(evaluators)]


def evaluate_joint(
    model: MultimodalDiffusion,
    count: int,
    evaluators: Sequence[Evaluator],
    settings: SamplerSettings,
    *,
    draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
) -> Metrics:
    """Metrics of samples with nothing observed: keys ``joint/metric``.

    Args:
        count: samples a draw.
        draws: independent draws; metrics are their mean, and with more than one there is ``joint/metric_std``, the
            standard deviation between draws.

    Raises:
        UserError: if two evaluators give a metric of one name.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    values: dict[str, list[float]] = {}
    for _ in range(draws):
        parts = [sample(model, size, settings=settings, generator=generator) for size in sizes]
        generated = {name: torch.cat([part[name].cpu() for part in parts]) for name in model.names}
        for metric, value in judge_joint(evaluators, generated).items():
            values.setdefault(f"joint/{metric}", []).append(value)
    results: Metrics = {"joint/samples": count, "joint/draws": draws}
    for key, drawn in values.items():
        results[key] = statistics.mean(drawn)
        if draws > 1:
            results[f"{key}_std"] = statistics.stdev(drawn)
    return results
