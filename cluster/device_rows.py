"""Batches gathered on the device: a block of rows goes there once, as stored, and stays a while."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from activation_store import StagedBatch, Store
from cluster.tensors import to_torch


class DeviceRows:
    """The rows of one array of a store, on a device.

    The host does not wait for a block's copy, the device's work after it does; int8 rows are
    dequantised after the gather, on the device, so that half the bytes cross the bus.

    Args:
        store: its codec says how rows are stored.
        array: hookpoint.
        device: where batches are to be.
    """

    def __init__(self, store: Store, array: str, device: torch.device) -> None:
        self._array, self._device = array, device
        self._block: Any = None
        self._stored: dict[str, torch.Tensor] = {}
        self._order = torch.empty(0, dtype=torch.int64)
        self._copied: torch.cuda.Event | None = None
        self._scaling: tuple[torch.Tensor, torch.Tensor] | None = None
        if store.header.codec == "int8":
            scaling = store.scaling(array)
            self._scaling = (
                torch.tensor(scaling.mean, dtype=torch.float32, device=device),
                torch.tensor(scaling.std, dtype=torch.float32, device=device),
            )

    def pick(self, batch: StagedBatch) -> dict[str, torch.Tensor]:
        """[B, ...] rows of a batch on the device, each array as stored: `decode` takes them."""
        parts = []
        for part in batch.parts:
            self._upload(part.block)
            picks = self._order[part.place]
            stored = self._stored.items()
            parts.append({name: rows.index_select(0, picks) for name, rows in stored})
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, d_model] rows from what is stored of them; int8 ones as float32."""
        rows = stored[self._array]
        if self._scaling is None:
            return rows
        mean, std = self._scaling
        return torch.addcmul(mean, stored[f"{self._array}.scale"][:, None], std * rows.float())

    def _upload(self, block: Any) -> None:
        if self._block is block:
            return
        if self._copied is not None:
            self._copied.synchronize()  # the old block's memory is about to be used again
        self._stored = {
            name: to_torch(rows).to(self._device, non_blocking=True)
            for name, rows in block.arrays.items()
        }
        self._order = torch.from_numpy(block.order).to(self._device)
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._block = block  # held: its memory must not be written while it is copied


def pinned(n_bytes: int) -> NDArray[Any]:
    """Page-locked memory of that size, from which a GPU copies by itself."""
    return torch.empty(max(n_bytes, 1), dtype=torch.uint8, pin_memory=True).numpy()
