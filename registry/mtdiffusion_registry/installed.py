"""What the distributions on the path declare, read so that a damaged one costs nobody anything.

importlib.metadata's own ``entry_points()`` raises as soon as one line of one distribution is malformed, whatever group
was asked for, and does not say whose it is. Only the standard library is imported: the command line reads this before
it knows what to do.
"""

from __future__ import annotations

import os
import re
import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import PurePath
from typing import NamedTuple

LONGEST = 60
"""Characters of a damaged line that are shown."""


class EntryPoint(NamedTuple):  # attrs takes longer to import than --help may
    """One line of an entry_points.txt.

    Attributes:
        name: as declared; of a line that is none, what there is of it.
        value: what it points at, as declared.
        distribution: whose it is; the folder of the metadata if they tell no name.
        version: of the distribution.
        problem: what is damaged about it, a sentence; empty if nothing is.
    """

    name: str
    value: str
    distribution: str
    version: str
    problem: str = ""

    @property
    def owner(self) -> str:
        """The distribution and its version."""
        return f"{self.distribution} {self.version}".rstrip()

    @property
    def names_module(self) -> bool:
        """Whether it points at a module, as ours must, not at an object in one."""
        return all(part.isidentifier() for part in self.value.split("."))


class _Owner(NamedTuple):
    name: str
    version: str
    problem: str


def entry_points(group: str, paths: Sequence[str | os.PathLike[str]] | None = None) -> tuple[EntryPoint, ...]:
    """The entry points of a group, in the order of the path, also damaged ones; imports none.

    A distribution can be on the path more than once, in several versions. Python takes the first, and so is done here,
    even if the first declares nothing. One whose files cannot be read, or do not tell its name and version, takes
    nobody's place.

    Args:
        group: the section of entry_points.txt.
        paths: where to look; ``sys.path`` by default.
    """
    search = _search(paths)
    found: list[EntryPoint] = []
    seen = set()
    for distribution in distributions(path=search):
        text, damage = _read(distribution, "entry_points.txt")
        if group not in text or _is_leftover(distribution):
            continue
        owner = _owner(distribution)
        if not owner.problem:
            if normalised(owner.name) in seen:
                continue
            seen.add(normalised(owner.name))
            first = _first_sound(owner.name, search) or distribution
            first_text, first_damage = _read(first, "entry_points.txt")
            if first_text or not first_damage:
                distribution, owner, text, damage = first, _owner(first), first_text, first_damage
        for name, value, problem in _lines(group, text, damage):
            if problem := "; ".join(filter(None, (problem, owner.problem))):
                problem += f". Install it again, or delete {_shown(_folder(distribution))}"
            found.append(EntryPoint(name, value, owner.name, owner.version, problem))
    return tuple(dict.fromkeys(found))  # a folder can be on the path twice


def version(name: str) -> str:
    """The version of a distribution that is installed.

    Raises:
        UserError: if it is not installed, or its metadata do not tell.
    """
    if (distribution := _first_sound(name, _search(None))) is None:
        from mtdiffusion_registry.errors import UserError

        raise UserError(f"the version of {name} is not known: no metadata of it on the path can be read; install it")
    return _owner(distribution).version


def blame(error: BaseException) -> str:
    """Whose metadata an error was raised at in Python's own reader of them, in a sentence: libraries, such as Triton
    when it is imported, ask for the entry points of all distributions, and one that is damaged fails them.

    Empty if the error is of something else.
    """
    trace = error.__traceback__
    while trace is not None and not str(trace.tb_frame.f_globals.get("__name__")).startswith("importlib.metadata"):
        trace = trace.tb_next
    if trace is None:
        return ""
    for distribution in distributions():
        try:
            distribution.metadata["Name"], distribution.entry_points
        except Exception as damage:
            return (
                f"{_shown(_folder(distribution))}: is damaged ({type(damage).__name__}: {damage}), and a library that "
                "reads what all distributions declare stops there. Install it again, or delete that folder"
            )
    return ""


def normalised(name: str) -> str:
    """Distribution names are equal up to case and ``-_.`` (PEP 503); entry-point names lose nothing by it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _search(paths: Sequence[str | os.PathLike[str]] | None) -> list[str]:
    if paths is None:
        return [entry for entry in sys.path if isinstance(entry, str)]  # import ignores anything else, too
    return [os.fspath(path) for path in paths]


def _first_sound(name: str, search: list[str]) -> Distribution | None:
    return next((found for found in distributions(name=name, path=search) if not _owner(found).problem), None)


def _folder(distribution: Distribution) -> str:
    return str(getattr(distribution, "_path", distribution)).rstrip("/\\")  # there is no public name for it


def _is_leftover(distribution: Distribution) -> bool:
    """pip puts a ~ before the name of what it is about to uninstall, and may not be able to delete it."""
    return PurePath(_folder(distribution)).name.startswith("~")


def _read(distribution: Distribution, file: str) -> tuple[str, str]:
    """The text of a metadata file and what is wrong with all of it; bytes that are not UTF-8 are surrogates in it.

    Without a text, and often without a complaint, if there is no such file or it may not be read.
    """
    try:
        text = distribution.read_text(file) or ""
    except UnicodeDecodeError as error:
        if error.object.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            return error.object.decode("utf-16", "replace"), f"{file} is UTF-16, not UTF-8"
        text = error.object.decode("utf-8", "surrogateescape")
    except Exception as error:  # a damaged archive, links in a circle: read_text promises no type
        return "", f"{file} cannot be read ({type(error).__name__}: {error})"
    if "\0" in text:
        return text.replace("\0", ""), f"{file} has NUL bytes"
    return text.removeprefix("\ufeff"), ""


def _owner(distribution: Distribution) -> _Owner:
    """Whose metadata these are, and what keeps them from telling."""
    file, text, problem = "METADATA", "", ""
    for file in ("METADATA", "PKG-INFO"):
        text, problem = _read(distribution, file)
        if text or problem:
            break
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        if not line.strip():
            break  # the description follows
        key, _, value = line.partition(":")
        fields.setdefault(key.lower(), value.strip())
    name, version = fields.get("name", ""), fields.get("version", "")
    if not problem:
        if not text:
            problem = "METADATA is missing or empty"
        elif not (name and version):
            problem = f"{file} has no {'Version' if name else 'Name'}"
        elif _has_surrogates(name + version):
            problem = f"{file} is not UTF-8"
    return _Owner(_shown(name or _folder(distribution)), _shown(version) or ("(no version)" if name else ""), problem)


def _lines(group: str, text: str, problem: str) -> Iterator[tuple[str, str, str]]:
    """Name, value and problem of each entry point of the group, and of each line that was meant for one."""
    inside = False
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        at = f"line {number} of entry_points.txt"
        if not line or line.startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if line.startswith("[") or not inside:
            is_section = line.startswith("[") and line.endswith("]")
            inside = is_section and line.strip("[]").strip() == group
            if not is_section and group in line and not equals:
                yield _shown(line)[:LONGEST], "", f"{at} is not a section and not NAME = MODULE; expected [{group}]"
        elif _has_surrogates(line):
            yield _shown(name)[:LONGEST], _shown(value)[:LONGEST], problem or f"{at} is not UTF-8"
        elif not (name and value):
            yield _shown(line)[:LONGEST], "", problem or f"{at} is damaged; expected NAME = MODULE"
        else:
            yield _shown(name), _shown(value), problem


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _shown(text: str) -> str:
    """What a terminal can show of it: bytes that are not UTF-8 and control characters as escapes."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
