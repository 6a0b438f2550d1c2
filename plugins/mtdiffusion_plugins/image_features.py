"""Features of a picture by a frozen vision network, as a modality: a grid of few channels, or one vector.

A model that generates the features beside the picture learns better what a picture shows, and decides that first where
their clock runs ahead (ReDi, Kouzelis et al. 2025, with the patches of DINOv2 by their first principal components).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, in_, optional
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Encoder, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion.loss import low_before_high
from mtdiffusion_plugins.clip import retrieval
from mtdiffusion_plugins.drawing import vector_tiles
from mtdiffusion_plugins.embedders.vision import (
    Place,
    VisionNetwork,
    load_network,
    read_spec,
    weights_key,
)
from mtdiffusion_plugins.files import read_image
from mtdiffusion_plugins.heads import MapHead, VectorEncoder, VectorHead, check_batch, picture_size, size_hint
from mtdiffusion_plugins.latent_image import GaussianLatentDecoder, LatentEncoder, Scale
from mtdiffusion_plugins.sizes import Size, positive_size
from mtdiffusion_registry.cache import cached, config_key, load_kept, save_kept
from mtdiffusion_registry.configs import ModalityConfig
from mtdiffusion_registry.errors import UserError, given_file
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.pace import LOGGER

MTDIFFUSION_API = 1

_FITTED = 512
"""Pictures that principal components are fitted to: some hundred thousand places of a grid."""


class Components(nn.Module):
    """The first principal components of features: their mean ``[D]`` and directions ``[k, D]``, in the checkpoint.

    Attributes:
        known: whether they are known, or still to be fitted.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("directions", torch.zeros(count, dim))
        self.register_buffer("known", torch.tensor(False))
        self.mean: Tensor
        self.directions: Tensor
        self.known: Tensor

    def forward(self, grid: Tensor) -> Tensor:
        """``[B, D, h, w]`` to ``[B, k, h, w]``."""
        mean, directions = self.mean.to(grid.device), self.directions.to(grid.device)
        return torch.einsum("kd,bdhw->bkhw", directions, grid - mean[:, None, None])

    def fit(self, grids: Iterable[Tensor]) -> float:
        """Fit them to grids ``[b, D, h, w]``, and return their share of the variance.

        A direction's largest component is positive, so that the signs, too, follow from the data.

        Raises:
            ValueError: if the features vary in fewer directions.
        """
        count, dim = self.directions.shape
        total, mean, square = 0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
        for grid in grids:
            places = grid.movedim(1, -1).flatten(0, 2).double().cpu()
            total += len(places)
            mean += places.sum(0)
            square += places.T @ places
        mean /= total
        variances, directions = torch.linalg.eigh(square / total - mean.outer(mean))  # ascending
        variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)[:, :count].T
        if not float(variances[count - 1]) > 1e-9 * float(variances[0]):
            raise ValueError(f"the features of these pictures vary in fewer than {count} directions; lower components")
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.set(mean, directions * largest.sign())
        return float(variances[:count].sum() / variances.sum())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """As of every module; but features that were derived by one set of components are not to be joined to a model
        that knows another, as where a run is resumed on other data."""
        stored = state_dict.get(f"{prefix}directions")
        known = bool(self.known) and stored is not None and stored.shape == self.directions.shape
        if known and not torch.allclose(stored.to(self.directions), self.directions, atol=1e-3):
            raise UserError(
                "the principal components of the training pictures are not those of the checkpoint: the pictures, or "
                "the network's weights, have changed since; restore them, or start a new run"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def set(self, mean: Tensor, directions: Tensor) -> None:
        self.mean.copy_(mean)
        self.directions.copy_(directions)
        self.known.fill_(True)


class FeatureVectorEncoder(VectorEncoder):
    """Normalised features ``[B, D]``, spread over the whole latent share by an isometry: a code of RMS about 1."""

    def __init__(self, latent: LatentSpec, dim: int, scale: Scale) -> None:
        super().__init__(latent, dim, seed=3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.vector_code(self.scale.normalised(x) / math.sqrt(self.readout_dim))


class ImageFeaturesModality(Modality):
    metric_directions: Mapping[str, str] = MappingProxyType(
        {"mse": "lower", "cosine": "higher", "readout_mse": "lower", "readout_cosine": "higher"}
    )

    derived = True

    def __init__(
        self,
        encoder: Encoder,
        decoder: GaussianLatentDecoder,
        config: ImageFeaturesConfig,
        shape: tuple[int, ...],
        size: tuple[int, int],
    ) -> None:
        super().__init__(encoder, decoder)
        self.config, self.shape, self.size = config, shape, size
        self.field = config.field
        self.loss_weight = config.loss_weight
        self.snr_clamp = config.snr_clamp
        self.components: Components | None = None
        if config.form == "grid":
            self.components = Components(shape[0], read_spec(config.place).grid)

    @property
    def network(self) -> VisionNetwork:
        """The frozen network, which is no part of this module."""
        return load_network(self.config.place)

    @property
    def scale(self) -> Scale:
        """Of its features."""
        return self.decoder.scale  # type: ignore[return-value]

    @property
    def derived_by(self) -> str:  # type: ignore[override]  # it is known once the weights are here
        parts = [weights_key(self.config.place), str(self.shape)]
        if self.components is not None:
            values = torch.cat([self.components.mean[None], self.components.directions]).cpu()
            parts.append(hashlib.sha256(values.numpy().tobytes()).hexdigest())
        return " ".join(parts)

    @property
    def fit_samples(self) -> int:  # type: ignore[override]  # none once they are known
        return 0 if self.components is None or bool(self.components.known) else _FITTED

    def check(self, x: Tensor) -> None:
        check_batch("image_features", x, self.shape, floating=True)

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, *self.shape)

    def fit(self, source: Tensor | Sequence[str]) -> None:
        """Fit the principal components of a grid to pictures, or take those that were fitted to the same before."""
        pictures = self._pictures(source)
        assert self.components is not None  # fit_samples is 0 without
        key = f"{config_key(self.config)} {weights_key(self.config.place)}"
        digest = hashlib.sha256(key.encode() + pictures.contiguous().numpy().tobytes()).hexdigest()[:32]
        kept = cached(f"components/{digest}.safetensors")
        if (stored := load_kept(kept)) is not None:
            self.components.set(stored["mean"], stored["directions"])
            return
        share = self.components.fit(self.network.grids(pictures))
        save_kept(kept, {"mean": self.components.mean.cpu(), "directions": self.components.directions.cpu()})
        logging.getLogger(LOGGER).info(
            "the first %d principal components of %s hold %.0f %% of the variance of its features",
            self.shape[0],
            self.config.model,
            100 * share,
        )

    def derive(self, source: Tensor | Sequence[str]) -> Tensor:
        """Features of pictures ``[B, 1 or 3, h, w]`` in [−1, 1]: ``[B, k, H, W]`` at the places of the latent, or
        ``[B, D]``.

        Raises:
            ValueError: if they have another shape, or the principal components were not fitted.
        """
        pictures = self._pictures(source)
        if self.components is None:
            parts = list(self.network.vectors(pictures))
        else:
            if not bool(self.components.known):
                raise ValueError("its principal components are not known: call fit on training pictures first")
            maps = (self.components(grid) for grid in self.network.grids(pictures))
            parts = [F.interpolate(each, self.shape[1:], mode="bilinear", antialias=True) for each in maps]
        return torch.cat([part.cpu() for part in parts]) if parts else torch.empty(0, *self.shape)

    def _pictures(self, source: Tensor | Sequence[str]) -> Tensor:
        pictures = super().derive(source)
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or tuple(pictures.shape[2:]) != self.size:
            raise ValueError(
                f"image_features: expected pictures [batch, 1 or 3, {self.size[0]}, {self.size[1]}], found "
                f"{list(pictures.shape)}{size_hint(pictures, (3, *self.size))}"
            )
        return pictures

    def measure(self, x: Tensor) -> None:
        """Mean and standard deviation by channel, unless they are known."""
        if not bool(self.scale.known):
            self.scale.measure(x)

    def _normalised(self, x: Tensor) -> Tensor:
        return self.scale.normalised(x.to(self.scale.mean))

    def render(self, x: Tensor) -> Tensor:
        """A grid's first three components as red, green and blue, within two standard deviations; a vector's numbers as
        cells."""
        x = self._normalised(x)
        if x.ndim == 2:
            return vector_tiles(x / math.sqrt(x.shape[1]))
        shown = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
        return (shown / 4 + 0.5).clamp(0, 1)

    def similarity(self, x: Tensor, candidates: Tensor) -> Tensor | None:
        """The cosine of normalised vectors; a grid can be seen."""
        if len(self.shape) > 1:
            return None
        return F.normalize(self._normalised(x), dim=1) @ F.normalize(self._normalised(candidates), dim=1).T

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """``mse`` and ``cosine`` of normalised features, of a grid place by place; of vectors also
        ``retrieval_at_1`` and ``retrieval_at_5``, as of ``clip``."""
        found = self._errors(self._normalised(generated), truth)
        similarity = self.similarity(generated, truth)
        return found if similarity is None else found | retrieval(similarity)

    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        """``readout_mse`` and ``readout_cosine``: of the mean, in normalised features."""
        found = self._errors(params["mean"].to(self.scale.mean), truth)
        return {f"readout_{name}": value for name, value in found.items()}

    def _errors(self, normalised: Tensor, truth: Tensor) -> dict[str, float]:
        true = self._normalised(truth)
        return {
            "mse": (normalised - true).square().mean().item(),
            "cosine": F.cosine_similarity(normalised, true, dim=1).mean().item(),
        }

    def parse(self, text: str) -> Tensor:
        """The features of a picture's file, or those that :meth:`write` wrote."""
        how = "features are given as a picture file, or as the .safetensors file of features that a sample has"
        path = given_file(text, how)
        if path.suffix.lower() == ".safetensors":
            return self._read(path)
        return self.derive(read_image(path, 3, self.size, resize=self.resize)[None])[0]

    def _read(self, path: Path) -> Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            x = load_file(path)["features"].float()
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{path}: cannot be read; expected one tensor named features, or a picture ({error!r})"
            ) from None
        if tuple(x.shape) != self.shape:
            raise UserError(f"{path}: expected features of shape {list(self.shape)}, found {list(x.shape)}")
        return x

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        from safetensors.torch import save_file

        path = folder / f"{stem}.safetensors"
        save_file({"features": x.detach().float().cpu().contiguous()}, path)
        return path


