"""A configuration in words: what will be trained on what, asked for and measured, for a person who reads it first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import attrs

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_engine.cost import ModelCost, short
from mtdiffusion_engine.evaluation import DEFAULT_SAMPLES, planned
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_engine.measures import groups
from mtdiffusion_registry.configs import Config

_NAMED = 8  # of a list, by name; more are counted

_SOLVERS = {
    "dpmpp_2m": "DPM-Solver++(2M)",
    "ddim": "DDIM",
    "ancestral": "ancestral sampling",
}
_CURVES = {
    "cosine": "then down a half cosine to 0",
    "constant": "then constant",
}


def explain(
    experiment: Experiment, model: MultimodalDiffusion, cost: ModelCost, train: int, held_out: int
) -> dict[str, list[str]]:
    """Sentences by topic, each one thought, in the order of what happens.

    Args:
        experiment: with its ``training.precision`` settled, if it is to be told.
        model: the experiment's; it may be on the meta device.
        cost: the model's.
        train, held_out: how many samples there are.
    """
    return {
        "backbone": [f"{_told(experiment.backbone)}: the network that all modalities share"],
        "clocks": list(_clocks(experiment, model)),
        "conditioning": list(_conditioning(experiment, model)),
        "loss": list(_loss(experiment, model)),
        "training": list(_training(experiment, train)),
        "measuring": list(_evaluation(experiment, model, held_out)),
        "sampling": list(_sampling(experiment)),
        "work": list(_work(experiment, cost)),
    }


def lines_of(explained: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Aligned as the cost's lines are."""
    for topic, sentences in explained.items():
        for place, sentence in enumerate(sentences):
            yield f"  {'' if place else topic:<14} {sentence}"


def _told(config: Config) -> str:
    """A part's kind, and what of it is not as by default."""
    said = []
    for attribute in attrs.fields(type(config)):
        value = getattr(config, attribute.name)
        default = attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]  # attrs declares a function, it is a class
            default = None if default.takes_self else default.factory()
        if value != default:
            said.append(f"{attribute.name} = {list(value) if isinstance(value, tuple) else value}")
    return f"{config.kind} ({', '.join(said)})" if said else f"{config.kind}, as by default"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _clocks(experiment: Experiment, model: MultimodalDiffusion) -> Iterator[str]:
    kind = "shared" if experiment.clocks is None else experiment.clocks.kind
    names, ahead = model.names, experiment.sampling.path
    if len(names) == 1:
        yield f"one modality, one clock: from noise to data in T = {model.process.steps} steps"
        return
    said = "in training all modalities are equally noisy" if model.law.shared else "in training each has its own noise"
    yield f"law {kind}: {said}, of T = {model.process.steps} steps"
    offsets = model.law.ahead(len(names)).tolist() if ahead is None else [ahead.get(name, 0.0) for name in names]
    ordered = sorted(zip(offsets, names, strict=True), key=lambda pair: -pair[0])
    stages = [_and([name for _, name in group]) for _, group in groupby(ordered, key=lambda pair: pair[0])]
    if len(stages) == 1:
        yield "in sampling all are decided together"
    else:
        yield f"in sampling {', then '.join(stages)} are decided"


def _conditioning(experiment: Experiment, model: MultimodalDiffusion) -> Iterator[str]:
    config = experiment.conditioning
    if len(model.names) > 1 or config.subsets:
        yield f"{_percent(config.observed)} of the training samples show the network something, the others nothing"
    if config.subsets and config.observed:
        total = sum(config.subsets.values())
        shares = sorted(config.subsets.items(), key=lambda pair: -pair[1])
        yield f"shown is {_first([f'{name} {_percent(config.observed * w / total)}' for name, w in shares])}"
    elif len(model.names) > 1 and config.observed:
        alone = _percent(config.singleton) if len(model.names) > 2 else "all"
        coins = "; of the others, each shows any modalities but all, by coin" if len(model.names) > 2 else ""
        yield f"of those that do, {alone} show one modality alone{coins}"
    if config.partial and (places := [name for name, has in zip(model.names, model.spatial, strict=True) if has]):
        low, high = config.hidden_share
        yield (
            f"{_percent(config.partial)} of all show one of {_and(places)} with holes of {_percent(low)} to "
            f"{_percent(high)}"
        )


