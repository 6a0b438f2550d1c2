"""``huggingface``: data sets of Hugging Face's library ``datasets``, from the Hub or from a folder or file here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from copy import copy
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, ClassVar, Literal

import attrs
import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import and_, deep_mapping, ge, instance_of, le, min_len
from torch import Tensor

from mtdiffusion_plugins.datasets._cells import Cells, Rows, by_kind, choice, data_field, names, of_fields, only
from mtdiffusion_plugins.sizes import Size, positive_size, sides
from mtdiffusion_registry.configs import DataField, DatasetConfig, FieldConfig
from mtdiffusion_registry.errors import EmptySplit, Troubles, UserError, all_told, did_you_mean
from mtdiffusion_registry.hookspecs import hookimpl

MTDIFFUSION_API = 1

HELD_OUT = ("test", "validation", "val", "valid")
"""Names of the split that is held out, in order of preference."""
OFFLINE = "HF_HUB_OFFLINE"
_MOST = 2**30  # bytes of a group of rows
_LARGE = 2**24  # bytes of a dictionary; writers give it up from a megabyte on
_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}


class HuggingFaceDataset(Rows):
    """Rows of a memory-mapped table; pictures are decoded at each access.

    Args:
        table: a ``datasets.Dataset``.
        rows: which of its rows, in order.
        cells: how they are read.
        where: what errors call the table.
    """

    def __init__(self, table: Any, rows: np.ndarray, cells: Cells, where: str) -> None:
        self.where, self.rows, self._cells = where, rows, cells
        digest = hashlib.sha256("\0".join((table._fingerprint, cells.key())).encode())
        digest.update(rows.tobytes())
        self.fingerprint = digest.hexdigest()[:32]
        self._classes = {name: each for name, each in table.features.items() if type(each).__name__ == "ClassLabel"}
        self.class_names = {
            field: tuple(self._classes[column].names)
            for field, column in cells.columns.items()
            if column in self._classes
        }
        self._table = _undecoded(table, cells.columns.values())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return self._cells.sample(self.row(index))

    def without(self, fields: Collection[str]) -> HuggingFaceDataset:
        other = copy(self)
        other._cells = self._cells.without(fields)
        return other

    def stored(self, dtypes: Mapping[str, Collection[torch.dtype]]) -> HuggingFaceDataset:
        other = copy(self)
        other._cells = attrs.evolve(self._cells, taken=dtypes)
        return other

    def row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table[int(self.rows[index])]
        for column in self._classes.keys() & row.keys():
            if row[column] == -1:  # what the library writes where the class is not known
                row[column] = None
        return row

    def describe(self, index: int, field: str | None = None) -> str:
        where = f"row {self.rows[index]} of {self.where}"
        column = self._cells.columns.get(field or "")
        if column is None:
            return where
        if column in self._classes and (label := self.row(index)[column]) is not None:
            return f"{where}, column {column!r} ({label}, which is {self._classes[column].int2str(label)!r})"
        return f"{where}, column {column!r}"


def _undecoded(table: Any, columns: Iterable[str]) -> Any:
    """The columns of a table alone, files in them as their bytes, which the project's own reader decodes."""
    columns = list(dict.fromkeys(columns))
    for name in columns:
        feature = table.features[name]
        if getattr(feature, "decode", None):
            table = table.cast_column(name, _as_files(feature))
    return table.select_columns(columns)


def _as_files(feature: Any) -> Any:
    """A feature of ``datasets`` (a picture's, a sound's) that gives the file as it is."""
    feature = copy(feature)
    feature.decode = False
    return feature


def _place(value: str | Path) -> str | Path:
    """What is here as a path, and a name on the Hub, OWNER/NAME, as it is."""
    if isinstance(value, Path) or "://" in value:
        return value
    return Path(value) if value.startswith((".", "/", "~")) or Path(value).exists() else value


