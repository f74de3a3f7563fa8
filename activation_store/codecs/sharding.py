"""Encode and decode shard files: Zarr's `sharding_indexed` codec, implemented without Zarr.

    chunk 0 | crc | chunk 1 | crc | ... | table of the chunk checksums | index | crc of the index

A chunk is an array [chunk_rows, width] of little-endian numbers, possibly compressed. The index
holds the offset of every chunk and its length including its checksum, as uint64. For an absent
chunk, all bits of both are set. Zarr readers find the index at the end of the file, and the chunks
through the index.

The table of checksums is our addition, which Zarr readers ignore. The table, the index and the
checksum of the index form the *tail*. The checksum of the tail is in the commit record. Since the
tail contains the checksums of all chunks, reading the tail is enough to prove that the file is the
committed one and not another shard of the same shape. Each chunk is then verified against the
table.

Source: the sharding codec of the Zarr v3 specification (ZEP 2), the crc32c codec.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.checksum import crc32c
from activation_store.codecs.base import ChunkCompressor
from activation_store.errors import CodecError
from activation_store.storage.atomic_files import Bytes, as_bytes
from activation_store.threads import run_all

ABSENT = np.uint64(2**64 - 1)
CRC_BYTES = 4


@dataclass(frozen=True)
class ShardLayout:
    """Sizes that all shards of one array share."""

    shard_rows: int
    """Rows per shard."""
    chunk_rows: int
    """Rows per chunk; divides `shard_rows`."""
    row_bytes: int
    """Bytes per row."""
    itemsize: int
    """Bytes per number."""
    compressor: ChunkCompressor | None = None
    """Compressor of the chunks, whose stored sizes then vary, or None if they are uncompressed."""

    @property
    def n_chunks(self) -> int:
        """Number of chunks of a full shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def chunk_bytes(self) -> int:
        """Size of an uncompressed chunk in bytes."""
        return self.chunk_rows * self.row_bytes

    @property
    def most_stored_bytes(self) -> int:
        """Maximum size in bytes of a chunk in the file, including its checksum."""
        size = self.chunk_bytes
        return (self.compressor.most_bytes(size) if self.compressor else size) + CRC_BYTES

    @property
    def least_stored_bytes(self) -> int:
        """Minimum size in bytes of a chunk in the file, including its checksum."""
        return (1 if self.compressor else self.chunk_bytes) + CRC_BYTES

    @property
    def tail_bytes(self) -> int:
        """Total size in bytes of the table, the index and the checksum of the index."""
        return (CRC_BYTES + 16) * self.n_chunks + CRC_BYTES

    def chunks_with_rows(self, rows: int) -> int:
        """Return the number of chunks that a shard with `rows` valid rows stores."""
        return -(-rows // self.chunk_rows)

    def is_valid_size(self, rows: int, n_bytes: int) -> bool:
        """Return whether the file of a shard with `rows` valid rows may have `n_bytes` bytes."""
        n_chunks = self.chunks_with_rows(rows)
        most = n_chunks * self.most_stored_bytes + self.tail_bytes
        least = n_chunks * self.least_stored_bytes + self.tail_bytes
        return least <= n_bytes <= most


@dataclass(frozen=True)
class EncodedShard:
    """The content of a shard file, in memory."""

    parts: list[Bytes]
    """Buffers to write one after the other."""
    n_bytes: int
    """Size of the file in bytes."""
    tail_crc32c: int
    """Checksum of the tail."""


@dataclass(frozen=True)
class ShardIndex:
    """Location and checksum of each stored chunk of a shard, as lists with one entry per chunk."""

    offsets: list[int]
    """Offset of each chunk from the start of the file, in bytes."""
    lengths: list[int]
    """Length of each chunk including its checksum, in bytes."""
    crc32c: list[int]
    """Checksum of each chunk as stored (after compression)."""


def encode_shard(layout: ShardLayout, rows: NDArray[Any]) -> EncodedShard:
    """Encode rows as a shard file. Uncompressed full chunks are views of `rows`, not copies.

    Args:
        layout: Sizes of the shard.
        rows: [n, ...] with n <= shard_rows, C-contiguous, little-endian.

    Raises:
        CodecError: If a chunk compresses to more bytes than its compressor allows, or to 0 bytes.
    """
    data = as_bytes(rows)
    chunks = [
        data[start : start + layout.chunk_bytes]
        for start in range(0, len(data), layout.chunk_bytes)
    ]
    if chunks and len(chunks[-1]) < layout.chunk_bytes:
        padded = np.zeros(layout.chunk_bytes, np.uint8)
        padded[: len(chunks[-1])] = chunks[-1]
        chunks[-1] = padded
    if layout.compressor is not None:
        chunks = run_all([partial(_compress, layout, layout.compressor, part) for part in chunks])
    table = np.zeros(layout.n_chunks, "<u4")
    table[: len(chunks)] = [crc32c(chunk) for chunk in chunks]
    index = _index(layout, [len(chunk) + CRC_BYTES for chunk in chunks])
    tail = as_bytes(np.concatenate([as_bytes(table), index]))
    parts = []
    for number, chunk in enumerate(chunks):
        parts += [chunk, as_bytes(table[number : number + 1])]
    parts.append(tail)
    return EncodedShard(parts, sum(map(len, parts)), crc32c(tail))


def _compress(layout: ShardLayout, compressor: ChunkCompressor, chunk: Bytes) -> Bytes:
    """Compress one chunk and check its size, because readers reject a shard with wrong sizes."""
    packed = compressor.compress(chunk, layout.itemsize)
    least = layout.least_stored_bytes - CRC_BYTES
    most = layout.most_stored_bytes - CRC_BYTES
    if not least <= len(packed) <= most:
        raise CodecError(
            f"{type(compressor).__name__} compressed a chunk of {len(chunk)} bytes to "
            f"{len(packed)}: expected {least} to {most}; fix the compressor's most_bytes() or "
            "compress() method"
        )
    return packed


def _index(layout: ShardLayout, lengths: list[int]) -> Bytes:
    """Return the index of a shard, followed by its checksum."""
    index = np.full((layout.n_chunks, 2), ABSENT, "<u8")
    index[: len(lengths), 0] = np.cumsum([0, *lengths])[:-1]
    index[: len(lengths), 1] = lengths
    checksum = np.array([crc32c(as_bytes(index))], "<u4")
    return np.concatenate([as_bytes(index), as_bytes(checksum)])


def decode_tail(layout: ShardLayout, rows: int, n_bytes: int, tail: Bytes) -> ShardIndex:
    """Decode the index of a shard from its tail, whose checksum the caller has verified.

    Args:
        layout: Sizes of the shard.
        rows: Number of valid rows.
        n_bytes: Size of the file.
        tail: The last `layout.tail_bytes` bytes of the file.

    Raises:
        ValueError: If a chunk that holds valid rows is absent or lies outside the file.
    """
    count = layout.chunks_with_rows(rows)
    split = CRC_BYTES * layout.n_chunks
    index = tail[split:-CRC_BYTES].view("<u8").reshape(-1, 2)[:count]
    offsets = index[:, 0].tolist()
    lengths = index[:, 1].tolist()
    least = layout.least_stored_bytes
    most = layout.most_stored_bytes
    end = n_bytes - layout.tail_bytes
    for chunk, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        if not least <= length <= most or offset + length > end:
            raise ValueError(
                f"chunk {chunk} has {length} bytes at offset {offset}: expected {least} to {most} "
                f"bytes that end by {end}"
            )
    return ShardIndex(offsets, lengths, tail[: CRC_BYTES * count].view("<u4").tolist())
