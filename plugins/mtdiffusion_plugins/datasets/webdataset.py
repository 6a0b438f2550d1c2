"""``webdataset``: tar files of samples, as WebDataset lays them out and ``sample --shards tar`` writes them.

Nothing is unpacked. Where the members of an archive begin is read once, from their headers, and kept; a sample is then
read by its place, so that any order costs the same and memory holds places alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, Literal

import attrs
import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import and_, deep_mapping, ge, instance_of, le, min_len
from torch import Tensor

from mtdiffusion_plugins.datasets._cells import Cells, Rows, by_kind, data_field, names, of_fields, only
from mtdiffusion_plugins.datasets._walking import HELD_OUT
from mtdiffusion_plugins.sizes import Size, positive_size, sides
from mtdiffusion_registry.cache import cached, load_kept, save_kept
from mtdiffusion_registry.configs import DataField, DatasetConfig, FieldConfig
from mtdiffusion_registry.errors import EmptySplit, Troubles, UserError, all_told, counted
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.pace import Pace
from mtdiffusion_registry.pictures import Encoded

MTDIFFUSION_API = 1

_MEMBER = re.compile(
    r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL
)  # a sample's stem ends at the first dot of the file's name
_FORMAT = 1  # of the index
_HEADER = 2**20  # bytes that a header may have, such as a long name
_MOST = 2**28  # bytes that a member may have; to read it takes some times as many
_SHOWN = 5  # of what is wrong, and of what is there


# --- where members are ------------------------------------------------------------------------------------------------


class _Headers:
    """A file of which headers are read alone: one that says it is huge is refused, and not read into memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, count: int) -> bytes:
        if count > _HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        return self._file.read(count)


@frozen(eq=False)
class _Members:
    """The files in an archive, in its order: names, and where their bytes begin and how many there are, ``[m]``."""

    names: Sequence[str]
    starts: np.ndarray
    sizes: np.ndarray


def _members(path: Path) -> _Members:
    """The files in an archive, from its headers or from what is kept of them.

    Raises:
        UserError: if it is damaged, cut short or compressed, or holds something else than files, or a name that leads
            out of it.
    """
    found = path.stat()
    key = hashlib.sha256(f"{_FORMAT}\0{path}\0{found.st_size}\0{found.st_mtime_ns}".encode()).hexdigest()[:32]
    place = cached(f"webdataset/{key}.safetensors")
    kept = load_kept(place)
    if kept is None:
        kept = _scanned(path, found.st_size)
        save_kept(place, kept)
    text = kept["names"].numpy().tobytes().decode(errors="surrogateescape")
    return _Members(text.split("\0") if text else [], kept["starts"].numpy(), kept["sizes"].numpy())


def _scanned(path: Path, length: int) -> dict[str, Tensor]:
    found: list[str] = []
    starts, sizes = array("q"), array("q")
    offset, last = -1, ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members.clear()  # which would grow with the archive
                _require_plain(path, member)
                if member.offset <= offset or member.size < 0 or member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"{member.name!r} reaches beyond its end")
                offset, last = member.offset, member.name
                if member.isreg():
                    found.append(member.name.removeprefix("./"))
                    starts.append(member.offset_data)
                    sizes.append(member.size)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end, and no header that can be read, after {last!r}")
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        with path.open("rb") as file:
            begin = file.read(6)
        if begin.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise UserError(
                f"{path}: is compressed, so that no sample can be read alone; unpack it to a .tar"
            ) from None
        raise UserError(
            f"{path}: is damaged, cut short or no tar file ({error}{f', after {last!r}' * bool(last)}); copy or make "
            "it anew"
        ) from error
    return {
        "names": torch.tensor(list("\0".join(found).encode(errors="surrogateescape")), dtype=torch.uint8),
        "starts": torch.tensor(starts, dtype=torch.int64),
        "sizes": torch.tensor(sizes, dtype=torch.int64),
    }


def _require_plain(path: Path, member: tarfile.TarInfo) -> None:
    """Raise ``UserError`` if a member is no plain file or folder of a name within the archive."""
    what = ""
    if member.issym() or member.islnk():
        what = f"is a link, to {member.linkname!r}"
    elif not (member.isreg() or member.isdir()) or member.issparse():
        what = "is neither a file nor a folder"
    elif member.name.startswith("/") or ".." in PurePosixPath(member.name).parts or "\0" in member.name:
        what = "has a name that leads out of the archive"
    if what:
        raise UserError(f"{path}: its member {member.name!r} {what}; make it anew, of plain files alone")


