"""The bytes of one shard: Zarr's `sharding_indexed` codec, written and read without Zarr.

    chunk 0 | crc | chunk 1 | crc | ... | table of the chunk checksums | index | crc of the index

A chunk is [chunk_rows, width] little-endian numbers; the index holds (offset, length) of every
chunk as uint64, all ones where a chunk is absent. Zarr readers find the index at the end of the
file and the chunks by it, and never look at the table. The table is ours: index and table
together (the *tail*) have a checksum in the commit record, so one read of the tail proves that
this is the very file that was committed, and no other shard of the same shape.

Source: the sharding codec of the Zarr v3 specification (ZEP 2), the crc32c codec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from activation_store.files import Bytes, as_bytes

ABSENT = np.uint64(2**64 - 1)
_CRC_BYTES = 4


@dataclass(frozen=True)
class ShardLayout:
    """Sizes of every shard of one array."""

    shard_rows: int
    chunk_rows: int
    """Divides shard_rows."""
    row_bytes: int

    @property
    def n_chunks(self) -> int:
        """Chunks of a full shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk without its checksum."""
        return self.chunk_rows * self.row_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes of table, index and the checksum of the index."""
        return (_CRC_BYTES + 16) * self.n_chunks + _CRC_BYTES

    def chunks_with_rows(self, rows: int) -> int:
        """How many chunks a shard of `rows` rows stores."""
        return -(-rows // self.chunk_rows)

    def chunk_offset(self, chunk: int) -> int:
        """Where chunk number `chunk` begins in the file."""
        return chunk * (self.chunk_bytes + _CRC_BYTES)

    def file_bytes(self, rows: int) -> int:
        """Bytes of a shard file that holds `rows` rows."""
        return self.chunk_offset(self.chunks_with_rows(rows)) + self.tail_bytes


@dataclass(frozen=True)
class EncodedShard:
    """A shard as the pieces of memory to write one after the other."""

    parts: list[Bytes]
    n_bytes: int
    crc32c: int
    """Of the whole file."""
    tail_crc32c: int


def encode_shard(layout: ShardLayout, rows: NDArray[Any]) -> EncodedShard:
    """`rows` [n, ...] C-contiguous, little-endian, n <= shard_rows; full chunks are not copied."""
    data = as_bytes(rows)
    chunks = [
        data[start : start + layout.chunk_bytes]
        for start in range(0, len(data), layout.chunk_bytes)
    ]
    if chunks and len(chunks[-1]) < layout.chunk_bytes:
        padded = np.zeros(layout.chunk_bytes, np.uint8)
        padded[: len(chunks[-1])] = chunks[-1]
        chunks[-1] = padded
    table = np.zeros(layout.n_chunks, "<u4")
    table[: len(chunks)] = [google_crc32c.value(chunk) for chunk in chunks]
    tail = as_bytes(np.concatenate([as_bytes(table), _index(layout, len(chunks))]))
    parts = []
    for number, chunk in enumerate(chunks):
        parts += [chunk, as_bytes(table[number : number + 1])]
    parts.append(tail)
    crc32c = 0
    for part in parts:
        crc32c = google_crc32c.extend(crc32c, part)
    n_bytes = sum(map(len, parts))
    return EncodedShard(parts, n_bytes, crc32c, google_crc32c.value(tail))


def _index(layout: ShardLayout, n_stored: int) -> Bytes:
    index = np.full((layout.n_chunks, 2), ABSENT, "<u8")
    index[:n_stored, 0] = [layout.chunk_offset(chunk) for chunk in range(n_stored)]
    index[:n_stored, 1] = layout.chunk_bytes + _CRC_BYTES
    crc32c = np.array([google_crc32c.value(as_bytes(index))], "<u4")
    return np.concatenate([as_bytes(index), as_bytes(crc32c)])


def chunk_table(layout: ShardLayout, tail: Bytes) -> list[int]:
    """The crc32c of each chunk, from a tail whose own checksum has been verified."""
    return tail[: _CRC_BYTES * layout.n_chunks].view("<u4").tolist()
