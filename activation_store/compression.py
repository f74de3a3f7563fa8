"""Blosc, as the Zarr v3 codec `blosc` has it: what zarr-python and tensorstore read and write."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from activation_store.files import Bytes

LEVEL = 1
BLOCK_BYTES = 262_144
"""With Blosc's own choice of a block, bfloat16 activations hardly shrink at all."""
MOST_BYTES = 2**31 - 1 - 16
"""Largest chunk that Blosc takes."""
_OVERHEAD_BYTES = 16


def configuration(itemsize: int) -> dict[str, Any]:
    """The codec in Zarr metadata."""
    settings = {"typesize": itemsize, "cname": "zstd", "clevel": LEVEL, "shuffle": "shuffle"}
    return {"name": "blosc", "configuration": {**settings, "blocksize": BLOCK_BYTES}}


def most_bytes(n_bytes: int) -> int:
    """Largest size that `n_bytes` can compress to."""
    return n_bytes + _OVERHEAD_BYTES


def _blosc() -> Any:
    return import_module("numcodecs.blosc")  # only stores with this codec need it


def compress(data: Bytes, itemsize: int) -> Bytes:
    """`data` [n] of numbers of `itemsize` bytes, compressed."""
    blosc, numbers = _blosc(), data.view(f"u{itemsize}")
    packed = blosc.compress(numbers, b"zstd", LEVEL, blosc.SHUFFLE, BLOCK_BYTES)
    return np.frombuffer(packed, np.uint8)


def decompress(packed: Bytes, target: Bytes) -> None:
    """Raises: ValueError: `packed` does not decompress to exactly the size of `target`."""
    blosc = _blosc()
    n_bytes = blosc._cbuffer_sizes(packed)[0]
    if n_bytes != len(target):
        raise ValueError(f"holds {n_bytes} bytes: expected {len(target)}")
    try:
        blosc.decompress(packed, target)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
