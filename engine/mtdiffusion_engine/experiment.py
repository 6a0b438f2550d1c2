"""The experiment: everything that a run's configuration says, and how it becomes a model."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar

import attrs
import torch
from attrs import Factory, evolve, field, frozen
from attrs.validators import and_, deep_iterable, ge, gt, in_, le, lt, min_len, optional

from mtdiffusion import (
    DiffusionProcess,
    FeatureSpec,
    LatentSpec,
    Layout,
    LossWeights,
    Modality,
    MultimodalDiffusion,
    OwnLayout,
    Retention,
    SamplerSettings,
    SharedLayout,
    SNRMatched,
)
from mtdiffusion.retention import CURVES, RETENTIONS
from mtdiffusion_engine.augmentation import AugmentationConfig
from mtdiffusion_engine.checkpoint import is_exported, read_json
from mtdiffusion_engine.subsets import ConditioningConfig
from mtdiffusion_registry import (
    BackboneConfig,
    ClockLawConfig,
    Config,
    ConfigError,
    DatasetConfig,
    EvaluatorConfig,
    ModalityConfig,
    Registry,
    UserError,
    WeightScheduleConfig,
)
from mtdiffusion_registry.config import apply_overrides, load_toml, structure, unstructure

PLUGINS_FILE = "plugins.json"
"""Beside a run's config.toml: the distribution, version and module of each kind in it."""

T = TypeVar("T")

_share = and_(ge(0.0), le(1.0))


@frozen
class LatentConfig:
    """The shared diffusion space.

    Attributes:
        height, width: its sides.
        layout: "own": each modality has channels and a clock of its own; "shared": all add up in the same channels,
            under one clock.
        channels: of a shared layout; None: as many as the modality that wants most.
    """

    height: int = field(validator=ge(1))
    width: int = field(validator=ge(1))
    layout: Literal["own", "shared"] = field(default="own", validator=in_(("own", "shared")))
    channels: int | None = field(default=None, validator=optional(ge(1)))


@frozen
class ProcessConfig:
    """The forward process.

    Attributes:
        steps: T.
        curve: α_t: cosine, linear or rectified_flow.
        retention: "compensated", "literal" (a_t = α_t/(N + 1)) or "rectified_flow" (σ_t = t/T).
        weights: the weight schedule; None: SNR-matched to the curve, gains 1.
    """

    steps: int = field(default=500, validator=ge(2))
    curve: str = field(default="cosine", validator=in_(tuple(CURVES)))
    retention: str = field(default="compensated", validator=in_(RETENTIONS))
    weights: WeightScheduleConfig | None = None


@frozen
class ModelConfig:
    """How the network states its prediction and what it is shown.

    Attributes:
        parameterisation: "derived": ε follows from the modalities' heads; "epsilon_head": the paper's own head.
        show_clean: in an own layout, show what is clean a second time, in channels that are empty elsewhere.
    """

    parameterisation: Literal["derived", "epsilon_head"] = field(
        default="derived", validator=in_(("derived", "epsilon_head"))
    )
    show_clean: bool = True


