"""From a data set's fields to batches by modality: matching, derived values, missing modalities, order."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from attrs import frozen
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mtdiffusion import Dataset, Modality, MultimodalDiffusion
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_registry import UserError


def derive_seed(*key: int) -> int:
    """A well-mixed 63-bit seed from a tuple of non-negative integers: the same everywhere, always."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@frozen(eq=False)
class Batch:
    """Modalities by name.

    Attributes:
        x: each ``[B, ...]``; a placeholder where a sample lacks it.
        presence: ``[B, N]``, 0 where it does.
    """

    x: dict[str, Tensor]
    presence: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch({name: x.to(device, non_blocking=True) for name, x in self.x.items()}, self.presence.to(device))


class ModalityData:
    """A data set seen through a model's modalities: sample i is a dict of the modalities it has.

    Derived modalities (an embedding of an image) are computed once, here.

    Raises:
        UserError: if no sample has the field a modality reads, or a field has values that are not tensors.
    """

    def __init__(self, dataset: Dataset, modalities: Mapping[str, Modality], what: str = "data") -> None:
        if len(dataset) == 0:
            raise UserError(f"{what}: the data set is empty")
        self.dataset = dataset
        self.modalities = dict(modalities)
        self.fields = {name: modality.field or name for name, modality in modalities.items()}
        self.dtypes = {name: modality.placeholder(1).dtype for name, modality in modalities.items()}
        self.what = what
        self._check_fields()
        self._derived = {name: self._derive(name) for name, modality in modalities.items() if modality.derived}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raw = self.dataset[index]
        sample: dict[str, Tensor] = {}
        for name, field in self.fields.items():
            if field not in raw:
                continue
            value = self._derived[name][index] if name in self._derived else raw[field]
            if not isinstance(value, Tensor):
                raise UserError(
                    f"{self.what}: field {field!r} of sample {index} is {type(value).__name__}, but modality {name!r} "
                    "reads tensors"
                )
            sample[name] = value
        return sample

    def _check_fields(self) -> None:
        found: set[str] = set()
        for index in range(len(self)):  # as a rule the first has them all
            found |= set(self.dataset[index])
            if found >= set(self.fields.values()):
                return
        for name, field in self.fields.items():
            if field not in found:
                raise UserError(
                    f"{self.what}: no sample has the field {field!r} that modality {name!r} reads; its fields are "
                    f"{', '.join(sorted(found))} (let modalities.{name} read one of them, or remove it)"
                )

    def _derive(self, name: str, chunk: int = 512) -> list[Tensor]:
        field = self.fields[name]
        table: list[Tensor] = []
        for start in range(0, len(self), chunk):
            raw = [self.dataset[i] for i in range(start, min(start + chunk, len(self)))]
            have = [r[field] for r in raw if field in r]
            try:
                derived = self.modalities[name].derive(torch.stack(have)).cpu() if have else ()  # type: ignore[arg-type]
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{self.what}: modality {name!r} cannot be made from {field!r}: {error}") from error
            values = iter(derived)
            table += [next(values) if field in r else torch.empty(0) for r in raw]
        return table

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        """Stack samples; those that lack a modality get a placeholder and presence 0.

        Raises:
            UserError: if what is there has the wrong shape, dtype or range, or is not finite.
        """
        x: dict[str, Tensor] = {}
        presence = torch.tensor([[float(name in s) for name in self.modalities] for s in samples])
        for name, modality in self.modalities.items():
            rows = [i for i, s in enumerate(samples) if name in s]
            try:
                values = torch.stack([samples[i][name] for i in rows]) if rows else None
                if values is not None:
                    modality.check(values)
                    if values.dtype != self.dtypes[name]:  # a lenient check lets it pass, and the model cannot take it
                        raise ValueError(f"expected {self.dtypes[name]}, as of its placeholder, found {values.dtype}")
            except (ValueError, RuntimeError) as error:
                raise UserError(f"{self.what}: modality {name!r}: {error}") from error
            if values is None or len(rows) < len(samples):
                filled = modality.placeholder(len(samples))
                if values is not None:
                    filled[rows] = values.to(filled.dtype)
                values = filled
            x[name] = values
        return Batch(x, presence)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples of these indices."""
        return self.collate([self[i] for i in indices])


def load_data(experiment: Experiment, model: MultimodalDiffusion, split: Literal["train", "test"]) -> ModalityData:
    """A split of an experiment's data set, seen through a model's modalities.

    Raises:
        UserError: if it cannot be read, or lacks a modality.
    """
    try:
        dataset = experiment.data.build(split)
    except ValueError as error:
        raise UserError(f"data ({split}): {error}") from error
    return ModalityData(dataset, {name: model.modality(name) for name in model.names}, f"data ({split})")


class StepSampler(Sampler[list[int]]):
    """Index lists, one a micro-batch, from a given step on; a function of the seed and the step alone, so resuming at a
    step continues exactly. Each epoch is a new permutation; ranks take turns in it.
    """

    def __init__(self, size: int, batch: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for micro in range(self.start, self.stop):
            first = (micro * self.world + self.rank) * self.batch
            indices: list[int] = []
            for position in range(first, first + self.batch):
                if position // self.size != epoch:
                    epoch = position // self.size
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                    order = torch.randperm(self.size, generator=generator)
                indices.append(int(order[position % self.size]))
            yield indices

    def __len__(self) -> int:
        return self.stop - self.start


class _Batches:
    """A data set whose item is a whole batch, or what is wrong with it.

    An error raised in a worker process would reach the training process as a traceback in a message.
    """

    def __init__(self, data: ModalityData) -> None:
        self.data = data

    def __getitem__(self, indices: list[int]) -> Batch | UserError:
        try:
            return self.data.batch(indices)
        except UserError as error:
            return error


def training_batches(data: ModalityData, sampler: StepSampler, workers: int) -> Iterator[Batch]:
    """Batches in the sampler's order.

    Raises:
        UserError: as :meth:`ModalityData.batch`.
    """
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Batches(data),  # type: ignore[arg-type]
        sampler=sampler,
        batch_size=None,  # the sampler's items are whole batches
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator().manual_seed(0),  # a loader without one draws from the global generator
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _as_it_is(batch: Batch | UserError) -> Batch | UserError:
    return batch


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the training process decides when to stop its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
