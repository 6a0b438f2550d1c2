"""``folder``: a person's own data, a subfolder or a table for each field, matched by file stem."""

from __future__ import annotations

import hashlib
import os
import unicodedata
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import attrs
import numpy as np
import torch
from attrs import Attribute, field, frozen
from attrs.validators import and_, deep_mapping, ge, instance_of, le, min_len
from safetensors.torch import load_file
from torch import Tensor

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins import tables
from mtdiffusion_plugins.datasets._cells import by_kind, data_field, require_fields, resolved
from mtdiffusion_plugins.datasets._decoded import Decoded, decode, stamp, stamped
from mtdiffusion_plugins.datasets._walking import HELD_OUT, is_data, require_no_loop, say_once
from mtdiffusion_plugins.sizes import Size, positive_size, sides
from mtdiffusion_registry.configs import DataField, DatasetConfig, FieldConfig
from mtdiffusion_registry.errors import EmptySplit, Troubles, UserError, all_told, counted
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.pictures import SUFFIXES as PICTURES
from mtdiffusion_registry.pictures import open_picture as _open

MTDIFFUSION_API = 1

Value = Tensor | str

ARRAYS = (".safetensors", ".npz")
BESIDE = 32
"""Files of the training split with which those of another must agree, where all files of a field must."""
METADATA = "metadata"
"""A table of this name holds columns for several fields; its ``file_name`` is the picture's, from its own folder."""
_UNPACKED = 100  # times the size of a file that its content may have


@frozen
class _Source:
    """Where a field's data were found, and by stem its files, or what its cells or arrays hold."""

    where: Path
    files: Mapping[str, str] | None
    contents: Mapping[str, object]

    @property
    def stems(self) -> set[str]:
        return set(self.contents if self.files is None else self.files)


@frozen(eq=False)
class _Column:
    """A field's values by stem.

    Attributes:
        rows: the place of each stem's value; a stem that lacks it has none.
        files: where each value comes from, for errors.
    """

    rows: Mapping[str, int]
    values: Tensor | list[Value] | Decoded
    files: Sequence[str]

    def __contains__(self, stem: object) -> bool:
        return stem in self.rows

    def __getitem__(self, stem: str) -> Value:
        return self.values[self.rows[stem]]

    def where(self, stem: str) -> Path:
        return Path(self.files[self.rows[stem] if len(self.files) > 1 else 0])

    def fingerprint(self) -> str:
        if isinstance(self.values, Decoded):
            return self.values.key
        digest = hashlib.sha256("\0".join(self.rows).encode(errors="surrogateescape"))
        for value in self.values if isinstance(self.values, list) else (self.values,):
            digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else value.encode() + b"\0")
        return digest.hexdigest()


