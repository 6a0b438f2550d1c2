"""``litdata``: data sets packed into shards, in a folder or in an object store, and the packing of any data set.

A sample that ``mtdiffusion data pack`` writes is one leaf of bytes, a safetensors file: it tells what it holds, so that
samples may lack fields and differ in shape, and reading it unpickles nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import warnings
from bisect import bisect_right
from collections.abc import Collection, Mapping
from copy import copy
from itertools import accumulate
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, Literal

import attrs
import torch
from attrs import field, frozen
from attrs.validators import deep_mapping, instance_of, min_len
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins.datasets._cells import SOME, Cells, Rows, by_kind, data_field, names, of_fields, only
from mtdiffusion_plugins.datasets._walking import HELD_OUT
from mtdiffusion_plugins.files import from_levels
from mtdiffusion_plugins.sizes import Size, positive_size, sides
from mtdiffusion_registry.cache import cached
from mtdiffusion_registry.configs import DataField, DatasetConfig, FieldConfig
from mtdiffusion_registry.errors import EmptySplit, Troubles, UserError, all_told, counted
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.looking import PATIENCE, look_through

MTDIFFUSION_API = 1

SHARD = 8 * 2**20
"""Bytes of a shard, about: an object store is asked for a whole one at a time."""
INDEX = "index.json"
"""Of a split, litdata's: its shards. Of the folder above, ours: what the splits hold."""
_FORMAT = "mtdiffusion shards"
_VERSION = 1
_NARROW = (torch.uint8, torch.int16, torch.int32)


# --- samples as bytes -------------------------------------------------------------------------------------------------


def encode(sample: Mapping[str, Tensor | str]) -> dict[str, Tensor]:
    """What is stored of a sample, by ``FORM/FIELD``: the form is ``text``, ``levels`` (0..255 for values in [−1, 1]) or
    the dtype that the field has; whole numbers are stored in the narrowest type that holds them. :func:`decode` gives
    back exactly the sample.
    """
    stored = {}
    for name, value in sample.items():
        form, tensor = _encoded(value)
        stored[f"{form}/{name}"] = tensor.contiguous()
    return stored


def _encoded(value: Tensor | str) -> tuple[str, Tensor]:
    if isinstance(value, str):
        content = value.encode(errors="surrogateescape")
        return "text", torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()
    value = value.detach().cpu()
    if value.dtype == torch.float32 and value.numel():
        levels = value.add(1).mul_(127.5).round_().clamp_(0, 255).nan_to_num_().to(torch.uint8)
        if torch.equal(from_levels(levels), value):
            return "levels", levels
    if value.dtype == torch.int64 and value.numel():
        low, high = int(value.min()), int(value.max())
        for narrow in _NARROW:
            if torch.iinfo(narrow).min <= low and high <= torch.iinfo(narrow).max:
                return "int64", value.to(narrow)
    return str(value.dtype).removeprefix("torch."), value


def decode(
    stored: Mapping[str, Tensor], taken: Mapping[str, Collection[torch.dtype]] = MappingProxyType({})
) -> dict[str, Tensor | str]:
    """The sample of what :func:`encode` gave.

    Args:
        taken: by field, dtypes of what is stored that are given as they are
            (:meth:`mtdiffusion.interfaces.Dataset.stored`).

    Raises:
        ValueError: if it is none.
    """
    sample: dict[str, Tensor | str] = {}
    for key, tensor in stored.items():
        form, _, name = key.partition("/")
        if form == "text":
            sample[name] = tensor.numpy().tobytes().decode(errors="surrogateescape")
        elif form in ("levels", "int64") and tensor.dtype in taken.get(name, ()):
            sample[name] = tensor
        elif form == "levels":
            sample[name] = from_levels(tensor)
        elif isinstance(dtype := getattr(torch, form, None), torch.dtype):
            sample[name] = tensor.to(dtype)
        else:
            raise ValueError(f"holds {key!r}, which this version does not know; upgrade mtdiffusion")
    return sample


# --- shards -----------------------------------------------------------------------------------------------------------