def _loss(experiment: Experiment, model: MultimodalDiffusion) -> Iterator[str]:
    loss = experiment.loss
    terms = {
        "the fit at full noise (L0)": loss.l0,
        "the error of the noise (L1)": loss.l1,
        "how well each head tells its modality (L2)": loss.l2,
        "the likelihood at the last step (L3)": loss.l3,
    }
    counted = [f"{what} × {weight:g}" for what, weight in terms.items() if weight]
    yield f"the sum of {' + '.join(counted)}" if len(counted) > 1 else (counted or ["nothing: all weights are 0"])[0]
    weights = {name: model.modality(name).loss_weight for name in model.names}
    if loss.l2 and len(set(weights.values())) > 1:
        yield f"modalities count {', '.join(f'{name} {weight:g}' for name, weight in weights.items())}"
    if isinstance(loss.readout, Mapping):
        shares = [f"{_percent(share)} of those that show {name}" for name, share in loss.readout.items() if share]
    else:
        shares = (
            [f"{_percent(loss.readout)} of those that show something"] if loss.readout and len(model.names) > 1 else []
        )
    if shares:
        yield f"{_and(shares)} have all else at full noise: it is read off what is shown"


def _training(experiment: Experiment, train: int) -> Iterator[str]:
    config = experiment.training
    seen = config.steps * config.batch_size / train
    yield (
        f"{config.steps:,} steps of {config.batch_size:,} samples, {config.precision} here: each sample is seen "
        f"{seen:,.3g} times"
    )
    decay = f"then constant, and in the last {_percent(config.decay)} down a straight line to 0"
    yield (
        f"{config.optimizer}, learning rate up to {config.learning_rate:g} in {config.warmup:,} steps, "
        f"{_CURVES.get(config.schedule, decay)}"
    )
    yield f"weights are averaged (decay {config.ema:g}); the average is what samples are made with"


def _evaluation(experiment: Experiment, model: MultimodalDiffusion, held_out: int) -> Iterator[str]:
    config = experiment.evaluation
    if not held_out:
        yield "none: there are no held-out samples"
        return
    taken = min(held_out, config.limit(DEFAULT_SAMPLES) or held_out)
    measures = planned(experiment, model)
    yield f"{taken:,} of {held_out:,} held-out samples; conditionals in {config.steps} solver steps"
    wanted = list(config.conditionals or groups(model.names, model.spatial))
    yield f"measured: {_first(wanted)}"
    if draws := sum(measure.kind == "joint" for measure in measures):
        yield f"joint samples are drawn {'once' if draws == 1 else f'{draws} times'}"
    for judge in config.evaluators:
        yield f"evaluator {judge.kind}{f': {told}' if (told := judge.preparation()) else ''}"
    if not config.evaluators:
        yield "no evaluators: nothing judges whole samples"


def _sampling(experiment: Experiment) -> Iterator[str]:
    config = experiment.sampling
    guidance = "no guidance" if config.guidance == 1 else f"guidance {config.guidance:g} on what is observed"
    yield f"{config.steps} steps of {_SOLVERS[config.solver]} ({config.solver}), each with noise η = {config.noise:g}"
    yield guidance


def _work(experiment: Experiment, cost: ModelCost) -> Iterator[str]:
    config, sampling = experiment.training, experiment.sampling
    yield f"{short(config.steps * config.batch_size * cost.training, 'FLOP')} for the whole training"
    guided = sampling.guidance != 1
    asked = (2 if guided else 1) * sampling.steps
    yield f"{short(asked * cost.evaluation, 'FLOP')} {'at most ' * guided}for one sample"
    yield "time on GPUs: mtdiffusion plan CONFIG; on this machine: train says it after its first steps"
