"""NaN and infinity in data, codes, losses, gradients, weights and an optimizer's state."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mtdiffusion_benchmarks.reliability.children import Child, Ended, run
from mtdiffusion_benchmarks.reliability.hostile import _CHECK, _RESUME, _SAMPLE, _TREE, _checkpoint, _saved, _tree
from mtdiffusion_benchmarks.reliability.jobs import Bench
from mtdiffusion_benchmarks.reliability.kills import Wrong

if TYPE_CHECKING:
    from mtdiffusion_engine.trainer import Trainer

VALUES = (float("nan"), float("inf"), -float("inf"))


WHERE = ("code", "loss", "gradient", "bfloat16", "moment")


def in_training(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """A code, a head's loss, its gradient, a loss that bfloat16 cannot hold, or a moment of the optimizer that is not
    finite: of one sample of one step, of all samples but one from one step on, or, of a moment, once.

    One step is left out, and the report names the sample. From one on, the training ends with a message that names
    step, term and samples, and not the one that is well; a moment is named with its parameter. The checkpoints that
    stay are finite.
    """
    for trial in range(trials):
        value, first = VALUES[trial % 3], rng.randint(4, 8)
        where, forever = WHERE[trial // 3 % len(WHERE)], trial % 2 == 1
        bench.empty()
        ended = Child(bench.place, _training(where, value, first, forever)).wait()
        what = f"{value} in the {where} at step {first + 1}{' and on' * forever}"
        yield f"{what}: {wrong}" if (wrong := _wrong(bench, ended, where, first, forever)) else ""


def _training(where: str, value: float, first: int, forever: bool) -> Callable[[], int]:
    """Work of a child: a training in which something becomes ``value`` at step ``first`` (from 0)."""

    def work() -> int:
        from mtdiffusion_engine.experiment import load_experiment
        from mtdiffusion_engine.trainer import Progress, Trainer
        from mtdiffusion_registry import Registry, UserError

        registry = Registry.discover()
        # Nothing is shown to the network: then every picture has a loss.
        shown = ["conditioning.observed=0.0", "conditioning.partial=0.0"]
        settings = ["training.steps=30", "training.log_every=1", *shown]
        settings += ['training.precision="bfloat16"'] * (where == "bfloat16")
        trainer = Trainer(load_experiment(Path("config.toml"), settings, registry), Path("new"), registry, device="cpu")
        (turn,) = trainer.sampler(first, first + 1)
        well = turn.indices[-1]
        spoilt = [index for index in range(len(trainer.data)) if index != well] if forever else turn.indices[:1]
        spoil(trainer, where, value, spoilt, lambda: trainer.step >= first if forever else trainer.step == first)
        print(f"spoilt: {spoilt}")

        def told(progress: Progress) -> None:
            if progress.skipped:
                print(f"left out: {progress.skipped} at step {progress.step}. {progress.where}")
            if where == "moment" and progress.step == first + 1:
                weight = next(trainer.model.parameters())
                trainer.optimizer.state[weight]["exp_avg_sq"].view(-1)[0] = value

        try:
            trainer.train(told)
        except UserError as error:
            print(f"refused: {error}")
            return 2
        return 0

    return work


def spoil(trainer: Trainer, where: str, value: float, spoilt: Sequence[int], due: Callable[[], bool]) -> None:
    """Let some samples give a code, a loss or a gradient that is ``value``, or in bfloat16 a loss that it cannot hold.

    They are known by their pictures, wherever they are computed; computed again, they are as they were.

    Args:
        spoilt: by their index.
        due: whether a step in training is one of those in which they do.
    """
    image = trainer.model.modality("image")
    pictures = torch.stack([trainer.data[index]["image"] for index in spoilt])
    objective, each = image.decoder.objective, trainer.each
    again: list[None] = []

    def wrong(x: torch.Tensor) -> torch.Tensor:
        """Which rows: ``[B]``."""
        found = (x[:, None] == pictures).flatten(2).all(2).any(1)
        return found & (bool(again) or due())

    def code(_module: object, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        return torch.where(wrong(given[0])[:, None, None, None], value, out)

    def loss(params: Any, x: torch.Tensor) -> torch.Tensor:
        found, rows = objective(params, x), wrong(x)
        if where == "loss":
            return torch.where(rows, value, found)
        if where == "bfloat16":
            large = torch.tensor(3.4e38)
            held = large.bfloat16() if torch.is_autocast_enabled("cpu") else large  # in bfloat16 infinity
            return torch.where(rows, found + 1e-38 * held, found)
        if where == "gradient" and found.requires_grad:
            found.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: torch.where(rows, value, gradient)
            )
        return found

    def computed_again(*given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        again.append(None)
        try:
            return each(*given)
        finally:
            again.clear()

    trainer.each = computed_again  # type: ignore[method-assign, assignment]
    image.decoder.objective = loss  # type: ignore[method-assign]
    if where == "code":
        image.encoder.register_forward_hook(code)


_TERM = {
    "code": "the code of image",
    "loss": "l2/image",
    "gradient": "the gradient of ",
    "bfloat16": "In float32 it is finite",
    "moment": "AdamW's exp_avg_sq of ",
}


def _wrong(bench: Bench, ended: Ended, where: str, first: int, forever: bool) -> str:
    ends = forever or where == "moment"
    if wrong := ended.wrong(2 if ends else 0):
        return wrong
    if _TERM[where] not in ended.said:
        return f"the term is not named: {ended.said[-300:]}"
    if where == "moment":
        if "after step " not in ended.said:
            return f"the step is not named: {ended.said[-300:]}"
    else:
        if f"Step {first + 1}, computed again: " not in ended.said:
            return f"the step is not named: {ended.said[-300:]}"
        named = {int(index) for index in re.findall(r"of sample (\d+)", ended.said.rpartition("computed again: ")[2])}
        (spoilt,) = re.findall(r"spoilt: \[(.*)\]", ended.said)
        if not named or not named <= {int(index) for index in spoilt.split(",")}:
            return f"the sample is not named: {ended.said[-300:]}"
    if ends and "Go " not in ended.said:
        return f"how to go on is not said: {ended.said[-300:]}"
    if not ends and ended.said.count("left out: 1") != 1:
        return f"not one step was left out: {ended.said[-200:]}"
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
