"""NaN and infinity in data, codes, losses, gradients, weights and an optimizer's state."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mtdiffusion_benchmarks.reliability.children import Child, Ended, run
from mtdiffusion_benchmarks.reliability.hostile import _CHECK, _RESUME, _SAMPLE, _TREE, _checkpoint, _saved, _tree
from mtdiffusion_benchmarks.reliability.jobs import Bench
from mtdiffusion_benchmarks.reliability.kills import Wrong

VALUES = (float("nan"), float("inf"), -float("inf"))


def in_training(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """A code, a head's parameters (and so a loss) or a gradient that is not finite: for one step, or from one step on.

    One step is left out. From one on, the training ends with a message that names steps, and terms where a term was
    wrong; the checkpoints that stay are finite.
    """
    for trial in range(trials):
        value, first = VALUES[trial % 3], rng.randint(4, 8)
        where, forever = ("encoder", "decoder", "gradient")[trial // 3 % 3], trial % 2 == 1
        bench.empty()
        ended = Child(bench.place, _training(where, value, first, forever)).wait()
        what = f"{value} in the {where} at step {first + 1}{' and on' * forever}"
        yield f"{what}: {wrong}" if (wrong := _wrong(bench, ended, where, first, forever)) else ""


def _training(where: str, value: float, first: int, forever: bool) -> Callable[[], int]:
    """Work of a child: a training in which something becomes ``value`` at step ``first`` (from 0)."""

    def work() -> int:
        from mtdiffusion_engine.experiment import load_experiment
        from mtdiffusion_engine.trainer import Trainer
        from mtdiffusion_registry import Registry, UserError

        registry = Registry.discover()
        settings = ["training.steps=30", "training.log_every=1"]
        trainer = Trainer(load_experiment(Path("config.toml"), settings, registry), Path("new"), registry, device="cpu")

        def due() -> bool:
            return trainer.step >= first if forever else trainer.step == first

        def spoil(x: torch.Tensor) -> torch.Tensor:
            return x * value if due() else x  # with a way back for the gradient

        image = trainer.model.modality("image")
        if where == "encoder":
            image.encoder.register_forward_hook(lambda _module, _given, out: spoil(out))
        elif where == "decoder":
            image.decoder.register_forward_hook(lambda _module, _given, out: {k: spoil(x) for k, x in out.items()})
        else:
            next(trainer.model.parameters()).register_hook(spoil)  # type: ignore[no-untyped-call]
        skipped: list[int] = []
        try:
            trainer.train(lambda progress: skipped.append(progress.skipped))
        except UserError as error:
            print(f"refused: {error}")
            return 2
        print(f"left out: {sum(skipped)}")
        return 0

    return work


def _wrong(bench: Bench, ended: Ended, where: str, first: int, forever: bool) -> str:
    if wrong := ended.wrong(2 if forever else 0):
        return wrong
    if not forever and "left out: 1" not in ended.said:
        return f"not one step was left out: {ended.said[-200:]}"
    if forever and f"from step {first + 1} to step" not in ended.said:
        return f"the step is not named: {ended.said[-300:]}"
    if forever and not re.search("l2/image" if where != "gradient" else "gradient alone", ended.said):
        return f"the term is not named: {ended.said[-300:]}"
    for checkpoint in (bench.place.work / "new" / "checkpoints").glob("step-????????"):
        for name in ("model", "ema", "optimizer"):
            if not all(bool(x.isfinite().all()) for x in load_file(checkpoint / f"{name}.safetensors").values()):
                return f"{checkpoint.name}/{name} is not finite"
    return ""


def in_checkpoints(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """Weights, averaged weights or moments that are not finite: refused, with the file and the tensor."""
    for trial in range(trials):
        name = ("model", "ema", "optimizer")[trial % 3]
        bench.empty()
        path = _checkpoint(bench) / f"{name}.safetensors"
        tensors = load_file(path)
        key = rng.choice(
            [key for key, x in tensors.items() if x.is_floating_point() and (name == "optimizer" or x.ndim > 1)]
        )
        tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = VALUES[trial // 3 % 3]
        save_file(tensors, path)
        ended = run(bench.place, _SAMPLE if name == "ema" else _RESUME)
        wrong = ended.wrong(2) or ("" if key in ended.said else f"{key} is not named: {ended.said[-200:]}")
        yield f"{name}.safetensors: {wrong}" if wrong else ""


def in_data(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """A vector in a data set that is not finite: refused before anything is written, with the file or the sample."""
    vectors = _TREE.replace('label="label"', 'label="embedding"')
    for trial in range(trials):
        vector = np.ones(4, np.float32)
        vector[rng.randrange(4)] = VALUES[trial % 3]
        vectors_of = {f"{i:03d}": np.ones(4, np.float32) if i != 7 else vector for i in range(24)}
        bench.empty()
        _tree(bench, "label.npz", _saved(lambda x, to: np.savez(to, **x), vectors_of))()
        ended = run(bench.place, (*_CHECK, "--set", vectors))
        wrong = ended.wrong(2) or ("" if "007" in ended.said else f"the sample is not named: {ended.said[-200:]}")
        yield wrong
