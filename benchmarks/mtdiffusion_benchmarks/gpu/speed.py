"""The framework beside a loop written by hand and beside other libraries, on a device, in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from mtdiffusion_benchmarks import peers
from mtdiffusion_benchmarks.gpu import step
from mtdiffusion_benchmarks.gpu.measuring import Part, Setting, experiment_of, registry
from mtdiffusion_benchmarks.perf import GROUPS, beside_lean
from mtdiffusion_benchmarks.timing import Contender, race, ratios
from mtdiffusion_benchmarks.timing import Setting as Where
from mtdiffusion_registry import Registry, UserError

ROUNDS = 8


def parts(setting: Setting) -> dict[str, Part]:
    """By what it stands beside, in which precision."""
    found: dict[str, Part] = {}
    makes: dict[str, Callable[[Path, Registry, Where], list[Contender]]] = {
        "lean loop": partial(_lean, setting),
        "diffusers": peers.beside_diffusers,
        "denoising-diffusion-pytorch": peers.beside_denoising_diffusion,
    }
    kinds: tuple[tuple[Literal["float32", "bfloat16"], bool], ...]
    kinds = (("float32", False), ("bfloat16", False), ("bfloat16", True))
    for precision, compiled in kinds[:1] if setting.tiny else kinds:
        batch = 2 if setting.tiny else 128
        where = Where(setting.device, precision, compiled, large=not setting.tiny, batch=batch)
        for name, make in makes.items():
            title = f"{name}: {precision}{', compiled' if compiled else ''}"
            found[title] = partial(_race, setting, f"peers: {name}", make, where)
    return found


def _lean(setting: Setting, folder: Path, registry: Registry, where: Where) -> list[Contender]:
    return beside_lean("image, mask, label", experiment_of(step.toy(setting), setting), folder, registry, where)


def _race(
    setting: Setting, group: str, make: Callable[[Path, Registry, Where], list[Contender]], where: Where
) -> dict[str, Any]:
    if group in GROUPS and (why := GROUPS[group].left_out):
        raise UserError(f"{why}; benchmarks/gpu/pack.sh packs them")
    torch._dynamo.reset()
    setting.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=setting.work) as name:
        contenders = make(Path(name), registry(), where)
        race(contenders, 1 if setting.tiny else ROUNDS, lambda _: None, where)
        rows = ratios(contenders)
        rates = {each.name: each.images_per_second for each in contenders}
        memory = {each.name: _peak(each, where) for each in contenders} if setting.cuda else None
    return {"ratios": rows, "images_per_second": rates, "peak_mib": memory}


def _peak(contender: Contender, where: Where) -> float:
    """The most memory that a turn takes above what all contenders hold together, in MiB."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    contender.turn()
    where.wait()
    return (torch.cuda.max_memory_allocated() - held) / 2**20
