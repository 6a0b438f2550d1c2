"""Files decoded once and kept on disk, so that the next start reads arrays and not files.

What is kept is keyed by what it is made from (each file's path, size and time, the field that reads it, and its code),
so that nothing stale is ever read; it can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from mtdiffusion_plugins.datasets._readers import ReadingProcess, count_for, read_by
from mtdiffusion_registry.cache import cached, code_key, config_key
from mtdiffusion_registry.configs import FieldConfig
from mtdiffusion_registry.errors import SHOWN, Troubles, UserError, counted
from mtdiffusion_registry.looking import PATIENCE
from mtdiffusion_registry.pace import Pace
from mtdiffusion_registry.partial import partial_of, remove_abandoned
from mtdiffusion_registry.pictures import Encoded

CACHE_LIMIT = 50 * 2**30
"""Bytes that one field may take on disk; beyond it, files are decoded at every access."""
_FORMAT = 1
_PART, _AHEAD = 32, 32  # files, and how many times as many are under way


def given(field: FieldConfig, stored: Tensor, dtypes: Collection[torch.dtype]) -> Tensor:
    """What a field stores where it is plain and has one of these dtypes, otherwise its value."""
    return stored if field.plain and stored.dtype in dtypes else field.value(stored)


@attrs.frozen(eq=False)
class Decoded:
    """Values of files by place in a list of them.

    Attributes:
        key: of the files and how they are read.
        array: ``[n, ...]``, mapped from disk; None: decoded at each access.
        taken: dtypes of what is stored that are given as they are (:meth:`mtdiffusion.interfaces.Dataset.stored`).
    """

    field: FieldConfig
    paths: Sequence[str]
    size: tuple[int, int] | None
    key: str
    array: np.ndarray | None
    taken: Collection[torch.dtype] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Tensor:
        if self.array is not None:
            return given(self.field, torch.from_numpy(self.array[place].copy()), self.taken)
        stored = _read(self.field, self.paths[place], self.size)
        assert isinstance(stored, Tensor)  # seen when it was decoded first
        return given(self.field, stored, self.taken)

    def stored(self, dtypes: Collection[torch.dtype]) -> Decoded:
        """The same values, as they are stored where that has one of these dtypes."""
        return attrs.evolve(self, taken=tuple(dtypes))

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped: a worker process maps it again."""
        state = {name: getattr(self, name) for name in ("field", "paths", "size", "key", "taken")}
        return {**state, "mapped": self.array is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        mapped = state.pop("mapped")
        for name, value in state.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "array", _mapped(self.key) if mapped else None)


def decode(
    name: str,
    field: FieldConfig,
    paths: Sequence[str],
    size: tuple[int, int] | None,
    beside: Sequence[Path] = (),
    keep: bool = True,
) -> Decoded | list[Tensor | str]:
    """The values of a field's files: all of them read, this time or before.

    Args:
        name: of the field, for errors.
        paths: absolute.
        size: of spatial fields.
        beside: further files that they must agree with (:meth:`FieldConfig.check_files`).
        keep: False: these are not the files that will be wanted, so that what they hold is not kept on disk, and they
            are looked through for :data:`PATIENCE` seconds at most.

    Returns:
        Tensors by place; or, of a field that reads texts or single numbers, these in a list.

    Raises:
        UserError: if some cannot be read, have different shapes or contradict one another; the message says all of it,
            and names the first few files of each.
    """
    key = _key(field, paths, size)
    kept = _place(key)
    if kept.is_file():
        remove_abandoned(kept)  # of a process that was killed while another wrote the same
        try:
            return Decoded(field, paths, size, key, _mapped(key))
        except (OSError, ValueError):  # cut short, by a full disk say
            kept.unlink(missing_ok=True)
    if stamped(key):
        return Decoded(field, paths, size, key, None)
    if type(field).check_files is not FieldConfig.check_files:  # tens of thousands of Paths take a while to make
        try:
            field.check_files([*beside, *map(Path, paths)])
        except ValueError as error:
            troubles = Troubles()
            with troubles.gathered():
                _decode(name, field, paths, size, key, keep=False)
            troubles.add(f"field {name!r}: {error}")
            raise troubles.error() from error
    return _decode(name, field, paths, size, key, keep)


def _decode(
    name: str, field: FieldConfig, paths: Sequence[str], size: tuple[int, int] | None, key: str, keep: bool
) -> Decoded | list[Tensor | str]:
    few: list[Tensor | str] = []
    array: np.ndarray | None = None
    shape: tuple[torch.Size, torch.dtype] | None = None
    first, odd = 0, list[tuple[str, torch.Size]]()
    troubles = Troubles()

    def in_vain() -> bool:
        return bool(odd) or not (keep or few)

    with partial_of(_place(key)) as partial:
        place = 0
        for found in _all(name, field, paths, size, troubles, in_vain):
            if found is None:
                place += 1
                continue
            if isinstance(found, str) or found.ndim == 1:  # a class may be a name here and an index there
                few += [found] if isinstance(found, str) else found.unbind()
                place += 1 if isinstance(found, str) else len(found)
                continue
            stored = found[0]
            if shape is None:
                shape, first = (stored.shape, stored.dtype), place
                array = _room(partial, len(paths), stored) if keep else None
            if stored.shape != shape[0]:
                odd += ((path, stored.shape) for path in paths[place : place + len(found)])
                place += len(found)
                continue
            if stored.dtype != shape[1]:
                if array is not None:  # a mask with indices from 256 on after masks without
                    array = _widened(partial, array, place, stored)
                shape = shape[0], stored.dtype
            if array is not None:
                array[place : place + len(found)] = found.numpy()
            place += len(found)
        if shape is not None and odd:
            troubles.add(_different(name, field, paths[first], shape[0], odd))
        troubles.tell()
        if few:
            return few
        if array is None:
            if keep:
                stamp(key)
            return Decoded(field, paths, size, key, None)
        array.flush()  # type: ignore[attr-defined]
        partial.replace(_place(key))
        return Decoded(field, paths, size, key, _mapped(key))


