"""Samples of a run as files: a folder, or shards that several processes draw and a later command may go on with.

A batch is written as it is drawn, so memory does not grow with the number of samples. What a sample is depends on its
place in the request, not on the process that draws it (:meth:`mtdiffusion_engine.run.Run.sample`).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, field, frozen
from PIL import Image
from torch import Tensor
from torch.distributed import distributed_c10d

from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.hanging import HangWatch
from mtdiffusion_engine.pictures import sample_sheet, stem_of
from mtdiffusion_engine.run import Run
from mtdiffusion_engine.shards import FORMS
from mtdiffusion_registry import UserError
from mtdiffusion_registry.installed import version
from mtdiffusion_registry.pace import Step, Tell, by_step
from mtdiffusion_registry.partial import remove_abandoned

REQUEST, SHEET = "request.json", "samples.png"
SCRATCH = ".samples-*"
"""What is written before a shard is whole."""
SHOWN = 128
"""Samples on a sheet, at most; more of them in a folder have several."""
SHARD_SIZE = 1024
"""Samples a shard, unless another number is asked for: a multiple of the usual batch size."""


def _silent(done: float, at: Step | None) -> None:
    """Tells nobody."""


@frozen(eq=False)
class Request:
    """Samples that are asked of a run.

    Attributes:
        n: how many.
        observed: by modality name, one value for all of them, or several ``[k, ...]`` that take turns.
        visible, strength, generate, seed: as of :meth:`Run.sample`; a map is for all samples, ``[h, w]``.
        changes: of the run's sampler settings, as :meth:`Run.settings` takes them.
        stated: "observed" and "visible" as they were asked for, by modality name, for people.

    Raises:
        UserError: if more values of a modality are given than there are samples.
    """

    run: Run
    n: int
    observed: Mapping[str, Tensor] = field(factory=dict)
    visible: Mapping[str, Tensor] = field(factory=dict)
    strength: Mapping[str, float] = field(factory=dict)
    generate: Sequence[str] | None = None
    changes: Mapping[str, Any] = field(factory=dict)
    seed: int = 0
    stated: Mapping[str, Mapping[str, str]] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        for name, x in self.observed.items():
            several = x.ndim == self.run.modality(name).placeholder(1).ndim
            if several and len(x) > self.n:
                samples = f"are only {self.n} samples" if self.n > 1 else "is only 1 sample"
                raise UserError(
                    f"observed {name}: {len(x)} values take turns, and there {samples}, so that some would be "
                    f"of no use; ask for {len(x)} samples or more (-n {len(x)}), or give fewer values"
                )

    @property
    def names(self) -> list[str]:
        """The modalities that a sample has."""
        names = self.run.model.names
        return [name for name in names if self.generate is None or name in self.generate or name in self.observed]

    def record(self) -> dict[str, Any]:
        """What the samples follow from, as JSON has it."""
        kept = self.observed.keys() - self.visible.keys() - self.strength.keys()
        record = {
            "run": str(self.run.path),
            "checkpoint": self.run.checkpoint.name,
            "version": version("mtdiffusion"),
            "n": self.n,
            "observed": self.stated.get("observed", {}),
            "visible": self.stated.get("visible", {}),
            "strength": self.strength,
            "generated": [name for name in self.names if name not in kept],
            "settings": asdict(self.run.settings(**self.changes)),
            "seed": self.seed,
            "batch_size": self.run.experiment.evaluation.batch_size,
            "device": self.run.model.device.type,
        }
        plain: dict[str, Any] = json.loads(json.dumps(record))
        return plain

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        """What is observed of some samples in a row: one value, or ``[count, ...]``."""
        places = torch.arange(first, first + count)
        return {
            name: x if x.ndim < self.run.modality(name).placeholder(1).ndim else x[places % len(x)]
            for name, x in self.observed.items()
        }

    def batches(self, first: int, count: int, tell: Tell = _silent) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Samples in a row, a batch at a time: the place of its first one, and modalities by name, ``[b, ...]`` on the
        CPU.

        Args:
            tell: is told how many of them are drawn, step by step of a batch.

        Raises:
            UserError: as :meth:`Run.sample`.
        """
        size = self.run.experiment.evaluation.batch_size
        for start in range(first, first + count, size):
            part = min(size, first + count - start)
            samples = self.run.sample(
                part,
                observed=self.rows(start, part),
                visible=self.visible,
                strength=self.strength,
                generate=self.generate,
                seed=self.seed,
                first=start,
                on_step=by_step(tell, start - first, part),
                **self.changes,
            )
            yield start, {name: x.cpu() for name, x in samples.items()}

    def sheet(self, samples: Mapping[str, Tensor], first: int = 0) -> Image.Image:
        """Samples in a row at a glance, the first of them at this place, with what they were made from."""
        values = {
            # Not Path.is_file, which raises for a caption too long to be a file's name.
            name: Path(text).name if os.path.isfile(text) else text  # noqa: PTH113
            for name, text in self.stated.get("observed", {}).items()
        }
        return sample_sheet(
            self.run.model,
            samples,
            f"Samples of {self.run.path.absolute().name}",
            observed=self.rows(first, len(next(iter(samples.values())))),
            visible=self.visible,
            strength=self.strength,
            values=values,
            most=SHOWN,
            first=first,
            total=self.n,
        )


