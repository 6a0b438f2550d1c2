"""Shards that are damaged, or made to do harm, of tar, Parquet and litdata: refused with a sentence, or read."""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mtdiffusion_benchmarks.reliability.children import Child, run
from mtdiffusion_benchmarks.reliability.hostile import Bomb, _saved, bomb_png, cut, flipped, grown
from mtdiffusion_benchmarks.reliability.jobs import Bench, Job, to_its_end
from mtdiffusion_benchmarks.reliability.kills import Skipped, Wrong

_FIELDS = '{image={kind="image", channels=1}, label="label"}'
_ROOTS = {
    "tar": f'data={{kind="webdataset", root="shards", fields={_FIELDS}, test_fraction=0.5}}',
    "parquet": f'data={{kind="huggingface", path="shards/samples-00000.parquet", fields={_FIELDS}, test_fraction=0.5}}',
    "litdata": 'data={kind="litdata", root="shards"}',
}
"""What reads shards of a form, in the folder ``shards``."""
_LIBRARY = {"parquet": "datasets", "litdata": "litdata"}
_DEVICE = ("--device", "cpu")
Change = Callable[[Path], None]
"""What is done to a folder of shards."""


def damaged(bench: Bench, form: str, trials: int, rng: random.Random) -> Wrong:
    """Shards cut short, with flipped bits, or grown, of which every sample is read."""
    sound = _sound(bench, form)
    names = sorted(
        str(path.relative_to(sound)) for path in sound.rglob("*") if path.suffix not in ("", ".png", ".lock")
    )
    for _ in range(trials):
        name, how = (
            rng.choice([each for each in names if not each.startswith("request")]),
            rng.choice((cut, flipped, grown)),
        )

        def change(folder: Path, name: str = name, how: Callable[[bytes, random.Random], bytes] = how) -> None:
            (folder / name).write_bytes(how((folder / name).read_bytes(), rng))

        yield _read(bench, form, f"{name} {how.__name__}", change, (0, 2))


def hostile(bench: Bench, form: str, trials: int, rng: random.Random) -> Wrong:
    """Shards that were made to do harm."""
    _sound(bench, form)
    mark = bench.place.root / "unpickled"
    for what, change, more in _CASES[form](mark):
        yield _read(bench, form, what, change, (2,), more, mark)


def resumed(bench: Bench, trials: int, rng: random.Random) -> Wrong:
    """Shards and their request that are damaged, in a folder in which sampling goes on."""
    for trial in range(trials):
        form = ("tar", "parquet")[trial % 2]
        sound = _sound(bench, form)
        what = ("request.json", f"samples-00000.{form}", ".samples-00001", "nested")[trial // 2 % 4]
        how = rng.choice((cut, flipped, grown))

        def change(folder: Path, what: str = what, form: str = form, how: Any = how) -> None:
            (folder / f"samples-00001.{form}").unlink(missing_ok=True)
            if what == "nested":
                (folder / "request.json").write_bytes(b"[" * 200_000)
            elif what.startswith("."):
                (folder / what).symlink_to("/etc")  # what a killed process leaves is removed; where it leads to is not
            else:
                (folder / what).write_bytes(how((folder / what).read_bytes(), rng))

        bench.empty()
        shutil.copytree(sound, bench.place.work / "shards")
        change(bench.place.work / "shards")
        there = sorted(Path("/etc").iterdir())
        wrong = run(bench.place, _sampling(form, "shards")).wrong(0, 2)
        wrong = wrong or ("" if sorted(Path("/etc").iterdir()) == there else "something outside was removed")
        yield f"{form}, {what} {how.__name__}: {wrong}" if wrong else ""


def _sampling(form: str, out: str) -> Sequence[str]:
    return ("sample", "run", "-n", "24", "--out", out, "--shards", form, "--shard-size", "12", *_DEVICE)


def _sound(bench: Bench, form: str) -> Path:
    """Shards as the real commands write them, made once.

    Raises:
        Skipped: if the library that reads them is not there.
    """
    if (library := _LIBRARY.get(form)) and ((found := find_spec(library)) is None or found.origin is None):
        raise Skipped(f"needs the library {library}")
    sound = bench.given.parent / "shards" / form
    if not sound.exists():
        for _ in range(2):  # the first imports what others then need not
            bench.empty()
            arguments = (
                ("data", "pack", "config.toml", "--out", "shards") if form == "litdata" else _sampling(form, "shards")
            )
            to_its_end(bench, Job(f"the shards ({form})", arguments))
        if form == "parquet":  # one of all rows
            (bench.place.work / "shards" / "samples-00001.parquet").unlink()
        shutil.copytree(bench.place.work / "shards", sound)
        bench.empty()
        shutil.copytree(sound, bench.place.work / "shards")
        to_its_end(bench, Job(f"a training on shards ({form})", _training(form)), _offline(bench))
    return sound


def _training(form: str, more: Sequence[str] = ()) -> Sequence[str]:
    """Reads every sample."""
    settings = (_ROOTS[form], "training.steps=6", "training.batch_size=4", *more)
    return ("train", "config.toml", "--out", "new", "--set", *settings, *_DEVICE)


def _offline(bench: Bench) -> Callable[[], None]:
    """For a child: what ``datasets`` keeps is the trial's own."""

    def before() -> None:
        folder = str(bench.place.root / "cache" / "datasets")
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=folder, HF_HOME=str(bench.place.root / "cache" / "hub"))
        if "datasets" in sys.modules:
            config: Any = importlib.import_module("datasets.config")
            config.HF_DATASETS_CACHE, config.HF_HUB_OFFLINE = folder, True

    return before


