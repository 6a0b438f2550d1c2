"""What a model costs, known from its shapes before it is trained: parameters, operations, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtdiffusion import Backbone, Features, FeatureSpec, MultimodalDiffusion, composite_loss
from mtdiffusion_engine.experiment import Experiment, TrainingConfig, build_model
from mtdiffusion_engine.muon import hidden_matrices


@frozen
class ModelCost:
    """Parameters are counted, operations are floating-point operations, memory is in bytes.

    Attributes:
        backbone: its parameters.
        modalities: parameters of each modality's encoder and head, by name.
        epsilon_head: its parameters; 0 without one.
        evaluation: operations of one evaluation of the network for one sample.
        training: operations that one sample takes in one training step, forward and backward.
        weights: parameters and tables (buffers).
        gradients: of what is trained.
        optimizer: what it keeps of what is trained: two moments (AdamW) or one (Muon, of its matrices).
        average: the averaged weights.
        latent: one sample's.
    """

    backbone: int
    modalities: dict[str, int]
    epsilon_head: int
    evaluation: int
    training: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    latent: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.backbone + sum(self.modalities.values()) + self.epsilon_head

    @property
    def memory(self) -> int:
        """What a training holds all the time: all but activations and batches."""
        return self.weights + self.gradients + self.optimizer + self.average


class Silent(Backbone):
    """Features of zeros, of the shapes of a backbone's."""

    def __init__(self, features: FeatureSpec) -> None:
        super().__init__()
        self.features = features

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        of, batch = self.features, len(z)
        return Features(
            z.new_zeros(batch, of.channels, of.height, of.width).requires_grad_(),
            z.new_zeros(batch, of.vector).requires_grad_(),
        )


def count_cost(experiment: Experiment, model: MultimodalDiffusion) -> ModelCost:
    """The cost of an experiment's model, fresh from :func:`build_model`.

    Operations are those of matrix products, convolutions and attention, a multiplication and an addition being two
    (``torch.utils.flop_counter``). The backbone runs where it is, which may be the meta device, all else on the CPU.
    """
    size = sum(map(_bytes, [*model.parameters(), *model.buffers()]))
    trained = sum(_bytes(weight) for weight in model.parameters() if weight.requires_grad)
    once = sum(map(_bytes, hidden_matrices(model))) if experiment.training.optimizer == "muon" else 0
    with torch.random.fork_rng(devices=[]):
        evaluation, training = _operations(experiment, model)
    return ModelCost(
        backbone=_count(model.backbone),
        modalities={name: _count(model.modality(name)) for name in model.names},
        epsilon_head=0 if model.epsilon_head is None else _count(model.epsilon_head),
        evaluation=evaluation,
        training=training,
        weights=size,
        gradients=trained,
        optimizer=2 * trained - once,
        average=size,
        latent=model.layout.latent.numel * torch.get_default_dtype().itemsize,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _operations(experiment: Experiment, model: MultimodalDiffusion) -> tuple[int, int]:
    """Of an evaluation and of training, for one sample: the backbone's by itself, and those of all else around it."""
    parts = {name: model.modality(name) for name in model.names}
    epsilon_head = model.epsilon_head is not None
    rest = MultimodalDiffusion(
        parts, Silent(model.backbone.features), model.process, model.law, epsilon_head=epsilon_head
    )
    x = {name: part.placeholder(1) for name, part in parts.items()}
    clocks = torch.full((1, len(parts), 1, 1), max(1, model.process.steps // 2))
    try:
        evaluation, training = _backbone_operations(model, model.backbone)
    except (NotImplementedError, RuntimeError):
        if _device(model.backbone).type != "meta":
            raise
        evaluation, training = _backbone_operations(model, build_model(experiment).backbone)  # with weights, then
    with _counter() as counter:
        torch.autograd.backward(composite_loss(rest, x, experiment.loss).total.sum())
        training += counter.get_total_flops()
    with _counter() as counter, torch.no_grad():
        rest(model.noise(1), clocks)
        evaluation += counter.get_total_flops()
    model.zero_grad(set_to_none=True)
    return evaluation, training


def inputs_of(model: MultimodalDiffusion, samples: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a model's backbone is given of some samples: values of no meaning, and gradients where training has some."""
    parts = [model.modality(name) for name in model.names]
    # Gradients flow on through the backbone to what is learned of the codes.
    learned = any(weight.requires_grad for part in parts for weight in part.encoder.parameters())
    readout = sum(part.encoder.readout_dim for part in parts)
    channels, width = model.layout.inputs(readout)
    latent = model.layout.latent
    return (
        torch.zeros(samples, channels, latent.height, latent.width, device=device, requires_grad=learned),
        torch.full((samples,), 0.5, device=device),
        torch.zeros(samples, width, device=device, requires_grad=learned),
    )


def _backbone_operations(model: MultimodalDiffusion, backbone: Backbone) -> tuple[int, int]:
    inputs = inputs_of(model, 1, _device(backbone))
    with _counter() as counter:
        h = backbone(*inputs)
        evaluation = counter.get_total_flops()
        torch.autograd.backward([h.map, h.vector], [torch.ones_like(h.map), torch.ones_like(h.vector)])
        return evaluation, counter.get_total_flops()


def _device(module: nn.Module) -> torch.device:
    return next((weight.device for weight in module.parameters()), torch.device("cpu"))


@contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    """Counts operations; attention as the matrix products that it stands for."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def describe_cost(cost: ModelCost, config: TrainingConfig) -> Iterator[str]:
    """A few aligned lines for a terminal."""
    parts = {"backbone": cost.backbone, **cost.modalities}
    if cost.epsilon_head:
        parts["ε head"] = cost.epsilon_head
    memory = {
        "weights": cost.weights,
        "gradients": cost.gradients,
        "optimizer": cost.optimizer,
        "averaged weights": cost.average,
    }
    step, each = (short(count * cost.training, "FLOP") for count in (config.batch_size, 1))
    yield f"  parameters     {short(cost.parameters)}: {_listed(parts, short)}"
    yield f"  evaluation     {short(cost.evaluation, 'FLOP')} a sample, each time that the network is asked"
    yield f"  training step  {step}: {config.batch_size:,} samples, {each} a sample"
    yield f"  memory         {_size(cost.memory)} in training, beside the activations of a batch:"
    yield f"                 {_listed(memory, _size)}"
    yield f"  latent         {_size(cost.latent)} a sample"


def _listed(parts: Mapping[str, int], shown: Callable[[float], str]) -> str:
    return ", ".join(f"{name} {shown(number)}" for name, number in parts.items())


def short(number: float, unit: str = "") -> str:
    """Three digits: ``12.3 M``, or ``12.3 MFLOP``."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = min(int(f"{number:.2e}".partition("e")[2]) // 3, len(prefixes) - 1)  # after rounding
    return f"{number / 1000**power:.3g} {prefixes[power]}{unit}".rstrip()


def _size(number: float) -> str:
    """Bytes, as one reads them: ``1.25 KiB``."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    power = min(max(round(number).bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{number / 1024**power:.4g} {units[power]}"
