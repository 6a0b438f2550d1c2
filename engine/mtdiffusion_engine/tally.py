"""What is counted of a training between two reports: on the device, so that no step waits for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class Tally:
    """Loss terms, and steps that were left out, over all processes.

    Terms are averaged over all that was trained since they were taken last; what is not finite is counted apart.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._names: list[str] = []
        self._table: Tensor | None = None  # by name: sum, count, batches of which it was not finite
        # How many in all, how many just now in a row, and which was the last.
        self._skipped = torch.zeros(3, device=accelerator.device)

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Take in the sums and counts of a micro-batch (:meth:`mtdiffusion.LossTerms.sums`)."""
        self._names = list(sums)
        pairs = torch.stack(list(sums.values()))
        finite = pairs.isfinite().all(1, keepdim=True)
        row = torch.cat([torch.where(finite, pairs, 0), (~finite).to(pairs.dtype)], 1)
        self._table = row if self._table is None else self._table + row

    def step(self, skipped: Tensor, number: int) -> None:
        """Take in a step: 1 if it was left out, else 0; alike in all processes."""
        every, streak, last = self._skipped
        self._skipped = torch.stack([every + skipped, (streak + 1) * skipped, torch.where(skipped > 0, number, last)])

    def skipped(self) -> tuple[int, int]:
        """How many steps were left out, and how many of them are the last in a row. Waits for the device."""
        every, streak, _ = self._skipped.tolist()
        return int(every), int(streak)

    def last_skipped(self) -> int:
        """The number of the last step that was left out, from 1. Waits for the device."""
        return int(self._skipped[2])

    def take(self) -> dict[str, float]:
        """Means by name; those of which nothing was counted are left out. Waits for the device."""
        table = self._reduced()
        self._table = None
        return {name: total / count for name, (total, count, _) in table.items() if count > 0}

    def not_finite(self) -> list[str]:
        """The names of terms that were not finite in some batch. Waits for the device."""
        return [name for name, (_, __, wrong) in self._reduced().items() if wrong > 0]

    def _reduced(self) -> dict[str, list[float]]:
        if self._table is None:
            return {}
        return dict(zip(self._names, self._accelerator.reduce(self._table, "sum").tolist(), strict=True))
