"""A codec from outside the package: half-precision rows with one scale per row, masked chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store import (
    Calibration,
    ChunkCompressor,
    Codec,
    DiskArray,
    RowCodec,
    ScaleOffset,
)

Bytes = NDArray[np.uint8]
PEAK = ".peak"


class Masked(ChunkCompressor):
    """A marker, then the bytes of the chunk without its trailing zeros, each XOR 90."""

    def __init__(self, most_chunk_bytes: int = 1 << 20, grows: int = 0) -> None:
        self.most_chunk_bytes = most_chunk_bytes
        self._grows = grows
        """Bytes to append beyond `most_bytes`, as a broken compressor would."""

    def most_bytes(self, n_bytes: int) -> int:
        return n_bytes + 1

    def compress(self, data: Bytes, itemsize: int) -> Bytes:
        used = int(np.flatnonzero(data).max(initial=-1)) + 1
        return np.concatenate([[88], data[:used] ^ 90, [0] * self._grows]).astype(np.uint8)

    def decompress(self, packed: Bytes, target: Bytes) -> None:
        if packed[0] != 88 or len(packed) - 1 > len(target):
            raise ValueError(f"holds {len(packed) - 1} bytes: expected at most {len(target)}")
        target[: len(packed) - 1] = packed[1:] ^ 90
        target[len(packed) - 1 :] = 0

    def metadata(self, itemsize: int) -> dict[str, Any]:
        return {"name": "masked", "configuration": {"typesize": itemsize, "mask": 90}}


class HalfRows(RowCodec):
    """x[t, c] = mean[c] + peak[t] * half[t, c], with |half| <= 1."""

    def __init__(self, mean: NDArray[np.float32], host_only: bool = False) -> None:
        self.mean = mean
        self.host_only = host_only

    def encode(self, rows: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        centred = rows.astype(np.float32) - self.mean
        peak = np.abs(centred).max(axis=1, initial=0)
        half = centred / np.where(peak > 0, peak, 1)[:, None]
        return half.astype("<f2"), peak

    def decode(self, stored: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
        half, peak = stored
        out[:] = self.mean + peak[:, None] * half.astype(np.float32)

    def attributes(self, name: str) -> dict[str, Any]:
        return {"peak": name + PEAK, "mean": self.mean.tolist()}

    @property
    def scale_offset(self) -> ScaleOffset | None:
        if self.host_only:
            return None
        return ScaleOffset(offset=self.mean, factor=np.ones_like(self.mean), scale=PEAK)


class Halves(Codec):
    """The toy codec; its options make it violate the interface."""

    needs_calibration = True

    def __init__(self, compressor: ChunkCompressor | None = None, host_only: bool = False) -> None:
        self._compressor = compressor or Masked()
        self._host_only = host_only

    def disk_arrays(self, dtype: np.dtype[Any], width: int) -> dict[str, DiskArray]:
        return {
            "": DiskArray(np.dtype("<f2"), (width,), self._compressor),
            PEAK: DiskArray(np.dtype("<f4"), (), self._compressor),
        }

    def row_codec(
        self, dtype: np.dtype[Any], width: int, calibration: Calibration | None
    ) -> HalfRows:
        assert calibration is not None
        return HalfRows(calibration.mean.astype(np.float32), self._host_only)
