"""How long commands take to start, each a process of its own, beside one that imports torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mtdiffusion_benchmarks.timing import Contender, Setting, ours
from mtdiffusion_engine.experiment import structure_experiment
from mtdiffusion_registry import Registry, UserError

SAMPLES = 4
_TABLES = {
    "data": {"kind": "shapes", "size": 16, "count": 64, "test_count": 8},
    "latent": {"height": 8, "width": 8},
    "modalities": {"image": {"kind": "image", "size": 16}, "label": {"kind": "label", "classes": 5}},
    "backbone": {"kind": "unet", "channels": 8, "multipliers": [1], "heads": 0, "vector": 16},
    "sampling": {"steps": 2},
}


def contenders(folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
    """The command line's help, its list of plugins, and a run that is loaded and draws a few samples."""
    run = folder / "started"
    ours(structure_experiment(_TABLES, registry, "start-up"), run, registry, setting).save()
    load = (
        f"import mtdiffusion_engine as m; run = m.load_run({str(run)!r}, device={setting.device!r}); "
        f"run.sample({SAMPLES})"
    )
    torch = "import torch"
    cli = ("-m", "mtdiffusion_engine.cli")
    return [
        Contender(torch, _process("-c", torch)),
        Contender("mtdiffusion --help", _process(*cli, "--help"), torch),
        Contender("mtdiffusion plugins list", _process(*cli, "plugins", "list"), torch),
        Contender(f"loading a run and drawing {SAMPLES} samples", _process("-c", load), torch),
    ]


def _process(*arguments: str) -> Callable[[], object]:
    def turn() -> None:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"start-up: {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")

    return turn
