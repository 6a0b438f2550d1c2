"""What is said before a training instead of after it: what evaluation and the gallery would refuse, and what was
perhaps not meant."""

from __future__ import annotations

from collections.abc import Iterator

from mtdiffusion import MultimodalDiffusion
from mtdiffusion.process import terminal_warning
from mtdiffusion_engine.data import ModalityData, load_data
from mtdiffusion_engine.evaluation import planned
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_engine.judging import check_evaluators
from mtdiffusion_registry import EmptySplit
from mtdiffusion_registry.errors import all_told


def doubts_of(experiment: Experiment, model: MultimodalDiffusion) -> Iterator[str]:
    """What of a configuration is allowed, and perhaps not meant."""
    if model.epsilon_head is not None and experiment.sampling.solver == "dpmpp_2m":
        yield (
            "sampling.solver is 'dpmpp_2m', which does not use the ε head that model.parameterisation = 'epsilon_head' "
            "trains; to sample with it, set sampling.solver to 'ancestral' or 'ddim'"
        )
    if warning := terminal_warning(model.process):
        yield warning


def check_training(train: ModalityData, experiment: Experiment, model: MultimodalDiffusion) -> None:
    """Look through the training split; if there is trouble, through the held-out one, too.

    Raises:
        UserError: all that is wrong.
    """
    all_told(train.verify, lambda: load_data(experiment, model, "test").verify())


def check_held_out(experiment: Experiment, model: MultimodalDiffusion) -> tuple[ModalityData | None, list[str]]:
    """Look through the test split, and at what is to be measured and what the evaluators need.

    Returns:
        The test split, None if there is none, and what a person should know that does not keep a training from being
        evaluated altogether.

    Raises:
        UserError: if a held-out sample is damaged or does not fit its modality, something is to be measured that
            cannot be, or an evaluator needs a modality that is not there.
    """
    planned(experiment, model)
    check_evaluators(experiment.evaluation.evaluators, experiment.modalities)
    try:
        data = load_data(experiment, model, "test")
    except EmptySplit as error:
        said = f"{error}. Without held-out samples the run can be sampled from, but not evaluated, and has no gallery"
        return None, [said]
    data.verify()
    there = [name for name in data.modalities if data.has(name)]
    lacking = [name for name in data.modalities if name not in there]
    if lacking:
        said = f"no held-out sample has {', '.join(lacking)}: what is asked of it, or given it, cannot be evaluated"
        return data, [said]
    return data, []
