"""Rows of tables and archives as samples: files' bytes, arrays, numbers and texts, read by fields."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import Attribute, evolve, field, frozen
from PIL import Image
from torch import Tensor

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins.datasets._decoded import given
from mtdiffusion_plugins.fields import FIELDS
from mtdiffusion_registry.cache import config_key
from mtdiffusion_registry.configs import DataField, FieldConfig
from mtdiffusion_registry.errors import Fault, SampleError, Troubles, UserError, did_you_mean
from mtdiffusion_registry.looking import PATIENCE, look_through
from mtdiffusion_registry.pictures import Encoded, Source
from mtdiffusion_registry.registry import Registry

SOME = 32
"""Rows that are looked at for what contradicts one another."""


class Rows(Dataset):
    """A data set that reads rows by cells."""

    @abstractmethod
    def row(self, index: int) -> Mapping[str, Any]:
        """What the columns that are read hold of a sample; what is wrong with a cell, a ``UserError``, stands in its
        place."""


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

    def lacking(self, there: Collection[str], where: str) -> dict[str, str]:
        """By field, what to tell of the columns that what is read from lacks."""
        return {
            name: f"{where}: has no column {self.columns[name]!r} for the field {name!r}"
            f"{did_you_mean(self.columns[name], there)} (its columns are {', '.join(there)}). Say which it is: "
            f'columns = {{ {name} = "..." }}'
            for name in self.fields
            if self.columns[name] not in there
        }

    def without(self, fields: Collection[str]) -> Cells:
        """The same less these fields."""
        return evolve(
            self,
            fields={name: each for name, each in self.fields.items() if name not in fields},
            columns={name: column for name, column in self.columns.items() if name not in fields},
        )

    def key(self) -> str:
        """What identifies how cells are read."""
        return repr([(name, self.columns[name], config_key(each)) for name, each in self.fields.items()] + [self.size])

    def require_sound(
        self,
        dataset: Rows,
        split: str,
        troubles: Troubles,
        *,
        thorough: bool = False,
        most: int | None = None,
    ) -> None:
        """Look at a few rows for what contradicts one another; and where there is trouble, at all of them for
        :data:`PATIENCE` seconds, so that all of it is told.

        Args:
            troubles: what is known already, of the table or the archives.
            thorough: whether all rows are looked at in any case, as there is trouble elsewhere.
            most: so many of the first rows are looked at for contradictions, and never all; None: spread over all.

        Raises:
            UserError: all that is wrong.
        """
        self._check_agreement(len(dataset) if most is None else min(most, len(dataset)), dataset.row, troubles)
        if (thorough or troubles.told) and most is None and self.fields:
            with troubles.gathered():
                look_through(dataset, f"{split} split", patience=PATIENCE)
        troubles.tell()

    def _check_agreement(self, count: int, row_of: Callable[[int], Mapping[str, Any]], troubles: Troubles) -> None:
        """Note what fields find that contradicts one another (:meth:`FieldConfig.check_files`) in a few of the rows."""
        checked = {
            name: each
            for name, each in self.fields.items()
            if each.encoded and type(each).check_files is not FieldConfig.check_files
        }
        found: dict[str, list[Source]] = {name: [] for name in checked}
        for index in range(0, count if checked else 0, -(-count // SOME)):
            row: Mapping[str, Any] = {}
            with suppress(ValueError, OSError):  # what cannot be read is told when its turn comes
                row = row_of(index)
            for name, each in checked.items():
                with suppress(ValueError, OSError):
                    column = self.columns[name]
                    content = _plain(row.get(column), each, f"sample {index}, {self.what} {column!r}")
                    found[name] += [content] if isinstance(content, Path | Encoded) else []
        for name, each in checked.items():
            try:
                each.check_files(found[name])  # type: ignore[arg-type]  # an encoded field takes files in memory
            except ValueError as error:
                troubles.add(f"field {name!r}: {error}")

    def sample(self, row: Mapping[str, Any]) -> dict[str, Tensor | str]:
        """A sample of a row; of fields that it may lack, those that the row has.

        Raises:
            SampleError: if cells are damaged or blank though they must not be, or pictures of a row do not lie on one
                another.
        """
        values: dict[str, Tensor | str] = {}
        faults: list[Fault] = []
        frames: dict[str, tuple[int, int]] = {}
        spatial = sum(each.spatial for each in self.fields.values())
        for name, each in self.fields.items():
            where = f"{self.what} {self.columns[name]!r}"
            try:
                content = _plain(row[self.columns[name]], each, where)
                if spatial > 1 and each.spatial and isinstance(content, Path | Encoded):
                    faults += self._misaligned(name, each, content, frames)
                value = _read(each, content, self.size if each.spatial else None)
                if isinstance(value, Tensor):
                    value = given(each, value, self.taken.get(name, ()))
            except (ValueError, OSError) as error:
                said = (
                    str(error) if isinstance(error, UserError) else f"{where}: cannot be read as {each.kind} ({error})"
                )
                faults.append(Fault(f"have a field {name!r} that cannot be read", said))
                continue
            if value is not None:
                values[name] = value
            elif name not in self.optional:
                faults.append(
                    Fault(
                        f"have nothing in {name!r}",
                        f"{where}: is blank, and there must be a {name!r}",
                        f"If samples may lack it, add {name!r} to allow_missing",
                    )
                )
        if faults:
            raise SampleError(faults)
        return values

    def _misaligned(
        self, name: str, field: FieldConfig, source: Source, frames: dict[str, tuple[int, int]]
    ) -> list[Fault]:
        if not field.encoded or (extent := field.extent(source)) is None:  # type: ignore[arg-type]  # as it says
            return []
        for first, (tall, wide) in frames.items():
            height, width = extent
            # A picture made smaller is off by a rounded pixel at most.
            if abs(height * wide - width * tall) > max(height, width, tall, wide):
                said = f"its pictures do not lie on one another: {first} is {wide}×{tall}, {name} is {width}×{height}"
                remedy = "Turn or crop one of them like the other; sizes are as a viewer shows them, which heeds EXIF"
                return [Fault("have pictures that do not fit", said, remedy)]
        frames[name] = extent
        return []


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
    """A cell as a file (:class:`Encoded` or a path), or as what :meth:`FieldConfig.parse` takes.

    Raises:
        UserError: the cell, if it is one: what is wrong with it stands in its place.
    """
    if isinstance(content, UserError):
        raise content
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
