"""Decoders: parameters, likelihoods, draws and expected codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor

from mtdiffusion.interfaces import Decoder, Params
from mtdiffusion_registry.testing.contract import (
    BATCHES,
    ContractError,
    NotApplicable,
    check,
    finite,
    kind_of,
    require,
    rms,
    same_dtype,
    same_shape,
)
from mtdiffusion_registry.testing.modality.subject import DTYPE, Case, ModalitySubject, accepts

__tracebackhide__ = True

DRAWS = 1024  # of the Monte Carlo estimate of the expected encoding
STANDARD_ERRORS = 5.0  # by which that estimate may be off
SCORE_BIAS = 0.2  # of a mean gradient, as a share of one sample's: a sampler that clips or rounds needs some
RATIO_BIAS = 0.1  # of a mean ratio of densities, likewise
LIKELIHOOD_NUMBERS = 2**20  # drawn for each of a few params: fewer samples of large x


@check("build")
def params(subject: ModalitySubject) -> None:
    """decoder(features) is a dict of finite tensors, batch first."""
    for case in subject.cases:
        for batch in BATCHES:
            params = case.modality.decoder(case.features(batch))
            require(
                isinstance(params, Mapping)
                and bool(params)
                and all(isinstance(value, Tensor) for value in params.values()),
                "decoder(features) is a dict of tensors",
                kind_of(params),
                "return a dict with a tensor for each parameter of the distribution",
            )
            for name, value in params.items():
                require(
                    value.shape[:1] == (batch,),
                    "parameters have the batch first",
                    f"{name} of shape {tuple(value.shape)}, batch {batch}",
                    "expand what is shared by the batch",
                )
                finite(value, f"parameters are finite ({name})", "look for divisions and logarithms in the head")


@check("params", "examples")
def nll(subject: ModalitySubject) -> None:
    """nll(params, x) is one finite number a sample, [B]."""
    for case in subject.cases:
        decoder = case.modality.decoder
        for batch in BATCHES:
            value = decoder.nll(decoder(case.features(batch)), subject.examples[:batch])
            same_shape(value, (batch,), "nll is one number a sample, [B]", "sum over all axes but the first in nll")
            finite(value, "nll is finite", "compute with logits and log scales")


@check("nll", "draw")
def likelihood(subject: ModalitySubject) -> None:
    """nll is -log of the density that sample draws from."""
    case, batch = subject.cases[0], max(BATCHES)
    decoder = case.modality.decoder
    each = max(64, min(DRAWS // batch, LIKELIHOOD_NUMBERS // subject.examples[0].numel()))
    params = {name: value.detach() for name, value in case.params(batch).items()}
    repeated = {name: value.repeat_interleave(each, 0) for name, value in params.items()}
    with torch.no_grad():
        drawn = decoder.sample(repeated, torch.Generator().manual_seed(0))
    try:
        _require_score(decoder, repeated, drawn, batch)
        _require_ratio(decoder, params, repeated, drawn, batch)
    except ContractError:
        if _clipped(drawn):  # as it may: what is drawn must be valid
            raise NotApplicable(
                "sample clips or rounds, so that it draws from another density than that of nll"
            ) from None
        raise


def _clipped(x: Tensor) -> bool:
    """Whether real numbers meet at an end of their range, which those of a density do not."""
    return x.is_floating_point() and max(int((x == end).sum()) for end in (x.min(), x.max())) > 1


_LIKELIHOOD = "nll is -log of the density that sample draws from"


def _require_score(decoder: Decoder, params: Params, drawn: Tensor, batch: int) -> None:
    """The gradient of a log-likelihood has mean zero under its own density: a term that is missing shows."""
    leaves = {name: value.clone().requires_grad_() for name, value in params.items() if value.is_floating_point()}
    loss = decoder.nll({**params, **leaves}, drawn).sum()
    if not loss.requires_grad:
        raise NotApplicable("nll has no gradient to the params")
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is None:
            continue
        rows = gradient.double().reshape(batch, len(drawn) // batch, -1)
        mean, square = rows.mean(1), rows.square().mean(1)
        off, size = mean.norm().item(), square.sum().sqrt().item()
        standard_error = ((square - mean.square()).clamp(min=0).sum() / rows.shape[1]).sqrt().item()
        allowed = STANDARD_ERRORS * standard_error + SCORE_BIAS * size
        require(
            off <= allowed,
            f"{_LIKELIHOOD}: over samples, the mean of its gradient to {name} is zero",
            f"a norm of {off:.3g}, allowed {allowed:.3g}, where a sample's is {size:.3g}",
            "give nll all terms that depend on the params (a log scale, a log determinant), and sample the same scale",
        )


def _require_ratio(decoder: Decoder, params: Params, repeated: Params, drawn: Tensor, batch: int) -> None:
    """The ratio of another density to one's own has mean 1 under one's own: a factor of the logarithm shows."""
    each = len(drawn) // batch
    direction = {name: torch.randn_like(value) for name, value in params.items() if value.is_floating_point()}

    def log_ratio(step: float, most: int) -> Tensor:
        """To the density that is a step away, for that many samples of each of the params: ``[batch, most]``."""
        rows = torch.arange(len(drawn)).view(batch, each)[:, :most].flatten()
        own = {name: value[rows] for name, value in repeated.items()}
        there = {name: (params[name] + step * way).repeat_interleave(most, 0) for name, way in direction.items()}
        difference = decoder.nll(own, drawn[rows]).double() - decoder.nll({**own, **there}, drawn[rows]).double()
        return difference.view(batch, most)

    with torch.no_grad():
        step = 1.0
        while step > 1e-9 and not log_ratio(step, 16).std(1).max() <= 1:  # which varies by about 1 then; not for NaN
            step /= 2
        log_ratios = log_ratio(step, each)
    ratio = log_ratios.exp()
    off = (ratio.mean(1) - 1).abs()
    allowed = STANDARD_ERRORS * ratio.std(1) / math.sqrt(each) + RATIO_BIAS
    worst = int((off - allowed).argmax())
    found, wide = ratio.mean(1)[worst].item(), allowed[worst].item()
    require(
        bool((off <= allowed).all()),
        f"{_LIKELIHOOD}: over samples, the mean ratio of a density near by to it, exp of a difference of two nll, is 1",
        f"{found:.3g}, allowed {1 - wide:.3g} to {1 + wide:.3g}",
        "sum the nll over the dimensions of x, in nats; do not average it, weigh it or leave out a factor",
    )


@check("nll")
def dims(subject: ModalitySubject) -> None:
    """dims, the number of dimensions of one x, is stated where there is more than one."""
    decoder, shape = subject.cases[0].modality.decoder, subject.examples.shape[1:]
    found, contract = decoder.dims, "decoder.dims is the number of scalar dimensions of one x"
    fix = f"set self.dims in the decoder ({shape.numel()} for x of this shape, unless some say nothing)"
    kept = isinstance(found, int) and not isinstance(found, bool) and found >= 1
    require(kept, contract, repr(found), fix)
    # A 1 that was meant (a one-hot vector, say) can be stated; only what was forgotten is known to be wrong.
    classes = type(decoder).__mro__[: type(decoder).__mro__.index(Decoder)]
    stated = any("dims" in vars(owner) for owner in (decoder, *classes))
    require(stated or shape.numel() == 1, contract, f"1, since it is not set, for x of shape {tuple(shape)}", fix)
    each = decoder.dims_of(subject.examples)
    contract = "decoder.dims_of(x) is how many of its dimensions count in the nll of each x: int64 [B], from 0 to dims"
    fits = each.shape == subject.examples.shape[:1] and each.dtype == torch.int64
    fits = fits and bool(((each >= 0) & (each <= found)).all())
    fix = "count over all axes of x but the first, and set self.dims to the most there can be"
    require(fits, contract, f"{each.dtype} {each.tolist()} with dims {found}", fix)


@check("nll")
def objective(subject: ModalitySubject) -> None:
    """objective(params, x) is one finite number a sample, [B]."""
    for case in subject.cases:
        decoder = case.modality.decoder
        for batch in BATCHES:
            value = decoder.objective(decoder(case.features(batch)), subject.examples[:batch])
            fix = "sum over all axes but the first in objective"
            same_shape(value, (batch,), "objective is one number a sample, [B]", fix)
            finite(value, "objective is finite", "compute with logits and log scales")


@check("objective")
def gradients(subject: ModalitySubject) -> None:
    """The objective has finite gradients, not all zero, to the decoder's parameters."""
    for case in subject.cases:
        decoder = deepcopy(case.modality.decoder)
        weights = [weight for weight in decoder.parameters() if weight.requires_grad]
        loss = decoder.objective(decoder(case.features(3)), subject.examples[:3]).sum()
        found = []
        if loss.requires_grad:
            torch.autograd.backward(loss)
            found = [weight.grad for weight in weights if weight.grad is not None]
        require(
            any(gradient.count_nonzero().item() for gradient in found),
            "the objective has gradients to the decoder's parameters",
            f"none but zeros, for {len(weights)} trainable parameters",
            "detach nothing between the parameters and the objective",
        )
        for gradient in found:
            finite(gradient, "gradients of the objective are finite", "compute with logits and log scales")


