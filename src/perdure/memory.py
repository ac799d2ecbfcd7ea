"""How the process keeps the CPU memory that tensors have left."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's names (malloc.h)."""
VARIABLES = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Where a user has set one of these, it stays with that."""


def keep_freed_memory() -> None:
    """Let the next tensors have it, instead of handing it back to the system and asking again: by default glibc maps
    and unmaps every large block, and the system clears each of its pages anew, in every step. Nothing happens where the
    C library is another one, or where one of VARIABLES is set."""
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in VARIABLES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # An older glibc takes 32 MiB at most; where it takes neither, setting the others would turn off its own adapting.
    if not mallopt(M_MMAP_THRESHOLD, 2**30) and not mallopt(M_MMAP_THRESHOLD, 2**25):
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)
