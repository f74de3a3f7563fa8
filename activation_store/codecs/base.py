"""The interface of a codec: how rows of a hookpoint become arrays on disk, and rows again.

A codec has up to two parts. A `RowCodec` converts rows to the arrays that are
stored, such as int8 values and one scale per row. A `ChunkCompressor` packs the bytes of each chunk
of such an array. A codec with neither stores the rows as they are. Sidecars are always stored as
they are.

To add a codec, implement `Codec`. Then either declare an entry point in the group
`latent_foundry.codecs`, so that every process with the package installed can open the stores, or
call `CODECS.register` in each process. A store names its codec, so the name must never change.
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

No hookpoint may be called `<other hookpoint>.scale`, whatever the codec, so that the same
hookpoints can be stored with every codec.
"""


class ChunkCompressor(ABC):
    """Lossless compression of the chunks of an array on disk.

    Several threads call the methods at the same time. They should release the GIL.
    """

    most_chunk_bytes: int = 1 << 40
    """Size of the largest chunk that can be compressed, in bytes."""

    @abstractmethod
    def most_bytes(self, n_bytes: int) -> int:
        """Return the largest size, in bytes, that `n_bytes` bytes can compress to."""

    @abstractmethod
    def compress(self, data: Bytes, itemsize: int) -> Bytes:
        """Compress a chunk of numbers of `itemsize` bytes each; must be deterministic."""

    @abstractmethod
    def decompress(self, packed: Bytes, target: Bytes) -> None:
        """Decompress a chunk into `target`.

        `packed` has passed its checksum, but another program may have written it.

        Raises:
            ValueError: If `packed` does not decompress to exactly the size of `target`.
        """

    @abstractmethod
    def metadata(self, itemsize: int) -> dict[str, Any]:
        """Return the entry in the `codecs` of the Zarr metadata, {"name", "configuration"}."""


@dataclass(frozen=True)
class DiskArray:
    """One array on disk."""

    dtype: np.dtype[Any]
    """Data type: little-endian integers or floating-point numbers."""
    row_shape: tuple[int, ...]
    """Shape of a row: (d_model,), or () for one number per row."""
    compressor: ChunkCompressor | None = None
    """Compression of its chunks; None: their bytes are stored as they are."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row before compression."""
        return self.dtype.itemsize * math.prod(self.row_shape)


@dataclass(frozen=True)
class ScaleOffset:
    """Formula with which a device decodes rows: x[t, c] = offset[c] + scale[t] * (factor[c] * q).

    q is the number [t, c] of the array on disk that has the hookpoint's name.
    """

    offset: Floats
    """Offset of each channel, [d_model]."""
    factor: Floats
    """Factor of each channel, [d_model]."""
    scale: str
    """Suffix of the array on disk of the scale of each row."""


class RowCodec(ABC):
    """Conversion of one hookpoint's rows to arrays on disk and back, with its constants."""

    @abstractmethod
    def encode(self, rows: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Encode rows; equal rows must give equal bytes.

        Args:
            rows: [n, d_model] in the store's dtype.

        Returns:
            The arrays of `Codec.disk_arrays` in this order, [n, *row_shape] each.
        """

    @abstractmethod
    def decode(self, stored: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
        """Decode rows into memory of the caller; several threads call this at the same time.

        Args:
            stored: The arrays of `Codec.disk_arrays` in this order, [n, *row_shape] each.
            out: Output [n, d_model] in the store's dtype.
        """

    def attributes(self, name: str) -> dict[str, Any]:
        """Return the attributes of the Zarr array `name`, so that other readers can decode it."""
        del name
        return {}

    @property
    def scale_offset(self) -> ScaleOffset | None:
        """Formula for a device to decode rows; None: the host decodes them before the upload."""
        return None


class Codec(ABC):
    """Encoding of the hookpoint arrays of a store."""

    needs_calibration: bool = False
    """True if `row_codec` needs the statistics of the hookpoint."""

    @abstractmethod
    def disk_arrays(self, dtype: np.dtype[Any], width: int) -> dict[str, DiskArray]:
        """Return the arrays on disk that make up one hookpoint array.

        Args:
            dtype: Data type of the rows that readers get.
            width: d_model of the hookpoint.

        Returns:
            Suffix to array. The suffix is appended to the hookpoint's name. The first suffix is "":
            this array has the most bytes, and chunks are sized by it.
        """

    def row_codec(
        self, dtype: np.dtype[Any], width: int, calibration: Calibration | None
    ) -> RowCodec | None:
        """Return the conversion of one hookpoint's rows; None: they are stored as they are.

        Args:
            dtype: Data type of the rows that readers get.
            width: d_model of the hookpoint.
            calibration: Statistics of the hookpoint; None only if the store has none and
                `needs_calibration` is False.
        """
        del dtype, width, calibration
        return None

    def row_bytes(self, dtype: np.dtype[Any], width: int) -> int:
        """Return the bytes of a stored row of all arrays together, before compression."""
        return sum(part.row_bytes for part in self.disk_arrays(dtype, width).values())
