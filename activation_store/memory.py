"""Memory for rows that is used again as soon as nobody holds it, so that reading allocates none."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Allocate = Callable[[int], Any]
"""Bytes -> a writable buffer of that size; pinned memory, where a GPU copies from it."""


def anonymous(n_bytes: int) -> mmap.mmap:
    """Memory of the process, in huge pages where the system has them."""
    memory = mmap.mmap(-1, max(n_bytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Recycler:
    """Hands out arrays; the memory of one returns when it and all views of it are gone.

    Tensors and memoryviews made from an array count as views: what somebody still holds is never
    written again.
    """

    def __init__(self, allocate: Allocate = anonymous) -> None:
        self._allocate = allocate
        self._free: dict[int, list[Any]] = {}

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array with whatever was in its memory before."""
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        n_bytes = count * dtype.itemsize
        free = self._free.setdefault(n_bytes, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = self._allocate(n_bytes)
        # Views refer to this array, not to the one they were made from: it lives as long as they.
        flat = np.frombuffer(memory, dtype, count)
        weakref.finalize(flat, free.append, memory).atexit = False
        return flat.reshape(shape)
