"""The contract of modalities."""

from __future__ import annotations

from mtdiffusion_registry.testing import config as of_config
from mtdiffusion_registry.testing import contract
from mtdiffusion_registry.testing.modality import data, decoders, encoders, learning, modules, presentation
from mtdiffusion_registry.testing.modality.subject import ModalitySubject

__all__ = ["CHECKS", "ModalitySubject"]

CHECKS: tuple[contract.Check, ...] = (
    *of_config.CHECKS,
    data.build,
    data.derive,
    data.examples,
    data.refusal,
    data.placeholder,
    data.stored,
    encoders.encode,
    encoders.code_scale,
    encoders.readout,
    encoders.observe,
    encoders.hidden,
    decoders.params,
    decoders.nll,
    decoders.likelihood,
    decoders.dims,
    decoders.objective,
    decoders.gradients,
    decoders.mode,
    decoders.draw,
    decoders.generator,
    decoders.expected_encoding,
    presentation.render,
    presentation.similarity,
    presentation.metrics,
    presentation.directions,
    presentation.files,
    presentation.input_spec,
    modules.state,
    modules.dtype,
    modules.device,
    learning.head_learns,
    learning.missing,
    learning.learns,
)
