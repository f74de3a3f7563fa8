"""Read chunks of committed shard files, verifying checksums and coalescing adjacent chunks."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from activation_store.checksum import crc32c
from activation_store.codecs.base import ChunkCompressor
from activation_store.codecs.sharding import CRC_BYTES, ShardLayout, decode_tail
from activation_store.errors import DamagedDataError
from activation_store.storage.atomic_files import Bytes
from activation_store.storage.base import Storage

_REMEDY = "repair the store with stage=repair, or restore the file from a backup"
_scratch = threading.local()


def scratch(name: str, n_bytes: int) -> Bytes:
    """Return a thread-local buffer of `n_bytes` bytes, reused by later calls with this `name`."""
    memory: Bytes | None = getattr(_scratch, name, None)
    if memory is None or len(memory) < n_bytes:
        memory = np.empty(n_bytes, np.uint8)
        setattr(_scratch, name, memory)
    return memory[:n_bytes]


@dataclass(frozen=True)
class Wanted:
    """A chunk to read, and the destination of its rows."""

    chunk: int
    """Number of the chunk within its shard."""
    rows: int
    """Number of valid rows to read; the chunk's padding is discarded."""
    first: int
    """Row of the caller's output that receives the first row of the chunk."""


class OpenShard:
    """A committed shard file, opened for reading after its tail has been verified.

    Args:
        storage: Storage of the store.
        name: Path of the file, relative to the store.
        layout: Sizes of the shards of this array.
        rows: Number of valid rows.
        n_bytes: File size according to the commit record.
        tail_crc32c: Checksum of the tail according to the commit record.

    Raises:
        MissingDataError: If the file is missing; the message names it.
        DamagedDataError: If the size, tail or index is wrong; the message names the file.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        layout: ShardLayout,
        rows: int,
        n_bytes: int,
        tail_crc32c: int,
    ) -> None:
        self.path = storage.where(name)
        self.layout = layout
        self.rows = rows
        self._run_bytes = storage.run_bytes
        self._gap_bytes = storage.gap_bytes
        self._file = storage.open(name)
        found = self._file.size
        path = self.path
        if found != n_bytes:
            raise DamagedDataError(f"{path} has {found} bytes: expected {n_bytes}; {_REMEDY}")
        tail = np.empty(layout.tail_bytes, np.uint8)
        self._read([tail], n_bytes - layout.tail_bytes, "the index")
        if crc32c(tail) != tail_crc32c:
            raise DamagedDataError(
                f"{path}: the index is damaged, or this is not the committed shard; {_REMEDY}"
            )
        try:
            self._index = decode_tail(layout, rows, n_bytes, tail)
        except ValueError as error:
            raise DamagedDataError(f"{path} has an invalid index: {error}; {_REMEDY}") from error

    @property
    def n_chunks(self) -> int:
        """Number of chunks that hold valid rows."""
        return self.layout.chunks_with_rows(self.rows)

    def rows_of(self, chunk: int) -> int:
        """Return the number of valid rows of a chunk; 0 for a chunk after the shard's last row."""
        start = chunk * self.layout.chunk_rows
        return min(max(self.rows - start, 0), self.layout.chunk_rows)

    def runs(self, wanted: list[Wanted]) -> list[list[Wanted]]:
        """Group chunks of this shard so that each group (a run) can be fetched with one read."""
        index = self._index
        groups = list[list[Wanted]]()
        begin = 0
        end = 0
        for part in sorted(wanted, key=lambda part: index.offsets[part.chunk]):
            offset = index.offsets[part.chunk]
            stop = offset + index.lengths[part.chunk]
            near = 0 <= offset - end <= self._gap_bytes and stop - begin <= self._run_bytes
            if groups and near:
                groups[-1].append(part)
            else:
                groups.append([part])
                begin = offset
            end = stop
        return groups

    def read_run(self, run: list[Wanted], targets: list[Bytes]) -> None:
        """Read one group from `runs`, putting the valid rows of each chunk into its target.

        Raises:
            DamagedDataError: If a chunk fails its checksum; the message names the file and chunk.
        """
        compressor = self.layout.compressor
        if compressor is None:
            self._read_plain(run, targets)
        else:
            self._read_compressed(compressor, run, targets)

    def damaged_chunks(self) -> list[int]:
        """Read the whole file, and return the chunks that differ from what was committed.

        Unlike `read_run`, this method also checks the checksum stored after each chunk, which only
        other Zarr readers use.
        """
        chunks = [Wanted(chunk, self.rows_of(chunk), 0) for chunk in range(self.n_chunks)]
        runs = self.runs(chunks)
        return [chunk for run in runs for chunk in self._damaged([part.chunk for part in run])]

    def _damaged(self, run: list[int]) -> list[int]:
        """Return the damaged chunks of one group."""
        damaged = []
        for chunk, stored in zip(run, self._stored(run), strict=True):
            committed = self._index.crc32c[chunk]
            beside = int.from_bytes(stored[-CRC_BYTES:].tobytes(), "little")
            if not committed == beside == crc32c(stored[:-CRC_BYTES]):
                damaged.append(chunk)
        return damaged

    def _stored(self, run: list[int]) -> list[Bytes]:
        """Read one group of chunks as stored, checksums included, into thread-local memory."""
        offsets = self._index.offsets
        lengths = self._index.lengths
        begin = offsets[run[0]]
        data = scratch("stored", offsets[run[-1]] + lengths[run[-1]] - begin)
        self._read([data], begin, f"chunk {run[0]}")
        return [
            data[offsets[chunk] - begin : offsets[chunk] - begin + lengths[chunk]] for chunk in run
        ]

    def _read_plain(self, run: list[Wanted], targets: list[Bytes]) -> None:
        """Read uncompressed chunks into their targets with one read."""
        # Read rows directly into the caller's buffers. Discard padding, checksums and gaps.
        chunk_bytes = self.layout.chunk_bytes
        offsets = self._index.offsets
        waste = scratch("waste", max(chunk_bytes, self._gap_bytes) + CRC_BYTES)
        views = []
        end = offsets[run[0].chunk]
        for part, target in zip(run, targets, strict=True):
            gap = offsets[part.chunk] - end
            views += [waste[:gap], target, waste[: chunk_bytes - len(target) + CRC_BYTES]]
            end += gap + chunk_bytes + CRC_BYTES
        # Only the last chunk of a shard can have padding, so no later chunk overwrites this view.
        padding = views[-1]
        self._read(views, offsets[run[0].chunk], f"chunk {run[0].chunk}")
        for part, target in zip(run, targets, strict=True):
            found = crc32c(target)
            if len(target) < chunk_bytes:
                found = crc32c(padding[:-CRC_BYTES], found)
            if found != self._index.crc32c[part.chunk]:
                raise self._checksum_error(part.chunk)

    def _read_compressed(
        self, compressor: ChunkCompressor, run: list[Wanted], targets: list[Bytes]
    ) -> None:
        """Read compressed chunks with one read, and decompress them into their targets."""
        chunk_bytes = self.layout.chunk_bytes
        stored = self._stored([part.chunk for part in run])
        for part, target, data in zip(run, targets, stored, strict=True):
            packed = data[:-CRC_BYTES]
            if crc32c(packed) != self._index.crc32c[part.chunk]:
                raise self._checksum_error(part.chunk)
            whole = len(target) == chunk_bytes
            rows = target if whole else scratch("chunk", chunk_bytes)
            try:
                compressor.decompress(packed, rows)
            except ValueError as error:
                raise DamagedDataError(
                    f"{self.path}: chunk {part.chunk} does not decompress: {error}; {_REMEDY}"
                ) from error
            if not whole:
                target[:] = rows[: len(target)]

    def _checksum_error(self, chunk: int) -> DamagedDataError:
        return DamagedDataError(f"{self.path}: chunk {chunk} fails its checksum; {_REMEDY}")

    def _read(self, views: list[Bytes], offset: int, what: str) -> None:
        """Read the bytes from `offset` onwards into `views`; an error message calls them `what`."""
        if not self._file.read_into(views, offset):
            raise DamagedDataError(f"{self.path} ends before the end of {what}; {_REMEDY}")