TRACKERS = ("wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "swanlab")
"""What accelerate logs to, beside TensorBoard, which is always there."""


@frozen
class TrainingConfig:
    """The optimisation.

    Attributes:
        steps: optimizer steps.
        batch_size: samples a step, in all processes and micro-batches together.
        accumulate: micro-batches that each process takes its part of a step in: the same step in less memory.
        optimizer: "adamw" (Loshchilov & Hutter 2019); or "muon" (Jordan et al. 2024) for the matrices between encoders
            and heads, and AdamW for the rest: further in as many steps, each of which takes longer.
        learning_rate: peak; reached after ``warmup`` steps.
        schedule: after that: down a half "cosine" to 0; "constant"; or "wsd" (warm-up, stable, decay: Hu et al. 2024),
            constant and down a straight line to 0 in the last ``decay`` share of the steps.
        weight_decay: of either. beta2: of AdamW.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights, which sampling uses.
        precision: "float32"; "bfloat16" (autocast; weights, moments and the average stay float32); or "auto": bfloat16
            where the device multiplies it natively, else float32 (``environment.native_bfloat16``). A run remembers
            which, and is resumed with it.
        parallel: what several processes have of the model: "ddp": each has all of it; "fsdp": weights, gradients,
            moments and the average are split over them (FSDP2: Zhao et al. 2023). Either trains the same run.
        checkpoint_activations: forget what happens inside of the backbone's blocks and compute it again on the way back
            (Chen et al. 2016): less memory, about a third more work.
        compile: compile the network and its loss (torch.compile): a minute or more at the start, faster steps after it.
        seed: of initialisation, data order and noise.
        workers: processes that load data; 0 loads in the training process.
        timeout: seconds that one of several processes waits for another before all end (as PyTorch's process groups
            have one); longer than what the first does alone takes: samples on the way, a checkpoint.
        log_every: steps between reports.
        held_out_every: steps between looks at the loss of held-out samples, by the averaged weights; 0 turns it off.
        checkpoint_every, sample_every: in steps; 0 turns it off.
        keep: how many checkpoints are kept.
        trackers: what the training is logged to beside TensorBoard, by accelerate's names; packages to install.
        project: what they call the runs together.
    """

    steps: int = field(default=5000, validator=ge(1))
    batch_size: int = field(default=64, validator=ge(1))
    accumulate: int = field(default=1, validator=ge(1))
    optimizer: Literal["adamw", "muon"] = field(default="adamw", validator=in_(("adamw", "muon")))
    learning_rate: float = field(default=2e-3, validator=and_(gt(0.0), lt(math.inf)))
    warmup: int = field(default=200, validator=ge(0))
    schedule: Literal["cosine", "constant", "wsd"] = field(
        default="cosine", validator=in_(("cosine", "constant", "wsd"))
    )
    decay: float = field(default=0.2, validator=and_(gt(0.0), le(1.0)))
    weight_decay: float = field(default=0.01, validator=and_(ge(0.0), lt(math.inf)))
    beta2: float = field(default=0.99, validator=and_(gt(0.0), lt(1.0)))
    clip: float = field(default=1.0, validator=gt(0.0))
    ema: float = field(default=0.998, validator=_share)
    precision: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", validator=in_(("auto", "float32", "bfloat16"))
    )
    parallel: Literal["ddp", "fsdp"] = field(default="ddp", validator=in_(("ddp", "fsdp")))
    checkpoint_activations: bool = False
    compile: bool = False
    seed: int = field(default=0, validator=ge(0))
    workers: int = field(default=0, validator=ge(0))
    timeout: float = field(default=1800.0, validator=gt(0.0))
    log_every: int = field(default=50, validator=ge(1))
    held_out_every: int = field(default=500, validator=ge(0))
    checkpoint_every: int = field(default=1000, validator=ge(0))
    sample_every: int = field(default=1000, validator=ge(0))
    keep: int = field(default=2, validator=ge(1))
    trackers: tuple[str, ...] = field(default=(), validator=deep_iterable(in_(TRACKERS)))
    project: str = field(default="mtdiffusion", validator=min_len(1))

    def __attrs_post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size = {self.batch_size} cannot be shared out in accumulate = {self.accumulate} micro-batches; "
                "give a multiple of it"
            )


def _positive_or_all(_: object, attribute: attrs.Attribute[Any], value: int | str | None) -> None:
    if value not in (None, "all") and (isinstance(value, str) or value < 1):
        raise ValueError(f"'{attribute.name}': expected a whole number, 1 or more, or \"all\", found {value!r}")


