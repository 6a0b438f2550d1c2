"""The method: a diffusion process over any number of modalities, its loss, its model and its samplers."""

from mtdiffusion.conditioning import Observation, SubsetDistribution
from mtdiffusion.interfaces import (
    Backbone,
    Dataset,
    Decoder,
    Encoder,
    Features,
    FeatureSpec,
    LatentSpec,
    Modality,
    Params,
    WeightSchedule,
)
from mtdiffusion.loss import Bound, LossTerms, LossWeights, composite_loss, variational_bound
from mtdiffusion.model import LatentLayout, MultimodalDiffusion, Prediction
from mtdiffusion.process import DiffusionProcess
from mtdiffusion.sampler import SamplerSettings, read_out, sample
from mtdiffusion.schedules import DirectWeights, Retention, SNRMatched, TargetSignal

__all__ = [
    "Backbone",
    "Bound",
    "Dataset",
    "Decoder",
    "DiffusionProcess",
    "DirectWeights",
    "Encoder",
    "FeatureSpec",
    "Features",
    "LatentLayout",
    "LatentSpec",
    "LossTerms",
    "LossWeights",
    "Modality",
    "MultimodalDiffusion",
    "Observation",
    "Params",
    "Prediction",
    "Retention",
    "SNRMatched",
    "SamplerSettings",
    "SubsetDistribution",
    "TargetSignal",
    "WeightSchedule",
    "composite_loss",
    "read_out",
    "sample",
    "variational_bound",
]
