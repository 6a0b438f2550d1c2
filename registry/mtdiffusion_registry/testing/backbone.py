"""The contract of backbones."""

from __future__ import annotations

from copy import deepcopy
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from mtdiffusion.interfaces import Backbone, Features
from mtdiffusion_registry.configs import BackboneConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.testing import config as of_config
from mtdiffusion_registry.testing.contract import (
    BATCHES,
    Check,
    NotApplicable,
    Subject,
    check,
    close,
    contract_error,
    finite,
    kind_of,
    require,
    same_shape,
    sizes,
)

__tracebackhide__ = True

CHANNELS, VECTOR = 5, 7
TRAINING_STEPS = 40

Inputs = tuple[Tensor, Tensor, Tensor]


@frozen(eq=False, slots=False)
class BackboneSubject(Subject):
    """A backbone's config and the largest latent it is checked at."""

    config: BackboneConfig
    height: int = 8
    width: int = 8

    @cached_property
    def backbones(self) -> list[tuple[Backbone, Inputs]]:
        """The backbone at every latent that it can work at, with inputs; it must work at the first."""
        built = []
        for i, (h, w) in enumerate(sizes(self.height, self.width)):
            try:
                backbone = self.config.build(CHANNELS, h, w, VECTOR)
            except (UserError, ValueError) as error:
                if i == 0:
                    raise contract_error(
                        "a backbone can be built for the first latent",
                        f"{type(error).__name__}: {error}",
                        "choose a height and a width that it can work at",
                    ) from error
                continue
            require(
                isinstance(backbone, Backbone),
                "build returns a Backbone",
                kind_of(backbone),
                "subclass mtdiffusion.interfaces.Backbone",
            )
            inputs = (torch.randn(3, CHANNELS, h, w), torch.tensor([0.0, 0.5, 1.0]), torch.randn(3, VECTOR))
            built.append((backbone.eval(), inputs))
        return built

    @cached_property
    def fitted(self) -> tuple[Backbone, list[float]]:
        """The first backbone fitted to random features, and the squared error on the way."""
        original, inputs = self.backbones[0]
        backbone = deepcopy(original).train()
        shape = backbone(*inputs)
        target = Features(torch.randn_like(shape.map), torch.randn_like(shape.vector))
        optimizer = torch.optim.Adam(backbone.parameters(), lr=2e-3)
        losses = []
        for _ in range(TRAINING_STEPS):
            h = backbone(*inputs)
            loss = F.mse_loss(h.map, target.map) + F.mse_loss(h.vector, target.vector)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return backbone.eval(), losses


@check("entry_point")
def build(subject: BackboneSubject) -> None:
    """build gives a Backbone, for every latent that it accepts."""
    require(bool(subject.backbones), "a backbone can be built", "none was", "accept the first latent")


@check("build")
@torch.no_grad()
def features(subject: BackboneSubject) -> None:
    """The features are finite and of the shapes that backbone.features says, aligned with the latent."""
    for backbone, inputs in subject.backbones:
        spec, size = backbone.features, tuple(inputs[0].shape[2:])
        require(
            (spec.height, spec.width) == size,
            "the feature map is aligned with the latent",
            f"backbone.features of {spec.height}x{spec.width}, latent of {size[0]}x{size[1]}",
            "return to the resolution of the input",
        )
        for batch in BATCHES:
            h = backbone(*(value[:batch] for value in inputs))
            same_shape(h.map, (batch, spec.channels, *size), "features.map is as backbone.features says", "forward")
            same_shape(h.vector, (batch, spec.vector), "features.vector is as backbone.features says", "forward")
            finite(h.map, "features are finite", "noise levels 0 and 1 occur: take no logarithm of them")
            finite(h.vector, "features are finite", "noise levels 0 and 1 occur: take no logarithm of them")


@check("features")
@torch.no_grad()
def batch(subject: BackboneSubject) -> None:
    """The features of a sample do not depend on its batch."""
    for backbone, inputs in subject.backbones:
        alone, together = backbone(*(value[:1] for value in inputs)), backbone(*inputs)
        fix = "normalise over channels or groups, not over the batch"
        close(alone.map, together.map[:1], "the features of a sample do not depend on its batch", fix)
        close(alone.vector, together.vector[:1], "the features of a sample do not depend on its batch", fix)


@check("features")
@torch.no_grad()
def state(subject: BackboneSubject) -> None:
    """A copy, and one built anew from the same state_dict, give the same features."""
    backbone, inputs = subject.backbones[0]
    torch.manual_seed(1)  # what is drawn in building anew must differ
    loaded = subject.config.build(CHANNELS, subject.height, subject.width, VECTOR).eval()
    loaded.load_state_dict(backbone.state_dict())
    expected = backbone(*inputs)
    for how, copy in (("a copy", deepcopy(backbone)), ("one built anew from the same state_dict", loaded)):
        h = copy(*inputs)
        fix = "keep all state in parameters and buffers (register_buffer), none of it drawn anew"
        close(h.map, expected.map, f"{how} gives the same features", fix)
        close(h.vector, expected.vector, f"{how} gives the same features", fix)


@check("state")
@torch.no_grad()
def dtype(subject: BackboneSubject) -> None:
    """backbone.double() computes in float64."""
    backbone, inputs = subject.backbones[0]
    h = deepcopy(backbone).double()(*(value.double() for value in inputs))
    require(
        h.map.dtype == h.vector.dtype == torch.float64,
        "backbone.double() computes in float64",
        f"{h.map.dtype}, {h.vector.dtype}",
        "take dtypes from parameters and buffers, or from the input",
    )


