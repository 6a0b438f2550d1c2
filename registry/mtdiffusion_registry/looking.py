"""Looking through the samples of a data set, so that all that is wrong with them is told at once."""

from __future__ import annotations

import math

from mtdiffusion.interfaces import Dataset
from mtdiffusion_registry.errors import SampleError, SampleTroubles
from mtdiffusion_registry.pace import Pace

PATIENCE = 30.0
"""Seconds for which data are looked through where that is not to be waited for to the end: for further trouble beside
what is known, and before a training where nothing is kept of it."""


def look_through(dataset: Dataset, what: str, start: int = 0, patience: float = math.inf) -> None:
    """Read each sample.

    Args:
        what: errors call the data set.
        start: the first sample that is read; those before are sound.
        patience: seconds after which the others are left alone.

    Raises:
        UserError: if some cannot be read: of each kind of trouble how many samples have it, and the first few.
    """
    found, seen = SampleTroubles(what), start
    pace = Pace(f"checking {what}", len(dataset), before=start)
    for index in range(start, len(dataset)):
        try:
            dataset[index]
        except (ValueError, OSError) as error:
            found.add(SampleError.of(error, dataset.describe(index), what))
        seen = index + 1
        pace.tell(seen)
        if pace.seconds > patience:
            break
    found.tell(seen)
