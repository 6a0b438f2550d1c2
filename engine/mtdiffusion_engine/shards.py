"""The forms of shards: tar, as WebDataset names members, and Parquet, as Hugging Face's ``datasets`` reads it.

What is written follows from the samples alone: no owner, no time.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from attrs import frozen
from safetensors.numpy import load
from torch import Tensor

from mtdiffusion import Modality
from mtdiffusion_registry import UserError
from mtdiffusion_registry.pictures import SUFFIXES as PICTURES

SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus")
_DTYPES = {"double": "float64", "float": "float32", "halffloat": "float16"}  # Arrow's names, and those of datasets

Batch = list[tuple[str, Mapping[str, Tensor]]]
"""Stems and samples, modalities by name, each without a batch axis."""
Write = Callable[[Batch], None]
Writer = Callable[[IO[bytes], Path, Mapping[str, Modality]], AbstractContextManager[Write]]
"""Opens a shard: a file to write into, an empty folder for files on their way, and the modalities by name."""


@contextmanager
def tar_shard(file: IO[bytes], scratch: Path, modalities: Mapping[str, Modality]) -> Iterator[Write]:
    """A tar file of ``STEM.NAME.SUFFIX``, the members of a sample side by side."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def write(batch: Batch) -> None:
            for stem, sample in batch:
                for name, x in sample.items():
                    suffix, content = _moved(modalities[name].write(x, scratch, stem))
                    member = tarfile.TarInfo(f"{stem}.{name}{suffix}")  # of no owner, and of the year 1970
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

        yield write


def _moved(path: Path) -> tuple[str, bytes]:
    """A file's suffix and bytes; it is then gone."""
    content = path.read_bytes()
    path.unlink()
    return path.suffix, content


# --- Parquet ----------------------------------------------------------------------------------------------------------


@frozen
class _Cell:
    """A value of a column.

    Attributes:
        value: as Python has it.
        type: as Arrow has it.
        feature: as ``datasets`` writes down what a column is (``Features.to_dict``).
    """

    value: Any
    type: Any
    feature: Mapping[str, Any]


@contextmanager
def parquet_shard(file: IO[bytes], scratch: Path, modalities: Mapping[str, Modality]) -> Iterator[Write]:
    """A Parquet file, a row for each sample and a group of rows for each batch.

    A modality's column has its name. Files of pictures and sounds are ``{bytes, path}``, which ``datasets`` takes for
    what they are, as the schema says it; texts are strings, and vectors lists. What is a number or a word is a column,
    and what its modality tells of it to a person stands beside it, as ``NAME_COLUMN``
    (:meth:`mtdiffusion.Modality.cells`).

    Raises:
        UserError: if pyarrow is not there; from the function, if values of a column are of different types.
    """
    arrow = require_arrow()
    from pyarrow import parquet

    writer: Any = None

    def write(batch: Batch) -> None:
        nonlocal writer
        rows = [_row(arrow, stem, sample, scratch, modalities) for stem, sample in batch]
        if writer is None:
            schema = arrow.schema([(column, cell.type) for column, cell in rows[0].items()])
            features = {column: cell.feature for column, cell in rows[0].items()}
            told = {"huggingface": json.dumps({"info": {"features": features}})}
            writer = parquet.ParquetWriter(file, schema.with_metadata(told))
        for (stem, _), row in zip(batch, rows, strict=True):
            if [*writer.schema] != [arrow.field(column, cell.type) for column, cell in row.items()]:
                found = ", ".join(f"{column} {cell.type}" for column, cell in row.items())
                raise UserError(f"sample {stem}: its columns are {found}, and others' differ; write tar shards")
        columns = [arrow.array([row[each.name].value for row in rows], each.type) for each in writer.schema]
        writer.write_table(arrow.table(columns, schema=writer.schema))

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


def require_arrow() -> ModuleType:
    """Pyarrow.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise UserError("--shards parquet needs pyarrow: pip install 'mtdiffusion[parquet]'") from None
    return pyarrow


def _row(
    arrow: ModuleType, stem: str, sample: Mapping[str, Tensor], scratch: Path, modalities: Mapping[str, Modality]
) -> dict[str, _Cell]:
    row: dict[str, _Cell] = {}
    for name, x in sample.items():
        if cells := modalities[name].cells(x):
            row[name] = _plain(arrow, cells["value"])
            more = {f"{name}_{column}": value for column, value in cells.items() if column != "value"}
            row |= {column: _plain(arrow, value) for column, value in more.items() if column not in modalities}
        else:
            suffix, content = _moved(modalities[name].write(x, scratch, stem))
            row[name] = _cell(arrow, f"{stem}.{name}{suffix}", suffix, content)
    return row


def _plain(arrow: ModuleType, value: int | float | str | bytes) -> _Cell:
    kind = arrow.scalar(value).type
    return _Cell(value, kind, _value(kind))


def _value(kind: Any) -> dict[str, Any]:
    return {"dtype": _DTYPES.get(str(kind), str(kind)), "_type": "Value"}


def _cell(arrow: ModuleType, name: str, suffix: str, content: bytes) -> _Cell:
    """What a file is as a cell: of a suffix that says nothing here, its bytes."""
    if suffix in PICTURES or suffix in SOUNDS:
        kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        return _Cell({"bytes": content, "path": name}, kind, {"_type": "Image" if suffix in PICTURES else "Audio"})
    if suffix in (".txt", ".json"):
        return _plain(arrow, content.decode().removesuffix("\n"))
    if suffix in (".safetensors", ".npy"):
        array = _array(suffix, content)
        if array is not None and array.ndim == 1:
            kind = arrow.from_numpy_dtype(array.dtype)
            # "Sequence" is read by every version of datasets, "List" by later ones alone.
            return _Cell(array, arrow.list_(kind), {"feature": _value(kind), "_type": "Sequence"})
    return _plain(arrow, content)


def _array(suffix: str, content: bytes) -> np.ndarray | None:
    """The one array of a file; None: it holds several."""
    if suffix == ".npy":
        found: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
        return found
    tensors = load(content)
    return next(iter(tensors.values())) if len(tensors) == 1 else None


FORMS: Mapping[str, Writer] = {"tar": tar_shard, "parquet": parquet_shard}
"""What writes a shard, by its form, which is its suffix as well."""
