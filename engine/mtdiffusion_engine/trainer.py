"""Training: one loop, on one process or many, that continues exactly where it was interrupted.

All randomness of a step is a function of the seed, the step and the place of each sample in its batch, so the state to
restore is the step itself, and the number of processes and of micro-batches, and whether the model is split over the
processes, change nothing but the order of sums (dropout apart, which draws where it runs). Between reports the training
process never waits for the device.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from attrs import frozen
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from mtdiffusion import Backbone, Draws, LossWeights, MultimodalDiffusion, composite_loss
from mtdiffusion.precision import to_device
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.augmentation import Augmentation
from mtdiffusion_engine.chance import StepChance
from mtdiffusion_engine.checks import check_held_out, check_training, doubts_of
from mtdiffusion_engine.data import (
    Batch,
    ModalityData,
    StepSampler,
    derive_seed,
    load_data,
    load_watched,
    made_ahead,
    training_batches,
    values_of,
)
from mtdiffusion_engine.environment import (
    choose_device,
    ignored_variables,
    left_alone,
    native_bfloat16,
    without_training_variables,
)
from mtdiffusion_engine.experiment import (
    PLUGINS_FILE,
    Changes,
    Experiment,
    build_model,
    load_experiment,
    origins,
    require_resumable,
    resolved,
    with_absolute_paths,
    with_precision,
)
from mtdiffusion_engine.hanging import HangWatch
from mtdiffusion_engine.interrupt import Terminated, deferred_interrupt
from mtdiffusion_engine.locating import locate
from mtdiffusion_engine.optimisation import (
    Average,
    clip_gradient,
    learning_rate,
    optimizer_of,
    own_part,
    step_if_finite,
)
from mtdiffusion_engine.tally import Tally
from mtdiffusion_engine.watching import HeldOutLoss
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import dump_toml, load_toml

PATIENCE = 10
"""Steps in a row whose gradient is not finite, after which a training is given up."""
VOTE_EVERY = 16
"""Steps between the votes of several GPUs on whether to stop: a vote waits for the device."""


class Diverged(UserError):
    """The gradient is no longer finite."""


class Objective(nn.Module):
    """The composite loss as a module, so that distributed wrappers see one forward with every parameter in it.

    x may be what is stored of it (:func:`values_of`). It returns the mean loss ``[]`` and, for a log, sums and counts
    by name (:meth:`LossTerms.sums`). Or, for ``each`` sample, the loss ``[B]``, and codes and terms by name
    ``[B, ...]``.
    """

    def __init__(self, model: MultimodalDiffusion, weights: LossWeights) -> None:
        super().__init__()
        self.model = model
        self.weights = weights

    def forward(
        self, x: Mapping[str, Tensor], presence: Tensor, visible: Tensor, draws: Draws, each: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x = values_of(self.model.modalities, x)  # type: ignore[arg-type]  # it holds modalities
        terms = composite_loss(self.model, x, self.weights, visible=visible, presence=presence, draws=draws)
        if each:
            codes = {f"the code of {name}": code for name, code in self.model.encode(x).items()}
            return terms.total, codes | terms.each()
        return terms.total.mean(), terms.sums()


@frozen
class Progress:
    """What a step has to tell.

    Attributes:
        step: steps done.
        means: loss terms by name, each the mean over all that was trained since the last report and was finite.
        learning_rate: of this step.
        norm: the gradient's norm before clipping.
        skipped: how many of the steps since the last report were left out, their gradient not being finite.
        seconds: since the start of this process's training.
        held_out: loss terms of held-out samples by the averaged weights, if they were looked at.
        where: of the last of the steps that were left out, what of which samples is not finite.
    """

    step: int
    means: dict[str, float]
    learning_rate: float
    norm: float
    skipped: int
    seconds: float
    held_out: dict[str, float] | None = None
    where: str = ""


class Trainer:
    """Trains an experiment into a run folder.

    It sets torch to flush denormal numbers to zero on the CPU, in this thread and all that it starts.

    Of a sharded training (``training.parallel = "fsdp"``, several processes) each process has a part of the model.

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
        self.config = experiment.training
        self.run = run
        self.accelerator = self._accelerator(device)
        self._hang = HangWatch(
            self.accelerator.process_index, self.accelerator.num_processes, self.config.timeout, self._remedy
        )
        if absent := set(self.config.trackers) - {str(tracker) for tracker in self.accelerator.log_with}:
            name = min(absent)
            raise UserError(f"training.trackers: {name} is not installed; run: pip install {name.replace('_', '-')}")
        changed: Changes = {}
        if resume:
            if not (run / "config.toml").is_file():
                raise UserError(f"{run}: nothing to resume here (it has no config.toml)")
            for newest in ckpt.list_checkpoints(run)[-1:]:
                ckpt.load_state(newest)  # says so if another version made it
            changed = require_resumable(experiment, run, registry)
            stored = load_experiment(run / "config.toml", [], registry)
            experiment = with_precision(experiment, stored.training.precision == "bfloat16")
        elif self.main:
            ckpt.remove_unmade(run)
            ckpt.require_no_run(run)
        experiment = with_precision(experiment, native_bfloat16(self.accelerator.device))
        self.experiment, self.config = experiment, experiment.training
        self.model = build_model(experiment)
        self._origin = None if resume or init_from is None else self._initialise(init_from)
        self.data = load_data(experiment, self.model, "train")
        self.augmentation = Augmentation.of(experiment.augmentation, self.data.modalities)
        check_training(self.data, experiment, self.model)  # what does not fit is said before anything is written
        self.step = 0
        self._saved = -1
        self._require_even_shares()
        test, held_out = check_held_out(experiment, self.model) if evaluated else (None, [])
        warnings = [
            *held_out,
            *left_alone(os.environ),
            *ignored_variables(self.config, os.environ),
            *doubts_of(experiment, self.model),
        ]
        messages = [f"warning: {said}" for said in warnings]
        self.watched = self._watched(test) if evaluated and self.main else None
        self.ema = Average(self.model, self.config.ema)
        if self.config.checkpoint_activations:
            recompute_activations(self.model.backbone)
        self._objective = objective = Objective(self.model, experiment.loss)
        self._whole: MultimodalDiffusion | None = None  # of a sharded training, the averaged weights for sampling
        self._saving: Future[Any] | None = None
        with self._hang, self._connected():
            self._hang.at("the start, after its data were read", waits=True)
            messages += self._place(objective)
            self._require_one_precision()
            self.optimizer = optimizer_of(self.model, self.config)
            self.chance = StepChance(
                self.model, experiment.conditioning, experiment.loss, self.config.seed, self.config.batch_size
            )
            if resume and (checkpoints := ckpt.list_checkpoints(run)):
                messages += self._resume(checkpoints[-1])
            if changed:
                keys = (f"{key} from {old} to {new}" for key, (old, new) in changed.items())
                messages.append(f"changed since the last session: {'; '.join(keys)}")
            self.resolved = resolved(experiment, registry)
            self.objective: nn.Module = objective
            if not self.sharded:
                with without_training_variables():  # it is placed; to see whether that is to be done takes an import
                    self.objective = self.accelerator.prepare_model(objective, device_placement=False)
        self._made = None if resume or not self.main else not run.exists()
        if self.main:
            for message in messages:
                on_message(message)
            run.mkdir(parents=True, exist_ok=True)
            with ckpt.alone_in(run):
                if not resume:
                    ckpt.require_no_run(run)  # another process may have been here since it was looked at first
                self._write_configuration(registry)

    def _accelerator(self, device: str | None) -> Accelerator:
        """Meet the other processes, if there are any.

        Raises:
            UserError: if they do not all come.
        """
        cpu = choose_device(device).type == "cpu"
        # The watch for processes that hang comes first, and knows which it is.
        timeout = timedelta(seconds=2 * self.config.timeout)
        try:
            with without_training_variables():
                return Accelerator(
                    cpu=cpu,
                    mixed_precision="no",
                    log_with=list(self.config.trackers) or None,
                    project_dir=self.run,
                    kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
                )
        except RuntimeError as error:
            if not _lost_connection(error):
                raise
            raise UserError(
                f"rank {os.environ.get('RANK')}: the {os.environ.get('WORLD_SIZE')} processes did not all come "
                f"together within {timeout.total_seconds():g} s ({str(error).splitlines()[0]}). Look for those that "
                "did not start, and start all again"
            ) from error

    def _place(self, objective: Objective) -> list[str]:
        """Bring the model and its average to the device, or this process's part of them; what to tell of it."""
        config, device, blocks = self.config, self.accelerator.device, self.model.backbone.repeated_blocks()
        if config.compile:
            for module in blocks if self.sharded else [objective]:  # a graph does not reach over what is gathered
                module.compile(dynamic=False)
        said = []
        if config.parallel == "fsdp":
            from mtdiffusion_engine import sharding  # it takes a while

            sharding.require_shardable(self.model)
            if self.sharded:
                mesh, self._group = sharding.all_processes(device)
                self._whole = copy.deepcopy(self.ema.module) if self.main else None
                average = self.ema.module
                for module, parts in ((objective, blocks), (average, average.backbone.repeated_blocks())):
                    sharding.synchronise(module, self._group)
                    sharding.shard(module, parts, mesh)
            if self.sharded and not blocks:
                name = type(self.model.backbone).__name__
                said.append(
                    f"warning: the backbone {name} does not tell its repeated blocks, so that all of its weights are "
                    "gathered at once, and nothing is compiled"
                )
        objective.to(device)
        self.ema.module.to(device)
        return said

    def _write_configuration(self, registry: Registry) -> None:
        try:
            ckpt.write_json(self.run / PLUGINS_FILE, origins(self.experiment, registry))
            if self._origin:
                self.save()  # otherwise a run resumed before its first checkpoint would start from other weights
            dump_toml(self.resolved, self.run / "config.toml")  # last: with it, there is a run
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
        if "ema_updates" not in state:
            raise UserError(
                f"{folder / 'state.json'}: damaged (it has no ema_updates, which training goes on by); remove that "
                "checkpoint to fall back on the one before"
            )
        self.ema.updates = int(state["ema_updates"])
        self._gather()
        self._origin = state.get("init_from")
        count = len(self.data)
        if state.get("samples", count) == count:
            return []
        return [
            f"the number of training samples is {count}, at the last checkpoint it was {state['samples']}: from here "
            "on other samples come next than if it had stayed"
        ]

    def _watched(self, test: ModalityData | None) -> HeldOutLoss | None:
        config = self.config
        data = load_watched(self.experiment, self.model, test) if config.held_out_every else None
        if data is None or not all(data.has(name) for name in self.model.names):
            return None  # parts of the loss would be missing, and it would be another one
        micro = max(config.batch_size // config.accumulate, 1)
        return HeldOutLoss(data, self.experiment.conditioning, self.experiment.loss, config.seed, micro)

    def _require_even_shares(self) -> None:
        config, processes = self.config, self.accelerator.num_processes
        if config.batch_size % (config.accumulate * processes):
            raise UserError(
                f"training.batch_size = {config.batch_size} cannot be shared out to {processes} processes in "
                f"training.accumulate = {config.accumulate} micro-batches; give a multiple of "
                f"{config.accumulate * processes}"
            )

    def _require_one_precision(self) -> None:
        """Processes on unlike processors may each have settled "auto" in their own way."""
        half = torch.tensor([self.config.precision == "bfloat16"], device=self.accelerator.device)
        every = [("float32", "bfloat16")[one] for one in self.accelerator.gather(half).int().tolist()]
        if len(set(every)) > 1:
            raise UserError(
                f'training.precision = "auto": rank 0 would compute in {every[0]} and rank '
                f"{next(rank for rank, found in enumerate(every) if found != every[0])} in another, as their devices "
                'do not all multiply bfloat16; set "float32", or "bfloat16"'
            )

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and talks."""
        return bool(self.accelerator.is_main_process)

    @property
    def sharded(self) -> bool:
        """Whether the model is split over processes."""
        return self.config.parallel == "fsdp" and bool(self.accelerator.num_processes > 1)

    @property
    def averaged_model(self) -> MultimodalDiffusion:
        """The model with averaged weights, which is for sampling.

        Of a sharded training, as it was when it was last sampled, looked at with held-out samples or done; in the main
        process only, others have a part of it.
        """
        return self.ema.module if self._whole is None else self._whole

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """While this lasts, the averaged model is the present one, and on the device; all processes enter it."""
        self._gather()
        try:
            if self._whole is not None:
                self._whole.to(self.accelerator.device)
            yield
        finally:
            if self._whole is not None:  # between uses the device's memory is the training's
                self._whole.to("cpu")

    def _gather(self) -> None:
        """Bring the averaged weights together, if they are split; all processes call it."""
        if self.sharded:
            from mtdiffusion_engine import sharding

            sharding.gather(self.ema.module, self._whole)

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one.

        Of a sharded training all processes call it, and it is written while training goes on: it is there when the next
        one is begun, or :meth:`train` returns.
        """
        if self._saved == self.step:
            return
        self._hang.at(f"step {self.step}, its checkpoint", waits=True)
        self._finish_saving()
        # Data order and noise are functions of the seed and the step: with them the state is whole.
        state = {
            "ema_updates": self.ema.updates,
            "seed": self.config.seed,
            "samples": len(self.data),
            "experiment": self.resolved,
            **({"init_from": self._origin} if self._origin else {}),
        }
        run, step, keep = self.run, self.step, self.config.keep
        if self.sharded and step:
            from mtdiffusion_engine import sharding

            partial = ckpt.partial_checkpoint(run, step)
            if self.main:
                ckpt.remove_partial(run)
                partial.mkdir(parents=True)
            files = {
                "model": self.model.state_dict(),
                "ema": self.ema.module.state_dict(),
                "optimizer": ckpt.moments(self.optimizer),
            }
            self._saving = sharding.save_shards(
                partial, files, self._group, lambda: ckpt.finish_checkpoint(run, step, partial, state, keep)
            )
        elif self.main:  # before the first step, the whole is here
            model, ema = (self._whole or each for each in (self.model, self.ema.module))
            ckpt.save_checkpoint(
                run,
                step,
                model=model.state_dict(),
                ema=ema.state_dict(),
                optimizer=self.optimizer,
                state=state,
                keep=keep,
            )
        self._saved = step

    def _finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is there."""
        writing, self._saving = self._saving, None
        if writing is not None:
            from mtdiffusion_engine import sharding

            sharding.wait_for(writing, f"{self.run}: the checkpoint of step {self._saved}")

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
            Diverged: if the gradient was not finite in the last :data:`PATIENCE` steps, or in half of fewer; the last
                checkpoint from which one can go on stays.
            UserError: if another process is training the run, a process of a sharded training does not see it, or one
                that loads data ends by itself.
            KeyboardInterrupt: after Ctrl-C, once the step under way is done and a checkpoint is written; after SIGTERM
                it is a :class:`Terminated`.

        One of several processes ends with status 2 when another hangs (:class:`HangWatch`).
        """
        if self.sharded:
            self.accelerator.wait_for_everyone()
            if not (self.run / "config.toml").is_file():
                raise UserError(
                    f"{self.run}: process {self.accelerator.process_index} does not see the run that the first one "
                    'made. With training.parallel = "fsdp" all processes write its checkpoints: give a folder on a '
                    "file system that all machines share"
                )
        with ckpt.alone_in(self.run) if self.main else nullcontext(), self._hang:
            if self.main:
                ckpt.tidy(self.run, self.config.keep)
            try:
                with self._connected():
                    self._train(on_progress, on_sample, stop_at)
            except RuntimeError as error:  # torch raises it wherever the training is when the process ends
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                raise UserError(
                    f"a process that loads data ended by itself at step {self.step + 1} ({error}); often memory has "
                    "run out: lower training.workers or training.batch_size. Go on with: "
                    f"{ckpt.resume_command(self.run)}"
                ) from error
            finally:
                self._finish_saving()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Says in a sentence that another process has ended."""
        try:
            yield
        except RuntimeError as error:
            if not _lost_connection(error):
                raise
            raise UserError(
                f"rank {self.accelerator.process_index} of {self.accelerator.num_processes} processes: another has "
                f"ended, at step {self.step + 1} or before it; what started them says which. {self._remedy()}"
            ) from error

    def _remedy(self) -> str:
        """How to go on after a process has hung or ended."""
        kept = ckpt.list_checkpoints(self.run)
        there = f"The last checkpoint is of step {ckpt.step_of(kept[-1])}" if kept else "There is no checkpoint"
        return f"{there}. Start all processes again with: {ckpt.resume_command(self.run)}"

    def _train(
        self,
        on_progress: Callable[[Progress], None] | None,
        on_sample: Callable[[int], None] | None,
        stop_at: int | None,
    ) -> None:
        stop = min(self.config.steps, stop_at or self.config.steps)
        started = time.monotonic()
        batches = self.batches(stop)
        tally, told_of = Tally(self.accelerator), 0
        first = self.step
        looks = self._looks()
        self.model.train()
        with deferred_interrupt() as interrupted:
            while self.step < stop:
                try:
                    rate, norm = self.advance(batches, tally)
                except RuntimeError:
                    if not (reason := interrupted()):
                        raise
                    # A signal to the whole group ended the workers: without them this step cannot be, the last one can,
                    # unless it takes other processes, which may be elsewhere.
                    if not self.sharded:
                        self.save()
                    raise reason from None
                if _due(self.step, self.config.log_every) or self.step == stop:
                    every, _ = self._require_finite(tally, first)
                    seconds = time.monotonic() - started
                    left_out, told_of = every - told_of, every
                    self._hang.at(f"step {self.step}, its report", waits=True)
                    where = locate(self, tally.last_skipped()) if left_out else ""
                    means, looked, looks = tally.take(), looks, self._looks()
                    held_out = None
                    if looks > looked or self.step == stop:
                        self._hang.at(f"step {self.step}, the loss of held-out samples", waits=True)
                        with self._gathered():
                            if on_progress and self.watched:
                                held_out = self.watched.of(self.averaged_model)
                    if on_progress and self.main:
                        on_progress(Progress(self.step, means, rate, float(norm), left_out, seconds, held_out, where))
                if _due(self.step, self.config.sample_every):
                    self._hang.at(f"step {self.step}, samples on the way", waits=True)
                    with self._gathered():
                        if on_sample and self.main:
                            on_sample(self.step)
                reason = self._agree(interrupted())
                if reason or self.step == stop or _due(self.step, self.config.checkpoint_every):
                    _, streak = self._require_finite(tally, first)
                    if not streak or reason or self.step == stop:  # it may lead nowhere: keep those before
                        self._require_finite_state()
                        self.save()
                if reason:
                    raise reason

    def _looks(self) -> int:
        """How many times held-out samples should have been looked at by now."""
        every = self.config.held_out_every
        return self.step // every if every else 0

    def _agree(self, reason: type[KeyboardInterrupt] | None) -> type[KeyboardInterrupt] | None:
        """Why to stop after this step, if any process is to: one that stopped alone would leave the others waiting."""
        if self.accelerator.num_processes == 1:
            return reason
        if self.accelerator.device.type != "cpu" and not _due(self.step, VOTE_EVERY):
            return None  # the others do not vote now either
        self._hang.at(f"step {self.step}, the end of the step", waits=True)
        kinds = (Terminated, KeyboardInterrupt)
        votes = torch.tensor([float(reason is kind) for kind in kinds], device=self.accelerator.device)
        votes = self.accelerator.reduce(votes, "sum")
        return next((kind for kind, vote in zip(kinds, votes.tolist(), strict=True) if vote), None)

    def batches(self, stop: int) -> Iterator[Batch]:
        """This process's micro-batches from the present step up to another, in their order."""
        batches = training_batches(self.data, self.sampler(self.step, stop), self.config.workers, self.augmentation)
        return made_ahead(batches, Batch.pin_memory) if self.accelerator.device.type == "cuda" else batches

    def sampler(self, start: int, stop: int) -> StepSampler:
        """The turns of this process's samples, from one step to another."""
        config, accelerator = self.config, self.accelerator
        return StepSampler(
            len(self.data),
            config.batch_size,
            config.seed,
            start,
            stop,
            config.accumulate,
            accelerator.process_index,
            accelerator.num_processes,
        )

    def advance(self, batches: Iterator[Batch], tally: Tally) -> tuple[float, Tensor]:
        """One optimizer step, which the tally takes in; if its gradient is not finite, the weights stay as they are.

        Returns:
            The learning rate, and the gradient's norm ``[]`` before clipping, on the device.
        """
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        parts, device, sampler = self.config.accumulate, self.accelerator.device, self.sampler(self.step, self.step)
        for part in range(parts):
            self._hang.at(f"step {self.step + 1}, reading its samples")
            batch: Batch = next(batches)
            self._hang.at(f"step {self.step + 1}, the gradient", waits=True)
            place = sampler.place(part)
            torch.manual_seed(derive_seed(self.config.seed, self.step, place, 0))  # of dropout
            visible, draws = self.chance.draw(self.step, place, batch.presence)
            visible, draws = _to(device, visible), Draws(*(_to(device, each) for each in draws))
            batch = batch.to(device)
            last = part == parts - 1
            # Of a sharded model, each micro-batch's gradient is summed at once: that of the whole is never kept.
            with nullcontext() if last or self.sharded else self.accelerator.no_sync(self.objective):
                with self.autocast():
                    loss, sums = self.objective(batch.x, batch.presence, visible, draws)
                tally.add(sums)
                # What follows from a choice may have a finite gradient where its loss is not: then neither is, so that
                # all processes leave the step out. Times 1 it is the same to the bit.
                self.accelerator.backward(loss * (1 + 0 * loss.detach()) / parts)
        norm = clip_gradient(self.model, self.config.clip)
        self.step += 1
        tally.step(step_if_finite(self.optimizer, norm), self.step)
        self.ema.update(self.model)
        return rate, norm

    def autocast(self) -> torch.autocast:
        """Of a forward pass, as ``training.precision`` says."""
        bfloat16 = self.config.precision == "bfloat16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bfloat16)

    def each(self, batch: Batch, visible: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each sample ``[B]``, and what it is made of by name ``[B, ...]``: codes, terms, and the loss."""
        # Beside what wraps it to sum gradients; of a sharded model, its call gathers the weights.
        call = self._objective if self.sharded else self._objective.forward
        total, found = call(batch.x, batch.presence, visible, draws, each=True)
        return total, found

    def _require_finite(self, tally: Tally, first: int) -> tuple[int, int]:
        """How many steps were left out since step ``first``, and how many of them just now in a row, if that is not too
        many."""
        every, streak = tally.skipped()
        if streak < min(PATIENCE, max((self.step - first) // 2, 1)):
            return every, streak
        start = self.step - streak
        named = ", ".join(tally.not_finite()) or "the gradient alone"
        raise self._diverged(
            f"no gradient was finite from step {start + 1} to step {self.step} (not finite among the loss terms: "
            f"{named}). {locate(self, start + 1)}",
            start,
        )

    def _require_finite_state(self) -> None:
        """Check what a checkpoint is to hold: an older one is not to make way for one from which nothing follows."""
        if wrong := self.not_finite():
            raise self._diverged(
                f"after step {self.step}, {wrong} are not finite, though every gradient was: it or the learning rate "
                "is too large. That state was not saved. ",
                self.step,
            )

    def not_finite(self) -> str:
        """Which weights, averaged weights or moments are not finite, in a few words; empty if none are. All processes
        call it; it waits for the device."""
        weights = dict(self.model.named_parameters())
        names = {id(weight): name for name, weight in weights.items()}
        ordered = [names[id(each)] for group in self.optimizer.param_groups for each in group["params"]]
        named: dict[str, Tensor] = {}
        for key, x in ckpt.moments(self.optimizer).items():  # first: weights follow from them
            index, _, moment = key.partition(".")
            named[f"{'Muon' if moment == 'momentum' else 'AdamW'}'s {moment} of {ordered[int(index)]}"] = x
        named |= {f"the weights {name}": x for name, x in weights.items()}
        named |= {f"the averaged weights {name}": x for name, x in self.ema.module.named_parameters()}
        wrong = torch.stack([~own_part(x).isfinite().all().to(self.accelerator.device) for x in named.values()])
        wrong = self.accelerator.reduce(wrong.float(), "sum")
        found = [name for name, each in zip(named, wrong.tolist(), strict=True) if each]
        return f"{found[0]} and {len(found) - 1} more tensors" if len(found) > 1 else "".join(found)

    def _diverged(self, what: str, start: int) -> Diverged:
        """What to raise of a training that cannot go on from where it was at step ``start``."""
        self._finish_saving()
        message = f"training diverged: {what}"
        # The next steps' samples and noise follow from the seed and the step: from there it would fail like this again.
        useless = [at for at in map(ckpt.step_of, ckpt.list_checkpoints(self.run)) if at and at >= start]
        self.accelerator.wait_for_everyone()
        if useless:
            for at in useless if self.main else ():
                ckpt.set_aside(self.run / "checkpoints" / ckpt.name_of(at))
            message += (
                f"Its checkpoints from step {useless[0]} on lead nowhere else and are none any more (*{ckpt.ASIDE}). "
            )
        elif start == 0 and self._origin:
            return Diverged(
                f"{message}It started from {self._origin['run']}, whose weights do not suit these data: check the "
                "data, or start a new run without --init-from."
            )
        kept = ckpt.list_checkpoints(self.run)
        message += f"There is a checkpoint of step {ckpt.step_of(kept[-1])}. " if kept else "There is no checkpoint. "
        lower = ckpt.resume_command(self.run, f"training.learning_rate={self.config.learning_rate / 10:g}")
        return Diverged(
            f"{message}Go {'on from it' if kept else 'back to the start'} with a lower learning rate: {lower} (or a "
            "lower training.clip); if that does not help, check the data."
        )


def recompute_activations(backbone: Backbone) -> None:
    """Let a backbone's repeated blocks keep nothing but their inputs, and be computed again on the way back.

    Raises:
        UserError: if it does not tell which they are.
    """
    if not (blocks := backbone.repeated_blocks()):
        raise UserError(
            f"training.checkpoint_activations: the backbone {type(backbone).__name__} does not tell its repeated "
            "blocks; leave it false, or give the backbone the method repeated_blocks"
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _lost_connection(error: RuntimeError) -> bool:
    """Whether it is what a collective raises when the process at its other end is gone."""
    text = str(error)  # gloo's errors are plain ones, which say where in its source
    return isinstance(error, distributed.DistError) or "gloo" in text.lower() or "Connection closed" in text


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor on a device; a copy to a GPU is not waited for."""
    if tensor.device == device or device.type != "cuda":
        return to_device(tensor, device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
