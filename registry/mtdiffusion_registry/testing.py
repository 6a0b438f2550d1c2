"""Does a plugin keep the contract? The checks to run in a plugin's own tests::

    from mtdiffusion_registry.testing import check_modality

    def test_contract() -> None:
        check_modality(MyConfig(), examples=my_batch)

Each check raises :class:`ContractError`, which says what the contract is, what was found and how to meet it. They run
on the CPU within seconds, leave the global random state as it was, and are repeatable.
"""

from __future__ import annotations

import math
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Literal

import attrs
import tomli_w
import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

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
from mtdiffusion_registry.config import structure, unstructure
from mtdiffusion_registry.configs import (
    BASES,
    BackboneConfig,
    Config,
    DatasetConfig,
    ModalityConfig,
    WeightScheduleConfig,
)
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.registry import PluginInfo, Registry

__all__ = [
    "ContractError",
    "check_backbone",
    "check_config",
    "check_dataset",
    "check_modality",
    "check_weight_schedule",
    "installed",
]

BATCHES = (1, 3)
CODE_RMS = (0.2, 5.0)
DRAWS = 1024  # of the Monte Carlo estimate of the expected encoding
STANDARD_ERRORS = 5.0  # by which that estimate may be off
TRAINING_STEPS = 200


class ContractError(AssertionError):
    """A part of the contract that is not kept."""


def installed(group: str) -> list[PluginInfo]:
    """The usable plugins of a group, to parametrize a test over what is installed; imports none of them."""
    return [info for info in Registry.discover().plugins() if info.group == group and info.status == "ok"]


def check_config(config: Config) -> None:
    """A config is an attrs-frozen instance of a registered base, and comes back from TOML as it was.

    Raises:
        ContractError: if not.
    """
    cls = type(config)
    base = BASES.get(getattr(cls, "group", ""))
    _require(
        base is not None and isinstance(config, base),
        "a config is an instance of one of the config bases",
        f"{cls.__qualname__}",
        f"subclass one of {', '.join(base.__name__ for base in BASES.values())}",
    )
    assert base is not None
    try:
        registry = Registry.discover().with_classes(cls)
    except UserError as error:
        raise _error("a config class can be registered", str(error), "mend what it says") from error
    frozen = False
    try:
        setattr(config, next((attribute.name for attribute in attrs.fields(cls)), "kind"), None)
    except attrs.exceptions.FrozenInstanceError:
        frozen = True
    _require(
        frozen, "a config is frozen", f"a field of {cls.__qualname__} can be set", "decorate it with @attrs.frozen"
    )
    try:
        again = structure(registry, tomllib.loads(tomli_w.dumps(unstructure(registry, config))), base)
    except (UserError, TypeError) as error:
        raise _error("a config comes back from TOML", str(error), "use field types that TOML can hold") from error
    _require(
        again == config,
        "a config comes back from TOML as it was",
        f"{again!r} from {config!r}",
        "compare fields by value, and let no field depend on another",
    )


# --- modalities -------------------------------------------------------------------------------------------------------