@frozen(kw_only=True)
class HuggingFaceConfig(DatasetConfig):
    """A data set of Hugging Face's library ``datasets``, kept as Arrow files that are mapped from disk: any row can be
    read at any time, and no row needs memory. The library is an extra: ``pip install 'mtdiffusion[huggingface]'``.

    A field reads the column of its name, or that of ``columns``:

    - ``image``, ``mask``: columns of pictures (their files' bytes are decoded by the reader of all other pictures, at
      each access), or arrays of whole numbers → as of the kind ``folder``.
    - ``label``: a ``ClassLabel`` or whole numbers → int64 ``[]``; names of classes → str.
    - ``caption``: texts → str.
    - ``embedding``: sequences of numbers → float32 ``[D]`` of unit norm.
    - what a plugin brings: cells, or the bytes of files.

    A blank cell (null; -1 of a ``ClassLabel``) is a field that the sample lacks. No code that comes with a data set is
    ever run, and nothing is unpickled.

    Attributes:
        path: OWNER/NAME on the Hub; or a folder here (pictures, tables, or what ``save_to_disk`` wrote) or a table.
        fields: each field's name and its kind, as a name or with the kind's options.
        columns: the column of a field, where it is not of the field's name.
        name: the configuration of the data set, where it has several.
        revision: the branch, tag or commit on the Hub; a commit never changes.
        data_files: the files of each split, ``{ train = "train/*.parquet", test = "test/*.parquet" }``.
        train: the split to train on, also as a slice (``"train[:90%]"``).
        test: the split that is held out; None: ``test``, ``validation``, ``val`` or ``valid``, whichever is there.
        test_fraction: where none is there, the share of the training split that is held out.
        seed: decides which rows these are.
        size: pictures are scaled (bicubic, masks nearest) and cropped centrally to this side, or to a height and width;
            None keeps them as they are.
        allow_missing: fields that a sample may lack; its dict then lacks the key.

    Raises:
        UserError: from :meth:`build`, if the library or the data are not there, or a column is missing or has blanks.
    """

    kind: ClassVar[str] = "huggingface"

    path: str | Path = field(converter=_place)
    fields: dict[str, FieldConfig | str] = field(
        converter=by_kind,
        validator=and_(min_len(1), deep_mapping(min_len(1), instance_of((FieldConfig, str)), instance_of(dict))),
    )
    columns: dict[str, str] = field(factory=dict, validator=of_fields)
    name: str | None = None
    revision: str | None = None
    data_files: dict[str, str] = field(factory=dict)
    train: str = "train"
    test: str | None = None
    test_fraction: float = field(default=0.1, validator=and_(ge(0), le(1)))
    seed: int = field(default=0, validator=ge(0))
    size: Size | None = field(default=None, validator=positive_size)
    allow_missing: tuple[str, ...] = field(default=(), converter=names, validator=of_fields)

    def reading(self, fields: Collection[str]) -> HuggingFaceConfig:
        return attrs.evolve(self, **only(fields, self.fields, self.columns, self.allow_missing))

    def data_field(self, name: str) -> DataField | None:
        return data_field(self.fields, name)

    def build(self, split: Literal["train", "test"]) -> HuggingFaceDataset:
        splits = self._splits(_library())
        self._split(splits, split)  # whether it is there
        other: Literal["train", "test"] = "test" if split == "train" else "train"
        return all_told(
            lambda: self._read(splits, split),
            lambda: self._read(splits, other, thorough=True),
            lambda: self._validation(splits, thorough=True),
        )

    def _read(
        self, splits: Mapping[str, Any], split: Literal["train", "test"], *, thorough: bool = False
    ) -> HuggingFaceDataset:
        cells = Cells.of(self.fields, self.columns, None if self.size is None else sides(self.size), self.allow_missing)
        name, shared = self._split(splits, split)
        table = splits[name] if name in splits else self._loaded(_library(), name)
        where = f"{self.path} ({name})"
        troubles = Troubles()
        lacking = cells.lacking(table.column_names, where)
        troubles.add(*lacking.values())
        cells = cells.without(lacking)
        for each, column in cells.columns.items():
            blank = table.data.column(column).null_count if table._indices is None else 0  # else, when it comes up
            if blank and each not in self.allow_missing:
                troubles.add(
                    f"{where}: {blank:,} of {len(table):,} rows have nothing in the column {column!r}. If samples may "
                    f"lack it, add {each!r} to allow_missing"
                )
                cells = attrs.evolve(cells, optional=[*cells.optional, each])  # it is told
        rows = choice(len(table), self.test_fraction, self.seed, split) if shared else np.arange(len(table))
        if not len(rows):
            troubles.tell()
            more = f": change test_fraction (now {self.test_fraction:g})" if shared else ""
            raise EmptySplit(f"the {split} split of {where} is empty{more}")
        data = HuggingFaceDataset(table, rows, cells, where)
        cells.require_sound(data, split, troubles, thorough=thorough)
        return data

    def validation(self) -> HuggingFaceDataset | None:
        return self._validation(self._splits(_library()))

    def _validation(self, splits: Mapping[str, Any], *, thorough: bool = False) -> HuggingFaceDataset | None:
        test = self._held_out(splits)
        others = (name for name in HELD_OUT[1:] if name in splits and name not in (self.train, test))
        other = next(others, None) if test is not None else None
        return None if other is None else attrs.evolve(self, test=other)._read(splits, "test", thorough=thorough)

    def _held_out(self, splits: Mapping[str, Any]) -> str | None:
        return self.test or next((name for name in HELD_OUT if name in splits and name != self.train), None)

    def _split(self, splits: Mapping[str, Any], split: str) -> tuple[str, bool]:
        """The library's name of a split, and whether both of ours share it."""
        test = self._held_out(splits)
        wanted = self.train if split == "train" or test is None else test
        if wanted not in splits and not set(wanted) & set("[+"):  # a slice, or a sum of some, is the library's to read
            key = "test" if wanted == self.test and split == "test" else "train"
            raise UserError(
                f"{self.path}: has no split {wanted!r} (data.{key}){did_you_mean(wanted, splits)} (its splits are "
                f"{', '.join(splits)})"
            )
        return wanted, test is None

    def _splits(self, library: ModuleType) -> dict[str, Any]:
        found = self._loaded(library)
        return {self.train: found} if isinstance(found, library.Dataset) else dict(found)

    def _loaded(self, library: ModuleType, split: str | None = None) -> Any:
        """The data set, or a split of it.

        Raises:
            UserError: whatever the library raises, with what to do.
        """
        path = self.path.expanduser() if isinstance(self.path, Path) else self.path
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"data.path: there is no folder or file {path} (of a data set on the Hub, give OWNER/NAME)")
        try:
            return _load(library, path, split, self.name, self.revision, dict(self.data_files))
        except UserError:
            raise
        except Exception as error:  # of whichever library below: HTTP, Arrow, the file system, each reader's own
            raise UserError(f"data.path {self.path}: {_advice(error, path)}") from error


