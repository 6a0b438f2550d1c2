"""Tables of values by sample, as people store them: CSV, TSV, JSON, JSON lines and Parquet.

The columns that say whose a row is are ``stem`` or ``file_name``; a JSON object may have the stems as its keys.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from mtdiffusion_plugins.files import read_text
from mtdiffusion_registry.errors import UserError

KEYS = ("stem", "file_name")
"""Columns that say whose a row is, in order of preference."""

BEYOND = "\0"
"""The key of a row's cells beyond those that the header has names for; no column is named so."""

Row = Mapping[str, object]


@frozen
class Table:
    """Rows by key.

    Attributes:
        path: the file.
        columns: names of the columns beside the key; None: each row is one value without a name.
        rows: keys and cells by column, in the file's order.
    """

    path: Path
    columns: tuple[str, ...] | None
    rows: list[tuple[str, Row]]

    def values(self, *names: str) -> list[tuple[str, object]] | None:
        """Keys and values of the column that has one of these names (of rows without columns: their values); None if
        there is none.

        Raises:
            UserError: if there are several that differ, or one of them twice.
        """
        if self.columns is None:
            return [(key, row[""]) for key, row in self.rows]
        there = [name for name in dict.fromkeys(names) if name in self.columns]
        # As text: cells may be arrays, which are not simply equal.
        if len({tuple(str(row.get(name)) for _, row in self.rows) for name in there}) > 1:
            raise UserError(
                f"{self.path}: has the columns {' and '.join(map(repr, there))}, which differ, and each may be the one "
                "to read; keep one, or rename the other"
            )
        _require_once(self.path, [name for name in self.columns if name in there], "column")
        name = there[0] if there else None
        return None if name is None else [(key, row.get(name)) for key, row in self.rows]


def read_table(path: Path) -> Table:
    """A table's rows.

    Raises:
        UserError: if it cannot be read, has no column that says whose a row is, or has a row without such a name.
    """
    try:
        return _READERS[path.suffix.lower()](path)
    except UserError:
        raise
    except Exception as error:  # each format's reader has errors of its own
        raise UserError(f"{path}: cannot be read as a table ({type(error).__name__}: {error})") from error


def _separated(path: Path) -> Table:
    text = read_text(path)
    header = text.lstrip().partition("\n")[0]
    # A spreadsheet separates by what its country's numbers leave free, whatever the suffix says.
    separator = max("\t;,", key=header.count)
    rows = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=separator, restkey=BEYOND, strict=True, skipinitialspace=True
    )
    names = [(name or "").strip() for name in rows.fieldnames or ()]
    rows.fieldnames = names
    return _records(path, names, rows)


def _require_once(path: Path, names: Sequence[str], what: str) -> None:
    """Raise ``UserError`` if two columns or keys have one name: which of them is meant is not said."""
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(
            f"{path}: has more than one {what} {', '.join(map(repr, twice))}; keep one, or rename the others"
        )


def _records(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> Table:
    columns = list(columns)
    _require_once(path, [name for name in columns if name in KEYS], "column")
    key = next((key for key in KEYS if key in columns), None)
    if key is None:
        found = ", ".join(columns) or "none"
        raise UserError(f"{path}: needs a column 'stem' or 'file_name' that says whose a row is, found {found}")
    records = []
    for place, row in enumerate(rows, 1):
        beyond = row.get(BEYOND)
        if isinstance(beyond, list) and any(cell.strip() for cell in beyond):
            raise UserError(
                f"{path}: row {place} has {len(columns) + len(beyond)} cells and the header {len(columns)}, so part "
                f"of it belongs to no column: {', '.join(map(repr, beyond[:3]))}. Put cells that hold the separator "
                "in double quotes"
            )
        stem = row.get(key)
        if not isinstance(stem, str) or not stem.strip():
            if isinstance(stem, int) and not isinstance(stem, bool):
                stem = str(stem)
            elif not any(row.values()):
                continue  # a blank line at the end
            else:
                raise UserError(f"{path}: row {place} has nothing in the column {key!r}")
        records.append((stem.strip(), row))
    return Table(path, tuple(name for name in columns if name != key), records)


class _Pairs(list[tuple[str, object]]):
    """A JSON object's pairs: a dict would keep the last of two equal keys and say nothing."""


def _plain(value: object, path: Path) -> object:
    if not isinstance(value, _Pairs):
        return value
    _require_once(path, [key for key, _ in value], "value of the key")
    return {key: _plain(item, path) for key, item in value}


def _json(path: Path) -> Table:
    found = json.loads(read_text(path), object_pairs_hook=_Pairs)
    if isinstance(found, _Pairs):
        records = [(key, _plain(value, path)) for key, value in found]
        if records and all(isinstance(value, dict) for _, value in records):
            columns = dict.fromkeys(name for _, value in records for name in value)  # type: ignore[attr-defined]
            return Table(path, tuple(columns), [(key, value) for key, value in records])  # type: ignore[misc]
        return Table(path, None, [(key, {"": value}) for key, value in records])
    if isinstance(found, list) and all(isinstance(row, _Pairs) for row in found):
        return _objects(path, found)
    raise UserError(
        f"{path}: must hold one object of values by stem, or a list of objects with a key 'stem' or 'file_name', found "
        f"a {type(found).__name__}"
    )


def _json_lines(path: Path) -> Table:
    rows = []
    for place, line in enumerate(read_text(path).split("\n"), 1):  # splitlines splits within texts, too: at U+2028
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=_Pairs))
            except ValueError as error:
                raise UserError(f"{path}: line {place} is not JSON ({error})") from None
            if not isinstance(rows[-1], _Pairs):
                raise UserError(f"{path}: line {place} must be an object, found {line.strip()[:40]}")
    return _objects(path, rows)


def _objects(path: Path, rows: list[_Pairs]) -> Table:
    plain: list[dict[str, object]] = [_plain(row, path) for row in rows]  # type: ignore[misc]  # pairs become a dict
    return _records(path, dict.fromkeys(name for row in plain for name in row), plain)


def _parquet(path: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'mtdiffusion[parquet]'") from None
    table = parquet.read_table(path)
    return _records(path, table.column_names, table.to_pylist())


_READERS: Mapping[str, Callable[[Path], Table]] = {
    ".csv": _separated,
    ".tsv": _separated,
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
"""Of files that can be tables."""
