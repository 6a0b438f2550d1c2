"""What is timed in processes of their own: how long commands take to start, beside one that imports torch, and training
where the allocator keeps what is freed, beside one where it does not."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from mtdiffusion_benchmarks.timing import STEPS, Contender, Setting, ours, train_ours
from mtdiffusion_engine.allocator import keep_freed_memory
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
    least = "import torch"
    cli = ("-m", "mtdiffusion_engine.cli")
    return [
        Contender(least, _process("-c", least)),
        Contender("mtdiffusion --help", _process(*cli, "--help"), least),
        Contender("mtdiffusion plugins list", _process(*cli, "plugins", "list"), least),
        Contender(f"loading a run and drawing {SAMPLES} samples", _process("-c", load), least),
    ]


def _process(*arguments: str) -> Callable[[], object]:
    def turn() -> None:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"start-up: {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")

    return turn


_LARGE = {
    "data": {"kind": "shapes", "size": 64, "count": 64, "test_count": 8},
    "latent": {"height": 64, "width": 64},
    "modalities": {"image": {"kind": "image", "size": 64}},
    "backbone": {"kind": "unet", "channels": 32, "multipliers": [1, 2, 4], "vector": 64},
    "training": {"batch_size": 16},
}


def freed_memory(folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
    """Training an image of 64 × 64 where freed memory is kept, as the command line keeps it, beside where it goes back
    to the system. The environment's ``MALLOC_*`` decide for both."""
    usual = "64 × 64, training that gives back freed memory"
    images = STEPS * _LARGE["training"]["batch_size"]  # type: ignore[index]
    return [
        Contender(usual, _trainer(folder / "gives-back", setting, keep=False), images=images),
        Contender("64 × 64, training", _trainer(folder / "keeps", setting, keep=True), usual, images=images),
    ]


def _trainer(folder: Path, setting: Setting, *, keep: bool) -> Callable[[], object]:
    """Turns of a training in a process of its own, which ends when nobody can ask for one any more."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_train, args=(its, folder, setting, torch.get_num_threads(), keep), daemon=True)
    process.start()
    its.close()

    def turn() -> None:
        mine.send(None)
        mine.recv()

    return turn


def _train(asked: Connection, folder: Path, setting: Setting, threads: int, keep: bool) -> None:
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    registry = Registry.discover()
    turn = train_ours(ours(structure_experiment(_LARGE, registry, "64 × 64"), folder, registry, setting))
    while True:
        try:
            asked.recv()
        except EOFError:
            return
        turn()
        asked.send(None)
