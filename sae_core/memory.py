"""What the C library does with memory that a step has freed."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 1 << 30
_LARGEST_INT = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Keeps blocks up to 1 GiB for the next step instead of returning them to the system.

    glibc hands blocks from 32 MiB on back as soon as they are freed, and the kernel zeroes them
    anew at the next step: measured at a quarter of a CPU step's time. For the whole process; does
    nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
    library.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
