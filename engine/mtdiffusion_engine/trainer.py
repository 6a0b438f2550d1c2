"""Training: one loop, on one process or many, that continues exactly where it was interrupted.

All randomness of a step is a function of the seed, the step and the rank, so the state to restore is the step itself.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from attrs import frozen
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mtdiffusion import LossTerms, LossWeights, MultimodalDiffusion, composite_loss
from mtdiffusion.process import terminal_warning
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.augmentation import Augmentation
from mtdiffusion_engine.checks import check_held_out
from mtdiffusion_engine.data import Batch, StepSampler, derive_seed, load_data, training_batches
from mtdiffusion_engine.environment import ignored_variables, without_training_variables
from mtdiffusion_engine.experiment import (
    PLUGINS_FILE,
    Changes,
    Experiment,
    TrainingConfig,
    build_model,
    choose_device,
    origins,
    require_resumable,
    resolved,
    with_absolute_paths,
)
from mtdiffusion_engine.interrupt import Terminated, deferred_interrupt
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import dump_toml, load_toml


class Diverged(UserError):
    """The loss or its gradient is no longer finite."""


class Objective(nn.Module):
    """The composite loss as a module, so that distributed wrappers see one forward with every parameter in it."""

    def __init__(self, model: MultimodalDiffusion, weights: LossWeights) -> None:
        super().__init__()
        self.model = model
        self.weights = weights

    def forward(self, batch: Batch, visible: Tensor, generator: torch.Generator) -> LossTerms:
        return composite_loss(
            self.model, batch.x, self.weights, visible=visible, presence=batch.presence, generator=generator
        )


@frozen
class Progress:
    """What a step has to tell.

    Attributes:
        step: steps done.
        means: loss terms by name, each the mean over all that was trained since the last report.
        learning_rate: of this step.
        norm: the gradient's norm before clipping.
        seconds: since the start of this process's training.
    """

    step: int
    means: dict[str, float]
    learning_rate: float
    norm: float
    seconds: float


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, then half a cosine to zero; of step 0, 1, ..."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights, warmed up: decay min(decay, (1 + n)/(10 + n)) at update n."""

    @torch.no_grad()
    def update(average: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        n = float(count)
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update)  # type: ignore[arg-type]


