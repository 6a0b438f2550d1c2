"""How the judges' networks are trained: in steps of AdamW, and from where a stopped training was.

What a training is in is written to a file every few seconds, whole, so that a process that is stopped or killed loses
no more than that, and whoever trains the same next goes on, to the same weights to the bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtdiffusion_registry.pace import Pace
from mtdiffusion_registry.partial import partial_of

EVERY = 5.0
"""Seconds between states that are written; a training that takes less leaves none."""


class Progress:
    """Where a training is, in a file.

    Args:
        path: of the file, named by all that the training depends on; None: nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None if there is none, it is damaged, or another torch made it."""
        if self._path is None:
            return None
        try:
            digest, _, content = self._path.read_bytes().partition(b"\n")
            if hashlib.sha256(content).hexdigest().encode() != digest:
                return None
            state: dict[str, Any] = torch.load(BytesIO(content), weights_only=True)
        except Exception:  # whatever unpickling runs into: it is only a start that is lost
            return None
        return state if state.get("torch") == str(torch.__version__) else None

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state, if that was not done for a while; where that cannot be done, nothing is kept."""
        if self._path is None or time.monotonic() - self._saved < EVERY:
            return
        buffer = BytesIO()
        torch.save({**state(), "torch": str(torch.__version__)}, buffer)
        content = buffer.getvalue()
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with partial_of(self._path) as partial:
                partial.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                partial.replace(self._path)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the file, when the training is done."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    *,
    batch: int,
    epochs: int,
    weight_decay: float,
    what: str,
    progress: Progress,
) -> None:
    """Train a model by AdamW and one cycle of learning rates up to 0.003; random numbers are the global generator's.

    Args:
        loss_of: of the indices of a batch ``[b]`` among the samples, the loss.
        count: how many samples there are; each epoch is a new permutation of them, without the last few.
        what: is being done, for those who wait.
        progress: where it begins, and is kept; of a training with equal arguments.
    """
    steps = max(count // batch, 1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    order, done = torch.empty(0, dtype=torch.long), 0
    if (state := progress.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        order, done = state["order"], state["done"]
    pace = Pace(what, epochs * steps, before=done)
    if done:
        pace.log(f"goes on after {done:,} of {epochs * steps:,} steps, where it was stopped")
    model.train()

    def now() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "random": torch.get_rng_state(),
            "order": order,
            "done": done,
        }

    while done < epochs * steps:
        place = done % steps
        if place == 0:
            order = torch.randperm(count)
        loss = loss_of(order[place * batch : (place + 1) * batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        done += 1
        pace.tell(done)
        progress.save(now)