class _Shards:
    """The samples of a split as litdata stores them, by index.

    A shard of an object store is fetched whole when a sample of it is first asked for, and stays in the cache folder.

    Args:
        where: what errors call it.
        folder: the split's folder, or its copy in the cache.
        url: where its shards are fetched from; None: they are in the folder.
        index: litdata's.
    """

    def __init__(self, where: str, folder: Path, url: str | None, index: Mapping[str, Any]) -> None:
        self.where, self.folder, self.url = where, folder, url
        self.names = [str(chunk["filename"]) for chunk in index["chunks"]]
        self.ends = list(accumulate(int(chunk["chunk_size"]) for chunk in index["chunks"]))
        self._opened: tuple[int, Any, Any] | None = None

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._opened is None or self._opened[0] != os.getpid():  # a forked process shares the files' positions
            self._opened = os.getpid(), *_open(self.folder, self.url)
        _, reader, downloader = self._opened
        name = self.shard(index)
        try:
            if downloader is not None and not (self.folder / name).is_file():
                _fetch(downloader, f"{self.url}/{name}", self.folder / name)
            return reader[index]
        except Exception as error:  # of the object store's client, or of a damaged shard
            raise UserError(f"{name} of {self.where} cannot be read ({_said(error)})") from error

    def shard(self, index: int) -> str:
        """The file that holds a sample."""
        return self.names[bisect_right(self.ends, index)]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: a worker process opens it again."""
        return {**self.__dict__, "_opened": None}


def _open(folder: Path, url: str | None) -> tuple[Any, Any]:
    """litdata's reader of a folder, and the downloader of what is to be there."""
    library = _library()
    from litdata.streaming.downloader import get_downloader
    from litdata.streaming.serializers import BytesSerializer

    options: dict[str, Any] = {"serializers": {"jpeg": BytesSerializer(), "image": BytesSerializer()}}
    if "batch_decode" in inspect.signature(library.StreamingDataset).parameters:
        options["batch_decode"] = 0  # its neighbours are not what is asked for next
    reader = library.StreamingDataset(str(folder), **options)
    return reader, None if url is None else get_downloader(url, str(folder), [])


def _fetch(downloader: Any, url: str, path: Path) -> None:
    """A file of an object store, whole or not at all; of several processes, one fetches it."""
    from filelock import FileLock

    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with FileLock(f"{path}.lock"):
        if path.is_file():
            return
        try:
            downloader.download_file(url, str(partial))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
            Path(f"{partial}.lock").unlink(missing_ok=True)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class LitDataDataset(Rows):
    """Samples by index.

    Args:
        shards: their bytes or leaves.
        cells: how leaves are read; None: samples are as :func:`encode` stores them.
        fingerprint: of what the shards hold.
    """

    def __init__(self, shards: _Shards, cells: Cells | None, fingerprint: str | None) -> None:
        self._shards, self._cells, self.fingerprint = shards, cells, fingerprint
        self._taken: Mapping[str, Collection[torch.dtype]] = {}

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        content = self._shards[index]
        if self._cells is not None:
            return self._cells.sample(self._as_row(content))
        try:
            return decode(load(bytes(content)), self._taken)
        except (SafetensorError, TypeError, ValueError) as error:
            raise UserError(f"{self._shards.shard(index)} of {self._shards.where}: is damaged ({error})") from error

    def row(self, index: int) -> dict[str, Any]:
        return self._as_row(self._shards[index])

    def _as_row(self, content: Any) -> dict[str, Any]:
        """A sample's leaves by column, of shards that were made elsewhere."""
        row = _row(content)
        if self._cells is not None:
            for name, said in self._cells.lacking(row, self._shards.where).items():
                row[self._cells.columns[name]] = UserError(said)
        return row

    def stored(self, dtypes: Mapping[str, Collection[torch.dtype]]) -> LitDataDataset:
        other = copy(self)
        other._taken = dtypes
        other._cells = self._cells and attrs.evolve(self._cells, taken=dtypes)
        return other

    def describe(self, index: int, field: str | None = None) -> str:
        return f"sample {index} of {self._shards.where} ({self._shards.shard(index)})"


def _row(content: Any) -> dict[str, Any]:
    """A sample's leaves by column; of a list, by their places."""
    if isinstance(content, Mapping):
        return {str(name): value for name, value in content.items()}
    leaves = content if isinstance(content, list | tuple) else [content]
    return {str(place): value for place, value in enumerate(leaves)}


@frozen(eq=False)
class _Located:
    """A split's shards.

    Attributes:
        name: its folder's.
        folder: here, or its copy in the cache.
        url: where its shards are fetched from; None: they are in the folder.
        index: litdata's, and its text.
        packed: the fingerprint that :meth:`LitDataConfig.pack` wrote; None: it wrote none of this.
    """

    name: str
    folder: Path
    url: str | None
    index: dict[str, Any]
    text: str
    packed: str | None


# --- the configuration ------------------------------------------------------------------------------------------------


def _place(value: str | Path) -> str | Path:
    """A folder here as a path, a URL as it is."""
    return value if isinstance(value, str) and ("://" in value or value.startswith("local:")) else Path(value)