def check_modality(
    config: ModalityConfig,
    *,
    examples: Tensor,
    height: int = 8,
    width: int = 8,
    encoding_bias: float = 0.05,
) -> None:
    """A modality keeps the contract of :mod:`mtdiffusion.interfaces`, in latents of several sizes, and can be learned.

    Args:
        config: what builds it.
        examples: real, varied data x ``[n, ...]``, n >= 3 (8 to 32 is good); for a derived modality, what ``derive``
            returns.
        height: of the largest latent, which the modality must be able to fill. Smaller and narrower ones are tried too
            and skipped if building refuses them with a ``ValueError``.
        width: of that latent.
        encoding_bias: by how much of the codes' RMS ``expected_encoding`` may differ from the mean code of samples,
            beside the Monte Carlo error. A sampler that clips to the range of the data needs some.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    check_config(config)
    if len(examples) < max(BATCHES):
        raise ValueError(f"check_modality needs at least {max(BATCHES)} examples, found {len(examples)}")
    with _seeded():
        for i, (h, w) in enumerate(((height, width), (height // 2, width // 2), (height, width // 2))):
            try:
                latent = LatentSpec(config.latent_channels(h, w), h, w)
                features = FeatureSpec(max(16, latent.channels), h, w, 32)
                modality = config.build(latent, features)
            except (UserError, ValueError) as error:
                if i == 0:
                    raise _error(
                        "a modality can be built for the first latent",
                        f"{type(error).__name__}: {error}",
                        "choose a height and a width that it can fill",
                    ) from error
                continue
            _check_parts(modality, latent)
            case = _Case(config, modality.eval(), latent, features, examples.detach())
            for check in _CHECKS:
                check(case)
            _check_expected_encoding(case, encoding_bias)
            if i == 0:
                _check_learnable(case)


@frozen(eq=False)
class _Case:
    config: ModalityConfig
    modality: Modality
    latent: LatentSpec
    spec: FeatureSpec
    examples: Tensor

    def features(self, batch: int) -> Features:
        spec = self.spec
        return Features(torch.randn(batch, spec.channels, spec.height, spec.width), torch.randn(batch, spec.vector))


def _check_parts(modality: object, latent: LatentSpec) -> None:
    parts = (modality.encoder, modality.decoder) if isinstance(modality, Modality) else None
    _require(
        parts is not None and isinstance(parts[0], Encoder) and isinstance(parts[1], Decoder),
        "build returns a Modality of an Encoder and a Decoder",
        ", ".join(_kind_of(part) for part in parts or (modality,)),
        "subclass the classes of mtdiffusion.interfaces",
    )
    assert isinstance(modality, Modality)
    _require(
        modality.encoder.latent == latent,
        "encoder.latent is the share of the diffusion space it was built for",
        f"{modality.encoder.latent}, built for {latent}",
        "pass latent to Encoder.__init__",
    )


def _check_data(case: _Case) -> None:
    modality, x = case.modality, case.examples
    _accepts(modality, x, "the examples", "make check accept real data, or give valid examples")
    wrong = {"an axis too many": x.unsqueeze(-1)}
    if x.is_floating_point():
        spoilt = x.clone()
        spoilt.view(-1)[0] = math.nan
        wrong["a NaN"] = spoilt
    for what, bad in wrong.items():
        refused = False
        try:
            modality.check(bad)
        except ValueError:
            refused = True
        except Exception as error:
            raise _error(
                f"check refuses x with {what} by a ValueError", f"{type(error).__name__}: {error}", "raise a ValueError"
            ) from error
        _require(refused, f"check refuses x with {what}", "it passed", "compare shape, dtype and range in check")
    for batch in BATCHES:
        blank = modality.placeholder(batch)
        _same_shape(blank, (batch, *x.shape[1:]), "placeholder(B) has the shape of a batch x", "placeholder")
        _accepts(modality, blank, "placeholder(B)", "return a valid x")
        _finite(modality.encoder(blank), "the code of a placeholder is finite", "it is encoded, then weighted with 0")


def _check_encoder(case: _Case) -> None:
    encoder, latent = case.modality.encoder, case.latent
    for batch in BATCHES:
        e = encoder(case.examples[:batch])
        _same_shape(e, (batch, *latent.shape), "encoder(x) fills its share of the latent, [B, c, H, W]", "the encoder")
        _require(e.is_floating_point(), "codes are floating point", f"{e.dtype}", "return floating-point codes")
        _finite(e, "codes are finite", "look for divisions and logarithms in the encoder")
    alone = encoder(case.examples[:1])
    _close(
        alone,
        encoder(case.examples)[:1],
        "the code of a sample does not depend on its batch",
        "in eval mode, use no statistics of the batch",
    )
    rms = _rms(encoder(case.examples))
    _require(
        CODE_RMS[0] <= rms <= CODE_RMS[1],
        f"codes have a root mean square of about 1 (from {CODE_RMS[0]} to {CODE_RMS[1]})",
        f"{rms:.3g}",
        "scale the codes: modalities share one noise level",
    )
    z = torch.randn(3, *latent.shape)
    _same_shape(
        encoder.readout(z), (3, encoder.readout_dim), "readout(z) is [B, readout_dim]", "readout or readout_dim"
    )


def _check_observe(case: _Case) -> None:
    encoder, latent, x = case.modality.encoder, case.latent, case.examples
    every = torch.ones(len(x), 1, latent.height, latent.width)
    e = encoder(x)
    _close(encoder.observe(x, every), e, "observe(x, 1) is encoder(x)", "multiply with visible, and no more")
    nothing = encoder.observe(x, torch.zeros_like(every))
    _same_shape(nothing, e.shape, "observe(x, visible) has the shape of the code", "observe")
    _require(
        not nothing.count_nonzero().item(),
        "observe(x, 0) is zero",
        f"values up to {nothing.abs().max().item():.3g}",
        "multiply the code with visible last",
    )
    if not encoder.spatial:
        return
    _require(
        x.dim() >= 3,
        "x of a spatial encoder ends with its height and width",
        f"x of shape {tuple(x.shape)}",
        "set spatial = False",
    )
    visible = (torch.rand(len(x), 1, latent.height, latent.width) < 0.5).float()
    seen = encoder.observe(x, visible)
    _require(
        not (seen * (1 - visible)).count_nonzero().item(),
        "observe(x, visible) is zero where visible is 0",
        "values other than 0",
        "multiply the code with visible last",
    )
    # A pixel is hidden if every place of the latent that it touches is; adaptive pooling has just these windows.
    shown = F.adaptive_max_pool2d(visible, x.shape[-2:]).bool()
    shown = shown.view(len(x), *(1,) * (x.dim() - 3), *x.shape[-2:])
    changed = torch.where(shown, x, x.roll(1, 0))
    leak = (encoder.observe(changed, visible) - seen).abs().max().item()
    _require(
        leak <= 1e-6,
        "observe(x, visible) does not depend on what is hidden of x",
        f"it changes by up to {leak:.3g} when hidden pixels do",
        "override observe: hide before encoding, or use patches that do not overlap",
    )


def _check_decoder(case: _Case) -> None:
    decoder, x = case.modality.decoder, case.examples
    for batch in BATCHES:
        params = decoder(case.features(batch))
        _check_params(params, batch)
        for name, value in (
            ("nll", decoder.nll(params, x[:batch])),
            ("objective", decoder.objective(params, x[:batch])),
        ):
            _same_shape(
                value, (batch,), f"{name} is one number a sample, [B]", f"sum over all axes but the first in {name}"
            )
            _finite(value, f"{name} is finite", "compute with logits and log scales")
        mode, e = decoder.mode(params), decoder.expected_encoding(params, case.modality.encoder)
        _same_shape(mode, x[:batch].shape, "mode(params) has the shape of x", "mode")
        _accepts(case.modality, mode, "mode(params)", "return a valid x: right dtype, within range")
        _same_shape(e, (batch, *case.latent.shape), "expected_encoding is [B, c, H, W]", "expected_encoding")
        _finite(e, "expected_encoding is finite", "look for divisions and logarithms in it")

    weights = [weight for weight in decoder.parameters() if weight.requires_grad]
    torch.autograd.backward(decoder.objective(decoder(case.features(3)), x[:3]).sum())
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    decoder.zero_grad(set_to_none=True)
    case.modality.zero_grad(set_to_none=True)
    _require(
        any(gradient.count_nonzero().item() for gradient in gradients),
        "the objective has gradients to the decoder's parameters",
        f"none but zeros, for {len(weights)} trainable parameters",
        "detach nothing between the parameters and the objective",
    )
    for gradient in gradients:
        _finite(gradient, "gradients of the objective are finite", "compute with logits and log scales")


def _check_params(params: object, batch: int) -> None:
    _require(
        isinstance(params, Mapping) and bool(params) and all(isinstance(value, Tensor) for value in params.values()),
        "decoder(features) is a dict of tensors",
        _kind_of(params),
        "return a dict with a tensor for each parameter of the distribution",
    )
    assert isinstance(params, Mapping)
    for name, value in params.items():
        contract = "parameters have the batch first"
        fix = "expand what is shared by the batch"
        _require(value.shape[:1] == (batch,), contract, f"{name} of shape {tuple(value.shape)}, batch {batch}", fix)
        _finite(value, f"parameters are finite ({name})", "look for divisions and logarithms in the head")


def _check_sample(case: _Case) -> None:
    decoder = case.modality.decoder
    params = decoder(case.features(3))

    def draw() -> Tensor:
        return decoder.sample(params, torch.Generator().manual_seed(1))

    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)  # what is drawn from the global generator would now differ
    second = draw()
    _same_shape(first, case.examples[:3].shape, "sample(params) has the shape of x", "sample")
    _accepts(case.modality, first, "sample(params)", "return a valid x: right dtype, within range")
    _require(
        torch.equal(first, second),
        "the same generator state gives the same sample",
        "two samples that differ",
        "pass generator= to every random function in sample",
    )
    _accepts(case.modality, decoder.sample(params), "sample(params) without a generator", "accept generator=None")


def _check_person(case: _Case) -> None:
    modality, x = case.modality, case.examples
    picture = modality.render(x)
    _require(
        picture.dim() == 4 and picture.shape[:2] == (len(x), 3) and picture.is_floating_point(),
        "render(x) is floating point, [B, 3, h, w]",
        f"{picture.dtype} of shape {tuple(picture.shape)}",
        "repeat grey to three channels",
    )
    _require(
        bool(((picture >= 0) & (picture <= 1)).all()),
        "render(x) is in [0, 1]",
        f"from {picture.min().item():.3g} to {picture.max().item():.3g}",
        "rescale and clip",
    )
    metrics = modality.metrics(x, x)
    _require(
        isinstance(metrics, dict) and all(isinstance(value, float) for value in metrics.values()),
        "metrics are a dict of floats",
        repr(metrics),
        "convert tensors with .item()",
    )
    _require(
        all(math.isfinite(value) for value in metrics.values()),
        "metrics of x and x are finite",
        repr(metrics),
        "bound what is infinite for equal x, such as PSNR",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = modality.write(x[0], Path(folder), "example")
        _require(
            isinstance(path, Path) and path.is_file() and path.parent == Path(folder) and path.stem == "example",
            "write makes and returns folder/stem.<suffix>",
            repr(path),
            "write to folder / f'{stem}.<suffix>' and return it",
        )
        try:
            again = modality.parse(str(path))
        except (UserError, ValueError) as error:
            raise _error(
                "parse reads what write wrote", str(error), "let parse take the path of such a file"
            ) from error
    _same_shape(again, x.shape[1:], "parse(path) gives what write wrote, without a batch axis", "parse")
    _accepts(modality, again[None], "what parse reads", "return a valid x from parse")
    try:
        _accepts(modality, modality.parse("no/such-file.?")[None], "what parse reads", "refuse it with a ValueError")
    except (UserError, ValueError):
        pass
    except ContractError:
        raise
    except Exception as error:
        raise _error(
            "parse refuses what it cannot read by a ValueError",
            f"{type(error).__name__}: {error}",
            "raise a ValueError",
        ) from error


def _check_copies(case: _Case) -> None:
    x, features = case.examples[:3], case.features(3)

    def outputs(modality: Modality) -> dict[str, Tensor]:
        return {"the code": modality.encoder(x), **modality.decoder(features)}

    expected = outputs(case.modality)
    loaded = case.config.build(case.latent, case.spec).eval()
    loaded.load_state_dict(case.modality.state_dict())
    for how, copy in (("a copy", deepcopy(case.modality)), ("one built anew from the same state_dict", loaded)):
        for name, value in outputs(copy).items():
            fix = "keep all state in parameters and buffers (register_buffer), none of it drawn anew"
            _close(value, expected[name], f"{how} gives the same outputs ({name})", fix)
    double = deepcopy(case.modality).double()
    e = double.encoder(x.double() if x.is_floating_point() else x)
    params = double.decoder(Features(features.map.double(), features.vector.double()))
    for name, value in {"the code": e, **params}.items():
        _require(
            not value.is_floating_point() or value.dtype == torch.float64,
            f"modality.double() computes in float64 ({name})",
            f"{value.dtype}",
            "take dtypes from parameters and buffers, or from the input",
        )


_CHECKS: tuple[Callable[[_Case], None], ...] = (
    _check_data,
    _check_encoder,
    _check_observe,
    _check_decoder,
    _check_sample,
    _check_person,
    _check_copies,
)


@torch.no_grad()
def _check_expected_encoding(case: _Case, bias: float) -> None:
    encoder, decoder = case.modality.encoder, case.modality.decoder
    batch = max(BATCHES)
    # A fresh head may give the same params for everything, for which much that is wrong is right. Params are
    # unconstrained by contract, so they can be moved.
    params: Params = {
        name: value + 0.3 * torch.randn_like(value) if value.is_floating_point() else value
        for name, value in decoder(case.features(batch)).items()
    }
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
    allowed = STANDARD_ERRORS * standard_error + bias * _rms(encoder(case.examples)) * math.sqrt(case.latent.numel)
    worst = int((off - allowed).argmax())
    _require(
        bool((off <= allowed).all()),
        f"expected_encoding(params, encoder) is the mean code of {DRAWS} samples, within {STANDARD_ERRORS:g} standard "
        f"errors and {bias:g} of the codes' RMS",
        f"a distance of {off[worst].item():.3g}, allowed {allowed[worst].item():.3g}",
        "average codes over p(x | params): for a categorical, sum p_k E(k), not the code of the most likely x",
    )


def _check_learnable(case: _Case) -> None:
    modality, x = deepcopy(case.modality).train(), case.examples
    encoder, decoder = modality.encoder, modality.decoder
    with torch.no_grad():
        e = case.modality.encoder(x)
        channels, spec = e.shape[1], case.spec
        to_map = torch.randn(spec.channels, channels) / math.sqrt(channels)
        to_vector = torch.randn(spec.vector, e[0].numel()) / math.sqrt(e[0].numel())
        features = Features(torch.einsum("fc,bchw->bfhw", to_map, e), e.flatten(1) @ to_vector.T)

    def code_error() -> float:
        with torch.no_grad():
            return _rms(decoder.expected_encoding(decoder(features), encoder) - e)

    optimizer = torch.optim.Adam([weight for weight in decoder.parameters() if weight.requires_grad], lr=1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, TRAINING_STEPS)
    losses, error_before = [], code_error()
    for _ in range(TRAINING_STEPS):
        loss = decoder.objective(decoder(features), x).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    start, end, error = losses[0], losses[-1], code_error()
    # How far the objective falls would prove nothing: it may be negative, or have a floor (a likelihood of fixed
    # scale), or reward the wrong x. That the code comes back cannot be had by chance.
    _require(
        end < start and error <= error_before / 2,
        f"a head given a linear map of the code learns x: in {TRAINING_STEPS} steps of Adam the objective falls and "
        "the error of the expected code halves",
        f"objective from {start:.3g} to {end:.3g}, error of the expected code from {error_before:.3g} to {error:.3g}",
        "check that the head reads features.map or features.vector, and that the objective rewards the right x",
    )


# --- backbones --------------------------------------------------------------------------------------------------------


def check_backbone(config: BackboneConfig, *, height: int = 8, width: int = 8) -> None:
    """A backbone keeps the contract of :mod:`mtdiffusion.interfaces`, at several sizes, and uses all its inputs.

    Args:
        config: what builds it.
        height: of the largest latent, which the backbone must be able to work at. Smaller and narrower ones are tried
            too and skipped if building refuses them with a ``ValueError``.
        width: of that latent.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    check_config(config)
    channels, vector = 5, 7
    with _seeded():
        for i, (h, w) in enumerate(((height, width), (height // 2, width // 2), (height, width // 2))):
            try:
                backbone = config.build(channels, h, w, vector)
            except (UserError, ValueError) as error:
                if i == 0:
                    raise _error(
                        "a backbone can be built for the first latent",
                        f"{type(error).__name__}: {error}",
                        "choose a height and a width that it can work at",
                    ) from error
                continue
            _require(
                isinstance(backbone, Backbone),
                "build returns a Backbone",
                _kind_of(backbone),
                "subclass mtdiffusion.interfaces.Backbone",
            )
            inputs = (torch.randn(3, channels, h, w), torch.tensor([0.0, 0.5, 1.0]), torch.randn(3, vector))
            _check_backbone_outputs(backbone.eval(), inputs)
            if i == 0:
                _check_backbone_state(config, backbone, inputs, (channels, h, w, vector))
                _check_backbone_trains(backbone.train(), inputs)


Inputs = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def _check_backbone_outputs(backbone: Backbone, inputs: Inputs) -> None:
    spec, size = backbone.features, tuple(inputs[0].shape[2:])
    _require(
        (spec.height, spec.width) == size,
        "the feature map is aligned with the latent",
        f"backbone.features of {spec.height}x{spec.width}, latent of {size[0]}x{size[1]}",
        "return to the resolution of the input",
    )
    for batch in BATCHES:
        h = backbone(*(value[:batch] for value in inputs))
        _same_shape(h.map, (batch, spec.channels, *size), "features.map is as backbone.features says", "forward")
        _same_shape(h.vector, (batch, spec.vector), "features.vector is as backbone.features says", "forward")
        _finite(h.map, "features are finite", "noise levels 0 and 1 occur: take no logarithm of them")
        _finite(h.vector, "features are finite", "noise levels 0 and 1 occur: take no logarithm of them")
    alone, together = backbone(*(value[:1] for value in inputs)), backbone(*inputs)
    fix = "normalise over channels or groups, not over the batch"
    _close(alone.map, together.map[:1], "the features of a sample do not depend on its batch", fix)
    _close(alone.vector, together.vector[:1], "the features of a sample do not depend on its batch", fix)


@torch.no_grad()
def _check_backbone_state(
    config: BackboneConfig, backbone: Backbone, inputs: Inputs, sizes: tuple[int, int, int, int]
) -> None:
    loaded = config.build(*sizes).eval()
    loaded.load_state_dict(backbone.state_dict())
    expected = backbone(*inputs)
    for how, copy in (("a copy", deepcopy(backbone)), ("one built anew from the same state_dict", loaded)):
        h = copy(*inputs)
        fix = "keep all state in parameters and buffers (register_buffer), none of it drawn anew"
        _close(h.map, expected.map, f"{how} gives the same features", fix)
        _close(h.vector, expected.vector, f"{how} gives the same features", fix)
    h = deepcopy(backbone).double()(*(value.double() for value in inputs))
    _require(
        h.map.dtype == h.vector.dtype == torch.float64,
        "backbone.double() computes in float64",
        f"{h.map.dtype}, {h.vector.dtype}",
        "take dtypes from parameters and buffers, or from the input",
    )


def _check_backbone_trains(backbone: Backbone, inputs: Inputs) -> None:
    """Fits random features, since a fresh backbone whose last layer starts at zero ignores its inputs."""
    shape = backbone(*inputs)
    target = Features(torch.randn_like(shape.map), torch.randn_like(shape.vector))
    optimizer = torch.optim.Adam(backbone.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        h = backbone(*inputs)
        loss = F.mse_loss(h.map, target.map) + F.mse_loss(h.vector, target.vector)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if step == 0:
            unused = [
                name for name, weight in backbone.named_parameters() if weight.requires_grad and weight.grad is None
            ]
            contract = "every parameter has a gradient (distributed training needs it)"
            _require(not unused, contract, f"none for {', '.join(unused)}", "remove what forward does not use")
        optimizer.step()
        losses.append(loss.item())
    _require(
        losses[-1] < 0.9 * losses[0],
        "features can be fitted: 40 steps of Adam lower the squared error by a tenth",
        f"from {losses[0]:.3g} to {losses[-1]:.3g}",
        "check initialisation and normalisation",
    )
    backbone.eval()
    with torch.no_grad():
        before = backbone(*inputs)
        for i, name in enumerate(("z", "noise", "vector")):
            moved = [value.roll(1, 0) if j == i else value for j, value in enumerate(inputs)]
            after = backbone(*moved)
            for part, a, b in (("map", after.map, before.map), ("vector", after.vector, before.vector)):
                _require(
                    not torch.allclose(a, b, atol=1e-6),
                    "the features depend on all inputs",
                    f"after 40 training steps features.{part} does not depend on {name}",
                    f"feed {name} to what computes features.{part}",
                )


# --- weight schedules -------------------------------------------------------------------------------------------------


def check_weight_schedule(config: WeightScheduleConfig, *, names: Sequence[str] = ("a", "b")) -> None:
    """A weight schedule gives finite signal coefficients for every retention.

    Args:
        config: what builds it.
        names: the modality instances it is configured for.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    from mtdiffusion.schedules import RETENTIONS, Retention

    check_config(config)
    schedule = config.build(names)
    _require(
        isinstance(schedule, WeightSchedule),
        "build returns a WeightSchedule",
        _kind_of(schedule),
        "subclass mtdiffusion.interfaces.WeightSchedule",
    )
    for kind in RETENTIONS:
        for steps in (2, 50):
            retention = Retention.from_curve(curve="cosine", steps=steps, modalities=len(names), kind=kind)
            m = schedule.signal(retention, len(names))
            where = f"({kind}, {steps} steps)"
            _same_shape(m, (steps + 1, len(names)), f"signal is [T + 1, N] {where}", "one row a time, t = 0 first")
            contract = f"signal is float64 {where}"
            _require(m.dtype == torch.float64, contract, f"{m.dtype}", "compute schedules in float64")
            _finite(m, f"signal is finite {where}", "the SNR is infinite at t = 0: work with logarithms or with m")
            again = config.build(names).signal(retention, len(names))
            _require(torch.equal(m, again), f"signal is deterministic {where}", "two that differ", "draw nothing")


# --- data sets --------------------------------------------------------------------------------------------------------


def check_dataset(config: DatasetConfig) -> None:
    """A data set has a training and a test split, is the same every time and keeps the conventions for fields.

    Raises:
        ContractError: at the first part of the contract that is not kept.
    """
    check_config(config)
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    with _seeded():
        for split in splits:
            first, second = config.build(split), config.build(split)
            _require(
                isinstance(first, Dataset),
                f'build("{split}") returns a Dataset',
                _kind_of(first),
                "subclass mtdiffusion.interfaces.Dataset",
            )
            fix = "read the data in build"
            _require(len(first) > 0, f'the split "{split}" has samples', f"{len(first)}", fix)
            contract = f'build("{split}") is the same every time'
            _require(len(first) == len(second), contract, f"{len(first)} and {len(second)} samples", "fix the seed")
            for index in sorted({0, len(first) // 2, len(first) - 1}):
                torch.manual_seed(index)
                sample = first[index]
                torch.manual_seed(index + 1)  # what is drawn from the global generator would now differ
                _check_sample_fields(sample, f'"{split}"[{index}]')
                for how, other in (("", first[index]), (" of a second build", second[index])):
                    _require(
                        _equal_samples(sample, other),
                        "a sample is the same every time",
                        f'"{split}"[{index}]{how} differs',
                        "draw nothing in __getitem__; seed what build draws",
                    )


def _check_sample_fields(sample: object, where: str) -> None:
    _require(
        isinstance(sample, dict) and bool(sample) and all(isinstance(name, str) for name in sample),
        "a sample is a dict of fields",
        f"{where} is {_kind_of(sample)}",
        "return {field name: value}",
    )
    assert isinstance(sample, dict)
    for name, value in sample.items():
        what = f"{where}[{name!r}]"
        problem = _field_problem(name, value)
        _require(
            problem is None,
            "a field is a string or a finite tensor of float32 or int64; and by its name, an image is float32 "
            "[channels, h, w] in [-1, 1], a mask int64 [h, w] >= 0, a label int64 [] >= 0, an embedding float32 [D] of "
            "unit norm",
            f"{what} is {problem}",
            "convert it in __getitem__, or give a field of another sort another name",
        )


def _field_problem(name: str, value: object) -> str | None:
    """What is wrong with a field, if anything. Only names with a convention bind a shape."""
    if isinstance(value, str):
        return None
    if not isinstance(value, Tensor):
        return _kind_of(value)
    what = f"{value.dtype} of shape {tuple(value.shape)}"
    if value.dtype not in (torch.float32, torch.int64):
        return what
    if not torch.isfinite(value).all():
        return f"{what} with values that are not finite"
    if name in _CONVENTIONS and (value.dtype, value.dim()) != _CONVENTIONS[name]:
        return what
    if name == "image" and value.abs().max().item() > 1 + 1e-6:
        return f"{what} from {value.min().item():.3g} to {value.max().item():.3g}"
    if name in ("mask", "label") and value.min().item() < 0:
        return f"{what} with {value.min().item()}"
    if name == "embedding" and abs(value.norm().item() - 1) > 1e-3:
        return f"{what} of norm {value.norm().item():.3g}"
    return None


_CONVENTIONS = {
    "image": (torch.float32, 3),
    "mask": (torch.int64, 2),
    "label": (torch.int64, 0),
    "embedding": (torch.float32, 1),
}


def _equal_samples(a: Mapping[str, Tensor | str], b: Mapping[str, Tensor | str]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, y)
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else x is y or (type(x) is type(y) and x == y)
        for x, y in ((a[name], b[name]) for name in a)
    )


# --- what checks are made of ------------------------------------------------------------------------------------------


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _error(contract: str, found: str, fix: str) -> ContractError:
    return ContractError(f"{contract}.\n  found: {found}\n  to meet it: {fix}")


def _require(kept: bool, contract: str, found: str, fix: str) -> None:
    if not kept:
        raise _error(contract, found, fix)


def _kind_of(value: object) -> str:
    return f"a {type(value).__qualname__}"


def _rms(value: Tensor) -> float:
    return value.detach().double().square().mean().sqrt().item()


def _same_shape(value: object, shape: Sequence[int], contract: str, fix: str) -> None:
    found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else _kind_of(value)
    kept = isinstance(value, Tensor) and tuple(value.shape) == tuple(shape)
    _require(kept, contract, f"{found}, expected {tuple(shape)}", f"mend {fix}" if " " not in fix else fix)


def _finite(value: Tensor, contract: str, fix: str) -> None:
    bad = int((~torch.isfinite(value)).sum())
    _require(bad == 0, contract, f"{bad} of {value.numel()} values are not", fix)


def _close(value: Tensor, expected: Tensor, contract: str, fix: str) -> None:
    _same_shape(value, expected.shape, contract, fix)
    off = (value - expected).abs().max().item()
    allowed = 1e-4 * max(1.0, expected.abs().max().item())
    _require(off <= allowed, contract, f"they differ by up to {off:.3g}, allowed {allowed:.1g}", fix)


def _accepts(modality: Modality, x: Tensor, what: str, fix: str) -> None:
    try:
        modality.check(x.detach())
    except ValueError as error:
        raise _error(f"check accepts {what}", str(error), fix) from error
