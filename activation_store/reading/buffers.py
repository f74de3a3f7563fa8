"""Reusable memory for rows, so that steady-state reading allocates no new memory."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Allocate = Callable[[int], Any]
"""Function that takes a size in bytes and returns a writable buffer, pinned if a GPU reads it."""


def anonymous(n_bytes: int) -> mmap.mmap:
    """Allocate ordinary process memory, in huge pages if the system supports them."""
    memory = mmap.mmap(-1, max(n_bytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Recycler:
    """Allocator that reuses the memory of an array once no view of the array is referenced.

    Tensors and memoryviews created from an array count as views, so memory that is still referenced
    is never overwritten.
    """

    def __init__(self, allocate: Allocate = anonymous) -> None:
        self._allocate = allocate
        self._free: dict[int, list[Any]] = {}

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an uninitialised array."""
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        n_bytes = count * dtype.itemsize
        free = self._free.setdefault(n_bytes, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = self._allocate(n_bytes)
        # This flat array is the base of every view, so it lives as long as the last view. Its
        # finalizer returns the memory to the free list.
        flat = np.frombuffer(memory, dtype, count)
        weakref.finalize(flat, free.append, memory).atexit = False
        return flat.reshape(shape)
