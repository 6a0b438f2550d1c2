"""What a training takes on some number of GPUs, before any is there: memory, operations, communication, hours.

Bytes and operations are counted from shapes (:mod:`mtdiffusion_engine.cost`). Time is an estimate from a device's data
sheet and a few assumptions, all of which are said and can be changed. docs/scaling.md has the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from attrs import asdict, evolve, field, fields, frozen
from attrs.validators import and_, ge, gt, le
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from mtdiffusion import Backbone, MultimodalDiffusion, composite_loss
from mtdiffusion_engine.cost import ModelCost, Silent, count_cost, inputs_of, short
from mtdiffusion_engine.experiment import Experiment, TrainingConfig, build_model, with_precision
from mtdiffusion_registry import UserError

Parallel = Literal["ddp", "fsdp"]

PASSES = 13
"""How often a step reads or writes each trained value: AdamW 7 times (weight, gradient and two moments are read, all
but the gradient written), the average 3, the gradient's norm and its clipping 3."""


@frozen
class Device:
    """A GPU, by its data sheet.

    Attributes:
        name: what it is called.
        flops: operations a second in bfloat16, dense, with matrix units.
        float32: the same in float32, without matrix units.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        link: to the other GPUs of its machine, bytes a second each way.
        network: of one GPU to other machines, bytes a second each way.
        source: where the figures are from.
    """

    name: str
    flops: float = field(validator=gt(0.0))
    float32: float = field(validator=gt(0.0))
    memory: float = field(validator=gt(0.0))
    bandwidth: float = field(validator=gt(0.0))
    link: float = field(validator=gt(0.0))
    network: float = field(validator=gt(0.0))
    source: str = "given by hand"


DEVICES: Mapping[str, Device] = {
    "h100": Device(
        "h100", 989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9, "NVIDIA H100 data sheet (SXM5); DGX H100: 400 Gbit/s a GPU"
    ),
    "h200": Device(
        "h200", 989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9, "NVIDIA H200 data sheet (SXM); DGX H200: 400 Gbit/s a GPU"
    ),
    "a100": Device(
        "a100",
        312e12,
        19.5e12,
        80e9,
        2.039e12,
        300e9,
        25e9,
        "NVIDIA A100 data sheet (SXM4, 80 GB); DGX A100: 200 Gbit/s a GPU",
    ),
}


@frozen
class Assumptions:
    """What cannot be known from shapes and data sheets.

    Attributes:
        attained: share of a device's operations a second that the network gets. Large transformers reach 0.4 to 0.5
            (Narayanan et al. 2021; Chowdhery et al. 2022), small networks and convolutions less.
        link_attained: share of a link's bytes a second that collectives get.
        overlap: share of the time of the computation that communication can hide behind.
        reserve: share of a device's memory that cannot be used: CUDA's own, and what is lost between tensors.
        machine: GPUs a machine.
        disk: bytes a second that a checkpoint is written with.
    """

    attained: float = field(default=0.35, validator=and_(gt(0.0), le(1.0)))
    link_attained: float = field(default=0.7, validator=and_(gt(0.0), le(1.0)))
    overlap: float = field(default=0.5, validator=and_(ge(0.0), le(1.0)))
    reserve: float = field(default=0.1, validator=and_(ge(0.0), le(1.0)))
    machine: int = field(default=8, validator=ge(1))
    disk: float = field(default=2e9, validator=gt(0.0))


FIGURES = tuple(each.name for each in fields(Device) if each.name not in ("name", "source"))
ASSUMED = tuple(each.name for each in fields(Assumptions))
"""What can be given by hand: options of the command have the same names."""


