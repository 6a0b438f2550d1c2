"""The contract of fields: how a value is read from files."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion_registry.configs import FieldConfig
from mtdiffusion_registry.pictures import Encoded
from mtdiffusion_registry.testing import config as of_config
from mtdiffusion_registry.testing.contract import Check, NotApplicable, Subject, check, kind_of, require, stands_for

__tracebackhide__ = True

SIZE = (5, 7)  # height and width that no one has by chance


@frozen(eq=False, slots=False)
class FieldSubject(Subject):
    """A field's config, and examples of what it reads.

    Attributes:
        files: the contents of a proper file, by its suffix.
        cells: what tables may hold, and what it stands for: a tensor, a text, or None if it is blank.
    """

    config: FieldConfig
    files: Mapping[str, bytes] | None = None
    cells: tuple[tuple[object, Tensor | str | None], ...] = ()


@check("entry_point")
def forms(subject: FieldSubject) -> None:
    """A field can be found: in files with suffixes, in tables, in arrays, or by the folder of another."""
    field = subject.config
    suffixes = field.suffixes
    require(
        bool(suffixes or field.cells or field.arrays or field.folder_of),
        "a field has suffixes, cells, arrays or folder_of",
        "none of them",
        'say for example suffixes = (".wav",)',
    )
    odd = [suffix for suffix in suffixes if not suffix.startswith(".") or suffix != suffix.lower()]
    require(not odd, "suffixes are in lower case and begin with a dot", f"{odd}", "write them so")
    require(
        not field.spatial or bool(suffixes), "a spatial field has files", "none", "give suffixes, or spatial = False"
    )


@check("forms")
def read(subject: FieldSubject) -> None:
    """read gives a text or a finite tensor of a file, the same every time, and value what a sample holds."""
    field = subject.config
    if not subject.files:
        raise NotApplicable("no files to try: give the option files, bytes by suffix")
    for suffix, content in subject.files.items():
        require(suffix in field.suffixes, "files have one of suffixes", suffix, "add it, or try another file")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"a.b{suffix}")
            path.write_bytes(content)
            stored, again = field.read(path), field.read(path)
            what = f"read of a {suffix} file"
            require(isinstance(stored, Tensor | str), f"{what} gives a tensor or a str", kind_of(stored), "convert it")
            _require_same(stored, again, what)
            if isinstance(stored, Tensor):
                value = field.value(stored)
                _require_value(value, what)
                if field.plain:
                    contract = f"{what} stands for its value by the conventions of Dataset.stored, as plain says"
                    require(stands_for(stored, value), contract, f"{stored.dtype}", "leave plain out")
            if field.spatial:
                assert isinstance(stored, Tensor)
                fitted = field.read(path, SIZE)
                found = kind_of(fitted) if isinstance(fitted, str) else list(fitted.shape)
                kept = isinstance(fitted, Tensor) and tuple(fitted.shape[-2:]) == SIZE
                contract = f"{what} with a size gives [..., height, width]"
                require(kept, contract, f"{found} for {list(SIZE)}", "scale and crop it to size")
                extent = field.extent(path)
                contract = "extent is what read gives without a size"
                require(extent in (None, tuple(stored.shape[-2:])), contract, f"{extent}", "read the header alike")
            field.check_files([path, path])


@check("read")
def damaged(subject: FieldSubject) -> None:
    """A damaged file is a ValueError that names it."""
    field = subject.config
    for suffix, content in (subject.files or {}).items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"damaged{suffix}")
            for broken in (b"", content[: len(content) // 2], b"\xff\xfe\x00" * 9):
                path.write_bytes(broken)
                try:
                    field.read(path)
                except ValueError as error:
                    contract = "the error of a damaged file names it"
                    require(path.name in str(error), contract, f'"{error}"', "put the path into the message")
                except Exception as error:
                    found = f"{type(error).__name__}: {error}"
                    require(False, "a damaged file is a ValueError (UserError is one)", found, "catch and rename it")


@check("read")
def reader(subject: FieldSubject) -> None:
    """reader reads what read does, files in memory too, and can be sent to a process, which then imports no torch."""
    field = subject.config
    function = field.reader()
    if function is None:
        raise NotApplicable("it has none: files are read in threads")
    try:
        sent = pickle.dumps(function)
    except Exception as error:  # pickle has no error of its own for all that it runs into
        fix = "return a function of a module, or a functools.partial of one"
        require(False, "reader can be sent to another process", f"{type(error).__name__}: {error}", fix)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _RECEIVER], env=environment, input=sent, capture_output=True)
    found = "torch is imported" if done.returncode == 0 else done.stderr.decode(errors="replace").strip()[-300:]
    fix = "put the function into a module that does not import torch, nor any that does"
    require(done.stdout.strip() == b"False", "a process that is given reader imports no torch", found, fix)
    for suffix, content in (subject.files or {}).items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"a.b{suffix}")
            path.write_bytes(content)
            for size in (None, SIZE) if field.spatial else (None,):
                for source in (path, Encoded(content, path.name)):
                    array = function(source, size)
                    contract = f"reader gives an array, equal to what read gives, of a {suffix} file"
                    same = isinstance(array, np.ndarray) and _same(torch.from_numpy(array), field.read(path, size))
                    require(same, contract, f"{kind_of(array)}, which is another", "let read call the same function")


_RECEIVER = "import pickle, sys; pickle.load(sys.stdin.buffer); print('torch' in sys.modules)"


@check("forms")
def cells(subject: FieldSubject) -> None:
    """parse gives what cells stand for, and a ValueError for what is no value."""
    field = subject.config
    if not (field.cells or field.arrays or field.folder_of):
        raise NotApplicable("it has no cells and no arrays")
    for content, wanted in subject.cells:
        found = field.parse(content)
        same = found is None if wanted is None else _same(found, wanted)
        require(same, f"the cell {content!r} is {wanted!r}", f"{found!r}", "mend parse, or the example")
    if field.cells:
        try:
            field.parse(object())
        except ValueError:
            return
        require(False, "parse raises ValueError for what is no value", "object() taken for one", "check its type")


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _require_same(a: object, b: object, what: str) -> None:
    require(_same(a, b), f"{what} is the same every time", "two that differ", "draw nothing in read")


def _require_value(value: Tensor, what: str) -> None:
    kept = value.dtype in (torch.float32, torch.int64) and bool(torch.isfinite(value).all())
    found = f"{value.dtype} of shape {tuple(value.shape)}"
    require(kept, f"value of a {what} is finite, float32 or int64", found, "convert it in value")


CHECKS: tuple[Check, ...] = (*of_config.CHECKS, forms, read, damaged, reader, cells)
