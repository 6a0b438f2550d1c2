"""Run folders and checkpoints: safetensors and JSON, written whole or not at all.

::

    RUN/config.toml                      the resolved experiment
    RUN/plugins.json                     where each of its kinds came from: distribution, version, module
    RUN/checkpoints/step-00005000/       model, ema, optimizer (.safetensors) and state.json (with the experiment)
    RUN/tensorboard/

An exported run (:mod:`mtdiffusion_engine.hub`) has the averaged weights alone: ``ema.safetensors`` and ``state.json``
lie beside ``config.toml``.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtdiffusion_registry import UserError
from mtdiffusion_registry.partial import partial_of, remove_abandoned

PREFIX = "step-"
ASIDE = "-diverged"
"""What is added to the name of a checkpoint from which training cannot go on."""
_PARTIAL = re.compile(r"\.step-[0-9]{8,}\.[0-9]+")
_REMEDY = "remove that checkpoint to fall back on the one before (of an exported run: export or fetch it again)"
FORMAT = 2
"""Of what a checkpoint's weights mean: 2 since a network is shown each modality's clock (version 0.2)."""


def require_free(folder: Path) -> None:
    """Raise ``UserError`` if an output folder holds anything already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; nothing was written. Give another folder, or remove it first.")


def require_no_run(run: Path) -> None:
    """Raise ``UserError`` if a folder for a new run holds anything already; of a run that can go on, it says how."""
    if (run / "config.toml").is_file() and (checkpoints := list_checkpoints(run)):
        step = step_of(checkpoints[-1])
        raise UserError(
            f"{run}: already exists; nothing was written. It holds a run of {step:,} step{'s' * (step != 1)}. To go on "
            f"with it: {resume_command(run)}. To start afresh, give another folder, or remove this one first."
        )
    require_free(run)


def remove_unmade(run: Path) -> None:
    """Empty a run's folder whose making was cut short: there is no ``config.toml``, and nothing but what comes before
    it."""
    if (run / "config.toml").exists() or not (run / "plugins.json").is_file():
        for name in ("plugins.json", "config.toml"):
            remove_abandoned(run / name)
        return
    checkpoints = list((run / "checkpoints").glob("*"))
    unfinished = re.compile(r"plugins\.json|checkpoints|\.config\.toml\.[0-9]+")
    if all(unfinished.fullmatch(path.name) for path in run.iterdir()) and all(
        step_of(path) == 0 or _PARTIAL.fullmatch(path.name) for path in checkpoints
    ):
        with alone_in(run):
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
            remove_abandoned(run / "config.toml")
            (run / "plugins.json").unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, sort_keys=sort_keys) + "\n"
    with partial_of(path) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each contiguous, on the CPU and in memory of its own, as safetensors asks.

    A constant of an encoder and its decoder, or a tied weight, is often one tensor under two names. Both are written;
    they are read into one again.
    """
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        stored[key] = tensor
    return stored


def save_checkpoint(
    run: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint under a temporary name, then rename it; only then are older ones removed.

    What else lies beside checkpoints is its owner's, and stays.

    Raises:
        UserError: if there is no room for it.
    """
    remove_partial(run)
    partial = partial_checkpoint(run, step, os.getpid())
    partial.mkdir(parents=True)
    try:
        for name, tensors in {"model": model, "ema": ema, "optimizer": moments(optimizer)}.items():
            save_file(_storable(tensors), partial / f"{name}.safetensors")
    except SafetensorError as error:  # in which safetensors wraps what the system says
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{run}: the checkpoint of step {step} cannot be written ({error}); those before it are whole. Make room, "
            f"then go on with: {resume_command(run)}"
        ) from error
    return finish_checkpoint(run, step, partial, state, keep)


def partial_checkpoint(run: Path, step: int, writer: int = 0) -> Path:
    """Where a checkpoint is written before it is one; ``writer`` tells it from others' of the same step."""
    return run / "checkpoints" / f".{name_of(step)}.{writer}"


def remove_partial(run: Path) -> None:
    """Remove checkpoints of which the writing was cut short."""
    for stale in (run / "checkpoints").glob(f".{PREFIX}*"):
        if _PARTIAL.fullmatch(stale.name):
            shutil.rmtree(stale, ignore_errors=True)


def tidy(run: Path, keep: int) -> None:
    """Remove what a process that was killed left: checkpoints cut short, and older ones than the last ``keep``."""
    remove_partial(run)
    for old in list_checkpoints(run)[:-keep]:
        if not old.is_symlink():  # which we never make
            removed = partial_checkpoint(run, step_of(old) or 0, os.getpid())
            shutil.rmtree(old.rename(removed))  # renamed first, so that nothing that is cut short looks whole


