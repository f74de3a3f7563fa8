"""Gather batches on the device, from blocks of stored rows that are uploaded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from activation_store import StagedBatch, Store
from sae_core.training.upload import Uploader


class DeviceRows:
    """The current block of one array's rows, held on a device.

    A block is copied asynchronously: the host does not wait for the copy, but later work on the
    device does. Encoded rows are decoded on the device after the gather, so that fewer bytes cross
    the bus. With codec int8, this is half as many bytes as with bfloat16.

    Args:
        store: The store. Its codec must allow decoding on a device; see `decodes_on_device`.
        array: Name of the array (a hookpoint).
        device: Device on which batches are gathered.
    """

    def __init__(self, store: Store, array: str, device: torch.device) -> None:
        self._array = array
        self._uploader = Uploader(device)
        self._block: Any = None
        self._stored: dict[str, torch.Tensor] = {}
        self._order = torch.empty(0, dtype=torch.int64)
        self._scale = ""
        self._formula: tuple[torch.Tensor, torch.Tensor] | None = None
        row_codec = store.row_codec(array)
        if row_codec is not None:
            formula = row_codec.scale_offset
            assert formula is not None, "the caller checks decodes_on_device"
            self._scale = array + formula.scale
            self._formula = (
                torch.tensor(formula.offset, dtype=torch.float32, device=device),
                torch.tensor(formula.factor, dtype=torch.float32, device=device),
            )

    def pick(self, batch: StagedBatch) -> dict[str, torch.Tensor]:
        """Return a batch's stored rows on the device, as `{array: [B, ...]}` for `decode`."""
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
        """Return rows [B, d_model], decoded from their stored form. Encoded rows become float32."""
        rows = stored[self._array]
        if self._formula is None:
            return rows
        offset, factor = self._formula
        return torch.addcmul(offset, stored[self._scale][:, None], factor * rows.float())

    def _upload(self, block: Any) -> None:
        if self._block is block:
            return
        rows = map(to_torch, block.arrays.values())
        self._order, *stored = self._uploader.upload([torch.from_numpy(block.order), *rows])
        self._stored = dict(zip(block.arrays, stored, strict=True))
        self._block = block


def decodes_on_device(store: Store, array: str) -> bool:
    """Return True if a device can decode an array's stored rows. Otherwise the host must do so."""
    row_codec = store.row_codec(array)
    return row_codec is None or row_codec.scale_offset is not None


def to_torch(rows: NDArray[np.generic]) -> torch.Tensor:
    """Return rows of any dtype that stores use, as a tensor that shares their memory."""
    # torch rejects NumPy's bfloat16, so pass the raw bits.
    if rows.dtype.name == "bfloat16":
        return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(rows)