class _VectorFeatures(ImageFeaturesModality):
    """As one vector, which can be told from others."""

    metric_directions = MappingProxyType(
        {**ImageFeaturesModality.metric_directions, "retrieval_at_1": "higher", "retrieval_at_5": "higher"}
    )


@frozen
class ImageFeaturesConfig(ModalityConfig):
    """Features of a picture by a frozen vision network, float32 ``[B, components, H, W]`` or ``[B, D]``.

    Attributes:
        size: height and width of the picture in pixels, as of an image; or the height alone.
        model: a network of timm by its name, ``vit_small_patch14_dinov2.lvd142m``, or ``hf-hub:OWNER/NAME``.
        weights: a .safetensors file of its weights; None: they are fetched from the Hugging Face Hub at first use.
        form: "grid": the network's last feature map, of a vision transformer its patches, at the places of the latent;
            "vector": one vector of the whole picture, as the network pools it.
        components: principal components of the features that are a grid's channels.
        input_size: side of the picture that the network sees; None: the one it was trained for.
        loss_weight: λ of its part of L2.
        snr_clamp: λ_t = loss_weight · clamp(SNR_t, low, high).
        field: the data set's field of pictures; None: the instance's name.
    """

    kind: ClassVar[str] = "image_features"
    size: Size = field(validator=positive_size)
    model: str
    weights: Path | None = None
    form: Literal["grid", "vector"] = field(default="grid", validator=in_(("grid", "vector")))
    components: int = field(default=8, validator=ge(1))
    input_size: int | None = field(default=None, validator=optional(ge(1)))
    loss_weight: float = field(default=1.0, validator=gt(0.0))
    snr_clamp: tuple[float, float] = field(default=(0.05, 5.0), validator=low_before_high)
    field: str | None = None

    @property
    def place(self) -> Place:
        """Which network, and where its weights are."""
        return Place(self.model, self.weights, self.input_size)

    def latent_channels(self, height: int, width: int) -> int:
        return self.components if self.form == "grid" else -(-read_spec(self.place).vector // (height * width))

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        spec = read_spec(self.place)
        *size, _ = picture_size("image_features", self.size, latent)
        pictures = (size[0], size[1])
        if self.form == "vector":
            scale = Scale((spec.vector,))
            encoder = FeatureVectorEncoder(latent, spec.vector, scale)
            decoder = GaussianLatentDecoder(features, VectorHead(features, spec.vector), (spec.vector,), scale)
            return _VectorFeatures(encoder, decoder, self, (spec.vector,), pictures)
        if not spec.grid:
            raise ValueError(f'image_features: {self.model} gives no feature maps; expected form = "vector"')
        if self.components > spec.grid:
            raise ValueError(
                f"image_features: expected at most {spec.grid} components, the channels of {self.model}, found "
                f"{self.components}"
            )
        shape = (self.components, latent.height, latent.width)
        scale = Scale((self.components, 1, 1))
        grid_decoder = GaussianLatentDecoder(features, MapHead(features, self.components, 1), shape, scale)
        grid_encoder = LatentEncoder(latent, self.components, 1, scale, "image_features")
        return ImageFeaturesModality(grid_encoder, grid_decoder, self, shape, pictures)


@hookimpl
def mtdiffusion_modalities() -> list[type]:
    return [ImageFeaturesConfig]
