"""``mtdiffusion bench reading``: how many samples a second data sets give, and how much memory over several epochs.

Pictures of 32 × 32 pixels as JPEG with a label: in a folder, in tar shards and, where the libraries ``datasets`` and
``litdata`` are installed, in Parquet and in litdata's shards. Each is read by a process of its own, sample by sample,
in another random order each epoch, as a training reads it.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_benchmarks.startup import CLASSES, write_pictures
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.cache import CACHE_VARIABLE

SHARD = 1000
"""Samples of a shard."""
_FIELDS = {"image": "image", "label": "label"}
_DATA: dict[str, dict[str, Any]] = {
    "folder, decoded once": {"kind": "folder", "root": "table", "size": 32, "fields": _FIELDS},
    "webdataset": {"kind": "webdataset", "root": "shards", "size": 32, "test_fraction": 0, "fields": _FIELDS},
    "huggingface, of Parquet": {
        "kind": "huggingface",
        "path": "rows.parquet",
        "size": 32,
        "test_fraction": 0,
        "fields": _FIELDS,
    },
    "litdata, packed": {"kind": "litdata", "root": "packed"},
}
_LIBRARIES = {"huggingface, of Parquet": "datasets", "litdata, packed": "litdata"}


def measure(count: int, epochs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Samples a second of each epoch, and the memory of the process after it.

    Raises:
        UserError: if a data set cannot be read.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mtdiffusion-bench-reading-") as name:
        folder = Path(name)
        say(f"writing {count:,} pictures")
        write_pictures(folder, count)
        samples = sorted((folder / "table/train/image").iterdir())
        _write_shards(samples, folder / "shards")
        absent = [what for what, library in _LIBRARIES.items() if not _there(library)]
        if "huggingface, of Parquet" not in absent:
            _write_parquet(samples, folder / "rows.parquet")
        if "litdata, packed" not in absent:
            _run(folder, "-c", _PACK)
        for what in _DATA:
            if what in absent:
                say(f"{what}: left out, since {_LIBRARIES[what]} is not installed")
                continue
            row: dict[str, Any] = {"data": what, **_read(folder, what, epochs)}
            say(f"{what}: {max(row['rates']):,.0f} samples/s, {row['memory'][0]:.0f} to {row['memory'][-1]:.0f} MiB")
            rows.append(row)
    return {
        "pictures": count,
        "epochs": epochs,
        "rows": rows,
        "hardware": hardware("cpu"),
        "version": version("mtdiffusion"),
    }


def _there(library: str) -> bool:
    """Whether a library is installed; a mere folder of its name has no origin."""
    found = find_spec(library)
    return found is not None and found.origin is not None


_PACK = """
from pathlib import Path
from mtdiffusion_engine.packing import pack_data
from mtdiffusion_benchmarks.reading import data_of
pack_data(data_of("folder, decoded once"), type(data_of("litdata, packed")), Path("packed"))
"""


def data_of(what: str) -> Any:
    """The configuration of a data set in the current folder."""
    options = dict(_DATA[what])
    return Registry.discover().config_class("dataset", options.pop("kind"))(**options)


def _write_shards(pictures: list[Path], folder: Path) -> None:
    folder.mkdir()
    for start in range(0, len(pictures), SHARD):
        with tarfile.open(folder / f"{start // SHARD:05d}.tar", "w") as tar:
            for index, path in enumerate(pictures[start : start + SHARD], start):
                for suffix, content in (("image.jpg", path.read_bytes()), ("label.cls", str(index % CLASSES).encode())):
                    member = tarfile.TarInfo(f"{path.stem}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _write_parquet(pictures: list[Path], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in pictures]
    labels = [index % CLASSES for index in range(len(pictures))]
    parquet.write_table(pyarrow.table({"image": rows, "label": labels}), path, row_group_size=SHARD)


def _read(folder: Path, what: str, epochs: int) -> dict[str, list[float]]:
    """What :func:`main` measures, in a process of its own."""
    found: dict[str, list[float]] = json.loads(_run(folder, "-m", __name__, what, str(epochs)).splitlines()[-1])
    return found


def _run(folder: Path, *arguments: str) -> str:
    """What a process of Python prints, in a folder and with a cache there."""
    environment = {**os.environ, CACHE_VARIABLE: str(folder / "cache"), "HF_HOME": str(folder / "cache")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(arguments)[:100]} failed: {done.stderr[-500:]}")
    return done.stdout


def main(what: str, epochs: int) -> None:
    """Read a data set of the current folder and print, as JSON, samples a second and MiB by epoch."""
    torch.set_num_threads(1)
    data = data_of(what).build("train")
    rates, memory = [], []
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).tolist()
        started = time.perf_counter()
        for index in order:
            data[index]
        rates.append(len(order) / (time.perf_counter() - started))
        memory.append(_memory())
    print(json.dumps({"rates": rates, "memory": memory}))


def _memory() -> float:
    """MiB that are this process's own; what it maps of files, the system takes back when it needs to."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def table(measured: dict[str, Any]) -> str:
    """A row for each data set: the rate of its best epoch, and memory after the first and the last."""
    lines = [
        f"| {measured['pictures']:,} pictures | samples a second | MiB after an epoch | after {measured['epochs']} |",
        "|---|---|---|---|",
    ]
    for row in measured["rows"]:
        memory = row["memory"]
        lines.append(f"| {row['data']} | {max(row['rates']):,.0f} | {memory[0]:.0f} | {memory[-1]:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
