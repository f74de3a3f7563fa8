"""The store benchmark's data: the same bfloat16 rows as a raw file, stores and safetensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from activation_store import CODECS, Calibration, Store, StoreWriter, open_store

ARRAY = "activations"
BF16 = np.dtype(ml_dtypes.bfloat16)
BASELINE = "none"
"""Codec of the stores that other systems read."""
SHARD_BYTES = 64 << 20
BUFFER_BYTES = 128 << 20
BATCH_ROWS = 4096


@dataclass(frozen=True)
class Data:
    """Location and sizes of the data."""

    folder: Path
    d_model: int
    n_items: int
    shard_rows: int
    """Number of rows in each item."""
    calibration: Calibration
    item: NDArray[Any]
    """[shard_rows, d_model] bfloat16; every item holds these same rows."""
    sidecars: dict[str, NDArray[np.int64]]
    """Token ids, documents and positions of an item's rows, [shard_rows] each."""

    @property
    def row_bytes(self) -> int:
        """Number of bytes per row."""
        return self.d_model * BF16.itemsize

    @property
    def n_rows(self) -> int:
        """Total number of rows in all items."""
        return self.n_items * self.shard_rows

    @property
    def buffer_rows(self) -> int:
        """Number of rows that every system shuffles together in memory."""
        return BUFFER_BYTES // self.row_bytes

    @property
    def raw(self) -> Path:
        """Path of the raw file: all rows and nothing else."""
        return self.folder / "raw.bin"

    def store(self, codec: str = BASELINE) -> Store:
        """Open our store of the data that was written with `codec`."""
        return open_store(self.folder / codec)

    def shard(self, item: int) -> Path:
        """Return the path of an item's safetensors file."""
        return self.folder / f"{item}.safetensors"

    def drop_cache(self) -> None:
        """Drop every file from the page cache."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def make_data(folder: Path, d_model: int, n_bytes: int) -> Data:
    """Write about `n_bytes` of rows once in every format, and sync them to disk."""
    from safetensors.numpy import save_file

    shard_rows = SHARD_BYTES // (2 * d_model) // 512 * 512
    n_items = max(n_bytes // (shard_rows * d_model * 2), 1)
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(0, 0.5, d_model))
    mean = rng.standard_normal(d_model) * spread
    item = (rng.standard_normal((shard_rows, d_model)) * spread + mean).astype(BF16)
    sidecars = {
        "token_id": rng.integers(0, 50_000, shard_rows),
        "document": np.arange(shard_rows) // 512,
        "position": np.arange(shard_rows) % 512,
    }
    calibration = Calibration(mean, spread, 1.0)
    data = Data(folder, d_model, n_items, shard_rows, calibration, item, sidecars)
    writers = {codec: writer(data, folder / codec, codec) for codec in CODECS.names()}
    with data.raw.open("wb") as raw:
        for i in range(n_items):
            raw.write(item.view(np.uint8).data)
            for one in writers.values():
                one.write_item(i, item, sidecars)
            save_file({ARRAY: item}, data.shard(i))
    for one in writers.values():
        one.finalise()
    os.sync()
    return data


def writer(data: Data, path: Path, codec: str) -> StoreWriter:
    """Return a writer for a new store with the data's array, shard size and calibration."""
    return StoreWriter(
        path,
        {ARRAY: data.d_model},
        shard_tokens=data.shard_rows,
        calibration={ARRAY: data.calibration},
        codec=codec,
    )
