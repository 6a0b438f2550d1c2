"""Training, checkpoints, sampling, evaluation and the command line.

::

    from mtdiffusion_engine import load_run

    run = load_run("runs/digits")
    out = run.sample(16, observed={"label": 3})  # {"image": [16, 1, 8, 8], "label": [16], ...}
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtdiffusion_engine.run import Run, load_run

__all__ = ["Run", "load_run"]


def __getattr__(name: str) -> object:
    """Import what needs torch when it is asked for (PEP 562): the command line must answer --help without it."""
    if name in __all__:
        return getattr(import_module("mtdiffusion_engine.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