def _load(
    library: ModuleType,
    path: str | Path,
    split: str | None,
    name: str | None,
    revision: str | None,
    files: dict[str, str],
) -> Any:
    if isinstance(path, Path) and any((path / each).is_file() for each in ("dataset_dict.json", "state.json")):
        if split is not None:
            raise UserError(f"{path}: was written by save_to_disk, of which no slices can be read: found {split!r}")
        return library.load_from_disk(str(path))
    for each in _parquet_files(path, files):
        _require_bounded(each)
    options: dict[str, Any] = {"name": name, "revision": revision, "split": split}
    if isinstance(path, Path) and path.is_file():
        if path.suffix.lower() not in _READERS:
            raise UserError(f"{path}: expected a folder, or a table that ends in {', '.join(_READERS)}")
        files = files or {"train": str(path.absolute())}
        path = _READERS[path.suffix.lower()]
    elif isinstance(path, Path) and list(path.glob(f"{path.absolute().name}.py")):
        raise UserError(f"{path}: is read by a script of its own, and none is run; keep its data as Parquet, say")
    if int(library.__version__.split(".")[0]) < 4:  # later ones run no code of a data set in the first place
        options["trust_remote_code"] = False
    return library.load_dataset(str(path), data_files=files or None, **options)


def _parquet_files(path: str | Path, files: Mapping[str, str]) -> list[Path]:
    """The Parquet files here that are to be read."""
    if not isinstance(path, Path):
        return []
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else []
    patterns = files.values() or ["**/*.parquet"]
    there = (glob(pattern, root_dir=path, recursive=True) for pattern in patterns)  # noqa: PTH207  # may be absolute
    return sorted({path / each for found in there for each in found})


