"""Names and files of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mtdiffusion_registry.errors import UserError

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""``OWNER/NAME``."""


def download(name: str, revision: str | None = None, files: Sequence[str] | None = None) -> Path:
    """The folder of what a name on the Hub holds; what is here already is not fetched again.

    Args:
        revision: branch, tag or commit; None: the newest.
        files: of it, those that are wanted; None: all.

    Raises:
        UserError: if it cannot be had: the first line of what the library says.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=None if files is None else list(files)))
    except Exception as error:  # of the network, the Hub or the disk: each has exceptions of its own
        raise UserError(first_line(error)) from error


def first_line(error: Exception) -> str:
    """The first line of what an error of the Hub's library says; more of it is addresses and headers."""
    return str(error).strip().partition("\n")[0]
