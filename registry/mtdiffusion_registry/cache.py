"""Where results that can be made again are kept between commands."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

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
