"""The conformance kit passes what is right and catches what is wrong: each broken part below differs in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

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
from mtdiffusion.schedules import Retention
from mtdiffusion_registry import BackboneConfig, DatasetConfig, ModalityConfig, WeightScheduleConfig
from mtdiffusion_registry.testing import (
    ContractError,
    check_backbone,
    check_config,
    check_dataset,
    check_modality,
    check_weight_schedule,
    installed,
)

# --- a spatial modality: grey pictures [B, 1, 16, 16], cut into patches -----------------------------------------------

SIZE = 16


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
    dims = SIZE * SIZE

    def __init__(self, latent: LatentSpec, features: FeatureSpec) -> None:
        super().__init__()
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
    check_modality(LabelConfig(), examples=LABELS, height=6, width=10)
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


# --- broken decoders --------------------------------------------------------------------------------------------------


class MeanOverBatch(GaussianHead):
    def nll(self, params: Params, x: Tensor) -> Tensor:
        return super().nll(params, x).mean()


class Overflows(GaussianHead):
    def nll(self, params: Params, x: Tensor) -> Tensor:
        return super().nll(params, x) + torch.exp(params["mean"].flatten(1).sum(1) * 0 + 1000)


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


class TensorMetrics(Picture):
    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        return {"mse": (generated - truth).square().mean()}  # type: ignore[dict-item]


class InfiniteMetrics(Picture):
    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        return {"psnr": math.inf}


class WritesElsewhere(Picture):
    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        return super().write(x, folder, "x")


class ParsesWithBatch(Picture):
    def parse(self, text: str) -> Tensor:
        return super().parse(text)[None]


class ParsesNoFile(Label):
    def parse(self, text: str) -> Tensor:
        return torch.tensor(int(text))


class ParseLeaks(Picture):
    def parse(self, text: str) -> Tensor:
        return torch.load(text)


class DrawnAnew(Codebook):
    def __init__(self, latent: LatentSpec) -> None:
        super().__init__(latent)
        del self.codes
        self.codes = torch.randn(CLASSES, *latent.shape)


ENCODERS = [
    (ShapeLost, r"encoder\(x\) fills its share of the latent, \[B, c, H, W\]"),
    (TooQuiet, "codes have a root mean square of about 1"),
    (OverBatch, "the code of a sample does not depend on its batch"),
    (SeesThroughHoles, "does not depend on what is hidden of x"),
    (HidesNothing, r"observe\(x, 0\) is zero"),
    (HidesHalf, "is zero where visible is 0"),
    (ReadoutTooWide, r"readout\(z\) is \[B, readout_dim\]"),
    (SingleOnly, r"modality.double\(\) computes in float64 \(the code\)"),
]
DECODERS = [
    (MeanOverBatch, r"nll is one number a sample, \[B\]"),
    (Overflows, "nll is finite"),
    (Detached, "the objective has gradients to the decoder's parameters"),
    (NoBatch, "parameters have the batch first"),
    (GlobalNoise, "the same generator state gives the same sample"),
    (SampleInvalid, r"check accepts sample\(params\)"),
    (Blind, "a head given a linear map of the code learns x"),
]
MODALITIES = [
    (Gullible, "check refuses x with a NaN"),
    (Asserts, "check refuses x with an axis too many by a ValueError"),
    (PoorPlaceholder, r"check accepts placeholder\(B\)"),
    (TooBright, r"render\(x\) is in \[0, 1\]"),
    (TensorMetrics, "metrics are a dict of floats"),
    (InfiniteMetrics, "metrics of x and x are finite"),
    (WritesElsewhere, "write makes and returns folder/stem"),
    (ParsesWithBatch, "without a batch axis"),
    (ParseLeaks, "parse refuses what it cannot read by a ValueError"),
]


def broken(base: type[PictureConfig], **parts: object) -> PictureConfig:
    return frozen(type("Broken", (base,), {"kind": "test_broken", "__annotations__": {}, **parts}))()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *((broken(PictureConfig, encoder=part), message) for part, message in ENCODERS),
        *((broken(PictureConfig, decoder=part), message) for part, message in DECODERS),
        *((broken(PictureConfig, modality=part), message) for part, message in MODALITIES),
        (broken(LabelConfig, decoder=CodeOfMode), "is the mean code of 1024 samples"),
        (broken(LabelConfig, modality=ParsesNoFile), "parse reads what write wrote"),
        (broken(LabelConfig, decoder=Inverted), "a head given a linear map of the code learns x"),
        (broken(LabelConfig, encoder=DrawnAnew), "built anew from the same state_dict gives the same outputs"),
    ],
    ids=lambda value: (
        "" if isinstance(value, str) else "_".join(p.__name__ for p in (value.encoder, value.decoder, value.modality))
    ),
)
def test_a_broken_part_is_caught(config: PictureConfig, message: str) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        check_modality(config, examples=LABELS if isinstance(config, LabelConfig) else PICTURES)
    assert "\n  found: " in str(caught.value)
    assert "\n  to meet it: " in str(caught.value)


def test_the_first_latent_must_be_possible() -> None:
    with pytest.raises(ContractError, match="a modality can be built for the first latent") as caught:
        check_modality(PictureConfig(), examples=PICTURES, height=5, width=5)
    assert "the latent must divide 16" in str(caught.value)


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


@frozen
class SmallBackboneConfig(BackboneConfig):
    kind: ClassVar[str] = "test_small"
    backbone: ClassVar[Callable[..., Backbone]] = SmallBackbone

    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        return type(self).backbone(in_channels, height, width, in_vector)


def test_a_correct_backbone_passes() -> None:
    check_backbone(SmallBackboneConfig())


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (IgnoresNoise, "does not depend on noise"),
        (LogOfNoise, "features are finite"),
        (WrongSpec, r"features.vector is as backbone.features says"),
        (Unused, r"every parameter has a gradient .*\n  found: none for spare.weight, spare.bias"),
        (BatchStatistics, "the features of a sample do not depend on its batch"),
        (Frozen, "features can be fitted"),
        (MapWithoutVector, "features.map does not depend on vector"),
    ],
)
def test_a_broken_backbone_is_caught(backbone: type[Backbone], message: str) -> None:
    config = frozen(
        type("Broken", (SmallBackboneConfig,), {"kind": "test_b", "backbone": backbone, "__annotations__": {}})
    )()
    with pytest.raises(ContractError, match=message):
        check_backbone(config)


# --- weight schedules and data sets -----------------------------------------------------------------------------------


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


def test_weight_schedules() -> None:
    check_weight_schedule(SignalConfig())
    for how, message in {
        "short": r"signal is \[T \+ 1, N\]",
        "single": "signal is float64",
        "infinite": "signal is finite",
        "random": "signal is deterministic",
    }.items():
        with pytest.raises(ContractError, match=message):
            check_weight_schedule(SignalConfig(how))


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


def test_data_sets() -> None:
    check_dataset(SamplesConfig())
    for how, message in {
        "empty": 'the split "test" has samples',
        "augmented": r'a sample is the same every time.\n  found: "test"\[0\] differs',
        "reseeded": r'a sample is the same every time.\n  found: "test"\[0\] of a second build differs',
        "bytes": r"\['image'\] is torch.float32 of shape \(3, 8, 8\) from -255",
        "grey": r"\['image'\] is torch.float32 of shape \(8, 8\)",
        "nan": r"\['waveform'\] is torch.float32 of shape \(2, 100\) with values that are not finite",
        "double": r"\['image'\] is torch.float64 of shape",
        "ignore_index": r"\['label'\] is torch.int64 of shape \(\) with -1",
        "norm": r"\['embedding'\] is torch.float32 of shape \(5,\) of norm 2",
    }.items():
        with pytest.raises(ContractError, match=message):
            check_dataset(SamplesConfig(how))


def test_installed_lists_a_group_without_importing() -> None:
    assert {"image", "label"} <= {info.kind for info in installed("modality")}
    assert all(info.group == "backbone" for info in installed("backbone"))