# --- samples ----------------------------------------------------------------------------------------------------------


@frozen(eq=False)
class _Places:
    """Where the members of samples are.

    Attributes:
        paths: the archives.
        suffixes: of members, without their first dot.
        stems: of the samples, in UTF-8, one behind the other; ``ends`` says where each ends, ``[n]``.
        shard: the archive of each sample, ``[n]``.
        start, size, suffix: of each field's member, in bytes and as a place in ``suffixes``, ``[n, fields]``; where
            there is none, the start is −1.
    """

    paths: Sequence[Path]
    suffixes: Sequence[str]
    stems: bytes
    ends: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    size: np.ndarray
    suffix: np.ndarray

    def stem(self, index: int) -> str:
        begin = int(self.ends[index - 1]) if index else 0
        return self.stems[begin : int(self.ends[index])].decode(errors="surrogateescape")

    def member(self, index: int, place: int) -> str:
        """The name of a field's member; "" if there is none."""
        if self.start[index, place] < 0:
            return ""
        return f"{self.stem(index)}.{self.suffixes[self.suffix[index, place]]}"


class WebDatasetDataset(Rows):
    """Samples by their places in archives.

    Args:
        places: where they are.
        fields: names of the fields in the order of ``places``.
        keys: of fields that read a JSON member, the key in it.
        cells: how members are read.
        fingerprint: of what the archives hold.
    """

    def __init__(
        self, places: _Places, fields: Sequence[str], keys: Mapping[str, Sequence[str]], cells: Cells, fingerprint: str
    ) -> None:
        self._places, self._fields, self._keys, self._cells = places, fields, keys, cells
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._places.ends)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._cells.sample(self.row(index))

    def row(self, index: int) -> dict[str, Any]:
        places = self._places
        row: dict[str, Any] = {}
        path = places.paths[places.shard[index]]
        try:
            archive = os.open(path, os.O_RDONLY)  # anew each time: that is quick, and processes share no position
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            for name, column in self._cells.columns.items():
                place = self._fields.index(name)
                start, size = int(places.start[index, place]), int(places.size[index, place])
                if start < 0:
                    row[column] = None
                    continue
                content = os.pread(archive, size, start)
                member = f"{path.name}: {places.member(index, place)}"
                if len(content) < size:
                    row[column] = UserError(f"{member}: is cut short; the archive was changed while it is read")
                    continue
                try:
                    row[column] = self._content(name, Encoded(content, member))
                except UserError as error:
                    row[column] = error
        finally:
            os.close(archive)
        return row

    def _content(self, name: str, source: Encoded) -> Any:
        """A member as its field reads it: a file, or a value of a JSON member."""
        each = self._cells.fields[name]
        _require_sound_png(source)
        if not source.name.endswith(".json") or ".json" in each.suffixes or not (each.cells or each.arrays):
            return source
        try:
            found = json.loads(source.content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}: cannot be read as JSON ({error})") from None
        wanted = self._keys.get(name, [name, each.kind, "value"])
        if isinstance(found, dict) and not (key := [key for key in wanted if key in found]):
            there = ", ".join(found) or "none"
            raise UserError(f"{source}: has none of the keys {', '.join(wanted)}; its keys are {there}")
        return found[key[0]] if isinstance(found, dict) else found

    def without(self, fields: Collection[str]) -> WebDatasetDataset:
        other = copy(self)
        other._cells = self._cells.without(fields)
        return other

    def stored(self, dtypes: Mapping[str, Collection[torch.dtype]]) -> WebDatasetDataset:
        other = copy(self)
        other._cells = attrs.evolve(self._cells, taken=dtypes)
        return other

    def describe(self, index: int, field: str | None = None) -> str:
        places = self._places
        path = places.paths[places.shard[index]]
        member = places.member(index, self._fields.index(field)) if field in self._fields else ""
        return f"{member or places.stem(index)} ({path})"