class FolderDataset(Dataset):
    """Samples by stem.

    Attributes:
        stems: the samples' names, in order.
    """

    def __init__(self, stems: list[str], columns: Mapping[str, _Column]) -> None:
        self.stems = stems
        self._columns = columns
        parts = ["\0".join(stems), *(f"{name}={column.fingerprint()}" for name, column in sorted(columns.items()))]
        self.fingerprint = hashlib.sha256("\1".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict[str, Value]:
        stem = self.stems[index]
        return {name: column[stem] for name, column in self._columns.items() if stem in column}

    def without(self, fields: Collection[str]) -> FolderDataset:
        return FolderDataset(self.stems, {name: each for name, each in self._columns.items() if name not in fields})

    def stored(self, dtypes: Mapping[str, Collection[torch.dtype]]) -> FolderDataset:
        other = copy(self)
        other._columns = {
            name: attrs.evolve(column, values=column.values.stored(dtypes.get(name, ())))
            if isinstance(column.values, Decoded)
            else column
            for name, column in self._columns.items()
        }
        return other

    def describe(self, index: int, field: str | None = None) -> str:
        stem = self.stems[index]
        columns = [self._columns[field]] if field is not None and field in self._columns else self._columns.values()
        files = dict.fromkeys(str(column.where(stem)) for column in columns if stem in column)
        return f"{stem} ({', '.join(files)})"


def _names(value: Iterable[str]) -> tuple[str, ...]:
    return tuple(value)


def _known_fields(instance: FolderConfig, _: Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    unknown = sorted(set(value) - set(instance.fields))
    if unknown:
        raise ValueError(f"allow_missing names {_list(unknown)}, but the fields are {_list(instance.fields)}")


@frozen(kw_only=True)
class FolderConfig(DatasetConfig):
    """A folder of one's own data.

    Each field is found under ``root`` by its name, as a subfolder with a file for each sample (``root/image/0001.png``;
    also within further folders, which are then part of the stem) or as a table (``root/label.csv``) whose rows say by a
    column ``stem`` or ``file_name`` whose they are, and by a column ``value``, or named like the field, what it is; or
    as a column of one table ``root/metadata.csv`` for several fields. A plugin may bring further kinds of fields; those
    that are here:

    - ``image``: pictures of 8 or 16 bits → float32 ``[channels, h, w]`` in [−1, 1]. What is transparent is white.
    - ``mask``: pictures whose pixels are class indices, or colours that stand for them → int64 ``[h, w]``.
    - ``label``: a class index → int64 ``[]``, or a class's name → str.
    - ``class_folder``: the name of the folder that holds another field's file → str.
    - ``caption``: a text → str.
    - ``embedding``: a vector; ``.safetensors`` or ``.npz`` with one for each stem, too → float32 ``[D]`` of unit norm.

    Every file of the split is read when the data set is built first, so that a bad one is reported then and not hours
    later; pictures are kept, decoded and scaled, in the cache (:func:`mtdiffusion_registry.cache.cache_folder`).

    Attributes:
        root: the folder. If it has subfolders ``train`` and ``test`` (or ``val``), they are the splits, each laid out
            as above.
        fields: each field's name and its kind, as a name or with the kind's options.
        size: pictures are scaled (bicubic, masks nearest) and cropped centrally to this side, or to a height and width;
            None keeps them as they are, and a field's pictures must then all be of one size.
        allow_missing: fields that a sample may lack; its dict then lacks the key.
        test_fraction: the share of stems in the test split, decided by a hash of the stem: adding files never moves one
            from one split to the other.

    Raises:
        UserError: from :meth:`build`, for anything wrong with the data; it names the files.
    """

    kind: ClassVar[str] = "folder"

    root: Path = field(converter=Path)
    fields: dict[str, FieldConfig | str] = field(
        converter=by_kind,
        validator=and_(min_len(1), deep_mapping(min_len(1), instance_of((FieldConfig, str)), instance_of(dict))),
    )
    size: Size | None = field(default=None, validator=positive_size)
    allow_missing: tuple[str, ...] = field(default=(), converter=_names, validator=_known_fields)
    test_fraction: float = field(default=0.1, validator=and_(ge(0), le(1)))

    def reading(self, fields: Collection[str]) -> FolderConfig:
        require_fields(fields, self.fields)
        needed = set(fields)
        needed |= {
            each.folder_of
            for name, each in self.fields.items()
            if name in needed and isinstance(each, FieldConfig) and each.folder_of
        }
        kept = {name: each for name, each in self.fields.items() if name in needed}
        if not kept:
            return self
        if left := [name for name in self.fields if name not in kept]:
            say_once(f"data.fields: {_list(left)} left out, since no modality reads it")
        return attrs.evolve(self, fields=kept, allow_missing=[n for n in self.allow_missing if n in kept])

    def data_field(self, name: str) -> DataField | None:
        return data_field(self.fields, name, partial(self._some_files, name))

    def _some_files(self, name: str, most: int) -> list[Path]:
        """At most so many files of a field in the training split."""
        try:
            folder = self._base("train")[0] / name
            suffixes = resolved(self.fields[name], name).suffixes
        except UserError:  # the data are elsewhere
            return []
        found: list[Path] = []
        for where, folders, names in os.walk(folder, followlinks=True):
            folders[:] = sorted(filter(is_data, folders))
            paths = (Path(where, each) for each in sorted(filter(is_data, names)))
            found += islice((path for path in paths if path.suffix.lower() in suffixes), most - len(found))
            if len(found) == most:
                break
        return found

    def build(self, split: Literal["train", "test"]) -> FolderDataset:
        base, by_hash = self._base(split)
        other: Literal["train", "test"] = "test" if split == "train" else "train"
        return all_told(
            lambda: self._read(base, split, by_hash),
            lambda: self._read(self._base(other)[0], other, by_hash),
            self.validation,
        )

    def validation(self) -> FolderDataset | None:
        root, there = self._split_folders()
        return self._read(root / there[2], "test", by_hash=False) if "train" in there and len(there) > 2 else None

    def _read(self, base: Path, split: str, by_hash: bool) -> FolderDataset:
        fields = {name: resolved(each, name) for name, each in self.fields.items()}
        # A field that samples may lack may be missing from all that are held out; from training, it would be a slip.
        optional = self.allow_missing if split == "test" else ()
        troubles = Troubles()
        sources = _sources(base, fields, optional, troubles)
        stems = self._matched(base, sources, troubles)
        if by_hash:
            stems = [stem for stem in stems if (_fraction(stem) < self.test_fraction) == (split == "test")]
        if not stems:
            troubles.tell()
            raise EmptySplit(
                f"the {split} split of {base} is empty: change test_fraction (now {self.test_fraction:g}), or lay the "
                f"data out in {base / 'train'} and {base / 'test'}"
            )
        columns = {}
        whole = not troubles.told  # otherwise these are not the samples that there will be
        held_out = split != "train" and not by_hash  # which is read apart from what it is to agree with
        for name, source in sources.items():
            beside = self._some_files(name, BESIDE) if held_out and fields[name].encoded else []
            size = None if self.size is None else sides(self.size)
            with troubles.gathered():
                columns[name] = _column(name, fields[name], source, stems, size, beside, whole)
            if name not in columns or name in self.allow_missing:
                continue
            there = source.stems
            if blank := [stem for stem in stems if stem in there and stem not in columns[name]]:
                troubles.add(
                    f"{source.where}: {len(blank)} of {len(stems)} samples have nothing in {name!r}: {_list(blank)}. "
                    f"If samples may lack it, add {name!r} to allow_missing"
                )
        files = {name: each.files for name, each in sources.items() if fields[name].spatial and each.files is not None}
        _check_aligned(stems, files, columns, fields, troubles)
        troubles.tell()
        return FolderDataset(stems, columns)

    def _base(self, split: str) -> tuple[Path, bool]:
        """The folder to look in, and whether the split is still to be made (by hash)."""
        root, there = self._split_folders()
        if not there:
            return root, True
        if len(there) == 1:
            raise UserError(f"{root} has a folder {there[0]!r} only: it needs both 'train' and 'test', or neither")
        if "train" not in there:
            raise UserError(f"{root} has folders {_list(there)}, but no 'train'")
        return root / ("train" if split == "train" else there[1]), False

    def _split_folders(self) -> tuple[Path, list[str]]:
        """The root, and which of its folders hold splits: that to train on, then the held-out ones."""
        root = self.root.expanduser().absolute()
        if not root.is_dir():
            found = "is no folder" if root.exists() else "does not exist"
            raise UserError(f"data folder {root} {found} (option root)")
        return root, [name for name in ("train", *HELD_OUT) if (root / name).is_dir() and name not in self.fields]

    def _matched(self, base: Path, sources: Mapping[str, _Source], troubles: Troubles) -> list[str]:
        """The stems of the samples, sorted; unless there is trouble, all have every field that is not in
        allow_missing."""
        everything = set().union(*(source.stems for source in sources.values()))
        if not everything:
            troubles.tell()
            raise UserError(f"no data in {base}: {_list(self.fields)} are all empty")
        required = [name for name in self.fields if name in sources and name not in self.allow_missing]
        matched = everything.intersection(*(sources[name].stems for name in required))
        if not matched:
            found = "; ".join(f"{name}: {_list(sources[name].stems)}" for name in required)
            troubles.add(f"no stem in {base} has all of {_list(required)}. Stems found: {found}")
            return sorted(everything)
        for name in required:
            missing = everything - sources[name].stems
            if missing:
                troubles.add(
                    f"{len(missing)} of {len(everything)} samples in {base} have no {name!r}: {_list(missing)}. If "
                    f"samples may lack it, add {name!r} to allow_missing"
                )
        return sorted(everything)


def _fraction(stem: str) -> float:
    """A number in [0, 1) that depends on the stem only (``hash`` differs from run to run)."""
    return int.from_bytes(hashlib.sha256(stem.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


def _list(names: Iterable[object], most: int = 5) -> str:
    names = sorted(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


# --- where values are -------------------------------------------------------------------------------------------------


def _sources(
    base: Path, fields: Mapping[str, FieldConfig], optional: Collection[str], troubles: Troubles
) -> dict[str, _Source]:
    """Each field's files or contents, under stems that agree between them; of the optional ones, if there are any.
    Those with which there is trouble are left out."""
    metadata = _metadata(base)
    found: dict[str, _Source | None] = {}
    for name, each in fields.items():
        if each.folder_of is None:
            with troubles.gathered():
                found[name] = _find(base, name, each, metadata)
    if metadata is not None:
        with troubles.gathered():
            _place_file_names(base, found, fields, metadata)
    sources: dict[str, _Source] = {}
    for name, source in found.items():
        if source is None and name not in optional:
            troubles.add(_nowhere(base, name, fields[name], metadata))
        else:
            sources[name] = source or _Source(base, None, {})
    for name, each in fields.items():
        if each.folder_of is not None and (each.folder_of in sources or each.folder_of not in fields):
            with troubles.gathered():
                sources[name] = _folders(name, each.folder_of, sources)
    stems = set().union(*(source.files for source in sources.values() if source.files is not None))
    agreed: dict[str, _Source] = {}
    for name, source in sources.items():
        with troubles.gathered():
            agreed[name] = source if source.files is not None else _renamed(source, stems)
    return agreed


def _metadata(base: Path) -> tables.Table | None:
    found = [path for suffix in tables.SUFFIXES if (path := base / f"{METADATA}{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{base} has more than one table of metadata: keep one of {_list(found)}")
    return tables.read_table(found[0]) if found else None


def _find(base: Path, name: str, each: FieldConfig, metadata: tables.Table | None) -> _Source | None:
    """The field's own files, table, arrays or column of the metadata; None: there are none."""
    found = [path for path in _tables(base, name, each) if path.is_file()]
    if each.suffixes and (base / name).is_dir():
        found.append(base / name)
    column = metadata.values(name) if metadata is not None and each.cells and metadata.columns else None
    if column is not None and metadata is not None:
        found.append(metadata.path)
    if len(found) > 1:
        raise UserError(f"field {name!r} is there more than once: keep one of {_list(found)}")
    if not found:
        return None
    where = found[0]
    if where.is_dir():
        return _Source(where, _files(where, each.suffixes), {})
    if where.suffix in ARRAYS:
        return _Source(where, None, _normal(_arrays(where).items(), where))
    if column is None:
        table = tables.read_table(where)
        column = table.values("value", name)
        if column is None:
            raise UserError(
                f"{where}: needs a column 'value' or {name!r} beside the one that says whose a row is, found "
                f"{_list(table.columns or ())}"
            )
    return _Source(where, None, _normal(column, where))


def _tables(base: Path, name: str, each: FieldConfig) -> list[Path]:
    suffixes = (tables.SUFFIXES if each.cells else ()) + (ARRAYS if each.arrays else ())
    return [base / f"{name}{suffix}" for suffix in suffixes]


def _nowhere(base: Path, name: str, each: FieldConfig, metadata: tables.Table | None) -> str:
    forms = [f"{name}/*{suffix}" for suffix in each.suffixes] + [path.name for path in _tables(base, name, each)]
    beside = f" or a column {name!r} of {metadata.path.name}" if metadata is not None else ""
    there = [path for path in base.iterdir() if not path.name.startswith(".")] if base.is_dir() else []
    found = f", found {_list(f'{path.name}/' if path.is_dir() else path.name for path in there)}"
    said = f"no data for field {name!r} ({each.kind}) in {base}: expected {' or '.join(forms)}{beside}{found}"
    inner = (file for path in there if path.is_dir() for file in path.iterdir())
    if each.spatial and any(file.suffix.lower() in each.suffixes for file in inner):
        said += (
            f". A field's files stand in a folder of its name: {base.name}/{name}/. If these folders are classes, "
            'kind = "torchvision" with name = "image_folder" reads them as they are'
        )
    return said


def _place_file_names(
    base: Path, found: dict[str, _Source | None], fields: Mapping[str, FieldConfig], metadata: tables.Table
) -> None:
    """The files that a metadata table names: ``NAME_file_name`` is the field's, ``file_name`` the first field's that
    has no files otherwise. Files beside these that it does not name are told of."""
    named: set[str] = set()
    suffixes: set[str] = set()
    for name in [name for name, source in found.items() if source is None and fields[name].suffixes]:
        column = metadata.values(f"{name}_file_name")
        if column is None:
            column = [(key, key) for key, _ in metadata.rows]
            if any(source is not None and source.where == base for source in found.values()):
                continue  # another field's already
        try:
            files = _named(base, column, metadata)
        except UserError:
            del found[name]  # with this all is said of it
            raise
        named.update(os.path.normpath(path) for path in files.values())
        suffixes.update(fields[name].suffixes)
        found[name] = _Source(base, files, {})

    left = [
        entry.path
        for folder in sorted({os.path.dirname(path) for path in named})  # noqa: PTH120  # Paths take long to make
        for entry in os.scandir(folder)
        if is_data(entry.name) and Path(entry.name).suffix.lower() in suffixes and entry.path not in named
    ]
    if left:
        some = _list(os.path.relpath(path, base) for path in left)
        say_once(f"{metadata.path}: leaves out {len(left)} of the files beside those that it names: {some}")


def _named(base: Path, column: Iterable[tuple[str, object]], metadata: tables.Table) -> dict[str, str]:
    """The files that a metadata table's column names, by stem."""
    files: list[tuple[str, str]] = []
    absent: list[str] = []
    for key, file in column:
        path = base / str(file)
        if base.resolve() not in path.resolve().parents:
            raise UserError(f"{metadata.path}: {file!r} leads out of {base}")
        if not path.is_file():
            absent.append(str(file))
        files.append((str(PurePosixPath(key).with_suffix("")), str(path)))
    if absent:
        if len(absent) > 1:
            raise UserError(f"{metadata.path}: names {len(absent)} files that are not in {base}: {_list(absent)}")
        raise UserError(f"{metadata.path}: names {absent[0]}, and there is no such file in {base}")
    return _normal(files, metadata.path)  # type: ignore[return-value]


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Files of these suffixes by stem, those of inner folders too; hidden ones are no data."""
    found = []
    strange = []
    hint = ""
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(filter(is_data, folders))
        require_no_loop(where, folders)
        inner = PurePosixPath(Path(where).relative_to(folder)).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        for name in sorted(filter(is_data, names)):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122  # Paths take long to make, and there are many
            path = f"{where}/{name}"
            if suffix.lower() not in suffixes:
                strange.append(prefix + name)
                with suppress(UserError):
                    if set(suffixes) & set(PICTURES) and not hint and _open(Path(path)):
                        hint = f" ({name} can be read as a picture: give it the suffix that its format has)"
            found.append((prefix + stem, path))
    if strange:
        raise UserError(f"{folder} holds files of another type than {', '.join(suffixes)}: {_list(strange)}{hint}")
    return _normal(found, folder)  # type: ignore[return-value]


def _normal(items: Iterable[tuple[str, object]], where: Path) -> dict[str, object]:
    """Values by stem, each stem in one form: systems write é as one character or as two."""
    values: dict[str, object] = {}
    twice = set()
    for stem, value in items:
        stem = unicodedata.normalize("NFC", stem)
        if stem in values:
            twice.add(stem)
        values[stem] = value
    if twice:
        raise UserError(f"{where} has more than one entry for {len(twice)} stems: {_list(twice)}")
    return values


def _renamed(source: _Source, stems: set[str]) -> _Source:
    """The source of a table, its keys as the files' stems where they are files' names."""

    def stem_of(key: str) -> str:
        if key in stems:
            return key
        bare = key.replace("\\", "/")
        if PurePosixPath(bare).suffix.lower() in (*PICTURES, ".txt", ".npy", ".wav", ".flac"):
            bare = PurePosixPath(bare).with_suffix("").as_posix()
            if not stems:
                return bare
        while bare not in stems and "/" in bare:  # a path from further up: image/0001.png
            bare = bare.partition("/")[2]
        return bare if bare in stems else key

    return attrs.evolve(source, contents=_normal(((stem_of(k), v) for k, v in source.contents.items()), source.where))


def _folders(name: str, of: str, sources: Mapping[str, _Source]) -> _Source:
    """The name of the folder in which each file of another field stands."""
    files = sources[of].files if of in sources else None
    if files is None:
        raise UserError(f"field {name!r}: is the folder of {of!r}, which is no field with files")
    flat = [stem for stem in files if "/" not in stem]
    if flat:
        raise UserError(
            f"field {name!r}: expected the files of {of!r} in a folder for each class ({of}/CLASS/FILE), found "
            f"{_list(flat)} in none"
        )
    return _Source(sources[of].where, None, {stem: stem.partition("/")[0] for stem in files})


def _arrays(path: Path) -> dict[str, object]:
    try:
        if path.suffix == ".safetensors":
            # By way of float32: numpy has no bfloat16.
            return {stem: vector.to(torch.float32).numpy() for stem, vector in load_file(path).items()}
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > max(_UNPACKED * path.stat().st_size, 2**28):  # vectors hardly shrink; a bomb does
            raise UserError(
                f"{path}: would take {unpacked / 2**30:.1f} GiB unpacked, more than {_UNPACKED} times its size; write "
                "it with numpy.savez, which does not pack"
            )
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except UserError:
        raise
    except Exception as error:  # each format's reader has errors of its own
        raise UserError(f"cannot read {path}: {error}") from error


# --- values -----------------------------------------------------------------------------------------------------------


def _column(
    name: str,
    each: FieldConfig,
    source: _Source,
    stems: Iterable[str],
    size: tuple[int, int] | None,
    beside: Sequence[Path],
    keep: bool,
) -> _Column:
    """A field's values of the stems that have it; ``beside``: files of the training split that they are to agree
    with; ``keep``: on disk what files hold."""
    if source.files is not None:
        chosen = [stem for stem in stems if stem in source.files]
        paths = [source.files[stem] for stem in chosen]
        values = decode(name, each, paths, size if each.spatial else None, beside, keep)
        if isinstance(values, Decoded):
            return _Column({stem: row for row, stem in enumerate(chosen)}, values, paths)
        kept = [(stem, value, path) for stem, value, path in zip(chosen, values, paths, strict=True) if value != ""]
        rows = {stem: row for row, (stem, _, _) in enumerate(kept)}
        together = _together(name, source.where, {stem: value for stem, value, _ in kept})
        return _Column(rows, together, [path for _, _, path in kept])
    found: dict[str, Value] = {}
    wrong: list[str] = []
    for stem in stems:
        if stem in source.contents:
            try:
                value = each.parse(source.contents[stem])
            except ValueError as error:
                wrong.append(f"{source.where}: {name} of {stem!r}: {error}")
                continue
            if value is not None:
                found[stem] = value
    if wrong:
        raise UserError(counted(wrong, f"{len(wrong)} values of {name!r} cannot be used:"))
    return _Column(
        {stem: row for row, stem in enumerate(found)}, _together(name, source.where, found), [str(source.where)]
    )


def _together(name: str, where: Path, found: Mapping[str, Value]) -> Tensor | list[Value]:
    """Values as one tensor ``[n, ...]``, or as a list where some are texts."""
    tensors = {stem: value for stem, value in found.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(found):
        return list(found.values())
    first = next(iter(tensors))
    for stem, value in tensors.items():
        if value.shape != tensors[first].shape:
            raise UserError(
                f"{where}: {name} of {stem!r} has shape {list(value.shape)}, but that of {first!r} has "
                f"{list(tensors[first].shape)}"
            )
    return torch.stack(list(tensors.values()))


def _check_aligned(
    stems: Sequence[str],
    files: Mapping[str, Mapping[str, str]],
    columns: Mapping[str, _Column],
    fields: Mapping[str, FieldConfig],
    troubles: Troubles,
) -> None:
    """The pictures of a sample must show the same frame: of one shape, up to scale.

    Args:
        files: by stem, of each field of pictures.
        columns: those of the fields that could be read.
        troubles: are told of those that do not. Where there are some already, files may be damaged, which was told.
    """
    if len(files) < 2:
        return
    key = None
    if not troubles.told:
        parts = ["frames", *(columns[name].fingerprint() for name in files)]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
        if stamped(key):
            return
    wrong = []
    for stem in stems:
        frames = {}
        for name, paths in files.items():
            if stem in paths:
                with suppress(*([ValueError] if troubles.told else [])):
                    extent = fields[name].extent(Path(paths[stem]))
                    if extent is not None:
                        frames[name] = extent
        for name, (height, width) in list(frames.items())[1:]:
            first, (tall, wide) = next(iter(frames.items()))
            # A picture made smaller is off by a rounded pixel at most.
            if abs(height * wide - width * tall) > max(height, width, tall, wide):
                wrong.append(
                    f"{stem}: its pictures do not lie on one another: {first} is {wide}×{tall} "
                    f"({files[first][stem]}), {name} is {width}×{height} ({files[name][stem]}), as "
                    "shown by a viewer, which heeds EXIF; turn or crop one of them like the other"
                )
                break
    if wrong:
        troubles.add(counted(wrong, f"{len(wrong)} of {len(stems)} samples have pictures that do not fit:"))
    elif key is not None:
        stamp(key)


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [FolderConfig]
