"""The registered units: attrs-frozen config classes that say what they are (``kind``) and build it (``build``).

A plugin subclasses one of the bases below, decorates the subclass with ``@attrs.frozen`` and gives it a ``kind``. Its
fields are the keys that a configuration file may set, so their types must be ones that TOML can hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from attrs import field, frozen

from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.queries import Query

if TYPE_CHECKING:  # importing the core imports torch, which listing plugins must not
    import numpy as np
    from torch import Tensor

    from mtdiffusion.interfaces import Backbone, ClockLaw, Dataset, FeatureSpec, LatentSpec, Modality, WeightSchedule
    from mtdiffusion_registry.evaluation import Evaluator
    from mtdiffusion_registry.pictures import Source


Reader: TypeAlias = "Callable[[Source, tuple[int, int] | None], np.ndarray]"
"""Reads a file, on disk or in memory, as :meth:`FieldConfig.read` does, to an array."""


def _none_here(_: int) -> list[Path]:
    return []


@frozen
class Config(ABC):
    """What every registered unit has.

    Attributes:
        group: which sort of unit it is; set by the bases below, one of :data:`GROUPS`.
        kind: the name by which a configuration file asks for it, unique within the group.
    """

    group: ClassVar[str]
    kind: ClassVar[str]


@frozen
class ModalityConfig(Config):
    """Builds a modality."""

    group: ClassVar[str] = "modality"

    @abstractmethod
    def latent_channels(self, height: int, width: int) -> int:
        """Channels that it wants as its own share of a diffusion space of this height and width.

        Raises:
            ValueError: if it cannot fill a space of this height and width.
        """

    @abstractmethod
    def build(self, latent: LatentSpec, features: FeatureSpec) -> Modality:
        """The modality, its code filling ``latent`` and its head reading features of the shapes ``features``.

        Raises:
            ValueError: if it cannot fill ``latent`` or read ``features``.
        """


@frozen
class BackboneConfig(Config):
    """Builds a backbone."""

    group: ClassVar[str] = "backbone"

    @abstractmethod
    def build(self, in_channels: int, height: int, width: int, in_vector: int) -> Backbone:
        """The backbone, for inputs ``z [B, in_channels, height, width]`` and ``vector [B, in_vector]``.

        Raises:
            ValueError: if it cannot work at this height and width.
        """


@frozen
class DatasetConfig(Config):
    """Builds a data set.

    Attributes:
        reproducible: whether its samples follow from its configuration and code alone (they are computed, or shipped),
            so that what is made from them may be kept under these. Data sets of files have a fingerprint of their own.
    """

    group: ClassVar[str] = "dataset"
    reproducible: ClassVar[bool] = False

    @abstractmethod
    def build(self, split: Literal["train", "test"]) -> Dataset:
        """The split of the data set; the same samples in the same order every time.

        Raises:
            EmptySplit: if there are no samples in it.
            UserError: if the data are missing or damaged.
        """

    def validation(self) -> Dataset | None:
        """A split to watch a training by, beside the two of :meth:`build`, where the data have one; by default none."""
        return None

    def reading(self, fields: Collection[str]) -> DatasetConfig:
        """The same data set for one who reads these fields only, which may spare it work; by default this one."""
        return self

    def data_field(self, name: str) -> DataField | None:
        """How the files of a field are read, where there are such; by default, and of other fields, None."""
        return None

    @classmethod
    def pack(cls, splits: Mapping[str, Dataset], folder: Path) -> None:
        """Write data sets of whichever kind into an empty folder that this kind reads again by its key ``root``, sample
        by sample what they hold (``mtdiffusion data pack``). What it leaves when it fails, the caller removes.

        Args:
            splits: by name, ``train`` and ``test``; the test split may not be there.

        Raises:
            UserError: if a sample cannot be written; by default always, of kinds that read what others made.
        """
        raise UserError(f"data sets of kind {cls.kind!r} cannot be packed; the kind 'litdata' can")


@frozen
class FieldConfig(Config):
    """Reads one field of a data set of files: what a sample's file holds, or its cell of a table.

    A data set of files (``folder``) asks by kind, ``fields = {speech = "logmel"}``, and knows none of the kinds itself.
    What a field holds follows the conventions of :class:`mtdiffusion.interfaces.Dataset`; a text is left to the
    modality that reads the field (:meth:`mtdiffusion.interfaces.Modality.from_text`).

    Attributes:
        suffixes: of files that hold one sample's value each, in lower case with their dot; (): there are none such.
        cells: whether values can stand in a table: CSV, JSON and the like.
        arrays: whether they can be the arrays of one file, ``.safetensors`` or ``.npz``, by sample.
        spatial: whether values are pictures, to be scaled and cropped alike with the other pictures of a sample.
        encoded: whether :meth:`read` and :meth:`extent` also take a file in memory
            (:class:`mtdiffusion_registry.pictures.Encoded`), as those do that open pictures by
            :func:`mtdiffusion_registry.pictures.open_picture` alone. Of others, what a table holds as a file's bytes is
            written to a temporary file first.
        plain: whether what :meth:`read` gives may be handed on in place of the value, as it stands for it by the
            conventions of :meth:`mtdiffusion.interfaces.Dataset.stored`.
    """

    group: ClassVar[str] = "field"
    suffixes: ClassVar[tuple[str, ...]] = ()
    cells: ClassVar[bool] = False
    arrays: ClassVar[bool] = False
    spatial: ClassVar[bool] = False
    encoded: ClassVar[bool] = False
    plain: ClassVar[bool] = False

    @property
    def folder_of(self) -> str | None:
        """Another field, whose files stand in folders that are named by this field's values: :meth:`parse` is given the
        folder's name. None: the field has files or a table of its own."""
        return None

    def read(self, path: Path, size: tuple[int, int] | None = None) -> Tensor | str:
        """What a file holds, in a form that takes little room (pictures of 8 bits as uint8); :meth:`value` goes on.

        Args:
            size: height and width to which pictures are scaled and cropped centrally; None: as they are. Only spatial
                fields are given one.

        Raises:
            ValueError: if the file is damaged or holds something else; the message names the file.
        """
        raise NotImplementedError(f"field {self.kind}: has suffixes, so it must say how files are read")

    def reader(self) -> Reader | None:
        """:meth:`read` as a function that other processes can be given, so that many files are read on all processors.

        A module's own function, or a :func:`functools.partial` of one; the module must not import torch, which takes
        longer than reading thousands of small files. It gives what :meth:`read` does, as an array, and raises the same
        errors. None, the default: files are read by :meth:`read`, in threads of this process.
        """
        return None

    def parse(self, content: object) -> Tensor | str | None:
        """What a cell of a table holds (a str; of JSON and Parquet also a number, a bool, a list or None), or an array
        (``numpy.ndarray``); None if it is blank.

        Raises:
            ValueError: if it is no value; the message says what was found and what is expected.
        """
        raise NotImplementedError(f"field {self.kind}: has cells or arrays, so it must say how they are read")

    def value(self, stored: Tensor) -> Tensor:
        """What a sample holds, of what :meth:`read` gave; by default that itself."""
        return stored

    def extent(self, path: Path) -> tuple[int, int] | None:
        """Height and width of a file's picture as it is shown, by its header alone, so that a data set can tell whether
        the pictures of a sample lie on one another; None: it cannot be told.

        Raises:
            ValueError: as :meth:`read`.
        """
        return None

    def check_files(self, paths: Sequence[Path]) -> None:
        """What shows in all files together only, such as palettes that contradict one another.

        Raises:
            ValueError: the message names the files.
        """