def _read(
    bench: Bench,
    form: str,
    what: str,
    change: Change,
    statuses: tuple[int, ...],
    more: Sequence[str] = (),
    mark: Path | None = None,
) -> str:
    """What is wrong with how a training reads shards that were changed."""
    bench.empty()
    folder = bench.place.work / "shards"
    shutil.copytree(_sound_of(bench, form), folder)
    Child(bench.place, lambda: change(folder)).wait()  # what is large to make leaves nothing in this process
    outside = sorted(path.name for path in bench.place.root.iterdir())
    wrong = run(bench.place, _training(form, more), _offline(bench)).wrong(*statuses)
    if mark is not None and mark.exists():
        wrong = "it was unpickled, and what is in it was run"
    if not wrong and sorted(path.name for path in bench.place.root.iterdir()) != outside:
        wrong = "something was written outside of the folders"
    return f"{what}: {wrong}" if wrong else ""


def _sound_of(bench: Bench, form: str) -> Path:
    return bench.given.parent / "shards" / form


# --- tar --------------------------------------------------------------------------------------------------------------


def _tar_cases(mark: Path) -> Iterator[tuple[str, Change, Sequence[str]]]:
    """Archives, each with one member that is not as it should be."""

    def with_member(change: Callable[[tarfile.TarInfo], None], content: bytes = b"1") -> Change:
        def made(folder: Path) -> None:
            with tarfile.open(folder / "samples-00000.tar", "a") as tar:
                member = tarfile.TarInfo("99.label.json")
                member.size = len(content)
                change(member)
                written = member.tobuf(tarfile.PAX_FORMAT) + content.ljust(tarfile.BLOCKSIZE, b"\0")
                assert tar.fileobj is not None
                tar.fileobj.write(written)  # whatever its size is said to be
                tar.offset += len(written)

        return made

    def set_to(**values: Any) -> Callable[[tarfile.TarInfo], None]:
        def change(member: tarfile.TarInfo) -> None:
            for key, value in values.items():
                setattr(member, key, value)

        return change

    for name in ("../99.label.json", "/etc/99.label.json", "a/../../99.label.json"):
        yield f"a member named {name}", with_member(set_to(name=name)), ()
    for kind, what in ((tarfile.SYMTYPE, "a symbolic link"), (tarfile.LNKTYPE, "a hard link")):
        yield f"{what} to /etc/passwd", with_member(set_to(type=kind, linkname="/etc/passwd", size=0), b""), ()
    for kind, what in ((tarfile.FIFOTYPE, "a pipe"), (tarfile.CHRTYPE, "a device")):
        yield what, with_member(set_to(type=kind, size=0), b""), ()
    yield "a member of 2⁶⁰ bytes", with_member(set_to(size=2**60)), ()
    yield "a long name of 2⁴⁰ bytes", with_member(set_to(type=tarfile.GNUTYPE_LONGNAME, size=2**40)), ()
    yield "a header that says 2⁴⁰", with_member(set_to(pax_headers={"size": str(2**40)})), ()
    yield "a header that is nonsense", with_member(set_to(pax_headers={"size": "many"})), ()
    yield "a sparse member", with_member(set_to(pax_headers={"GNU.sparse.map": "0," + str(2**50)})), ()
    yield "no field's picture", with_member(set_to(name="99.label.json")), ()

    def sample(picture: bytes, label: bytes, suffix: str = "json", image: str = "image.png") -> Change:
        def made(folder: Path) -> None:
            with tarfile.open(folder / "samples-00000.tar", "w") as tar:
                for index in range(24):
                    for name, content in ((image, picture), (f"label.{suffix}", label)):
                        member = tarfile.TarInfo(f"{index}.{name}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            (folder / "samples-00001.tar").unlink()

        return made

    small = bomb_png(4)
    yield "pictures of 30,000 × 30,000", sample(bomb_png(30_000), b"1"), ()
    yield "pictures that are none", sample(b"\x89PNG\r\n\x1a\n" + bytes(100), b"1"), ()
    yield "pictures cut short", sample(small[:-20], b"1"), ()
    yield "labels nested 200,000 deep", sample(small, b"[" * 200_000), ()
    yield "labels of 10,000 digits", sample(small, b"9" * 10_000), ()
    yield "labels that are not finite", sample(small, b"NaN"), ()
    yield "labels that are not UTF-8", sample(small, b"\xff\xfe\x00"), ()
    yield "labels of 10,000 digits, as .cls", sample(small, b"9" * 10_000, "cls"), ()
    vectors = ('data.fields={image={kind="image", channels=1}, label="embedding"}',)
    yield "vectors that are pickles", sample(small, _saved(_save_numpy, _pickled(mark)), "npy"), vectors
    claims = io.BytesIO()
    np.lib.format.write_array_header_1_0(claims, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)})
    yield "vectors that say they have 2⁴⁰ values", sample(small, claims.getvalue(), "npy"), vectors

    def huge(suffix: str) -> Change:
        def made(folder: Path) -> None:
            sample(small, b"1")(folder)
            with (folder / "samples-00000.tar").open("r+b") as file:
                file.seek(0)
                for name, size in (("0.image.png", len(small)), (f"0.label.{suffix}", 2**30 - 512)):
                    member = tarfile.TarInfo(name)
                    member.size = size
                    file.write(member.tobuf(tarfile.PAX_FORMAT))
                    file.write(small.ljust(512, b"\0")) if name.endswith("png") else file.truncate(file.tell())
                file.seek(2**30 - 512, 1)
                file.truncate(file.tell() + 1024)

        return made

    yield "a label of 1 GiB", huge("json"), ("data.test_fraction=0",)
    yield "a label of 1 GiB, as .cls", huge("cls"), ("data.test_fraction=0",)

    def compressed(folder: Path) -> None:
        import gzip

        path = folder / "samples-00000.tar"
        path.write_bytes(gzip.compress(bytes(2**28)))

    yield "a tar that is a compressed 256 MiB", compressed, ()


