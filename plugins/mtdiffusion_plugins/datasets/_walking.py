"""Folders that people keep their data in: what in them is data, and what is told of the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.pace import LOGGER

HELD_OUT = ("test", "val", "validation")
"""Names of the folder with the test split, in order of preference."""
_NO_DATA = ("thumbs.db", "desktop.ini", "__macosx")  # what systems leave in folders, beside names that begin with a dot


def require_no_loop(where: str | Path, folders: Iterable[str]) -> None:
    """Raise ``UserError`` if a link among these folders leads back to one that holds it: there is no end to such."""
    for name in folders:
        link = Path(where, name)
        if not link.is_symlink():
            continue
        real = link.resolve()
        # Of two folders with a link to one another, neither holds the other.
        if Path(where).resolve().is_relative_to(real) or any(each.resolve() == real for each in link.parents):
            raise UserError(f"{link}: is a link to {real}, which holds it; remove the link")


def is_data(name: str) -> bool:
    """Whether a file or folder of this name is no hidden one, and none that systems leave in folders."""
    return not name.startswith(".") and name.lower() not in _NO_DATA


@cache
def say_once(message: str) -> None:
    """Tell something that holds for the whole process, the first time only."""
    logging.getLogger(LOGGER).info(message)