@frozen(eq=False)
class DataField:
    """A field of the data set that a run is trained on, for files that are given beside it
    (:attr:`mtdiffusion.Modality.data_field`): they are to be read as those of the data.

    Attributes:
        config: how its files are read.
        files: given a number, at most so many files of it in the training split; [] where they are not, or no longer,
            here.
    """

    config: FieldConfig
    files: Callable[[int], list[Path]] = field(default=_none_here)


@frozen
class WeightScheduleConfig(Config):
    """Builds a weight schedule."""

    group: ClassVar[str] = "weight_schedule"

    @abstractmethod
    def build(self, names: Sequence[str]) -> WeightSchedule:
        """The schedule for the modality instances of these names, in this order.

        Raises:
            ValueError: if it is configured for other names.
        """


@frozen
class ClockLawConfig(Config):
    """Builds a law of clocks: which noise levels of the modalities are trained together."""

    group: ClassVar[str] = "clock_law"

    @abstractmethod
    def build(self, names: Sequence[str]) -> ClockLaw:
        """The law for the modality instances of these names, in this order.

        Raises:
            ValueError: if it is configured for other names.
        """


@frozen
class EvaluatorConfig(Config):
    """Builds an evaluator."""

    group: ClassVar[str] = "evaluator"

    @abstractmethod
    def build(self, train: Mapping[str, Tensor]) -> Evaluator:
        """The evaluator, fitted to training samples where it needs to be.

        Args:
            train: ``[n, ...]`` by modality name, of samples that have all that it :meth:`needs`, and of other
                modalities those that all of these samples have; n is at most :meth:`train_limit`.

        Raises:
            ValueError: if it is configured for modalities that are not there.
        """

    def needs(self) -> tuple[str, ...]:
        """Names of the modalities that it must have: it is refused, before anything is trained, where the model lacks
        one, and is fitted to and shown samples that have them all.

        By default (): none in particular. It is then fitted to and shown samples that have every modality.
        """
        return ()

    def check(self, modalities: Mapping[str, ModalityConfig]) -> None:
        """Refuse modalities, by name, that it would silently measure wrongly; those that it :meth:`needs` are among
        them. By default none.

        Raises:
            ValueError: which says what does not fit, and what to do.
        """

    def train_limit(self) -> int | None:
        """How many training samples it wants at most; a random draw of as many is read. None, the default: all of the
        training split. 0: none, and none is read; ``build`` is then given tensors of no samples."""
        return None

    def preparation(self) -> str:
        """What ``build`` does that may take a while, for whoever waits for it; "", the default, if it takes none."""
        return ""