def _require_bounded(path: Path) -> None:
    """Raise ``UserError`` if a group of rows is huge when it is unpacked: it is read at once."""
    from pyarrow import parquet

    if path.suffix.lower() != ".parquet" or not path.is_file():
        return
    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    if (most := max((group.total_byte_size for group in groups), default=0)) > _MOST:
        raise UserError(
            f"{path}: a group of its rows takes {most / 2**30:.1f} GiB unpacked, more than {_MOST / 2**30:.0f} GiB; "
            "write it anew with fewer rows a group (row_group_size)"
        )
    with path.open("rb") as file:
        for column in (group.column(place) for group in groups for place in range(group.num_columns)):
            # A value that rows share stands there once, in a dictionary, and is written out for each of them.
            size = _dictionary_bytes(file, column.dictionary_page_offset) if column.has_dictionary_page else 0
            if size > _LARGE and size * column.num_values > _MOST:
                raise UserError(
                    f"{path}: the values of {column.path_in_schema} share a dictionary of {size / 2**20:.0f} MiB, "
                    f"which may take more than {_MOST / 2**30:.0f} GiB for {column.num_values:,} values; write it anew "
                    "without one (use_dictionary=False)"
                )


def _dictionary_bytes(file: BinaryIO, offset: int) -> int:
    """How large a dictionary's page is when it is unpacked, as its header says; 0 if that cannot be read.

    A header begins with two fields of Thrift's compact protocol, the page's kind and that size: each a byte 0x15 and a
    number in zigzag, seven bits a byte (Parquet's specification, ``PageHeader``).
    """
    file.seek(offset)
    header = file.read(12)
    numbers, place = [], 0
    for _ in range(2):
        if header[place : place + 1] != b"\x15":
            return 0
        end = next((i for i in range(place + 1, len(header)) if header[i] < 0x80), len(header))
        if end == len(header):
            return 0
        zigzag = sum((header[i] & 0x7F) << 7 * (i - place - 1) for i in range(place + 1, end + 1))
        numbers.append(zigzag >> 1)
        place = end + 1
    return numbers[1]


def _advice(error: Exception, path: str | Path) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(path, Path):
        return f"cannot be read ({said})"
    if os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE"):
        return (
            f"is not in the cache, and {OFFLINE} forbids to fetch it ({said}). Fetch it once where there is a network, "
            "or give the path of a copy"
        )
    if isinstance(error, ConnectionError):
        return (
            f"the Hub cannot be reached, and it is not in the cache ({said}). Fetch it once where there is a network "
            f"(afterwards, {OFFLINE}=1 saves the wait), or give the path of a copy"
        )
    return f"cannot be read from the Hub ({said}). Check its name, or log in if it is private: hf auth login"


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data sets of kind 'huggingface' need the library datasets: pip install 'mtdiffusion[huggingface]' "
            f"({error})"
        ) from None
    return datasets


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [HuggingFaceConfig]
