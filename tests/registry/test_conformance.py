"""The conformance kit passes what is right and catches what is wrong.

Each broken part differs from a right one in one place, and one check alone fails for it: the tables say which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from attrs import define, evolve, field, frozen
from fake_distributions import PLUGIN, Install
from torch import Tensor, nn

from mtdiffusion.clocks import OffsetClocks
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
from mtdiffusion.retention import Retention
from mtdiffusion_registry import (
    BackboneConfig,
    ClockLawConfig,
    Config,
    DatasetConfig,
    Evaluator,
    EvaluatorConfig,
    MethodConfig,
    ModalityConfig,
    Query,
    TaskConfig,
    UserError,
    WeightScheduleConfig,
)
from mtdiffusion_registry.testing import (
    ContractError,
    check_backbone,
    check_clock_law,
    check_config,
    check_dataset,
    check_evaluator,
    check_method,
    check_modality,
    check_task,
    check_weight_schedule,
    conformance,
    installed,
)
from mtdiffusion_registry.testing.toys import EchoConfig


def failed(plugin: str | Config, **options: Any) -> list[str]:
    """The ids of the checks that fail."""
    outcomes = list(conformance(plugin, **options).contract().outcomes())
    for outcome in outcomes:
        if isinstance(outcome.error, ContractError):
            assert "\n  found: " in outcome.reason
            assert "\n  to meet it: " in outcome.reason
    return [outcome.check.id for outcome in outcomes if outcome.status == "failed"]


# --- a spatial modality: grey pictures [B, 1, 8, 8], cut into patches -----------------------------------------------

SIZE = 8


def cut(x: Tensor, latent: LatentSpec) -> Tensor:
    h, w = latent.height, latent.width
    return x.view(-1, h, SIZE // h, w, SIZE // w).permute(0, 2, 4, 1, 3).reshape(-1, *latent.shape)


def join(e: Tensor, latent: LatentSpec) -> Tensor:
    h, w = latent.height, latent.width
    return e.view(-1, SIZE // h, SIZE // w, h, w).permute(0, 3, 1, 4, 2).reshape(-1, 1, SIZE, SIZE)


class PatchEncoder(Encoder):
    spatial = True

    def forward(self, x: Tensor) -> Tensor:
        return cut(x, self.latent)


class GaussianHead(Decoder):
    def __init__(self, latent: LatentSpec, features: FeatureSpec) -> None:
        super().__init__()
        self.dims = SIZE * SIZE
        self.latent = latent
        self.head = nn.Conv2d(features.channels, 2 * latent.channels, 1)

    def forward(self, features: Features) -> Params:
        mean, log_scale = self.head(features.map).chunk(2, 1)
        return {"mean": join(mean, self.latent), "log_scale": join(log_scale, self.latent)}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        z = (x - params["mean"]) * torch.exp(-params["log_scale"])
        return (z.square() / 2 + params["log_scale"] + math.log(2 * math.pi) / 2).flatten(1).sum(1)

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(params["mean"])

    def mode(self, params: Params) -> Tensor:
        return params["mean"]

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty_like(params["mean"]).normal_(generator=generator)
        return params["mean"] + noise * params["log_scale"].exp()


class Picture(Modality):
    def check(self, x: Tensor) -> None:
        if x.shape[1:] != (1, SIZE, SIZE) or not torch.isfinite(x).all():
            raise ValueError(f"expected finite [B, 1, {SIZE}, {SIZE}], found {tuple(x.shape)}")

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1, SIZE, SIZE)

    def render(self, x: Tensor) -> Tensor:
        return x.sigmoid().expand(-1, 3, -1, -1)

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        return {"mse": (generated - truth).square().mean().item()}

    def parse(self, text: str) -> Tensor:
        try:
            return torch.load(text)
        except OSError as error:
            raise ValueError(f"expected a .pt file, found {text}") from error

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        torch.save(x, folder / f"{stem}.pt")
        return folder / f"{stem}.pt"


@frozen
class PictureConfig(ModalityConfig):
    kind: ClassVar[str] = "test_picture"
    encoder: ClassVar[type[Encoder]] = PatchEncoder
    decoder: ClassVar[Any] = GaussianHead
    modality: ClassVar[type[Modality]] = Picture
    scale: float = 1.0

    def latent_channels(self, height: int, width: int) -> int:
        if SIZE % height or SIZE % width:
            raise ValueError(f"the latent must divide {SIZE}")
        return SIZE * SIZE // (height * width)

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        return self.modality(self.encoder(latent), self.decoder(latent, features))


# --- a modality that is not spatial: labels, codes over the whole latent ----------------------------------------------

CLASSES = 5


class Codebook(Encoder):
    readout_dim = CLASSES
    codes: Tensor

    def __init__(self, latent: LatentSpec) -> None:
        super().__init__(latent)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randn(CLASSES, *latent.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.codes[x]

    def readout(self, z: Tensor) -> Tensor:
        return z.flatten(1) @ self.codes.flatten(1).T


class CategoricalHead(Decoder):
    def __init__(self, latent: LatentSpec, features: FeatureSpec) -> None:
        super().__init__()
        self.head = nn.Linear(features.vector, CLASSES)

    def forward(self, features: Features) -> Params:
        return {"logits": self.head(features.vector)}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(params["logits"], x, reduction="none")

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        codes = encoder(torch.arange(CLASSES))
        return torch.einsum("bk,kchw->bchw", params["logits"].softmax(1).to(codes.dtype), codes)

    def mode(self, params: Params) -> Tensor:
        return params["logits"].argmax(1)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        return params["logits"].softmax(1).multinomial(1, generator=generator)[:, 0]


class Label(Modality):
    def check(self, x: Tensor) -> None:
        if x.dim() != 1 or x.dtype != torch.int64 or x.min() < 0 or x.max() >= CLASSES:
            raise ValueError(f"expected classes [B], found {tuple(x.shape)}")

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, dtype=torch.int64)

    def render(self, x: Tensor) -> Tensor:
        return (x.float() / CLASSES).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        return {"accuracy": (generated == truth).float().mean().item()}

    def parse(self, text: str) -> Tensor:
        path = Path(text)
        return torch.tensor(int(path.read_text() if path.is_file() else text))

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        path = folder / f"{stem}.txt"
        path.write_text(str(x.item()))
        return path


@frozen
class LabelConfig(PictureConfig):
    kind: ClassVar[str] = "test_label"
    encoder: ClassVar[type[Encoder]] = Codebook
    decoder: ClassVar[Any] = CategoricalHead
    modality: ClassVar[type[Modality]] = Label

    def latent_channels(self, height: int, width: int) -> int:
        return 2


PICTURES = torch.randn(8, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % CLASSES


def test_correct_modalities_pass_and_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    check_modality(PictureConfig(), examples=PICTURES)
    check_modality(LabelConfig(), height=6, width=10)  # examples are drawn
    check_modality(EchoConfig(), height=4, width=4)  # the kit's own modality
    assert torch.equal(torch.get_rng_state(), before)


# --- broken encoders --------------------------------------------------------------------------------------------------


class ShapeLost(PatchEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2)


class TooQuiet(PatchEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.01


class OverBatch(PatchEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class SeesThroughHoles(PatchEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return cut(x + x.roll(1, -1), self.latent)


class HidesNothing(PatchEncoder):
    def observe(self, x: Tensor, visible: Tensor) -> Tensor:
        return self(x)


class HidesHalf(PatchEncoder):
    def observe(self, x: Tensor, visible: Tensor) -> Tensor:
        return self(x) * (visible.amax((1, 2, 3), keepdim=True))


class ReadoutTooWide(PatchEncoder):
    def readout(self, z: Tensor) -> Tensor:
        return z.flatten(1)


class SingleOnly(PatchEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class IntegerCodes(PatchEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).long()


# --- broken decoders --------------------------------------------------------------------------------------------------


class MeanOverBatch(GaussianHead):
    def nll(self, params: Params, x: Tensor) -> Tensor:
        return super().nll(params, x).mean()


class Overflows(GaussianHead):
    def nll(self, params: Params, x: Tensor) -> Tensor:
        return super().nll(params, x) + torch.exp(params["mean"].flatten(1).sum(1) * 0 + 1000)


class SqueezesBatch(GaussianHead):
    def nll(self, params: Params, x: Tensor) -> Tensor:
        return super().nll(params, x).squeeze()


class ObjectiveOverBatch(GaussianHead):
    def objective(self, params: Params, x: Tensor) -> Tensor:
        return super().objective(params, x).mean()


class NanWhereBlank(GaussianHead):
    def objective(self, params: Params, x: Tensor) -> Tensor:
        norm = x.flatten(1).norm(dim=1)
        return super().objective(params, x) * norm / norm


class ConstantOnCpu(GaussianHead):
    def forward(self, features: Features) -> Params:
        return {name: value * torch.ones(SIZE) for name, value in super().forward(features).items()}


class ModeOutOfRange(CategoricalHead):
    def mode(self, params: Params) -> Tensor:
        return super().mode(params) + CLASSES


class ModeOfFloats(CategoricalHead):
    def mode(self, params: Params) -> Tensor:
        return super().mode(params).float()


class Detached(GaussianHead):
    def forward(self, features: Features) -> Params:
        return {name: value.detach().requires_grad_() for name, value in super().forward(features).items()}


class NoBatch(GaussianHead):
    def forward(self, features: Features) -> Params:
        return {**super().forward(features), "scale": torch.ones(1)}


class CodeOfMode(CategoricalHead):
    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(self.mode(params))


class GlobalNoise(GaussianHead):
    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        return super().sample(params)


class SampleInvalid(GaussianHead):
    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        return super().sample(params, generator) / 0


class Inverted(CategoricalHead):
    def objective(self, params: Params, x: Tensor) -> Tensor:
        return -self.nll(params, x).clamp(max=8)


class Blind(GaussianHead):
    def forward(self, features: Features) -> Params:
        return super().forward(Features(features.map * 0, features.vector))


# --- broken modalities ------------------------------------------------------------------------------------------------


class Gullible(Picture):
    def check(self, x: Tensor) -> None:
        if x.shape[1:] != (1, SIZE, SIZE):
            raise ValueError("shape")


class Asserts(Picture):
    def check(self, x: Tensor) -> None:
        assert x.shape[1:] == (1, SIZE, SIZE)


class PoorPlaceholder(Picture):
    def placeholder(self, batch: int) -> Tensor:
        return torch.full((batch, 1, SIZE, SIZE), math.nan)


class TooBright(Picture):
    def render(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


class NearestIsFarthest(Picture):
    def similarity(self, x: Tensor, candidates: Tensor) -> Tensor:
        return torch.cdist(x.flatten(1), candidates.flatten(1))


class PairsAlone(Picture):
    def similarity(self, x: Tensor, candidates: Tensor) -> Tensor:
        return -(x - candidates[: len(x)]).square().flatten(1).sum(1)


class TensorMetrics(Picture):
    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        return {"mse": (generated - truth).square().mean()}  # type: ignore[dict-item]


class InfiniteMetrics(Picture):
    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        return {"psnr": math.inf}


class WritesElsewhere(Picture):
    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        return super().write(x, folder, "x")


class RowWithoutValue(Label):
    def cells(self, x: Tensor) -> dict[str, int | float | str]:
        return {"label": int(x)}


class ParsesWithBatch(Picture):
    def parse(self, text: str) -> Tensor:
        return super().parse(text)[None]


class ParsesNoFile(Label):
    def parse(self, text: str) -> Tensor:
        return torch.tensor(int(text))


class ParseLeaks(Picture):
    def parse(self, text: str) -> Tensor:
        return torch.load(text)


class UnknownForm(Picture):
    @property
    def input_spec(self) -> InputSpec:
        return InputSpec("drawing")  # type: ignore[arg-type]


class RefusesDrawings(Picture):
    @property
    def input_spec(self) -> InputSpec:
        return InputSpec("picture")


class NothingToChoose(Label):
    @property
    def input_spec(self) -> InputSpec:
        return InputSpec("choice")


class UnknownChoice(Label):
    @property
    def input_spec(self) -> InputSpec:
        return InputSpec("choice", ["0", "one"])


class OneColour(Label):
    @property
    def input_spec(self) -> InputSpec:
        return InputSpec("classes", ["cat", "dog"], [(0, 0, 0), (0, 0, 0)])


class NoWeight(Picture):
    loss_weight = 0.0


class InfinitePrediction(Picture):
    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        return {"nll": math.nan}


class AveragesDims(GaussianHead):
    def nll(self, params: Params, x: Tensor) -> Tensor:
        return super().nll(params, x) / self.dims

    def objective(self, params: Params, x: Tensor) -> Tensor:
        return self.nll(params, x)


class ForgetsLogScale(GaussianHead):
    def nll(self, params: Params, x: Tensor) -> Tensor:
        return super().nll(params, x) - params["log_scale"].flatten(1).sum(1)

    def objective(self, params: Params, x: Tensor) -> Tensor:
        return super().nll(params, x) / self.dims


class DrawsTooWide(GaussianHead):
    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        return super().sample({**params, "log_scale": params["log_scale"] + 1}, generator)


class Clips(GaussianHead):
    """No more wrong than any that keeps what is drawn within the range of the data."""

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        return super().sample(params, generator).clamp(-1, 1)


class ForgetsDims(GaussianHead):
    def __init__(self, latent: LatentSpec, features: FeatureSpec) -> None:
        super().__init__(latent, features)
        del self.dims


class HalfADimension(GaussianHead):
    def __init__(self, latent: LatentSpec, features: FeatureSpec) -> None:
        super().__init__(latent, features)
        self.dims = 0.5  # type: ignore[assignment]


class CountsForTheBatch(GaussianHead):
    def dims_of(self, x: Tensor) -> Tensor:
        return torch.tensor(x.numel())


class CountsTooMany(GaussianHead):
    def dims_of(self, x: Tensor) -> Tensor:
        return super().dims_of(x) + 1


class MisspeltDirection(Picture):
    metric_directions: ClassVar[dict[str, str]] = {"mes": "lower"}  # type: ignore[misc]


class UnknownDirection(Picture):
    metric_directions: ClassVar[dict[str, str]] = {"mse": "min"}  # type: ignore[misc]


class DrawnAnew(Codebook):
    def __init__(self, latent: LatentSpec) -> None:
        super().__init__(latent)
        del self.codes
        self.codes = torch.randn(CLASSES, *latent.shape)


PARTS: list[tuple[type, str]] = [
    (ShapeLost, "encode"),
    (IntegerCodes, "encode"),
    (OverBatch, "encode"),
    (TooQuiet, "code_scale"),
    (SeesThroughHoles, "hidden"),
    (HidesNothing, "observe"),
    (HidesHalf, "observe"),
    (ReadoutTooWide, "readout"),
    (SingleOnly, "dtype"),
    (DrawnAnew, "state"),
    (NoBatch, "params"),
    (MeanOverBatch, "nll"),
    (Overflows, "nll"),
    (SqueezesBatch, "nll"),
    (AveragesDims, "likelihood"),
    (ForgetsLogScale, "likelihood"),
    (DrawsTooWide, "likelihood"),
    (ForgetsDims, "dims"),
    (HalfADimension, "dims"),
    (CountsForTheBatch, "dims"),
    (CountsTooMany, "dims"),
    (ObjectiveOverBatch, "objective"),
    (Detached, "gradients"),
    (ModeOutOfRange, "mode"),
    (ModeOfFloats, "mode"),
    (SampleInvalid, "draw"),
    (GlobalNoise, "generator"),
    (CodeOfMode, "expected_encoding"),
    (ConstantOnCpu, "device"),
    (Blind, "head_learns"),
    (Inverted, "head_learns"),
    (NanWhereBlank, "missing"),
    (NoWeight, "learns"),
    (Gullible, "refusal"),
    (Asserts, "refusal"),
    (PoorPlaceholder, "placeholder"),
    (TooBright, "render"),
    (NearestIsFarthest, "similarity"),
    (PairsAlone, "similarity"),
    (TensorMetrics, "metrics"),
    (InfiniteMetrics, "metrics"),
    (InfinitePrediction, "metrics"),
    (MisspeltDirection, "directions"),
    (UnknownDirection, "directions"),
    (WritesElsewhere, "files"),
    (RowWithoutValue, "files"),
    (ParsesWithBatch, "files"),
    (ParsesNoFile, "files"),
    (ParseLeaks, "files"),
    (UnknownForm, "input_spec"),
    (RefusesDrawings, "input_spec"),
    (NothingToChoose, "input_spec"),
    (UnknownChoice, "input_spec"),
    (OneColour, "input_spec"),
]


def broken(part: type) -> tuple[PictureConfig, Tensor]:
    """A config whose modality has this part, and data for it."""
    of_labels = issubclass(part, Codebook | CategoricalHead | Label)
    base, examples = (LabelConfig, LABELS) if of_labels else (PictureConfig, PICTURES)
    role = "encoder" if issubclass(part, Encoder) else "decoder" if issubclass(part, Decoder) else "modality"
    return frozen(type("Broken", (base,), {"kind": "test_broken", "__annotations__": {}, role: part}))(), examples


@pytest.mark.parametrize(("part", "check"), PARTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_part_fails_one_check_alone(part: type, check: str) -> None:
    config, examples = broken(part)
    assert failed(config, examples=examples, height=4, width=4) == [check]


class WrongDeviation(PatchEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 4


class WrongMean(PatchEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 2.2


@pytest.mark.parametrize(
    ("part", "warning"),
    [
        (PatchEncoder, ""),
        (WrongDeviation, "warning: the codes of these samples have a root mean square of "),
        (WrongMean, r"warning: \d\d% of the mean square of these codes is the same in all samples"),
    ],
)
def test_a_wrong_mean_or_deviation_is_warned_of_on_real_samples(part: type, warning: str) -> None:
    config, examples = broken(part)
    contract = conformance(config, examples=examples, height=4, width=4).contract()
    (outcome,) = (each for each in contract.outcomes() if each.check.id == "code_scale")
    assert outcome.status == "ok" and re.match(warning or "$", outcome.reason)


def test_all_of_a_contract_in_one_test_raises_what_failed() -> None:
    config, examples = broken(MeanOverBatch)
    with pytest.raises(ContractError, match=r"nll is one number a sample, \[B\]"):
        check_modality(config, examples=examples)


class Centred(Picture):
    """Pictures that are derived from others: their brightness is taken off."""

    derived = True

    def derive(self, source: Tensor) -> Tensor:
        return source - source.mean((1, 2, 3), keepdim=True)


class CentredOverBatch(Centred):
    def derive(self, source: Tensor) -> Tensor:
        return source - source.mean()


class DerivesOne(Centred):
    def derive(self, source: Tensor) -> Tensor:
        return super().derive(source)[:1]


class DerivesFlat(Centred):
    def derive(self, source: Tensor) -> Tensor:
        return super().derive(source).flatten(1)


def test_what_is_derived_is_checked_if_a_source_is_given() -> None:
    config, _ = broken(Centred)
    check_modality(config, source=PICTURES, height=4, width=4)
    for part, check in ((CentredOverBatch, "derive"), (DerivesOne, "derive"), (DerivesFlat, "examples")):
        assert failed(broken(part)[0], source=PICTURES, height=4, width=4) == [check]
    outcomes = {outcome.check.id: outcome for outcome in conformance(config, height=4, width=4).contract().outcomes()}
    assert outcomes["derive"].status == "skipped" and "give the data set's field" in outcomes["derive"].reason
    assert outcomes["examples"].status == "ok"  # which are drawn, then
    with pytest.raises(UserError, match="examples and source: give one of the two"):
        check_modality(config, examples=PICTURES, source=PICTURES)


def test_a_sampler_that_clips_is_not_held_against_the_likelihood() -> None:
    config, examples = broken(Clips)
    contract = conformance(config, examples=examples, height=4, width=4, encoding_bias=0.5).contract()
    (outcome,) = (outcome for outcome in contract.outcomes() if outcome.check.id == "likelihood")
    assert outcome.status == "skipped" and "sample clips or rounds" in outcome.reason


class Stumbles(GaussianHead):
    def mode(self, params: Params) -> Tensor:
        raise KeyError("median")


def test_an_error_of_the_plugin_is_given_with_its_place() -> None:
    config, examples = broken(Stumbles)
    contract = conformance(config, examples=examples, height=4, width=4).contract()
    (outcome,) = (outcome for outcome in contract.outcomes() if outcome.check.id == "mode")
    assert outcome.reason.startswith("KeyError: 'median' (") and outcome.reason.endswith(", in mode)")
    line = Stumbles.mode.__code__.co_firstlineno + 1
    assert f"{Path(__file__).name}, line {line}" in outcome.reason


class DrawsDoubles(GaussianHead):
    def mode(self, params: Params) -> Tensor:
        return super().mode(params).double()


def test_x_has_one_dtype() -> None:
    config, examples = broken(DrawsDoubles)
    assert failed(config, examples=examples, height=4, width=4) == ["mode"]
    assert "placeholder" in failed(broken(Centred)[0], source=PICTURES.double(), height=4, width=4)


def test_a_misspelt_direction_is_named_with_what_was_meant() -> None:
    with pytest.raises(ContractError, match=r'"mes"; did you mean "mse"\? \(reported: mse\)'):
        check_modality(broken(MisspeltDirection)[0], examples=PICTURES, height=4, width=4)


def test_the_first_latent_must_be_possible() -> None:
    with pytest.raises(ContractError, match="a modality can be built for the first latent") as caught:
        check_modality(PictureConfig(), examples=PICTURES, height=5, width=5)
    assert "the latent must divide 8" in str(caught.value)


def test_a_config_must_come_back_from_toml() -> None:
    @frozen
    class Forgets(PictureConfig):
        kind: ClassVar[str] = "test_forgets"
        limit: int = field(default=3, converter=lambda value: value + 1)

    with pytest.raises(ContractError, match="a config comes back from TOML as it was"):
        check_config(Forgets())

    @frozen
    class Unwritable(PictureConfig):
        kind: ClassVar[str] = "test_unwritable"
        dtype: Any = torch.float32

    with pytest.raises(ContractError, match="a config comes back from TOML"):
        check_config(Unwritable())

    @define
    class Unfrozen(Config):
        group = "modality"

    with pytest.raises(ContractError, match="a config is an instance of one of the config bases"):
        check_config(Unfrozen())

    class Undecorated(PictureConfig):
        kind = "test_undecorated"

    with pytest.raises(ContractError, match=r"it must be decorated with @attrs\.frozen"):
        check_config(Undecorated())


# --- backbones --------------------------------------------------------------------------------------------------------


class SmallBackbone(Backbone):
    def __init__(self, in_channels: int, height: int, width: int, in_vector: int) -> None:
        super().__init__()
        self.features = FeatureSpec(8, height, width, 6)
        self.first = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.condition = nn.Linear(in_vector + 1, 8)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.vector = nn.Linear(8 * height * width, 6)

    def hidden(self, z: Tensor, noise: Tensor, vector: Tensor) -> Tensor:
        shift = self.condition(torch.cat([noise[:, None], vector], 1))
        return torch.relu(self.first(z) + shift[:, :, None, None])

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        h = self.hidden(z, noise, vector)
        return Features(self.last(h), self.vector(h.flatten(1)))


class IgnoresNoise(SmallBackbone):
    def hidden(self, z: Tensor, noise: Tensor, vector: Tensor) -> Tensor:
        return super().hidden(z, noise * 0, vector)


class IgnoresZ(SmallBackbone):
    def hidden(self, z: Tensor, noise: Tensor, vector: Tensor) -> Tensor:
        return super().hidden(z * 0, noise, vector)


class ShiftDrawnAnew(SmallBackbone):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.shift = torch.randn(8, 1, 1)

    def hidden(self, z: Tensor, noise: Tensor, vector: Tensor) -> Tensor:
        return super().hidden(z, noise, vector) + self.shift


class LogOfNoise(SmallBackbone):
    def hidden(self, z: Tensor, noise: Tensor, vector: Tensor) -> Tensor:
        return super().hidden(z, noise.log(), vector)


class WrongSpec(SmallBackbone):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.features = evolve(self.features, vector=7)


class Unused(SmallBackbone):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.spare = nn.Linear(2, 2)


class BatchStatistics(SmallBackbone):
    def hidden(self, z: Tensor, noise: Tensor, vector: Tensor) -> Tensor:
        return super().hidden(z - z.mean(0), noise, vector)


class Frozen(SmallBackbone):
    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        h = super().forward(z, noise, vector)
        return Features(h.map * 1e-3 + 5, h.vector * 1e-3)


class MapWithoutVector(SmallBackbone):
    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        h = super().forward(z, noise, vector)
        return Features(self.last(self.hidden(z, noise, vector * 0)), h.vector)


class InBlocks(SmallBackbone):
    """With hidden layers by the name that most give theirs, and told as what repeats."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Dropout(0.1), nn.ReLU()) for _ in range(2))

    def hidden(self, z: Tensor, noise: Tensor, vector: Tensor) -> Tensor:
        h = super().hidden(z, noise, vector)
        for block in self.blocks:
            h = block(h)
        return h

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return tuple(self.blocks)


