"""``folder``: a person's own data, a subfolder or a table for each field, matched by file stem."""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
import torch
from attrs import Attribute, field, frozen
from attrs.validators import and_, deep_mapping, ge, in_, instance_of, le, min_len, optional
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins.datasets._tensors import from_uint8
from mtdiffusion_registry.configs import DatasetConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.hookspecs import hookimpl

if TYPE_CHECKING:
    from PIL.Image import Image

MTDIFFUSION_API = 1

Value = Tensor | str

TYPES = ("image", "mask", "label", "embedding", "caption")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
TABLES = (".csv", ".tsv", ".json")
ARRAYS = (".safetensors", ".npz")

_FILES: dict[str, tuple[str, ...]] = {
    "image": PICTURES,
    "mask": PICTURES,
    "embedding": (".npy",),
    "caption": (".txt",),
}
_TABLES: dict[str, tuple[str, ...]] = {"label": TABLES, "caption": TABLES, "embedding": ARRAYS}
MEMORY_LIMIT = 512 * 2**20
"""Bytes of decoded pictures that one field may keep in memory; beyond it they are decoded at every access."""


@frozen
class _Source:
    """Where a field's data were found, and its raw values by stem."""

    where: Path
    items: Mapping[str, object]


class FolderDataset(Dataset):
    """Samples by stem. A column's values are in memory, or read at each access where a reader is given for it.

    Attributes:
        stems: the samples' names, in order.
    """

    def __init__(
        self,
        stems: list[str],
        columns: Mapping[str, Mapping[str, Value]],
        lazy: Mapping[str, tuple[Mapping[str, Path], Callable[[Path], Tensor]]],
    ) -> None:
        self.stems = stems
        self._columns = columns
        self._lazy = lazy

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict[str, Value]:
        stem = self.stems[index]
        sample = {name: column[stem] for name, column in self._columns.items() if stem in column}
        sample.update({name: read(paths[stem]) for name, (paths, read) in self._lazy.items() if stem in paths})
        return sample