@frozen
class EvaluationConfig:
    """What ``mtdiffusion evaluate`` does.

    Attributes:
        samples: held-out samples that are taken, a random draw of as many at most; "all": all of them. None: all, but
            for ``mtdiffusion evaluate``, which takes 1,000 at most, so that it takes minutes.
        conditionals: what is measured, by the names that the results go by: ``label|image``, ``image|label+mask``,
            ``image|image:part``, ``joint``, ``real``, ``bound``. None: each modality given every other, given all
            others and, if it is spatial, given a part of itself, and the last three.
        joint_draws: how many times as many joint samples are drawn; their metrics are means over draws of that size, so
            that a distance has the finite-sample bias of the held-out data's own, beside which it stands.
        batch_size: of sampling.
        steps: solver steps of the conditionals; joint samples take ``sampling.steps``.
        hidden_share: share of a spatial modality that is hidden when it is observed in part.
        bound_times: terms of L1 per sample in the bound; 0 leaves the bound out.
        seed: of the sampling.
        evaluators: judges of whole samples.
    """

    samples: int | Literal["all"] | None = field(default=None, validator=_positive_or_all)
    conditionals: tuple[str, ...] | None = field(default=None, validator=optional(min_len(1)))
    joint_draws: int = field(default=3, validator=ge(1))
    batch_size: int = field(default=256, validator=ge(1))
    steps: int = field(default=16, validator=ge(1))
    hidden_share: float = field(default=0.25, validator=_share)
    bound_times: int = field(default=20, validator=ge(0))
    seed: int = field(default=0, validator=ge(0))
    evaluators: tuple[EvaluatorConfig, ...] = ()

    def limit(self, unset: int | None = None) -> int | None:
        """How many held-out samples are taken at most, ``unset`` where ``samples`` does not say it; None: all."""
        return unset if self.samples is None else None if self.samples == "all" else self.samples


@frozen
class PluginsConfig:
    """Which of the installed plugins this experiment does without.

    Attributes:
        disable: names of entry points or distributions, or "*"; see :meth:`mtdiffusion_registry.Registry.blocking`.
    """

    disable: tuple[str, ...] = ()


@frozen
class Experiment:
    """One configuration file. Stored, resolved, with every checkpoint and every result.

    Attributes:
        clocks: the law of clocks; None: one clock for all modalities.
    """

    data: DatasetConfig
    modalities: dict[str, ModalityConfig] = field(validator=min_len(1))
    latent: LatentConfig
    backbone: BackboneConfig
    augmentation: AugmentationConfig = Factory(AugmentationConfig)
    process: ProcessConfig = Factory(ProcessConfig)
    clocks: ClockLawConfig | None = None
    model: ModelConfig = Factory(ModelConfig)
    conditioning: ConditioningConfig = Factory(ConditioningConfig)
    loss: LossWeights = Factory(LossWeights)
    training: TrainingConfig = Factory(TrainingConfig)
    sampling: SamplerSettings = Factory(SamplerSettings)
    evaluation: EvaluationConfig = Factory(EvaluationConfig)
    plugins: PluginsConfig | None = None

    def __attrs_post_init__(self) -> None:
        for name in self.modalities:
            if not name.isidentifier() or hasattr(torch.nn.ModuleDict, name):
                raise ValueError(
                    f"modalities: {name!r} cannot name a modality; expected letters, digits and underscores, and not a "
                    "name that modules use themselves (such as values, items, type)"
                )
        if self.model.parameterisation == "epsilon_head" and self.loss.l1 == 0:
            raise ValueError(
                "model.parameterisation = 'epsilon_head' needs loss.l1 above 0: nothing else trains that head"
            )
        named = {
            "conditioning.subsets": {part for key in self.conditioning.subsets for part in key.split("+")},
            "sampling.path": set(self.sampling.path or {}),
        }
        if isinstance(self.loss.readout, Mapping):
            named["loss.readout"] = set(self.loss.readout)
        for key, names in named.items():
            if unknown := sorted(names - set(self.modalities)):
                raise ValueError(
                    f"{key}: no modality named {', '.join(unknown)}; this experiment has {', '.join(self.modalities)}"
                )
        if whole := [key for key in self.conditioning.subsets if set(key.split("+")) == set(self.modalities)]:
            raise ValueError(
                f"conditioning.subsets: {whole[0]!r} shows all modalities whole, which leaves nothing to denoise; "
                "expected subsets that lack one at least. Remove it"
            )


def origins_of(run: Path) -> dict[str, Any]:
    """Where each kind of a run came from, as its ``plugins.json`` records it; {} where there is none.

    Raises:
        UserError: if the file is damaged.
    """
    path = run / PLUGINS_FILE
    return read_json(path, "remove it: the run is used as well without") if path.is_file() else {}


