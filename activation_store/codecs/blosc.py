"""The lossless codec `blosc`, which other readers can decode as the Zarr v3 codec `blosc`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from activation_store.codecs.base import ChunkCompressor, Codec, DiskArray
from activation_store.storage.atomic_files import Bytes

LEVEL = 1
BLOCK_BYTES = 262_144
"""Block size in bytes. With Blosc's default block size, bfloat16 activations hardly compress."""
_OVERHEAD_BYTES = 16


class BloscCompressor(ChunkCompressor):
    """Compression by a byte shuffle followed by zstd."""

    most_chunk_bytes = 2**31 - 1 - _OVERHEAD_BYTES

    def most_bytes(self, n_bytes: int) -> int:
        """Return the maximum compressed size, in bytes, of a chunk of `n_bytes` bytes."""
        return n_bytes + _OVERHEAD_BYTES

    def compress(self, data: Bytes, itemsize: int) -> Bytes:
        """Compress bytes that hold numbers of `itemsize` bytes each."""
        blosc = _blosc()
        numbers = data.view(f"u{itemsize}")
        packed = blosc.compress(numbers, b"zstd", LEVEL, blosc.SHUFFLE, BLOCK_BYTES)
        return np.frombuffer(packed, np.uint8)

    def decompress(self, packed: Bytes, target: Bytes) -> None:
        """Decompress into `target`.

        Raises:
            ValueError: If `packed` is damaged or does not decompress to exactly the size of
                `target`.
        """
        blosc = _blosc()
        n_bytes = blosc._cbuffer_sizes(packed)[0]
        if n_bytes != len(target):
            raise ValueError(f"holds {n_bytes} bytes: expected {len(target)}")
        try:
            blosc.decompress(packed, target)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def metadata(self, itemsize: int) -> dict[str, Any]:
        """Return the entry for `codecs` in the Zarr metadata, for numbers of `itemsize` bytes."""
        settings = {"typesize": itemsize, "cname": "zstd", "clevel": LEVEL, "shuffle": "shuffle"}
        return {"name": "blosc", "configuration": {**settings, "blocksize": BLOCK_BYTES}}


class Blosc(Codec):
    """Codec that stores rows in the store's dtype and compresses each chunk."""

    def __init__(self) -> None:
        self._compressor = BloscCompressor()

    def disk_arrays(self, dtype: np.dtype[Any], width: int) -> dict[str, DiskArray]:
        """Return one compressed array of the rows."""
        return {"": DiskArray(dtype, (width,), self._compressor)}


def _blosc() -> Any:
    return import_module("numcodecs.blosc")  # imported late, because only this codec needs it


BLOSC = Blosc()
