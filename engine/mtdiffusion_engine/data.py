"""From a data set's fields to batches by modality: matching, derived values, missing modalities, order."""

from __future__ import annotations

import hashlib
import queue
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, product
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mtdiffusion import Dataset, Modality, MultimodalDiffusion
from mtdiffusion_engine.augmentation import Augmentation
from mtdiffusion_engine.experiment import Experiment
from mtdiffusion_registry import DatasetConfig, EmptySplit, UserError
from mtdiffusion_registry.cache import cached, config_key, load_kept, save_kept
from mtdiffusion_registry.errors import Fault, SampleError, SampleTroubles, SeveralErrors
from mtdiffusion_registry.looking import PATIENCE
from mtdiffusion_registry.pace import Pace

T = TypeVar("T")

_LOOKED_AT = 256  # samples, for the first that have a field


_AUGMENTATION, _VARIED = 1, 5  # tell their seeds from those of the order, of which each epoch has one, and others


def derive_seed(*key: int) -> int:
    """A well-mixed 63-bit seed from a tuple of non-negative integers: the same everywhere, always."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@frozen(eq=False)
class Batch:
    """Modalities by name.

    Attributes:
        x: each ``[B, ...]``, a placeholder where a sample lacks it; or, on its way to the device, what is stored of it,
            of which :func:`values_of` makes it.
        presence: ``[B, N]``, 0 where it does.
    """

    x: dict[str, Tensor]
    presence: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory the copy is not waited for."""
        x = {name: value.to(device, non_blocking=True) for name, value in self.x.items()}
        return Batch(x, self.presence.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in memory from which a GPU copies by itself."""
        return Batch({name: value.pin_memory() for name, value in self.x.items()}, self.presence.pin_memory())


def values_of(modalities: Mapping[str, Modality], x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """x by name, where it is: made of what is stored by those modalities that are given it so
    (:meth:`mtdiffusion.Modality.from_stored`)."""
    return {
        name: modalities[name].from_stored(value) if value.dtype in modalities[name].stored_dtypes else value
        for name, value in x.items()
    }


@frozen(eq=False)
class Gathered:
    """Samples as a worker process can gather them, without a modality: nothing is checked yet.

    Attributes:
        indices: which samples.
        values: by modality, the rows of the batch that have it, and theirs: stacked, or texts and what cannot be
            stacked.
    """

    indices: list[int]
    values: dict[str, tuple[list[int], Tensor | list[Tensor | str]]]


@frozen(eq=False)
class Source:
    """A data set's samples by modality. It holds no module, so that any process can be given it.

    Attributes:
        fields: the field that each modality reads.
        derived: values that were computed once, by sample, of the modalities that have such.
        what: what errors call the data set.
        augmentation: how samples are varied when their turn is known.
        seed: of the augmentation, and of what the data set itself varies.
    """

    dataset: Dataset
    fields: Mapping[str, str]
    derived: dict[str, dict[int, Tensor]]
    what: str
    augmentation: Augmentation | None = None
    seed: int = 0

    def raw(self, index: int, seed: int | None = None) -> dict[str, Tensor | str]:
        """A sample of the data set; with a seed, as the data set varies it.

        Raises:
            SampleError: if it cannot be read; the message names it.
        """
        try:
            return self.dataset[index] if seed is None else self.dataset.varied(index, seed)
        except (ValueError, OSError) as error:  # a UserError is a ValueError
            raise SampleError.of(error, self.dataset.describe(index), self.what) from error

    def sample(self, index: int, seed: int | None = None) -> dict[str, Tensor | str]:
        """A sample by modality, as :meth:`raw` has it; those that it lacks are not there."""
        raw = self.raw(index, seed)
        return {
            name: self.derived[name][index] if name in self.derived else raw[field]
            for name, field in self.fields.items()
            if (index in self.derived[name] if name in self.derived else field in raw)
        }

    def gather(self, indices: Sequence[int], first: int | None = None) -> Gathered:
        """Several samples, stacked where they can be.

        Args:
            first: the turn of the first of them in training, each of which is varied and augmented in its own way;
                None: as they are.
        """
        samples = []
        for place, index in enumerate(indices):
            seed = None if first is None else derive_seed(self.seed, _VARIED, first + place)
            sample = self.sample(index, seed)
            if self.augmentation is not None and first is not None:
                sample = self.augmentation(sample, derive_seed(self.seed, _AUGMENTATION, first + place))
            samples.append(sample)
        values: dict[str, tuple[list[int], Tensor | list[Tensor | str]]] = {}
        for name in self.fields:
            rows = [row for row, sample in enumerate(samples) if name in sample]
            found = [samples[row][name] for row in rows]
            tensors = [value for value in found if isinstance(value, Tensor)]
            alike = len(tensors) == len(found) and len({(x.shape, x.dtype) for x in tensors}) == 1
            values[name] = rows, torch.stack(tensors) if alike else found
        return Gathered(list(indices), values)


class ModalityData:
    """A data set seen through a model's modalities: sample i is a dict of the modalities it has.

    Derived modalities (an embedding of an image) are computed once, here, and kept where the data set has a
    fingerprint.

    Args:
        keys: what identifies each modality's configuration and code; without one, nothing that depends on it is kept.
        partial: whether modalities that no sample has are let pass, if there are others.

    Raises:
        EmptySplit: if there are no samples.
        UserError: if no sample has the field a modality reads.
    """

    def __init__(
        self,
        dataset: Dataset,
        modalities: Mapping[str, Modality],
        what: str = "data",
        keys: Mapping[str, str] | None = None,
        *,
        partial: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise EmptySplit(f"{what}: the data set is empty")
        self.dataset = dataset
        self.modalities = dict(modalities)
        self.dtypes = {name: modality.placeholder(1).dtype for name, modality in modalities.items()}
        self.what = what
        self._keys = dict(keys or {})
        fields = {name: modality.field or name for name, modality in modalities.items()}
        self.source = Source(dataset, fields, {}, what)
        self._check_fields(partial)
        for name, modality in modalities.items():
            if modality.derived:
                self.source.derived[name] = self._derived(name)
        if self.source.derived:
            others = {field for name, field in fields.items() if name not in self.source.derived}
            unread = set(fields.values()) - others
            self.source = evolve(self.source, dataset=dataset.without(unread))
        self._forms = dict[str, torch.dtype]()  # in which the modalities that are given as they are stored come

    def has(self, name: str) -> bool:
        """Whether any sample has a modality."""
        return name in self._found

    def stored(self, blended: Collection[str] = ()) -> Source:
        """The source, with values as they are stored wherever the data set and the modality can do with that.

        Args:
            blended: modalities of which new values will be computed, and which are therefore not to be stored ones.
        """
        dtypes: dict[str, set[torch.dtype]] = {}
        for name, field in self.source.fields.items():
            if name not in self.source.derived:
                taken = set() if name in blended else set(self.modalities[name].stored_dtypes)
                dtypes[field] = dtypes.get(field, taken) & taken
        dataset = self.source.dataset.stored({field: taken for field, taken in dtypes.items() if taken})
        return evolve(self.source, dataset=dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            name: self._tensor(name, value, index) if isinstance(value, str) else value
            for name, value in self.source.sample(index).items()
        }

    def _tensor(self, name: str, text: str, index: int) -> Tensor:
        try:
            return self.modalities[name].from_text(text)
        except ValueError as error:
            raise self._wrong(index, name, error) from error

    def _wrong(self, index: int, name: str, error: Exception) -> SampleError:
        fault = Fault(f"have a value that modality {name!r} refuses", f"modality {name!r}: {error}")
        return SampleError([fault], self.dataset.describe(index, self.source.fields[name]), self.what)

    def _check_fields(self, partial: bool) -> None:
        found: set[str] = set()
        fields = self.source.fields
        damaged: SampleError | None = None
        for index in range(len(self)):  # as a rule the first has them all
            try:
                found |= set(self.source.raw(index))
            except SampleError as error:  # which is told with others when all are looked through
                damaged = damaged or error
            if found >= set(fields.values()):
                break
        if damaged is not None and not found >= set(fields.values()):
            raise damaged
        self._found = {name for name, field in fields.items() if field in found}
        for name, field in fields.items():
            if field not in found and not (partial and found & set(fields.values())):
                raise UserError(
                    f"{self.what}: no sample has the field {field!r} that modality {name!r} reads; its fields are "
                    f"{', '.join(sorted(found))} (let modalities.{name} read one of them, or remove it)"
                )

    def _derived(self, name: str) -> dict[int, Tensor]:
        """A derived modality's values by sample: computed, or as they were kept."""
        field = self.source.fields[name]
        kept = None
        if self.dataset.fingerprint is not None and name in self._keys:
            by = self.modalities[name].derived_by
            key = "\0".join((self.dataset.fingerprint, field, self._keys[name], *([by] if by else [])))
            kept = cached(f"derived/{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors")
            if (stored := load_kept(kept)) is not None:
                return dict(zip(stored["rows"].tolist(), stored["values"], strict=True))
        rows, values = self._derive(name, field)
        if kept is not None and len(rows):
            save_kept(kept, {"rows": rows, "values": values})
        return dict(zip(rows.tolist(), values, strict=True))

    def _derive(self, name: str, field: str, chunk: int = 512) -> tuple[Tensor, Tensor]:
        """Samples that have the field ``[n]``, and what the modality makes of it ``[n, ...]``."""
        rows: list[int] = []
        parts: list[Tensor] = []
        pace = Pace(f"computing {name} from {field}", len(self))
        for start in range(0, len(self), chunk):
            raw = {index: self.source.raw(index) for index in range(start, min(start + chunk, len(self)))}
            have = [index for index, sample in raw.items() if field in sample]
            try:
                source = [raw[index][field] for index in have]
                texts = [value for value in source if isinstance(value, str)]
                values = texts if len(texts) == len(source) else torch.stack(source)  # type: ignore[arg-type]
                parts += [self.modalities[name].derive(values).cpu()] if have else []
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{self.what}: modality {name!r} cannot be made from {field!r}: {error}") from error
            rows += have
            pace.tell(start + chunk)
        return torch.tensor(rows), torch.cat(parts) if parts else torch.empty(0)

    def measure(self, most: int = 4096) -> None:
        """Let each derived modality see what it is trained on, at most so many samples of it, spread over all.

        Raises:
            UserError: if one refuses them.
        """
        for name, values in self.source.derived.items():
            if rows := list(values)[:: -(-len(values) // most) or 1]:
                try:
                    self.modalities[name].measure(torch.stack([values[row] for row in rows]))
                except ValueError as error:
                    raise UserError(f"{self.what}: modality {name!r}: {error}") from error

    def collate(self, gathered: Gathered, *, stored: bool = False) -> Batch:
        """A checked batch; samples that lack a modality get a placeholder and presence 0.

        Args:
            stored: whether it was gathered from :meth:`stored`, and is to stay as it is stored.

        Raises:
            UserError: if what is there has the wrong shape, dtype or range, or is not finite; the message names the
                first sample that is wrong.
        """
        x: dict[str, Tensor] = {}
        count = len(gathered.indices)
        presence = torch.zeros(count, len(self.modalities))
        for place, (name, modality) in enumerate(self.modalities.items()):
            rows, found = gathered.values[name]
            values = self._checked(name, [gathered.indices[row] for row in rows], found, stored) if rows else None
            presence[rows, place] = 1
            if values is not None and values.dtype != self.dtypes[name]:
                self._forms[name] = values.dtype
            if values is None or len(rows) < count:
                filled = modality.placeholder(count)
                form = self._forms.get(name) if values is None else values.dtype
                if form not in (None, filled.dtype):  # a batch whose samples all lack it is like the others, too
                    filled = torch.zeros(filled.shape, dtype=form)
                if values is not None:
                    filled[rows] = values
                values = filled
            x[name] = values
        return Batch(x, presence)

    def _checked(self, name: str, indices: Sequence[int], found: Tensor | list[Tensor | str], stored: bool) -> Tensor:
        """Values ``[n, ...]`` that the modality takes, or what is stored of them."""
        modality = self.modalities[name]
        if isinstance(found, Tensor):
            if stored and found.dtype in modality.stored_dtypes:
                self._check(name, found, indices, modality.check_stored)
            else:
                self._check(name, found, indices)
            return found
        tensors = []
        for index, value in zip(indices, found, strict=True):
            if isinstance(value, str):
                value = self._tensor(name, value, index)
            elif stored:  # some are, and others not
                value = values_of(self.modalities, {name: value[None]})[name][0]
            self._check(name, value[None], [index])  # each alone, as they may differ in shape
            tensors.append(value)
        return torch.stack(tensors)

    def _check(
        self, name: str, values: Tensor, indices: Sequence[int], check: Callable[[Tensor], None] | None = None
    ) -> None:
        """Check values, or by another check what is stored of them."""
        try:
            if check is not None:
                check(values)
                return
            self.modalities[name].check(values)
            if values.dtype != self.dtypes[name]:  # a lenient check lets it pass, and the model cannot take it
                raise ValueError(f"expected {self.dtypes[name]}, as of its placeholder, found {values.dtype}")
        except (ValueError, RuntimeError) as error:
            if len(indices) > 1:  # which is it?
                for index, value in zip(indices, values, strict=True):
                    self._check(name, value[None], [index], check)
            raise self._wrong(indices[0], name, error) from error

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples of these indices."""
        return self.collate(self.source.gather(indices))

    def values(self, batch: Batch) -> Batch:
        """A batch of what is stored as one of values, on its device."""
        return Batch(values_of(self.modalities, batch.x), batch.presence)

    def _check_names(self) -> None:
        """Under a name at another number, a class would pass for another, in silence."""
        for name, field in self.source.fields.items():
            theirs = list(self.dataset.class_names.get(field, ()))
            if name in self.source.derived:
                continue
            if not theirs:
                self._check_numbers(name, field)
                continue
            for number, each in enumerate(self.modalities[name].input_spec.names):
                if each in theirs and theirs.index(each) != number:
                    listed = ", ".join(f'"{known}"' for known in theirs[:100]) + (", ..." if len(theirs) > 100 else "")
                    raise UserError(
                        f"{self.what}: modalities.{name}: {each!r} is class {theirs.index(each)} of the data, and "
                        f"class {number} of this modality, so that classes would go by the names of others. Give the "
                        f"names in the order of the data: names = [{listed}]"
                    )

    def _check_numbers(self, name: str, field: str) -> None:
        """Where a class is called by the number of another, a number of the data may be either."""
        spec = self.modalities[name].input_spec
        names = spec.names if spec.form == "choice" else ()
        for number, each in enumerate(names):
            if not (each.isdecimal() and number != int(each) < len(names)):
                continue
            samples = (self.dataset[i] for i in range(min(len(self), _LOOKED_AT)))
            there = (sample[field] for sample in samples if field in sample)
            if any(isinstance(value, Tensor) for value in islice(there, 8)):
                raise UserError(
                    f"{self.what}: modalities.{name}.names: {each!r} is the name of class {number}, and the data have "
                    f"numbers, so that {int(each)} may mean this class or class {int(each)}. Let the data number "
                    f"classes from 0, and give names that are no numbers of other classes, 'class {each}' say, or none"
                )
            return

    def verify(self, chunk: int = 256) -> None:
        """Look through all samples, so that a bad one is known before any work depends on it.

        What was looked through once is not again while the data set's fingerprint and the modalities stay the same. Of
        a data set without a fingerprint, as many samples as can be read in :data:`PATIENCE` seconds.

        Raises:
            UserError: as :meth:`collate`, of all bad ones: of each kind of trouble how many have it, and the first few;
                or if a modality has a class's name at another number than the data.
        """
        self._check_names()
        seen = None
        if self.dataset.fingerprint is not None and self._keys.keys() >= self.modalities.keys():
            key = "\0".join((self.dataset.fingerprint, *(f"{name}={self._keys[name]}" for name in self.modalities)))
            seen = cached(f"verified/{hashlib.sha256(key.encode()).hexdigest()[:32]}")
            if seen.is_file():
                return
        pace = Pace(f"checking {self.what}", len(self))
        source = self.stored()  # as training reads them: what is stored can be checked, and takes half as long to read
        troubles = SampleTroubles(self.what)
        for start in range(0, len(self), chunk):
            stop = min(start + chunk, len(self))
            self._look_at(source, range(start, stop), troubles)
            pace.tell(stop)
            if self.dataset.fingerprint is None and pace.seconds > PATIENCE and stop < len(self):
                troubles.tell(stop)
                pace.log(f"{stop:,} of {len(self):,} samples were checked; others are when they come up")
                return
        troubles.tell(len(self))
        if seen is not None:
            seen.touch()

    def _look_at(self, source: Source, indices: Sequence[int], troubles: SampleTroubles) -> None:
        """Note what is wrong with some samples, one by one where something is."""
        try:
            gathered = source.gather(indices)
        except SampleError as error:
            if len(indices) == 1:
                troubles.add(error)
            else:
                for index in indices:
                    self._look_at(source, [index], troubles)
            return
        for name, (rows, found) in gathered.values.items():
            where = [gathered.indices[row] for row in rows]
            try:
                if rows:
                    self._checked(name, where, found, stored=True)
            except SampleError:
                for place, index in enumerate(where):
                    try:
                        self._checked(name, [index], found[place : place + 1], stored=True)
                    except SampleError as error:
                        troubles.add(error)


def load_data(experiment: Experiment, model: MultimodalDiffusion, split: Literal["train", "test"]) -> ModalityData:
    """A split of an experiment's data set, seen through a model's modalities, some of which the test split may lack.

    Raises:
        EmptySplit: if there are no samples in it.
        UserError: if it cannot be read, or lacks a modality.
    """
    config = _reading(experiment, model)
    with _named(split):
        dataset = config.build(split)
    if dataset.fingerprint is None and config.reproducible:
        dataset.fingerprint = f"{split} of {config_key(config)}"
    data = _through_modalities(dataset, experiment, model, split)
    if split == "train":
        data.measure()
    return data


class _Some(Dataset):
    """Samples of a data set, by their indices in it."""

    def __init__(self, dataset: Dataset, rows: Sequence[int]) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return self.dataset[self.rows[index]]

    def describe(self, index: int, field: str | None = None) -> str:
        return self.dataset.describe(self.rows[index], field)


def load_some(
    experiment: Experiment, model: MultimodalDiffusion, split: Literal["train", "test"], names: Sequence[str], most: int
) -> ModalityData:
    """Samples of a split that have all of these modalities, seen through them alone: always the same random draw of
    ``most``, or as many as there are. Nothing is derived of other samples, and nothing is measured.

    Raises:
        EmptySplit: if the split has no samples, or none that have them all.
        UserError: as :func:`load_data`.
    """
    modalities = {name: model.modality(name) for name in names}
    _fit(experiment, modalities)
    dataset = _drawn(experiment, split, {name: modality.field or name for name, modality in modalities.items()}, most)
    return ModalityData(dataset, modalities, f"data ({split})")


def _drawn(experiment: Experiment, split: Literal["train", "test"], read: Mapping[str, str], most: int) -> _Some:
    """The draw of :func:`load_some`, by the field that each modality reads, which a sample must have."""
    fields = set(read.values())
    with _named(split):
        dataset = experiment.data.reading(sorted(fields)).build(split)
    source = Source(dataset, {}, {}, f"data ({split})")
    rows: list[int] = []
    there: set[str] = set()
    for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist():
        found = source.raw(index).keys()
        there |= found
        if fields <= found:
            rows.append(index)
        if len(rows) == most:
            break
    if not rows and len(dataset):
        lacking = [f"{field!r}, which modality {name!r} reads" for name, field in read.items() if field not in there]
        if not lacking:  # each is there, but never all in one sample
            lacking = [f"all of {', '.join(sorted(fields))}, which modalities {', '.join(read)} read"]
        raise EmptySplit(
            f"data ({split}): no sample has the field {'; or '.join(lacking)}; the samples' fields are "
            f"{', '.join(sorted(there))}. Set modalities.NAME.field, the field that it reads, to one of them"
        )
    return _Some(dataset, rows)


def _fit(experiment: Experiment, modalities: Mapping[str, Modality]) -> None:
    """Let derived modalities that ask for it see a draw of their source, always of the training split.

    Raises:
        EmptySplit: if no sample there has it.
        UserError: if one refuses it.
    """
    for name, modality in modalities.items():
        if modality.fit_samples:
            field = modality.field or name
            some = _drawn(experiment, "train", {name: field}, modality.fit_samples)
            source = [some[index][field] for index in range(len(some))]
            texts = [value for value in source if isinstance(value, str)]
            try:
                modality.fit(texts if len(texts) == len(source) else torch.stack(source))  # type: ignore[arg-type]
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"data (train): modality {name!r} cannot be fitted to {field!r}: {error}") from error


def load_watched(experiment: Experiment, model: MultimodalDiffusion, test: ModalityData | None) -> ModalityData | None:
    """The split to watch a training by: the data's own for that, or else the test split, if there is one.

    Raises:
        UserError: as :func:`load_data`.
    """
    with _named("validation"):
        dataset = _reading(experiment, model).validation()
    return test if dataset is None else _through_modalities(dataset, experiment, model, "validation")


def _reading(experiment: Experiment, model: MultimodalDiffusion) -> DatasetConfig:
    return experiment.data.reading([model.modality(name).field or name for name in model.names])


def _through_modalities(
    dataset: Dataset, experiment: Experiment, model: MultimodalDiffusion, split: str
) -> ModalityData:
    modalities = {name: model.modality(name) for name in model.names}
    for name, modality in modalities.items():
        try:
            modality.check_data_field()
        except ValueError as error:
            raise UserError(f"data: modalities.{name}: {error}") from error
    keys = {name: config_key(experiment.modalities[name]) for name in modalities}
    what = f"data ({split})"
    try:
        _fit(experiment, modalities)
        return ModalityData(dataset, modalities, what, keys, partial=split != "train")
    except SampleError:  # met by a modality that is derived or fitted, before all are looked through
        others = {name: modality for name, modality in modalities.items() if not modality.derived}
        ModalityData(dataset, others, what, partial=True).verify()
        raise


@contextmanager
def _named(split: str) -> Iterator[None]:
    """Says of what is wrong which split it is in."""
    try:
        yield
    except EmptySplit:
        raise
    except SeveralErrors as error:
        raise SeveralErrors(error.each, f"data ({split}): ") from error
    except ValueError as error:
        raise UserError(f"data ({split}): {error}") from error


class Turn(NamedTuple):
    """Samples whose turn it is.

    Attributes:
        first: how many samples had theirs before the first of these, in all processes.
        indices: which they are.
    """

    first: int
    indices: list[int]


class StepSampler(Sampler[Turn]):
    """The turns of samples, one a micro-batch of this process, from one step to another.

    Each epoch is a new permutation, of which every step takes the next ``batch``: a function of the seed and the step
    alone. The processes share a step's batch out among them, micro-batch by micro-batch.

    Args:
        size: samples in all.
        batch: samples a step; to be a multiple of ``parts`` times ``world``.
        parts: micro-batches a step.
    """

    def __init__(
        self, size: int, batch: int, seed: int, start: int, stop: int, parts: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        self.size, self.batch, self.seed, self.parts = size, batch, seed, parts
        self.start, self.stop, self.rank, self.world = start, stop, rank, world
        self.micro = batch // (parts * world)

    def place(self, part: int) -> int:
        """Where in its step's batch a micro-batch of this process begins."""
        return (part * self.world + self.rank) * self.micro

    def __iter__(self) -> Iterator[Turn]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step, part in product(range(self.start, self.stop), range(self.parts)):
            first = step * self.batch + self.place(part)
            indices: list[int] = []
            for position in range(first, first + self.micro):
                if position // self.size != epoch:
                    epoch = position // self.size
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                    order = torch.randperm(self.size, generator=generator)
                indices.append(int(order[position % self.size]))
            yield Turn(first, indices)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.parts


class _Batches:
    """A data set whose item is a whole batch, or what is wrong with it.

    An error raised in a worker process would reach the training process as a traceback in a message.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, turn: Turn) -> Gathered | UserError:
        try:
            return self.source.gather(turn.indices, turn.first)
        except UserError as error:
            return error


def training_batches(
    data: ModalityData, sampler: StepSampler, workers: int, augmentation: Augmentation | None = None
) -> Iterator[Batch]:
    """Batches in the sampler's order, of what is stored where that can be: :func:`values_of` makes values of it.

    Args:
        augmentation: of the samples; what it and the data set draw follows from the sampler's seed and the sample's
            turn.

    Raises:
        UserError: as :meth:`ModalityData.batch`.
    """
    source = data.stored(augmentation.blended if augmentation is not None else ())
    loader: DataLoader[Gathered | UserError] = DataLoader(
        _Batches(evolve(source, augmentation=augmentation, seed=sampler.seed)),  # type: ignore[arg-type]
        sampler=sampler,
        batch_size=None,  # the sampler's items are whole batches
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator().manual_seed(0),  # a loader without one draws from the global generator
    )
    for gathered in loader:
        if isinstance(gathered, UserError):
            raise gathered
        yield data.collate(gathered, stored=True)


def _as_it_is(gathered: Gathered | UserError) -> Gathered | UserError:
    return gathered


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the training process decides when to stop its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def made_ahead(items: Iterator[T], make: Callable[[T], T], depth: int = 2) -> Iterator[T]:
    """``make`` of each item, in their order; a thread makes a few of them before their turn.

    What making one raises is raised at its turn.
    """
    ready: queue.Queue[T | BaseException | None] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: T | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put(make(item)):
                    return
            put(None)
        except BaseException as error:  # its place is the training process
            put(error)

    thread = threading.Thread(target=fill, daemon=True, name="batches")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
