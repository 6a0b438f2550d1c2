"""``mtdiffusion bench perf``: what the framework costs beside a loop written by hand and beside other libraries, what
further modalities cost, and how long it takes to start.

See :mod:`mtdiffusion_benchmarks.timing`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtdiffusion import Modality, MultimodalDiffusion, Params, SamplerSettings, composite_loss, sample
from mtdiffusion_benchmarks import launching, peers
from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_benchmarks.timing import (
    EVALUATIONS,
    SAMPLED,
    STEPS,
    Contender,
    Setting,
    count_parameters,
    ours,
    race,
    ratios,
    train_ours,
)
from mtdiffusion_engine.data import Batch, ModalityData
from mtdiffusion_engine.environment import native_bfloat16
from mtdiffusion_engine.experiment import Experiment, structure_experiment
from mtdiffusion_engine.optimisation import Average
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import apply_overrides, load_toml

CONFIGS = (Path("configs/digits-demo.toml"), Path("configs/shapes.toml"))


class Lean(nn.Module):
    """What one would write by hand for the parts of one model: one clock for all, one modality seen in some samples.

    Backbone, encoders, heads and their objectives are the model's own, and the backbone is shown what the framework
    shows it; nothing is general.
    """

    def __init__(self, model: MultimodalDiffusion) -> None:
        super().__init__()
        self.parts: list[Modality] = [model.modality(name) for name in model.names]
        self.registered = nn.ModuleList(self.parts)
        self.names, self.backbone = model.names, model.backbone
        self.channels = [part.encoder.latent.channels for part in self.parts]
        process = model.process
        t = torch.arange(process.steps + 1)[:, None].expand(-1, len(self.names))
        t = t.to(model.device)
        self.signal, self.sigma = process.signal(t)[:, 0].float(), process.variance(t)[:, 0].sqrt().float()
        self.level = torch.atan2(self.sigma, self.signal) * 2 / math.pi
        self.frequencies = math.pi * 2.0 ** torch.arange(8, device=model.device)

    def by_channel(self, values: Tensor) -> Tensor:
        """``[B, N]`` as ``[B, C, 1, 1]``."""
        each = [values[:, i : i + 1].expand(-1, count) for i, count in enumerate(self.channels)]
        return torch.cat(each, 1)[:, :, None, None]

    def predict(self, z: Tensor, level: Tensor) -> list[Params]:
        """The heads' parameters, from z and the noise levels ``[B, N]``."""
        maps = level[:, :, None, None].expand(-1, -1, *z.shape[2:])
        angles = level[:, :, None] * self.frequencies
        clean = z * self.by_channel(level == 0)
        readouts = [
            part.encoder.readout(block)
            for source in (z, clean)
            for part, block in zip(self.parts, torch.split(source, self.channels, 1), strict=True)
        ]
        vector = torch.cat([angles.sin().flatten(1), angles.cos().flatten(1), level, *readouts], 1)
        features = self.backbone(torch.cat([z, clean, maps], 1), level.amax(1), vector)
        return [part.decoder(features) for part in self.parts]

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        e = torch.cat([part.encoder(x[name]) for name, part in zip(self.names, self.parts, strict=True)], 1)
        batch, n, last, device = len(e), len(self.parts), len(self.signal) - 1, e.device
        t = torch.randint(1, last + 1, (batch,), device=device)
        t = torch.where(torch.rand(batch, device=device) < 0.1, last, t)
        chosen = torch.randint(n, (batch, 1), device=device) == torch.arange(n, device=device)
        seen = chosen & (torch.rand(batch, 1, device=device) < 0.8)
        m, s = self.signal[t][:, None, None, None], self.sigma[t][:, None, None, None]
        z = torch.where(self.by_channel(seen), e, m * e + s * torch.randn_like(e))
        params = self.predict(z, torch.where(seen, 0, self.level[t][:, None]))
        snr = (self.signal[t] / self.sigma[t]).square()
        total = torch.zeros(batch, device=device)
        for i, (name, part) in enumerate(zip(self.names, self.parts, strict=True)):
            objective = part.decoder.objective(params[i], x[name])
            total = total + part.loss_weight * snr.clamp(*part.snr_clamp) * objective * ~seen[:, i]
        return total.mean()

    @torch.no_grad()
    def sample(self, batch: int, steps: int) -> list[Tensor]:
        """Joint samples, ancestral."""
        latent = self.parts[0].encoder.latent
        z = torch.randn(batch, sum(self.channels), latent.height, latent.width, device=self.signal.device)
        times = torch.linspace(len(self.signal) - 1, 0, steps + 1).round().long().tolist()
        for t, s in pairwise(times):
            params = self.predict(z, self.level[t].expand(batch, len(self.parts)))
            heads = zip(self.parts, params, strict=True)
            e = torch.cat([part.decoder.expected_encoding(head, part.encoder) for part, head in heads], 1)
            m, sd, ms, ss = self.signal[t], self.sigma[t], self.signal[s], self.sigma[s]
            epsilon = (z - m * e) / sd
            new = ss**2 * (1 - (1 - sd**2) / (1 - ss**2)) / sd**2
            z = ms * e + (ss**2 - new).clamp(min=0).sqrt() * epsilon + new.sqrt() * torch.randn_like(z)
        return [part.decoder.mode(head) for part, head in zip(self.parts, params, strict=True)]


