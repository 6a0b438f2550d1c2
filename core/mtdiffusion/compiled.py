"""A model's network compiled for sampling: once, for whatever is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


def compiled(network: Callable[..., T], device: torch.device, **options: Any) -> Callable[..., T]:
    """A function of tensors ``[B, ...]``, which gives tuples, dicts and tensors ``[B, ...]``, compiled by torch.compile
    at its first call.

    It is compiled for any B. On CUDA its kernels are recorded for each B that comes up and played back as a whole,
    which spares launching them one by one (CUDA graphs).

    Args:
        options: of torch.compile.

    Raises:
        ValueError: at a call, if it cannot be compiled here.
    """
    from torch._dynamo import maybe_mark_dynamic  # they take a second
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    graphs = device.type == "cuda"
    run = torch.compile(network, **({"mode": "reduce-overhead"} if graphs else {}) | options)

    def call(*inputs: Tensor) -> T:
        batch = len(inputs[0])
        if batch == 1:  # which the compiler takes for a constant, and makes a graph of its own for
            inputs = tuple(torch.cat([x, x]) for x in inputs)
        inputs = tuple(x.contiguous() for x in inputs)
        for x in inputs:
            maybe_mark_dynamic(x, 0)
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            out = run(*inputs)
        except (TorchDynamoException, InductorError) as error:
            what = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"compile: the network cannot be compiled here ({what}). On a CPU that takes a C++ compiler, such as "
                "g++; without one, leave compile false"
            ) from error
        # What is played back again overwrites what it gave before.
        cut: T = tree_map_only(Tensor, lambda x: x[:batch].clone() if graphs else x[:batch], out)
        return cut

    return call