def _require_sound_png(source: Encoded) -> None:
    """Raise ``UserError`` if a PNG's checksums do not agree: tar files have none of contents, and Pillow reads other
    pixels from one that was damaged."""
    content, place = source.content, 8
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return
    kind = b""
    while kind != b"IEND":
        length, kind = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
        end = place + 8 + length
        if zlib.crc32(content[place + 4 : end]) != int.from_bytes(content[end : end + 4]) or not kind:
            raise UserError(f"{source}: the picture is damaged (a checksum differs); copy the archive anew")
        place = end + 4


# --- the configuration ------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class WebDatasetConfig(DatasetConfig):
    """Samples in tar files, as the library WebDataset lays them out, whose library is not needed: members of one stem,
    side by side, are a sample (``0001.jpg``, ``0001.cls``). What ``mtdiffusion sample --shards tar`` writes is so.

    A field reads the member ``STEM.NAME.SUFFIX`` (``0001.image.png``) or, where no member has its name,
    ``STEM.SUFFIX``, of the suffixes that its kind reads; ``columns`` says another. A JSON member holds the field's
    value, or an object with it, under the field's name or kind. Members that no field reads are left alone.

    Members are read when their sample comes up. Archives are not unpacked, and must not be compressed.

    Attributes:
        root: a folder of archives, ``*.tar``, or one archive. If the folder has subfolders ``train`` and ``test`` (or
            ``val``), they are the splits.
        fields: each field's name and its kind, as a name or with the kind's options.
        columns: the suffix of a field's member, where it is another: ``{ mask = "seg.png" }``; ``"jpg;png"`` is either
            of them, ``"json/caption"`` the value of a key of a JSON member.
        size: pictures are scaled (bicubic, masks nearest) and cropped centrally to this side, or to a height and width;
            None keeps them as they are.
        allow_missing: fields that a sample may lack; its dict then lacks the key.
        test_fraction: where there are no subfolders, the share of stems in the test split, decided by a hash of the
            stem.

    Raises:
        UserError: from :meth:`build`, if an archive is missing or damaged, or samples lack a field.
    """

    kind: ClassVar[str] = "webdataset"

    root: Path = field(converter=Path)
    fields: dict[str, FieldConfig | str] = field(
        converter=by_kind,
        validator=and_(min_len(1), deep_mapping(min_len(1), instance_of((FieldConfig, str)), instance_of(dict))),
    )
    columns: dict[str, str] = field(factory=dict, validator=of_fields)
    size: Size | None = field(default=None, validator=positive_size)
    allow_missing: tuple[str, ...] = field(default=(), converter=names, validator=of_fields)
    test_fraction: float = field(default=0.1, validator=and_(ge(0), le(1)))

    def reading(self, fields: Collection[str]) -> WebDatasetConfig:
        return attrs.evolve(self, **only(fields, self.fields, self.columns, self.allow_missing))

    def data_field(self, name: str) -> DataField | None:
        return data_field(self.fields, name)

    def build(self, split: Literal["train", "test"]) -> WebDatasetDataset:
        root, there = self._folders()
        other: Literal["train", "test"] = "test" if split == "train" else "train"
        if not there:
            return all_told(
                lambda: self._read(root, split, by_hash=True),
                lambda: self._read(root, other, by_hash=True, thorough=True),
            )
        if len(there) == 1 or "train" not in there:
            raise UserError(
                f"{root}: has the folder{'s' * (len(there) > 1)} {', '.join(there)} only: it needs both 'train' and "
                "'test', or neither"
            )
        folders = {"train": root / "train", "test": root / there[1]}
        return all_told(
            lambda: self._read(folders[split], split, by_hash=False),
            lambda: self._read(folders[other], other, by_hash=False, thorough=True),
            lambda: self._validation(thorough=True),
        )

    def validation(self) -> WebDatasetDataset | None:
        return self._validation()

    def _validation(self, *, thorough: bool = False) -> WebDatasetDataset | None:
        root, there = self._folders()
        if "train" not in there or len(there) <= 2:
            return None
        return self._read(root / there[2], "test", by_hash=False, thorough=thorough)

    def _folders(self) -> tuple[Path, list[str]]:
        """The root, and which of its folders hold splits: that to train on, then the held-out ones."""
        root = self.root.expanduser().absolute()
        if not root.exists():
            raise UserError(f"data.root: there is no folder or archive {root}")
        return root, [name for name in ("train", *HELD_OUT) if (root / name).is_dir()]

    def _read(self, base: Path, split: str, by_hash: bool, *, thorough: bool = False) -> WebDatasetDataset:
        cells = Cells.of(self.fields, {}, None if self.size is None else sides(self.size), self.allow_missing)
        paths = _archives(base)
        pace = Pace(f"reading the headers of {base}", len(paths))
        there: set[str] = set()  # suffixes
        digest = hashlib.sha256(split.encode())
        wrong: dict[Path, str] = {}
        for count, path in enumerate(paths, 1):
            try:
                members = _members(path)
            except UserError as error:
                wrong[path] = str(error)
                continue
            there |= {match[2].lower() for name in members.names if (match := _MEMBER.fullmatch(name))}
            found = path.stat()
            digest.update(f"\0{path.name}\0{found.st_size}\0{found.st_mtime_ns}".encode(errors="surrogateescape"))
            pace.tell(count)
        troubles = Troubles()
        if wrong:
            count, paths = len(paths), [path for path in paths if path not in wrong]
            troubles.add(counted([*wrong.values()], f"{len(wrong):,} of {count:,} archives cannot be read:"))
        if not paths:
            troubles.tell()
        # A field that samples may lack may be missing from all that are held out; from training, it would be a slip.
        # What archives hold that cannot be read is not known.
        optional = [*self.fields] if wrong else self.allow_missing if split == "test" else ()
        columns, keys = self._columns(base, cells.fields, there, optional, troubles)
        share = self.test_fraction if by_hash else None
        places = _placed(paths, list(columns.values()), share, split, troubles)
        if not len(places.ends):
            troubles.tell()
            more = f": change test_fraction (now {self.test_fraction:g})" if by_hash else ""
            raise EmptySplit(f"the {split} split of {base} is empty{more}")
        told = []
        for place, name in enumerate(columns):
            lacking = np.flatnonzero(places.start[:, place] < 0)
            if not len(lacking) or name in self.allow_missing:
                continue
            told.append(name)
            if not columns[name]:  # and no archive that can be read has any
                continue
            some = ", ".join(f"{places.stem(i)} ({paths[places.shard[i]].name})" for i in lacking[:_SHOWN].tolist())
            more = f" and {len(lacking) - _SHOWN:,} more" * (len(lacking) > _SHOWN)
            troubles.add(
                f"{base}: {len(lacking):,} of {len(places.ends):,} samples have no member for {name!r}: {some}{more}. "
                f"If samples may lack it, add {name!r} to allow_missing"
            )
        named = {name: "/".join([";".join(each), *keys.get(name, ())]) for name, each in columns.items()}
        cells = attrs.evolve(cells.without(cells.fields.keys() - columns.keys()), columns=named, what="member")
        digest.update(f"\0{cells.key()}\0{share}".encode())
        cells = attrs.evolve(cells, optional=[*cells.optional, *told])
        data = WebDatasetDataset(places, list(columns), keys, cells, digest.hexdigest()[:32])
        cells.require_sound(data, split, troubles, thorough=thorough)
        return data

    def _columns(
        self,
        base: Path,
        fields: Mapping[str, FieldConfig],
        there: Collection[str],
        optional: Collection[str],
        troubles: Troubles,
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """The suffixes of each field's members, and the key of those that read a part of a JSON member. There is
        trouble with a field that has none, and with two that do not say theirs and have one in common; it is left out.
        """
        columns: dict[str, list[str]] = {}
        keys: dict[str, list[str]] = {}
        for name, each in fields.items():
            if name in self.columns:
                said, _, key = self.columns[name].partition("/")
                found = [suffix for suffix in said.lower().split(";") if suffix in there]
                expected = said.split(";")
                if key:
                    keys[name] = [key]
            else:
                kinds = [suffix.removeprefix(".") for suffix in each.suffixes]
                mine = [f"{name.lower()}.{kind}" for kind in (*kinds, *["json"] * (each.cells or each.arrays))]
                found = [suffix for suffix in mine if suffix in there] or [kind for kind in kinds if kind in there]
                expected = mine + kinds
                shared = {
                    other: min(common)
                    for other, suffixes in columns.items()
                    if other not in self.columns and (common := set(suffixes) & set(found))
                }
                for other, both in shared.items():
                    troubles.add(
                        f"{base}: members .{both} may be {other!r} or {name!r}. Say which they are: "
                        f'columns = {{ {other} = "{both}", {name} = "..." }}'
                    )
                if shared:
                    continue
            if not found and name not in optional:
                some = sorted(there)
                more = f" and {len(some) - 2 * _SHOWN} more" * (len(some) > 2 * _SHOWN)
                troubles.add(
                    f"{base}: has no member for the field {name!r} (.{', .'.join(expected)}); its members end in "
                    f'.{", .".join(some[: 2 * _SHOWN])}{more}. Say which it is: columns = {{ {name} = "..." }}'
                )
                continue
            columns[name] = found
        return columns, keys


def _archives(base: Path) -> list[Path]:
    """The archives of a folder, by name, or the one that is given.

    Raises:
        UserError: if there are none.
    """
    if base.is_file():
        return [base]
    paths = sorted(path for path in base.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        packed = [
            path.name for path in base.glob("*") if path.name.endswith((".tgz", ".tar.gz", ".tar.zst", ".tar.xz"))
        ]
        hint = (
            f"; {min(packed)} is compressed, so that no sample can be read alone: unpack it to a .tar" if packed else ""
        )
        raise UserError(f"{base}: has no archives (*.tar){hint}")
    return paths


def _placed(
    paths: Sequence[Path], columns: Sequence[Collection[str]], share: float | None, split: str, troubles: Troubles
) -> _Places:
    """The samples of a split: members side by side of one stem, of which a field reads some.

    Args:
        columns: the suffixes of each field's members.
        share: of stems in the test split; None: all are in the split.
        troubles: are told of members that are huge, and of two for one field; the first stays.
    """
    huge: list[str] = []
    doubled: list[str] = []
    readers: dict[str, list[int]] = {}
    for place, each in enumerate(columns):
        for suffix in each:
            readers.setdefault(suffix, []).append(place)
    suffixes = list(readers)
    stems = bytearray()
    ends, shards, starts, sizes, kinds = array("q"), array("i"), array("q"), array("q"), array("i")
    none = [-1] * len(columns)
    for shard, path in enumerate(paths):
        members, before, wanted = _members(path), None, False
        for name, start, size in zip(members.names, members.starts.tolist(), members.sizes.tolist(), strict=True):
            match = _MEMBER.fullmatch(name)
            if match is None or (fields := readers.get(match[2].lower())) is None:
                continue
            if match[1] != before:
                before = match[1]
                stem = before.encode(errors="surrogateescape")
                wanted = share is None or (_fraction(stem) < share) == (split == "test")
                if wanted:
                    stems += stem
                    ends.append(len(stems))
                    shards.append(shard)
                    starts.extend(none)
                    sizes.extend(none)
                    kinds.extend(none)
            if not wanted:
                continue
            if size > _MOST:
                huge.append(f"{path}: its member {name!r} has {size:,} bytes, more than {_MOST:,}")
                size = 0  # so that it is not read
            for place in fields:
                at = len(starts) - len(columns) + place
                if starts[at] >= 0:
                    doubled.append(
                        f"{path}: the sample {before!r} has two members for one field, {name!r} and one that ends in "
                        f".{suffixes[kinds[at]]}; say which it is in columns, or make the archive anew"
                    )
                    continue
                starts[at], sizes[at], kinds[at] = start, size, suffixes.index(match[2].lower())
    if huge:
        troubles.add(counted(huge, f"{len(huge):,} members are too large:"))
    if doubled:
        troubles.add(counted(doubled, f"{len(doubled):,} samples have two members for one field:"))
    shape = (len(ends), len(columns))
    return _Places(
        paths,
        suffixes,
        bytes(stems),
        np.array(ends, np.int64),
        np.array(shards, np.int32),
        np.array(starts, np.int64).reshape(shape),
        np.array(sizes, np.int64).reshape(shape),
        np.array(kinds, np.int32).reshape(shape),
    )


def _fraction(stem: bytes) -> float:
    """A number in [0, 1) that depends on the stem only, the same as of the kind ``folder``."""
    return int.from_bytes(hashlib.sha256(stem).digest()[:8], "big") / 2**64


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [WebDatasetConfig]
