"""A training loop for methods that are not the framework's own model, at the joint model's budget.

Optimiser, learning rate, data order and averaging are the trainer's, and so is its rule: all randomness of a step is a
function of the seed and the step, so that an interrupted training continues exactly.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtdiffusion_benchmarks.interfaces import Cost, Curve, Diverged, Problem
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.augmentation import Augmentation
from mtdiffusion_engine.data import Batch, StepSampler, derive_seed, training_batches
from mtdiffusion_engine.experiment import TrainingConfig, require_same, resolved
from mtdiffusion_engine.interrupt import deferred_interrupt
from mtdiffusion_engine.optimisation import Average, learning_rate, optimizer_of
from mtdiffusion_registry import MethodConfig, UserError
from mtdiffusion_registry.config import dump_toml
from mtdiffusion_registry.pace import SELDOM, Pace

CHECKPOINT_EVERY = 200
"""Steps between checkpoints at most; fewer if ``training.checkpoint_every`` says so."""

M = TypeVar("M", bound=nn.Module)
Loss = Callable[[M, Batch, torch.Generator], Mapping[str, Tensor]]


@attrs.define(eq=False)
class _State:
    """All that an interrupted training needs."""

    module: nn.Module
    ema: Average[nn.Module]
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    flops: int = 0
    curve: Curve = attrs.Factory(Curve)

    def save(self, folder: Path, keep: int, method: Mapping[str, Any]) -> None:
        state = {
            "method": method,
            "ema_updates": self.ema.updates,
            "train_seconds": self.seconds,
            "flops_per_step": self.flops,
            "curve": self.curve.points,
        }
        model, ema = self.module.state_dict(), self.ema.module.state_dict()
        ckpt.save_checkpoint(folder, self.step, model=model, ema=ema, optimizer=self.optimizer, state=state, keep=keep)

    def load(self, checkpoint: Path, method: Mapping[str, Any]) -> None:
        state = ckpt.load_state(checkpoint)
        if state.get("method") != method:
            raise UserError(
                f"{checkpoint}: of another method ({state.get('method')}, asked for {method}); remove the folder or "
                "give another"
            )
        ckpt.load_weights(self.module, checkpoint / "model.safetensors")
        ckpt.load_weights(self.ema.module, checkpoint / "ema.safetensors")
        ckpt.load_optimizer(self.optimizer, checkpoint / "optimizer.safetensors")
        self.ema.updates = int(state["ema_updates"])
        self.step, self.seconds = int(state["step"]), float(state["train_seconds"])
        self.flops = int(state["flops_per_step"])
        self.curve = Curve(state["curve"])


def fit_module(
    problem: Problem, method: MethodConfig, module: M, loss: Loss[M]
) -> tuple[M, Cost, list[dict[str, float]]]:
    """Train a module at the problem's budget, or go on where it was interrupted; a finished folder is only loaded.

    The budget is ``experiment.training`` as the joint model has it: steps, batch size, accumulation, optimizer, rate,
    clipping, precision, EMA and seed. Checkpoints (:mod:`mtdiffusion_engine.checkpoint`) go to
    ``problem.folder``, each written whole or not at all.

    Args:
        method: whose training it is; a folder that holds another's is refused.
        module: freshly initialised; trained in place.
        loss: of a micro-batch on the module's device: scalars by name, ``"loss"`` being minimised. It draws from the
            generator it is given, which lives on the CPU, and from no other but for dropout.

    Returns:
        The module with averaged weights, in evaluation mode; what it cost, ``train_seconds`` summed over interruptions
        (steps that were lost and done again count once); and the learning curve, with ``"seconds"`` so far.

    Raises:
        UserError: if the folder holds another training, or a damaged one.
        Diverged: if the loss or its gradient is not finite; the last checkpoint stays.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step under way is done and a checkpoint is written.
    """
    config, folder = problem.experiment.training, problem.folder
    device = torch.device(problem.device)
    module.to(device).train()
    state = _State(module, Average(module, config.ema), optimizer_of(module, config))
    identity = {"kind": method.kind, **_plain(attrs.asdict(method))}
    if checkpoints := ckpt.list_checkpoints(folder):
        require_same(problem.experiment, folder, problem.registry)
        state.load(checkpoints[-1], identity)
    else:
        dump_toml(resolved(problem.experiment, problem.registry), folder / "config.toml")
        state.flops = count_flops(problem, module, loss)
    if state.step < config.steps:
        _train(problem, identity, module, loss, state)
    cost = Cost(
        steps=config.steps,
        batch_size=config.batch_size,
        parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        train_seconds=state.seconds,
        flops_per_step=state.flops,
    )
    return state.ema.module, cost, state.curve.points  # type: ignore[return-value]


def _train(problem: Problem, method: Mapping[str, Any], module: M, loss: Loss[M], state: _State) -> None:
    config, folder, device = problem.experiment.training, problem.folder, torch.device(problem.device)
    every = min(config.checkpoint_every or CHECKPOINT_EVERY, CHECKPOINT_EVERY)
    size = len(problem.train)
    sampler = StepSampler(size, config.batch_size, config.seed, state.step, config.steps, config.accumulate)
    augmentation = Augmentation.of(problem.experiment.augmentation, problem.train.modalities)  # as the trainer's
    batches = training_batches(problem.train, sampler, config.workers, augmentation)
    started = time.monotonic() - state.seconds
    pace = Pace(f"{folder.name}: training", config.steps, problem.say, before=state.step, every=SELDOM)
    with _own_randomness(device), deferred_interrupt() as interrupted:
        while state.step < config.steps:
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(config, state.step)
            state.optimizer.zero_grad(set_to_none=True)
            terms = _gradient(problem, module, loss, batches, state.step)
            norm = float(nn.utils.clip_grad_norm_(module.parameters(), config.clip))
            _require_finite(problem, "norm of its gradient", norm, state.step)
            state.optimizer.step()
            state.step += 1
            state.ema.update(module)
            state.seconds = time.monotonic() - started
            pace.tell(state.step)
            last = state.step == config.steps
            if last or state.step % config.log_every == 0:
                values = {name: value.item() for name, value in terms.items()}
                state.curve.add(state.step, seconds=state.seconds, **values)
            stop = interrupted()
            if last or stop or state.step % every == 0:
                state.save(folder, config.keep, method)
            if stop:
                raise stop


def _gradient(problem: Problem, module: M, loss: Loss[M], batches: Iterator[Batch], step: int) -> Mapping[str, Tensor]:
    """The gradient of one step, summed over its micro-batches; the loss's terms of the last."""
    config, device = problem.experiment.training, torch.device(problem.device)
    for part in range(config.accumulate):
        seed = derive_seed(config.seed, step, part, 0)
        torch.manual_seed(seed)  # dropout draws from the global generator
        with _precision(config, device):
            terms = loss(module, problem.train.values(next(batches).to(device)), torch.Generator().manual_seed(seed))
        mean = terms["loss"] / config.accumulate
        _require_finite(problem, "loss", mean.item(), step)
        mean.backward()  # type: ignore[no-untyped-call]
    return terms


def count_flops(problem: Problem, module: M, loss: Loss[M]) -> int:
    """Floating-point operations of one training step, forward and backward, counted on a copy and a real batch.

    Neither the module nor any generator of the caller's changes.
    """
    config, device = problem.experiment.training, torch.device(problem.device)
    clone = copy.deepcopy(module)
    batch = problem.train.batch([i % len(problem.train) for i in range(config.batch_size)]).to(device)
    with _own_randomness(device), FlopCounterMode(display=False) as counter:
        with _precision(config, device):
            terms = loss(clone, batch, torch.Generator().manual_seed(0))
        terms["loss"].backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops()


def _own_randomness(device: torch.device) -> AbstractContextManager[None]:
    """The global generators of the CPU and of the device as they were, afterwards."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    return torch.random.fork_rng(devices)


def _precision(config: TrainingConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def _require_finite(problem: Problem, what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise Diverged(
            f"training diverged: the {what} is {value} at step {step + 1}. The last checkpoint stays in "
            f"{problem.folder}. Lower training.learning_rate or training.clip, or check the data."
        )


def _plain(value: Any) -> Any:
    """A config's values as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
