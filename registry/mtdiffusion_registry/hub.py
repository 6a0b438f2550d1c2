"""Names on the Hugging Face Hub. Nothing here needs its library: who fetches from the Hub imports it."""

from __future__ import annotations

import re

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""``OWNER/NAME``."""
