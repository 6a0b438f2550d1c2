"""The mask modality: binary or K-class segmentation, with a categorical head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import deep_iterable, ge, gt
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, InputSpec, LatentSpec, Modality, Params
from mtdiffusion.loss import low_before_high
from mtdiffusion_plugins.fields import MaskField
from mtdiffusion_plugins.files import (
    VOID_COLOUR,
    Colour,
    colour_of_class,
    hex_of,
    is_painted,
    is_written_mask,
    open_picture,
    read_mask,
    rgb_of_names,
    used_colours,
    write_mask,
)
from mtdiffusion_plugins.heads import (
    MapHead,
    check_batch,
    check_channels,
    check_shape,
    patch_channels,
    picture_size,
    size_hint,
    with_spare,
)
from mtdiffusion_plugins.metrics.calibration import expected_calibration_error
from mtdiffusion_plugins.sizes import Size, positive_size
from mtdiffusion_registry.configs import DataField, ModalityConfig
from mtdiffusion_registry.errors import UserError, given_file
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.pictures import require_lossless, require_size

MTDIFFUSION_API = 1

BESIDE = 32
"""Masks of the data with which one that is given must agree in its palette."""


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
    """Each pixel's class as a corner of a simplex, its middle for a pixel to ignore; p × p patches become channels."""

    spatial = True

    def __init__(self, latent: LatentSpec, classes: int, patch: int, ignore: int | None) -> None:
        super().__init__(latent)
        check_channels("mask", latent, (classes - 1) * patch**2)
        self.patch = patch
        self.spare = latent.channels - (classes - 1) * patch**2
        self.ignore = ignore
        self.register_buffer("corners", simplex(classes))
        self.corners: Tensor

    def code(self, probabilities: Tensor) -> Tensor:
        """The expected code of class probabilities ``[B, h, w, K]``."""
        points = probabilities @ self.corners.to(probabilities.dtype)
        return with_spare(F.pixel_unshuffle(points.permute(0, 3, 1, 2), self.patch), self.spare)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x[:, None], self.patch)  # [B, p², H, W]: one number a pixel is less to move than K − 1
        if self.ignore is None:
            points = F.embedding(x, self.corners)
        else:
            counts = x != self.ignore
            points = F.embedding(x * counts, self.corners) * counts[..., None]
        return with_spare(points.movedim(-1, 1).flatten(1, 2), self.spare)

    def known(self, x: Tensor) -> Tensor | None:
        if self.ignore is None:
            return None
        counts = (x != self.ignore)[:, None].expand(-1, self.corners.shape[1], -1, -1)
        patches = F.pixel_unshuffle(counts.to(self.corners.dtype), self.patch)
        return with_spare(patches, self.spare, value=1.0) > 0


class CategoricalMaskDecoder(Decoder):
    """Independent categorical pixels given the features; pixels to ignore have no likelihood."""

    def __init__(self, features: FeatureSpec, config: MaskConfig, sizes: tuple[int, int], patch: int) -> None:
        super().__init__()
        self.logits = MapHead(features, config.classes, patch)
        self.dims = sizes[0] * sizes[1]
        self.ignore = config.ignore
        self.weights: Tensor | None
        weights = torch.tensor(config.class_weights) if config.class_weights else None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, features: Features) -> Params:
        return {"logits": self.logits(features.map)}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        return self._cross_entropy(params, x, None).flatten(1).sum(1)

    def dims_of(self, x: Tensor) -> Tensor:
        return super().dims_of(x) if self.ignore is None else (x != self.ignore).flatten(1).sum(1)

    def objective(self, params: Params, x: Tensor) -> Tensor:
        loss = self._cross_entropy(params, x, self.weights)
        if self.ignore is None:
            return loss.flatten(1).mean(1)
        return loss.flatten(1).sum(1) / self.dims_of(x).clamp(min=1)

    def _cross_entropy(self, params: Params, x: Tensor, weights: Tensor | None) -> Tensor:
        """``[B, h, w]``, 0 where x is to be ignored."""
        ignored = {} if self.ignore is None else {"ignore_index": self.ignore}
        logits = params["logits"]
        weights = None if weights is None else weights.to(logits.dtype)
        return F.cross_entropy(logits, x, weights, reduction="none", **ignored)  # type: ignore[arg-type]

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


