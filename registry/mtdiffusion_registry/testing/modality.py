"""The contract of modalities."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from mtdiffusion.interfaces import Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion.loss import LossWeights, composite_loss
from mtdiffusion.model import LatentLayout, MultimodalDiffusion
from mtdiffusion.process import DiffusionProcess
from mtdiffusion.sampler import SamplerSettings, sample
from mtdiffusion.schedules import Retention, SNRMatched
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.errors import UserError, did_you_mean
from mtdiffusion_registry.testing import config as of_config
from mtdiffusion_registry.testing import contract
from mtdiffusion_registry.testing.contract import (
    BATCHES,
    ContractError,
    NotApplicable,
    Subject,
    check,
    close,
    contract_error,
    finite,
    finite_metrics,
    kind_of,
    require,
    require_directions,
    rms,
    same_dtype,
    same_shape,
    sizes,
)
from mtdiffusion_registry.testing.toys import EchoConfig, Perceptron, echo_of

__tracebackhide__ = True

CODE_RMS = (0.2, 5.0)
DRAWN = 16  # examples, if none are given
DRAWS = 1024  # of the Monte Carlo estimate of the expected encoding
STANDARD_ERRORS = 5.0  # by which that estimate may be off
SCORE_BIAS = 0.2  # of a mean gradient, as a share of one sample's: a sampler that clips or rounds needs some
RATIO_BIAS = 0.1  # of a mean ratio of densities, likewise
LIKELIHOOD_NUMBERS = 2**20  # drawn for each of a few params: fewer samples of large x
HEAD_STEPS = 200
MODEL_STEPS = 200
MODEL_EXAMPLES = 8
DIFFUSION_STEPS = 50
ECHO = "echo"


@frozen(eq=False)
class Case:
    """A modality built for one latent."""

    modality: Modality
    latent: LatentSpec
    spec: FeatureSpec

    def features(self, batch: int) -> Features:
        spec = self.spec
        return Features(torch.randn(batch, spec.channels, spec.height, spec.width), torch.randn(batch, spec.vector))

    def params(self, batch: int) -> Params:
        """Of a fresh head that was moved, since it may give the same params for everything, for which much that is
        wrong is right. Params are unconstrained by contract, so they can be moved."""
        params = self.modality.decoder(self.features(batch))
        return {
            name: value + 0.3 * torch.randn_like(value) if value.is_floating_point() else value
            for name, value in params.items()
        }


@frozen(eq=False, slots=False)
class ModalitySubject(Subject):
    """A modality's config and what it is checked with; see :func:`mtdiffusion_registry.testing.check_modality`."""

    config: ModalityConfig
    given: Tensor | None = None
    height: int = 8
    width: int = 8
    encoding_bias: float = 0.05
    source: Tensor | None = None

    @cached_property
    def cases(self) -> list[Case]:
        """The modality in every latent that it can fill; it must fill the first."""
        cases = []
        for i, (height, width) in enumerate(sizes(self.height, self.width)):
            try:
                latent = LatentSpec(self.config.latent_channels(height, width), height, width)
                spec = FeatureSpec(max(16, latent.channels), height, width, 32)
                modality = self.config.build(latent, spec)
            except (UserError, ValueError) as error:
                if i == 0:
                    raise contract_error(
                        "a modality can be built for the first latent",
                        f"{type(error).__name__}: {error}",
                        "choose a height and a width that it can fill",
                    ) from error
                continue
            _require_parts(modality, latent)
            cases.append(Case(modality.eval(), latent, spec))
        return cases

    @cached_property
    def examples(self) -> Tensor:
        """Those given, or derived from the source given, or samples of a fresh head: valid and varied, by contract."""
        if self.given is not None:
            return self.given.detach()
        case = self.cases[0]
        with torch.no_grad():
            if self.source is not None:
                return case.modality.derive(self.source)
            return case.modality.decoder.sample(case.params(DRAWN), torch.Generator().manual_seed(0))


