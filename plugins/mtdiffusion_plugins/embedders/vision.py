"""Frozen vision networks of the library timm, which turn pictures into features.

Weights come from the Hugging Face Hub or a file, as safetensors, and from nowhere else: a network with weights of its
own initialisation is never used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from mtdiffusion_plugins.embedders.open_clip import Preprocessing
from mtdiffusion_registry.errors import UserError, did_you_mean, first_line

_WEIGHTS = "model.safetensors"  # as timm calls them on the Hub
_PIXELS = 2**21  # of pictures that go through at once: 41 of 224 × 224


@frozen
class Place:
    """Which network, and where its weights are.

    Attributes:
        model: as timm names it, ``ARCHITECTURE`` or ``ARCHITECTURE.TAG``, or ``hf-hub:OWNER/NAME``.
        weights: a file of its weights; None: those that timm knows on the Hub.
        input_size: side of the picture that the network sees; None: the one it was trained for.
    """

    model: str
    weights: Path | None = None
    input_size: int | None = None


@frozen
class Spec:
    """What is known of a network without its weights.

    Attributes:
        grid: channels of its last feature map; 0: it gives none.
        vector: width of the features that it pools itself.
        size: height and width of the picture that it sees.
        hub: repository, revision and file of its weights on the Hub; None: none are known.
        classifier: names of its parts that tell classes, which are left out.
    """

    grid: int
    vector: int
    size: tuple[int, int]
    hub: tuple[str, str | None, str] | None
    classifier: tuple[str, ...]


@lru_cache
def read_spec(place: Place) -> Spec:
    """What is known of a network by its name; the configuration of one on the Hub is fetched.

    Raises:
        UserError: if there is none of this name, or it cannot see pictures of this size.
    """
    with torch.device("meta"):
        network = _create(place)
    config = network.pretrained_cfg
    maps = hasattr(network, "forward_intermediates")
    size: tuple[int, int] = tuple(config["input_size"][-2:])
    if place.input_size is not None:
        size = (place.input_size, place.input_size)
        step = network.feature_info[-1]["reduction"] if maps else 1
        if place.input_size % step:
            raise UserError(
                f"input_size: expected a multiple of {step}, the pixels that a place of the features of {place.model} "
                f"holds along a side; found {place.input_size}"
            )
    hub = None
    if config.get("hf_hub_id"):
        name, _, revision = config["hf_hub_id"].partition("@")
        hub = (name, revision or None, config.get("hf_hub_filename") or _WEIGHTS)
    classifier = config.get("classifier") or ()
    return Spec(
        grid=network.feature_info[-1]["num_chs"] if maps else 0,
        vector=getattr(network, "head_hidden_size", network.num_features),
        size=size,
        hub=hub,
        classifier=(classifier,) if isinstance(classifier, str) else tuple(classifier),
    )


def _create(place: Place, tensors: dict[str, Tensor] | None = None) -> Any:
    """The network without what tells classes; with tensors, of these weights, each of which must have its place.

    Raises:
        UserError: if there is none of this name.
    """
    import timm

    overlay = {"state_dict": tensors, "num_classes": 0, "classifier": None, "label_offset": 0, "custom_load": False}
    options: dict[str, Any] = {"num_classes": 0}
    if tensors is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {**overlay, "source": ""}}
    if place.input_size is not None and _fixed(place.model):
        options["img_size"] = place.input_size
    try:
        return timm.create_model(place.model, **options)
    except Exception as error:  # timm raises whatever its reading runs into
        if tensors is not None:
            raise
        raise _unknown(place.model, error) from error


@lru_cache
def _fixed(model: str) -> bool:
    """Whether a network is made for pictures of one size, which must be said when it is made."""
    with torch.device("meta"):
        return bool(_create(Place(model)).pretrained_cfg.get("fixed_input_size"))


def _unknown(model: str, error: Exception) -> UserError:
    import timm

    if model.startswith("hf-hub:"):
        return UserError(
            f"model = {model!r}: its configuration is not on this machine and could not be downloaded "
            f"({first_line(error)}). Run this once where there is a network and bring the Hub's cache here (the folder "
            "that HF_HOME names), or set model to a name of timm and weights to a file"
        )
    near = did_you_mean(model, timm.list_models(pretrained=True) + timm.list_models())
    return UserError(f"model = {model!r}: timm has no network of this name ({first_line(error)}){near}")


def weights_file(place: Place) -> Path:
    """The file of a network's weights; what is not here yet is downloaded.

    Raises:
        UserError: if there is none, or it cannot be downloaded; the message says how to get it.
    """
    if place.weights is not None:
        path = place.weights.expanduser()
        if not path.is_file() or path.suffix != ".safetensors":
            found = "another kind of file" if path.is_file() else "no file of this name"
            raise UserError(f"weights = {str(place.weights)!r}: expected a .safetensors file, found {found}")
        return path
    hub = read_spec(place).hub
    if hub is None:
        raise UserError(
            f"model = {place.model!r}: timm knows no weights of it on the Hugging Face Hub; set weights to a "
            ".safetensors file, or model to ARCHITECTURE.TAG (timm.list_models(pretrained=True) has them all)"
        )
    if not hub[2].endswith(".safetensors"):
        raise UserError(
            f"model = {place.model!r}: its weights on the Hub are {hub[2]}, and only safetensors are read; convert "
            "them, and set weights to the file"
        )
    return _downloaded(place.model, *hub)


@lru_cache  # the Hub is asked once in a process
def _downloaded(model: str, name: str, revision: str | None, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except Exception as error:  # of the network, the Hub or the disk: each has exceptions of its own
        raise UserError(
            f"model = {model!r}: its weights are not on this machine and could not be downloaded "
            f"({first_line(error)}). Where there is a network: hf download {name} {file} --local-dir FOLDER; then "
            f'bring that folder here and set weights = "FOLDER/{file}"'
        ) from error


class VisionNetwork:
    """A frozen network, on the GPU if there is one. Not an ``nn.Module``, so that its weights stay out of the
    checkpoints of its users."""

    def __init__(self, network: nn.Module, spec: Spec) -> None:
        from timm.data import resolve_model_data_config

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network: Any = network.float().eval().requires_grad_(False).to(device)
        self.spec = spec
        self.device = device
        config = resolve_model_data_config(network)
        bilinear = config["interpolation"] == "bilinear"
        # The whole picture is scaled to what the network sees, and nothing cropped: a grid lies on the picture.
        self.preprocess = Preprocessing(
            spec.size, config["mean"], config["std"], "bilinear" if bilinear else "bicubic", crop=False
        )

    def grids(self, pictures: Tensor) -> Iterator[Tensor]:
        """Feature maps ``[b, D, h, w]`` of pictures ``[B, 1 or 3, h, w]`` in [−1, 1], of a vision transformer the
        tokens of its patches behind its last norm; so many pictures at a time as fit into memory."""
        return self._parts(
            pictures,
            lambda x: self.network.forward_intermediates(
                x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )[-1],
        )

    def vectors(self, pictures: Tensor) -> Iterator[Tensor]:
        """Features ``[b, D]``, pooled as the network's own classifier would have them."""
        return self._parts(pictures, self.network)

    @torch.no_grad()
    def _parts(self, pictures: Tensor, features: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        count = max(_PIXELS // (self.spec.size[0] * self.spec.size[1]), 1)
        for part in torch.split(pictures, count):
            yield features(self.preprocess(part.to(self.device, torch.float32))).float()


def weights_key(place: Place) -> str:
    """What identifies a network's weights: where they are (of a download, by its commit), their size and time.

    Raises:
        UserError: if they are missing.
    """
    path = weights_file(place)
    # The link's own folder has the commit in its name; what it leads to has the size and time.
    return json.dumps(
        [place.model, place.input_size, str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns]
    )


def load_network(place: Place) -> VisionNetwork:
    """A network; one that was loaded before is not again, unless its file has changed.

    Raises:
        UserError: if its weights are missing, damaged or another network's.
    """
    return _load(place, weights_key(place))


@lru_cache(maxsize=2)
def _load(place: Place, _: str) -> VisionNetwork:
    from safetensors.torch import load_file

    spec, path = read_spec(place), weights_file(place)
    left_out = tuple(f"{name}." for name in spec.classifier)
    try:
        tensors = {name: value for name, value in load_file(path).items() if not name.startswith(left_out)}
        with torch.random.fork_rng(devices=[]):
            network = _create(place, tensors)
    except Exception as error:  # whatever a broken or foreign file makes timm, torch or safetensors say
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not the weights of {place.model} ({type(error).__name__}: {said})") from error
    network.pretrained_cfg["state_dict"] = None  # which would keep them twice
    return VisionNetwork(network, spec)
