"""Names on the Hugging Face Hub, and what its library says when something goes wrong. Nothing here needs that library:
who fetches from the Hub imports it."""

from __future__ import annotations

import re

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""``OWNER/NAME``."""


def first_line(error: Exception) -> str:
    """The first line of what an error of the Hub's library says; more of it is addresses and headers."""
    return str(error).strip().partition("\n")[0]