@frozen(kw_only=True)
class LitDataConfig(DatasetConfig):
    """A data set in shards, ``root/train`` and ``root/test`` (or ``val``), in a folder or in an object store, read by
    litdata's ``StreamingDataset`` by index. The library is an extra: ``pip install 'mtdiffusion[streaming]'``.

    ``mtdiffusion data pack`` packs any data set so; its fields are then those that it had, exactly. Of shards that
    ``litdata.optimize`` made of dicts, ``fields`` says what is read, as of the kind ``huggingface``; pickled ones are
    refused, and so are compressed or encrypted ones, of which no sample can be read alone.

    Samples come in the engine's order, a permutation of all of them for each epoch, which litdata's own loader does not
    know, so that they are read one at a time. From a folder, that takes 0.3 ms of a processor for a sample of 48 KB and
    0.5 ms for one of 192 KB, in shards of 8 MB. From an object store, litdata would ask for each sample alone, in two
    requests, every time: instead, a shard is fetched whole when a sample of it first comes up, and kept in the cache
    folder (``MTDIFFUSION_CACHE``). The first steps wait for that, for up to a shard a sample, and there must be room
    for the whole data set; what was fetched is read as from a folder, also by the next run.

    Attributes:
        root: the folder, or its URL: ``s3://``, ``gs://`` and whatever else litdata reads.
        fields: of shards made elsewhere, each field's name and its kind, as a name or with the kind's options.
        columns: the key of a sample's dict for a field, where it is not of the field's name; of a tuple, its place.
        size: with ``fields``, pictures are scaled and cropped centrally to this side, or to a height and width.
        allow_missing: with ``fields``, those that may be blank.

    Raises:
        UserError: from :meth:`build`, if the library or the shards are not there, or cannot be read.
    """

    kind: ClassVar[str] = "litdata"

    root: str | Path = field(converter=_place)
    fields: dict[str, FieldConfig | str] = field(
        factory=dict,
        converter=by_kind,
        validator=deep_mapping(min_len(1), instance_of((FieldConfig, str)), instance_of(dict)),
    )
    columns: dict[str, str] = field(factory=dict, validator=of_fields)
    size: Size | None = field(default=None, validator=positive_size)
    allow_missing: tuple[str, ...] = field(default=(), converter=names, validator=of_fields)

    def reading(self, fields: Collection[str]) -> LitDataConfig:
        return attrs.evolve(self, **only(fields, self.fields, self.columns, self.allow_missing))

    def data_field(self, name: str) -> DataField | None:
        return data_field(self.fields, name)

    def build(self, split: Literal["train", "test"]) -> LitDataDataset:
        _library()
        if self.size is not None and not self.fields:
            raise UserError("data.size: pictures are as they were packed; pack them in another size")
        located = self._located(split)
        other: Literal["train", "test"] = "test" if split == "train" else "train"
        # Of an object store nothing more is fetched for what else may be wrong.
        others = [lambda: self._read(self._located(other), other, thorough=True)] if located.url is None else []
        return all_told(lambda: self._read(located, split), *others)

    def _located(self, split: Literal["train", "test"]) -> _Located:
        if self.fields:
            name, folder, index, text = self._foreign(split)
            packed = None
        else:
            name, contents = split, self._contents()
            if split not in contents["splits"]:
                raise EmptySplit(f"the {split} split of {self.root} is empty: there was none when it was packed")
            folder, index, text = self._index(split)
            packed = str(contents["splits"][split]["fingerprint"])
        return _Located(
            name, folder, None if isinstance(self.root, Path) else _join(self.root, name), index, text, packed
        )

    def _read(self, found: _Located, split: str, *, thorough: bool = False) -> LitDataDataset:
        where = f"{self.root} ({found.name})"
        cells = None
        fingerprint: str | None = found.packed
        if self.fields:
            size = None if self.size is None else sides(self.size)
            cells = Cells.of(self.fields, self.columns, size, self.allow_missing)
            fingerprint = _fingerprint(found.text, cells.key(), found.folder, found.index, local=found.url is None)
        _require_readable(found.index, where, leaves=["bytes"] if cells is None else None)
        if found.url is None:
            _require_shards(found.folder, found.index)
        data = LitDataDataset(_Shards(where, found.folder, found.url, found.index), cells, fingerprint)
        if cells is not None:  # of an object store, the first shard is fetched for it
            cells.require_sound(data, split, Troubles(), thorough=thorough, most=None if found.url is None else SOME)
        elif thorough:
            look_through(data, f"{split} split", patience=PATIENCE)
        return data

    def _contents(self) -> dict[str, Any]:
        """What the packed splits hold, as :meth:`pack` wrote it.

        Raises:
            UserError: if it is not there.
        """
        if isinstance(self.root, Path):
            path = self.root.expanduser() / INDEX
            if not path.is_file():
                there = "there is no such folder" if not path.parent.is_dir() else f"it has no {INDEX}"
                raise UserError(
                    f"data.root {self.root}: {there}. 'mtdiffusion data pack' writes one; of shards that "
                    "litdata.optimize made, say what is read of them: data.fields"
                )
            text = path.read_text(encoding="utf-8", errors="replace")
        else:
            text = _fetched_text(self.root, INDEX)
        contents = _json(text, f"{self.root}: {INDEX}")
        if contents.get("format") != _FORMAT or "splits" not in contents:
            raise UserError(
                f"data.root {self.root}: its {INDEX} is not that of 'mtdiffusion data pack'. Of shards that "
                "litdata.optimize made, give the folder above the splits 'train' and 'test', and data.fields"
            )
        if contents.get("version") != _VERSION:
            raise UserError(
                f"data.root {self.root}: was packed in version {contents.get('version')} of the format, this "
                f"mtdiffusion reads version {_VERSION}; pack it again, or upgrade mtdiffusion"
            )
        splits = contents["splits"]
        if not isinstance(splits, dict) or not all(
            isinstance(each, dict) and "fingerprint" in each for each in splits.values()
        ):
            raise UserError(f"data.root {self.root}: its {INDEX} is damaged (splits is {splits!r:.60}); pack it again")
        return contents

    def _foreign(self, split: str) -> tuple[str, Path, dict[str, Any], str]:
        """The name, folder and index of a split that was made elsewhere, by whichever name it has."""
        problems = []
        for name in ("train",) if split == "train" else HELD_OUT:
            try:
                return name, *self._index(name)
            except UserError as error:
                problems.append(error)
        if split == "test" and isinstance(self.root, Path) and (self.root.expanduser() / "train").is_dir():
            raise EmptySplit(f"data.root {self.root}: has none of the folders {', '.join(HELD_OUT)} with {INDEX}")
        raise problems[0]

    def _index(self, name: str) -> tuple[Path, dict[str, Any], str]:
        """The folder of a split (of an object store, its copy in the cache), and litdata's index of it."""
        if isinstance(self.root, Path):
            folder = self.root.expanduser() / name
            if not (folder / INDEX).is_file():
                raise UserError(f"data.root {self.root}: expected shards in {folder}, and there is no {INDEX}")
            text = (folder / INDEX).read_text(encoding="utf-8", errors="replace")
        else:
            url = _join(self.root, name)
            text = _fetched_text(url, INDEX)
            # The index is part of the key: shards that were packed anew are other shards.
            key = hashlib.sha256(f"{url}\0{text}".encode()).hexdigest()[:32]
            folder = cached(f"litdata/{key}")
            folder.mkdir(exist_ok=True)
            partial = folder / f"{INDEX}.{os.getpid()}"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / INDEX)
        index = _json(text, f"{self.root}: {name}/{INDEX}")
        if problem := _index_problem(index):
            raise UserError(
                f"data.root {self.root}: {name}/{INDEX} is not an index that litdata writes ({problem}); copy the "
                "shards anew, or pack them again"
            )
        return folder, index, text

    @classmethod
    def pack(cls, splits: Mapping[str, Dataset], folder: Path) -> None:
        contents = {name: _pack(dataset, folder / name) for name, dataset in splits.items()}
        text = json.dumps({"format": _FORMAT, "version": _VERSION, "splits": contents}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _pack(dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Write a split's shards; what it holds."""
    _library()
    from litdata.streaming import Cache

    digest = hashlib.sha256()
    fields: dict[str, dict[str, Any]] = {}
    folder.mkdir(parents=True)
    writer = Cache(str(folder), chunk_bytes=SHARD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="An item was larger")  # its shard is as large as it must be
        for index in range(len(dataset)):
            sample = dataset[index]
            try:
                content = save(stored := encode(sample))
            except (SafetensorError, ValueError, KeyError) as error:
                raise UserError(f"{dataset.describe(index)}: cannot be packed ({_said(error)})") from error
            digest.update(hashlib.sha256(content).digest())
            _note(fields, stored)
            writer[index] = content
        writer.done()
        writer.merge()
    return {
        "count": len(dataset),
        "fingerprint": digest.hexdigest()[:32],
        "source": dataset.fingerprint,
        "fields": fields,
    }


def _note(fields: dict[str, dict[str, Any]], stored: Mapping[str, Tensor]) -> None:
    """Add a sample to what is told of the fields; a shape or a type that differs between samples is null."""
    for key, tensor in stored.items():
        form, _, name = key.partition("/")
        known = {
            "text": ("text", None),
            "levels": ("float32", list(tensor.shape)),
        }
        dtype, shape = known.get(form, (form, list(tensor.shape)))
        seen = fields.setdefault(name, {"dtype": dtype, "shape": shape, "count": 0})
        seen["count"] += 1
        seen["dtype"] = dtype if seen["dtype"] == dtype else None
        seen["shape"] = shape if seen["shape"] == shape else None


def _require_readable(index: Mapping[str, Any], where: str, leaves: list[str] | None) -> None:
    """Raise ``UserError`` if samples cannot be read alone, or only by unpickling."""
    config = index["config"]
    formats = [str(each).partition(":")[0] for each in config.get("data_format") or []]
    if "pickle" in formats:
        raise UserError(
            f"{where}: its samples are pickled, which can run any code when it is read; make the shards anew of dicts "
            "of tensors, arrays, bytes, numbers and texts"
        )
    for key in ("compression", "encryption"):
        if config.get(key):
            raise UserError(
                f"{where}: its shards have {key} ({config[key]}), so that no sample can be read alone; make them "
                f"anew without {key}"
            )
    if config.get("item_loader") not in (None, "PyTreeLoader"):
        raise UserError(f"{where}: was made for {config['item_loader']}, expected samples, one by one (PyTreeLoader)")
    if leaves is not None and formats != leaves:
        raise UserError(f"{where}: was changed since it was packed: expected {leaves}, found {formats}")


def _index_problem(index: Mapping[str, Any]) -> str:
    """What an index has that litdata does not write; empty if nothing."""
    chunks, config = index.get("chunks"), index.get("config")
    if not isinstance(chunks, list) or not isinstance(config, dict):
        return "it has no list of chunks, or no config"
    if not isinstance(config.get("data_format") or [], list):
        return f"data_format is {config['data_format']!r}"
    for place, chunk in enumerate(chunks):
        if not isinstance(chunk, dict):
            return f"chunk {place} is {chunk!r}"
        name = chunk.get("filename")
        if not isinstance(name, str) or name in ("", "..") or "\0" in name or PurePath(name).name != name:
            return f"the filename of chunk {place} is {name!r}"
        for key in ("chunk_size", "chunk_bytes"):
            if type(chunk.get(key)) is not int or chunk[key] < 0:
                return f"{key} of chunk {place} is {chunk.get(key)!r}"
    return ""


def _require_shards(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if shards are missing or cut short: litdata would wait for them."""
    wrong = []
    for chunk in index["chunks"]:
        path = folder / chunk["filename"]
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < chunk["chunk_bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes, expected {chunk['chunk_bytes']:,}"
            wrong.append(f"{path}: {found}; copy the shards anew, or pack them again")
    if wrong:
        raise UserError(counted(wrong, f"{len(wrong):,} of {len(index['chunks']):,} shards cannot be read:"))


def _fingerprint(text: str, key: str, folder: Path, index: Mapping[str, Any], *, local: bool) -> str | None:
    """Of shards made elsewhere: of the files here, or of the time at which litdata says that they were made."""
    digest = hashlib.sha256(f"{text}\0{key}".encode())
    if local:
        for path in sorted(folder / chunk["filename"] for chunk in index["chunks"]):
            if path.is_file():
                found = path.stat()
                digest.update(f"\0{path.name}\0{found.st_size}\0{found.st_mtime_ns}".encode())
    elif "updated_at" not in index:
        return None
    return digest.hexdigest()[:32]


def _join(root: str | Path, name: str) -> str:
    return f"{str(root).rstrip('/')}/{name}"


def _fetched_text(url: str, name: str) -> str:
    _library()
    from litdata.streaming.downloader import get_downloader

    with TemporaryDirectory(prefix="mtdiffusion-") as folder:
        path = Path(folder) / name
        try:
            get_downloader(url, folder, []).download_file(_join(url, name), str(path))
            return path.read_text(encoding="utf-8", errors="replace")
        except Exception as error:  # each object store's client has errors of its own
            raise UserError(
                f"{_join(url, name)}: cannot be fetched ({_said(error)}). Check the address, the network and the "
                "credentials of the object store; a copy in a folder can be read without"
            ) from error


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found


def _library() -> ModuleType:
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask a server for its newest version
    try:
        import litdata
    except ImportError as error:
        raise UserError(
            f"data sets of kind 'litdata' need the library litdata: pip install 'mtdiffusion[streaming]' ({error})"
        ) from None
    return litdata


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [LitDataConfig]
