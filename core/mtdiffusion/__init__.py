"""The method: a diffusion process over any number of modalities, its loss, its model and its samplers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtdiffusion.clocks import EdgesAndDiagonal, IndependentClocks, MixedClocks, OffsetClocks, SharedClock
    from mtdiffusion.conditioning import Observation
    from mtdiffusion.interfaces import (
        Backbone,
        ClockLaw,
        Dataset,
        Decoder,
        Encoder,
        Features,
        FeatureSpec,
        InputSpec,
        LatentSpec,
        Modality,
        Params,
        WeightSchedule,
    )
    from mtdiffusion.layout import Layout, OwnLayout, SharedLayout
    from mtdiffusion.loss import (
        Bound,
        Draws,
        LossTerms,
        LossWeights,
        composite_loss,
        left_to_denoise,
        variational_bound,
    )
    from mtdiffusion.model import Heads, MultimodalDiffusion, Prediction
    from mtdiffusion.process import DiffusionProcess
    from mtdiffusion.retention import Retention
    from mtdiffusion.sampler import SamplerSettings, read_out, sample
    from mtdiffusion.schedules import DirectWeights, SNRMatched, TargetSignal

__all__ = [
    "Backbone",
    "Bound",
    "ClockLaw",
    "Dataset",
    "Decoder",
    "DiffusionProcess",
    "DirectWeights",
    "Draws",
    "EdgesAndDiagonal",
    "Encoder",
    "FeatureSpec",
    "Features",
    "Heads",
    "IndependentClocks",
    "InputSpec",
    "LatentSpec",
    "Layout",
    "LossTerms",
    "LossWeights",
    "MixedClocks",
    "Modality",
    "MultimodalDiffusion",
    "Observation",
    "OffsetClocks",
    "OwnLayout",
    "Params",
    "Prediction",
    "Retention",
    "SNRMatched",
    "SamplerSettings",
    "SharedClock",
    "SharedLayout",
    "TargetSignal",
    "WeightSchedule",
    "composite_loss",
    "left_to_denoise",
    "read_out",
    "sample",
    "variational_bound",
]

_HOMES = (
    "clocks",
    "conditioning",
    "interfaces",
    "layout",
    "loss",
    "model",
    "process",
    "retention",
    "sampler",
    "schedules",
)


def __getattr__(name: str) -> object:
    """Import a name when it is asked for (PEP 562): ``python -m mtdiffusion`` imports this package first, and is to
    answer --help, and to heed Ctrl-C, before torch is imported."""
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
