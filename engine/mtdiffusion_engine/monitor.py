"""What a training tells: a progress bar or lines for a person; scalars and sample grids for TensorBoard and others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mtdiffusion import LossWeights, sample
from mtdiffusion_engine.pictures import sample_sheet
from mtdiffusion_engine.sounds import is_heard, wave_of
from mtdiffusion_engine.trainer import Progress, Trainer
from mtdiffusion_registry.errors import UserError, first_line
from mtdiffusion_registry.partial import partial_of

NAMED = ("wandb", "trackio", "mlflow", "swanlab")
"""Trackers whose runs have names."""


class Monitor:
    """Shows a training while it is entered: pass :meth:`progress` and :meth:`samples` to :meth:`Trainer.train`.

    Args:
        trainer: the training to show.
        console: where to; a terminal gets a bar, anything else lines.
        every: seconds between lines.
        grid: samples in a grid.
        heard: how many of them are heard, of each modality that writes sounds.

    Attributes:
        last: the trainer's last report; None before the first.
    """

    def __init__(self, trainer: Trainer, console: Console, every: float = 10.0, grid: int = 16, heard: int = 4) -> None:
        from torch.utils import tensorboard  # slow to import

        self._trainer = trainer
        self._console = console
        self._every = every
        self._grid, self._heard = grid, heard
        self._recent = deque([(trainer.step, 0.0)], maxlen=5)  # the rate is that of late: the first steps take longer
        self._last_line = time.monotonic()
        self.last: Progress | None = None
        # What an interrupted run logged after its last checkpoint happens again: drop it.
        self._open = partial(tensorboard.SummaryWriter, trainer.run / "tensorboard", purge_step=trainer.step + 1)
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} it/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=trainer.config.steps, completed=trainer.step, rate="-", loss="")

    def __enter__(self) -> Self:
        self._writer = self._open()
        if self._trainer.config.trackers:
            self._start_trackers()
        self._bar.start()
        return self

    def _start_trackers(self) -> None:
        config, name = self._trainer.config, self._trainer.run.absolute().name
        # Each has a word of its own for a run's name.
        names = {tracker: {"run_name" if tracker == "mlflow" else "name": name} for tracker in NAMED}
        stated = dict(_flat(self._trainer.resolved))
        try:
            self._trainer.accelerator.init_trackers(config.project, config=stated, init_kwargs=names)
        except Exception as error:  # of whatever kind: it comes from another's library
            self._writer.close()
            raise UserError(
                f"training.trackers: {' or '.join(config.trackers)} could not be started ({type(error).__name__}: "
                f"{first_line(error)}). Its own documentation says what it needs; or take it out of training.trackers"
            ) from error

    def _track(self, log: Callable[[GeneralTracker], None]) -> None:
        """Log to each tracker. One that fails is left out from then on: it is no reason to lose a training."""
        trackers = self._trainer.accelerator.trackers
        for tracker in list(trackers):
            try:
                log(tracker)
            except Exception as error:  # as in _start_trackers
                trackers.remove(tracker)
                self._say(
                    f"warning: {tracker.name} failed ({type(error).__name__}: {first_line(error)}); the training goes "
                    "on without it"
                )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        self._writer.close()

    def progress(self, progress: Progress) -> None:
        """Show and log one report of the trainer."""
        self.last = progress
        step, seconds = self._recent[0]
        rate = (progress.step - step) / max(progress.seconds - seconds, 1e-9)
        self._recent.append((progress.step, progress.seconds))
        scalars = {
            **progress.means,
            "learning_rate": progress.learning_rate,
            "gradient_norm": progress.norm,
            "skipped_steps": progress.skipped,
            "iterations_per_second": rate,
        }
        scalars = {f"train/{name}": value for name, value in scalars.items()}
        if progress.held_out is not None:
            scalars |= {f"held_out/{name}": value for name, value in progress.held_out.items()}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, progress.step)
        self._track(lambda tracker: tracker.log(scalars, step=progress.step))
        weights = self._trainer.experiment.loss
        loss = describe(progress.means, weights)
        if progress.skipped:
            loss += f"  ({progress.skipped} steps left out: their gradient was not finite)"
        self._bar.update(self._task, completed=progress.step, rate=f"{rate:.1f}", loss=loss)
        total = self._trainer.config.steps
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line >= self._every or progress.step == total):
            self._last_line = now
            left = (total - progress.step) / rate
            line = f"step {progress.step}/{total}  {rate:.1f} it/s  ETA {left // 60:.0f}:{left % 60:02.0f}  {loss}"
            self._say(line)
        if progress.where:
            self._say(f"a step was left out. {progress.where}")
        if progress.held_out is not None and self._trainer.watched is not None:
            held_out = describe(progress.held_out, weights)
            self._say(f"step {progress.step}: held out  {held_out}  ({self._trainer.watched.what})")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def samples(self, step: int) -> None:
        """Log a grid of joint samples of the averaged weights, always from the same noise, and sounds among them."""
        model = self._trainer.averaged_model
        settings = self._trainer.experiment.sampling
        drawn = sample(model, self._grid, settings=settings, generator=torch.Generator().manual_seed(0))
        sheet = np.asarray(sample_sheet(model, drawn))
        self._writer.add_image("samples", sheet, step, dataformats="HWC")
        with partial_of(self._trainer.run / "sounds", folder=True) as scratch:
            for name, x in drawn.items():
                modality = model.modality(name)
                for place in range(min(self._heard, len(x)) if is_heard(modality, scratch) else 0):
                    if (sound := wave_of(modality, x[place].cpu(), scratch)) is not None:
                        self._writer.add_audio(f"samples/{name}/{place}", sound[0][None], step, sample_rate=sound[1])
        self._track(partial(_log_sheet, sheet=sheet, step=step))


def _log_sheet(tracker: GeneralTracker, sheet: np.ndarray[Any, Any], step: int) -> None:
    if hasattr(tracker, "log_images"):
        tracker.log_images({"samples": [sheet]}, step=step)
    elif tracker.name == "mlflow":  # can, but accelerate does not pass it on
        import mlflow

        mlflow.log_image(sheet, key="samples", step=step)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """The keys of a configuration with dots between them, as trackers want them."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, bool | int | float | str) else str(value)


def describe(means: dict[str, float], weights: LossWeights) -> str:
    """The loss and what it is made of, on one line: each modality's objective under its name, no term that does not
    count."""
    counted = {name for name in ("l0", "l1", "l2", "l3") if getattr(weights, name) > 0} | {"loss"}
    shown = {name.removeprefix("l2/"): value for name, value in means.items() if name.partition("/")[0] in counted}
    return "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
