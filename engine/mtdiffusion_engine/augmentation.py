"""Augmentation: training samples varied at random, what belongs together alike."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, le, lt, optional
from torch import Tensor

from mtdiffusion import Modality
from mtdiffusion_registry import UserError

_share = and_(ge(0.0), le(1.0))


@frozen
class AugmentationConfig:
    """How training samples are varied; by default not at all, and never in evaluation.

    Attributes:
        flip, vertical_flip: shares of the samples that are mirrored left to right, upside down.
        crop: least share of the area that is kept of a sample, cut out at random and scaled to its size again; None:
            all of it.
        aspect: by how much the cut-out's aspect may differ from 1, up to this factor either way.
        brightness, contrast, saturation: factors of a picture's colours are drawn from 1 − x to 1 + x.
        hue: shift, in shares of the colour circle, is drawn from −x to x.
    """

    flip: float = field(default=0.0, validator=_share)
    vertical_flip: float = field(default=0.0, validator=_share)
    crop: float | None = field(default=None, validator=optional(and_(gt(0.0), le(1.0))))
    aspect: float = field(default=4 / 3, validator=and_(ge(1.0), lt(math.inf)))
    brightness: float = field(default=0.0, validator=_share)
    contrast: float = field(default=0.0, validator=_share)
    saturation: float = field(default=0.0, validator=_share)
    hue: float = field(default=0.0, validator=and_(ge(0.0), le(0.5)))

    @property
    def moving(self) -> bool:
        """Whether places of a sample are moved."""
        return self.flip > 0 or self.vertical_flip > 0 or self.crop is not None

    @property
    def colouring(self) -> bool:
        """Whether colours are varied."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0


@frozen
class Augmentation:
    """The augmentation of samples with certain modalities. It holds no module, so that any process can be given it.

    Attributes:
        moves: how each modality that shows places is moved: "image" or "mask".
        coloured: modalities whose colours are varied.
    """

    config: AugmentationConfig
    moves: Mapping[str, str]
    coloured: tuple[str, ...]

    @property
    def blended(self) -> set[str]:
        """Modalities whose values are computed anew, not only moved."""
        cropped = (
            {name for name, how in self.moves.items() if how == "image"} if self.config.crop is not None else set()
        )
        return cropped | set(self.coloured if self.config.colouring else ())

    @classmethod
    def of(cls, config: AugmentationConfig, modalities: Mapping[str, Modality]) -> Augmentation | None:
        """For these modalities; None if nothing is to be varied.

        Raises:
            UserError: if a modality would no longer belong to the others.
        """
        if not (config.moving or config.colouring):
            return None
        moves = {name: modality.moves for name, modality in modalities.items() if modality.moves is not None}
        for name, modality in modalities.items():
            if modality.derived:
                raise UserError(
                    f"augmentation: {name} is computed once from {modality.field}, so it would not belong to a picture "
                    f"that is varied at each turn; leave augmentation out, or {name}"
                )
            if config.moving and modality.encoder.spatial and name not in moves:
                raise UserError(
                    f"augmentation: {name} has places but does not say how they are to be moved (Modality.moves), so "
                    "it would not lie on the others; leave flip, vertical_flip and crop out"
                )
        return cls(config, moves, tuple(name for name, modality in modalities.items() if modality.coloured))

    def __call__(self, sample: Mapping[str, Tensor | str], seed: int) -> dict[str, Tensor | str]:
        """A varied sample, which follows from the sample and the seed.

        Raises:
            UserError: if what is to be cropped alike is not of one size.
        """
        from torchvision.transforms import v2  # slow to import, and most runs do without

        varied = dict(sample)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # transforms draw from the global generator
            places = {name: x for name in self.moves if isinstance(x := varied.get(name), Tensor)}
            if self.config.moving:
                varied |= self._moved(places)
            if self.config.colouring:
                config = self.config
                colours = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
                for name in self.coloured:
                    if isinstance(x := varied.get(name), Tensor):
                        varied[name] = colours((x + 1) / 2).clamp(0, 1) * 2 - 1
        return varied

    def _moved(self, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self.config
        across, down = (bool(torch.rand(()) < share) for share in (config.flip, config.vertical_flip))
        cut = self._cut(places) if config.crop is not None and places else None
        moved = {}
        for name, x in places.items():
            if cut is not None:
                x = self._cropped(name, x, cut)
            if across:
                x = x.flip(-1)
            if down:
                x = x.flip(-2)
            moved[name] = x.contiguous()
        return moved

    def _cut(self, places: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
        """Top, left, height and width of what is kept."""
        from torchvision.transforms import v2

        if len({x.shape[-2:] for x in places.values()}) > 1:
            shown = ", ".join(f"{name} {list(x.shape[-2:])}" for name, x in places.items())
            raise UserError(f"augmentation.crop: expected all that is cropped alike in one size, found {shown}")
        config, aspect = self.config, self.config.aspect
        assert config.crop is not None
        draw = v2.RandomResizedCrop((1, 1), scale=(config.crop, 1.0), ratio=(1 / aspect, aspect))
        found = draw.make_params([next(iter(places.values()))])
        return found["top"], found["left"], found["height"], found["width"]

    def _cropped(self, name: str, x: Tensor, cut: tuple[int, int, int, int]) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        part = F.crop_image(x if x.ndim > 2 else x[None], *cut)
        # Nearest by pixel centres, as pictures are scaled: what torchvision does to masks is off by half a pixel.
        blended = self.moves[name] == "image"
        how = InterpolationMode.BILINEAR if blended else InterpolationMode.NEAREST_EXACT
        scaled: Tensor = F.resize_image(part, list(x.shape[-2:]), interpolation=how, antialias=blended)
        return scaled.reshape(x.shape).to(x.dtype)