def _save_numpy(value: Any, to: io.BytesIO) -> None:
    np.save(to, value, allow_pickle=True)


def _pickled(mark: Path) -> Any:
    return np.array([Bomb(mark)], dtype=object)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_cases(mark: Path) -> Iterator[tuple[str, Change, Sequence[str]]]:
    """Tables whose cells, or what is told of them, are not as they should be."""

    def table(image: Any, label: Any, told: Any = None, rows: int = 24) -> Change:
        def made(folder: Path) -> None:
            import pyarrow
            from pyarrow import parquet

            found = pyarrow.table({"image": [image] * rows, "label": [label] * rows})
            if told is not None:
                found = found.replace_schema_metadata({"huggingface": told})
            parquet.write_table(found, folder / "samples-00000.parquet")

        return made

    small = bomb_png(4)
    yield "files elsewhere", table({"bytes": None, "path": "/etc/hostname"}, 1), ()
    yield "files elsewhere, a URL", table({"bytes": None, "path": "http://127.0.0.1:9/x.png"}, 1), ()
    yield "pictures of 30,000 × 30,000", table({"bytes": bomb_png(30_000), "path": "x.png"}, 1), ()
    yield "pictures that are none", table({"bytes": b"\x89PNG", "path": "x.png"}, 1), ()
    yield "numbers in place of pictures", table(1, 1), ()
    yield "labels that are nested", table({"bytes": small, "path": "x.png"}, [[[1]]]), ()
    yield "labels that are blank", table({"bytes": small, "path": "x.png"}, None), ()
    yield "labels that are not finite", table({"bytes": small, "path": "x.png"}, float("nan")), ()
    features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    for what, told in {
        "nonsense": "nonsense",
        "nested 200,000 deep": "[" * 200_000,
        "of a type that is none": json.dumps({"info": {"features": {**features, "label": {"_type": "Nothing"}}}}),
    }.items():
        yield f"features that are {what}", table({"bytes": small, "path": "x.png"}, 1, told), ()
    yield "no rows", table({"bytes": small, "path": "x.png"}, 1, rows=0), ()

    def packed(dictionary: bool) -> Change:
        def change(folder: Path) -> None:
            import pyarrow
            from pyarrow import parquet

            schema = pyarrow.schema([("image", pyarrow.binary()), ("label", pyarrow.int64())])
            rows = {"image": [bytes(2**26)] * 24, "label": [1] * 24}
            how: dict[str, Any] = {"compression": "zstd", "use_dictionary": dictionary}
            parquet.write_table(pyarrow.table(rows, schema), folder / "samples-00000.parquet", **how)

        return change

    yield "24 pictures of 64 MiB of zeros, packed", packed(False), ()
    yield "the same picture of 64 MiB 24 times, which stands there once", packed(True), ()

    def empty(folder: Path) -> None:
        (folder / "samples-00000.parquet").write_bytes(b"")

    yield "an empty file", empty, ()