def _require_parts(modality: object, latent: LatentSpec) -> None:
    parts = (modality.encoder, modality.decoder) if isinstance(modality, Modality) else None
    require(
        parts is not None and isinstance(parts[0], Encoder) and isinstance(parts[1], Decoder),
        "build returns a Modality of an Encoder and a Decoder",
        ", ".join(kind_of(part) for part in parts or (modality,)),
        "return a subclass of mtdiffusion.Modality, of an mtdiffusion.Encoder and an mtdiffusion.Decoder",
    )
    assert isinstance(modality, Modality)
    require(
        modality.encoder.latent == latent,
        "encoder.latent is the share of the diffusion space it was built for",
        f"{modality.encoder.latent}, built for {latent}",
        "pass latent to Encoder.__init__",
    )


def _accepts(modality: Modality, x: Tensor, what: str, fix: str) -> None:
    try:
        modality.check(x.detach())
    except ValueError as error:
        raise contract_error(f"check accepts {what}", str(error), fix) from error


@check("entry_point")
def build(subject: ModalitySubject) -> None:
    """build gives a Modality of an Encoder and a Decoder, for every latent that it accepts."""
    require(bool(subject.cases), "a modality can be built", "none was", "accept the first latent")


@check("build")
def derive(subject: ModalitySubject) -> None:
    """derive(source) is a batch of x, each of its own sample alone."""
    modality, source = subject.cases[0].modality, subject.source
    if not modality.derived:
        raise NotApplicable("x is not derived: derived is False")
    if source is None:
        raise NotApplicable("no source is given to derive x from; give the data set's field, source=[n, ...]")
    with torch.no_grad():
        x = modality.derive(source)
        require(
            isinstance(x, Tensor) and x.shape[:1] == source.shape[:1],
            "derive(source) has a row for each sample",
            f"shape {tuple(x.shape)}, {len(source)} samples" if isinstance(x, Tensor) else kind_of(x),
            "derive gets a batch of the field, and returns a batch of x",
        )
        fix = "use no statistics of the batch: data are derived some hundred samples at a time"
        close(modality.derive(source[:1]), x[:1], "what is derived does not depend on the other samples", fix)


@check("derive")
def examples(subject: ModalitySubject) -> None:
    """check accepts real data, or what a fresh head draws."""
    if subject.source is not None:
        what, fix = "what derive makes of the source", "return a valid x from derive: right shape and dtype, finite"
    elif subject.given is None:
        what, fix = "sample(params), drawn since no examples are given", "return a valid x: right dtype, within range"
    else:
        what, fix = "the examples", "make check accept real data, or give valid examples"
    for case in subject.cases:
        _accepts(case.modality, subject.examples, what, fix)


@check("examples")
def refusal(subject: ModalitySubject) -> None:
    """check refuses an axis too many and NaN by a ValueError."""
    x = subject.examples
    wrong = {"an axis too many": x.unsqueeze(-1)}
    if x.is_floating_point():
        spoilt = x.clone()
        spoilt.view(-1)[0] = math.nan
        wrong["a NaN"] = spoilt
    modality = subject.cases[0].modality
    for what, bad in wrong.items():
        refused = False
        try:
            modality.check(bad)
        except ValueError:
            refused = True
        except Exception as error:
            raise contract_error(
                f"check refuses x with {what} by a ValueError", f"{type(error).__name__}: {error}", "raise a ValueError"
            ) from error
        require(refused, f"check refuses x with {what}", "it passed", "compare shape, dtype and range in check")


_DTYPE = "give x one dtype everywhere: in the data, placeholder, mode and sample"


@check("examples")
def placeholder(subject: ModalitySubject) -> None:
    """placeholder(B) is a valid batch x, with a finite code."""
    shape = subject.examples.shape[1:]
    for case in subject.cases:
        for batch in BATCHES:
            blank = case.modality.placeholder(batch)
            same_shape(blank, (batch, *shape), "placeholder(B) has the shape of a batch x", "placeholder")
            same_dtype(blank, subject.examples.dtype, "placeholder(B) has the dtype of x", _DTYPE)
            _accepts(case.modality, blank, "placeholder(B)", "return a valid x")
            code = case.modality.encoder(blank)
            finite(code, "the code of a placeholder is finite", "it is encoded, then weighted with 0")


# --- encoders ---------------------------------------------------------------------------------------------------------


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
def code_scale(subject: ModalitySubject) -> None:
    """Codes have a root mean square of about 1."""
    for case in subject.cases:
        found = rms(case.modality.encoder(subject.examples))
        require(
            CODE_RMS[0] <= found <= CODE_RMS[1],
            f"codes have a root mean square of about 1 (from {CODE_RMS[0]} to {CODE_RMS[1]})",
            f"{found:.3g}",
            "scale the codes: modalities share one noise level",
        )


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


