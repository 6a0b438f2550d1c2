"""Modules: state, dtype and device."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from mtdiffusion.interfaces import Features, Modality
from mtdiffusion_registry.testing.contract import (
    NotApplicable,
    check,
    close,
    contract_error,
    require,
)
from mtdiffusion_registry.testing.modality.subject import ModalitySubject

__tracebackhide__ = True


def _outputs(modality: Modality, x: Tensor, features: Features) -> dict[str, Tensor]:
    return {"the code": modality.encoder(x), **modality.decoder(features)}


@check("encode", "params")
def state(subject: ModalitySubject) -> None:
    """A copy, and one built anew from the same state_dict, give the same outputs."""
    x = subject.examples[:3]
    torch.manual_seed(1)  # what is drawn in building anew must differ
    for case in subject.cases:
        features = case.features(3)
        expected = _outputs(case.modality, x, features)
        loaded = subject.config.build(case.latent, case.spec).eval()
        loaded.load_state_dict(case.modality.state_dict())
        for how, copy in (("a copy", deepcopy(case.modality)), ("one built anew from the same state_dict", loaded)):
            for name, value in _outputs(copy, x, features).items():
                fix = "keep all state in parameters and buffers (register_buffer), none of it drawn anew"
                close(value, expected[name], f"{how} gives the same outputs ({name})", fix)


@check("state")
def dtype(subject: ModalitySubject) -> None:
    """modality.double() computes in float64."""
    x = subject.examples[:3]
    fix = "register constants as buffers, and take dtypes from parameters and buffers, or from the input"
    for case in subject.cases:
        features = case.features(3)
        double = Features(features.map.double(), features.vector.double())
        try:
            outputs = _outputs(deepcopy(case.modality).double(), x.double() if x.is_floating_point() else x, double)
        except RuntimeError as error:
            raise contract_error("modality.double() computes in float64", str(error).partition("\n")[0], fix) from error
        for name, value in outputs.items():
            require(
                not value.is_floating_point() or value.dtype == torch.float64,
                f"modality.double() computes in float64 ({name})",
                f"{value.dtype}",
                fix,
            )


@check("state", "nll", "draw", "expected_encoding")
def device(subject: ModalitySubject) -> None:
    """All that is computed is where the modality is: meta, and cuda if there is one."""
    x = subject.examples[:3]
    for where in ("meta", "cuda") if torch.cuda.is_available() else ("meta",):
        for case in subject.cases:
            features, moved = case.features(3), deepcopy(case.modality).to(where)
            there = Features(features.map.to(where), features.vector.to(where))
            encoder, decoder = moved.encoder, moved.decoder
            try:
                params = decoder(there)
                outputs = {
                    **_outputs(moved, x.to(where), there),
                    "nll": decoder.nll(params, x.to(where)),
                    "expected_encoding": decoder.expected_encoding(params, encoder),
                    "readout": encoder.readout(torch.randn(3, *case.latent.shape, device=where)),
                    "mode": decoder.mode(params),
                }
                if where == "cuda":  # a generator has a device, and there is none for meta
                    for generator in (torch.Generator(), torch.Generator(where)):
                        outputs[f"sample by a generator on {generator.device}"] = decoder.sample(params, generator)
            except NotImplementedError as error:
                raise NotApplicable(f"an operation has no {where} kernel: {str(error).partition(': ')[0]}") from error
            except RuntimeError as error:
                raise contract_error(
                    f"a modality that was moved to {where} computes there",
                    str(error).partition("\n")[0],
                    "make tensors on the device of the input, and register constants as buffers",
                ) from error
            for name, value in outputs.items():
                require(
                    value.device.type == where,
                    f"a modality that was moved to {where} computes there ({name})",
                    f"{value.device}",
                    "make tensors on the device of the input, and register constants as buffers",
                )
