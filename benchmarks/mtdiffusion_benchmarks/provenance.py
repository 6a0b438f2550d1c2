"""Which plugins a cell is made by: whose they are, which version, and a hash of their code."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from mtdiffusion_registry.registry import DIRECT, OURS

Plugins = Mapping[str, Mapping[str, str]]
"""By ``GROUP.KIND``: the distribution, its version, the module, and the hash of the code."""


def code_hash(origin: Mapping[str, str]) -> str:
    """A hash of the Python files behind a plugin that is imported: those of the package that its module lies in, and
    the others of its distribution. The same code has the same hash, wherever and however it is installed.

    Of a class that was registered directly it is the file of its module alone. Empty if there is no file.

    Args:
        origin: distribution and module, as :meth:`mtdiffusion_registry.Registry.origin` gives them.
    """
    files = dict(_files(origin))
    if not files:
        return ""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(files[name].read_bytes()).digest())
    return digest.hexdigest()[:16]


def _files(origin: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """Names, from where a package is imported, and paths."""
    file = getattr(sys.modules.get(origin["module"]), "__file__", None)
    if file is None or not Path(file).is_file():
        return
    top, direct = Path(file), origin["distribution"] == DIRECT
    while not direct and (top.parent / "__init__.py").is_file():
        top = top.parent
    for path in top.rglob("*.py") if top.is_dir() else [top]:
        name = path.relative_to(top.parent)
        if name.parts[:2] != ("mtdiffusion_benchmarks", "report"):  # no result depends on it
            yield name.as_posix(), path
    if direct or origin["distribution"] == OURS:  # our distribution has the engine, too, which is no plugin
        return
    try:
        declared = distribution(origin["distribution"]).files or ()
    except PackageNotFoundError:
        return
    for part in declared:
        path = Path(str(part.locate()))
        # What makes an install editable names folders of this machine; the code it leads to is found above.
        if part.suffix == ".py" and not part.name.startswith("__editable__") and path.is_file():
            yield part.as_posix(), path


def differences(before: Plugins, now: Plugins) -> dict[str, str]:
    """What is another about each plugin of a result, by ``GROUP.KIND``, for people: "version 1.0, now 1.1"."""
    told = {}
    for name, found in now.items():
        was = before.get(name)
        if was is None:
            told[name] = "was not used"
        elif was.get("distribution") != found["distribution"]:
            told[name] = f"was that of {was.get('distribution')}, now that of {found['distribution']}"
        elif was.get("version") != found["version"]:
            told[name] = f"version {was.get('version')}, now {found['version']}"
        elif was.get("code") != found["code"]:
            told[name] = f"other code (hash {was.get('code') or 'none'}, now {found['code'] or 'none'})"
    told |= {name: "is not used any more" for name in before if name not in now}
    return told
