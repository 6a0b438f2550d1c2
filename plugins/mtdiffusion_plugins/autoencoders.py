"""Frozen autoencoders of the library diffusers, which turn pictures into small latents and back.

Weights come from the Hugging Face Hub or a folder, as safetensors, and from nowhere else: a network with weights of its
own initialisation is never used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from mtdiffusion_registry.errors import UserError, first_line

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
"""What diffusers' ``save_pretrained`` calls an autoencoder's files."""

_BLOCKS = {
    "AutoencoderKL": ("block_out_channels", 64),
    "AutoencoderTiny": ("encoder_block_out_channels", (64, 64, 64, 64)),
    "AutoencoderDC": ("encoder_block_out_channels", (128, 256, 512, 512, 1024, 1024)),
}
"""By class: the key of its configuration that has an entry for each resolution, and what it is by default."""
_SCALES = {"AutoencoderKL": 0.18215}
"""The ``scaling_factor`` that diffusers assumes of a class where a configuration states none; of the others 1."""
_CHANNELS = {"AutoencoderDC": 32}
"""Its ``latent_channels``, likewise; of the others 4."""
_PIXELS = 2**20  # of pictures that go through at once: 16 of 256 × 256


@frozen
class Place:
    """Where an autoencoder is.

    Attributes:
        name: ``OWNER/NAME`` on the Hub, or a folder.
        subfolder: of it, in which the autoencoder's files are.
        revision: branch, tag or commit on the Hub.
    """

    name: str | Path
    subfolder: str | None = None
    revision: str | None = None

    def folder(self) -> Path:
        """The folder of the autoencoder's two files; what is not here yet is downloaded.

        Raises:
            UserError: if there are none, or they cannot be downloaded; the message says how to get them.
        """
        if isinstance(self.name, Path) and not self.name.is_dir():
            raise UserError(
                f"autoencoder = {str(self.name)!r}: expected a folder, and there is none of this name, or OWNER/NAME "
                "on the Hugging Face Hub"
            )
        root = self.name if isinstance(self.name, Path) else _downloaded(self.name, self.subfolder, self.revision)
        folder = root / (self.subfolder or "")
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise UserError(
                    f"autoencoder = {str(self.name)!r}: expected {CONFIG} and {WEIGHTS}, as diffusers' save_pretrained "
                    f"writes them, found no {file} in {folder} (a model with several parts has them in a subfolder, "
                    'often subfolder = "vae")'
                )
        return folder


@lru_cache  # the Hub is asked once in a process
def _downloaded(name: str, subfolder: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=[prefix + CONFIG, prefix + WEIGHTS])
    except Exception as error:  # of the network, the Hub or the disk: each has exceptions of its own
        raise UserError(
            f"autoencoder = {name!r}: its weights are not on this machine and could not be downloaded "
            f"({first_line(error)}). Where there is a network: hf download {name} {prefix}{CONFIG} {prefix}{WEIGHTS} "
            '--local-dir FOLDER; then bring that folder here and set autoencoder = "FOLDER"'
        ) from error
    return Path(found)


@frozen
class Spec:
    """What an autoencoder's configuration says of its pictures and latents.

    Attributes:
        kind: its class in diffusers.
        pictures: channels of a picture, 1 or 3.
        channels: of a latent.
        factor: pixels, along a side, that one place of a latent stands for.
        scale: mean and standard deviation of its latents, a number for each channel, by the factors of the
            configuration; None: it states none.
    """

    kind: str
    pictures: int
    channels: int
    factor: int
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None


def read_spec(place: Place) -> Spec:
    """What an autoencoder's configuration says.

    Raises:
        UserError: if it is missing or damaged, or of another class.
    """
    path = place.folder() / CONFIG
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = values["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as the configuration of an autoencoder ({error!r})") from None
    if kind not in _BLOCKS:
        raise UserError(f"{path}: expected one of {', '.join(_BLOCKS)}, found _class_name = {kind!r}")
    key, default = _BLOCKS[kind]
    blocks = values.get(key, default)
    channels = values.get("latent_channels", _CHANNELS.get(kind, 4))
    pictures = values.get("in_channels", 3)
    if pictures not in (1, 3) or values.get("out_channels", pictures) != pictures:
        raise UserError(f"{path}: expected pictures of 1 or 3 channels in and out, found in_channels = {pictures}")
    resolutions = len(blocks) if isinstance(blocks, list | tuple) else 1
    return Spec(kind, pictures, channels, 2 ** (resolutions - 1), _scale(values, kind, channels))


def _scale(values: dict[str, Any], kind: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of latents by channel, as diffusers' pipelines undo them: (z − shift) · factor, or
    (z − mean) · factor / std where a configuration has those by channel; None where it has neither."""
    factor = values.get("scaling_factor") or _SCALES.get(kind, 1.0)
    mean, std = values.get("latents_mean"), values.get("latents_std")
    shift = values.get("shift_factor") or 0.0
    if mean and std:
        return tuple(map(float, mean)), tuple(value / factor for value in std)
    if factor == 1.0 and shift == 0.0:
        return None
    return (float(shift),) * channels, (1 / factor,) * channels


