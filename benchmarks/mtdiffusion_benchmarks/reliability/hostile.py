"""Files that are damaged, too large, or made to do harm: refused with a sentence, and nothing in them is run."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtdiffusion_benchmarks.reliability.children import run
from mtdiffusion_benchmarks.reliability.jobs import Bench
from mtdiffusion_benchmarks.reliability.kills import Wrong

Case = tuple[str, Callable[[], None], Sequence[str]]
"""What it is, what makes it in the place's ``work``, and the command that meets it."""
_DEVICE = ("--device", "cpu")
_SAMPLE = ("sample", "run", "-n", "2", "--out", "samples", *_DEVICE)
_RESUME = ("train", "--resume", "--out", "run", "--set", "training.steps=7", *_DEVICE)
_CHECK = ("config", "check", "config.toml")
_TREE = 'data={kind="folder", root="tree", fields={image={kind="image", channels=1}, label="label"}}'
_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


class Bomb:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


def unpickled(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """Pickles under every name that is read: if one were unpickled, a file would be there."""
    work, mark = bench.place.work, bench.place.root / "unpickled"
    bombs = {
        "torch.save": _saved(torch.save, {"x": Bomb(mark)}),
        "pickle": pickle.dumps(Bomb(mark)),
        "numpy": _saved(lambda x, to: np.save(to, x, allow_pickle=True), np.array([Bomb(mark)], dtype=object)),
    }

    for name, content in bombs.items():
        for file in _FILES:
            for arguments in (_SAMPLE, _RESUME):
                unused = arguments is _SAMPLE and file in ("model.safetensors", "optimizer.safetensors")
                case: Case = (f"{file} is a pickle ({name})", _put(_checkpoint(bench) / file, content), arguments)
                yield _met(bench, case, (0,) if unused else (2,), mark)
        for suffix in (".npy", ".npz", ".safetensors", ".json", ".csv", ".parquet"):
            field = _TREE.replace('label="label"', f'label="{_kind(suffix)}"')

            def make(suffix: str = suffix, content: bytes = content) -> None:
                shutil.copytree(bench.data, work / "tree")
                (work / "tree" / "label.csv").unlink()
                (work / "tree" / f"label{suffix}").write_bytes(content)

            yield _met(bench, (f"label{suffix} is a pickle ({name})", make, (*_CHECK, "--set", field)), (2,), mark)
        for observed in ("image=given.png", "image=given.npy", "label=given.pt"):
            put = _put(work / observed.partition("=")[2], content)
            given = (f"--observe {observed} is a pickle ({name})", put, (*_SAMPLE, "--observe", observed))
            yield _met(bench, given, (2,), mark)


def _kind(suffix: str) -> str:
    return "embedding" if suffix in (".npy", ".npz", ".safetensors") else "label"


def damaged(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """Checkpoints, pictures and tables cut short, with flipped bits, or grown: a sentence, or a result."""
    work = bench.place.work
    for trial in range(trials):
        how = rng.choice((cut, flipped, grown))
        if trial % 2:
            file = work / "tree" / rng.choice(["image/000.png", "label.csv"])
            arguments: Sequence[str] = (*_CHECK, "--set", _TREE)
        else:
            file = _checkpoint(bench) / rng.choice(_FILES)
            arguments = rng.choice((_SAMPLE, _RESUME))

        def make(file: Path = file, how: Callable[[bytes, random.Random], bytes] = how) -> None:
            if not (work / "tree").exists():
                shutil.copytree(bench.data, work / "tree")
            file.write_bytes(how(file.read_bytes(), rng))

        yield _met(bench, (f"{file.name} {how.__name__}", make, arguments), (0, 2))


def cut(content: bytes, rng: random.Random) -> bytes:
    """A part of it, from its beginning."""
    return content[: rng.randrange(len(content))]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """It with one to eight bits flipped, half of the time in its head."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(min(len(changed), 256) if rng.random() < 0.5 else len(changed))
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def grown(content: bytes, rng: random.Random) -> bytes:
    """It with more behind it."""
    return content + rng.randbytes(rng.randint(1, 10000))


def oversized(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """Files that say that they are huge, or become so when they are unpacked, and JSON and TOML nested without end."""
    for case in oversized_cases(bench):
        yield _met(bench, case, (2,))


def oversized_cases(bench: Bench) -> Iterator[Case]:
    """What :func:`oversized` tries."""
    work, checkpoint = bench.place.work, _checkpoint(bench)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for name, content in {
        "a header of 2⁶⁰ bytes": struct.pack("<Q", 2**60) + b"{}",
        "a tensor of 2⁴⁰ values": struct.pack("<Q", len(header)) + header,
    }.items():
        yield f"ema.safetensors with {name}", _put(checkpoint / "ema.safetensors", content), _SAMPLE
    nested = b"[" * 200_000
    yield "state.json nested 200,000 deep", _put(checkpoint / "state.json", nested), _SAMPLE
    yield "a configuration nested 200,000 deep", _put(work / "config.toml", b"x = " + nested), _CHECK
    yield "--set nested 50,000 deep", _put(work / "unused", b""), (*_CHECK, "--set", "x=" + "[" * 50_000)
    yield (
        "a picture of 30,000 × 30,000",
        _put(work / "big.png", bomb_png(30_000)),
        (*_SAMPLE, "--observe", "image=big.png"),
    )
    for suffix, content in {
        ".csv": b"stem,value\n000," + b"x" * 10_000_000 + b"\n",
        ".json": b'{"000": ' + nested,
        ".jsonl": b'{"stem": "000", "value": ' + b"9" * 10_000 + b"}\n",
    }.items():
        yield f"an endless label{suffix}", _tree(bench, f"label{suffix}", content), (*_CHECK, "--set", _TREE)
    vectors = _TREE.replace('label="label"', 'label="embedding"')
    npz = io.BytesIO()
    with (
        zipfile.ZipFile(npz, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("000.npy", "w", force_zip64=True) as file,
    ):
        count = 5 * 2**27  # 2.5 GiB of zeros
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
        for _ in range(count * 4 // 2**24):
            file.write(bytes(2**24))
    yield "label.npz with 2.5 GiB of zeros", _tree(bench, "label.npz", npz.getvalue()), (*_CHECK, "--set", vectors)
    claims = io.BytesIO()
    np.lib.format.write_array_header_1_0(claims, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)})
    claimed = _tree(bench, "label/000.npy", claims.getvalue())
    yield "label/000.npy that says it has 2⁴⁰ values", claimed, (*_CHECK, "--set", vectors)


def outside(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """Tables that name files outside of their folder: they are not read."""
    work = bench.place.work
    for name in ("../secret", "/etc/hostname", "../../given/secret.png", "..\\secret.png"):
        content = f"file_name,value\n{name},3\n".encode()
        case = (f"a table that names {name}", _tree(bench, "label.csv", content), (*_CHECK, "--set", _TREE))
        yield _met(bench, case, (2,))
    for name in ("../secret.png", "/etc/hostname"):
        rows = "".join(json.dumps({"file_name": name, "label": 1}) + "\n" for _ in range(2))

        def make(rows: str = rows) -> None:
            (work / "tree" / "train").mkdir(parents=True)
            (work / "tree" / "train" / "metadata.jsonl").write_text(rows, encoding="utf-8")
            (work / "tree" / "secret.png").write_bytes((bench.data / "image" / "000.png").read_bytes())

        yield _met(bench, (f"metadata.jsonl that names {name}", make, (*_CHECK, "--set", _TREE)), (2,))


def bomb_png(side: int) -> bytes:
    """A picture of so many zeros each way, packed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(side // 8 + 2)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _checkpoint(bench: Bench) -> Path:
    return bench.place.work / "run" / "checkpoints" / "step-00000006"


def _put(path: Path, content: bytes) -> Callable[[], None]:
    def make() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return make


def _tree(bench: Bench, name: str, content: bytes) -> Callable[[], None]:
    """The data set with other labels."""

    def make() -> None:
        tree = bench.place.work / "tree"
        shutil.copytree(bench.data, tree)
        (tree / "label.csv").unlink()
        _put(tree / name, content)()

    return make


def _saved(save: Callable[[Any, io.BytesIO], object], value: Any) -> bytes:
    buffer = io.BytesIO()
    save(value, buffer)
    return buffer.getvalue()


def _met(bench: Bench, case: Case, statuses: tuple[int, ...], mark: Path | None = None) -> str:
    """What is wrong with how a command meets a file."""
    what, make, arguments = case
    bench.empty()
    make()
    wrong = run(bench.place, arguments).wrong(*statuses)
    if mark is not None and mark.exists():
        wrong = "it was unpickled, and what is in it was run"
    return f"{what}: {wrong}" if wrong else ""
