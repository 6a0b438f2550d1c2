"""Errors whose message a person can act on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

SHOWN = 5
"""Of what is wrong alike, so many are named."""


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
    """Errors of several kinds, which can all be mended before the next try.

    Attributes:
        each: what each says.
        where: goes before all of them.
    """

    def __init__(self, each: Sequence[str], where: str = "") -> None:
        self.each, self.where = list(each), where
        listed = "\n".join("- " + message.replace("\n", "\n  ") for message in each)
        super().__init__(f"{where}{len(self.each)} kinds of trouble with the data:\n{listed}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.each, self.where)


def all_told(read: Callable[[], T], *others: Callable[[], object]) -> T:
    """What ``read`` returns. If there is trouble, who mends it is to know that of the others as well, such as the other
    splits, of which an empty one is none.

    Raises:
        UserError: all of it.
    """
    troubles = Troubles()
    with troubles.gathered():
        return read()
    for other in others:
        with troubles.gathered(), suppress(EmptySplit):
            other()
    raise troubles.error()


def counted(each: Sequence[str], what: str, count: int | None = None) -> str:
    """One message of what is wrong alike: the one, or the first few and how many there are.

    Args:
        what: the line above them, if there are several.
        count: how many there are, if these are the first of them.
    """
    count = len(each) if count is None else count
    if count == 1:
        return each[0]
    more = [f"and {count - SHOWN:,} more"] if count > SHOWN else []
    return "\n".join([what, *each[:SHOWN], *more])


class Fault(NamedTuple):
    """Something that is wrong with a sample.

    Attributes:
        kind: what is wrong with all such samples, in words that follow "3 of 40 samples", such as "have a field 'mask'
            that cannot be read".
        said: what is wrong with this one.
        remedy: a sentence that holds for all of them; empty if what is said says it.
    """

    kind: str
    said: str
    remedy: str = ""


class SampleError(UserError):
    """A sample that cannot be used, and all that is wrong with it, by kinds: of many samples those of a kind are told
    together (:class:`SampleTroubles`).

    Attributes:
        faults: what is wrong.
        where: which sample it is; empty as long as that is not known.
        what: which data set it is in.
    """

    def __init__(self, faults: Sequence[Fault], where: str = "", what: str = "") -> None:
        self.faults, self.where, self.what = list(faults), where, what
        said = "; ".join(". ".join(filter(None, (fault.said, fault.remedy))) for fault in faults)
        super().__init__(": ".join(filter(None, (what, where, said))))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.faults, self.where, self.what)

    @classmethod
    def of(cls, error: Exception, where: str, what: str) -> SampleError:
        """What reading a sample raised, and which sample it is."""
        faults = error.faults if isinstance(error, SampleError) else [Fault("cannot be read", str(error))]
        return cls(faults, where, what)


class SampleTroubles:
    """What is wrong with the samples of a data set: of each kind how many samples have it, and the first few."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._found: dict[str, tuple[list[tuple[str, Fault]], int]] = {}

    def add(self, error: SampleError) -> None:
        """Count a sample's faults, those of a kind once."""
        for fault in {each.kind: each for each in reversed(error.faults)}.values():
            first, count = self._found.get(fault.kind, ([], 0))
            self._found[fault.kind] = [*first, *[(error.where, fault)] * (count < SHOWN)], count + 1

    def tell(self, seen: int) -> None:
        """Raise what was found among ``seen`` samples.

        Raises:
            UserError: if there was anything.
        """
        troubles = Troubles()
        for kind, (first, count) in self._found.items():
            lines = [": ".join(filter(None, (where, fault.said))) for where, fault in first]
            told = counted(lines, f"{count:,} of {seen:,} samples {kind}:", count)
            remedy = first[0][1].remedy
            told += f"{'. ' if count == 1 else chr(10)}{remedy}" if remedy else ""
            troubles.add(f"{self.what}: {told}" if self.what else told)
        troubles.tell()


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
