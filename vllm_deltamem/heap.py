"""The heap of a CPU worker, whose steps allocate and free the same few hundred megabytes over and over."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
KEPT = 1 << 30  # bytes of free memory at the heap's end before any goes back to the system


def keep_freed() -> None:
    """Have glibc's malloc reuse what was freed, which it otherwise gives back, to be zeroed page by page once more.

    Large tensors as well, which it else maps one by one. Sets it for the whole process. Another C library is left as
    it is, and a preloaded malloc sees to itself.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT)
