"""The tables of docs/performance.md, from what the stages kept; what is not there says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MISSING = "not measured"
_COMPILED = ", compiled"
Figures = Mapping[str, Any]


def tables(folder: Path) -> dict[str, str]:
    """By the name of their place in the documents, from a folder of the stages' JSON."""
    stages = ("step", "speed", "dit", "modalities", "sampling", "cifar")
    kept = {stage: _measured(folder / f"{stage}.json") for stage in stages}
    return {
        "gpu: device": _device(kept["step"].get("device")),
        "gpu: step": _step(kept["step"]),
        "gpu: speed": _speed(kept["speed"]),
        "gpu: dit": _dit(kept["dit"]),
        "gpu: modalities": _modalities(kept["modalities"]),
        "gpu: sampling": _sampling(kept["sampling"]),
        "gpu: cifar": _cifar(kept["cifar"]),
    }


def _measured(path: Path) -> dict[str, Figures]:
    """The figures of a stage's parts that were measured; none of a stage of tiny sizes."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"parts": {}}
    parts = {} if kept.get("tiny") else kept["parts"]
    return {name: part["measured"] for name, part in parts.items() if part["status"] == "ok"}


def _cell(found: Figures | None, *keys: str, show: Callable[[Any], str]) -> str:
    value: Any = found
    for key in keys:
        value = None if value is None else value.get(key)
    return MISSING if value is None else show(value)


def _rate(value: float) -> str:
    return f"{value:,.0f}"


def _device(found: Figures | None) -> str:
    if found is None:
        return f"Device: {MISSING}."
    return (
        f"Device: {found.get('device', 'CPU')}, torch {found['torch']}, CUDA {found.get('cuda', 'none')}. "
        f"A large bfloat16 matrix product runs at {found['bf16_matmul_flops'] / 1e12:.0f} TFLOP/s; "
        f"utilisation is told of {found['peak_flops'] / 1e12:.0f} TFLOP/s ({found['peak_from']})."
    )


def _step(parts: Mapping[str, Figures]) -> str:
    lines = [
        "| step of a toy | images/s | peak memory | steps without a wait | graphs | loss beside float64 | gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("float32", "bfloat16", "float32, compiled", "bfloat16, compiled"):
        step, exact = parts.get(f"steps: {name}"), parts.get(f"exactness: {name}")
        cells = [
            _cell(step, "images_per_second", show=_rate),
            _cell(step, "peak_mib", show=lambda mib: f"{mib:,.0f} MiB"),
            _cell(step, "steps_without_a_wait", show=str),
            _cell(step, "graphs", show=str) if _COMPILED in name else "",
            _cell(exact, "loss", show="{:.0e}".format),
            _cell(exact, "gradient", show="{:.0e}".format),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed(parts: Mapping[str, Figures]) -> str:
    lines = ["| what | beside | precision | time | range | images/s |", "|---|---|---|---|---|---|"]
    for name in ("lean loop", "diffusers", "denoising-diffusion-pytorch"):
        for precision in ("float32", "bfloat16", f"bfloat16{_COMPILED}"):
            found = parts.get(f"{name}: {precision}")
            if found is None:
                lines.append(f"| ours | {name} | {precision} | {MISSING} | | |")
            lines += [
                f"| {row['what']} | {row['against']} | {precision} | **{row['ratio']:.2f}** "
                f"| {row['least']:.2f} to {row['greatest']:.2f} | {_rate(row['images_per_second'])} |"
                for row in (found["ratios"] if found else ())
            ]
    return "\n".join(lines)


def _dit(parts: Mapping[str, Figures]) -> str:
    lines = ["| network | batch | images/s | MFU | peak memory |", "|---|---|---|---|---|"]
    for size in ("B/2", "L/2"):
        for compiled in ("", _COMPILED):
            for name in (f"DiT-{size}{compiled}", f"plain DiT-{size}{compiled}"):
                found = parts.get(name)
                cells = [
                    _cell(found, "batch", show=str),
                    _cell(found, "images_per_second", show=_rate),
                    _cell(found, "mfu", show="{:.1%}".format),
                    _cell(found, "peak_mib", show=lambda mib: f"{mib:,.0f} MiB"),
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _modalities(parts: Mapping[str, Figures]) -> str:
    lines = ["| model | modalities | images/s | of the image's alone | compiled | of it |", "|---|---|---|---|---|---|"]
    names = [f"image + {n} {kind}{'' if n == 1 else 's'}" for kind in ("mask", "label") for n in (1, 3, 7)]
    for name in ("image alone", *names):
        cells = []
        for kind in ("", _COMPILED):
            found, alone = parts.get(name + kind), parts.get(f"image alone{kind}")
            cells.append(_cell(found, "images_per_second", show=_rate))
            both = found and alone and found["images_per_second"] / alone["images_per_second"]
            cells.append(f"{both:.2f}" if both else MISSING)
        count = 1 if name == "image alone" else int(name.split()[2]) + 1
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sampling(parts: Mapping[str, Figures]) -> str:
    lines = [
        "| samples | images/s | compiled | its first batches | graphs | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for name in (f"{n} at a time{how}" for how in ("", ", bfloat16") for n in (1, 16, 256)):
        compiled = parts.get(name + _COMPILED)
        cells = [
            _cell(parts.get(name), "images_per_second", show=_rate),
            _cell(compiled, "images_per_second", show=_rate),
            _cell(compiled, "first", show="{:.0f} s".format),
            _cell(compiled, "graphs", show=str),
            _cell(compiled, "difference", show="{:.0e}".format),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cifar(parts: Mapping[str, Figures]) -> str:
    training, found = parts.get("training"), parts.get("evaluation")
    third = "{:.3f}".format
    rows = {
        "training": _cell(training, "seconds", show="{:.0f} s".format),
        "steps": _cell(training, "steps", show=_rate),
        "pictures": _cell(training, "pictures", show=_rate),
        "joint samples: Fréchet distance in the judge's features": _cell(found, "joint/fid_judge", show=third),
        "real held-out pictures: the same": _cell(found, "real/fid_judge", show=third),
        "label → image: the judge reads the label": _cell(found, "image|label/judge_accuracy", show=third),
        "image → label: accuracy": _cell(found, "label|image/accuracy", show=third),
    }
    return "\n".join(["| CIFAR-10, image and label | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows.items())])
