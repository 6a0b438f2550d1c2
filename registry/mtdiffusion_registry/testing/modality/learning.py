"""Learning: the head alone, and a small diffusion model."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor

from mtdiffusion.interfaces import Features
from mtdiffusion.layout import OwnLayout
from mtdiffusion.loss import Draws, LossWeights, composite_loss
from mtdiffusion.model import MultimodalDiffusion
from mtdiffusion.process import DiffusionProcess
from mtdiffusion.retention import Retention
from mtdiffusion.sampler import SamplerSettings, sample
from mtdiffusion.schedules import SNRMatched
from mtdiffusion_registry.testing.contract import (
    check,
    finite,
    require,
    rms,
)
from mtdiffusion_registry.testing.modality.subject import ModalitySubject
from mtdiffusion_registry.testing.toys import EchoConfig, Perceptron, echo_of

__tracebackhide__ = True

HEAD_STEPS = 200
MODEL_STEPS = 300
MODEL_EXAMPLES = 8
DIFFUSION_STEPS = 50
ECHO = "echo"


@check("gradients", "expected_encoding", "code_scale")
def head_learns(subject: ModalitySubject) -> None:
    """A head that is given a linear map of the code learns x."""
    case, x = subject.cases[0], subject.examples
    modality = deepcopy(case.modality).train()
    encoder, decoder = modality.encoder, modality.decoder
    with torch.no_grad():
        e = case.modality.encoder(x)
        channels, spec = e.shape[1], case.spec
        to_map = torch.randn(spec.channels, channels) / math.sqrt(channels)
        to_vector = torch.randn(spec.vector, e[0].numel()) / math.sqrt(e[0].numel())
        features = Features(torch.einsum("fc,bchw->bfhw", to_map, e), e.flatten(1) @ to_vector.T)

    def code_error() -> float:
        with torch.no_grad():
            return rms(decoder.expected_encoding(decoder(features), encoder) - e)

    optimizer = torch.optim.Adam([weight for weight in decoder.parameters() if weight.requires_grad], lr=1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, HEAD_STEPS)
    losses, error_before = [], code_error()
    for _ in range(HEAD_STEPS):
        loss = decoder.objective(decoder(features), x).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    start, end, error = losses[0], losses[-1], code_error()
    # How far the objective falls would prove nothing: it may be negative, or have a floor (a likelihood of fixed
    # scale), or reward the wrong x, and one that learns a scale beside x rises as that is found. That the code comes
    # back cannot be had by chance.
    require(
        error <= error_before / 2,
        f"a head given a linear map of the code learns x: in {HEAD_STEPS} steps of Adam the error of the expected code "
        "halves",
        f"objective from {start:.3g} to {end:.3g}, error of the expected code from {error_before:.3g} to {error:.3g}",
        "check that the head reads features.map or features.vector, and that the objective rewards the right x",
    )


def _model(subject: ModalitySubject) -> MultimodalDiffusion:
    """A small model of the modality, called "x", and an echo of it."""
    case, echo = subject.cases[0], EchoConfig()
    height, width = case.latent.height, case.latent.width
    channels = {"x": case.latent.channels, ECHO: echo.latent_channels(height, width)}
    layout = OwnLayout(channels, height, width, show_clean=True)  # a network as small learns far sooner from it
    parts = {
        "x": subject.config.build(layout.share("x"), case.spec),
        ECHO: echo.build(layout.share(ECHO), case.spec),
    }
    if subject.source is not None:
        parts["x"].measure(subject.examples)
    readouts = sum(part.encoder.readout_dim for part in parts.values())
    backbone = Perceptron(*layout.inputs(readouts), case.spec)
    process = DiffusionProcess.build(Retention.from_curve("cosine", DIFFUSION_STEPS, 2), SNRMatched(), layout)
    return MultimodalDiffusion(parts, backbone, process)


def _batch(subject: ModalitySubject, n: int) -> dict[str, Tensor]:
    with torch.no_grad():
        x = subject.examples[:n]
        return {"x": x, ECHO: echo_of(subject.cases[0].modality.encoder(x), EchoConfig().dims)}


@check("placeholder", "gradients", "expected_encoding", "readout", "observe")
def missing(subject: ModalitySubject) -> None:
    """A sample that lacks the modality adds nothing to the loss, and no NaN."""
    model = _model(subject)
    batch = _batch(subject, 3)
    there = torch.tensor([1.0, 0.0, 1.0])
    batch["x"] = torch.where(
        there.bool().view(-1, *[1] * (batch["x"].dim() - 1)), batch["x"], model.modality("x").placeholder(3)
    )
    terms = composite_loss(
        model,
        batch,
        LossWeights(l0=1.0, l1=1.0, l2=1.0, l3=1.0),
        presence=torch.stack([there, torch.ones(3)], 1),
        draws=Draws.of(model, 3, torch.Generator().manual_seed(0)),
    )
    fix = "look for a division, logarithm or root that its placeholder makes infinite in the objective"
    require(
        terms.l2["x"][1].item() == 0 and terms.l3["x"][1].item() == 0,
        "a sample without the modality adds nothing to its loss",
        f"L2 {terms.l2['x'][1].item():.3g}",
        "let the objective of a sample depend on that sample alone",
    )
    finite(terms.total, "the loss of a batch with a modality missing is finite", fix)
    torch.autograd.backward(terms.total.mean())
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            finite(weight.grad, f"its gradients are finite ({name})", fix)


@check("missing", "head_learns", "mode")
def learns(subject: ModalitySubject) -> None:
    """A small diffusion model learns to recover x from its noisy code, from another modality, and that from x."""
    model = _model(subject).train()
    batch = _batch(subject, MODEL_EXAMPLES)
    n = len(batch["x"])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(
        [
            {"params": [weight for weight in model.modalities.parameters() if weight.requires_grad], "lr": 1e-2},
            {"params": list(model.backbone.parameters()), "lr": 3e-3},
        ]
    )
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, MODEL_STEPS)
    shown = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat_interleave(n, 0)  # nothing, x, the echo
    visible = shown[:, :, None, None]
    thrice = {name: torch.cat([value] * 3) for name, value in batch.items()}
    for _ in range(MODEL_STEPS):
        draws = Draws.of(model, 3 * n, generator)
        loss = composite_loss(model, thrice, visible=visible, draws=draws).total.mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        decay.step()

    model.eval()
    with torch.no_grad():
        codes = model.encode(batch)
        t = torch.full((1, 2), DIFFUSION_STEPS // 10)
        z = model.process.corrupt(codes, t, model.noise(n, generator))
        expected = model.complete(model(z, t), z, t).codes
        settings = SamplerSettings(steps=10, solver="dpmpp_2m")
        given_echo = sample(model, n, observed={ECHO: batch[ECHO]}, settings=settings, generator=generator)
        given_x = sample(model, n, observed={"x": batch["x"]}, settings=settings, generator=generator)
        found = {
            "x from its own noisy code": (expected["x"], codes["x"]),
            "x from the other modality": (model.encode(given_echo)["x"], codes["x"]),
            "the other modality from x": (model.encode(given_x)[ECHO], codes[ECHO]),
        }
    for what, (code, truth) in found.items():
        error, spread = rms(code - truth), rms(truth - truth.mean(0))
        require(
            error <= spread / 2,
            f"a small diffusion model of x and of a random projection of its code learns to recover {what}: after "
            f"{MODEL_STEPS} steps on {n} samples the error of the code is at most half of the codes' spread",
            f"an error of {error:.3g}, a spread of {spread:.3g}",
            "check loss_weight and snr_clamp, that codes of different x differ, and that mode and expected_encoding "
            "agree with the objective",
        )