def load_experiment(path: Path, overrides: list[str], registry: Registry) -> Experiment:
    """Read a configuration file; relative paths in it are relative to the working directory, of an exported run to its
    folder.

    Args:
        path: the file; if it is a run's, its neighbour ``plugins.json`` says where a kind that is missing came from.
        overrides: ``table.key=value`` arguments that change it.
        registry: where kinds are looked up, less those that ``plugins.disable`` names.

    Raises:
        UserError: for whatever is wrong with it.
    """
    tables = load_toml(path)
    registry = registry.with_origins(origins_of(path.parent))
    if is_exported(path.parent):  # before overrides, whose paths are the caller's
        stored = structure_experiment(tables, registry, str(path))
        folder = path.parent.absolute()
        tables = resolved(with_paths(stored, lambda key, value: folder / value), registry)
    tables = apply_overrides(tables, overrides)
    return with_absolute_paths(structure_experiment(tables, registry, str(path)))


def structure_experiment(tables: Mapping[str, Any], registry: Registry, source: str) -> Experiment:
    """The experiment that a configuration file's tables describe.

    Args:
        tables: the contents of the file.
        registry: where kinds are looked up, less those that ``plugins.disable`` in the tables names.
        source: what error messages call the file.

    Raises:
        ConfigError: if they do not fit.
    """
    return structure(registry.blocking(_disabled(tables), by="plugins.disable"), tables, Experiment, source)


def _disabled(tables: Mapping[str, Any]) -> list[str]:
    """``plugins.disable``, which must be known before kinds are looked up; structuring says what is wrong with it."""
    plugins = tables.get("plugins")
    names = plugins.get("disable") if isinstance(plugins, Mapping) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def origins(experiment: Experiment, registry: Registry) -> dict[str, dict[str, str]]:
    """The distribution, version and module of every kind that an experiment uses, by ``GROUP.KIND``."""
    registry = registry.blocking(experiment.plugins.disable if experiment.plugins else ())
    return {
        f"{config.group}.{config.kind}": registry.origin(config.group, config.kind) for config in _kinds(experiment)
    }


def _kinds(value: Any) -> Iterator[Config]:
    """The configs of registered kinds in an experiment, at any depth."""
    if isinstance(value, Config):
        yield value
    if attrs.has(type(value)):
        value = [getattr(value, attribute.name) for attribute in attrs.fields(type(value))]
    elif isinstance(value, Mapping):
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
        yield from _kinds(item)


def with_precision(experiment: Experiment, native: bool) -> Experiment:
    """The experiment with its ``training.precision`` settled: "auto" is bfloat16 where that is ``native``."""
    if experiment.training.precision != "auto":
        return experiment
    return evolve(experiment, training=evolve(experiment.training, precision="bfloat16" if native else "float32"))


def resolved(experiment: Experiment, registry: Registry) -> dict[str, Any]:
    """The experiment as tables for TOML or JSON, every default written out."""
    return unstructure(registry, experiment)


_SESSION = tuple(
    f"training.{key}."
    for key in (
        "parallel",
        "checkpoint_activations",
        "compile",
        "workers",
        "timeout",
        "log_every",
        "held_out_every",
        "checkpoint_every",
        "sample_every",
        "keep",
        "trackers",
        "project",
    )
)
_NO_WEIGHTS = ("plugins.", "sampling.", "evaluation.", *_SESSION)
"""What a run's weights do not depend on."""
_FIXED = tuple(f"training.{key}." for key in ("seed", "batch_size", "optimizer"))
"""What decides, with the step, which samples and which noise come next, and whose moments they are: of a resumed run it
may not change."""
_RESUMABLE = ("plugins.", "sampling.", "evaluation.", "loss.", "training.")
TRAINED = ("data.", "sampling.", "evaluation.", "training.timeout.")
"""What may change of a run that is only used: its model does not depend on it."""

Changes = dict[str, tuple[Any, Any]]
"""Old and new value by key; "not set" for a key that is not there."""


