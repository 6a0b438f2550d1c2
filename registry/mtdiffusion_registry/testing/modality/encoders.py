"""Encoders: codes, what is seen of them, and read-outs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtdiffusion.interfaces import LatentSpec
from mtdiffusion_registry.testing.contract import (
    BATCHES,
    NotApplicable,
    check,
    close,
    finite,
    require,
    rms,
    same_shape,
)
from mtdiffusion_registry.testing.modality.subject import ModalitySubject

__tracebackhide__ = True

CODE_RMS = (0.2, 5.0)
USUAL_RMS = (0.4, 2.5)
"""Of codes of real samples; those of the modalities that we ship are from 0.5 to 1."""
USUAL_OFFSET = 0.8
"""Share of the mean square that may be the same in all real samples; of the modalities that we ship 0.1 to 0.6."""


@check("examples")
def encode(subject: ModalitySubject) -> None:
    """encoder(x) is finite, [B, c, H, W], and of each sample alone."""
    x = subject.examples
    for case in subject.cases:
        encoder, latent = case.modality.encoder, case.latent
        for batch in BATCHES:
            e = encoder(x[:batch])
            shape = (batch, *latent.shape)
            same_shape(e, shape, "encoder(x) fills its share of the latent, [B, c, H, W]", "the encoder")
            require(e.is_floating_point(), "codes are floating point", f"{e.dtype}", "return floating-point codes")
            finite(e, "codes are finite", "look for divisions and logarithms in the encoder")
        close(
            encoder(x[:1]),
            encoder(x)[:1],
            "the code of a sample does not depend on its batch",
            "in eval mode, use no statistics of the batch",
        )


@check("encode")
def code_scale(subject: ModalitySubject) -> str | None:
    """Codes have a root mean square of about 1."""
    warnings = []
    for case in subject.cases:
        codes = case.modality.encoder(subject.examples)
        found, offset = rms(codes), rms(codes.mean(0))
        require(
            CODE_RMS[0] <= found <= CODE_RMS[1],
            f"codes have a root mean square of about 1 (from {CODE_RMS[0]} to {CODE_RMS[1]})",
            f"{found:.3g}",
            "scale the codes: modalities share one noise level",
        )
        if not subject.real:  # what is made up has any scale
            continue
        if not USUAL_RMS[0] <= found <= USUAL_RMS[1]:
            warnings.append(
                f"the codes of these samples have a root mean square of {found:.2g}, expected about 1; is the standard "
                "deviation that they are divided by that of the data?"
            )
        elif (share := (offset / found) ** 2) > USUAL_OFFSET:
            warnings.append(
                f"{share:.0%} of the mean square of these codes is the same in all samples, and says nothing of any; "
                "is the mean that is taken off that of the data?"
            )
    return warnings[0] if warnings else None


@check("build")
def readout(subject: ModalitySubject) -> None:
    """readout(z) is [B, readout_dim]."""
    for case in subject.cases:
        encoder = case.modality.encoder
        for batch in BATCHES:
            found = encoder.readout(torch.randn(batch, *case.latent.shape))
            shape = (batch, encoder.readout_dim)
            same_shape(found, shape, "readout(z) is [B, readout_dim]", "readout or readout_dim")


@check("encode")
def observe(subject: ModalitySubject) -> None:
    """observe(x, visible) is the code where visible is 1, and zero where it is 0."""
    x = subject.examples
    for case in subject.cases:
        encoder, latent = case.modality.encoder, case.latent
        every = torch.ones(len(x), 1, latent.height, latent.width)
        e = encoder(x)
        close(encoder.observe(x, every), e, "observe(x, 1) is encoder(x)", "multiply with visible, and no more")
        nothing = encoder.observe(x, torch.zeros_like(every))
        same_shape(nothing, e.shape, "observe(x, visible) has the shape of the code", "observe")
        require(
            not nothing.count_nonzero().item(),
            "observe(x, 0) is zero",
            f"values up to {nothing.abs().max().item():.3g}",
            "multiply the code with visible last",
        )
        if encoder.spatial:
            visible = _random_holes(len(x), latent)
            seen = encoder.observe(x, visible)
            require(
                not (seen * (1 - visible)).count_nonzero().item(),
                "observe(x, visible) is zero where visible is 0",
                "values other than 0",
                "multiply the code with visible last",
            )


@check("observe")
def hidden(subject: ModalitySubject) -> None:
    """observe(x, visible) does not depend on what is hidden of x."""
    x = subject.examples
    if not subject.cases[0].modality.encoder.spatial:
        raise NotApplicable("the encoder is not spatial: x is observed whole or not at all")
    for case in subject.cases:
        encoder, latent = case.modality.encoder, case.latent
        require(
            x.dim() >= 3,
            "x of a spatial encoder ends with its height and width",
            f"x of shape {tuple(x.shape)}",
            "set spatial = False",
        )
        visible = _random_holes(len(x), latent)
        # A pixel is hidden if every place of the latent that it touches is; adaptive pooling has just these windows.
        shown = F.adaptive_max_pool2d(visible, x.shape[-2:]).bool()
        shown = shown.view(len(x), *(1,) * (x.dim() - 3), *x.shape[-2:])
        changed = torch.where(shown, x, x.roll(1, 0))
        leak = (encoder.observe(changed, visible) - encoder.observe(x, visible)).abs().max().item()
        require(
            leak <= 1e-6,
            "observe(x, visible) does not depend on what is hidden of x",
            f"it changes by up to {leak:.3g} when hidden pixels do",
            "override observe: hide before encoding, or use patches that do not overlap",
        )


def _random_holes(batch: int, latent: LatentSpec) -> Tensor:
    return (torch.rand(batch, 1, latent.height, latent.width) < 0.5).float()
