"""Where results that can be made again are kept between commands: decoded pictures, embeddings, judges.

Whatever is kept is named by a key of all that it is made from, so that nothing stale is read, and written whole.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from mtdiffusion_registry.configs import Config
from mtdiffusion_registry.partial import partial_of, remove_abandoned

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

    remove_abandoned(path)  # of a process that was killed while another wrote the same
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def save_kept(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors, all of them or none; where there is no room, none."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with suppress(OSError, SafetensorError), partial_of(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(path)


def config_key(config: Config) -> str:
    """What identifies a config and the code behind it: its kind and values, the files they name, and its package's
    files. Of a class without a file (made in a notebook), nothing lasting: this process."""
    values = attrs.asdict(config)
    files = [_stat(value) for value in _texts(values)]
    return json.dumps([config.group, config.kind, values, files, code_key(type(config))], default=str, sort_keys=True)


def code_key(cls: type) -> str:
    """What identifies a class's code: the size and time of the files of its package, or of its module alone."""
    try:
        file = Path(inspect.getfile(cls))
    except (OSError, TypeError):  # made in a notebook
        return f"{cls.__qualname__} of process {os.getpid()} {id(cls)}"
    package = cls.__module__.partition(".")[0]
    whole = next((folder for folder in file.parents if folder.name == package), None)
    return f"{cls.__module__}.{cls.__qualname__} {_written(file if whole is None else whole)}"


@cache
def _written(path: Path) -> str:
    """Size and time of a file, or of the Python files in a folder, shortened."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), *_stat(str(file))) for file in files]
    return hashlib.sha256(str(stats).encode()).hexdigest()[:16]


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