def _known_fields(instance: FolderConfig, _: Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    unknown = sorted(set(value) - set(instance.fields))
    if unknown:
        raise ValueError(f"allow_missing names {_list(unknown)}, but the fields are {_list(instance.fields)}")


@frozen(kw_only=True)
class FolderConfig(DatasetConfig):
    """A folder of one's own data.

    Each field is found under ``root`` by its name, as a subfolder of files (``root/image/0001.png``) or as a table
    whose keys are stems:

    - ``image``: 8-bit pictures → float32 ``[channels, h, w]`` in [−1, 1]. Transparency is dropped.
    - ``mask``: pictures whose pixels are class indices (modes 1, L, P, I, I;16) → int64 ``[h, w]``.
    - ``label``: ``label.csv``, ``.tsv`` (columns ``stem`` and ``value``) or ``.json`` (an object by stem) → int64
      ``[]``.
    - ``caption``: such a table, or a subfolder of ``.txt`` files → str.
    - ``embedding``: ``.safetensors`` or ``.npz`` with a vector for each stem, or a subfolder of ``.npy`` files →
      float32 ``[D]``, scaled to unit norm.

    Every file of the split is read when the data set is built, so that a bad one is reported then and not hours later.

    Attributes:
        root: the folder. If it has subfolders ``train`` and ``test``, they are the splits, each laid out as above.
        fields: each field's name and its type.
        size: images and masks are scaled (bicubic, masks nearest) and cropped centrally to this side; None keeps them
            as they are, and a field's pictures must then all be of one size.
        channels: of images: 1 (grey) or 3 (RGB).
        allow_missing: fields that a sample may lack; its dict then lacks the key.
        test_fraction: the share of stems in the test split, decided by a hash of the stem: adding files never moves one
            from one split to the other.

    Raises:
        UserError: from :meth:`build`, for anything wrong with the data; it names the files.
    """

    kind: ClassVar[str] = "folder"

    root: str = field(validator=and_(instance_of(str), min_len(1)))
    fields: dict[str, str] = field(
        validator=and_(min_len(1), deep_mapping(key_validator=min_len(1), value_validator=in_(TYPES)))
    )
    size: int | None = field(default=None, validator=optional(ge(1)))
    channels: int = field(default=3, validator=in_((1, 3)))
    allow_missing: tuple[str, ...] = field(default=(), converter=tuple, validator=_known_fields)
    test_fraction: float = field(default=0.1, validator=and_(ge(0), le(1)))

    def build(self, split: Literal["train", "test"]) -> Dataset:
        base, by_hash = self._base(split)
        sources = {name: _find(base, name, self.fields[name]) for name in self.fields}
        stems = self._matched(base, sources)
        if by_hash:
            stems = [stem for stem in stems if (_fraction(stem) < self.test_fraction) == (split == "test")]
        if not stems:
            raise UserError(
                f"the {split} split of {base} is empty: change test_fraction (now {self.test_fraction:g}), or lay the "
                f"data out in {base / 'train'} and {base / 'test'}"
            )

        columns: dict[str, dict[str, Value]] = {}
        lazy: dict[str, tuple[dict[str, Path], Callable[[Path], Tensor]]] = {}
        for name, source in sources.items():
            kind = self.fields[name]
            chosen = [stem for stem in stems if stem in source.items]
            if kind == "label":
                columns[name] = {stem: _label(source, stem) for stem in chosen}
            elif kind == "caption":
                columns[name] = {stem: _caption(source, stem) for stem in chosen}
            elif kind == "embedding":
                columns[name] = _embeddings(source, chosen)
            else:
                paths = {stem: cast(Path, source.items[stem]) for stem in chosen}
                read = self._read_image if kind == "image" else self._read_mask
                pictures = _load_pictures(name, paths, read)
                if pictures is None:
                    lazy[name] = paths, read
                else:
                    columns[name] = pictures
        return FolderDataset(stems, columns, lazy)

    def _base(self, split: str) -> tuple[Path, bool]:
        """The folder to look in, and whether the split is still to be made (by hash)."""
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise UserError(f"data folder {root} does not exist (option root)")
        halves = [name for name in ("train", "test") if (root / name).is_dir() and name not in self.fields]
        if len(halves) == 1:
            raise UserError(f"{root} has a folder {halves[0]!r} only: it needs both 'train' and 'test', or neither")
        return (root / split, False) if halves else (root, True)

    def _matched(self, base: Path, sources: Mapping[str, _Source]) -> list[str]:
        """The stems of the samples, sorted; all have every field that is not in allow_missing."""
        everything = set().union(*(source.items for source in sources.values()))
        if not everything:
            raise UserError(f"no data in {base}: {_list(self.fields)} are all empty")
        required = [name for name in self.fields if name not in self.allow_missing]
        matched = everything.intersection(*(sources[name].items for name in required))
        if not matched:
            found = "; ".join(f"{name}: {_list(sources[name].items)}" for name in required)
            raise UserError(f"no stem in {base} has all of {_list(required)}. Stems found: {found}")
        for name in required:
            missing = everything - sources[name].items.keys()
            if missing:
                raise UserError(
                    f"{len(missing)} of {len(everything)} samples in {base} have no {name!r}: {_list(missing)}. If "
                    f"samples may lack it, add {name!r} to allow_missing"
                )
        return sorted(matched)

    def _read_image(self, path: Path) -> Tensor:
        from PIL import Image as PIL

        picture = _open(path)
        if picture.mode.startswith(("I", "F")):
            raise UserError(f"{path}: images must have 8 bits a channel, this one has mode {picture.mode!r}")
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        pixels = np.array(self._fit(picture, PIL.Resampling.BICUBIC), np.uint8)
        return from_uint8(pixels.reshape(*pixels.shape[:2], self.channels))

    def _read_mask(self, path: Path) -> Tensor:
        from PIL import Image as PIL

        picture = _open(path)
        if picture.mode not in ("1", "L", "P", "I") and not picture.mode.startswith("I;16"):
            raise UserError(
                f"{path}: a mask's pixels must be class indices (mode 1, L, P, I or I;16), this one has mode "
                f"{picture.mode!r}"
            )
        return torch.from_numpy(np.array(self._fit(picture, PIL.Resampling.NEAREST)).astype(np.int64))

    def _fit(self, picture: Image, resample: int) -> Image:
        from PIL import Image as PIL
        from PIL import ImageOps

        if self.size is None:
            return picture
        return ImageOps.fit(picture, (self.size, self.size), PIL.Resampling(resample))


def _fraction(stem: str) -> float:
    """A number in [0, 1) that depends on the stem only (``hash`` differs from run to run)."""
    return int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big") / 2**64


def _list(names: Iterable[object], most: int = 5) -> str:
    names = sorted(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _find(base: Path, name: str, kind: str) -> _Source:
    """The field's raw values by stem: paths of files, cells of a table or arrays."""
    tables = [base / f"{name}{suffix}" for suffix in _TABLES.get(kind, ())]
    found = [path for path in tables if path.is_file()]
    if kind in _FILES and (base / name).is_dir():
        found.append(base / name)
    if not found:
        forms = [f"{name}/*{suffix}" for suffix in _FILES.get(kind, ())] + [path.name for path in tables]
        raise UserError(f"no data for field {name!r} ({kind}) in {base}: expected {' or '.join(forms)}")
    if len(found) > 1:
        raise UserError(f"field {name!r} is there more than once: keep one of {_list(found)}")
    where = found[0]
    if where.is_dir():
        return _Source(where, _files(where, _FILES[kind]))
    try:
        return _Source(where, _READERS[where.suffix](where))
    except (OSError, ValueError, TypeError, csv.Error, SafetensorError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {where}: {error}") from error


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, object]:
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    strange = [path.name for path in paths if path.suffix.lower() not in suffixes]
    if strange:
        raise UserError(f"{folder} holds files of another type than {', '.join(suffixes)}: {_list(strange)}")
    return _unique(((path.stem, path) for path in paths), folder)


def _unique(items: Iterable[tuple[str, object]], where: Path) -> dict[str, object]:
    values: dict[str, object] = {}
    twice = set()
    for stem, value in items:
        if stem in values:
            twice.add(stem)
        values[stem] = value
    if twice:
        raise UserError(f"{where} has more than one entry for {len(twice)} stems: {_list(twice)}")
    return values


def _read_rows(path: Path) -> dict[str, object]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        if not {"stem", "value"} <= set(rows.fieldnames or ()):
            raise UserError(
                f"{path} needs columns 'stem' and 'value' in its first line, found {_list(rows.fieldnames or ())}"
            )
        cells = [(row["stem"], row["value"]) for row in rows]
    if not all(stem for stem, _ in cells):
        raise UserError(f"{path} has a row without a stem")
    return _unique(cells, path)


def _read_json(path: Path) -> dict[str, object]:
    # Pairs, not a dict: json would keep the last of two equal keys and say nothing.
    pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda found: _Pairs(found))
    if not isinstance(pairs, _Pairs):
        raise UserError(f"{path} must hold one object of values by stem, found a {type(pairs).__name__}")
    return _unique(pairs, path)


class _Pairs(list[tuple[str, object]]):
    """A JSON object's pairs, told apart from a JSON array."""


def _read_safetensors(path: Path) -> dict[str, object]:
    # By way of float32: numpy has no bfloat16.
    return {stem: vector.to(torch.float32).numpy() for stem, vector in load_file(path).items()}


def _read_npz(path: Path) -> dict[str, object]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


_READERS: dict[str, Callable[[Path], dict[str, object]]] = {
    ".csv": _read_rows,
    ".tsv": _read_rows,
    ".json": _read_json,
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
}


def _open(path: Path) -> Image:
    """A picture, decoded whole and turned as its EXIF data say."""
    from PIL import Image as PIL
    from PIL import ImageOps

    try:
        with PIL.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    # Pillow reports a broken file as OSError, SyntaxError (PNG), ValueError or DecompressionBombError.
    except (OSError, SyntaxError, ValueError, PIL.DecompressionBombError) as error:
        raise UserError(f"cannot read picture {path}: {error}") from error


def _load_pictures(name: str, paths: Mapping[str, Path], read: Callable[[Path], Tensor]) -> dict[str, Value] | None:
    """Read every picture and check that their sizes agree. None if they are too many to be kept in memory."""
    pictures: dict[str, Value] | None = {}
    first: tuple[Path, tuple[int, ...]] | None = None
    for stem, path in paths.items():
        picture = read(path)
        shape = tuple(picture.shape[-2:])
        if first is None:
            first = path, shape
            if picture.nbytes * len(paths) > MEMORY_LIMIT:
                pictures = None
        if shape != first[1]:
            raise UserError(
                f"field {name!r} has pictures of different sizes: {first[0]} is {_by(first[1])}, {path} "
                f"is {_by(shape)}. Set size to scale and crop them to one"
            )
        if pictures is not None:
            pictures[stem] = picture
    return pictures


def _by(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]}"


