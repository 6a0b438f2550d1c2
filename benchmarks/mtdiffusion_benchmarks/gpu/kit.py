"""What ``run.sh`` needs beside the checkout, torch and what comes with it. It is run as a file, as nothing else of ours
can be imported yet, and imports the standard library alone.

``pack`` puts wheels and pictures into a folder that travels with the checkout; ``unpack`` installs of it what is
missing, beside the checkout and not into the system, and writes the metadata by which our plugins are found without an
installation.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

NEEDED = [
    "accelerate",
    "attrs",
    "cattrs",
    "filelock",
    "fsspec",
    "huggingface-hub",
    "lightning-utilities",
    "markdown-it-py",
    "mdurl",
    "packaging",
    "pluggy",
    "psutil",
    "pygments",
    "pyyaml",
    "rich",
    "safetensors",
    "tensorboard",
    "tomli-w",
    "torchmetrics",
    "tqdm",
    "typing-extensions",
]
PEERS = [
    "denoising-diffusion-pytorch",
    "diffusers",
    "einops",
    "ema-pytorch",
    "importlib-metadata",
    "pytorch-fid",
    "regex",
    "requests",
    "zipp",
]
"""Other libraries that ours is compared with, and what they need: installed if they were packed, else left out."""
ARCHIVE = "cifar10.tar.gz"


def pack(folder: Path, python: str, machine: str, have: Path | None, data: Path | None, mib: float) -> None:
    """Wheels of what the other machine lacks, and pictures of CIFAR-10."""
    there = {_plain(line) for line in have.read_text().splitlines()} if have else set()
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux{tag}_{machine}" for tag in ("_2_28", "_2_27", "_2_17", "2014", "1")]
    aim = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
    for name in (*NEEDED, *PEERS):
        if name in there:
            continue
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *aim, f"--dest={wheels}", name]
        if subprocess.run(command).returncode and name in NEEDED:
            sys.exit(f"pack: no wheel of {name} for Python {python} on {machine} could be downloaded")
    if data is not None:
        _pack_pictures(data, folder / ARCHIVE, int(mib * 2**20))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent in (folder, wheels))
    print(f"{folder}: {size / 2**20:.1f} MiB, to travel with the checkout")


def _plain(line: str) -> str:
    """The name in a line such as ``Name==1.0``, as an index writes it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s=<>~!@;\[]", line.strip())[0]).lower()


def _pack_pictures(root: Path, archive: Path, most: int) -> None:
    """As many of each class as fit, five for training to one held out, in the order of their names."""
    rows = {}
    for split in ("train", "test"):
        classes = sorted(path for path in (root / split).iterdir() if path.is_dir())
        rows[split] = list(zip(*(sorted(each.iterdir()) for each in classes), strict=False))
    if not (rows["train"] and rows["test"]):
        sys.exit(f"pack: {root} has no pictures {{train,test}}/CLASS/*")
    count = 0
    with archive.open("wb") as raw, gzip.open(raw, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for turn, row in enumerate(rows["train"]):
            held_out = rows["test"][turn // 5 : turn // 5 + 1] if turn % 5 == 0 else []
            pictures = [path for each in (row, *held_out) for path in each]
            packed.flush()  # so that the size is known
            if raw.tell() + sum(path.stat().st_size for path in pictures) > most:
                break
            count += len(pictures)
            for path in pictures:
                info = tarfile.TarInfo(str(path.relative_to(root)))
                info.size = path.stat().st_size
                with path.open("rb") as file:
                    tar.addfile(info, file)
    print(f"{archive}: {count:,} pictures")


def unpack(folder: Path) -> None:
    """Install what is missing into ``folder/site``, write our metadata there, unpack the pictures."""
    site = folder / "site"
    site.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(site))
    wheels = {_plain(path.name.split("-")[0]): path for path in sorted((folder / "wheels").glob("*.whl"))}
    missing = [name for name in (*wheels, *NEEDED, *PEERS) if not _installed(name)]
    carried = [str(wheels[name]) for name in dict.fromkeys(missing) if name in wheels]
    if carried:
        _install(site, ["--no-index", *carried])
    others = [name for name in NEEDED if name in missing and name not in wheels]
    if others and not _install(site, ["--retries=0", "--timeout=5", *others]):
        print(f"missing, and could not be installed: {', '.join(others)}; what needs them will fail", file=sys.stderr)
    _write_metadata(site)
    pictures = folder / "cifar10"
    if (folder / ARCHIVE).is_file() and not pictures.is_dir():
        partial = folder / "cifar10.partial"
        with tarfile.open(folder / ARCHIVE) as tar:
            tar.extractall(partial, filter="data")
        partial.rename(pictures)


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _install(site: Path, what: list[str]) -> bool:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    return not subprocess.run([*pip, "--no-compile", f"--target={site}", *what]).returncode


def _write_metadata(site: Path) -> None:
    """What an installation of this checkout would tell of it: its version and its entry points."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    for old in site.glob("mtdiffusion-*.dist-info"):
        for path in old.iterdir():
            path.unlink()
        old.rmdir()
    made = site / f"mtdiffusion-{project['version']}.dist-info"
    made.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (made / "METADATA").write_text(head, encoding="utf-8")
    lines = []
    for group, points in {"console_scripts": project["scripts"], **project["entry-points"]}.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    (made / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="kit.py", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    packing = actions.add_parser(
        "pack", prog="pack.sh", description="Put what a machine without a network needs into a folder."
    )
    packing.add_argument("--to", type=Path, default=Path(".gpu"), metavar="DIR", help="default: %(default)s")
    packing.add_argument("--python", default="3.12", metavar="X.Y", help="of that machine (default: %(default)s)")
    packing.add_argument("--machine", default="x86_64", help="its processor (default: %(default)s)")
    packing.add_argument("--have", type=Path, metavar="FILE", help="what it has, as `pip freeze` there writes it")
    packing.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10 as {train,test}/CLASS/*")
    packing.add_argument("--mib", type=float, default=36.0, help="of pictures at most (default: %(default)s)")
    unpacking = actions.add_parser("unpack")
    unpacking.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.action == "pack":
        pack(given.to, given.python, given.machine, given.have, given.data, given.mib)
    else:
        unpack(given.folder)


if __name__ == "__main__":
    main()
