"""Where results that can be made again are kept between commands: decoded pictures, embeddings, judges.

Whatever is kept is named by a key of all that it is made from, so that nothing stale is read, and written whole.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from mtdiffusion_registry.configs import Config

if TYPE_CHECKING:
    from torch import Tensor

CACHE_VARIABLE = "MTDIFFUSION_CACHE"
"""Environment variable that names the cache folder."""


def cache_folder() -> Path:
    """The folder for what can be made again; it exists and can be written.

    It is ``$MTDIFFUSION_CACHE``; if that is not set ``mtdiffusion`` in ``$XDG_CACHE_HOME`` or, if that is not set
    either, in ``~/.cache`` (XDG Base Directory Specification). Where that cannot be made or written, it is a temporary
    folder of this process, gone when the process ends: a cache saves time and is never a reason to fail.
    """
    try:
        folder = _wanted()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not tell: a file system may be read-only
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return Path(_temporary().name)


def _wanted() -> Path:
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the specification has relative ones ignored
    return (base if base.is_absolute() else Path.home() / ".cache") / "mtdiffusion"


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mtdiffusion-cache-", ignore_cleanup_errors=True)


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
    owners = _owners(tuple(sys.path)).get(cls.__module__.partition(".")[0], [])
    return f"{cls.__module__}.{cls.__qualname__} {written} {[version(owner) for owner in owners]}"


@cache
def _owners(_: tuple[str, ...]) -> Mapping[str, list[str]]:
    """The distributions of each package, which takes long to find out; once for a path of imports."""
    return packages_distributions()


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