def _train_lean(
    model: MultimodalDiffusion, data: ModalityData, experiment: Experiment, setting: Setting
) -> Callable[[], object]:
    lean = Lean(model).train()
    if setting.compile:
        lean.compile(dynamic=False)
    every: Batch = data.batch(range(min(len(data), 1024))).to(torch.device(setting.device))
    training = experiment.training
    optimizer = torch.optim.AdamW(lean.parameters(), lr=1e-3, betas=(0.9, training.beta2), fused=True)
    average = Average(lean, training.ema)

    def turn() -> None:
        for _ in range(STEPS):
            rows = torch.randint(len(every.presence), (training.batch_size,), device=setting.device)
            optimizer.zero_grad()
            with setting.autocast:
                loss = lean({name: x[rows] for name, x in every.x.items()})
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(lean.parameters(), training.clip)
            optimizer.step()
            average.update(lean)

    return turn


def overhead(path: Path, folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
    """Training and sampling of a configuration beside the loop written by hand."""
    name = path.stem
    experiment = structure_experiment(load_toml(path), registry, str(path))
    return beside_lean(name, experiment, folder, registry, setting)


def beside_lean(
    name: str, experiment: Experiment, folder: Path, registry: Registry, setting: Setting
) -> list[Contender]:
    """The same of an experiment."""
    trainer = ours(experiment, folder / name, registry, setting)
    other = ours(experiment, folder / f"{name}-lean", registry, setting)
    settings = SamplerSettings(EVALUATIONS, "ancestral")
    lean = Lean(other.model)
    lean_training = _train_lean(other.model, other.data, experiment, setting)
    trained = STEPS * experiment.training.batch_size
    draw = partial(sample, trainer.model, SAMPLED, settings=settings)
    against = f"{name}, lean training", f"{name}, lean sampling"
    return [
        Contender(against[0], lean_training, images=trained),
        Contender(f"{name}, training", train_ours(trainer), against[0], 1.05, images=trained),
        Contender(against[1], partial(lean.sample, SAMPLED, EVALUATIONS), images=SAMPLED),
        Contender(f"{name}, sampling", draw, against[1], 1.05, images=SAMPLED),
    ]


def of_modalities(kind: str, count: int) -> dict[str, Any]:
    """``configs/shapes.toml`` with the image and a number of masks, or of labels, beside it."""
    tables = apply_overrides(load_toml(CONFIGS[1]), ["conditioning.subsets={}", "loss.readout=0.25"])
    image, one = tables["modalities"]["image"], tables["modalities"][kind]
    more = {f"{kind}{i}": {**one, "field": kind} for i in range(count)}
    return {**tables, "modalities": {"image": image, **more}}


FURTHER = {("mask", 1): 1.10, ("mask", 3): 1.20, ("mask", 7): 1.40, ("label", 7): 1.03}
"""How many of what beside the image, and the cost that is wanted at most, as a multiple of the image's alone."""


def further_modalities(folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
    """Training the image with further modalities beside the image alone."""
    contenders = []
    for (kind, count), target in {("mask", 0): None, **FURTHER}.items():
        name = f"image + {count} {kind}{'s' if count > 1 else ''}" if count else "image alone"
        experiment = structure_experiment(of_modalities(kind, count), registry, name)
        trainer = ours(experiment, folder / name.replace(" ", "-"), registry, setting)
        images = STEPS * experiment.training.batch_size
        against = "image alone" if count else ""
        contenders.append(Contender(name, train_ours(trainer), against, target, trainer=trainer, images=images))
    return contenders


def one_or_many(folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
    """A step of one model of an image and three masks beside a step of each of four models, of one of them each."""
    tables = of_modalities("mask", 3)
    models = {name: {name: table} for name, table in tables["modalities"].items()} | {"all": tables["modalities"]}
    turns, images, parameters = {}, 0, {}
    for name, modalities in models.items():
        experiment = structure_experiment({**tables, "modalities": modalities}, registry, name)
        trainer = ours(experiment, folder / f"of-{name}", registry, setting)
        turns[name] = train_ours(trainer)
        parameters[name] = count_parameters(trainer.model)
        images = STEPS * experiment.training.batch_size
    joint, size = turns.pop("all"), parameters.pop("all")
    many, sizes = f"{len(turns)} models of one modality each", sum(parameters.values())
    return [
        Contender(many, lambda: [turn() for turn in turns.values()], images=images, parameters=sizes),
        Contender(f"one model of {len(turns)} modalities", joint, many, images=images, parameters=size),
    ]


def sampling_otherwise(
    how: str, changes: Mapping[str, Any], folder: Path, registry: Registry, setting: Setting
) -> list[Contender]:
    """Sampling with some settings changed, which ``how`` tells, beside the same sampling as it is."""
    contenders = []
    for path in CONFIGS:
        experiment = structure_experiment(load_toml(path), registry, str(path))
        model = ours(experiment, folder / path.stem, registry, setting).model.eval()
        usual = SamplerSettings(EVALUATIONS, "ancestral")
        against = f"{path.stem}, sampling"
        contenders += [
            Contender(against, partial(sample, model, SAMPLED, settings=usual), images=SAMPLED),
            Contender(
                f"{against} {how}",
                partial(sample, model, SAMPLED, settings=evolve(usual, **changes)),
                against,
                images=SAMPLED,
            ),
        ]
    return contenders


def training_in_bfloat16(folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
    """Training in bfloat16 beside the same training in float32."""
    contenders = []
    for path in CONFIGS:
        experiment = structure_experiment(load_toml(path), registry, str(path))
        against = f"{path.stem}, training"
        for name, precision in ((against, "float32"), (f"{against} in bfloat16", "bfloat16")):
            where = evolve(setting, precision=precision)  # type: ignore[arg-type]
            trainer = ours(experiment, folder / name, registry, where)
            images = STEPS * experiment.training.batch_size
            contenders.append(Contender(name, train_ours(trainer), against if name != against else "", images=images))
    return contenders


def loading(folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
    """Batches of a folder of pictures and masks as they are stored, made values on the device, beside batches that were
    values all the way."""
    count, size, rng = 256, 64, np.random.default_rng(0)
    for name, shape in (("image", (size, size, 3)), ("mask", (size, size))):
        (folder / "data" / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256 if name == "image" else 6, shape, np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{index:03d}.png")
    tables = {
        "data": {
            "kind": "folder",
            "root": str(folder / "data"),
            "fields": {"image": "image", "mask": "mask"},
            "test_fraction": 0,
        },
        "latent": {"height": 16, "width": 16},
        "modalities": {
            "image": {"kind": "image", "size": size},
            "mask": {"kind": "mask", "size": size, "classes": 6},
        },
        "backbone": {"kind": "unet", "channels": 8, "multipliers": [1]},
        "training": {"batch_size": 64},
    }
    experiment = structure_experiment(tables, registry, "loading")
    contenders: list[Contender] = []
    against = "batches that are values all the way"
    for name in (against, "batches as they are stored"):
        trainer = ours(experiment, folder / name, registry, setting)
        if not contenders:
            for modality in trainer.data.modalities.values():
                modality.stored_dtypes = ()
        turn = partial(_load, trainer, trainer.batches(10**6), torch.device(setting.device))
        images = STEPS * experiment.training.batch_size
        contenders.append(Contender(name, turn, against if contenders else "", images=images))
    return contenders


def _load(trainer: Trainer, batches: Iterator[Batch], device: torch.device) -> None:
    for _ in range(STEPS):
        trainer.data.values(next(batches).to(device))


@frozen
class Group:
    """Contenders that are timed in turn.

    Attributes:
        make: builds them; what they write goes into the folder.
        memory: whether each one's peak is measured, in a process of its own.
        needs: modules without which the group is left out.
        native: whether it is left out where the processor does not multiply bfloat16.
    """

    make: Callable[[Path, Registry, Setting], list[Contender]]
    memory: bool = True
    needs: tuple[str, ...] = ()
    native: bool = False

    @property
    def left_out(self) -> str:
        """Why it cannot be timed here; "" if it can."""
        if absent := [name for name in self.needs if find_spec(name) is None]:
            return f"not installed: {', '.join(absent)}"
        if self.native and not native_bfloat16(torch.device("cpu")):
            return "this processor does not multiply bfloat16"
        return ""


PEERS = {
    "diffusers": (peers.beside_diffusers, ("diffusers",), 1 / 2.5),
    "denoising-diffusion-pytorch": (
        peers.beside_denoising_diffusion,
        ("denoising_diffusion_pytorch", "ema_pytorch"),
        1 / 3,
    ),
}
"""Other libraries: what makes the contenders, the modules it needs, and the share of their time that is wanted."""

GROUPS: Mapping[str, Group] = {
    **{f"overhead: {path.stem}": Group(partial(overhead, path)) for path in CONFIGS},
    "further modalities": Group(further_modalities),
    "one model or many": Group(one_or_many),
    **{f"peers: {name}": Group(make, needs=needs) for name, (make, needs, _) in PEERS.items()},
    **{
        f"peers in bfloat16: {name}": Group(peers.in_bfloat16(name, make, target), needs=needs, native=True)
        for name, (make, needs, target) in PEERS.items()
    },
    "compiled sampling": Group(partial(sampling_otherwise, "compiled", {"compile": True}), memory=False),
    "training in bfloat16": Group(training_in_bfloat16, memory=False, native=True),
    "sampling in bfloat16": Group(
        partial(sampling_otherwise, "in bfloat16", {"precision": "bfloat16"}), memory=False, native=True
    ),
    "loading": Group(loading, memory=False),
    "freed memory": Group(launching.freed_memory, memory=False),
    "start-up": Group(launching.contenders, memory=False),
}
"""What is timed in turn, by title."""


def work(contender: Contender) -> float:
    """Floating-point operations that a contender takes for an image, in a turn of its own; 0 if it has none."""
    if not contender.images:
        return 0.0
    with FlopCounterMode(display=False) as counter:
        contender.turn()
    return float(counter.get_total_flops()) / contender.images


def flops(model: MultimodalDiffusion, batch: Batch) -> dict[str, float]:
    """Floating-point operations of a training step: all, and those of encoders and heads.

    The counter takes an operation of the backward pass for that of every module still open, so a module's own are
    counted in the forward pass alone. Back through a layer there are two products of the size of the one forward.
    """
    with FlopCounterMode(display=False) as counter:
        loss = composite_loss(model, batch.x, presence=batch.presence).total.mean()
        forward = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        torch.autograd.backward(loss)
        total = counter.get_total_flops()
    own = sum(value for name, value in forward.items() if name.endswith((".encoder", ".decoder")))
    return {"total": total, "encoders and heads": 3 * own}


_EAGER = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""glibc then gives back what is freed at once, so that what is resident is what is in use."""


def peak_memory(group: str, number: int, threads: int) -> float | None:
    """Memory that a contender's turn takes at most above what is resident between turns, in MiB, measured in a process
    of its own; None where the system does not tell it."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    before = {name: os.environ.get(name) for name in _EAGER}
    os.environ.update(_EAGER)
    try:
        process = context.Process(target=_measure_memory, args=(send, group, number, threads))
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    try:
        return float(receive.recv())
    finally:
        process.join()


def _measure_memory(send: Connection, group: str, number: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        contender = GROUPS[group].make(Path(name), Registry.discover(), Setting())[number]
        contender.turn()  # after which the optimizer has its state
        resident = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
        contender.turn()
        send.send((_status("VmHWM") - resident) / 1024)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def chosen(only: Sequence[str] = ()) -> dict[str, Group]:
    """The groups whose titles match one of the patterns, with ``*`` for anything; without patterns all.

    Raises:
        UserError: if a pattern matches none.
    """
    for pattern in only:
        if not any(fnmatch(title, pattern) for title in GROUPS):
            raise UserError(f"--only: no group matches {pattern!r}; there are {', '.join(map(repr, GROUPS))}")
    return {
        title: group for title, group in GROUPS.items() if not only or any(fnmatch(title, pattern) for pattern in only)
    }


def measure(
    rounds: int,
    threads: int,
    registry: Registry,
    say: Callable[[str], None],
    only: Sequence[str] = (),
    *,
    memory: bool = True,
    before: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """All that ``bench perf`` measures, as JSON.

    Args:
        only: measure these groups.
        before: what was measured of other groups, by this version on this machine; anything else is left out.
        keep: given all that is measured so far after each group: a later one may fail, and they take minutes.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    groups, setting = chosen(only), Setting()
    result: dict[str, Any] = {"hardware": hardware("cpu"), "version": version("mtdiffusion"), "rounds": rounds}
    comparable = before is not None and all(before.get(key) == value for key, value in result.items())
    for key in ("ratios", "left_out", "flops"):
        result[key] = dict(before[key]) if before is not None and comparable else {}
    for title, group in groups.items():
        result["ratios"].pop(title, None)
        result["left_out"].pop(title, None)
        if why := group.left_out:
            result["left_out"][title] = why
            say(f"{title}: {why}")
            continue
        say(title)
        with tempfile.TemporaryDirectory() as name:
            contenders = group.make(Path(name), registry, setting)
            race(contenders, rounds, say, setting)
            for contender in contenders:
                contender.work = work(contender)
            for number, contender in enumerate(contenders if memory and group.memory else ()):
                contender.memory = peak_memory(title, number, threads)
        found = {**result["ratios"], title: ratios(contenders)}
        result["ratios"] = {each: found[each] for each in GROUPS if each in found}
        for row in result["ratios"][title]:
            rate = "" if row["images_per_second"] is None else f", {row['images_per_second']:.1f} images a second"
            say(
                f"{row['what']}: {row['ratio']:.2f} of {row['against']}{rate}; the first turn took {row['first']:.1f} s"
            )
        for contender in contenders:
            if (trainer := contender.trainer) is not None:
                batch = trainer.data.batch(range(trainer.config.batch_size))
                result["flops"][contender.name] = flops(trainer.model, batch)
        keep(result)
    return result


def table(result: Mapping[str, Any]) -> str:
    """The ratios as a table in Markdown."""
    lines = ["| what | beside | time | range | wanted | | work | peak memory |", "|---|---|---|---|---|---|---|---|"]
    for rows in result["ratios"].values():
        for row in rows:
            wanted = "| |"
            if row["target"] is not None:
                wanted = f"{row['target']:.2f} | {'met' if row['ratio'] <= row['target'] else 'not met'} |"
            memory = "not measured" if row["memory"] is None else f"{row['memory']:.2f}"
            operations = "" if row.get("work") is None else f"{row['work']:.2f}"
            lines.append(
                f"| {row['what']} | {row['against']} | **{row['ratio']:.2f}** "
                f"| {row['least']:.2f} to {row['greatest']:.2f} | {wanted} {operations} | {memory} |"
            )
    lines += [f"| {title} | {why} | not measured | | | | | |" for title, why in result.get("left_out", {}).items()]
    return "\n".join(lines)


def flops_table(result: Mapping[str, Any]) -> str:
    """What of a step's work is that of encoders and heads."""
    if "image alone" not in result["flops"]:
        return "not measured"
    alone = result["flops"]["image alone"]["total"]
    lines = ["| | work of a training step, of the image's alone | of it, encoders and heads |", "|---|---|---|"]
    for name, counts in result["flops"].items():
        lines.append(f"| {name} | {counts['total'] / alone:.2f} | {counts['encoders and heads'] / alone:.2f} |")
    return "\n".join(lines)
