"""``mtdiffusion bench samples``: are many samples in shards all there, each once, if what draws them is killed?

The model is tiny, since what is tried is all that is not the network: several processes draw, all of them are killed
with half of the shards there, and the same command goes on. Then some shards are drawn again by one process alone.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attrs import frozen

from mtdiffusion_benchmarks.runner import hardware
from mtdiffusion_engine import sampling
from mtdiffusion_engine.pictures import stem_of
from mtdiffusion_registry import UserError
from mtdiffusion_registry.cache import CACHE_VARIABLE

RESULT = Path("benchmarks/results/samples.json")
FORM = "tar"
LOOKS = 20
"""How often each part of the drawing is looked at."""
_SECONDS = 0.05

_CONFIG = """
data.kind = "digits"
latent = { height = 8, width = 8 }
process.steps = 50
sampling.steps = 2
training = { steps = 20, batch_size = 16, sample_every = 0 }

[modalities]
image = { kind = "image", size = 8, channels = 1 }
mask = { kind = "mask", size = 8 }
label = { kind = "label", classes = 10 }

[backbone]
kind = "unet"
channels = 8
multipliers = [1]
heads = 0
vector = 16
"""
_NAMES = ("image", "mask", "label")


@frozen
class _Drawing:
    """One start of the command.

    Attributes:
        shards: how many were there in the end.
        seconds: how long it took, from the start of its processes to their end.
        looks: shards there and memory in use by each process that draws, in MiB, as it went; never none.
        left: what is in the folder and is no result.
    """

    shards: int
    seconds: float
    looks: Sequence[Mapping[str, Any]]
    left: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        return {"shards": self.shards, "seconds": self.seconds, "left": [*self.left], "looks": [*self.looks]}


class _Folder:
    """Where a run is, and its samples."""

    def __init__(self, folder: Path, n: int, size: int) -> None:
        self.folder, self.out, self.n, self.size = folder, folder / "samples", n, size
        self.total = -(-n // size)
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", CACHE_VARIABLE: str(folder / "cache")}

    def shards(self) -> list[Path]:
        return sorted(self.out.glob(f"samples-*.{FORM}"))

    def command(self) -> list[str]:
        asked = ["-n", str(self.n), "--shards", FORM, "--shard-size", str(self.size), "--out", str(self.out)]
        return ["-m", "mtdiffusion_engine.cli", "sample", str(self.folder / "run"), *asked, "--device", "cpu"]

    def call(self, *arguments: str) -> None:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise UserError(f"samples: {' '.join(arguments)} failed: {done.stderr.strip()[-1000:]}")

    def draw(self, processes: int, until: int) -> _Drawing:
        """Draw in several processes, which are killed once so many shards are there, if that is not all of them.

        Raises:
            UserError: if they fail, or are done before they could be killed or looked at.
        """
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        started, before = time.monotonic(), len(self.shards())
        marks = sorted({before + max((until - before) * (each + 1) // LOOKS, 1) for each in range(LOOKS)})
        looks: list[dict[str, Any]] = []
        workers: list[int] = []
        killed = False
        with tempfile.TemporaryFile("w+") as said:
            launcher = subprocess.Popen(
                [sys.executable, *start, *self.command()], stdout=said, stderr=said, env=self.environment
            )
            try:
                while launcher.poll() is None and not killed:
                    time.sleep(_SECONDS)
                    there, workers = len(self.shards()), _children(launcher.pid)
                    if len(workers) == processes:
                        if marks and there >= marks[0]:
                            looks.append({"shards": there, "memory": [_memory(each) for each in workers]})
                            marks = [mark for mark in marks if mark > there]
                        killed = there >= until < self.total
            finally:
                _kill(launcher, workers)
            if launcher.returncode and not killed:
                said.seek(0)
                raise UserError(f"samples: drawing in {processes} processes failed: {said.read()[-1000:]}")
        if not looks or killed != (until < self.total):
            raise UserError(
                f"samples: {processes} processes were done before they could be "
                f"{'killed' if until < self.total else 'looked at'}; expected more shards (-n, --shard-size)"
            )
        results = {path.name for path in self.shards()} | {sampling.REQUEST, sampling.SHEET}
        left = sorted(path.name for path in self.out.iterdir() if path.name not in results)
        return _Drawing(len(self.shards()), round(time.monotonic() - started, 1), looks, left)


def _kill(launcher: subprocess.Popen[Any], workers: Sequence[int]) -> None:
    """End a launcher and what it has started, if they have not ended, as what cannot be caught does."""
    if launcher.poll() is None:
        for each in (launcher.pid, *workers):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        launcher.wait()
        while any(_memory(each) for each in workers):  # no children of this process, for which it could wait
            time.sleep(_SECONDS)


def _children(process: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # it has just ended
        return []


def _memory(process: int) -> float:
    """What a process has in memory, in MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmRSS")), 0.0)


