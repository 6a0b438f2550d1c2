"""``mtdiffusion bench perf``: what the framework costs beside a loop written by hand, and what further modalities cost.

All in one process, in turn, a few steps each a round, so that a machine whose speed drifts leaves the ratios alone. Of
a ratio the median over the rounds is told, and the range.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtdiffusion import Modality, MultimodalDiffusion, Params, SamplerSettings, composite_loss, sample
from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_engine.data import Batch, ModalityData
from mtdiffusion_engine.experiment import Experiment, structure_experiment
from mtdiffusion_engine.optimisation import Average, SkippedSteps
from mtdiffusion_engine.trainer import Means, Trainer
from mtdiffusion_registry import Registry
from mtdiffusion_registry.config import apply_overrides, load_toml

CONFIGS = (Path("configs/digits-demo.toml"), Path("configs/shapes.toml"))
STEPS = 3  # trained in a turn
SAMPLED = 64
EVALUATIONS = 5  # of the network, in a turn of sampling


@define(eq=False)
class Contender:
    """Something whose turns are timed.

    Attributes:
        name: by which it is told.
        turn: one turn.
        against: the contender it is compared with; "" for one that others are compared with.
        target: the ratio that is wanted at most.
        seconds: of its turns.
        memory: in MiB, see :func:`peak_memory`.
        trainer: of a contender whose work is counted.
    """

    name: str
    turn: Callable[[], object]
    against: str = ""
    target: float | None = None
    seconds: list[float] = field(factory=list)
    memory: float | None = None
    trainer: Trainer | None = None


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
        self.signal, self.sigma = process.signal(t)[:, 0].float(), process.variance(t)[:, 0].sqrt().float()
        self.level = torch.atan2(self.sigma, self.signal) * 2 / math.pi
        self.frequencies = math.pi * 2.0 ** torch.arange(8)

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
        batch, n = len(e), len(self.parts)
        t = torch.randint(1, len(self.signal), (batch,))
        t[torch.rand(batch) < 0.1] = len(self.signal) - 1
        seen = (torch.randint(n, (batch, 1)) == torch.arange(n)) & (torch.rand(batch, 1) < 0.8)
        m, s = self.signal[t][:, None, None, None], self.sigma[t][:, None, None, None]
        z = torch.where(self.by_channel(seen), e, m * e + s * torch.randn_like(e))
        params = self.predict(z, torch.where(seen, 0, self.level[t][:, None]))
        snr = (self.signal[t] / self.sigma[t]).square()
        total = torch.zeros(batch)
        for i, (name, part) in enumerate(zip(self.names, self.parts, strict=True)):
            objective = part.decoder.objective(params[i], x[name])
            total = total + part.loss_weight * snr.clamp(*part.snr_clamp) * objective * ~seen[:, i]
        return total.mean()

    @torch.no_grad()
    def sample(self, batch: int, steps: int) -> list[Tensor]:
        """Joint samples, ancestral."""
        latent = self.parts[0].encoder.latent
        z = torch.randn(batch, sum(self.channels), latent.height, latent.width)
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


def _ours(experiment: Experiment, folder: Path, registry: Registry) -> Trainer:
    return Trainer(experiment, folder, registry, device="cpu", on_message=lambda _: None)


def _train_ours(trainer: Trainer) -> Callable[[], object]:
    batches, told = trainer.batches(10**6), Means(trainer.accelerator)
    skipped = SkippedSteps(trainer.accelerator.device)
    trainer.model.train()

    def turn() -> None:
        for _ in range(STEPS):
            trainer.advance(batches, told, skipped)

    return turn


def _train_lean(model: MultimodalDiffusion, data: ModalityData, experiment: Experiment) -> Callable[[], object]:
    lean = Lean(model).train()
    every: Batch = data.batch(range(min(len(data), 1024)))
    training = experiment.training
    optimizer = torch.optim.AdamW(lean.parameters(), lr=1e-3, betas=(0.9, training.beta2), fused=True)
    average = Average(lean, training.ema)

    def turn() -> None:
        for _ in range(STEPS):
            rows = torch.randint(len(every.presence), (training.batch_size,))
            optimizer.zero_grad()
            torch.autograd.backward(lean({name: x[rows] for name, x in every.x.items()}))
            nn.utils.clip_grad_norm_(lean.parameters(), training.clip)
            optimizer.step()
            average.update(lean)

    return turn


def overhead(path: Path, folder: Path, registry: Registry) -> list[Contender]:
    """Training and sampling of a configuration beside the loop written by hand."""
    name = path.stem
    experiment = structure_experiment(load_toml(path), registry, str(path))
    trainer = _ours(experiment, folder / name, registry)
    other = _ours(experiment, folder / f"{name}-lean", registry)
    settings = SamplerSettings(EVALUATIONS, "ancestral")
    lean = Lean(other.model)
    return [
        Contender(f"{name}, lean training", _train_lean(other.model, other.data, experiment)),
        Contender(f"{name}, training", _train_ours(trainer), f"{name}, lean training", 1.05),
        Contender(f"{name}, lean sampling", partial(lean.sample, SAMPLED, EVALUATIONS)),
        Contender(
            f"{name}, sampling",
            partial(sample, trainer.model, SAMPLED, settings=settings),
            f"{name}, lean sampling",
            1.05,
        ),
    ]


def of_modalities(kind: str, count: int) -> dict[str, Any]:
    """``configs/shapes.toml`` with the image and a number of masks, or of labels, beside it."""
    tables = apply_overrides(load_toml(CONFIGS[1]), ["conditioning.subsets={}", "loss.readout=0.25"])
    image, one = tables["modalities"]["image"], tables["modalities"][kind]
    more = {f"{kind}{i}": {**one, "field": kind} for i in range(count)}
    return {**tables, "modalities": {"image": image, **more}}


FURTHER = {("mask", 1): 1.10, ("mask", 3): 1.20, ("mask", 7): 1.40, ("label", 7): 1.03}
"""How many of what beside the image, and the cost that is wanted at most, as a multiple of the image's alone."""


