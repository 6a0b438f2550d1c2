"""AdamW as torch has it, without torch's compiler."""

from __future__ import annotations

from inspect import unwrap

import torch


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019), the same to the bit as torch's.

    torch wraps an optimizer's methods to keep its compiler out of them, and for that imports the compiler
    (``torch._dynamo``), which takes over a second. No optimizer is compiled here, so these are the methods themselves;
    of a torch that does not wrap them, they are too.
    """

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    state_dict = unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = unwrap(torch.optim.AdamW.load_state_dict)
    _step = unwrap(torch.optim.AdamW.step)

    @torch.no_grad()  # as the wrapper has it
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is never one
        """One step."""
        self._step(closure)
