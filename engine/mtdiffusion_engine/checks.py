"""What evaluation and the gallery would refuse, said before a training instead of after it."""

from __future__ import annotations

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_engine.data import load_data
from mtdiffusion_engine.evaluation import planned
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_engine.judging import check_evaluators
from mtdiffusion_registry import EmptySplit


def check_held_out(experiment: Experiment, model: MultimodalDiffusion) -> tuple[int, list[str]]:
    """Look through the test split, and at what is to be measured and what the evaluators need.

    Returns:
        How many samples are held out, and what a person should know that does not keep a training from being evaluated
        altogether.

    Raises:
        UserError: if a held-out sample is damaged or does not fit its modality, something is to be measured that
            cannot be, or an evaluator needs a modality that is not there.
    """
    planned(experiment, model)
    check_evaluators(experiment.evaluation.evaluators, list(experiment.modalities))
    try:
        data = load_data(experiment, model, "test")
    except EmptySplit as error:
        said = f"{error}. Without held-out samples the run can be sampled from, but not evaluated, and has no gallery"
        return 0, [said]
    data.verify()
    there = [name for name in data.modalities if data.has(name)]
    lacking = [name for name in data.modalities if name not in there]
    if lacking:
        said = f"no held-out sample has {', '.join(lacking)}: what is asked of it, or given it, cannot be evaluated"
        return len(data), [said]
    return len(data), []