def finish_checkpoint(run: Path, step: int, partial: Path, state: dict[str, Any], keep: int) -> Path:
    """Make a checkpoint of what is written but for ``state.json``; then older ones are removed."""
    final = run / "checkpoints" / name_of(step)
    write_json(partial / "state.json", {**state, "step": step, "format": FORMAT})
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    tidy(run, keep)
    return final


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as ``INDEX.KEY``, by the place of each parameter in it."""
    return {
        f"{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint by its name; None if that is no checkpoint's, but say a copy's that someone keeps."""
    digits = checkpoint.name.removeprefix(PREFIX)
    step = int(digits) if digits.isascii() and digits.isdigit() else -1
    return step if step >= 0 and checkpoint.name == name_of(step) else None


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = {step_of(path): path for path in (run / "checkpoints").glob(f"{PREFIX}*") if path.is_dir()}
    return [found[step] for step in sorted(step for step in found if step is not None)]


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that it is none any more; its new path."""
    aside = checkpoint.with_name(checkpoint.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def resume_command(run: Path, *overrides: str) -> str:
    """What to type to go on with a run, its configuration changed by ``KEY=VALUE`` arguments."""
    return shlex.join(
        ["mtdiffusion", "train", "--resume", "--out", str(run), *(["--set", *overrides] if overrides else [])]
    )


def is_exported(run: Path) -> bool:
    """Whether a folder is an exported run, which can be used but not resumed."""
    return (run / "ema.safetensors").is_file()


def require_run(run: Path) -> Path:
    """The folder of the run's weights: its newest checkpoint, or of an exported run the run itself.

    Raises:
        UserError: if the folder is missing, is no run, has no checkpoint yet, or was made by another version.
    """
    if not run.is_dir():
        raise UserError(f"{run}: expected the folder of a run, found {'a file' if run.exists() else 'nothing'}")
    if not (run / "config.toml").is_file():
        raise UserError(f"{run}: not the folder of a run (it has no config.toml); `mtdiffusion train --out` makes one")
    checkpoints = [run] if is_exported(run) else list_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run}: this run has no checkpoint yet; train it: {resume_command(run)}")
    load_state(checkpoints[-1])
    return checkpoints[-1]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing from the checkpoint; {_REMEDY}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); {_REMEDY}, or train again") from None


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Load a module's weights.

    Raises:
        UserError: if they are missing, damaged, or not this module's.
    """
    tensors = load_tensors(path)
    if misfit := misfits(module, tensors):
        raise UserError(f"{path}: these weights belong to another model than config.toml describes ({misfit})")
    _require_finite({name: tensors[name] for name, _ in module.named_parameters()}, path)
    state = module.state_dict()
    try:
        module.load_state_dict({key: as_it_lies(x, state[key]) for key, x in tensors.items()})
    except RuntimeError as error:  # of a module that reads them in a way of its own
        detail = " ".join(str(error).split())[:400]
        raise UserError(f"{path}: these weights cannot be loaded ({detail})") from None


def _require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that numbers are numbers: with one that is not, all that follows from it is lost.

    Raises:
        UserError: if a value is NaN or infinite; the message names its tensor.
    """
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise UserError(f"{path}: damaged ({name} holds NaN or infinity); {_REMEDY}")


def misfits(module: torch.nn.Module, tensors: dict[str, Tensor], most: int = 3) -> str:
    """What keeps tensors from being a module's: the first few that differ by name; empty if they fit."""
    found, expected = ({key: list(x.shape) for key, x in each.items()} for each in (tensors, module.state_dict()))
    differ = [
        f"{key} is {found.get(key, 'missing')}, expected {expected.get(key, 'none of that name')}"
        for key in [*expected, *sorted(found.keys() - expected.keys())]
        if found.get(key) != expected.get(key)
    ]
    more = f"; and {len(differ) - most} more" if len(differ) > most else ""
    return "; ".join(differ[:most]) + more


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore an optimizer's state, over the same parameters in the same order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    tensors = load_tensors(path)
    _require_finite(tensors, path)
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise UserError(f"{path}: damaged (found {key!r}, expected PARAMETER.NAME of this model's); {_REMEDY}")
        parameter = parameters[int(index)]
        of_each_weight = value.shape == parameter.shape
        state.setdefault(int(index), {})[name] = as_it_lies(value, parameter) if of_each_weight else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def as_it_lies(tensor: Tensor, counterpart: Tensor) -> Tensor:
    """A whole tensor; where its counterpart is split over processes, split like that."""
    mesh = getattr(counterpart, "device_mesh", None)  # whether it is a DTensor; its import takes a second
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(counterpart, DTensor)
    return distribute_tensor(tensor, mesh, counterpart.placements, src_data_rank=None)  # each has it whole


def load_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        UserError: if it is missing or damaged, of another format than this version's, or of another step than its
            folder's name says.
    """
    path = checkpoint / "state.json"
    state = read_json(path, _REMEDY)
    for key in ("format", "step", "ema_updates", "samples"):  # whichever of them are there
        if key in state and (type(state[key]) is not int or state[key] < 0):
            raise UserError(f"{path}: damaged ({key} is {state[key]!r}, expected a number of 0 or more); {_REMEDY}")
    found = state.get("format", 1)
    if found != FORMAT:
        with_ = "mtdiffusion 0.1" if found == 1 else "a newer mtdiffusion"
        raise UserError(
            f"{checkpoint}: made by {with_} (format {found}, expected {FORMAT}): its network is shown other things "
            f"than this version's, so its weights cannot be used. Train it anew into another folder, or use {with_}"
        )
    if "step" not in state:
        raise UserError(f"{path}: damaged (it has no step); {_REMEDY}")
    named = step_of(checkpoint) if checkpoint.parent.name == "checkpoints" else None  # an exported run has any name
    if named not in (None, state["step"]):
        raise UserError(
            f"{path}: is of step {state['step']}, and its folder is named {checkpoint.name}, so that one of them is of "
            f"another checkpoint. If the folder was renamed, name it {name_of(state['step'])} again; else remove it to "
            "fall back on the one before"
        )
    return state


def read_json(path: Path, remedy: str = "remove it and make it again") -> dict[str, Any]:
    """An object that :func:`write_json` wrote.

    Raises:
        UserError: if it is missing or damaged; the message ends with the remedy.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}; {remedy}")
    return value


@contextmanager
def alone_in(run: Path, doing: str = "training this run") -> Iterator[None]:
    """Keep other processes out of a folder, as far as they ask. The system ends it when a process ends, however.

    Args:
        run: the folder.
        doing: what the process that is in it is doing.

    Raises:
        UserError: if another process is in it.
    """
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run}: another process is {doing}. Wait until it is done, or give another folder"
            ) from None
        except OSError:  # a file system that knows no locks
            pass
        yield
    finally:
        os.close(folder)