@frozen
class TaskConfig(Config):
    """A task: which modality instances take part, what is asked, and how a joint model is trained for it."""

    group: ClassVar[str] = "task"

    @abstractmethod
    def instances(self) -> tuple[str, ...]:
        """Names of the modality instances that take part; a benchmark's setting says what each is."""

    @abstractmethod
    def queries(self) -> tuple[Query, ...]:
        """What a model is asked, each answer judged by the metrics of its targets and by the evaluators."""

    def training(self) -> Mapping[str, Any]:
        """Changes to the experiment of a joint model, as tables: ``{"conditioning": {"partial": 0.5}}``."""
        return {}


@frozen
class MethodConfig(Config):
    """A method: something that is trained on a problem and then answers queries.

    Attributes:
        role: "joint": one model for all of a task's queries; "control": a model for one of them alone, at the same
            budget, which the joint model is measured against; "baseline": anything else worth comparing.
    """

    group: ClassVar[str] = "method"
    role: ClassVar[Literal["joint", "control", "baseline"]] = "baseline"

    @abstractmethod
    def fit(self, problem: Any) -> Any:
        """Train a ``mtdiffusion_benchmarks.interfaces.Problem``, or continue an interrupted training of it.

        Returns:
            A ``mtdiffusion_benchmarks.interfaces.Fitted``. (The registry knows neither by import: it comes before.)

        Raises:
            UserError: if it cannot work on this problem.
            Diverged: if training gives numbers that are not finite.
        """


BASES: Mapping[str, type[Config]] = MappingProxyType(
    {
        base.group: base
        for base in (
            ModalityConfig,
            BackboneConfig,
            DatasetConfig,
            FieldConfig,
            WeightScheduleConfig,
            ClockLawConfig,
            EvaluatorConfig,
            TaskConfig,
            MethodConfig,
        )
    }
)
"""The base class of each group."""

GROUPS: tuple[str, ...] = tuple(BASES)
