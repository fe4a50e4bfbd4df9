"""Memory of a process that computes on the CPU: what is freed stays, for the next tensors.

glibc takes blocks above a threshold from the kernel one by one and gives them back when freed; the
kernel clears the pages of each anew. That was a sixth of a denoiser's time, and what two ranks on
two cores disturbed each other with (measured: docs/log.md, 2026-11-26).
"""

from __future__ import annotations

import ctypes
import os
import sys

#: Of malloc.h: the size from which on a block is mapped by itself, and how much is kept when freed.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_BLOCK_BYTES, _KEPT_BYTES = 256 * 2**20, 1024 * 2**20
#: With these a user has said how memory is to be kept.
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed() -> None:
    """From here on this process keeps up to 1 GiB of what it frees; elsewhere than glibc nothing.

    A setting of the environment stands.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _BLOCK_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
