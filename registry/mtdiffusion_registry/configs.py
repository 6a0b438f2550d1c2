"""The registered units: attrs-frozen config classes that say what they are (``kind``) and build it (``build``).

A plugin subclasses one of the bases below, decorates the subclass with ``@attrs.frozen`` and gives it a ``kind``. Its
fields are the keys that a configuration file may set, so their types must be ones that TOML can hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import frozen

from mtdiffusion_registry.queries import Query

if TYPE_CHECKING:  # importing the core imports torch, which listing plugins must not
    from torch import Tensor

    from mtdiffusion.interfaces import Backbone, ClockLaw, Dataset, FeatureSpec, LatentSpec, Modality, WeightSchedule
    from mtdiffusion_registry.evaluation import Evaluator


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
    """Builds a data set."""

    group: ClassVar[str] = "dataset"

    @abstractmethod
    def build(self, split: Literal["train", "test"]) -> Dataset:
        """The split of the data set; the same samples in the same order every time."""


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