# --- decoders ---------------------------------------------------------------------------------------------------------


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
            same_dtype(found, subject.examples.dtype, "mode(params) has the dtype of x", _DTYPE)
            _accepts(case.modality, found, "mode(params)", "return a valid x: right dtype, within range")


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
            same_dtype(found, subject.examples.dtype, "sample(params) has the dtype of x", _DTYPE)
            _accepts(case.modality, found, "sample(params)", "return a valid x: right dtype, within range")
        _accepts(case.modality, decoder.sample(params), "sample(params) without a generator", "accept generator=None")


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


# --- for people -------------------------------------------------------------------------------------------------------


@check("examples")
def render(subject: ModalitySubject) -> None:
    """render(x) is pictures [B, 3, h, w] in [0, 1]."""
    for batch in BATCHES:
        picture = subject.cases[0].modality.render(subject.examples[:batch])
        require(
            picture.dim() == 4 and picture.shape[:2] == (batch, 3) and picture.is_floating_point(),
            "render(x) is floating point, [B, 3, h, w]",
            f"{picture.dtype} of shape {tuple(picture.shape)}",
            "repeat grey to three channels",
        )
        require(
            bool(((picture >= 0) & (picture <= 1)).all()),
            "render(x) is in [0, 1]",
            f"from {picture.min().item():.3g} to {picture.max().item():.3g}",
            "rescale and clip",
        )


@check("examples", "params")
def metrics(subject: ModalitySubject) -> None:
    """metrics and predictive_metrics are dicts of finite floats, of names that differ."""
    case = subject.cases[0]
    for batch in BATCHES:
        x = subject.examples[:batch]
        fix = "bound what is infinite for equal x, such as PSNR"
        of_samples = case.modality.metrics(x, x)
        finite_metrics(of_samples, "metrics of x and x", fix)
        with torch.no_grad():
            predictive = case.modality.predictive_metrics(case.params(batch), x)
        finite_metrics(predictive, "predictive_metrics", "compute with logits and log scales")
        both = sorted(of_samples.keys() & predictive.keys())
        require(not both, "metrics and predictive_metrics have different names", ", ".join(both), "rename one of them")


@check("metrics")
def directions(subject: ModalitySubject) -> None:
    """metric_directions says "higher" or "lower" of metrics that there are."""
    case, x = subject.cases[0], subject.examples
    stated = case.modality.metric_directions
    require_directions(stated)
    with torch.no_grad():
        names = {
            *case.modality.metrics(x, x),
            *case.modality.metrics(x.roll(1, 0), x),
            *case.modality.predictive_metrics(case.params(len(x)), x),
        }
    for name in stated:
        require(
            name in names,
            "metric_directions names metrics that there are",
            f'"{name}"{did_you_mean(name, sorted(names))} (reported: {", ".join(sorted(names)) or "none"})',
            "name it as metrics or predictive_metrics does: a metric without a direction is never ranked",
        )


@check("examples")
def files(subject: ModalitySubject) -> None:
    """parse reads what write wrote, and refuses what it cannot read by a ValueError."""
    modality, x = subject.cases[0].modality, subject.examples
    with tempfile.TemporaryDirectory() as folder:
        path = modality.write(x[0], Path(folder), "example")
        require(
            isinstance(path, Path) and path.is_file() and path.parent == Path(folder) and path.stem == "example",
            "write makes and returns folder/stem.<suffix>",
            repr(path),
            "write to folder / f'{stem}.<suffix>' and return it",
        )
        try:
            again = modality.parse(str(path))
        except (UserError, ValueError) as error:
            raise contract_error(
                "parse reads what write wrote", str(error), "let parse take the path of such a file"
            ) from error
    same_shape(again, x.shape[1:], "parse(path) gives what write wrote, without a batch axis", "parse")
    _accepts(modality, again[None], "what parse reads", "return a valid x from parse")
    try:
        _accepts(modality, modality.parse("no/such-file.?")[None], "what parse reads", "refuse it with a ValueError")
    except (UserError, ValueError):
        pass
    except ContractError:
        raise
    except Exception as error:
        raise contract_error(
            "parse refuses what it cannot read by a ValueError",
            f"{type(error).__name__}: {error}",
            "raise a ValueError",
        ) from error


