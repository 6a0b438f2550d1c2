"""The label modality: one of K classes, spread over the latent by an orthonormal codebook."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, optional
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, InputSpec, LatentSpec, Modality, Params
from mtdiffusion.loss import low_before_high
from mtdiffusion_plugins.drawing import text_tiles
from mtdiffusion_plugins.fields import LabelField
from mtdiffusion_plugins.files import read_json_value
from mtdiffusion_plugins.heads import VectorEncoder, VectorHead, check_batch, check_range
from mtdiffusion_plugins.metrics.calibration import expected_calibration_error
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.errors import UserError, did_you_mean, given_file
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1


class LabelEncoder(VectorEncoder):
    """Class k has code √n · q_k, with orthonormal q_k."""

    def forward(self, x: Tensor) -> Tensor:
        return self.placed(F.embedding(x, self.directions))


class CategoricalDecoder(Decoder):
    """A categorical distribution over K classes."""

    def __init__(self, features: FeatureSpec, classes: int) -> None:
        super().__init__()
        self.logits = VectorHead(features, classes)

    def forward(self, features: Features) -> Params:
        return {"logits": self.logits(features.vector)}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        return F.cross_entropy(params["logits"], x, reduction="none")

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        assert isinstance(encoder, LabelEncoder)
        return encoder.vector_code(params["logits"].softmax(1))

    def mode(self, params: Params) -> Tensor:
        return params["logits"].argmax(1)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        logits = params["logits"]
        device = logits.device if generator is None else generator.device
        return torch.multinomial(logits.softmax(1).to(device), 1, generator=generator)[:, 0].to(logits.device)


class LabelModality(Modality):
    metric_directions: Mapping[str, str] = MappingProxyType(
        {"accuracy": "higher", "readout_accuracy": "higher", "nll": "lower", "ece": "lower"}
    )

    def __init__(self, encoder: Encoder, decoder: Decoder, config: LabelConfig) -> None:
        super().__init__(encoder, decoder)
        self.classes = config.classes
        self.class_names = config.names or tuple(str(k) for k in range(config.classes))
        self.field = config.field
        self.loss_weight = config.loss_weight
        self.snr_clamp = config.snr_clamp

    def check(self, x: Tensor) -> None:
        check_batch("label", x, (), floating=False)
        check_range(f"label of {self.classes} classes", x, 0, self.classes - 1)

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, dtype=torch.int64)

    def render(self, x: Tensor) -> Tensor:
        return text_tiles([self.class_names[k] for k in x.tolist()])

    @property
    def input_spec(self) -> InputSpec:
        return InputSpec("choice", self.class_names)

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """``accuracy``: the share that agrees."""
        return {"accuracy": (generated == truth).double().mean().item()}

    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        """``readout_accuracy`` of the most likely class; ``nll`` in nats; ``ece``, the expected calibration error."""
        return {
            "readout_accuracy": (self.decoder.mode(params) == truth).double().mean().item(),
            "nll": self.decoder.nll(params, truth).mean().item(),
            "ece": expected_calibration_error(params["logits"], truth),
        }

    def parse(self, text: str) -> Tensor:
        """A class's index or name; or a file that holds it: JSON as :meth:`write` makes it, or a text as data sets have
        it."""
        path = Path(text)
        if text in self.class_names or path.suffix.lower() not in (".json", *LabelField.suffixes):
            return self.from_text(text)
        path = given_file(text, "a class is given by its number or name, or as a .json, .txt or .cls file of it")
        if path.suffix.lower() == ".json":
            return self.from_text(read_json_value(path, "label"))
        value = LabelField().read(path)
        return self.from_text(value if isinstance(value, str) else str(int(value)))

    def from_text(self, text: str) -> Tensor:
        """A class's name, or its index."""
        if text in self.class_names:
            return torch.tensor(self.class_names.index(text))
        if text.isdecimal() and int(text) < self.classes:
            return torch.tensor(int(text))
        if self.class_names[0].isdecimal():
            named, hint = "", " (names are taken where the modality has them: names = [...])"
        else:
            named, hint = f" or one of {', '.join(self.class_names)}", did_you_mean(text, self.class_names)
        raise UserError(f"label: expected a class from 0 to {self.classes - 1}{named}, found {text!r}{hint}")

    def cells(self, x: Tensor) -> Mapping[str, int | float | str]:
        """The class's index and its name."""
        return {"value": int(x), "name": self.class_names[int(x)]}

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        path = folder / f"{stem}.json"
        path.write_text(json.dumps({"label": int(x), "name": self.class_names[int(x)]}) + "\n", encoding="utf-8")
        return path


@frozen
class LabelConfig(ModalityConfig):
    """A class index, int64 ``[B]``.

    Attributes:
        classes: K.
        names: names of the classes, for people and for ``--observe``; empty: their indices.
        code_channels: channels of the latent its code fills; None: as many as K orthogonal codes need.
        loss_weight: λ of its part of L2.
        snr_clamp: λ_t = loss_weight · clamp(SNR_t, low, high). Uniform in t by default: weighted by SNR the head learns
            to read the label out of an almost clean z_t instead of inferring it.
        field: the data set's field; None: the instance's name.
    """

    kind: ClassVar[str] = "label"
    classes: int = field(validator=ge(2))
    names: tuple[str, ...] = field(default=())
    code_channels: int | None = field(default=None, validator=optional(ge(1)))
    loss_weight: float = field(default=0.1, validator=gt(0.0))
    snr_clamp: tuple[float, float] = field(default=(1.0, 1.0), validator=low_before_high)
    field: str | None = None

    @names.validator
    def _one_name_a_class(self, _: object, value: tuple[str, ...]) -> None:
        if value and (len(value) != self.classes or len(set(value)) != len(value)):
            raise ValueError(f"expected {self.classes} different names, found {len(set(value))}")

    def latent_channels(self, height: int, width: int) -> int:
        return self.code_channels or -(-self.classes // (height * width))

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        return LabelModality(
            LabelEncoder(latent, self.classes, seed=1), CategoricalDecoder(features, self.classes), self
        )


@hookimpl
def mtdiffusion_modalities() -> list[type]:
    return [LabelConfig]