class UntoldBlocks(InBlocks):
    """As a backbone from before there was anything to tell."""

    repeated_blocks = Backbone.repeated_blocks


class TellsAStranger(InBlocks):
    def repeated_blocks(self) -> Sequence[nn.Module]:
        return [*self.blocks, nn.Linear(2, 2)]


class TellsTwice(InBlocks):
    def repeated_blocks(self) -> Sequence[nn.Module]:
        return [*self.blocks, self.blocks[0][0]]  # type: ignore[index]


class TellsWhatIsNotCalled(InBlocks):
    def repeated_blocks(self) -> Sequence[nn.Module]:
        return [self.blocks]


class Alternating(nn.Module):
    """In training, every first call of two goes through one more function."""

    def __init__(self, more: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.more = more
        self.odd = False

    def forward(self, x: Tensor) -> Tensor:
        self.odd = self.training and not self.odd
        return self.conv(self.more(x) if self.odd else x)


class BlockWithOtherValues(InBlocks):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.blocks = nn.ModuleList([Alternating(lambda x: x * 1.01)])


class BlockWithOtherSteps(InBlocks):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.blocks = nn.ModuleList([Alternating(lambda x: x.sinh().asinh())])


@frozen
class SmallBackboneConfig(BackboneConfig):
    kind: ClassVar[str] = "test_small"
    backbone: ClassVar[Callable[..., Backbone]] = SmallBackbone

    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        return type(self).backbone(in_channels, height, width, in_vector)


def backbone_config(backbone: type[Backbone]) -> BackboneConfig:
    namespace = {"kind": "test_b", "backbone": backbone, "__annotations__": {}}
    return frozen(type("Made", (SmallBackboneConfig,), namespace))()


def test_a_correct_backbone_passes() -> None:
    check_backbone(SmallBackboneConfig())
    check_backbone(backbone_config(InBlocks))


def test_blocks_that_are_not_told_are_nobody_elses_business() -> None:
    check_backbone(backbone_config(UntoldBlocks))
    backbone = UntoldBlocks(2, 4, 4, 3)
    assert backbone.repeated_blocks() == () and len(backbone.blocks) == 2
    outcomes = conformance(backbone_config(UntoldBlocks)).contract().outcomes()
    outcome = next(outcome for outcome in outcomes if outcome.check.id == "blocks")
    assert (outcome.status, outcome.reason) == ("skipped", "it tells none")


@pytest.mark.parametrize(
    ("backbone", "check"),
    [
        (IgnoresZ, "inputs"),
        (IgnoresNoise, "inputs"),
        (MapWithoutVector, "inputs"),
        (LogOfNoise, "features"),
        (WrongSpec, "features"),
        (BatchStatistics, "batch"),
        (ShiftDrawnAnew, "state"),
        (Unused, "gradients"),
        (Frozen, "fits"),
        (TellsAStranger, "blocks"),
        (TellsTwice, "blocks"),
        (TellsWhatIsNotCalled, "blocks"),
        (BlockWithOtherValues, "blocks"),
        (BlockWithOtherSteps, "blocks"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_backbone_fails_one_check_alone(backbone: type[Backbone], check: str) -> None:
    assert failed(backbone_config(backbone)) == [check]


# --- the other groups ------------------------------------------------------------------------------------------------


class Signal(WeightSchedule):
    def __init__(self, how: str) -> None:
        self.how = how

    def signal(self, retention: Retention, modalities: int) -> Tensor:
        m = (retention.log_alpha_bar / 2).exp()[:, None].expand(-1, modalities)
        if self.how == "short":
            return m[1:]
        if self.how == "single":
            return m.float()
        if self.how == "infinite":
            return m / (m - 1)
        if self.how == "random":
            return m * torch.rand(())
        return m


@frozen
class SignalConfig(WeightScheduleConfig):
    kind: ClassVar[str] = "test_signal"
    how: str = "right"

    def build(self, names: Sequence[str]) -> WeightSchedule:
        return Signal(self.how)


@pytest.mark.parametrize(
    ("how", "check"),
    [("short", "signal"), ("single", "signal"), ("infinite", "values"), ("random", "determinism")],
)
def test_a_broken_weight_schedule_fails_one_check_alone(how: str, check: str) -> None:
    check_weight_schedule(SignalConfig())
    assert failed(SignalConfig(how)) == [check]


class Clocks(ClockLaw):
    """One clock in a third of the samples; in the others the first is cleaner, or is noisier, than those after it."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.shared = how.startswith("shared")

    def draw(self, batch: int, modalities: int, generator: torch.Generator | None = None) -> Tensor:
        if self.how == "global":
            generator = None
        clocks = torch.rand(batch, 3, generator=generator)
        if self.how in ("shared", "shared_path"):
            clocks = clocks[:, :1].expand(-1, modalities)
        else:
            apart = torch.cat([clocks[:, :1], clocks[:, 1:2].expand(-1, modalities - 1)], 1)
            clocks = torch.where(clocks[:, 2:] < 1 / 3, clocks[:, :1], apart)
        if self.how == "one_for_all":
            return clocks[:, 0]
        if self.how == "steps":
            return (clocks * 1000).long()
        if self.how == "percent":
            return clocks * 100
        if self.how == "undefined":
            return clocks / (clocks > 0.01) * 0.5
        if self.how == "clean":
            return torch.cat([clocks[:, 1:], torch.zeros(batch, 1)], 1)
        if self.how == "early":
            return clocks * 0.8
        if self.how == "opposed":
            return torch.cat([clocks[:, :1], (clocks[:, :1] + 0.5).expand(-1, modalities - 1) % 1], 1)
        return clocks

    def ahead(self, modalities: int) -> Tensor:
        shares = torch.zeros(modalities)
        if self.how in ("leads", "shared_path"):
            shares[0] = 0.5
        if self.how == "late":
            shares[-1] = -0.5
        if self.how == "drawn":
            shares = torch.rand(modalities)
        if self.how == "pair":
            shares = torch.zeros(2)[None]
        return shares


@frozen
class ClocksConfig(ClockLawConfig):
    kind: ClassVar[str] = "test_clocks"
    how: str = "right"

    def build(self, names: Sequence[str]) -> ClockLaw:
        return Clocks(self.how)


@pytest.mark.parametrize("how", ["right", "leads", "shared"])
def test_a_correct_law_of_clocks_passes(how: str) -> None:
    before = torch.get_rng_state()
    check_clock_law(ClocksConfig(how))
    check_clock_law(ClocksConfig(how), names=("a", "b", "c"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("how", "check", "found"),
    [
        ("one_for_all", "draw", r"shape \(1,\), expected \(1, 1\)"),
        ("steps", "draw", "torch.int64 on cpu"),
        ("percent", "values", "0.* to 100"),
        ("undefined", "values", "values are not"),
        ("clean", "values", r"0 alone for \[0\]"),
        ("global", "generator", "its state has changed"),
        ("pair", "ahead", r"shape \(1, 2\)"),
        ("late", "ahead", r"found: \[-0.5\]"),
        ("drawn", "ahead", "shares that differ"),
        ("shared_apart", "shared", "samples with several"),
        ("shared_path", "shared", r"\[0.5, 0.0\] ahead in sampling"),
        ("early", "reach", r"within 0.05 of \[1.0\]"),
        ("opposed", "reach", r"within 0.05 of \[1.0, 1.0\]"),
    ],
)
def test_a_broken_law_of_clocks_fails_one_check_alone(how: str, check: str, found: str) -> None:
    assert failed(ClocksConfig(how)) == [check]
    with pytest.raises(ContractError, match=found):
        check_clock_law(ClocksConfig(how))


@frozen
class FixedClocksConfig(ClockLawConfig):
    kind: ClassVar[str] = "test_fixed_clocks"
    offsets: tuple[float, ...] = (0.0, 0.2, 0.4)

    def build(self, names: Sequence[str]) -> ClockLaw:
        if len(names) != len(self.offsets):
            raise ValueError(f"expected {len(self.offsets)} modalities, found {len(names)}")
        return OffsetClocks(self.offsets)


def test_a_law_of_clocks_may_refuse_other_names_than_its_own() -> None:
    check_clock_law(FixedClocksConfig(), names=("a", "b", "c"))
    with pytest.raises(ContractError, match="a law can be built for a, b") as caught:
        check_clock_law(FixedClocksConfig())
    assert "expected 3 modalities, found 2" in str(caught.value)


class Samples(Dataset):
    def __init__(self, how: str) -> None:
        self.how = how
        self.images = torch.rand(4, 3, 8, 8) if how == "reseeded" else torch.linspace(-1, 1, 768).view(4, 3, 8, 8)

    def __len__(self) -> int:
        return 0 if self.how == "empty" else 4

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        image, label, embedding = self.images[index], torch.tensor(index), nn.functional.normalize(torch.ones(5), dim=0)
        if self.how == "augmented":
            image = image * torch.rand(())
        if self.how == "bytes":
            image = image * 255
        if self.how == "double":
            image = image.double()
        if self.how == "ignore_index":
            label = torch.tensor(-1)
        if self.how == "norm":
            embedding = embedding * 2
        waveform = torch.full((2, 100), torch.nan if self.how == "nan" else 3.0)  # a field of a sort of its own
        sample: dict[str, Tensor | str] = {
            "image": image[0] if self.how == "grey" else image,
            "label": label,
            "embedding": embedding,
            "caption": "x",
            "waveform": waveform,
        }
        if index % 2:
            del sample["label"]
        return sample


@frozen
class SamplesConfig(DatasetConfig):
    kind: ClassVar[str] = "test_samples"
    how: str = "right"

    def build(self, split: str) -> Dataset:
        return Samples(self.how if split == "test" else "right")


@pytest.mark.parametrize(
    ("how", "check", "found"),
    [
        ("empty", "length", 'the split "test" has samples'),
        ("augmented", "determinism", r'found: "test"\[0\] differs'),
        ("reseeded", "determinism", r'found: "test"\[0\] of a second build differs'),
        ("bytes", "fields", r"\['image'\] is torch.float32 of shape \(3, 8, 8\) from -255"),
        ("grey", "fields", r"\['image'\] is torch.float32 of shape \(8, 8\)"),
        ("nan", "fields", r"\['waveform'\] is torch.float32 of shape \(2, 100\) with values that are not finite"),
        ("double", "fields", r"\['image'\] is torch.float64 of shape"),
        ("ignore_index", "fields", r"\['label'\] is torch.int64 of shape \(\) with -1"),
        ("norm", "fields", r"\['embedding'\] is torch.float32 of shape \(5,\) of norm 2"),
    ],
)
def test_a_broken_data_set_fails_one_check_alone(how: str, check: str, found: str) -> None:
    check_dataset(SamplesConfig())
    assert failed(SamplesConfig(how)) == [check]
    with pytest.raises(ContractError, match=found):
        check_dataset(SamplesConfig(how))


class Contrast(Evaluator):
    def __init__(self, how: str) -> None:
        self.how = how
        self.metric_directions = {"error": "smaller" if how == "undirected" else "lower"}

    def conditional(self, target: str, generated: Any, truth: Any) -> dict[str, float]:
        error = (generated[target] - truth[target]).double().abs().mean()
        return {"error": error if self.how == "tensor" else error.item()}

    def joint(self, generated: Any) -> dict[str, float]:
        value = generated["image"].std().item()
        if self.how == "absent" and len(generated["image"]) == 1:
            return {}
        return {"contrast": value + torch.rand(()).item() if self.how == "random" else value}

    def real(self, test: Any) -> dict[str, float]:
        undefined = {"nan": math.nan, "infinite": math.inf}
        return {"contrast": undefined.get(self.how) or test["image"].std().item()}


@frozen
class ContrastConfig(EvaluatorConfig):
    kind: ClassVar[str] = "test_contrast"
    how: str = "right"

    def build(self, train: Any) -> Evaluator:
        return Contrast(self.how)

    def needs(self) -> tuple[str, ...]:
        return "image" if self.how == "letters" else ("image",)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("how", "check"),
    [
        ("letters", "requirements"),
        ("tensor", "conditional"),
        ("infinite", "real"),
        ("absent", "names"),
        ("random", "determinism"),
        ("undirected", "directions"),
    ],
)
def test_a_broken_evaluator_fails_one_check_alone(how: str, check: str) -> None:
    check_evaluator(ContrastConfig())
    check_evaluator(ContrastConfig("nan"))  # undefined, not wrong
    assert failed(ContrastConfig(how)) == [check]


@frozen
class AskConfig(TaskConfig):
    kind: ClassVar[str] = "test_ask"
    target: str = "label"
    steps: ClassVar[object] = 3

    def instances(self) -> tuple[str, ...]:
        return ("image", "label")

    def queries(self) -> tuple[Query, ...]:
        return (Query(("image",), (self.target,)), Query())

    def training(self) -> dict[str, Any]:
        return {"training": {"steps": type(self).steps}}


@frozen
class TensorTraining(AskConfig):
    kind: ClassVar[str] = "test_tensor_training"
    steps: ClassVar[object] = torch.tensor(3)


@frozen
class GuessConfig(MethodConfig):
    kind: ClassVar[str] = "test_guess"

    def fit(self, problem: Any) -> Any:
        return None


@frozen
class NoRole(GuessConfig):
    kind: ClassVar[str] = "test_no_role"
    role: ClassVar[Any] = "best"


@frozen
class FitsNothing(GuessConfig):
    kind: ClassVar[str] = "test_fits_nothing"

    def fit(self) -> Any:  # type: ignore[override]
        return None


def test_broken_tasks_and_methods_fail_one_check_alone() -> None:
    check_task(AskConfig())
    check_method(GuessConfig())
    assert failed(AskConfig("mask")) == ["queries"]
    assert failed(TensorTraining()) == ["training"]
    assert failed(NoRole()) == ["role"]
    assert failed(FitsNothing()) == ["fit"]


# --- what is installed ------------------------------------------------------------------------------------------------


TOY = (
    PLUGIN.replace("def build(self, split): ...", "def build(self, split):\n        return Digits()")
    + """
from mtdiffusion.interfaces import Dataset
import torch

class Digits(Dataset):
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return {"label": torch.tensor(index)}
"""
)


@pytest.mark.parametrize(
    ("code", "names", "check"),
    [
        (TOY, ("dataset.toy",), []),
        (TOY, ("dataset.other",), ["entry_point"]),
        (TOY.replace("API = 1", "API = 2"), ("dataset.toy",), ["entry_point"]),
        ("import sklearn\n" + TOY, ("dataset.toy",), ["imports"]),
    ],
    ids=["right", "another kind", "another API", "heavy import"],
)
def test_an_entry_point(code: str, names: tuple[str, ...], check: list[str], install: Install) -> None:
    install(code, names=names)
    assert failed(names[0]) == check


def test_installed_lists_a_group_without_importing() -> None:
    assert {"image", "label"} <= {info.kind for info in installed("modality")}
    assert all(info.group == "backbone" for info in installed("backbone"))