def _colours(classes: int) -> list[tuple[int, int, int]]:
    """Of classes whose configuration names none."""
    return [(0, 0, 0), (255, 255, 255)] if classes == 2 else [colour_of_class(index) for index in range(classes)]


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

    moves = "mask"
    stored_dtypes = (torch.uint8, torch.int16, torch.int32)

    def __init__(self, encoder: Encoder, decoder: Decoder, config: MaskConfig, sizes: tuple[int, int]) -> None:
        super().__init__(encoder, decoder)
        self.sizes = sizes
        self.classes = config.classes
        self.ignore = config.ignore
        self.class_names = config.names
        self.colours = rgb_of_names(config.colours) or _colours(config.classes)
        self.colours_given = bool(config.colours)
        self.metric_directions = {**self.metric_directions, **{f"iou_{name}": "higher" for name in config.names}}
        self.field = config.field
        self.loss_weight = config.loss_weight
        self.snr_clamp = config.snr_clamp

    def check(self, x: Tensor) -> None:
        check_batch("mask", x, self.sizes, floating=False, hint=size_hint(x, self.sizes))
        self._check_classes(x)

    def from_stored(self, stored: Tensor) -> Tensor:
        return stored.long()

    def check_stored(self, stored: Tensor) -> None:
        check_shape("mask", stored, self.sizes, size_hint(stored, self.sizes))
        self._check_classes(stored)

    def _check_classes(self, x: Tensor) -> None:
        known = x if self.ignore is None else x[x != self.ignore]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < self.classes:
            odd = torch.unique(known)
            odd = odd[(odd < 0) | (odd >= self.classes)].tolist()
            ignored = "" if self.ignore is None else f" and {self.ignore}, which is ignored"
            # Values that come right after the known ones are likely to be classes, too.
            more = odd == list(range(self.classes, self.classes + len(odd)))
            remedies = [f"if they are classes, set classes = {odd[-1] + 1}"] if more else []
            if self.ignore is None:
                remedies.append(f"void pixels are left out with ignore = {odd[-1]}")
            remedies.append("where other values stand for classes, list them in values of the data set's mask field")
            raise ValueError(
                f"mask of {self.classes} classes: expected values from 0 to {self.classes - 1}{ignored}, found "
                f"{odd[:5]}. Change the mask or, before a training, the configuration: {'; '.join(remedies)}"
            )

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, *self.sizes, dtype=torch.int64)

    def render(self, x: Tensor) -> Tensor:
        palette = torch.tensor([*self.colours, VOID_COLOUR], device=x.device) / 255
        if self.ignore is not None:
            x = torch.where(x == self.ignore, self.classes, x)
        return palette[x].permute(0, 3, 1, 2)

    @property
    def legend(self) -> list[tuple[str, tuple[int, int, int]]]:
        void = [] if self.ignore is None else [("void", VOID_COLOUR)]
        obvious = self.classes == 2 and not void  # black and white
        names = self.class_names or (() if obvious else map(str, range(self.classes)))
        return [*zip(names, self.colours, strict=False), *void]

    @property
    def input_spec(self) -> InputSpec:
        names = self.class_names or tuple(map(str, range(self.classes)))
        return InputSpec("classes", names, tuple(self.colours))

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """``miou``: intersection over union of each class summed over the batch, mean over the classes that occur in
        either; ``iou_NAME`` of each class that has a name; ``iou_foreground``: with all classes but 0 as one;
        ``pixel_accuracy``. Pixels of the truth that are to be ignored count nowhere; what is undefined is NaN."""
        k = self.classes
        if self.ignore is not None:
            known = truth != self.ignore
            generated, truth = generated[known], truth[known]
        confusion = torch.bincount((truth * k + generated).flatten(), minlength=k * k).reshape(k, k).double()
        both, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        occurs = union > 0
        iou = both / union  # NaN where a class is in neither
        either = ((generated > 0) | (truth > 0)).sum().item()
        shared = ((generated > 0) & (truth > 0)).sum().item()
        return {
            "miou": iou[occurs].mean().item(),
            **{f"iou_{name}": iou[index].item() for index, name in enumerate(self.class_names)},
            "iou_foreground": shared / either if either else 1.0,
            "pixel_accuracy": (generated == truth).double().mean().item(),
        }

    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        """``readout_miou`` of the most likely classes; ``nll`` in nats and ``ece``, the expected calibration error, per
        pixel."""
        miou = self.metrics(self.decoder.mode(params), truth)["miou"]
        known = torch.ones_like(truth, dtype=torch.bool) if self.ignore is None else truth != self.ignore
        logits = params["logits"].movedim(1, -1)[known]  # [pixels, K]
        return {
            "readout_miou": miou,
            "nll": F.cross_entropy(logits, truth[known]).item(),
            "ece": expected_calibration_error(logits, truth[known]) if len(logits) else math.nan,
        }

    def parse(self, text: str) -> Tensor:
        """A file as the data have it, by their values or colours; or class indices; or the classes painted in their
        colours, as :meth:`render` and :attr:`legend` show them."""
        path = given_file(text, "a mask is given as a picture file, of class indices or in the colours of its classes")
        require_lossless(path)
        picture = open_picture(path)
        field = self._mask_field()
        if is_written_mask(picture, self.colours):
            return self._read(path)
        if field is not None and (field.colours or field.values) and not self._holds_classes(picture, field):
            return self._as_data(path, picture, field)
        self._check_palette(path, picture, field)
        return self._read(path)

    def _read(self, path: Path) -> Tensor:
        return read_mask(path, self.sizes, resize=self.resize, colours=self._classes_of())

    def _classes_of(self) -> dict[Colour, int]:
        """The class of each colour in pictures."""
        void = {} if self.ignore is None else {VOID_COLOUR: self.ignore}
        return {**{rgb: index for index, rgb in enumerate(self.colours)}, **void}

    def _mask_field(self) -> MaskField | None:
        """How the data set reads masks, if it reads files of them."""
        config = self.data_field.config if isinstance(self.data_field, DataField) else None
        return config if isinstance(config, MaskField) else None

    def _holds_classes(self, picture: Image.Image, field: MaskField) -> bool:
        """Whether a grey picture's values can only be classes, where the data have colours or other values."""
        if picture.mode not in ("1", "L", "I", "I;16") or (picture.mode == "1" and field.shades):
            return False
        if field.values and field.ignore is not None:  # of any other value it says what it is
            return False
        values = set(np.unique(np.asarray(picture)).tolist())
        greys = {red for red, green, blue in rgb_of_names(field.colours) if red == green == blue}
        return values <= {*range(self.classes), self.ignore} and not values <= {*greys, *field.values}

    def _as_data(self, path: Path, picture: Image.Image, field: MaskField) -> Tensor:
        try:
            stored = field.read(path, self.sizes)
        except UserError:
            if picture.mode == "P" or not is_painted(picture, self._classes_of()):
                raise
            return self._read(path)
        require_size(path, (picture.height, picture.width), self.sizes, resize=self.resize)
        return field.value(stored)

    def _check_palette(self, path: Path, picture: Image.Image, field: MaskField | None) -> None:
        """Refuse a palette that gives indices other colours than the data's masks have, or than the classes have."""
        used = used_colours(picture)
        if not used:
            return
        beside = self.data_field.files(BESIDE) if field is not None else []
        if field is not None:
            field.check_files([*beside, path])
        if not any(used_colours(open_picture(each)) for each in beside):
            index = self._moved(used)
            if index is not None:
                raise UserError(
                    f"{path}: index {index} of its palette is {hex_of(used[index])}, the colour of class "
                    f"{self._classes_of()[used[index]]} in the modality's colours. If the colours are right, save it "
                    "as RGB; if the indices are right all the same, save it without a palette, in grey"
                )

    def _moved(self, used: Mapping[int, Colour]) -> int | None:
        """The first of these indices that has the colour of another class, where the configuration says which colours
        the classes have and all that are used are among these."""
        classes = self._classes_of()
        if not self.colours_given or len(used) < 2 or any(colour not in classes for colour in used.values()):
            return None
        return next((index for index, colour in used.items() if classes[colour] != index), None)

    def check_data_field(self) -> None:
        """Whether the palettes of the data, or the colours of their field, are the modality's in the same order."""
        field = self._mask_field()
        if field is None or not self.colours_given:
            return
        used = dict(enumerate(rgb_of_names(field.colours)))
        for each in () if used else self.data_field.files(BESIDE):
            with suppress(UserError):  # what cannot be read is told when it is
                used = {**used_colours(open_picture(each)), **used}
        if (index := self._moved(used)) is not None:
            raise UserError(
                f"colours: {hex_of(used[index])} is class {index} of the data and class "
                f"{self._classes_of()[used[index]]} of this modality, so that classes would be shown, and painted ones "
                "read, as others. Give the colours in the order of the data"
            )

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        return write_mask(x, folder / f"{stem}.png", self.colours)


