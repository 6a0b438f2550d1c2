"""The mask modality: binary or K-class segmentation, with a categorical head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion.loss import low_before_high
from mtdiffusion_plugins.files import colour_of_class, read_mask, write_mask
from mtdiffusion_plugins.heads import MapHead, check_batch, check_channels, check_range, patch_size
from mtdiffusion_plugins.metrics.calibration import expected_calibration_error
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1


def simplex(classes: int) -> Tensor:
    """K points in K − 1 dimensions, all equally far apart, of RMS 1: ``[K, K − 1]``. For K = 2: −1 and +1."""
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    # An orthonormal basis of the hyperplane the centred corners lie in (Helmert's).
    basis = torch.zeros(classes - 1, classes, dtype=torch.float64)
    for row in range(classes - 1):
        basis[row, : row + 1] = 1
        basis[row, row + 1] = -(row + 1)
    basis /= basis.norm(dim=1, keepdim=True)
    points = centred @ basis.T
    return (-points / points.square().mean(1, keepdim=True).sqrt()).float()


class MaskEncoder(Encoder):
    """Each pixel's class as a corner of a simplex; p × p patches become channels."""

    spatial = True

    def __init__(self, latent: LatentSpec, classes: int, patch: int) -> None:
        super().__init__(latent)
        check_channels("mask", latent, (classes - 1) * patch**2)
        self.patch = patch
        self.spare = latent.channels - (classes - 1) * patch**2
        self.register_buffer("corners", simplex(classes))
        self.corners: Tensor

    def code(self, probabilities: Tensor) -> Tensor:
        """The expected code of class probabilities ``[B, h, w, K]``."""
        points = (probabilities @ self.corners.to(probabilities.dtype)).permute(0, 3, 1, 2)
        return F.pad(F.pixel_unshuffle(points, self.patch), (0, 0, 0, 0, 0, self.spare))

    def forward(self, x: Tensor) -> Tensor:
        return self.code(F.one_hot(x, len(self.corners)).to(self.corners.dtype))


class CategoricalMaskDecoder(Decoder):
    """Independent categorical pixels given the features."""

    def __init__(self, features: FeatureSpec, classes: int, size: int, patch: int) -> None:
        super().__init__()
        self.logits = MapHead(features, classes, patch)
        self.dims = size**2

    def forward(self, features: Features) -> Params:
        return {"logits": self.logits(features.map)}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        return F.cross_entropy(params["logits"], x, reduction="none").flatten(1).sum(1)

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        assert isinstance(encoder, MaskEncoder)
        return encoder.code(params["logits"].softmax(1).permute(0, 2, 3, 1))

    def mode(self, params: Params) -> Tensor:
        return params["logits"].argmax(1)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        logits = params["logits"].permute(0, 2, 3, 1)
        flat = logits.reshape(-1, logits.shape[-1]).softmax(1)
        device = flat.device if generator is None else generator.device
        return torch.multinomial(flat.to(device), 1, generator=generator).reshape(logits.shape[:-1]).to(logits.device)


class MaskModality(Modality):
    metric_directions: Mapping[str, str] = MappingProxyType(
        {
            "miou": "higher",
            "iou_foreground": "higher",
            "pixel_accuracy": "higher",
            "readout_miou": "higher",
            "nll": "lower",
            "ece": "lower",
        }
    )

    def __init__(self, encoder: Encoder, decoder: Decoder, config: MaskConfig) -> None:
        super().__init__(encoder, decoder)
        self.size = config.size
        self.classes = config.classes
        self.field = config.field
        self.loss_weight = config.loss_weight
        self.snr_clamp = config.snr_clamp

    def check(self, x: Tensor) -> None:
        check_batch("mask", x, (self.size, self.size), floating=False)
        check_range(f"mask of {self.classes} classes", x, 0, self.classes - 1)

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.size, self.size, dtype=torch.int64)

    def render(self, x: Tensor) -> Tensor:
        palette = torch.tensor([colour_of_class(k) for k in range(self.classes)], device=x.device) / 255
        if self.classes == 2:
            palette = torch.tensor([[0.0] * 3, [1.0] * 3], device=x.device)
        return palette[x].permute(0, 3, 1, 2)

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """``miou``: intersection over union of each class summed over the batch, mean over the classes that occur in
        either; ``iou_foreground``: the same with all classes but 0 as one; ``pixel_accuracy``."""
        k = self.classes
        confusion = torch.bincount((truth * k + generated).flatten(), minlength=k * k).reshape(k, k).double()
        both, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        occurs = union > 0
        either = ((generated > 0) | (truth > 0)).sum().item()
        shared = ((generated > 0) & (truth > 0)).sum().item()
        return {
            "miou": (both[occurs] / union[occurs]).mean().item(),
            "iou_foreground": shared / either if either else 1.0,
            "pixel_accuracy": (generated == truth).double().mean().item(),
        }

    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        """``readout_miou`` of the most likely classes; ``nll`` in nats and ``ece``, the expected calibration error, per
        pixel."""
        miou = self.metrics(self.decoder.mode(params), truth)["miou"]
        nll = self.decoder.nll(params, truth).mean() / self.decoder.dims
        return {"readout_miou": miou, "nll": nll.item(), "ece": expected_calibration_error(params["logits"], truth)}

    def parse(self, text: str) -> Tensor:
        return read_mask(Path(text), self.size)

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        return write_mask(x, folder / f"{stem}.png")


@frozen
class MaskConfig(ModalityConfig):
    """A square segmentation mask, int64 class indices ``[B, size, size]``.

    Attributes:
        size: side in pixels; the latent's side must divide it.
        classes: K, background included.
        loss_weight: λ of its part of L2.
        snr_clamp: λ_t = loss_weight · clamp(SNR_t, low, high); uniform in t by default.
        field: the data set's field; None: the instance's name.
    """

    kind: ClassVar[str] = "mask"
    size: int = field(validator=ge(1))
    classes: int = field(default=2, validator=ge(2))
    loss_weight: float = field(default=0.3, validator=gt(0.0))
    snr_clamp: tuple[float, float] = field(default=(1.0, 1.0), validator=low_before_high)
    field: str | None = None

    def latent_channels(self, height: int, width: int) -> int:
        return (self.classes - 1) * max(self.size // height, 1) * max(self.size // width, 1)

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        patch = patch_size("mask", self.size, latent)
        encoder = MaskEncoder(latent, self.classes, patch)
        return MaskModality(encoder, CategoricalMaskDecoder(features, self.classes, self.size, patch), self)


@hookimpl
def mtdiffusion_modalities() -> list[type]:
    return [MaskConfig]
