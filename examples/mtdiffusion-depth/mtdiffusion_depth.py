"""Depth maps: dense regression in log depth, a Laplace likelihood, pixels without a measurement.

``x`` is float32 ``[B, 1, height, width]`` in metres; 0 means "not measured". A measured depth d has the standardised
log depth ``u = (log d - log median) / spread``, whose distribution given the features is Laplace: the depth itself is
then log-Laplace, with tails that fall like a power of d, so that an edge one pixel off does not ruin the fit.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import ge, gt
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Decoder, Encoder, Features, FeatureSpec, LatentSpec, Modality, Params
from mtdiffusion_registry import ModalityConfig, UserError, hookimpl

MTDIFFUSION_API = 1

MILLIMETRE = 0.001
LOG_SCALE = (-5.0, 2.0)
# Near to far, from warm and light to cold and dark; between them colours are interpolated in log depth.
NEAR_TO_FAR = ((1.0, 0.95, 0.7), (0.98, 0.62, 0.25), (0.8, 0.25, 0.35), (0.4, 0.12, 0.5), (0.1, 0.08, 0.35))


class DepthEncoder(Encoder):
    """Standardised log depth; each p x p patch becomes the channels of one place. Unmeasured pixels have code 0."""

    spatial = True

    def __init__(self, latent: LatentSpec, config: DepthConfig) -> None:
        super().__init__(latent)
        self.patch = config.patch(latent.height, latent.width)
        self.spare = latent.channels - self.patch**2
        if self.spare < 0:
            raise ValueError(f"depth: its code needs {self.patch**2} channels, found {latent.channels}")
        self.standardise = config.standardise

    def forward(self, x: Tensor) -> Tensor:
        return self.code(torch.where(x > 0, self.standardise(x), 0.0))

    def code(self, u: Tensor) -> Tensor:
        """The code ``[B, c, H, W]`` of standardised log depths ``[B, 1, h, w]``: linear."""
        return F.pad(F.pixel_unshuffle(u, self.patch), (0, 0, 0, 0, 0, self.spare))


class LaplaceDecoder(Decoder):
    """p(x | h): u ~ Laplace(location, scale) at every pixel, independent given the features."""

    def __init__(self, features: FeatureSpec, config: DepthConfig) -> None:
        super().__init__()
        patch = config.patch(features.height, features.width)
        self.conv = nn.Conv2d(features.channels, 2 * patch**2, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        self.shuffle = nn.PixelShuffle(patch)
        self.config = config
        self.dims = config.height * config.width

    def forward(self, features: Features) -> Params:
        location, log_scale = self.shuffle(self.conv(features.map)).chunk(2, 1)
        return {"location": location, "log_scale": log_scale}

    def _pixelwise(self, params: Params, x: Tensor) -> Tensor:
        """-log p(u) of the measured pixels and 0 at the others: ``[B, 1, h, w]``."""
        log_scale = params["log_scale"].clamp(*LOG_SCALE)
        error = (self.config.standardise(x) - params["location"]).abs()
        return torch.where(x > 0, error * torch.exp(-log_scale) + log_scale + math.log(2), 0.0)

    def nll(self, params: Params, x: Tensor) -> Tensor:
        """Of the measured depths, as a density per metre: with du/dd = 1 / (spread · d)."""
        jacobian = torch.where(x > 0, math.log(self.config.spread) + x.clamp(min=MILLIMETRE).log(), 0.0)
        return (self._pixelwise(params, x) + jacobian).flatten(1).sum(1)

    def dims_of(self, x: Tensor) -> Tensor:
        """The measured pixels."""
        return (x > 0).flatten(1).sum(1)

    def objective(self, params: Params, x: Tensor) -> Tensor:
        """Mean over the measured pixels of -log p(u): a picture with few of them counts as much as any; 0 if none."""
        return self._pixelwise(params, x).flatten(1).sum(1) / self.dims_of(x).clamp(min=1)

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        assert isinstance(encoder, DepthEncoder)
        return encoder.code(params["location"])  # the mean of a Laplace is its location, and the code is linear in u

    def mode(self, params: Params) -> Tensor:
        """The depth at the most likely log depth, which is also the median depth."""
        return self.config.depth(params["location"])

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        location = params["location"]
        device = location.device if generator is None else generator.device
        uniform = torch.rand(location.shape, dtype=location.dtype, device=device, generator=generator)
        centred = (
            uniform.to(location.device) - 0.5
        )  # in [-0.5, 0.5): the inverse of the Laplace's distribution function
        noise = -centred.sign() * torch.log1p((-2 * centred.abs()).clamp(min=-1 + 1e-7))
        return self.config.depth(location + params["log_scale"].clamp(*LOG_SCALE).exp() * noise)


class DepthModality(Modality):
    metric_directions = MappingProxyType({"abs_rel": "lower", "rmse": "lower", "delta1": "higher"})
    snr_clamp = (0.05, 5.0)

    def __init__(self, encoder: Encoder, decoder: Decoder, config: DepthConfig) -> None:
        super().__init__(encoder, decoder)
        self.config = config
        self.field = config.field
        self.loss_weight = config.loss_weight

    def check(self, x: Tensor) -> None:
        shape = [1, self.config.height, self.config.width]
        if list(x.shape[1:]) != shape or x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"depth: expected floating point [batch, {shape}], found {x.dtype} of {list(x.shape)}")
        low, high = self.config.low, self.config.high
        slack = MILLIMETRE / 2  # what rounding to millimetres, as files do, may add
        if not bool(((x == 0) | ((x >= low - slack) & (x <= high + slack))).all()):
            raise ValueError(
                f"depth: expected metres from {low:g} to {high:g}, or 0 where nothing was measured, found "
                f"{float(x.min()):g} to {float(x.max()):g}; set low and high, or convert the units"
            )

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1, self.config.height, self.config.width)

    def render(self, x: Tensor) -> Tensor:
        """Near is light and warm, far is dark and cold, over +-2.5 spreads about the median; unmeasured is black."""
        ramp = torch.tensor(NEAR_TO_FAR, dtype=x.dtype, device=x.device)
        place = ((self.config.standardise(x) / 5 + 0.5).clamp(0, 1) * (len(ramp) - 1))[:, 0]
        below = place.floor().clamp(max=len(ramp) - 2).long()
        share = (place - below)[..., None]
        colour = ramp[below] * (1 - share) + ramp[below + 1] * share
        return torch.where(x > 0, colour.permute(0, 3, 1, 2), 0.0).clamp(0, 1)

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """Over all pixels that are measured in the truth (Eigen et al. 2014); nothing if there is none.

        ``abs_rel``: mean of |error| / truth; ``rmse``: in metres; ``delta1``: share within a factor of 1.25.
        """
        measured = truth > 0
        if not bool(measured.any()):
            return {}
        g, d = generated[measured].double(), truth[measured].double()
        ratio = torch.maximum(g / d, d / g.clamp(min=1e-9))
        return {
            "abs_rel": ((g - d).abs() / d).mean().item(),
            "rmse": (g - d).square().mean().sqrt().item(),
            "delta1": (ratio < 1.25).double().mean().item(),
        }

    def parse(self, text: str) -> Tensor:
        """A 16-bit PNG in millimetres, or a .npy file in metres; 0 is "not measured" in both."""
        path = Path(text)
        try:
            if path.suffix == ".npy":
                metres = torch.from_numpy(np.load(path, allow_pickle=False)).float()
            else:
                with Image.open(path) as picture:
                    if not picture.mode.startswith("I"):
                        raise UserError(f"{path}: expected a PNG of 16 bits, in millimetres, found mode {picture.mode}")
                    metres = torch.from_numpy(np.asarray(picture).astype(np.float32)) * MILLIMETRE
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; depth is given as a 16-bit PNG or a .npy file") from None
        except (UnidentifiedImageError, OSError, TypeError, EOFError) as error:
            raise UserError(f"{path}: cannot be read as a depth map ({error})") from None
        metres = metres.reshape(1, *metres.shape[-2:]) if metres.ndim in (2, 3) and len(metres) else metres
        try:
            self.check(metres[None])
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return metres

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        path = folder / f"{stem}.png"
        millimetres = (x[0].double().cpu() / MILLIMETRE).round().numpy().astype(np.uint16)
        Image.fromarray(millimetres).save(path)
        return path


@frozen
class DepthConfig(ModalityConfig):
    """A depth map in metres, float32 ``[B, 1, height, width]``; 0 where nothing was measured.

    Attributes:
        height, width: in pixels; multiples of the latent's, by one factor.
        low, high: the range of measured depths in metres, within what 16 bits of millimetres can hold.
        median: of the depths over the data, about, in metres.
        spread: standard deviation of log depth over the data, about.
        loss_weight: λ of its part of L2.
        field: the data set's field; None: the instance's name.
    """

    kind: ClassVar[str] = "depth"
    height: int = field(validator=ge(1))
    width: int = field(validator=ge(1))
    low: float = field(default=0.1, validator=ge(MILLIMETRE))
    high: float = field(default=65.0)
    median: float = field(default=2.0, validator=gt(0.0))
    spread: float = field(default=0.5, validator=gt(0.0))
    loss_weight: float = field(default=1.0, validator=gt(0.0))
    field: str | None = None

    @high.validator
    def _range(self, _: object, value: float) -> None:
        if not self.low < value <= 65.535:
            raise ValueError(
                f"'high': expected more than low = {self.low:g} and at most 65.535 metres, found {value:g}"
            )

    def standardise(self, x: Tensor) -> Tensor:
        """u of depths in metres; finite, and of no meaning, where x is 0."""
        return (x.clamp(min=MILLIMETRE).log() - math.log(self.median)) / self.spread

    def depth(self, u: Tensor) -> Tensor:
        """Metres of standardised log depths, within the range."""
        # Clipped before the exponential, which the tails of a sample would overflow.
        low, high = math.log(self.low), math.log(self.high)
        return (u * self.spread + math.log(self.median)).clamp(low, high).exp()

    def patch(self, height: int, width: int) -> int:
        """Side of the square patch that one place of a latent of this size holds.

        Raises:
            ValueError: if the picture is not a whole multiple of it, alike in both directions.
        """
        side = self.height // height
        if side < 1 or (side * height, side * width) != (self.height, self.width):
            raise ValueError(
                f"depth: a map of {self.height} × {self.width} does not fit a latent of {height} × {width}; expected "
                "a multiple of it, alike in both directions (set latent.height and latent.width)"
            )
        return side

    def latent_channels(self, height: int, width: int) -> int:
        return self.patch(height, width) ** 2

    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        return DepthModality(DepthEncoder(latent, self), LaplaceDecoder(features, self), self)


@hookimpl
def mtdiffusion_modalities() -> list[type[ModalityConfig]]:
    return [DepthConfig]
