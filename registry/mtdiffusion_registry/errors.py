"""Errors whose message a person can act on."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """Something that a person can mend. The command line prints the message and exits with status 2."""


class ConfigError(UserError):
    """A configuration that does not fit: says where in which file, what was found and what is expected."""


class EmptySplit(UserError):
    """A split of a data set that has no samples, though the data set is there: some work needs it, some does not."""


class PluginError(UserError):
    """A plugin that cannot be used: says whose it is, what is wrong and what to do."""


LONGEST = 200
"""Characters of a word that is compared with others: of millions that takes minutes."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause to append to a message, ``; did you mean "x"?``, or nothing if no known word is close."""
    close = get_close_matches(word, list(known), n=1) if len(word) <= LONGEST else ()
    return f'; did you mean "{close[0]}"?' if close else ""


def first_line(error: Exception) -> str:
    """The first line of what an error of another's library says; more of it is addresses, headers and advice that is
    not for our users."""
    return str(error).strip().partition("\n")[0]


def given_file(text: str, how: str) -> Path:
    """The file that a person names, as after ``--observe NAME=``.

    Args:
        how: how a value of this modality is given, such as "a picture is given as a file".

    Raises:
        UserError: if there is none of this name; it says how a value is given.
    """
    try:
        there = Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or no path at all
        there = False
    if not there:
        raise UserError(f"{text}: no such file; {how}")
    return Path(text)