# --- litdata ----------------------------------------------------------------------------------------------------------


def _litdata_cases(mark: Path) -> Iterator[tuple[str, Change, Sequence[str]]]:
    """Indices that name other files, or tell other numbers, and shards of other contents."""

    def index(change: Callable[[dict[str, Any]], None], file: str = "train/index.json") -> Change:
        def made(folder: Path) -> None:
            found = json.loads((folder / file).read_text(encoding="utf-8"))
            change(found)
            (folder / file).write_text(json.dumps(found), encoding="utf-8")

        return made

    def chunk(key: str, value: Any) -> Change:
        return index(lambda found: found["chunks"][0].update({key: value}))

    for name in ("../../config.toml", "/etc/hostname", "..", "", 3, None, "a\0b"):
        yield f"a shard named {name!r}", chunk("filename", name), ()
    for key in ("chunk_size", "chunk_bytes"):
        for value in (10**12, -1, "many", None, 1.5):
            if (key, value) != ("chunk_bytes", -1):  # less than there is does not matter
                yield f"{key} {value!r}", chunk(key, value), ()
    yield "a shard without keys", index(lambda found: found["chunks"].__setitem__(0, {})), ()
    yield "shards that are no objects", index(lambda found: found["chunks"].__setitem__(0, 3)), ()
    told = (("data_format", ["pickle"]), ("data_format", 3), ("compression", "zstd"), ("item_loader", "X"))
    for key, found in (*told, ("data_spec", "nonsense"), ("data_spec", "[" * 100_000)):
        yield f"{key} {found!r:.20}", index(partial(_set, ("config", key), found)), ()
    broken: tuple[object, ...] = ([], 3, {"train": 3}, {"train": {}})
    for splits in broken:
        yield f"splits {splits}", index(partial(_set, ("splits",), splits), "index.json"), ()

    def nested(folder: Path) -> None:
        (folder / "train" / "index.json").write_bytes(b"[" * 200_000)

    yield "an index nested 200,000 deep", nested, ()

    def offsets(folder: Path) -> None:
        path = next((folder / "train").glob("*.bin"))
        content = bytearray(path.read_bytes())
        content[4:] = np.full((len(content) - 4) // 4, 2**32 - 1, np.uint32).tobytes().ljust(len(content) - 4, b"\xff")
        path.write_bytes(content)

    yield "samples that begin at 2³²", offsets, ()


def _set(path: Sequence[str], value: object, table: dict[str, Any]) -> None:
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value


_CASES: dict[str, Callable[[Path], Iterator[tuple[str, Change, Sequence[str]]]]] = {
    "tar": _tar_cases,
    "parquet": _parquet_cases,
    "litdata": _litdata_cases,
}