def _mapped(key: str) -> np.ndarray:
    """What is kept under a key, mapped; as a plain array, whose items are made faster than a memmap's."""
    return np.load(_place(key), mmap_mode="r").view(np.ndarray)


def _room(path: Path, count: int, stored: Tensor) -> np.ndarray | None:
    """An array on disk for as many values as this one; None if there is no room for it."""
    needed = count * stored.nbytes
    if needed > CACHE_LIMIT or needed > 0.8 * shutil.disk_usage(path.parent).free:
        return None
    return np.lib.format.open_memmap(path, "w+", stored.numpy().dtype, (count, *stored.shape))


def _widened(path: Path, array: np.ndarray, done: int, stored: Tensor) -> np.ndarray:
    """The array in a type that holds this value as well."""
    before = np.array(array[:done])
    dtype = np.promote_types(array.dtype, stored.numpy().dtype)
    wider: np.ndarray = np.lib.format.open_memmap(path, "w+", dtype, array.shape)
    wider[:done] = before
    return wider


def _all(
    name: str,
    field: FieldConfig,
    paths: Sequence[str],
    size: tuple[int, int] | None,
    troubles: Troubles,
    in_vain: Callable[[], bool],
) -> Iterator[Tensor | str | None]:
    """What the files hold, in order: texts, or values ``[n, ...]`` of some files side by side; None of one that cannot
    be read, of which ``troubles`` are told in the end. If it is ``in_vain``, of those that time is left for."""
    wrong: list[str] = []
    pace = Pace(f"reading {name}", len(paths))
    reader = field.reader()
    free: deque[ReadingProcess] = deque()

    def read(part: Sequence[str]) -> list[Tensor | str | UserError]:
        with suppress(IndexError, EOFError, OSError, UnpicklingError):  # there is none, or it is gone
            process = free.pop()
            arrays = process.read(part)
            free.append(process)
            return [each if isinstance(each, UserError) else torch.from_numpy(each) for each in arrays]
        found: list[Tensor | str | UserError] = []
        for path in part:
            try:
                stored = _read(field, path, size)
                found.append(stored if isinstance(stored, str) else stored[None])
            except UserError as error:
                found.append(error)
        return found

    with ExitStack() as stack:
        if reader is not None:
            with suppress(OSError):  # none can be started: files are read without
                for _ in range(count_for(len(paths))):
                    free.append(process := ReadingProcess(reader, field.kind, size))
                    stack.callback(process.end)
        threads = stack.enter_context(ThreadPoolExecutor(len(free) or min(8, os.cpu_count() or 1)))
        stack.callback(threads.shutdown, cancel_futures=True)
        # A few at a time: handing over a small picture takes as long as reading it.
        parts = (paths[start : start + _PART] for start in range(0, len(paths), _PART))
        ahead = deque(threads.submit(read, part) for part in islice(parts, _AHEAD))
        done = 0
        while ahead:
            answers = ahead.popleft().result()
            ahead.extend(threads.submit(read, part) for part in islice(parts, 1))
            for each in answers:
                if isinstance(each, UserError):
                    wrong.append(str(each))
                    yield None
                else:
                    yield each
            done = min(done + _PART, len(paths))
            pace.tell(done)
            if pace.seconds > PATIENCE and in_vain():
                break
    if wrong:
        looked = f"the first {done} of {len(paths)}" if done < len(paths) else f"{done}"
        troubles.add(counted(wrong, f"{len(wrong)} of {looked} files of the field {name!r} cannot be used:"))


def _read(field: FieldConfig, path: str, size: tuple[int, int] | None) -> Tensor | str:
    stored = read_by(field.read, field.kind, Path(path), size)
    return stored if isinstance(stored, str) else stored.contiguous()


def _different(
    name: str, field: FieldConfig, first: str, one: Sequence[int], odd: Sequence[tuple[str, Sequence[int]]]
) -> str:
    def said(shape: Sequence[int]) -> str:
        return f"{shape[-1]}×{shape[-2]}" if field.spatial else str(list(shape))

    others = ", ".join(f"{path} is {said(shape)}" for path, shape in odd[:SHOWN])
    more = f" and {len(odd) - SHOWN} more are not" if len(odd) > SHOWN else ""
    what, remedy = ("values", "shapes"), ""
    if field.spatial:
        what, remedy = ("pictures", "sizes"), ". Set size to scale and crop them to one"
    return f"field {name!r} has {what[0]} of different {what[1]}: {first} is {said(one)}, {others}{more}{remedy}"


def _key(field: FieldConfig, paths: Sequence[str], size: tuple[int, int] | None) -> str:
    # A field of any package reads pictures by what the registry has.
    digest = hashlib.sha256(f"{_FORMAT} {config_key(field)} {code_key(Encoded)} {size}".encode())
    for path in paths:
        try:
            found = os.stat(path)  # noqa: PTH116  # many times as fast as by way of a Path, and there are many
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        digest.update(f"\0{path}\0{found.st_size}\0{found.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _place(key: str) -> Path:
    return cached(f"decoded/{key}.npy")


def stamped(key: str) -> bool:
    """Whether :func:`stamp` was called with this key before, by whichever process."""
    return _place(key).with_suffix(".seen").is_file()


def stamp(key: str) -> None:
    """Note that what has this key was looked through."""
    _place(key).with_suffix(".seen").touch()
