"""Gathering of batches on the device, from blocks of stored rows that are uploaded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from activation_store import StagedBatch, Store
from sae_core.training.upload import Uploader


class DeviceRows:
    """The current block of one array's rows, held on a device.

    The copy of a block is asynchronous: the host does not wait for it, later work on the device
    does. int8 rows are dequantised on the device after the gather, so that half as many bytes cross
    the bus as with bfloat16.

    Args:
        store: the store; its codec says how rows are stored.
        array: name of the array (a hookpoint).
        device: device on which batches are wanted.
    """

    def __init__(self, store: Store, array: str, device: torch.device) -> None:
        self._array = array
        self._uploader = Uploader(device)
        self._block: Any = None
        self._stored: dict[str, torch.Tensor] = {}
        self._order = torch.empty(0, dtype=torch.int64)
        self._scaling: tuple[torch.Tensor, torch.Tensor] | None = None
        if store.header.codec == "int8":
            scaling = store.scaling(array)
            self._scaling = (
                torch.tensor(scaling.mean, dtype=torch.float32, device=device),
                torch.tensor(scaling.std, dtype=torch.float32, device=device),
            )

    def pick(self, batch: StagedBatch) -> dict[str, torch.Tensor]:
        """Return the rows of a batch on the device, as stored: `{array: [B, ...]}` for `decode`."""
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
        """Return rows [B, d_model] from their stored form; int8 rows become float32."""
        rows = stored[self._array]
        if self._scaling is None:
            return rows
        mean, std = self._scaling
        return torch.addcmul(mean, stored[f"{self._array}.scale"][:, None], std * rows.float())

    def _upload(self, block: Any) -> None:
        if self._block is block:
            return
        rows = map(to_torch, block.arrays.values())
        self._order, *stored = self._uploader.upload([torch.from_numpy(block.order), *rows])
        self._stored = dict(zip(block.arrays, stored, strict=True))
        self._block = block


def pinned(n_bytes: int) -> NDArray[Any]:
    """Return `n_bytes` of page-locked memory, from which a GPU can copy asynchronously."""
    return torch.empty(max(n_bytes, 1), dtype=torch.uint8, pin_memory=True).numpy()


def to_torch(rows: NDArray[np.generic]) -> torch.Tensor:
    """Return rows of any dtype of a store as a tensor that shares their memory."""
    # torch rejects NumPy's bfloat16, so pass the raw bits.
    if rows.dtype.name == "bfloat16":
        return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(rows)