class Trainer:
    """Trains an experiment into a run folder.

    It sets torch to flush denormal numbers to zero on the CPU, in this thread and all that it starts.

    Args:
        run: the folder; made if need be.
        resume: continue the run in the folder from its newest checkpoint, with what the configuration changes of it as
            far as a run can be resumed so (:func:`require_resumable`).
        init_from: a run whose averaged weights, of its newest checkpoint, a new run starts from.
        evaluated: whether the run is to be evaluated as its configuration says: what that needs is looked through, too.
        on_message: told what a person should know, a sentence at a time (main process only).

    Raises:
        UserError: if the folder exists and is not to be resumed, or holds another experiment, or if the data or the
            weights to start from do not fit the model. Nothing is written then.
    """

    def __init__(
        self,
        experiment: Experiment,
        run: Path,
        registry: Registry,
        *,
        resume: bool = False,
        init_from: Path | None = None,
        evaluated: bool = True,
        device: str | None = None,
        on_message: Callable[[str], None] = print,
    ) -> None:
        # The gradients of a network that knows its data by heart are full of denormals, with which the CPU computes
        # many times as slowly. Threads inherit the setting, so it comes before the first tensor.
        torch.set_flush_denormal(True)
        experiment = with_absolute_paths(experiment)  # so that the run can be used from anywhere
        self.experiment = experiment
        self.config = experiment.training
        self.run = run
        with without_training_variables():
            self.accelerator = Accelerator(cpu=choose_device(device).type == "cpu", mixed_precision="no")
        changed: Changes = {}
        if resume:
            if not (run / "config.toml").is_file():
                raise UserError(f"{run}: nothing to resume here (it has no config.toml)")
            for newest in ckpt.list_checkpoints(run)[-1:]:
                ckpt.load_state(newest)  # says so if another version made it
            changed = require_resumable(experiment, run, registry)
        elif self.main:
            ckpt.require_free(run)
        self.model = build_model(experiment)
        self._origin = None if resume or init_from is None else self._initialise(init_from)
        self.data = load_data(experiment, self.model, "train")
        self.augmentation = Augmentation.of(experiment.augmentation, self.data.modalities)
        self.data.verify()  # what does not fit is said before anything is written
        self.step = 0
        self._saved = -1
        held_out = check_held_out(experiment, self.model) if evaluated else []
        warnings = [*held_out, *ignored_variables(self.config, os.environ)]
        messages = [f"warning: {said}" for said in warnings]
        if warning := terminal_warning(self.model.process):
            messages.append(f"warning: {warning}")
        self.model.to(self.accelerator.device)
        self.ema = averaged(self.model, self.config.ema).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.config.learning_rate,
            betas=(0.9, self.config.beta2),
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        if resume and (checkpoints := ckpt.list_checkpoints(run)):
            messages += self._resume(checkpoints[-1])
        if changed:
            keys = (f"{key} from {old} to {new}" for key, (old, new) in changed.items())
            messages.append(f"changed since the last session: {'; '.join(keys)}")
        self.resolved = resolved(experiment, registry)
        with without_training_variables():
            self.objective = self.accelerator.prepare_model(Objective(self.model, experiment.loss))
        self._made = None if resume or not self.main else not run.exists()
        if self.main:
            for message in messages:
                on_message(message)
            self._write_configuration(registry)

    def _write_configuration(self, registry: Registry) -> None:
        try:
            ckpt.write_json(self.run / PLUGINS_FILE, origins(self.experiment, registry))
            dump_toml(self.resolved, self.run / "config.toml")
            if self._origin:
                self.save()  # otherwise a run resumed before its first checkpoint would start from other weights
        except BaseException:
            self.discard()
            raise

    def discard(self) -> bool:
        """Undo a new run that has not made a step yet: its folder is as it was before. Says whether there was one."""
        if self._made is None or self.step:
            return False
        for name in ("config.toml", PLUGINS_FILE):
            (self.run / name).unlink(missing_ok=True)
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(self.run / name, ignore_errors=True)
        if self._made:
            with suppress(OSError):  # someone has put something there
                self.run.rmdir()
        return True

    def _initialise(self, source: Path) -> dict[str, str]:
        """Load another run's averaged weights; what to remember of where they come from."""
        folder = ckpt.require_run(source)
        found = {name: table["kind"] for name, table in load_toml(source / "config.toml")["modalities"].items()}
        expected = {name: config.kind for name, config in self.experiment.modalities.items()}
        if list(found.items()) != list(expected.items()):  # their order is that of the channels
            shown = (", ".join(f"{name} ({kind})" for name, kind in each.items()) for each in (found, expected))
            raise UserError(
                f"{source}: its weights do not fit this configuration: its modalities are {next(shown)}, expected "
                f"{next(shown)}. Start from a run with the same modalities, or without --init-from"
            )
        tensors = ckpt.load_tensors(folder / "ema.safetensors")
        if misfit := ckpt.misfits(self.model, tensors):
            raise UserError(
                f"{folder}: these weights do not fit this configuration ({misfit}). Start from a run with the same "
                "modalities, latent and backbone, or without --init-from"
            )
        ckpt.load_weights(self.model, folder / "ema.safetensors")
        return {"run": str(source.absolute()), "checkpoint": folder.name}

    def _resume(self, folder: Path) -> list[str]:
        """Load a checkpoint; what to tell of it."""
        ckpt.load_weights(self.model, folder / "model.safetensors")
        ckpt.load_weights(self.ema.module, folder / "ema.safetensors")
        ckpt.load_optimizer(self.optimizer, folder / "optimizer.safetensors")
        state = ckpt.load_state(folder)
        self.step = self._saved = int(state["step"])
        if self.config.steps < self.step:
            raise UserError(
                f"training.steps = {self.config.steps}: {self.run} has {self.step} steps already; give that number or "
                "more"
            )
        self.ema.n_averaged.fill_(int(state["ema_updates"]))
        self._origin = state.get("init_from")
        said = []
        now = {"processes": self.accelerator.num_processes, "samples": len(self.data)}
        what = {"processes": "number of processes", "samples": "number of training samples"}
        for key, count in now.items():
            if state.get(key, count) != count:
                said.append(
                    f"the {what[key]} is {count}, at the last checkpoint it was {state[key]}: from here on other "
                    "samples come next than if it had stayed"
                )
        return said

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and talks."""
        return bool(self.accelerator.is_main_process)

    @property
    def averaged_model(self) -> MultimodalDiffusion:
        """The model with averaged weights, which is for sampling."""
        return self.ema.module  # type: ignore[return-value]

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one (main process only)."""
        if not self.main or self._saved == self.step:
            return
        ckpt.save_checkpoint(
            self.run,
            self.step,
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict(),
            optimizer=self.optimizer,
            # Data order and noise are functions of the seed and the step: with them the state is whole.
            state={
                "ema_updates": int(self.ema.n_averaged),
                "seed": self.config.seed,
                "processes": self.accelerator.num_processes,
                "samples": len(self.data),
                "experiment": self.resolved,
                **({"init_from": self._origin} if self._origin else {}),
            },
            keep=self.config.keep,
        )
        self._saved = self.step

    def train(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        on_sample: Callable[[int], None] | None = None,
        stop_at: int | None = None,
    ) -> None:
        """Train to the configured number of steps, or to ``stop_at``; a checkpoint is written at the end.

        Args:
            on_progress: called every ``training.log_every`` steps and at the end (main process only).
            on_sample: called with the step every ``training.sample_every`` steps, to show what the model does by then.

        Raises:
            Diverged: if the loss is no longer finite; the last checkpoint from which one can go on stays.
            KeyboardInterrupt: after Ctrl-C, once the step under way is done and a checkpoint is written; after SIGTERM
                it is a :class:`Terminated`.
        """
        stop = min(self.config.steps, stop_at or self.config.steps)
        started = time.monotonic()
        batches = self.batches(stop)
        told = Means(self.accelerator)
        self.model.train()
        with deferred_interrupt() as interrupted:
            while self.step < stop:
                try:
                    rate, norm = self.advance(batches, told)
                except RuntimeError:
                    if not (reason := interrupted()):
                        raise
                    # A signal to the whole group ended the workers: without them this step cannot be, the last one can.
                    self.save()
                    raise reason from None
                if self.step % self.config.log_every == 0 or self.step == stop:
                    means = told.take()
                    if on_progress and self.main:
                        on_progress(Progress(self.step, means, rate, norm, time.monotonic() - started))
                if on_sample and self.main and _due(self.step, self.config.sample_every):
                    on_sample(self.step)
                reason = self._agree(interrupted())
                if reason or self.step == stop or _due(self.step, self.config.checkpoint_every):
                    self.save()
                if reason:
                    raise reason

    def _agree(self, reason: type[KeyboardInterrupt] | None) -> type[KeyboardInterrupt] | None:
        """Why to stop after this step, if any process is to: one that stopped alone would leave the others waiting."""
        if self.accelerator.num_processes == 1:
            return reason
        kinds = (Terminated, KeyboardInterrupt)
        votes = torch.tensor([float(reason is kind) for kind in kinds], device=self.accelerator.device)
        votes = self.accelerator.reduce(votes, "sum")
        return next((kind for kind, vote in zip(kinds, votes.tolist(), strict=True) if vote), None)

    def batches(self, stop: int) -> Iterator[Batch]:
        """This process's micro-batches from the present step up to another, in their order."""
        micro, accelerator = self.config.accumulate, self.accelerator
        sampler = StepSampler(
            len(self.data),
            self.config.batch_size,
            self.config.seed,
            self.step * micro,
            stop * micro,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return training_batches(self.data, sampler, self.config.workers, self.augmentation)

    def advance(self, batches: Iterator[Batch], told: Means) -> tuple[float, float]:
        """One optimizer step; its loss terms go to ``told``.

        Returns:
            The learning rate and the gradient's norm before clipping.

        Raises:
            Diverged: if one of the two, loss and norm, is not finite.
        """
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        micro, device = self.config.accumulate, self.accelerator.device
        for part in range(micro):
            generator = self._generator(part)
            batch: Batch = next(batches)
            visible = self._draw_visible(batch, generator)
            sync = part == micro - 1
            gradients = nullcontext() if sync else self.accelerator.no_sync(self.objective)
            with gradients:
                with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                    terms: LossTerms = self.objective(batch.to(device), visible, generator)
                told.add(terms)
                loss = terms.total.mean() / micro
                self._require_finite("loss", loss.item())
                self.accelerator.backward(loss)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        self._require_finite("norm of its gradient", norm)
        self.optimizer.step()
        self.step += 1
        self.ema.update_parameters(self.model)
        return rate, norm

    def _require_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        message = f"training diverged: the {what} is {value} at step {self.step + 1}. "
        if self.step and self._saved == self.step:
            # The next step's samples and noise follow from the seed and the step: it would fail like this each time.
            if self.main:
                ckpt.set_aside(self.run / "checkpoints" / ckpt.name_of(self.step))
            message += f"Its checkpoint of step {self.step} leads nowhere else and is none any more (*{ckpt.ASIDE}). "
        elif self.step == 0 and self._origin:
            raise Diverged(
                f"{message}It started from {self._origin['run']}, whose weights do not suit these data: check the "
                "data, or start a new run without --init-from."
            )
        kept = ckpt.list_checkpoints(self.run)
        message += f"There is a checkpoint of step {ckpt.step_of(kept[-1])}. " if kept else "There is no checkpoint. "
        lower = ckpt.resume_command(self.run, f"training.learning_rate={self.config.learning_rate / 10:g}")
        raise Diverged(
            f"{message}Go {'on from it' if kept else 'back to the start'} with a lower learning rate: {lower} (or a "
            "lower training.clip); if that does not help, check the data."
        )

    def _generator(self, part: int) -> torch.Generator:
        seed = derive_seed(self.config.seed, self.step, part, self.accelerator.process_index)
        torch.manual_seed(seed)  # dropout draws from the global generator
        return torch.Generator().manual_seed(seed)

    def _draw_visible(self, batch: Batch, generator: torch.Generator) -> Tensor:
        latent = self.model.layout.latent
        visible = self.experiment.conditioning.draw(
            self.model.names, self.model.spatial, len(batch.presence), (latent.height, latent.width), generator
        )
        return visible.to(self.accelerator.device)


class Means:
    """Loss terms, averaged over all processes and all that was trained since they were taken last."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: LossTerms) -> None:
        for name, pair in terms.sums().items():
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self) -> dict[str, float]:
        """Means by name; those of which nothing was counted are left out."""
        table = self._accelerator.reduce(torch.stack(list(self._sums.values())), "sum").tolist()
        means = {name: total / count for name, (total, count) in zip(self._sums, table, strict=True) if count > 0}
        self._sums.clear()
        return means


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
