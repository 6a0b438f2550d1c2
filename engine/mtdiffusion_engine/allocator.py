"""The C library's allocator, which torch takes the memory of tensors on the CPU from."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # as malloc.h of the GNU C library numbers them
_NEVER = -1


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Keep the memory of freed tensors for the next ones, instead of giving it back to the system.

    A step frees what it has computed, and the next one computes as much again. The GNU C library gives large blocks
    back at once, so that the system clears each page anew when it is touched again, which takes a good part of a step.
    Afterwards the process keeps what it has used at most at one time, until it ends. The command line does this by
    itself; a Python program that trains or samples on the CPU may call it once, at its start.

    Args:
        environment: where ``MALLOC_*`` or ``GLIBC_TUNABLES`` say how memory is to be taken, that is followed instead.

    Returns:
        Whether it is kept; False where another C library or the environment decides.
    """
    asked = "GLIBC_TUNABLES" in environment or any(name.startswith("MALLOC_") for name in environment)
    if asked or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    # A block that is mapped by itself is unmapped when freed, whatever the threshold is: nothing is mapped by itself.
    return library.mallopt(_M_TRIM_THRESHOLD, _NEVER) == 1 and library.mallopt(_M_MMAP_MAX, 0) == 1