def _label(source: _Source, stem: str) -> Tensor:
    value = source.items[stem]
    # bool is an int to Python, but true in a JSON file is no class index.
    text = value.strip() if isinstance(value, str) else str(value) if type(value) is int else ""
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{source.where}: the label of {stem!r} must be a class index (0, 1, 2, ...), found {value!r}")
    return torch.tensor(int(text), dtype=torch.int64)


def _caption(source: _Source, stem: str) -> str:
    value = source.items[stem]
    if isinstance(value, Path):
        try:
            value = value.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read caption {source.where / stem}.txt: {error}") from error
    if not isinstance(value, str):
        raise UserError(f"{source.where}: the caption of {stem!r} must be a text, found {value!r}")
    return value


def _embeddings(source: _Source, stems: Iterable[str]) -> dict[str, Value]:
    """Unit vectors, checked to be of one width."""
    vectors: dict[str, Value] = {}
    first: tuple[str, int] | None = None
    for stem in stems:
        raw = source.items[stem]
        if isinstance(raw, Path):
            try:
                raw = np.load(raw, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"cannot read embedding {source.where / stem}.npy: {error}") from error
        array = np.asarray(raw)
        where = f"{source.where}: the embedding of {stem!r}"
        if array.ndim != 1 or array.dtype.kind not in "fiu":
            raise UserError(f"{where} must be a vector of numbers, found shape {array.shape} of {array.dtype}")
        first = first or (stem, len(array))
        if len(array) != first[1]:
            raise UserError(f"{where} has width {len(array)}, but that of {first[0]!r} has width {first[1]}")
        vector = torch.from_numpy(array.astype(np.float32))
        norm = vector.norm()
        if not (torch.isfinite(norm) and norm > 0):
            raise UserError(f"{where} is zero or not finite")
        vectors[stem] = vector / norm
    return vectors


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [FolderConfig]
