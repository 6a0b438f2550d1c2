"""The method: a diffusion process over any number of modalities, its loss, its model and its samplers."""

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
from mtdiffusion.loss import Bound, Draws, LossTerms, LossWeights, composite_loss, left_to_denoise, variational_bound
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