# --- modules ----------------------------------------------------------------------------------------------------------


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
                raise NotApplicable(f"an operation has no {where} kernel: {str(error).splitlines()[0]}") from error
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


# --- learning ---------------------------------------------------------------------------------------------------------


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
    # scale), or reward the wrong x. That the code comes back cannot be had by chance.
    require(
        end < start and error <= error_before / 2,
        f"a head given a linear map of the code learns x: in {HEAD_STEPS} steps of Adam the objective falls and "
        "the error of the expected code halves",
        f"objective from {start:.3g} to {end:.3g}, error of the expected code from {error_before:.3g} to {error:.3g}",
        "check that the head reads features.map or features.vector, and that the objective rewards the right x",
    )


def _model(subject: ModalitySubject) -> MultimodalDiffusion:
    """A small model of the modality, called "x", and an echo of it."""
    case, echo = subject.cases[0], EchoConfig()
    height, width = case.latent.height, case.latent.width
    layout = LatentLayout.own({"x": case.latent.channels, ECHO: echo.latent_channels(height, width)}, height, width)
    parts = {
        "x": subject.config.build(layout.share("x"), case.spec),
        ECHO: echo.build(layout.share(ECHO), case.spec),
    }
    readouts = sum(part.encoder.readout_dim for part in parts.values())
    backbone = Perceptron(*MultimodalDiffusion.backbone_inputs(layout, readouts), case.spec)
    process = DiffusionProcess.build(Retention.from_curve("cosine", DIFFUSION_STEPS, 2), SNRMatched(), 2)
    return MultimodalDiffusion(parts, backbone, process, layout)


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
        generator=torch.Generator().manual_seed(0),
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
    latent = subject.cases[0].latent
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(
        [
            {"params": [weight for weight in model.modalities.parameters() if weight.requires_grad], "lr": 1e-2},
            {"params": list(model.backbone.parameters()), "lr": 3e-3},
        ]
    )
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, MODEL_STEPS)
    shown = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat_interleave(n, 0)  # nothing, x, the echo
    visible = shown[:, :, None, None].expand(-1, -1, latent.height, latent.width)
    thrice = {name: torch.cat([value] * 3) for name, value in batch.items()}
    for _ in range(MODEL_STEPS):
        loss = composite_loss(model, thrice, visible=visible, generator=generator).total.mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        decay.step()

    model.eval()
    with torch.no_grad():
        codes = model.encode(batch)
        t = torch.full((n,), DIFFUSION_STEPS // 10)
        z = model.process.corrupt(codes, t, torch.randn(codes[:, 0].shape, generator=generator))
        nothing = model.observe({}, codes.new_zeros(n, 2, latent.height, latent.width))
        settings = SamplerSettings(steps=10, solver="dpmpp_2m")
        given_echo = sample(model, n, observed={ECHO: batch[ECHO]}, settings=settings, generator=generator)
        given_x = sample(model, n, observed={"x": batch["x"]}, settings=settings, generator=generator)
        found = {
            "x from its own noisy code": (model(z, t, nothing).codes[:, 0], 0),
            "x from the other modality": (model.encode(given_echo)[:, 0], 0),
            "the other modality from x": (model.encode(given_x)[:, 1], 1),
        }
    for what, (code, i) in found.items():
        truth = codes[:, i]
        error, spread = rms(code - truth), rms(truth - truth.mean(0))
        require(
            error <= spread / 2,
            f"a small diffusion model of x and of a random projection of its code learns to recover {what}: after "
            f"{MODEL_STEPS} steps on {n} samples the error of the code is at most half of the codes' spread",
            f"an error of {error:.3g}, a spread of {spread:.3g}",
            "check loss_weight and snr_clamp, that codes of different x differ, and that mode and expected_encoding "
            "agree with the objective",
        )


CHECKS: tuple[contract.Check, ...] = (
    *of_config.CHECKS,
    build,
    derive,
    examples,
    refusal,
    placeholder,
    encode,
    code_scale,
    readout,
    observe,
    hidden,
    params,
    nll,
    likelihood,
    dims,
    objective,
    gradients,
    mode,
    draw,
    generator,
    expected_encoding,
    render,
    metrics,
    directions,
    files,
    state,
    dtype,
    device,
    head_learns,
    missing,
    learns,
)
