"""A training whose weights, gradients, moments and average are split over its processes: FSDP2 (Zhao et al. 2023), and
checkpoints that all processes write at once, while training goes on.

On disk a sharded run is as any other. A safetensors file is a header, and behind it every tensor's values in a row. A
process has some rows of each tensor, which are one range of bytes: it writes them where they belong. So nothing is
gathered or merged, and whoever reads the file need not know how many wrote it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_registry import UserError


def require_shardable(model: MultimodalDiffusion) -> None:
    """Check that every parameter can be split.

    Raises:
        UserError: for one without a dimension.
    """
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            raise UserError(
                f'training.parallel = "fsdp": the parameter {name} is a scalar, which cannot be split over processes. '
                'Give it the shape [1] in the plugin that it belongs to, or set training.parallel = "ddp"'
            )


def all_processes(device: torch.device) -> tuple[DeviceMesh, distributed.ProcessGroup]:
    """All processes by their devices, and, for what is done beside the training, on the CPU."""
    group = distributed.new_group(backend="gloo")
    assert isinstance(group, distributed.ProcessGroup)
    return init_device_mesh(device.type, (distributed.get_world_size(),)), group


def synchronise(module: nn.Module, group: distributed.ProcessGroup) -> None:
    """Give a module on the CPU the first process's values: what is split has to be the same everywhere."""
    for tensor in [*module.parameters(), *module.buffers()]:
        distributed.broadcast(tensor.data, 0, group=group)


def shard(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Split a module's parameters over a mesh, by rows; each block's are gathered when it runs, all others for as long
    as the module does. Buffers stay whole."""
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


@torch.no_grad()
def gather(module: nn.Module, into: nn.Module | None) -> None:
    """Bring a sharded module's weights together in the process that gives a whole one; every process must call it."""
    theirs = [*module.parameters(), *module.buffers()]
    ours = [None] * len(theirs) if into is None else [*into.parameters(), *into.buffers()]
    for whole, part in zip(ours, theirs, strict=True):
        found = part.full_tensor() if isinstance(part, DTensor) else part
        if whole is not None:
            whole.copy_(found)


def save_shards(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    group: distributed.ProcessGroup,
    finish: Callable[[], object],
) -> Future[Any]:
    """Write tensors that are split over processes, each file whole; every process must call it.

    The tensors are copied at once and may change after that.

    Args:
        folder: made by the first process before it calls this; all see it.
        files: by name, without the suffix, each file's tensors by theirs.
        group: of all processes, on the CPU, used for nothing else meanwhile.
        finish: called in the first process when everything is written.

    Returns:
        What is done when ``finish`` is.
    """
    tensors = {f"{file}/{name}": tensor for file, each in files.items() for name, tensor in each.items()}
    writing = async_save(tensors, storage_writer=_Writer(folder, files, finish), process_group=group)
    assert isinstance(writing, Future)
    return writing


def wait_for(writing: Future[Any], what: str) -> None:
    """Wait until :func:`save_shards` is done.

    Raises:
        OSError: if some process could not write.
    """
    try:
        writing.result()
    except CheckpointException as error:
        process, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{what} could not be written by process {process}: {cause}") from None


class _Writer(StorageWriter):
    """Writes a state dict of keys ``FILE/NAME`` into ``FILE.safetensors``, each process its own rows.

    (torch's own writer of safetensors makes a file for each process and merges them afterwards, which loses scalars.)
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Tensor]], finish: Callable[[], object]) -> None:
        self._folder = folder
        self._finish = finish
        self._layouts = {file: _layout(tensors) for file, tensors in files.items()}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        with ExitStack() as stack:
            files = {file: stack.enter_context(self._open(file)) for file in self._layouts}
            for item in plan.items:
                rows = planner.resolve_data(item)
                assert isinstance(rows, Tensor)
                file, _, name = item.index.fqn.partition("/")
                files[file].seek(self._layouts[file][1][name] + _values_before(item) * rows.element_size())
                files[file].write(rows.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for file, (head, _) in self._layouts.items():
            with self._open(file) as opened:
                opened.write(head)
        self._finish()

    @contextmanager
    def _open(self, file: str) -> Iterator[BinaryIO]:
        """A file that others write in, too; what was written is on the disk afterwards, not only on its way."""
        path = self._folder / f"{file}.safetensors"
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())

    # What this storage has no use for.

    def reset(self, checkpoint_id: object = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return False


def _layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where in it the values of each tensor begin: https://github.com/huggingface/
    safetensors, "Format"."""
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, x in sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0])):  # all are aligned then
        start, end = end, end + x.numel() * x.element_size()
        entries[name] = {"dtype": _name_of(x.dtype), "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + entry["data_offsets"][0] for name, entry in entries.items()}


@cache
def _name_of(dtype: torch.dtype) -> str:
    """What safetensors calls it."""
    made = save({"x": torch.empty(0, dtype=dtype)})
    (size,) = struct.unpack_from("<Q", made)
    return str(json.loads(made[8 : 8 + size])["x"]["dtype"])


def _values_before(item: WriteItem) -> int:
    """How many values of the whole tensor come before a process's rows."""
    data = item.tensor_data
    assert data is not None and data.chunk.sizes[1:] == data.size[1:]
    return data.chunk.offsets[0] * math.prod(data.size[1:]) if data.size else 0
