"""The contract of data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from mtdiffusion.interfaces import Dataset
from mtdiffusion_registry.configs import DatasetConfig
from mtdiffusion_registry.testing import config as of_config
from mtdiffusion_registry.testing.contract import Check, Subject, check, kind_of, require, stands_for

__tracebackhide__ = True

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")

Sample = Mapping[str, Tensor | str]


@frozen(eq=False, slots=False)
class DatasetSubject(Subject):
    """A data set's config."""

    config: DatasetConfig

    @cached_property
    def builds(self) -> dict[str, tuple[Dataset, Dataset]]:
        """Each split, built twice."""
        return {split: (self.config.build(split), self.config.build(split)) for split in SPLITS}

    def places(self) -> Iterator[tuple[str, Dataset, Dataset, int]]:
        """The first, middle and last sample of each split: where, both builds and its index."""
        for split, (first, second) in self.builds.items():
            for index in sorted({0, len(first) // 2, len(first) - 1}):
                yield f'"{split}"[{index}]', first, second, index


@check("entry_point")
def build(subject: DatasetSubject) -> None:
    """build gives a Dataset for "train" and for "test"."""
    for split, (first, _) in subject.builds.items():
        fix = "subclass mtdiffusion.interfaces.Dataset"
        require(isinstance(first, Dataset), f'build("{split}") returns a Dataset', kind_of(first), fix)


@check("build")
def length(subject: DatasetSubject) -> None:
    """Each split has samples, as many every time."""
    for split, (first, second) in subject.builds.items():
        require(len(first) > 0, f'the split "{split}" has samples', f"{len(first)}", "read the data in build")
        contract = f'build("{split}") is the same every time'
        require(len(first) == len(second), contract, f"{len(first)} and {len(second)} samples", "fix the seed")


@check("length")
def fields(subject: DatasetSubject) -> None:
    """A sample is a dict of fields that keep the conventions for their names."""
    for where, first, _, index in subject.places():
        _require_fields(first[index], where)
        _require_fields(first.varied(index, 0), f"{where}, varied,")


@check("fields")
def determinism(subject: DatasetSubject) -> None:
    """A sample is the same every time it is read, and in every build; varied, it follows from its seed alone."""
    for where, first, second, index in subject.places():
        torch.manual_seed(index)
        sample = first[index]
        torch.manual_seed(index + 1)  # what is drawn from the global generator would now differ
        for how, other in (("", first[index]), (" of a second build", second[index])):
            require(
                _equal(sample, other),
                "a sample is the same every time",
                f"{where}{how} differs",
                "draw nothing in __getitem__; seed what build draws",
            )
        varied = [dataset.varied(index, 7) for dataset in (first, first, second)]
        require(
            all(_equal(varied[0], other) for other in varied[1:]),
            "a varied sample follows from its seed",
            f"{where} with one seed differs",
            "draw from torch.Generator().manual_seed(seed)",
        )


@check("determinism")
def stored(subject: DatasetSubject) -> None:
    """A sample as it is stored has the same fields, and they stand for the same values."""
    for where, first, second, index in subject.places():
        sample = first[index]
        wanted = {name: _NARROW for name, value in sample.items() if isinstance(value, Tensor)}
        other = second.stored(wanted)[index]
        same = other.keys() == sample.keys() and all(
            stands_for(other[name], value)  # type: ignore[arg-type]
            if isinstance(value, Tensor) and isinstance(other[name], Tensor)
            else other[name] == value
            for name, value in sample.items()
        )
        require(
            same,
            "a sample of stored(dtypes) stands for what the sample holds",
            f"{where} as stored does not",
            "give uint8 0..255 for float32 in [-1, 1], narrow integers for the same int64, and all else as it is",
        )


def _require_fields(sample: object, where: str) -> None:
    require(
        isinstance(sample, dict) and bool(sample) and all(isinstance(name, str) for name in sample),
        "a sample is a dict of fields",
        f"{where} is {kind_of(sample)}",
        "return {field name: value}",
    )
    assert isinstance(sample, dict)
    for name, value in sample.items():
        problem = _field_problem(name, value)
        require(
            problem is None,
            "a field is a string or a finite tensor of float32 or int64; and by its name, an image is float32 "
            "[channels, h, w] in [-1, 1], a mask int64 [h, w] >= 0, a label int64 [] >= 0, an embedding float32 [D] of "
            "unit norm",
            f"{where}[{name!r}] is {problem}",
            "convert it in __getitem__, or give a field of another sort another name",
        )


def _field_problem(name: str, value: object) -> str | None:
    """What is wrong with a field, if anything. Only names with a convention bind a shape."""
    if isinstance(value, str):
        return None
    if not isinstance(value, Tensor):
        return kind_of(value)
    what = f"{value.dtype} of shape {tuple(value.shape)}"
    if value.dtype not in (torch.float32, torch.int64):
        return what
    if not torch.isfinite(value).all():
        return f"{what} with values that are not finite"
    if name in _CONVENTIONS and (value.dtype, value.dim()) != _CONVENTIONS[name]:
        return what
    if name == "image" and value.abs().max().item() > 1 + 1e-6:
        return f"{what} from {value.min().item():.3g} to {value.max().item():.3g}"
    if name in ("mask", "label") and value.min().item() < 0:
        return f"{what} with {value.min().item()}"
    if name == "embedding" and abs(value.norm().item() - 1) > 1e-3:
        return f"{what} of norm {value.norm().item():.3g}"
    return None


_NARROW = (torch.uint8, torch.int16, torch.int32)

_CONVENTIONS = {
    "image": (torch.float32, 3),
    "mask": (torch.int64, 2),
    "label": (torch.int64, 0),
    "embedding": (torch.float32, 1),
}


def _equal(a: Sample, b: Sample) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, y)
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else x is y or (type(x) is type(y) and x == y)
        for x, y in ((a[name], b[name]) for name in a)
    )


CHECKS: tuple[Check, ...] = (*of_config.CHECKS, build, length, fields, determinism, stored)