def changes(stored: Experiment, asked: Experiment, registry: Registry) -> Changes:
    """What differs between two experiments, by key; a precision that is "auto" is what is stored."""
    if asked.training.precision == "auto":
        asked = evolve(asked, training=evolve(asked.training, precision=stored.training.precision))
    old, new = (
        _flat(resolved(each, registry)) | {"the order of modalities": list(each.modalities)} for each in (stored, asked)
    )
    return {
        key: (old.get(key, "not set"), new.get(key, "not set"))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def describe_changes(changed: Changes) -> str:
    """``KEY is OLD, asked for NEW; ...``"""
    return "; ".join(f"{key} is {old}, asked for {new}" for key, (old, new) in changed.items())


def require_same(experiment: Experiment, run: Path, registry: Registry) -> None:
    """Check that a run's folder holds this experiment, up to what its weights do not depend on.

    Raises:
        UserError: if it holds another one; the message says what differs.
    """
    stored = load_experiment(run / "config.toml", [], registry)
    if differ := _but_for(_NO_WEIGHTS, stored, experiment, registry):
        raise UserError(
            f"{run}: holds another experiment ({describe_changes(differ)}). Give another folder, or the same "
            "configuration"
        )


def require_resumable(experiment: Experiment, run: Path, registry: Registry) -> Changes:
    """What this experiment changes of the run in a folder, all of it such that the run can go on with it.

    Raises:
        UserError: if it changes something else; the message says what, and what to do.
    """
    stored = load_experiment(run / "config.toml", [], registry)
    differ = _but_for(_RESUMABLE, stored, experiment, registry, but=_FIXED)
    if differ:
        keys = "that" if len(differ) == 1 else "those"
        new = shlex.join(["mtdiffusion", "train", "CONFIG", "--out", "NEW", "--init-from", str(run)])
        raise UserError(
            f"{run}: holds another experiment ({describe_changes(differ)}). A run cannot be resumed with {keys} "
            f"changed. Leave {keys} as it was, or start a new run, from its weights if they fit: {new}"
        )
    return changes(stored, experiment, registry)


def require_trained(experiment: Experiment, run: Path, registry: Registry) -> None:
    """Check that an experiment is the one in a run's folder, up to what its trained model does not depend on.

    Raises:
        UserError: if it is another one; the message says what differs.
    """
    stored = load_experiment(run / "config.toml", [], registry)
    if differ := _but_for(TRAINED, stored, experiment, registry):
        raise UserError(
            f"{run}: was trained with another configuration ({describe_changes(differ)}). Of a trained run only data, "
            "evaluation and sampling can be set; for the rest train a run of its own: mtdiffusion train CONFIG --out "
            "NEW"
        )


def _but_for(
    free: tuple[str, ...], stored: Experiment, asked: Experiment, registry: Registry, but: tuple[str, ...] = ()
) -> Changes:
    """What differs but for the keys that begin so, and for paths: those say where something is, not what it is."""
    paths = path_keys(stored) | path_keys(asked)
    return {
        key: values
        for key, values in changes(stored, asked, registry).items()
        if f"{key}.".startswith(but) or not (f"{key}.".startswith(free) or key in paths)
    }


def _flat(table: Any, key: str = "") -> dict[str, Any]:
    """Values by key: ``table.key``, and ``array[0].key`` where an array holds tables."""
    if isinstance(table, list) and any(isinstance(item, Mapping) for item in table):
        items = {f"{key}[{i}]": item for i, item in enumerate(table)}
    elif isinstance(table, Mapping) and (table or not key):
        items = {f"{key}.{name}" if key else name: item for name, item in table.items()}
    else:
        return {key: table}
    flat: dict[str, Any] = {}
    for name, item in items.items():
        flat |= _flat(item, name)
    return flat


def path_keys(value: Any, key: str = "") -> set[str]:
    """The keys of a config, at any depth, that hold paths; as ``table.key``, ``table.name`` and ``array[0].key``."""
    if isinstance(value, PurePath):
        return {key}
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, PurePath) for item in value):
            return {key}
        items = {f"{key}[{i}]": item for i, item in enumerate(value)}
    else:
        items = {f"{key}.{name}" if key else name: item for name, item in _parts(value).items()}
    found: set[str] = set()
    for name, item in items.items():
        found |= path_keys(item, name)
    return found


def _parts(value: Any) -> dict[str, Any]:
    """What a config or a table of configs is made of, by name."""
    if isinstance(value, Mapping):
        return dict(value)
    if attrs.has(type(value)):
        return {attribute.name: getattr(value, attribute.name) for attribute in attrs.fields(type(value))}
    return {}