class _Sheets:
    """Draws the sheets of samples that pass in their order, each when it is full: one, or as many pages as it takes.

    Args:
        pages: whether there are sheets of all samples; otherwise there is one, of the first.
    """

    def __init__(self, request: Request, folder: Path, pages: bool) -> None:
        self._request, self._folder = request, folder
        self._count = -(-request.n // SHOWN) if pages else 1
        self._page, self._waiting = 0, dict[str, Tensor]()

    def see(self, samples: Mapping[str, Tensor]) -> None:
        """Take in the samples that come next."""
        if self._page < self._count:
            before = self._waiting or {name: x[:0] for name, x in samples.items()}
            self._waiting = {name: torch.cat([before[name], x]) for name, x in samples.items()}
            while self._held() >= SHOWN and self._page < self._count:
                self._draw()

    def end(self) -> None:
        """All samples have passed."""
        if self._held() and self._page < self._count:
            self._draw()

    def _held(self) -> int:
        return len(next(iter(self._waiting.values()), ()))

    def _draw(self) -> None:
        name = sheet_name(self._page, self._count)
        shown = {key: x[:SHOWN] for key, x in self._waiting.items()}
        self._request.sheet(shown, self._page * SHOWN).save(self._folder / name)
        self._waiting = {key: x[SHOWN:] for key, x in self._waiting.items()}
        self._page += 1


def sheet_name(page: int, count: int) -> str:
    """The name of a sheet's file: ``samples.png``, or of several pages ``samples-1.png`` and so on."""
    return SHEET if count == 1 else f"samples-{str(page + 1).zfill(len(str(count)))}.png"


def write_folder(request: Request, folder: Path, tell: Tell = _silent) -> None:
    """Write samples into an empty folder: a subfolder for each modality with a file a sample, or a table where its
    values are numbers or words (:meth:`mtdiffusion.Modality.cells`); the request; and all samples at a glance, on one
    sheet or, of more than :data:`SHOWN`, on several.

    A data set of kind ``folder`` reads them back.

    Raises:
        UserError: as :meth:`Run.sample`.
        OSError: if one cannot be written.
    """
    run, sheets = request.run, _Sheets(request, folder, pages=True)
    with ExitStack() as stack:
        tables: dict[str, Any] = {}

        def write(name: str, x: Tensor, stem: str) -> None:
            modality = run.modality(name)
            cells = modality.cells(x)
            if not cells:
                (folder / name).mkdir(exist_ok=True)
                modality.write(x, folder / name, stem)
                return
            if name not in tables:
                file = stack.enter_context((folder / f"{name}.csv").open("w", encoding="utf-8", newline=""))
                tables[name] = csv.writer(file, lineterminator="\n")
                tables[name].writerow(["stem", *cells])
            tables[name].writerow([stem, *cells.values()])

        for start, samples in request.batches(0, request.n, tell):
            sheets.see(samples)
            for place, row in enumerate(zip(*samples.values(), strict=True), start):
                for name, x in zip(samples, row, strict=True):
                    write(name, x, stem_of(place, request.n))
            tell(place + 1, None)
    sheets.end()
    ckpt.write_json(folder / REQUEST, request.record())


# --- shards -----------------------------------------------------------------------------------------------------------


def shard_name(shard: int, form: str = "tar") -> str:
    """The name of a shard's file, of a form that is one of :data:`FORMS`."""
    return f"samples-{shard:05d}.{form}"


def missing_shards(out: Path, n: int, size: int, form: str = "tar") -> list[int]:
    """Which shards of n samples are not there yet."""
    return [shard for shard in range(-(-n // size)) if not (out / shard_name(shard, form)).is_file()]


def _has_shards(out: Path) -> bool:
    return any(any(out.glob(f"samples-*.{form}")) for form in FORMS)


def write_shards(
    request: Request,
    out: Path,
    size: int,
    shards: Sequence[int],
    tell: Tell = _silent,
    form: str = "tar",
) -> None:
    """Draw some shards into a folder; the first of all brings a sheet, of its first samples.

    A shard gets its name when it is whole, and its bytes follow from the request, ``size`` and ``form`` alone (of
    Parquet, from the version of pyarrow as well).

    Args:
        size: samples a shard; the last of the request may have fewer.
        shards: which, counted from 0.
        tell: is told how many samples are drawn, step by step of a batch.
        form: one of :data:`FORMS`: :func:`mtdiffusion_engine.shards.tar_shard` and ``parquet_shard`` say what is in it.

    Raises:
        UserError: as :meth:`Run.sample`, or if a shard cannot be written.
    """
    drawn = 0
    for shard in shards:
        start, path = shard * size, out / shard_name(shard, form)
        count = min(size, request.n - start)

        def tell_all(done: float, at: Step | None, before: int = drawn) -> None:
            tell(before + done, at and at._replace(first=before + at.first))

        try:
            _write_shard(request, path, start, count, tell_all, form)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror or error}). Shards that are whole are kept; the same "
                "command goes on with the others"
            ) from error
        drawn += count


def _write_shard(request: Request, path: Path, first: int, count: int, tell: Tell, form: str) -> None:
    partial, scratch = path.with_name(f".{path.name}"), path.with_name(f".{path.stem}")
    sheets = _Sheets(request, path.parent, pages=False) if first == 0 else None
    modalities = {name: request.run.modality(name) for name in request.names}
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        scratch.mkdir()
        with partial.open("wb") as file:
            with FORMS[form](file, scratch, modalities) as write:
                for start, samples in request.batches(first, count, tell):
                    if sheets is not None:
                        sheets.see(samples)
                    rows = [dict(zip(samples, row, strict=True)) for row in zip(*samples.values(), strict=True)]
                    write([(stem_of(place, request.n), row) for place, row in enumerate(rows, start)])
                    tell(start + len(rows) - first, None)
            file.flush()
            os.fsync(file.fileno())  # a shard that has its name is whole, after a loss of power, too
        if sheets is not None:
            sheets.end()
        shutil.rmtree(scratch)  # before the shard has its name: then nothing is left to do
        partial.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        partial.unlink(missing_ok=True)


@contextmanager
def shards_in(
    out: Path, record: Mapping[str, Any], rank: int, world: int, watch: HangWatch | None = None
) -> Iterator[list[int]]:
    """A folder for a request's shards, new or to go on in, while several processes are in it together; the shards that
    are missing there, which is the same list in all of them.

    The first process writes the request, or compares it with the one that is there. All leave when all are done. What
    ends before there is a shard leaves nothing.

    Args:
        record: of the request (:meth:`Request.record`), with "shards", their form, and "shard_size".
        watch: is told where this process is; each may draw for as long as it likes.

    Raises:
        UserError: if the folder holds something else, or shards of another request, or is in use.
    """
    watch = watch or HangWatch()
    with ExitStack() as stack:
        refusal, missing = "", list[int]()
        if rank == 0:
            try:
                if not out.is_dir():
                    ckpt.require_free(out)
                    out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(ckpt.alone_in(out, "sampling into this folder"))
                _claim(out, record)
                # Told to all, as another process would find those gone that this one has drawn by then.
                missing = missing_shards(out, record["n"], record["shard_size"], record["shards"])
            except UserError as error:
                refusal = str(error)
        if world > 1:
            box: list[Any] = [refusal, missing]
            watch.at("the start", waits=True)
            torch.distributed.broadcast_object_list(box)
            watch.at("its shards", patient=True)
            refusal, missing = box
        if refusal:
            raise UserError(refusal)
        try:
            yield missing
        except (UserError, KeyboardInterrupt):
            if world == 1 and not _has_shards(out):
                (out / REQUEST).unlink(missing_ok=True)
                with suppress(OSError):  # someone has put something there
                    out.rmdir()
            raise
        if world > 1:
            watch.at("the end: its shards are there", waits=True)
            try:
                torch.distributed.barrier()
            except RuntimeError as error:
                raise UserError(
                    f"{out}: another process has stopped. Shards that are whole are kept; the same command goes on "
                    "with the others"
                ) from error


def _claim(out: Path, record: Mapping[str, Any]) -> None:
    """Write the request of a folder's shards; if it has some, they must be of this one."""
    remove_abandoned(out / REQUEST)
    if not _has_shards(out):
        if any(path.name not in (REQUEST, SHEET) and not path.match(SCRATCH) for path in out.iterdir()):
            ckpt.require_free(out)
        ckpt.write_json(out / REQUEST, record)
        return
    found = ckpt.read_json(out / REQUEST, "give another folder")
    differ = [
        f"{key} is {json.dumps(found.get(key))}, asked for {json.dumps(record.get(key))}"
        for key in sorted(found.keys() | record.keys())
        if found.get(key) != record.get(key)
    ]
    if differ:
        raise UserError(
            f"{out}: holds samples of another request ({'; '.join(differ)}). Nothing was written. Ask for what "
            f"{out / REQUEST} says to go on with it, or give another folder"
        )


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Which of how many processes this is, as torchrun says in the environment; on CUDA each has a GPU of its own.

    They draw without one another, and only wait for all at the beginning (:func:`meet`) and at the end.

    Raises:
        UserError: if the environment names several processes but not where they meet.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    if absent := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(
            f"WORLD_SIZE is {world} in the environment, but there is no {min(absent)}: start several processes by "
            "torchrun, or unset it for one"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    try:
        yield rank, world
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def meet(rank: int, world: int, timeout: float) -> None:
    """Wait until all processes are here, and connect them; of one process, nothing.

    Args:
        timeout: seconds to wait.

    Raises:
        UserError: if some do not come; it names them.
    """
    if world == 1:
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, which then holds the store
    missing = f"what started the processes, which holds the store at {host}:{port}" if launched else "rank 0"
    try:
        store: distributed_c10d.Store = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # as documented
            host, port, world, rank == 0 and not launched, timedelta(seconds=timeout), wait_for_workers=False
        )
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun starts them again with the same store
        store = distributed_c10d.PrefixStore(f"mtdiffusion/start {start}", store)
        store.set(f"here {rank}", "")
        try:
            store.wait([f"here {each}" for each in range(world)], timedelta(seconds=timeout))
        except RuntimeError:
            absent = [each for each in range(world) if not store.check([f"here {each}"])]
            missing = f"rank {', '.join(map(str, absent))} (of {world} processes)" if absent else missing
            raise
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"the processes cannot meet at {host}:{port}: something else listens there") from error
        raise UserError(
            f"rank {rank} has waited for {timeout:g} s (training.timeout), and not all processes came; missing is "
            f"{missing}. Look for those that did not start, and start all again"
        ) from error
    # One may be at its last shard for long; those that hang are watched for (HangWatch).
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(days=30))