@check("params", "examples")
def mode(subject: ModalitySubject) -> None:
    """mode(params) is a valid x."""
    for case in subject.cases:
        for batch in BATCHES:
            found = case.modality.decoder.mode(case.params(batch))
            shape = (batch, *subject.examples.shape[1:])
            same_shape(found, shape, "mode(params) has the shape of x", "mode")
            same_dtype(found, subject.examples.dtype, "mode(params) has the dtype of x", DTYPE)
            accepts(case.modality, found, "mode(params)", "return a valid x: right dtype, within range")


@check("params", "examples")
def draw(subject: ModalitySubject) -> None:
    """sample(params) is a valid x, with and without a generator."""
    for case in subject.cases:
        decoder = case.modality.decoder
        for batch in BATCHES:
            params = case.params(batch)
            found = decoder.sample(params, torch.Generator().manual_seed(1))
            shape = (batch, *subject.examples.shape[1:])
            same_shape(found, shape, "sample(params) has the shape of x", "sample")
            same_dtype(found, subject.examples.dtype, "sample(params) has the dtype of x", DTYPE)
            accepts(case.modality, found, "sample(params)", "return a valid x: right dtype, within range")
        accepts(case.modality, decoder.sample(params), "sample(params) without a generator", "accept generator=None")


@check("draw")
def generator(subject: ModalitySubject) -> None:
    """The same generator state gives the same sample."""
    for case in subject.cases:
        params = case.params(3)

        def drawn(seed: int, case: Case = case, params: Params = params) -> Tensor:
            torch.manual_seed(seed)  # what is drawn from the global generator differs
            return case.modality.decoder.sample(params, torch.Generator().manual_seed(0))

        require(
            torch.equal(drawn(1), drawn(2)),
            "the same generator state gives the same sample",
            "two samples that differ",
            "pass generator= to every random function in sample",
        )


