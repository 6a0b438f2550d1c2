"""Errors whose message a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path


class UserError(ValueError):
    """Something that a person can mend. The command line prints the message and exits with status 2."""


class ConfigError(UserError):
    """A configuration that does not fit: says where in which file, what was found and what is expected."""


class EmptySplit(UserError):
    """A split of a data set that has no samples, though the data set is there: some work needs it, some does not."""


class Troubles:
    """All that is wrong with what a person gave, gathered so that it is told at once."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def add(self, *messages: str) -> None:
        """Keep what was not told yet."""
        self.told += [message for message in dict.fromkeys(messages) if message not in self.told]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Go on after an error that a person can mend, and keep what it says; an empty split is no trouble of these."""
        try:
            yield
        except EmptySplit:
            raise
        except UserError as error:
            self.add(*(error.each if isinstance(error, SeveralErrors) else [str(error)]))

    def error(self) -> UserError:
        """One error that says all that was gathered, of which there must be some."""
        return SeveralErrors(self.told) if len(self.told) > 1 else UserError(self.told[0])

    def tell(self) -> None:
        """Raise what was gathered.

        Raises:
            UserError: if there was anything.
        """
        if self.told:
            raise self.error()


class SeveralErrors(UserError):
    """Errors of several kinds, which can all be mended before the next try."""

    def __init__(self, each: Sequence[str]) -> None:
        self.each = list(each)
        super().__init__(self.each)  # what it is made of again where it comes from another process

    def __str__(self) -> str:
        listed = "\n".join("- " + message.replace("\n", "\n  ") for message in self.each)
        return f"{len(self.each)} kinds of trouble with the data:\n{listed}"


class PluginError(UserError):
    """A plugin that cannot be used: says whose it is, what is wrong and what to do."""


LONGEST = 200
"""Characters of a word that is compared with others: of millions that takes minutes."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause to append to a message, ``; did you mean "x"?``, or nothing if no known word is a slip away."""
    close = get_close_matches(word, list(known), n=10) if len(word) <= LONGEST else ()
    near = next((other for other in close if _is_slip(word, other)), None)
    return f'; did you mean "{near}"?' if near else ""


def _is_slip(word: str, other: str) -> bool:
    """Whether a word differs from another by a slip or two: a letter in four, in short words a letter.

    What both have in common at either end, up to a sign between words (``.toml``, ``modality.``), says nothing of it.
    """
    words, others = (re.split(r"([\W_]+)", text) for text in (word, other))
    for end in (0, -1):
        while words and others and words[end] == others[end]:
            del words[end], others[end]
    left, right = "".join(words), "".join(others)
    if not left or not right:  # one is the other and a part more, such as ".toml"
        return True
    cutoff = 0.75 if max(len(left), len(right)) > 3 else 0.5
    return SequenceMatcher(None, left, right).ratio() >= cutoff


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