@frozen
class Activations:
    """What is kept of a forward pass for the way back, in bytes; linear in the samples of a micro-batch.

    Attributes:
        fixed: whatever the samples: with bfloat16, the copies of the weights.
        sample: of each sample.
        checkpointed_fixed, checkpointed_sample: the same where blocks keep their inputs alone
            (``training.checkpoint_activations``); what is inside of the largest block counts, since it is computed
            again.
    """

    fixed: float
    sample: float
    checkpointed_fixed: float
    checkpointed_sample: float

    def of(self, samples: int, checkpointed: bool) -> int:
        """Bytes of a micro-batch."""
        fixed, each = (self.checkpointed_fixed, self.checkpointed_sample) if checkpointed else (self.fixed, self.sample)
        return max(0, round(fixed + each * samples))


@frozen
class Sizes:
    """Bytes of a model's parameters, as they are split.

    Attributes:
        units: for each unit that is gathered by itself, the last being all that is in no block: shape, bytes a value,
            and whether it is trained, of each parameter.
        buffers: tables, which every process has whole.
        checkpoint: a checkpoint's files, beside their heads of some kilobytes.
    """

    units: tuple[tuple[tuple[tuple[int, ...], int, bool], ...], ...]
    buffers: int
    checkpoint: int

    def share(self, processes: int, *, trained: bool = False) -> int:
        """The bytes that the first process has of what is split by rows, the most that any has."""
        return sum(self._unit(unit, processes, trained) for unit in self.units)

    def padded(self, unit: int, processes: int, *, trained: bool = False) -> int:
        """The bytes of a whole unit, as collectives carry it: each process's rows made as many as the first one's."""
        return processes * self._unit(self.units[unit], processes, trained)

    @staticmethod
    def _unit(unit: Sequence[tuple[tuple[int, ...], int, bool]], processes: int, trained: bool) -> int:
        return sum(
            -(-shape[0] // processes) * math.prod(shape[1:]) * size if shape else size
            for shape, size, learns in unit
            if learns or not trained
        )


@frozen
class Footprint:
    """Bytes that a GPU holds at the most.

    Attributes:
        weights, gradients, moments, average: what this process has of each.
        buckets: the second copy of the gradients that "ddp" sums over processes.
        gathered: what "fsdp" brings together: all that is in no block, two blocks (one is fetched ahead), and their
            gradients before they are summed.
        activations: of a micro-batch.
    """

    weights: int
    gradients: int
    buckets: int
    moments: int
    average: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@frozen
class Row:
    """A number of GPUs, and how the model is laid out on them.

    Attributes:
        gpus: how many.
        parallel: "ddp" or "fsdp"; of one GPU it says nothing.
        micro: samples that a GPU takes at once; 0 if the batch cannot be shared out.
        memory: bytes a GPU.
        fits: whether they are there.
        flops: operations a step and GPU.
        collectives: bytes a step that the collectives of one process carry, by kind, whole tensors.
        traffic: bytes a step that a GPU sends for that, in a ring.
        seconds: a step: of computing, of reading and writing weights, and of communication that is not hidden.
        hours: of ``training.steps``, with the time that checkpoints stop it.
        limit: what limits it: "batch", "memory", "compute", "weights" (their bandwidth) or "communication".
    """

    gpus: int
    parallel: Parallel
    micro: int
    memory: Footprint
    fits: bool
    flops: float
    collectives: dict[str, int]
    traffic: float
    seconds: dict[str, float]
    hours: float
    limit: str

    @property
    def step(self) -> float:
        """Seconds a step."""
        return sum(self.seconds.values())


@frozen
class Plan:
    """A training on several numbers of GPUs.

    Attributes:
        checkpoint: bytes of one.
        checkpoint_seconds: how long writing it takes; training waits for that where the model is not split.
    """

    device: Device
    assumptions: Assumptions
    training: TrainingConfig
    cost: ModelCost
    checkpoint: int
    checkpoint_seconds: float
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        rows = [
            {**asdict(row), "memory": {**asdict(row.memory), "total": row.memory.total}, "seconds_a_step": row.step}
            for row in self.rows
        ]
        training = {
            key: getattr(self.training, key)
            for key in ("steps", "batch_size", "accumulate", "precision", "checkpoint_activations", "checkpoint_every")
        }
        return {
            "device": asdict(self.device),
            "assumptions": asdict(self.assumptions),
            "training": training,
            "parameters": self.cost.parameters,
            "flops_a_sample": self.cost.training,
            "checkpoint": {"bytes": self.checkpoint, "seconds": self.checkpoint_seconds},
            "rows": rows,
        }


def plan_training(
    experiment: Experiment, gpus: Sequence[int], device: Device, assumptions: Assumptions | None = None
) -> Plan:
    """What an experiment's training takes on each number of GPUs, with either ``training.parallel``.

    Raises:
        ConfigError: if the model's parts do not fit together.
    """
    assumptions = assumptions or Assumptions()
    experiment = with_precision(experiment, device.flops > device.float32)
    model = build_model(experiment, weightless=True)
    cost, sizes = count_cost(experiment, model), sizes_of(model)
    kept = count_activations(experiment, model)
    checkpoint_seconds = sizes.checkpoint / assumptions.disk
    layouts = [(count, parallel) for count in gpus for parallel in get_args(Parallel) if count > 1 or parallel == "ddp"]
    rows = [
        _row(experiment.training, cost, sizes, kept, count, parallel, device, assumptions, checkpoint_seconds)
        for count, parallel in layouts
    ]
    return Plan(device, assumptions, experiment.training, cost, sizes.checkpoint, checkpoint_seconds, tuple(rows))


def sizes_of(model: MultimodalDiffusion) -> Sizes:
    """The sizes of a model, fresh from :func:`build_model`; it may be on the meta device."""
    blocks = model.backbone.repeated_blocks()
    taken = {id(weight) for block in blocks for weight in block.parameters()}
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    units = [*([*block.parameters()] for block in blocks), rest]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    moments = 2 * sum(map(_bytes, trained)) + 4 * len(trained)  # and of each how many steps it took, float32
    return Sizes(
        tuple(tuple((tuple(x.shape), x.element_size(), x.requires_grad) for x in unit) for unit in units),
        sum(map(_bytes, model.buffers())),
        2 * sum(map(_bytes, model.state_dict().values())) + moments,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- activations ------------------------------------------------------------------------------------------------------


class _Kept:
    """The storages that autograd keeps of a forward pass, and whose they are."""

    def __init__(self, model: nn.Module) -> None:
        self._block: int | None = None
        self._own = {id(x) for x in [*model.parameters(), *model.buffers()]}
        self._kept: dict[int | None, dict[int, Any]] = {None: {}}  # of each block, and of what is in none
        self._inputs: dict[int, Any] = {}  # of blocks; storages are held, so that none gets another's address

    def pack(self, x: Tensor) -> Tensor:
        base = x if x._base is None else x._base
        if id(base) not in self._own:
            storage = x.untyped_storage()
            self._kept.setdefault(self._block, {})[storage._cdata] = storage
        return x

    def enter(self, block: int, given: Sequence[Any]) -> None:
        self._block = block
        storages = [x.untyped_storage() for x in given if isinstance(x, Tensor)]
        self._inputs |= {storage._cdata: storage for storage in storages}

    def leave(self) -> None:
        self._block = None

    def bytes(self) -> tuple[int, int]:
        """Of all, and where blocks keep their inputs alone and one at a time is computed again."""
        every = {key: storage for part in self._kept.values() for key, storage in part.items()}
        stays = self._kept[None] | self._inputs
        again = [
            sum(storage.nbytes() for key, storage in part.items() if key not in stays)
            for block, part in self._kept.items()
            if block is not None
        ]
        return _total(every), _total(stays) + max(again, default=0)


def _total(storages: Mapping[int, Any]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def count_activations(experiment: Experiment, model: MultimodalDiffusion) -> Activations:
    """What a training keeps of a forward pass, counted in one that computes nothing: tensors have shapes alone.

    The backbone is left without weights. Attention counts as a kernel that keeps no matrix of weights, and autocast as
    it is on the CPU.
    """
    few, more = (_kept(experiment, model, samples) for samples in (2, 4))
    lines = []
    for small, large in zip(few, more, strict=True):
        each = (large - small) / 2
        lines += [small - 2 * each, each]
    return Activations(*lines)


def _kept(experiment: Experiment, model: MultimodalDiffusion, samples: int) -> tuple[int, int]:
    """Bytes kept, and with blocks that keep their inputs alone."""
    parts = {name: model.modality(name) for name in model.names}
    rest = MultimodalDiffusion(
        parts,
        Silent(model.backbone.features),
        model.process,
        model.law,
        epsilon_head=model.epsilon_head is not None,
    )
    halved = experiment.training.precision == "bfloat16"
    around = _Kept(rest)
    with (
        torch.random.fork_rng(devices=[]),
        saved_tensors_hooks(around.pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=halved),
    ):
        x = {name: part.placeholder(samples) for name, part in parts.items()}
        loss = composite_loss(rest, x, experiment.loss).total.mean()
    del loss
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            inside = _kept_by_backbone(model, model.backbone.to_empty(device="cpu"), samples, halved)
    except (NotImplementedError, RuntimeError):  # it looks at values
        inside = _kept_by_backbone(model, build_model(experiment).backbone, samples, halved)
    outside, _ = around.bytes()
    whole, again = inside.bytes()
    return outside + whole, outside + again


def _kept_by_backbone(model: MultimodalDiffusion, backbone: Backbone, samples: int, halved: bool) -> _Kept:
    kept = _Kept(backbone)
    with ExitStack() as stack:
        for number, block in enumerate(backbone.repeated_blocks()):
            for hook in (
                block.register_forward_pre_hook(lambda _, given, n=number: kept.enter(n, given)),
                block.register_forward_hook(lambda *_: kept.leave()),
            ):
                stack.callback(hook.remove)
        stack.enter_context(saved_tensors_hooks(kept.pack, lambda x: x))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=halved))
        backbone(*inputs_of(model, samples, torch.device("cpu")))
    return kept


# --- a row ------------------------------------------------------------------------------------------------------------


def footprint(cost: ModelCost, sizes: Sizes, activations: int, processes: int, parallel: Parallel) -> Footprint:
    """What the first of some processes holds, which is the most that any does."""
    if parallel == "ddp" or processes == 1:
        buckets = cost.gradients if processes > 1 else 0
        return Footprint(cost.weights, cost.gradients, buckets, cost.optimizer, cost.average, 0, activations)
    own, trained = sizes.share(processes), sizes.share(processes, trained=True)
    *blocks, rest = (
        (sizes.padded(i, processes), sizes.padded(i, processes, trained=True)) for i in range(len(sizes.units))
    )
    largest = max(blocks, default=(0, 0))
    gathered = sum(rest) + 2 * largest[0] + largest[1]
    return Footprint(own + sizes.buffers, trained, 0, 2 * trained, own + sizes.buffers, gathered, activations)


def collectives(cost: ModelCost, sizes: Sizes, processes: int, parallel: Parallel, accumulate: int) -> dict[str, int]:
    """Bytes that a step's collectives carry, as whole tensors, by kind; a few numbers beside them do not count."""
    if processes == 1:
        return {}
    if parallel == "ddp":
        return {"all_reduce": cost.gradients, "broadcast": sizes.buffers}
    every = range(len(sizes.units))
    blocks = sum(sizes.padded(i, processes) for i in every[:-1])
    return {
        "all_gather": accumulate * (2 * blocks + sizes.padded(every[-1], processes)),  # blocks on the way back, too
        "reduce_scatter": accumulate * sum(sizes.padded(i, processes, trained=True) for i in every),
    }


def _row(
    training: TrainingConfig,
    cost: ModelCost,
    sizes: Sizes,
    kept: Activations,
    gpus: int,
    parallel: Parallel,
    device: Device,
    assumed: Assumptions,
    checkpoint_seconds: float,
) -> Row:
    parts = gpus * training.accumulate
    micro = 0 if training.batch_size % parts else training.batch_size // parts
    again = training.checkpoint_activations
    held = footprint(cost, sizes, kept.of(micro, again), gpus, parallel)
    fits = held.total <= (1 - assumed.reserve) * device.memory
    flops = (cost.training + again * cost.evaluation) * training.batch_size / gpus
    carried = collectives(cost, sizes, gpus, parallel, training.accumulate)
    # A ring (Patarasuk & Yuan 2009): of n processes each sends all of a tensor but its own part, twice for a sum of
    # which all have the whole.
    traffic = sum((1 + (kind == "all_reduce")) * size * (gpus - 1) / gpus for kind, size in carried.items())
    # Between machines each GPU's part goes its own way, so that together they have all of the machine's network.
    rate = device.link if gpus <= assumed.machine else min(device.link, assumed.machine * device.network)
    peak = device.flops if training.precision == "bfloat16" else device.float32
    compute = flops / (peak * assumed.attained)
    seconds = {
        "compute": compute,
        "weights": PASSES * held.gradients / device.bandwidth,
        "communication": max(0.0, traffic / (rate * assumed.link_attained) - assumed.overlap * compute),
    }
    stops = training.steps // training.checkpoint_every if training.checkpoint_every else 1
    waits = stops * checkpoint_seconds if parallel == "ddp" else 0.0
    limit = "batch" if not micro else "memory" if not fits else max(seconds, key=lambda name: seconds[name])
    return Row(
        gpus=gpus,
        parallel=parallel,
        micro=micro,
        memory=held,
        fits=fits and micro > 0,
        flops=flops,
        collectives=carried,
        traffic=traffic,
        seconds=seconds,
        hours=(training.steps * sum(seconds.values()) + waits) / 3600,
        limit=limit,
    )


# --- for people -------------------------------------------------------------------------------------------------------


def device_of(name: str | None, given: Mapping[str, float | None]) -> Device:
    """A device by name, with figures given by hand in the place of its own.

    Raises:
        UserError: if there is no device of this name, or without a name a figure is missing or not above 0.
    """
    stated: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key, value in stated.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{key} {value:g}: expected a number above 0")
    if name is not None:
        if name not in DEVICES:
            raise UserError(f"--device {name}: expected one of {', '.join(DEVICES)}, or figures given by hand")
        known = DEVICES[name]
        by_hand = f"; {', '.join(stated)} given by hand" if stated else ""
        return evolve(known, source=known.source + by_hand, **stated)
    needed = ("flops", "memory", "bandwidth")
    if missing := [key for key in needed if key not in stated]:
        raise UserError(
            f"plan: --{missing[0]} is missing; without --device give --flops, --memory and --bandwidth (and --link and "
            "--network, if there are several GPUs)"
        )
    like = DEVICES["h100"]
    full = {"float32": stated["flops"], "link": like.link, "network": like.network, **stated}
    borrowed = [key for key in ("link", "network") if key not in stated]
    source = "given by hand" + (f", but {' and '.join(borrowed)} of the {like.name}" if borrowed else "")
    return evolve(like, name="given by hand", source=source, **full)


def assumptions_of(given: Mapping[str, float]) -> Assumptions:
    """What is assumed, with what is given by hand, by name.

    Raises:
        UserError: if a share is not one, or a number is not above 0.
    """
    for name, value in given.items():
        most = math.inf if name in ("machine", "disk") else 1.0
        least = name in ("overlap", "reserve")  # which may be 0
        if not ((value > 0 or (least and value == 0)) and (value <= most and value < math.inf)):
            share = f"a share {'of 0' if least else 'above 0'}, up to 1"
            expected = share if most == 1 else "a number above 0"
            raise UserError(f"--{name.replace('_', '-')} {value:g}: expected {expected}")
    return Assumptions(**given)  # type: ignore[arg-type]


def describe_plan(plan: Plan) -> Iterator[str]:
    """Lines for a terminal: what it is about, a table, what it rests on, and what to do."""
    training, device, assumed = plan.training, plan.device, plan.assumptions
    share = f"{training.batch_size:,} samples a step, {training.steps:,} steps, {training.precision}"
    again = ", activations computed again" if training.checkpoint_activations else ""
    yield f"{short(plan.cost.parameters)} parameters; {share}{again}; on {device.name} of {_bytes_told(device.memory)}"
    head = (
        "GPUs",
        "parallel",
        "samples",
        "memory a GPU",
        "FLOP a step",
        "sent a step",
        "time a step",
        "hours",
        "limit",
    )
    lines = [head, *(_cells(row) for row in plan.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    yield "samples: that a GPU takes at once; memory, FLOP and what is sent: of each GPU"
    for row in plan.rows:
        if row.limit == "memory":
            parts = {name: size for name, size in asdict(row.memory).items() if size}
            least = ", ".join(f"{name} {_bytes_told(size)}" for name, size in parts.items())
            yield f"{_gpus(row.gpus)}{f', {row.parallel}' * (row.gpus > 1)}: does not fit: {least}"
    yield from _advice(plan)
    every = f"every {training.checkpoint_every:,} steps" if training.checkpoint_every else "at the end"
    yield f"checkpoint: {_bytes_told(plan.checkpoint)}, {plan.checkpoint_seconds:.1f} s to write, {every}"
    peak = device.flops if training.precision == "bfloat16" else device.float32
    yield (
        f"assumed: {assumed.attained:.0%} of {short(peak, 'FLOP')}/s ({training.precision}); "
        f"{assumed.link_attained:.0%} of {_bytes_told(device.link)}/s to GPUs of a machine ({assumed.machine} of them) "
        f"and of {_bytes_told(device.network)}/s a GPU to others; communication hides behind {assumed.overlap:.0%} of "
        f"the computation; {assumed.reserve:.0%} of the memory stays free; {_bytes_told(assumed.disk)}/s to the disk"
    )
    yield f"device: {device.source}"
    yield (
        "not counted: the start of each kernel and collective, which limits steps of a few milliseconds; data that "
        "come too late; looks at held-out samples and samples on the way"
    )


def _advice(plan: Plan) -> Iterator[str]:
    """Which ``training.parallel`` to take for each number of GPUs, and what to change where none fits."""
    training = plan.training
    for gpus in dict.fromkeys(row.gpus for row in plan.rows):
        rows = [row for row in plan.rows if row.gpus == gpus]
        fitting = [row for row in rows if row.fits]
        told = f"{_gpus(gpus)}: "
        if fitting:
            yield told + (f'training.parallel = "{fitting[0].parallel}"' if gpus > 1 else "fits")  # "ddp" if it can be
        elif not rows[0].micro:
            parts = gpus * training.accumulate
            yield told + (
                f"training.batch_size = {training.batch_size:,} cannot be shared out; give a multiple of {parts:,}, or "
                "use fewer GPUs"
            )
        else:
            ways = [] if training.checkpoint_activations else ["training.checkpoint_activations = true"]
            ways += [] if training.precision == "bfloat16" else ['training.precision = "bfloat16"']
            ways += [f"training.accumulate above {training.accumulate}"] if rows[0].micro > 1 else []
            yield told + f"none fits; less memory: {', '.join([*ways, 'more GPUs with fsdp'])}"


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def _cells(row: Row) -> tuple[str, ...]:
    if not row.micro:
        return (str(row.gpus), row.parallel if row.gpus > 1 else "-", *"-" * 6, "batch")
    return (
        str(row.gpus),
        row.parallel if row.gpus > 1 else "-",
        f"{row.micro:,}",
        _bytes_told(row.memory.total),
        short(row.flops, "FLOP"),
        _bytes_told(row.traffic),
        f"{row.step * 1000:.3g} ms" if row.step < 1 else f"{row.step:.3g} s",
        f"{row.hours:.3g}",
        row.limit,
    )


def _bytes_told(number: float) -> str:
    """As data sheets have it: ``80 GB`` are 80e9."""
    return short(number, "B") if number >= 1000 else f"{number:.3g} B"
