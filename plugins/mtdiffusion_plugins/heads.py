"""Parts that several modalities share: heads on the backbone's features, a Gaussian likelihood, and vector codes."""

from __future__ import annotations

import math

import torch
from attrs import fields_dict
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import Encoder, FeatureSpec, LatentSpec
from mtdiffusion.precision import widened
from mtdiffusion_plugins.sizes import Size, by
from mtdiffusion_registry.configs import DataField

_LOG_SCALE = (-6.0, 2.0)


class MapHead(nn.Module):
    """A convolution from the feature map to ``[B, out, H·p, W·p]``; patches of p × p fill one place of the latent."""

    def __init__(self, features: FeatureSpec, out: int, patch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features.channels, out * patch**2, 3, padding=1)
        self.patch = patch
        nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, feature_map: Tensor) -> Tensor:
        patches, p = self.conv(feature_map), self.patch
        b, _, h, w = patches.shape
        # A pixel shuffle. nn.PixelShuffle leaves channels last where they are, and likelihoods copy what it returns.
        return patches.reshape(b, -1, p, p, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, -1, h * p, w * p)


class VectorHead(nn.Module):
    """A small perceptron from the feature vector to ``[B, out]``."""

    def __init__(self, features: FeatureSpec, out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features.vector, features.vector), nn.SiLU(), nn.Linear(features.vector, out)
        )

    def forward(self, vector: Tensor) -> Tensor:
        return self.net(vector)


