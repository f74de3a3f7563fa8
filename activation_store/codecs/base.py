"""The interface of a codec, which converts rows of a hookpoint to arrays on disk and back.

A codec has up to two parts. A `RowCodec` converts rows to the arrays that are stored, such as int8
values and one scale per row. A `ChunkCompressor` compresses the bytes of each chunk of such an
array. A codec with neither part stores the rows unchanged. Sidecars are always stored unchanged.

To add a codec, implement `Codec`. Then either declare an entry point in the group
`latent_foundry.codecs`, or call `CODECS.register` in each process. With an entry point, every
process that has the package installed can open the stores. The name of a codec must never change,
because each store records the name of its codec.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.format.calibration import Calibration
from activation_store.storage.atomic_files import Bytes

Floats = NDArray[np.float32]

SCALE = ".scale"
"""Suffix of the name of an array of row scales.

With any codec, no hookpoint may be called `<other hookpoint>.scale`. This ensures that the same
hookpoints can be stored with every codec.
"""


class ChunkCompressor(ABC):
    """Lossless compression of the chunks of an array on disk.

    Several threads call the methods concurrently, so the methods should release the GIL.
    """

    most_chunk_bytes: int = 1 << 40
    """Maximum size in bytes of a chunk that can be compressed."""

    @abstractmethod
    def most_bytes(self, n_bytes: int) -> int:
        """Return the maximum compressed size, in bytes, of a chunk of `n_bytes` bytes."""

    @abstractmethod
    def compress(self, data: Bytes, itemsize: int) -> Bytes:
        """Compress a chunk of numbers of `itemsize` bytes each, deterministically."""

    @abstractmethod
    def decompress(self, packed: Bytes, target: Bytes) -> None:
        """Decompress a chunk into `target`.

        `packed` has passed its checksum, but is not trusted: another program may have written it.

        Raises:
            ValueError: If `packed` does not decompress to exactly the size of `target`.
        """

    @abstractmethod
    def metadata(self, itemsize: int) -> dict[str, Any]:
        """Return the entry for `codecs` in the Zarr metadata, with keys "name", "configuration"."""


@dataclass(frozen=True)
class DiskArray:
    """One array on disk."""

    dtype: np.dtype[Any]
    """Data type: little-endian integers or floating-point numbers."""
    row_shape: tuple[int, ...]
    """Shape of a row: (d_model,), or () for one number per row."""
    compressor: ChunkCompressor | None = None
    """Compressor of the chunks, or None to store them uncompressed."""

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes, before compression."""
        return self.dtype.itemsize * math.prod(self.row_shape)


@dataclass(frozen=True)
class ScaleOffset:
    """Parameters with which a device decodes rows.

    The formula is x[t, c] = offset[c] + scale[t] * (factor[c] * q[t, c]), where q is the array on
    disk that has the hookpoint's name.
    """

    offset: Floats
    """Offset of each channel, [d_model]."""
    factor: Floats
    """Factor of each channel, [d_model]."""
    scale: str
    """Suffix of the name of the array on disk that holds the scale of each row."""


class RowCodec(ABC):
    """Conversion of one hookpoint's rows to arrays on disk and back, including its constants."""

    @abstractmethod
    def encode(self, rows: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Encode rows; equal rows must give equal bytes.

        Args:
            rows: [n, d_model] in the store's dtype.

        Returns:
            The arrays in the order of `Codec.disk_arrays`, [n, *row_shape] each.
        """

    @abstractmethod
    def decode(self, stored: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
        """Decode rows into memory of the caller. Several threads call this concurrently.

        Args:
            stored: The arrays in the order of `Codec.disk_arrays`, [n, *row_shape] each.
            out: Output [n, d_model] in the store's dtype.
        """

    def attributes(self, name: str) -> dict[str, Any]:
        """Return the attributes of the Zarr array `name`, so that other readers can decode it."""
        del name
        return {}

    @property
    def scale_offset(self) -> ScaleOffset | None:
        """Parameters for decoding on a device, or None if the host must decode the rows."""
        return None


class Codec(ABC):
    """Codec for the hookpoint arrays of a store."""

    needs_calibration: bool = False
    """Whether `row_codec` needs the statistics of the hookpoint."""

    @abstractmethod
    def disk_arrays(self, dtype: np.dtype[Any], width: int) -> dict[str, DiskArray]:
        """Return the arrays on disk that make up one hookpoint array.

        Args:
            dtype: Data type of the rows that readers get.
            width: d_model of the hookpoint.

        Returns:
            {suffix: array}. The name of an array on disk is the hookpoint's name plus the suffix.
            The first suffix is "". Its array has the most bytes and determines the chunk size.
        """

    def row_codec(
        self, dtype: np.dtype[Any], width: int, calibration: Calibration | None
    ) -> RowCodec | None:
        """Return the conversion of one hookpoint's rows, or None if they are stored unchanged.

        Args:
            dtype: Data type of the rows that readers get.
            width: d_model of the hookpoint.
            calibration: Statistics of the hookpoint. May be None only if `needs_calibration` is
                False.
        """
        del dtype, width, calibration
        return None

    def row_bytes(self, dtype: np.dtype[Any], width: int) -> int:
        """Return the total size in bytes of a row in all arrays on disk, before compression."""
        return sum(part.row_bytes for part in self.disk_arrays(dtype, width).values())