@frozen
class MaskConfig(ModalityConfig):
    """A segmentation mask, int64 class indices ``[B, height, width]``.

    Attributes:
        size: height and width in pixels, the same multiple of the latent's; or the height alone (of a square latent:
            the side), and the width is as the latent's shape has it.
        classes: K, background included.
        names: of the classes, for pictures and tables; (): none.
        colours: of the classes in pictures, such as ``["#87ceeb", "darkgreen"]``; (): black and white of two classes,
            else nine that colour-blind readers can tell apart, and then each as different as can be.
        ignore: the ignore index: a value, none of 0..K − 1, of void or unlabelled pixels (often 255). They count in no
            loss and no metric, and are never generated; None: there are none.
        class_weights: of each class in the objective (of L2); (): all alike.
        loss_weight: λ of its part of L2.
        snr_clamp: λ_t = loss_weight · clamp(SNR_t, low, high); uniform in t by default.
        field: the data set's field; None: the instance's name.
    """

    kind: ClassVar[str] = "mask"
    size: Size = field(validator=positive_size)
    classes: int = field(default=2, validator=ge(2))
    names: tuple[str, ...] = field(default=())
    colours: tuple[str, ...] = field(default=())
    ignore: int | None = None
    class_weights: tuple[float, ...] = field(default=(), validator=deep_iterable(ge(0.0)))
    loss_weight: float = field(default=0.3, validator=gt(0.0))
    snr_clamp: tuple[float, float] = field(default=(1.0, 1.0), validator=low_before_high)
    field: str | None = None

    def __attrs_post_init__(self) -> None:
        if VOID_COLOUR in rgb_of_names(self.colours) and self.ignore is not None:
            raise ValueError("colours: expected other colours than grey, #808080, in which void pixels are drawn")
        of_classes = {"names": self.names, "colours": self.colours, "class_weights": self.class_weights}
        for key, values in of_classes.items():
            if values and len(values) != self.classes:
                raise ValueError(f"{key}: expected one for each of {self.classes} classes, found {len(values)}")
        if len(set(self.names)) < len(self.names):
            raise ValueError("names: expected different names, found one twice")
        if self.ignore is not None and 0 <= self.ignore < self.classes:
            raise ValueError(f"ignore: expected a value that is no class, 0 to {self.classes - 1}, found {self.ignore}")

    def latent_channels(self, height: int, width: int) -> int:
        return (self.classes - 1) * patch_channels(self.size, height, width)

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        height, width, patch = picture_size("mask", self.size, latent)
        encoder = MaskEncoder(latent, self.classes, patch, self.ignore)
        decoder = CategoricalMaskDecoder(features, self, (height, width), patch)
        return MaskModality(encoder, decoder, self, (height, width))


@hookimpl
def mtdiffusion_modalities() -> list[type]:
    return [MaskConfig]