class Autoencoder:
    """A frozen autoencoder, on the GPU if there is one. Not an ``nn.Module``, so that its weights stay out of the
    checkpoints of its users."""

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = model.float().eval().requires_grad_(False).to(device)
        self.spec = spec
        self.device = device

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Latents ``[B, c, h / factor, w / factor]`` on the CPU of pictures ``[B, C, h, w]`` in [−1, 1]; of a
        variational autoencoder the means."""
        height, width = (size // self.spec.factor for size in pictures.shape[-2:])
        latents = torch.empty(len(pictures), self.spec.channels, height, width)
        for rows in self._parts(len(pictures), height, width):
            out = self.model.encode(pictures[rows].to(self.device, torch.float32))
            latents[rows] = out.latent_dist.mode() if self.spec.kind == "AutoencoderKL" else out[0]
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``[B, C, h, w]`` in [−1, 1] on the CPU of latents."""
        height, width = latents.shape[-2:]
        sides = height * self.spec.factor, width * self.spec.factor
        pictures = torch.empty(len(latents), self.spec.pictures, *sides)
        for rows in self._parts(len(latents), height, width):
            pictures[rows] = self.model.decode(latents[rows].to(self.device, torch.float32)).sample.clamp(-1, 1)
        return pictures

    def _parts(self, count: int, height: int, width: int) -> Iterator[slice]:
        """As many at a time as fit into memory, of latents of this height and width."""
        size = max(_PIXELS // (height * width * self.spec.factor**2), 1)
        return (slice(start, start + size) for start in range(0, count, size))


def require_diffusers(what: str = "an autoencoder") -> None:
    """Raise :class:`UserError`, by what needs it, if diffusers is not installed."""
    if find_spec("diffusers") is None:
        raise UserError(
            f'{what} needs the library diffusers, which is not installed; install it: pip install "mtdiffusion[latent]"'
        )


def load_autoencoder(place: Place) -> Autoencoder:
    """An autoencoder; one that was loaded before is not again, unless its files have changed.

    Raises:
        UserError: if diffusers is not installed, or its files are missing, damaged or of another class.
    """
    require_diffusers()
    return _load(place, weights_key(place))


def weights_key(place: Place) -> str:
    """What identifies an autoencoder's files: where they are (of a download, by its commit), their sizes and times.

    Raises:
        UserError: if they are missing.
    """
    folder = place.folder().resolve()
    stats = [(folder / file).stat() for file in (CONFIG, WEIGHTS)]
    return json.dumps([str(folder), *((stat.st_size, stat.st_mtime_ns) for stat in stats)])


@lru_cache(maxsize=2)
def _load(place: Place, _: str) -> Autoencoder:
    import diffusers

    spec, folder = read_spec(place), place.folder()
    try:
        model, loaded = getattr(diffusers, spec.kind).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers raises whatever its reading runs into
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: cannot be read as {spec.kind} ({type(error).__name__}: {said})") from error
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if wrong := loaded[what]:
            # diffusers would leave these as they were initialised.
            shown = ", ".join(str(each) for each in list(wrong)[:3])
            raise UserError(f"{folder / WEIGHTS}: not the weights of the {spec.kind} in {CONFIG} ({what}: {shown})")
    return Autoencoder(model, spec)
