"""The bytes of one shard: Zarr's `sharding_indexed` codec, written and read without Zarr.

    chunk 0 | crc | chunk 1 | crc | ... | table of the chunk checksums | index | crc of the index

A chunk is [chunk_rows, width] little-endian numbers, or those compressed; the index holds (offset,
length) of every chunk with its checksum as uint64, all ones where a chunk is absent. Zarr readers
find the index at the end of the file and the chunks by it, and never look at the table. The table
is ours: index and table together (the *tail*) have a checksum in the commit record. It covers the
checksums of all chunks, so one read of the tail proves that this is the very file that was
committed, no other shard of the same shape, and no byte is summed twice.

Source: the sharding codec of the Zarr v3 specification (ZEP 2), the crc32c codec.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store import compression
from activation_store.checksum import crc32c
from activation_store.files import Bytes, as_bytes
from activation_store.parallel import run_all

ABSENT = np.uint64(2**64 - 1)
CRC_BYTES = 4


@dataclass(frozen=True)
class ShardLayout:
    """Sizes of every shard of one array."""

    shard_rows: int
    chunk_rows: int
    """Divides shard_rows."""
    row_bytes: int
    itemsize: int
    """Bytes of one number."""
    compressed: bool = False
    """Whether chunks go through Blosc, and so have sizes of their own."""

    @property
    def n_chunks(self) -> int:
        """Chunks of a full shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk in memory."""
        return self.chunk_rows * self.row_bytes

    @property
    def most_stored_bytes(self) -> int:
        """Most bytes that a chunk takes in the file, with its checksum."""
        size = self.chunk_bytes
        return (compression.most_bytes(size) if self.compressed else size) + CRC_BYTES

    @property
    def tail_bytes(self) -> int:
        """Bytes of table, index and the checksum of the index."""
        return (CRC_BYTES + 16) * self.n_chunks + CRC_BYTES

    def chunks_with_rows(self, rows: int) -> int:
        """How many chunks a shard of `rows` rows stores."""
        return -(-rows // self.chunk_rows)

    def can_be(self, rows: int, n_bytes: int) -> bool:
        """Whether the file of a shard of `rows` rows may have `n_bytes` bytes."""
        n_chunks = self.chunks_with_rows(rows)
        most = n_chunks * self.most_stored_bytes + self.tail_bytes
        least = n_chunks * (CRC_BYTES + 1) + self.tail_bytes if self.compressed else most
        return least <= n_bytes <= most


@dataclass(frozen=True)
class EncodedShard:
    """A shard as the pieces of memory to write one after the other."""

    parts: list[Bytes]
    n_bytes: int
    tail_crc32c: int


@dataclass(frozen=True)
class ShardIndex:
    """Where the chunks of a shard lie, and their checksums."""

    offsets: list[int]
    """[stored chunks]: bytes from the beginning of the file."""
    lengths: list[int]
    """[stored chunks]: bytes with the checksum at the end."""
    crc32c: list[int]
    """[stored chunks]: of the chunk as it is stored."""


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
    if layout.compressed:
        tasks = [partial(compression.compress, chunk, layout.itemsize) for chunk in chunks]
        chunks = run_all(tasks)
    table = np.zeros(layout.n_chunks, "<u4")
    table[: len(chunks)] = [crc32c(chunk) for chunk in chunks]
    index = _index(layout, [len(chunk) + CRC_BYTES for chunk in chunks])
    tail = as_bytes(np.concatenate([as_bytes(table), index]))
    parts = []
    for number, chunk in enumerate(chunks):
        parts += [chunk, as_bytes(table[number : number + 1])]
    parts.append(tail)
    return EncodedShard(parts, sum(map(len, parts)), crc32c(tail))


def _index(layout: ShardLayout, lengths: list[int]) -> Bytes:
    index = np.full((layout.n_chunks, 2), ABSENT, "<u8")
    index[: len(lengths), 0] = np.cumsum([0, *lengths])[:-1]
    index[: len(lengths), 1] = lengths
    checksum = np.array([crc32c(as_bytes(index))], "<u4")
    return np.concatenate([as_bytes(index), as_bytes(checksum)])


def decode_tail(layout: ShardLayout, rows: int, n_bytes: int, tail: Bytes) -> ShardIndex:
    """The index of a shard of `rows` rows from a tail whose own checksum has been verified.

    Raises:
        ValueError: A chunk that the rows need is absent, or lies outside the file's `n_bytes`.
    """
    count = layout.chunks_with_rows(rows)
    split = CRC_BYTES * layout.n_chunks
    index = tail[split:-CRC_BYTES].view("<u8").reshape(-1, 2)[:count]
    offsets, lengths = index[:, 0].tolist(), index[:, 1].tolist()
    most, end = layout.most_stored_bytes, n_bytes - layout.tail_bytes
    least = CRC_BYTES + 1 if layout.compressed else most
    for chunk, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        if not least <= length <= most or offset + length > end:
            raise ValueError(f"chunk {chunk} of {length} bytes at {offset} cannot be")
    return ShardIndex(offsets, lengths, tail[: CRC_BYTES * count].view("<u4").tolist())
