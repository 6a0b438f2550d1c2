"""``python -m mtdiffusion_benchmarks.gpu``, which ``benchmarks/gpu/run.sh`` calls."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from mtdiffusion_benchmarks.gpu.stages import STAGES, run_parts, run_stages


def main(arguments: list[str] | None = None) -> int:
    """Run stages; in a stage's own process (``--stage``) its parts. 0 if all parts that were tried are measured."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu/run.sh",
        description="Measure what only an NVIDIA GPU can tell. What is measured already is not measured again.",
    )
    out = Path(os.environ.get("OUT") or "runs/gpu")
    parser.add_argument("out", nargs="?", type=Path, default=out, metavar="FOLDER", help="default: $OUT, or runs/gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small sizes; the figures mean nothing")
    names = list(STAGES)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--limit", type=float, default=480, metavar="SECONDS", help="of all (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10: {train,test}/CLASS/* (default: as packed)")
    parser.add_argument("--work", type=Path, default=Path(".gpu/work"), help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    data = given.data or given.work.parent / "cifar10"
    if given.stage is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
        own = [str(given.out), "--device", given.device, "--work", str(given.work), "--data", str(data)]
        own += ["--tiny"] * given.tiny
        run_stages(given.only, own, given.out, limit=given.limit, tiny=given.tiny)
        return 0
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((given.work / "inductor").absolute()))
    os.environ.setdefault("MTDIFFUSION_CACHE", str((given.work / "cache").absolute()))
    from mtdiffusion_benchmarks.gpu.measuring import Setting

    deadline = time.monotonic() + given.limit
    setting = Setting(given.device, given.tiny, given.out, given.work, data if data.is_dir() else None, deadline)
    return run_parts(given.stage, setting, given.since)


if __name__ == "__main__":
    sys.exit(main())