@check("draw", "encode")
def expected_encoding(subject: ModalitySubject) -> None:
    """expected_encoding(params, encoder) is the mean code of samples."""
    with torch.no_grad():
        for case in subject.cases:
            for batch in BATCHES:
                found = case.modality.decoder.expected_encoding(case.params(batch), case.modality.encoder)
                shape = (batch, *case.latent.shape)
                same_shape(found, shape, "expected_encoding is [B, c, H, W]", "expected_encoding")
                finite(found, "expected_encoding is finite", "look for divisions and logarithms in it")
            _require_mean_code(case, subject.encoding_bias * rms(case.modality.encoder(subject.examples)))


def _require_mean_code(case: Case, bias: float) -> None:
    encoder, decoder = case.modality.encoder, case.modality.decoder
    batch = max(BATCHES)
    params = case.params(batch)
    expected = decoder.expected_encoding(params, encoder).double()
    generator = torch.Generator().manual_seed(0)
    total, squares, chunk = torch.zeros_like(expected), torch.zeros_like(expected), 64
    repeated = {name: value.repeat_interleave(chunk, 0) for name, value in params.items()}
    for _ in range(DRAWS // chunk):
        codes = encoder(decoder.sample(repeated, generator)).double().unflatten(0, (batch, chunk))
        total += codes.sum(1)
        squares += codes.square().sum(1)
    mean = total / DRAWS
    variance = (squares / DRAWS - mean.square()).clamp(min=0)
    # Places of a code may be fully correlated, so that only norms over the whole code can be judged.
    off = (mean - expected).flatten(1).norm(dim=1)
    standard_error = (variance.flatten(1).sum(1) / DRAWS).sqrt()
    allowed = STANDARD_ERRORS * standard_error + bias * math.sqrt(case.latent.numel)
    worst = int((off - allowed).argmax())
    require(
        bool((off <= allowed).all()),
        f"expected_encoding(params, encoder) is the mean code of {DRAWS} samples, within {STANDARD_ERRORS:g} standard "
        f"errors and the bias allowed",
        f"a distance of {off[worst].item():.3g}, allowed {allowed[worst].item():.3g}",
        "average codes over p(x | params): for a categorical, sum p_k E(k), not the code of the most likely x",
    )
