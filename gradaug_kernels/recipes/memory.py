"""What the C library does with memory that is freed, which a training step on the CPU allocates anew."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_blocks() -> None:
    """Have the C library keep what is freed for the blocks that follow, for the whole process. glibc only.

    By default it returns large blocks to the system, whose new pages can take as long to come as a layer takes to fill
    them. The process keeps its peak of memory.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never; the largest integer would trim what is over 2 GiB