def further_modalities(folder: Path, registry: Registry) -> list[Contender]:
    """Training the image with further modalities beside the image alone."""
    contenders = []
    for (kind, count), target in {("mask", 0): None, **FURTHER}.items():
        name = f"image + {count} {kind}{'s' if count > 1 else ''}" if count else "image alone"
        experiment = structure_experiment(of_modalities(kind, count), registry, name)
        trainer = _ours(experiment, folder / name.replace(" ", "-"), registry)
        contenders.append(
            Contender(name, _train_ours(trainer), "image alone" if count else "", target, trainer=trainer)
        )
    return contenders


GROUPS: Mapping[str, Callable[[Path, Registry], list[Contender]]] = {
    **{f"overhead: {path.stem}": partial(overhead, path) for path in CONFIGS},
    "further modalities": further_modalities,
}
"""What is timed in turn, by title."""


def flops(model: MultimodalDiffusion, batch: Batch) -> dict[str, float]:
    """Floating-point operations of a training step: all, and those of encoders and heads."""
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(composite_loss(model, batch.x, presence=batch.presence).total.mean())
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    own = sum(value for name, value in counts.items() if name.endswith((".encoder", ".decoder")))
    return {"total": counts["Global"], "encoders and heads": own}


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
        contender = GROUPS[group](Path(name), Registry.discover())[number]
        contender.turn()  # after which the optimizer has its state
        resident = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
        contender.turn()
        send.send((_status("VmHWM") - resident) / 1024)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def race(contenders: Sequence[Contender], rounds: int, say: Callable[[str], None]) -> None:
    """Time the contenders' turns, in turn; the first round warms up and is not counted."""
    for number in range(rounds + 1):
        for contender in contenders:
            started = time.perf_counter()
            contender.turn()
            if number:
                contender.seconds.append(time.perf_counter() - started)
        say(f"round {number} of {rounds}")


def ratios(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Each contender that is compared: median, least and greatest ratio over the rounds."""
    by_name = {contender.name: contender for contender in contenders}
    rows = []
    for contender in contenders:
        if contender.against:
            pairs = zip(contender.seconds, by_name[contender.against].seconds, strict=True)
            found = sorted(mine / theirs for mine, theirs in pairs)
            rows.append(
                {
                    "what": contender.name,
                    "against": contender.against,
                    "ratio": round(statistics.median(found), 3),
                    "least": round(found[0], 3),
                    "greatest": round(found[-1], 3),
                    "target": contender.target,
                    "seconds": round(statistics.median(contender.seconds), 4),
                    "memory": _ratio(contender.memory, by_name[contender.against].memory),
                }
            )
    return rows


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or not theirs else round(mine / theirs, 3)


def measure(rounds: int, threads: int, registry: Registry, say: Callable[[str], None]) -> dict[str, Any]:
    """All that ``bench perf`` measures, as JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = {title: make(folder, registry) for title, make in GROUPS.items()}
        for title, contenders in groups.items():
            say(title)
            race(contenders, rounds, say)
            for number, contender in enumerate(contenders):
                contender.memory = peak_memory(title, number, threads)
        batches = {c.name: c.trainer for c in groups["further modalities"] if c.trainer is not None}
        work = {
            name: flops(trainer.model, trainer.data.batch(range(trainer.config.batch_size)))
            for name, trainer in batches.items()
        }
    return {
        "hardware": hardware("cpu"),
        "version": version("mtdiffusion"),
        "rounds": rounds,
        "ratios": {title: ratios(contenders) for title, contenders in groups.items()},
        "flops": work,
    }


def table(result: Mapping[str, Any]) -> str:
    """The ratios as a table in Markdown."""
    lines = ["| what | beside | time | range | wanted | | peak memory |", "|---|---|---|---|---|---|---|"]
    for rows in result["ratios"].values():
        for row in rows:
            met = "met" if row["ratio"] <= row["target"] else "not met"
            memory = "not measured" if row["memory"] is None else f"{row['memory']:.2f}"
            lines.append(
                f"| {row['what']} | {row['against']} | **{row['ratio']:.2f}** "
                f"| {row['least']:.2f} to {row['greatest']:.2f} | {row['target']:.2f} | {met} | {memory} |"
            )
    return "\n".join(lines)


def flops_table(result: Mapping[str, Any]) -> str:
    """What of a step's work is that of encoders and heads."""
    alone = result["flops"]["image alone"]["total"]
    lines = ["| | work of a training step, of the image's alone | of it, encoders and heads |", "|---|---|---|"]
    for name, counts in result["flops"].items():
        lines.append(f"| {name} | {counts['total'] / alone:.2f} | {counts['encoders and heads'] / alone:.2f} |")
    return "\n".join(lines)