def counted(shards: Iterable[Path], n: int) -> dict[str, int]:
    """How many files of n samples are missing in shards, are there more than once, or are of none of these samples."""
    found: Counter[tuple[str, str]] = Counter()
    for path in shards:
        with tarfile.open(path) as tar:
            found.update((stem, name) for stem, name, _ in (member.name.split(".") for member in tar))
    expected = {(stem_of(place, n), name) for place in range(n) for name in _NAMES}
    return {
        "missing": len(expected - found.keys()),
        "doubled": sum(count - 1 for count in found.values()),
        "foreign": len(found.keys() - expected),
    }


def measure(n: int, processes: int, size: int, compared: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All that ``bench samples`` finds, as JSON.

    Args:
        n: how many samples.
        processes: that draw them together.
        size: samples a shard; at least four shards are needed.
        compared: how many shards one process alone draws again, spread from the first to the last; at least two.

    Raises:
        UserError: if there are fewer, or a command fails that nothing has hurt.
    """
    if -(-n // size) < 4:
        raise UserError(f"samples: {n} in shards of {size} are {-(-n // size)}, expected 4 shards or more")
    if not Path(f"/proc/self/task/{os.getpid()}/children").is_file():
        raise UserError("samples: processes and their memory are read from /proc, which is not here, as on Linux")
    with tempfile.TemporaryDirectory(prefix="mtdiffusion-samples-") as name:
        folder = _Folder(Path(name).resolve(), n, size)
        config = folder.folder / "config.toml"
        config.write_text(_CONFIG, encoding="utf-8")
        run = str(folder.folder / "run")
        folder.call("-m", "mtdiffusion_engine.cli", "train", str(config), "--out", run, "--device", "cpu")
        drawn = []
        for until in (folder.total // 2, folder.total):
            drawn.append(folder.draw(processes, until))
            ended = "killed" if until < folder.total else "done"
            say(f"{ended} after {drawn[-1].seconds:.0f} s, with {drawn[-1].shards} of {folder.total} shards there")
        shards = folder.shards()
        found = counted(shards, n)
        count = min(compared, len(shards))
        again = [shards[each * (len(shards) - 1) // (count - 1)] for each in range(count)]
        before = {path.name: sha256(path.read_bytes()).hexdigest() for path in [*again, folder.out / sampling.SHEET]}
        size_of_all = sum(path.stat().st_size for path in shards)
        for path in again:
            path.unlink()
        folder.call(*folder.command())
        differ = [
            name for name, digest in before.items() if sha256((folder.out / name).read_bytes()).hexdigest() != digest
        ]
        say(f"{len(again)} of them and the sheet drawn again by one process: {len(differ)} files differ")
    return {
        "version": version("mtdiffusion"),
        "hardware": hardware("cpu"),
        "system": platform.platform(),
        "n": n,
        "processes": processes,
        "shard_size": size,
        "shards": folder.total,
        "bytes": size_of_all,
        "drawings": [each.as_json() for each in drawn],
        **found,
        "again": [path.name for path in again],
        "differ": differ,
    }


def section(result: Mapping[str, Any]) -> list[str]:
    """Lines of the page on reliability."""
    first, second = result["drawings"]
    wrong = [
        f"{result[what]:,} files are {how}"
        for what, how in (("missing", "missing"), ("doubled", "there twice"), ("foreign", "of no sample"))
        if result[what]
    ]
    wrong += [f"{name} differs" for name in result["differ"]]
    wrong += [f"{name} is left" for name in second["left"]]
    verdict = f"Not all is well: {'; '.join(wrong)}." if wrong else "Each is there once, and nothing else is."
    again, shards = len(result["again"]), result["shards"]
    begun = sum(name.endswith(f".{FORM}") for name in first["left"])
    which = "all shards" if again == shards else f"{again} of the shards, spread from the first to the last,"
    bytes_ = "Not all of these were the same bytes" if result["differ"] else "The bytes were the same"
    lines = [
        f"## {result['n']:,} samples\n",
        verdict,
        f"{result['processes']} processes were to draw them into {shards} shards (tar), and all were killed (SIGKILL) "
        f"with {first['shards']} there and {begun} begun.",
        f"The same command went on with the others. Then {which} were drawn again by one process alone.",
        f"{bytes_}. By\n",
        "```sh",
        f"mtdiffusion bench samples -n {result['n']} --processes {result['processes']} --shard-size "
        f"{result['shard_size']} --compared {again} --out {RESULT}",
        "```\n",
        "Memory of the process that had most, at the first look and at the last of each start:\n",
        "| | shards there | MiB |",
        "|---|---|---|",
    ]
    lines += [
        f"| {what} | {look['shards']} | {max(look['memory']):.0f} |"
        for what, drawing in (("the first start", first), ("the second", second))
        for look in (drawing["looks"][0], drawing["looks"][-1])
    ]
    most = max(max(look["memory"]) for drawing in (first, second) for look in drawing["looks"])
    return [
        *lines,
        "",
        f"The most that was seen is {most:.0f} MiB. The shards are {result['bytes'] / 2**20:.0f} MiB.",
        "The model is tiny and takes two steps: pictures and masks of 8 × 8, and labels, on the CPU.",
        "",
    ]
