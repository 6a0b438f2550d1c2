"""Rows of tables and archives as samples: files' bytes, arrays, numbers and texts, read by fields."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import Attribute, field, frozen
from PIL import Image
from torch import Tensor

from mtdiffusion_plugins.datasets._decoded import given
from mtdiffusion_plugins.fields import FIELDS
from mtdiffusion_registry.cache import config_key
from mtdiffusion_registry.configs import DataField, FieldConfig
from mtdiffusion_registry.errors import UserError, did_you_mean
from mtdiffusion_registry.pictures import Encoded, Source
from mtdiffusion_registry.registry import Registry

SOME = 32
"""Rows that are looked at for what contradicts one another."""


def by_kind(fields: Mapping[str, FieldConfig | str]) -> dict[str, FieldConfig | str]:
    """Kinds that come with mtdiffusion made configs; another name stays, and :func:`resolved` looks it up."""
    return {name: FIELDS[each]() if isinstance(each, str) and each in FIELDS else each for name, each in fields.items()}


def names(value: Iterable[str]) -> tuple[str, ...]:
    """A converter of a key that lists names."""
    return tuple(value)


def of_fields(instance: Any, attribute: Attribute[Any], value: Collection[str]) -> None:
    """A validator of a key whose names must be among ``fields``.

    Raises:
        ValueError: if one is not.
    """
    if unknown := [name for name in value if name not in instance.fields]:
        hint = did_you_mean(unknown[0], instance.fields)
        raise ValueError(
            f"{attribute.name} names {', '.join(unknown)}, but the fields are {', '.join(instance.fields)}{hint}"
        )


def require_fields(read: Iterable[str], fields: Collection[str]) -> None:
    """Check that all that modalities read is among the fields that a configuration lists.

    Raises:
        UserError: if something is not; the message says what there is.
    """
    for name in read:
        if name not in fields:
            raise UserError(
                f"a modality reads the field {name!r}, but data.fields has only {', '.join(fields)}"
                f"{did_you_mean(name, fields) or '.'} Add it there, call the modality as its field is called, or say "
                "by its key field (of some kinds source) which one it reads"
            )


def only(
    read: Collection[str], fields: Mapping[str, FieldConfig | str], columns: Mapping[str, str], optional: Iterable[str]
) -> dict[str, Any]:
    """The keys of a data set of cells that change where some of its fields alone are read; none if it is none of them.

    Args:
        read: names of these fields.
        fields: the key ``fields``, and so on.

    Raises:
        UserError: if one of them is none of the fields, where these are listed.
    """
    if fields:
        require_fields(read, fields)
    kept = {name: each for name, each in fields.items() if name in read}
    if not kept:
        return {}
    return {
        "fields": kept,
        "columns": {name: column for name, column in columns.items() if name in kept},
        "allow_missing": [name for name in optional if name in kept],
    }


@frozen(eq=False)
class Cells:
    """How the cells of a row become the fields of a sample.

    Attributes:
        fields: how each is read.
        columns: the column that each is read from.
        size: height and width of pictures; None: as they are.
        optional: fields that a sample may lack.
        taken: by field, dtypes of what is stored that are given as they are
            (:meth:`mtdiffusion.interfaces.Dataset.stored`).
        what: errors call a column.
    """

    fields: Mapping[str, FieldConfig]
    columns: Mapping[str, str]
    size: tuple[int, int] | None
    optional: Collection[str]
    taken: Mapping[str, Collection[torch.dtype]] = field(factory=dict)
    what: str = "column"

    @classmethod
    def of(
        cls,
        fields: Mapping[str, FieldConfig | str],
        columns: Mapping[str, str],
        size: tuple[int, int] | None,
        optional: Collection[str],
    ) -> Cells:
        """Of what a configuration says; a field without a column reads that of its own name.

        Raises:
            UserError: if a kind of fields is not there, or reads no cells.
        """
        found = {name: resolved(each, name) for name, each in fields.items()}
        for name, each in found.items():
            if each.folder_of is not None:
                raise UserError(
                    f"field {name!r}: kind {each.kind!r} reads the names of folders, and there are none here; read a "
                    "column of class names or indices as 'label'"
                )
        return cls(found, {name: columns.get(name, name) for name in fields}, size, optional)

    def require_columns(self, there: Collection[str], where: str) -> None:
        """Raise ``UserError`` if what is read from lacks a column."""
        for name, column in self.columns.items():
            if column not in there:
                raise UserError(
                    f"{where}: has no column {column!r} for the field {name!r}{did_you_mean(column, there)} (its "
                    f'columns are {", ".join(there)}). Say which it is: columns = {{ {name} = "..." }}'
                )

    def key(self) -> str:
        """What identifies how cells are read."""
        return repr([(name, self.columns[name], config_key(each)) for name, each in self.fields.items()] + [self.size])

    def require_agreement(self, count: int, row_of: Callable[[int], Mapping[str, Any]]) -> None:
        """Raise ``UserError`` if fields find that some rows contradict one another (:meth:`FieldConfig.check_files`).

        Args:
            count: how many rows there are, of which a few are looked at.
            row_of: a row by its index.
        """
        checked = {
            name: each
            for name, each in self.fields.items()
            if each.encoded and type(each).check_files is not FieldConfig.check_files
        }
        found: dict[str, list[Source]] = {name: [] for name in checked}
        for index in range(0, count if checked else 0, -(-count // SOME)):
            with suppress(ValueError, OSError):  # what cannot be read is told when its turn comes
                row = row_of(index)
                for name, each in checked.items():
                    column = self.columns[name]
                    content = _plain(row.get(column), each, f"sample {index}, {self.what} {column!r}")
                    found[name] += [content] if isinstance(content, Path | Encoded) else []
        for name, each in checked.items():
            try:
                each.check_files(found[name])  # type: ignore[arg-type]  # an encoded field takes files in memory
            except ValueError as error:
                raise UserError(f"field {name!r}: {error}") from error

    def sample(self, row: Mapping[str, Any]) -> dict[str, Tensor | str]:
        """A sample of a row; of fields that it may lack, those that the row has.

        Raises:
            UserError: if a cell is damaged or blank though it must not be, or pictures of a row do not lie on one
                another.
        """
        values: dict[str, Tensor | str] = {}
        frames: dict[str, tuple[int, int]] = {}
        spatial = sum(each.spatial for each in self.fields.values())
        for name, each in self.fields.items():
            where = f"{self.what} {self.columns[name]!r}"
            try:
                content = _plain(row[self.columns[name]], each, where)
                if spatial > 1 and each.spatial and isinstance(content, Path | Encoded):
                    self._require_aligned(name, each, content, frames)
                value = _read(each, content, self.size if each.spatial else None)
                if isinstance(value, Tensor):
                    value = given(each, value, self.taken.get(name, ()))
            except UserError:
                raise
            except (ValueError, OSError) as error:
                raise UserError(f"{where}: cannot be read as {each.kind} ({error})") from error
            if value is not None:
                values[name] = value
            elif name not in self.optional:
                raise UserError(
                    f"{where}: is blank, and there must be a {name!r}. If samples may lack it, add {name!r} to "
                    "allow_missing"
                )
        return values

    def _require_aligned(
        self, name: str, field: FieldConfig, source: Source, frames: dict[str, tuple[int, int]]
    ) -> None:
        if not field.encoded or (extent := field.extent(source)) is None:  # type: ignore[arg-type]  # as it says
            return
        for first, (tall, wide) in frames.items():
            height, width = extent
            # A picture made smaller is off by a rounded pixel at most.
            if abs(height * wide - width * tall) > max(height, width, tall, wide):
                raise UserError(
                    f"its pictures do not lie on one another: {first} is {wide}×{tall}, {name} is {width}×{height}, as "
                    "shown by a viewer, which heeds EXIF; turn or crop one of them like the other"
                )
        frames[name] = extent


def resolved(each: FieldConfig | str, name: str) -> FieldConfig:
    """The config of the kind of the field ``name``, looked up where it is a kind's name.

    Raises:
        UserError: if there is no such kind.
    """
    if isinstance(each, FieldConfig):
        return each
    try:
        cls = Registry.discover().config_class("field", each)
    except UserError as error:
        raise UserError(
            f"data.fields.{name}: {error}. Left of the = is the field, named as its folder or column is, right of it "
            f'the kind that reads it: {name} = "image". A modality of another name says field = "{name}"'
        ) from error
    assert issubclass(cls, FieldConfig)
    return cls()


def data_field(
    fields: Mapping[str, FieldConfig | str], name: str, files: Callable[[int], list[Path]] | None = None
) -> DataField | None:
    """One of the fields that a configuration lists, for files that are given beside the data; None if it lists no such
    field, or the kind is of a plugin that is not here."""
    if name not in fields:
        return None
    try:
        config = resolved(fields[name], name)
    except UserError:
        return None
    return DataField(config) if files is None else DataField(config, files)


def _plain(content: Any, field: FieldConfig, where: str) -> Any:
    """A cell as a file (:class:`Encoded` or a path), or as what :meth:`FieldConfig.parse` takes."""
    name = where
    if isinstance(content, Mapping) and content.keys() >= {"bytes", "path"}:  # a picture or a sound of Hugging Face's
        path = content["path"]
        if content["bytes"] is None:
            return None if path is None else Path(path)
        content, name = content["bytes"], f"{where} ({path})" if path else where
    if isinstance(content, bytes | bytearray | memoryview):
        return Encoded(bytes(content), name)
    if isinstance(content, Image.Image):
        return Encoded(_png(content), name)
    if isinstance(content, Tensor):
        content = content.numpy()
    if field.spatial and isinstance(content, np.ndarray | list):
        return Encoded(_png(_picture(np.asarray(content))), name)
    if isinstance(content, np.generic) or (isinstance(content, np.ndarray) and content.ndim == 0):
        return content.item()
    return content


def _read(field: FieldConfig, content: Any, size: tuple[int, int] | None) -> Tensor | str | None:
    """What a cell stores."""
    if isinstance(content, Path | Encoded):
        return _read_file(field, content, size)
    if content is None:
        return None
    if field.cells or field.arrays:
        return field.parse(content)
    raise ValueError(f"expected the bytes of a file ({', '.join(field.suffixes)}), found {type(content).__name__}")


def _read_file(field: FieldConfig, source: Source, size: tuple[int, int] | None) -> Tensor | str:
    if not field.suffixes:
        raise ValueError("expected a value, found the bytes of a file")
    if isinstance(source, Path) or field.encoded:
        return field.read(source, size)  # type: ignore[arg-type]  # it takes a file in memory, as it says
    suffix = next((each for each in field.suffixes if source.name.lower().endswith(each)), field.suffixes[0])
    with tempfile.TemporaryDirectory(prefix="mtdiffusion-") as folder:
        path = Path(folder, f"cell{suffix}")
        path.write_bytes(source.content)
        try:
            return field.read(path, size)
        except ValueError as error:
            raise UserError(str(error).replace(str(path), source.name)) from error


def _picture(array: np.ndarray) -> Image.Image:
    """A picture of levels or class indices ``[h, w]``, ``[h, w, channels]`` or ``[channels, h, w]``.

    Raises:
        ValueError: if it is none of them, or its values are not whole numbers from 0 on.
    """
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    most = 65535 if array.ndim == 2 and array.dtype != np.uint8 else 255
    whole = array.dtype.kind in "iub" and array.size > 0
    if array.ndim not in (2, 3) or not whole or int(array.min()) < 0 or int(array.max()) > most:
        raise ValueError(
            f"expected a picture [h, w], [h, w, channels] or [channels, h, w] of whole numbers in 0..{most}, found "
            f"shape {list(array.shape)} of {array.dtype}"
        )
    return Image.fromarray(np.ascontiguousarray(array, np.uint16 if array.max() > 255 else np.uint8))


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def choice(count: int, fraction: float, seed: int, split: str) -> np.ndarray:
    """The rows of a split that a seed decides: the share ``fraction`` of them is the test split."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    held_out = round(fraction * count)
    return np.sort(order[:held_out] if split == "test" else order[held_out:])
