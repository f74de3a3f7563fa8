"""Track the memory that torch operations allocate, on any device, without the caching allocator."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Context manager that counts the bytes of tensors made inside it that are still referenced.

    Workspace inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_operation = ""
        """The operation that reached the peak."""
        self.at_peak: dict[str, int] = {}
        """Bytes at the peak by the operation, dtype and shape that made the tensor."""
        self._users: dict[int, int] = {}
        self._made: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._add("", tensor)  # made before or outside this block, if it is not known
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(str(func), tensor)
        return out

    def _add(self, operation: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not operation and key in self._users:
            return
        if key not in self._users:
            self._users[key] = 0
            size = storage.nbytes() if operation else 0
            self._made[key] = (f"{operation} {tensor.dtype} {list(tensor.shape)}", size)
            self.live_bytes += size
            if self.live_bytes > self.peak_bytes:
                self.peak_bytes, self.peak_operation = self.live_bytes, operation
                self.at_peak = {}
                for what, bytes_ in self._made.values():
                    self.at_peak[what] = self.at_peak.get(what, 0) + bytes_
        self._users[key] += 1
        weakref.finalize(tensor, self._remove, key)

    def _remove(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live_bytes -= self._made.pop(key)[1]