def with_absolute_paths(value: T) -> T:
    """The same config, at any depth, with each path made absolute against the working directory, and ``~`` expanded.

    Raises:
        UserError: for a home that is not known.
    """
    return with_paths(value, _absolute)


def _absolute(_: str, path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}; write the whole path") from None


def with_paths(value: T, change: Callable[[str, Path], Path], key: str = "") -> T:
    """The same config, at any depth, with each path changed.

    Args:
        change: gives the new path of a key, as :func:`path_keys` writes it, and the old one.
    """
    return _with_paths(value, change, key)


def _with_paths(value: Any, change: Callable[[str, Path], Path], key: str) -> Any:
    if isinstance(value, Path):
        return change(key, value)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_with_paths(item, change, f"{key}[{i}]") for i, item in enumerate(value))
    inner = f"{key}." if key else ""
    if type(value) is dict:
        return {name: _with_paths(item, change, f"{inner}{name}") for name, item in value.items()}
    if not path_keys(value):
        return value
    made = {
        a.alias: _with_paths(getattr(value, a.name), change, f"{inner}{a.name}")
        for a in attrs.fields(type(value))
        if a.init
    }
    return attrs.evolve(value, **made)


def build_layout(experiment: Experiment) -> Layout:
    """Where each modality lives in the latent."""
    latent = experiment.latent
    wanted = {
        name: config.latent_channels(latent.height, latent.width) for name, config in experiment.modalities.items()
    }
    if latent.layout == "own":
        return OwnLayout(wanted, latent.height, latent.width, experiment.model.show_clean)
    channels = latent.channels or max(wanted.values())
    return SharedLayout(tuple(wanted), LatentSpec(channels, latent.height, latent.width))


def build_model(experiment: Experiment, *, weightless: bool = False) -> MultimodalDiffusion:
    """The model, freshly initialised from ``training.seed``.

    Args:
        weightless: leave the backbone on the meta device, where it has shapes but no weights and takes no memory; one
            that cannot be built there is built as ever.

    Raises:
        ConfigError: if its parts do not fit together.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(experiment.training.seed)
            return _build_model(experiment, weightless)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _build_model(experiment: Experiment, weightless: bool) -> MultimodalDiffusion:
    layout = build_layout(experiment)
    names = list(experiment.modalities)
    settings = experiment.process
    retention = Retention.from_curve(settings.curve, settings.steps, len(names), settings.retention)
    schedule = settings.weights.build(names) if settings.weights is not None else SNRMatched()
    process = DiffusionProcess.build(retention, schedule, layout)
    # A backbone's inputs depend on the encoders' read-outs, and heads on the backbone's features; encoders on neither.
    readout = sum(_probe(experiment, layout)[name].encoder.readout_dim for name in names)
    in_channels, in_vector = layout.inputs(readout)
    sizes = (in_channels, experiment.latent.height, experiment.latent.width, in_vector)
    backbone = None
    if weightless:
        with suppress(Exception), torch.device("meta"):  # what is wrong in earnest is said below
            backbone = experiment.backbone.build(*sizes)
    if backbone is None:
        backbone = experiment.backbone.build(*sizes)
    modalities = _build_modalities(experiment, layout, backbone.features)
    law = experiment.clocks.build(names) if experiment.clocks is not None else None
    epsilon_head = experiment.model.parameterisation == "epsilon_head"
    return MultimodalDiffusion(modalities, backbone, process, law, epsilon_head=epsilon_head)


def _build_modalities(experiment: Experiment, layout: Layout, features: FeatureSpec) -> dict[str, Modality]:
    built = {}
    for name, config in experiment.modalities.items():
        try:
            built[name] = config.build(layout.share(name), features)
        except ValueError as error:
            raise ConfigError(f"modalities.{name}: {error}") from error
        if not math.isfinite(built[name].loss_weight):
            raise ConfigError(
                f"modalities.{name}.loss_weight: found {built[name].loss_weight}, expected a finite number"
            )
        built[name].data_field = experiment.data.data_field(built[name].field or name)
    return built


def _probe(experiment: Experiment, layout: Layout) -> Mapping[str, Modality]:
    latent = experiment.latent
    return _build_modalities(experiment, layout, FeatureSpec(1, latent.height, latent.width, 1))
