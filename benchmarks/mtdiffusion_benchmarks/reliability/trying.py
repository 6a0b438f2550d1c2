"""What is tried."""

from __future__ import annotations

import importlib


def warm_up() -> None:
    """Import all that a child would, before there are threads."""
    for name in (
        "mtdiffusion_engine.commands",
        "mtdiffusion_engine.evaluation",
        "mtdiffusion_engine.gallery",
        "mtdiffusion_benchmarks.runner",
        "torch.utils.tensorboard",
        "sklearn.datasets",
        "torch._dynamo",  # an optimizer asks for it
    ):
        importlib.import_module(name)
