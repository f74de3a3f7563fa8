"""Blosc compression of chunks, compatible with the Zarr v3 codec `blosc` of other readers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from activation_store.storage.atomic_files import Bytes

LEVEL = 1
BLOCK_BYTES = 262_144
"""Block size; with Blosc's default, bfloat16 activations hardly shrink at all."""
MOST_BYTES = 2**31 - 1 - 16
"""Largest chunk that Blosc can compress."""
_OVERHEAD_BYTES = 16


def configuration(itemsize: int) -> dict[str, Any]:
    """Return the codec's entry in Zarr metadata, for numbers of `itemsize` bytes."""
    settings = {"typesize": itemsize, "cname": "zstd", "clevel": LEVEL, "shuffle": "shuffle"}
    return {"name": "blosc", "configuration": {**settings, "blocksize": BLOCK_BYTES}}


def most_bytes(n_bytes: int) -> int:
    """Return the largest size, in bytes, that `n_bytes` bytes can compress to."""
    return n_bytes + _OVERHEAD_BYTES


def _blosc() -> Any:
    return import_module("numcodecs.blosc")  # imported late: only stores with this codec need it


def compress(data: Bytes, itemsize: int) -> Bytes:
    """Compress bytes that hold numbers of `itemsize` bytes each."""
    blosc = _blosc()
    numbers = data.view(f"u{itemsize}")
    packed = blosc.compress(numbers, b"zstd", LEVEL, blosc.SHUFFLE, BLOCK_BYTES)
    return np.frombuffer(packed, np.uint8)


def decompress(packed: Bytes, target: Bytes) -> None:
    """Decompress into `target`.

    Raises:
        ValueError: If `packed` is damaged or does not decompress to exactly the size of `target`.
    """
    blosc = _blosc()
    n_bytes = blosc._cbuffer_sizes(packed)[0]
    if n_bytes != len(target):
        raise ValueError(f"holds {n_bytes} bytes: expected {len(target)}")
    try:
        blosc.decompress(packed, target)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
