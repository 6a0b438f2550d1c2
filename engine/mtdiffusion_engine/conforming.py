"""The checks of a plugin on real samples: those of the data of a configuration that uses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_engine.data import load_some
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_engine.judging import check_evaluators, judged
from mtdiffusion_registry import EmptySplit, EvaluatorConfig, UserError
from mtdiffusion_registry.testing import Contract, conformance

EXAMPLES = 32
"""Samples that a modality is checked with: the checks take seconds."""
JUDGED = 64
"""Samples that an evaluator is fitted to, and as many that it judges."""
FEWEST = 3
"""The largest batch of the checks."""


def contracts(plugin: str, experiment: Experiment) -> Iterator[tuple[str, Contract]]:
    """The contract of each instance of a modality's or an evaluator's kind in an experiment, on samples of its data and
    in its latent.

    Args:
        plugin: ``GROUP.KIND``.

    Yields:
        The instance's key in the configuration, with the number of samples, and its contract.

    Raises:
        UserError: if the kind is of another group or the experiment has none of it, or if its data cannot be read, do
            not fit it or are too few.
    """
    group, _, kind = plugin.partition(".")
    if group not in ("modality", "evaluator"):
        raise UserError(f"--data: {plugin} is a {group}; real samples are for modalities and evaluators. Leave it out")
    modalities, evaluators = experiment.modalities, experiment.evaluation.evaluators
    used = modalities.values() if group == "modality" else evaluators
    kinds = dict.fromkeys(config.kind for config in used)
    if kind not in kinds:
        raise UserError(
            f"--data: the configuration has no {group} of kind {kind!r} (it has {', '.join(kinds) or 'none'}); give "
            "one that does"
        )
    model = build_model(experiment, weightless=True)
    if group == "modality":
        for name, config in modalities.items():
            if config.kind == kind:
                option, samples = _samples(experiment, model, name)
                height, width = experiment.latent.height, experiment.latent.width
                contract = conformance(config, height=height, width=width, **{option: samples}).contract()
                yield f"modalities.{name}, {len(samples)} samples", contract
        return
    check_evaluators(evaluators, modalities)
    for place, judge in enumerate(evaluators):
        if judge.kind == kind:
            x = _halves(experiment, model, judge)
            title = f"evaluation.evaluators[{place}], {len(next(iter(x.values())))} samples"
            yield title, conformance(judge, data=x).contract()


def _samples(experiment: Experiment, model: MultimodalDiffusion, name: str) -> tuple[str, Any]:
    """Training samples of a modality as an option of the kit: x, or of a derived one what x is derived from."""
    modality = model.modality(name)
    data = load_some(experiment, model, "train", [name], EXAMPLES)
    if len(data) < FEWEST:
        raise UserError(f"{data.what}: expected at least {FEWEST} samples that have {name}, found {len(data)}")
    x = data.batch(range(len(data))).x[name]  # says which sample is wrong, if one is
    if not modality.derived:
        return "examples", x
    values = [data.dataset[index][modality.field or name] for index in range(len(data))]
    texts = [value for value in values if isinstance(value, str)]
    return "source", texts or torch.stack([value for value in values if isinstance(value, Tensor)])


def _halves(experiment: Experiment, model: MultimodalDiffusion, config: EvaluatorConfig) -> dict[str, Tensor]:
    """Samples as evaluators see them: first training samples, then as many that are held out (of the training split,
    too, where none are)."""
    names = config.needs() or tuple(model.names)
    train = load_some(experiment, model, "train", names, 2 * JUDGED)
    x = [train.batch(range(len(train))).x]
    count = len(train) // 2
    try:
        test = load_some(experiment, model, "test", names, JUDGED)
    except EmptySplit:
        pass
    else:
        count = min(len(train), len(test), JUDGED)
        x = [{name: values[:count] for name, values in part.items()} for part in (*x, test.batch(range(count)).x)]
    if count < FEWEST:
        raise UserError(
            f"{train.what}: expected at least {FEWEST} samples in each split that have {' and '.join(names)}, found "
            f"{count}"
        )
    together = {name: torch.cat([part[name] for part in x])[: 2 * count] for name in names}
    return judged(together, {name: model.modality(name) for name in names})
