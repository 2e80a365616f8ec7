"""The C library's heap: giving memory that was freed back to the system, where the library can be asked to."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def return_freed_memory() -> None:
    """Give pages of the heap that hold nothing back to the system.

    glibc does so by itself at the heap's end only. Work that leaves a small tensor behind for each large one it
    frees (quantising weight after weight) scatters these over the heap, and the process keeps growing as if
    nothing had been freed. Nothing is done under other C libraries, which lack the function.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS and musl; Windows cannot open None
        return None
