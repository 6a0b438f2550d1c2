"""Where what takes long to make is kept between runs: decoded pictures, embeddings, judges. It can all go.

Whatever is kept is named by a key of all that it is made from, so that nothing stale is read, and written whole.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from mtdiffusion_registry.configs import Config

if TYPE_CHECKING:
    from torch import Tensor

CACHE_VARIABLE = "MTDIFFUSION_CACHE"


def cache_folder() -> Path:
    """The folder, made if need be: what the environment variable ``MTDIFFUSION_CACHE`` says, or ``mtdiffusion`` in the
    user's cache (``XDG_CACHE_HOME``, else ``~/.cache``); where that cannot be written, one in the folder of temporary
    files."""
    named = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(named or Path(home) / "mtdiffusion").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        fallback = Path(tempfile.gettempdir()) / f"mtdiffusion-cache-{os.getuid()}"
        fallback.mkdir(parents=True, exist_ok=True)
        return fallback


def cached(name: str) -> Path:
    """The place of something kept, ``KIND/KEY.suffix``; its folder is there."""
    path = cache_folder() / name
    path.parent.mkdir(exist_ok=True)
    return path


def load_kept(path: Path) -> dict[str, Tensor] | None:
    """Tensors that :func:`save_kept` kept; None if there are none, or they are damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def save_kept(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors, all of them or none; where there is no room, none."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(path)
    except (OSError, SafetensorError):
        partial.unlink(missing_ok=True)


def config_key(config: Config) -> str:
    """What identifies a config and the code behind it: its kind and values, the files they name, its module's file and
    its distribution's version. Of a class without a file (made in a notebook), nothing lasting: this process."""
    values = attrs.asdict(config)
    files = [_stat(value) for value in _texts(values)]
    return json.dumps([config.group, config.kind, values, files, code_key(type(config))], default=str, sort_keys=True)


def code_key(cls: type) -> str:
    """What identifies a class's code: the size and time of its module's file, and its distribution's version."""
    try:
        written = _stat(inspect.getfile(cls))
    except (OSError, TypeError):
        written = [os.getpid(), id(cls)]
    owners = packages_distributions().get(cls.__module__.partition(".")[0], [])
    return f"{cls.__module__}.{cls.__qualname__} {written} {[version(owner) for owner in owners]}"


def _texts(value: Any) -> list[str]:
    if isinstance(value, str | os.PathLike):
        return [os.fspath(value)]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in _texts(item)]


def _stat(path: str) -> list[int]:
    """Size and time of a file; [] if there is none of this name."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return []
    return [found.st_size, found.st_mtime_ns]
