"""Page-locked (pinned) host memory of exactly the requested size.

torch's own pinned memory (`pin_memory=True`) is rounded up to a power of two, so that large buffers
take up to twice their size. Here a buffer is ordinary process memory that is registered with CUDA.
This needs no setting of torch's allocator, whose names differ between versions of torch.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foundation.errors import ConfigError

_PORTABLE = 1
"""`cudaHostRegisterPortable`: the memory is treated as pinned in the contexts of all devices."""


def pinned_on(device: torch.device) -> Callable[[int], NDArray[Any]]:
    """Return an allocator of pinned memory for copies to a CUDA device.

    The allocator may be called in any thread. It takes a size in bytes and returns a writable uint8
    array, at least one byte long, that begins at a page. Memory is unregistered and freed when
    nothing refers to the array, or to a view of it, any more.

    Args:
        device: Device whose context registers the memory.

    Returns:
        The allocator. It raises a ConfigError if CUDA refuses to register the memory.
    """
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())  # of the calling thread

    def allocate(n_bytes: int) -> NDArray[Any]:
        memory = mmap.mmap(-1, max(n_bytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        flat = np.frombuffer(memory, np.uint8)
        address = flat.ctypes.data
        # A thread begins on device 0. Without this, a rank on another device whose reading thread
        # allocates would create a second context, of several hundred MiB, on device 0.
        with torch.cuda.device(device):
            error = int(torch.cuda.cudart().cudaHostRegister(address, len(flat), _PORTABLE))
        if error:
            raise ConfigError(
                "store.buffer_tokens",
                f"{n_bytes / 2**30:.2f} GiB",
                f"a buffer that CUDA can page-lock (cudaHostRegister returned error {error})",
                "use a smaller buffer, or raise the limit on locked memory (ulimit -l)",
            )
        weakref.finalize(flat, _unregister, address, memory, device).atexit = False
        return flat

    return allocate


def _unregister(address: int, memory: mmap.mmap, device: torch.device) -> None:
    """Unregister memory once no copy uses it. As an argument, `memory` stays mapped until then."""
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(address)
