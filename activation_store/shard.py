"""Reading chunks of committed shard files: every one against its checksum, neighbours at once."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from activation_store import compression, files
from activation_store.checksum import crc32c
from activation_store.codec import CRC_BYTES, ShardLayout, decode_tail
from activation_store.errors import DamagedDataError, MissingDataError
from activation_store.files import Bytes

RUN_BYTES = 1 << 20
"""Neighbouring chunks are read in one call up to so many bytes, which are then still in a core's
cache when they are checked and placed; larger reads were no faster, cold or warm."""

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
    """A committed shard file, recognised by the checksum of its tail."""

    def __init__(
        self, path: Path, layout: ShardLayout, rows: int, n_bytes: int, tail_crc32c: int
    ) -> None:
        self.path, self.layout, self.rows = path, layout, rows
        try:
            self._fd = files.open_to_read(path)
        except FileNotFoundError as error:
            raise MissingDataError(f"{path} is committed but missing; restore it") from error
        # Closed with the last reader's reference, so that dropping it from a cache is safe.
        weakref.finalize(self, os.close, self._fd)
        found = os.fstat(self._fd).st_size
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
        index, groups, size = self._index, list[list[Wanted]](), 0
        end = -1
        for part in sorted(wanted, key=lambda part: index.offsets[part.chunk]):
            offset, length = index.offsets[part.chunk], index.lengths[part.chunk]
            if offset == end and size + length <= RUN_BYTES:
                groups[-1].append(part)
                size += length
            else:
                groups.append([part])
                size = length
            end = offset + length
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
        lengths = [self._index.lengths[chunk] for chunk in run]
        data = scratch("stored", sum(lengths))
        self._read([data], self._index.offsets[run[0]], f"chunk {run[0]}")
        damaged, start = [], 0
        for chunk, length in zip(run, lengths, strict=True):
            stored = data[start : start + length]
            committed = self._index.crc32c[chunk]
            beside = int.from_bytes(stored[-CRC_BYTES:].tobytes(), "little")
            if not committed == beside == crc32c(stored[:-CRC_BYTES]):
                damaged.append(chunk)
            start += length
        return damaged

    def _read_plain(self, run: list[Wanted], targets: list[Bytes]) -> None:
        # Straight to where the rows go; padding and the checksums in between go to waste paper.
        chunk_bytes = self.layout.chunk_bytes
        waste = scratch("waste", chunk_bytes + CRC_BYTES)
        views = []
        for target in targets:
            views += [target, waste[: chunk_bytes - len(target) + CRC_BYTES]]
        padding = views[-1]  # only a shard's last chunk has any, so nothing overwrites it
        self._read(views, self._index.offsets[run[0].chunk], f"chunk {run[0].chunk}")
        for part, target in zip(run, targets, strict=True):
            found = crc32c(target)
            if len(target) < chunk_bytes:
                found = crc32c(padding[:-CRC_BYTES], found)
            if found != self._index.crc32c[part.chunk]:
                raise self._fails(part.chunk)

    def _read_compressed(self, run: list[Wanted], targets: list[Bytes]) -> None:
        lengths = [self._index.lengths[part.chunk] for part in run]
        data = scratch("stored", sum(lengths))
        self._read([data], self._index.offsets[run[0].chunk], f"chunk {run[0].chunk}")
        start, chunk_bytes = 0, self.layout.chunk_bytes
        for part, target, length in zip(run, targets, lengths, strict=True):
            packed = data[start : start + length - CRC_BYTES]
            start += length
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
        if not files.read_into(self._fd, views, offset):
            raise DamagedDataError(f"{self.path}: {what} is cut off; restore it")