@check("state")
@torch.no_grad()
def device(subject: BackboneSubject) -> None:
    """The features are where the backbone is: meta, and cuda if there is one."""
    backbone, inputs = subject.backbones[0]
    fix = "make tensors on the device of the input, and register constants as buffers"
    for where in ("meta", "cuda") if torch.cuda.is_available() else ("meta",):
        contract = f"a backbone that was moved to {where} computes there"
        try:
            h = deepcopy(backbone).to(where)(*(value.to(where) for value in inputs))
        except NotImplementedError as error:
            raise NotApplicable(f"an operation has no {where} kernel: {str(error).partition(': ')[0]}") from error
        except RuntimeError as error:
            raise contract_error(contract, str(error).partition("\n")[0], fix) from error
        found = {h.map.device.type, h.vector.device.type}
        require(found == {where}, contract, ", ".join(sorted(found)), fix)


@check("features")
def gradients(subject: BackboneSubject) -> None:
    """Every parameter has a gradient, and a finite one (distributed training needs it)."""
    backbone, inputs = subject.backbones[0]
    backbone = deepcopy(backbone).train()
    h = backbone(*inputs)
    torch.autograd.backward(F.mse_loss(h.map, torch.randn_like(h.map)) + h.vector.square().mean())
    weights = {name: weight for name, weight in backbone.named_parameters() if weight.requires_grad}
    unused = [name for name, weight in weights.items() if weight.grad is None]
    contract = "every parameter has a gradient (distributed training needs it)"
    require(not unused, contract, f"none for {', '.join(unused)}", "remove what forward does not use")
    for name, weight in weights.items():
        assert weight.grad is not None
        finite(weight.grad, f"gradients are finite ({name})", "look for divisions, logarithms and roots")


@check("gradients")
def blocks(subject: BackboneSubject) -> None:
    """The repeated blocks that it tells can be computed again on the way back."""
    original, inputs = subject.backbones[0]
    plain, again = deepcopy(original).train(), deepcopy(original).train()
    contract, fix = "repeated_blocks tells submodules", "return the modules that forward goes through, each once"
    told = list(again.repeated_blocks())
    if not told:
        raise NotApplicable("it tells none")
    within = [part for block in told for part in block.modules()]
    for block in told:
        require(any(block is part for part in again.modules()), contract, f"{kind_of(block)} that is none", fix)
        found = f"{kind_of(block)} that is there twice, or lies within another"
        require(sum(block is part for part in within) == 1, contract, found, fix)
    called: set[int] = set()
    for i, block in enumerate(told):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        block.register_forward_pre_hook(lambda *_, i=i: called.add(i))
    expected, gradients = _backward(plain, inputs)
    try:
        h, found_gradients = _backward(again, inputs)
    except CheckpointError as error:
        found = f"another computation: {str(error).strip().partition(chr(10))[0]}"
        raise contract_error("blocks compute the same when they are computed again", found, _SAME) from error
    idle = [kind_of(block) for i, block in enumerate(told) if i not in called]
    fix = "call blocks as modules, block(x), and tell none that forward leaves out"
    require(not idle, "forward calls each of the repeated blocks", f"it does not call {', '.join(idle)}", fix)
    close(h.map, expected.map, "features do not depend on whether blocks are computed again", _SAME)
    off = max((a - b).abs().max().item() for a, b in zip(found_gradients, gradients, strict=True))
    allowed = 1e-4 * max(gradient.abs().max().item() for gradient in gradients)
    found = f"they differ by up to {off:.3g}, allowed {allowed:.1g}"
    require(off <= allowed, "gradients do not depend on whether blocks are computed again", found, _SAME)


_SAME = "let a block's result depend on its inputs, its weights and torch's generator alone"


def _backward(backbone: Backbone, inputs: Inputs) -> tuple[Features, list[Tensor]]:
    """Features, and gradients of all parameters, from the same random numbers each time."""
    torch.manual_seed(0)
    h = backbone(*inputs)
    torch.autograd.backward(h.map.square().mean() + h.vector.square().mean())
    return h, [weight.grad for weight in backbone.parameters() if weight.grad is not None]


@check("gradients")
def fits(subject: BackboneSubject) -> None:
    """Random features can be fitted."""
    _, losses = subject.fitted
    require(
        losses[-1] < 0.9 * losses[0],
        f"features can be fitted: {TRAINING_STEPS} steps of Adam lower the squared error by a tenth",
        f"from {losses[0]:.3g} to {losses[-1]:.3g}",
        "check initialisation and normalisation",
    )


@check("fits")
def inputs(subject: BackboneSubject) -> None:
    """Both features depend on z, on the noise level and on the vector."""
    # A fresh backbone whose last layer starts at zero ignores its inputs; a fitted one must not.
    backbone, _ = subject.fitted
    given = subject.backbones[0][1]
    with torch.no_grad():
        before = backbone(*given)
        for i, name in enumerate(("z", "noise", "vector")):
            moved = [value.roll(1, 0) if j == i else value for j, value in enumerate(given)]
            after = backbone(*moved)
            for part, a, b in (("map", after.map, before.map), ("vector", after.vector, before.vector)):
                require(
                    not torch.allclose(a, b, atol=1e-6),
                    "the features depend on all inputs",
                    f"after {TRAINING_STEPS} training steps features.{part} does not depend on {name}",
                    f"feed {name} to what computes features.{part}",
                )


CHECKS: tuple[Check, ...] = (
    *of_config.CHECKS,
    build,
    features,
    batch,
    state,
    dtype,
    device,
    gradients,
    blocks,
    fits,
    inputs,
)