class ScaleHead(nn.Module):
    """log of the standard deviation of a Gaussian head, one a sample: ``[B, 1]``.

    It reads the features without sending gradients back, so that a calibrated likelihood costs the mean nothing.
    """

    def __init__(self, features: FeatureSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(features.vector, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, -1.0)

    def forward(self, vector: Tensor) -> Tensor:
        return self.linear(vector.detach())


def scale_of(log_scale: Tensor, like: Tensor) -> Tensor:
    """σ ``[B, 1, ...]`` from an unconstrained log scale ``[B, 1]``."""
    return log_scale.clamp(*_LOG_SCALE).exp().reshape(-1, *[1] * (like.ndim - 1))


def gaussian_objective(mean: Tensor, log_scale: Tensor, x: Tensor) -> Tensor:
    """½ mean squared error e ``[B]``, plus a little of the Gaussian nll as a function of the scale alone.

    That function, ½ e/σ² + log σ, can be negative; less its least value, at σ² = e, it is ½ (e/σ² − 1 − log(e/σ²)).
    """
    error = (x - mean).square().flatten(1).mean(1)
    known = error.detach()
    log_ratio = known.clamp(min=torch.finfo(known.dtype).tiny).log() - 2 * log_scale.clamp(*_LOG_SCALE)[:, 0]
    return 0.5 * error + 0.005 * (torch.expm1(log_ratio) - log_ratio)


def discretised_gaussian_nll(mean: Tensor, log_scale: Tensor, x: Tensor, levels: int) -> Tensor:
    """−log P(x) of x on ``levels`` evenly spaced values in [−1, 1], in nats: ``[B]``.

    The Gaussian's mass in the bin around each value; the outermost bins reach to infinity (Ho et al. 2020).
    """
    sigma = widened(scale_of(log_scale, mean))
    half = 1.0 / (levels - 1)
    centred = widened(x - mean)
    low = torch.where(x <= -1 + half, -math.inf, (centred - half) / sigma)
    high = torch.where(x >= 1 - half, math.inf, (centred + half) / sigma)
    # Φ(high) − Φ(low), taken in the left tail, where it loses no digits.
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_high = torch.special.log_ndtr(high)
    gap = torch.special.log_ndtr(low) - log_high
    log_mass = log_high + torch.log1p(-torch.exp(gap.clamp(max=-1e-12)))
    return -log_mass.flatten(1).sum(1).to(mean.dtype)


def unit_directions(count: int, dim: int, seed: int) -> Tensor:
    """Fixed unit vectors ``[count, dim]`` in float64: orthonormal while count ≤ dim, else random directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(max(count, 1), dim, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(directions.T).Q.T if count <= dim else F.normalize(directions, dim=1)


class VectorEncoder(Encoder):
    """A fixed isometry from ``[B, D]`` into the whole latent share: a vector of norm 1 becomes a code of RMS 1.

    The rows of the map are orthonormal while D fits into c·H·W (beyond that, random unit directions), and its adjoint
    is the read-out. A fixed code cannot shrink to please L1.
    """

    def __init__(self, latent: LatentSpec, dim: int, seed: int = 0) -> None:
        super().__init__(latent)
        self.register_buffer("directions", unit_directions(dim, latent.numel, seed).float().contiguous())
        self.directions: Tensor
        self.readout_dim = dim

    def vector_code(self, vector: Tensor) -> Tensor:
        """The code ``[B, c, H, W]`` of a vector ``[B, D]``."""
        return self.placed(vector @ self.directions)

    def placed(self, direction: Tensor) -> Tensor:
        """The code ``[B, c, H, W]`` of a unit direction ``[B, c·H·W]``."""
        return (direction * math.sqrt(self.latent.numel)).reshape(-1, *self.latent.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.vector_code(x)

    def readout(self, z: Tensor) -> Tensor:
        return z.flatten(1) @ self.directions.T / math.sqrt(self.latent.numel)


def picture_size(kind: str, size: Size, latent: LatentSpec) -> tuple[int, int, int]:
    """Height and width of the pictures that fill a latent, and the side p of the patch that one of its places holds.

    Args:
        size: height and width; or one number, the height, and the width follows from the latent's shape.

    Raises:
        ValueError: if they are not the same whole multiple of the latent's height and width.
    """
    if isinstance(size, int):
        patch = size // latent.height
        sizes = (size, latent.width * patch)
    else:
        patch = size[0] // latent.height
        sizes = size
    if patch < 1 or sizes != (latent.height * patch, latent.width * patch):
        shown = f"{size}" if isinstance(size, int) else by(size)
        raise ValueError(
            f"{kind}: size {shown} does not fit a latent of {latent.height} × {latent.width} (height × width); "
            "expected the same whole multiple of both (set latent.height and latent.width, or size = [height, width])"
        )
    return (*sizes, patch)


def patch_channels(size: Size, height: int, width: int) -> int:
    """Places of a picture that one place of a latent holds, where they fit: p²."""
    tall, wide = (size, None) if isinstance(size, int) else size
    down = max(tall // height, 1)
    return down * (down if wide is None else max(wide // width, 1))


def with_spare(code: Tensor, spare: int, value: float = 0.0) -> Tensor:
    """A code ``[B, c, H, W]`` with so many channels more, of one value."""
    return F.pad(code, (0, 0, 0, 0, 0, spare), value=value) if spare else code  # by nothing, it would still copy


def check_channels(kind: str, latent: LatentSpec, needed: int) -> None:
    """Raise ``ValueError`` if the latent share does not have the channels a code needs."""
    if latent.channels < needed:
        raise ValueError(
            f"{kind}: its code needs {needed} channels of {latent.height} × {latent.width}, found {latent.channels}"
        )


SIZE_HINT = "; set size of the modality to the data's, or size of the data set to scale and crop them"


def size_hint(x: Tensor, shape: tuple[int, ...]) -> str:
    """What to change where sides alone differ from those of ``[B, *shape]``; "" where something else does."""
    return SIZE_HINT if x.ndim == len(shape) + 1 and tuple(x.shape[-2:]) != shape[-2:] else ""


def picture_hint(x: Tensor, shape: tuple[int, int, int], field: object, *, settable: bool = True) -> str:
    """What to change where pictures are not ``[B, *shape]``: whichever differs, their sides, their channels or both.

    Args:
        field: the data set's, as :attr:`mtdiffusion.Modality.data_field`; None where it cannot be configured.
        settable: whether the modality can be told to have other channels.
    """
    if x.ndim != 4 or x.shape[1] == shape[0] or x.shape[1] not in (1, 3):
        return size_hint(x, shape)
    remedies = [f"channels = {x.shape[1]} of the modality"] if settable else []
    if isinstance(field, DataField) and "channels" in fields_dict(type(field.config)):
        told = f'{{ kind = "{field.config.kind}", channels = {shape[0]} }}'
        remedies.append(f"channels = {shape[0]} of its field in data.fields: {told}")
    return (f"; set {', or '.join(remedies)}" if remedies else "") + size_hint(x, shape)


def check_batch(what: str, x: Tensor, shape: tuple[int, ...], *, floating: bool, hint: str = "") -> None:
    """Raise ``ValueError`` unless x is ``[B, *shape]``, floating and finite or else int64, as asked."""
    kind = "a floating-point dtype" if floating else "int64"
    check_shape(what, x, shape, hint)
    if x.is_floating_point() != floating or (not floating and x.dtype != torch.int64):
        raise ValueError(f"{what}: expected {kind}, found {x.dtype}")
    if floating and not bool(x.isfinite().all()):
        bad = (~x.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist()
        raise ValueError(f"{what}: expected finite values, found NaN or infinity in samples {bad[:5]} of the batch")


def check_shape(what: str, x: Tensor, shape: tuple[int, ...], hint: str = "") -> None:
    """Raise ``ValueError`` unless x is ``[B, *shape]``."""
    if tuple(x.shape[1:]) != shape or x.ndim != len(shape) + 1:
        raise ValueError(
            f"{what}: expected shape [batch{''.join(f', {n}' for n in shape)}], found {list(x.shape)}{hint}"
        )


def check_range(what: str, x: Tensor, low: float, high: float) -> None:
    """Raise ``ValueError`` if x leaves [low, high]."""
    if x.numel() and (float(x.min()) < low or float(x.max()) > high):
        raise ValueError(f"{what}: expected values from {low:g} to {high:g}, found {extent(x)}")


def extent(x: Tensor) -> str:
    """From which value to which x goes, for errors: "0.5 to 2", or "2" where all are alike."""
    least, most = float(x.min()), float(x.max())
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"
