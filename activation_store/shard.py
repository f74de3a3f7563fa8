"""Reading chunks of committed shard files: every one against its checksum, neighbours at once."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from activation_store import compression
from activation_store.checksum import crc32c
from activation_store.codec import CRC_BYTES, ShardLayout, decode_tail
from activation_store.errors import DamagedDataError
from activation_store.files import Bytes
from activation_store.storage import Storage

_scratch = threading.local()


def scratch(name: str, n_bytes: int) -> Bytes:
    """Memory [n_bytes] of this thread's own, kept from call to call."""
    memory: Bytes | None = getattr(_scratch, name, None)
    if memory is None or len(memory) < n_bytes:
        memory = np.empty(n_bytes, np.uint8)
        setattr(_scratch, name, memory)
    return memory[:n_bytes]


@dataclass(frozen=True)
class Wanted:
    """A chunk that holds rows, and where they go."""

    chunk: int
    rows: int
    """Valid ones; the chunk's padding goes nowhere."""
    first: int
    """Row of the caller's memory for the first of them."""


class OpenShard:
    """A committed shard file, recognised by the checksum of its tail.

    Args:
        storage: Where it lies.
        name: Inside the store.
        layout: Of its array.
        rows: Valid ones.
        n_bytes: As its commit record says.
        tail_crc32c: As its commit record says.

    Raises:
        MissingDataError, DamagedDataError: naming the file.
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
        self.path, self.layout, self.rows = storage.where(name), layout, rows
        self._run_bytes, self._gap_bytes = storage.run_bytes, storage.gap_bytes
        self._file = storage.open(name)
        found, path = self._file.size, self.path
        if found != n_bytes:
            raise DamagedDataError(f"{path} has {found} bytes: expected {n_bytes}; restore it")
        tail = np.empty(layout.tail_bytes, np.uint8)
        self._read([tail], n_bytes - layout.tail_bytes, "index")
        if crc32c(tail) != tail_crc32c:
            raise DamagedDataError(
                f"{path}: index is damaged, or the file is another shard's; restore it"
            )
        try:
            self._index = decode_tail(layout, rows, n_bytes, tail)
        except ValueError as error:
            raise DamagedDataError(f"{path}: index cannot be: {error}; restore it") from error

    @property
    def n_chunks(self) -> int:
        """Chunks that hold rows."""
        return self.layout.chunks_with_rows(self.rows)

    def rows_of(self, chunk: int) -> int:
        """Valid rows of a chunk, 0 where it lies beyond the shard's rows."""
        start = chunk * self.layout.chunk_rows
        return min(max(self.rows - start, 0), self.layout.chunk_rows)

    def runs(self, wanted: list[Wanted]) -> list[list[Wanted]]:
        """Chunks of this shard in groups, each of neighbours in the file that one read fetches."""
        index, groups, begin, end = self._index, list[list[Wanted]](), 0, 0
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
        """Reads one group of `runs`: the valid rows of each chunk into its target.

        Raises:
            DamagedDataError: naming file and chunk.
        """
        if self.layout.compressed:
            self._read_compressed(run, targets)
        else:
            self._read_plain(run, targets)

    def damaged_chunks(self) -> list[int]:
        """Reads the whole file, each byte once; the chunks that are not as they were committed.

        Unlike `read_run` it also compares the checksums between the chunks, which only other Zarr
        readers look at.
        """
        chunks = [Wanted(chunk, self.rows_of(chunk), 0) for chunk in range(self.n_chunks)]
        runs = self.runs(chunks)
        return [chunk for run in runs for chunk in self._damaged([part.chunk for part in run])]

    def _damaged(self, run: list[int]) -> list[int]:
        damaged = []
        for chunk, stored in zip(run, self._stored(run), strict=True):
            committed = self._index.crc32c[chunk]
            beside = int.from_bytes(stored[-CRC_BYTES:].tobytes(), "little")
            if not committed == beside == crc32c(stored[:-CRC_BYTES]):
                damaged.append(chunk)
        return damaged

    def _stored(self, run: list[int]) -> list[Bytes]:
        """The chunks of one group as they lie in the file, in this thread's memory."""
        offsets, lengths = self._index.offsets, self._index.lengths
        begin = offsets[run[0]]
        data = scratch("stored", offsets[run[-1]] + lengths[run[-1]] - begin)
        self._read([data], begin, f"chunk {run[0]}")
        return [
            data[offsets[chunk] - begin : offsets[chunk] - begin + lengths[chunk]] for chunk in run
        ]

    def _read_plain(self, run: list[Wanted], targets: list[Bytes]) -> None:
        # Straight to where the rows go; padding, checksums and chunks in between that nobody wants
        # go to waste paper.
        chunk_bytes, offsets = self.layout.chunk_bytes, self._index.offsets
        waste = scratch("waste", max(chunk_bytes, self._gap_bytes) + CRC_BYTES)
        views, end = [], offsets[run[0].chunk]
        for part, target in zip(run, targets, strict=True):
            gap = offsets[part.chunk] - end
            views += [waste[:gap], target, waste[: chunk_bytes - len(target) + CRC_BYTES]]
            end += gap + chunk_bytes + CRC_BYTES
        padding = views[-1]  # only a shard's last chunk has any, so nothing overwrites it
        self._read(views, offsets[run[0].chunk], f"chunk {run[0].chunk}")
        for part, target in zip(run, targets, strict=True):
            found = crc32c(target)
            if len(target) < chunk_bytes:
                found = crc32c(padding[:-CRC_BYTES], found)
            if found != self._index.crc32c[part.chunk]:
                raise self._fails(part.chunk)

    def _read_compressed(self, run: list[Wanted], targets: list[Bytes]) -> None:
        chunk_bytes = self.layout.chunk_bytes
        stored = self._stored([part.chunk for part in run])
        for part, target, data in zip(run, targets, stored, strict=True):
            packed = data[:-CRC_BYTES]
            if crc32c(packed) != self._index.crc32c[part.chunk]:
                raise self._fails(part.chunk)
            whole = len(target) == chunk_bytes
            rows = target if whole else scratch("chunk", chunk_bytes)
            try:
                compression.decompress(packed, rows)
            except ValueError as error:
                raise DamagedDataError(
                    f"{self.path}: chunk {part.chunk} does not decompress: {error}; restore it"
                ) from error
            if not whole:
                target[:] = rows[: len(target)]

    def _fails(self, chunk: int) -> DamagedDataError:
        return DamagedDataError(f"{self.path}: chunk {chunk} fails its checksum; restore it")

    def _read(self, views: list[Bytes], offset: int, what: str) -> None:
        if not self._file.read_into(views, offset):
            raise DamagedDataError(f"{self.path}: {what} is cut off; restore it")
