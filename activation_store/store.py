"""Reading a store: rows in logical order (item, row in item), every chunk against its checksum."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from activation_store.codec import ShardLayout, chunk_table
from activation_store.errors import (
    DamagedDataError,
    IncompleteStoreError,
    MissingDataError,
    StoreConfigError,
)
from activation_store.files import Bytes, as_bytes
from activation_store.header import StoreHeader
from activation_store.log import CommitLog, record_path
from activation_store.metadata import read_header
from activation_store.record import Statistics

MAX_OPEN_SHARDS = 256
"""Files held open; well below the usual limit of 1024 for a process."""


def open_store(path: str | Path) -> Store:
    """Opens a store, finalised or still growing.

    Raises:
        StoreFormatError: No store of ours, or metadata that cannot be.
        MissingDataError, DamagedDataError: A file of the header or the log; names it.
    """
    return Store(Path(path))


class OpenShard:
    """A committed shard file, recognised by the checksum of its tail."""

    def __init__(
        self, path: Path, layout: ShardLayout, rows: int, n_bytes: int, tail_crc32c: int
    ) -> None:
        self.path, self.layout, self.rows = path, layout, rows
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise MissingDataError(f"{path} is committed but missing; restore it") from error
        # Closed with the last reader's reference, so that dropping it from the cache is safe.
        weakref.finalize(self, os.close, self.fd)
        found = os.fstat(self.fd).st_size
        if found != n_bytes:
            raise DamagedDataError(f"{path} has {found} bytes: expected {n_bytes}; restore it")
        tail = np.empty(layout.tail_bytes, np.uint8)
        self._read(tail, n_bytes - layout.tail_bytes, "index")
        if google_crc32c.value(tail) != tail_crc32c:
            raise DamagedDataError(
                f"{path}: index is damaged, or the file is another shard's; restore it"
            )
        self._chunk_crc32c = chunk_table(layout, tail)

    def rows_of(self, chunk: int) -> int:
        """Valid rows of a chunk, 0 where it lies beyond the shard's rows."""
        start = chunk * self.layout.chunk_rows
        return min(max(self.rows - start, 0), self.layout.chunk_rows)

    def read_chunk(self, chunk: int, target: Bytes) -> int:
        """Reads a whole chunk into `target` [chunk_bytes]; returns its valid rows.

        Raises:
            DamagedDataError: naming file and chunk.
        """
        rows = self.rows_of(chunk)
        if rows:
            self._read(target, self.layout.chunk_offset(chunk), f"chunk {chunk}")
            if google_crc32c.value(target) != self._chunk_crc32c[chunk]:
                raise DamagedDataError(f"{self.path}: chunk {chunk} fails its checksum; restore it")
        return rows

    def _read(self, target: Bytes, offset: int, what: str) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self.fd, [target[done:].data], offset + done)
            if count == 0:
                raise DamagedDataError(f"{self.path}: {what} is cut off; restore it")
            done += count


@dataclass(frozen=True)
class _State:
    """What is known at one moment; replaced as a whole, so that threads never see half of it."""

    header: StoreHeader
    table: NDArray[np.void]
    """[n_items] records."""
    valid_rows: NDArray[np.int64]
    """[n_items]."""
    starts: NDArray[np.int64]
    """[n_items + 1]: first logical row of each item, and the end."""


class Store:
    """A store to read from; threads may share it. Use `open_store`.

    Whoever sees `finalised` sees the final `n_items` and `n_tokens` after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self._columns = header.columns
        self._layouts = {name: header.layout(name) for name in header.columns}
        self._lock = threading.Lock()
        self._shards: OrderedDict[tuple[str, int], OpenShard] = OrderedDict()
        self._commits = CommitLog(path, header)
        self._state = _take_in(path, header, self._commits)

    @property
    def header(self) -> StoreHeader:
        """As of the last refresh."""
        return self._state.header

    @property
    def arrays(self) -> dict[str, int]:
        """Hookpoint to d_model."""
        return dict(self.header.arrays)

    @property
    def dtype(self) -> str:
        """bfloat16 or float32."""
        return self.header.dtype

    @property
    def finalised(self) -> bool:
        """Whether no rows can be added any more."""
        return self.header.finalised

    @property
    def n_items(self) -> int:
        """Committed items from item 0 on without a gap, as of the last refresh."""
        return len(self._state.table)

    @property
    def n_tokens(self) -> int:
        """Rows of those items."""
        return int(self._state.starts[-1])

    @property
    def valid_rows(self) -> NDArray[np.int64]:
        """Rows of each of those items: [n_items], read-only."""
        return self._state.valid_rows

    def refresh(self) -> None:
        """Takes in what was committed since the store was opened.

        Raises:
            StoreFormatError, MissingDataError, DamagedDataError: naming the file.
        """
        with self._lock:
            if not self.finalised:
                header = read_header(self.path)  # before the log: a finalised store's is complete
                self._commits.refresh(header)
                self._state = _take_in(self.path, header, self._commits)

    def read(self, array: str, start: int, stop: int) -> NDArray[Any]:
        """Logical rows [start, stop) of an array [n, d_model] or a sidecar [n].

        Logical row r is the r-th valid row over all items in their order.

        Raises:
            StoreConfigError: No such array.
            IncompleteStoreError: Rows that nobody has committed.
            MissingDataError, DamagedDataError: naming the file and the chunk.
        """
        layout, starts = self._layout(array), self._state.starts
        if not 0 <= start <= stop <= starts[-1]:
            raise IncompleteStoreError(
                f"rows [{start}, {stop}) of {array!r}: {self.path} has {self.n_tokens} rows"
                + ("" if self.finalised else " committed so far")
            )
        dtype, shape = self._columns[array]
        rows = np.empty((stop - start, *shape), dtype)
        target, scratch = as_bytes(rows), np.empty(layout.chunk_bytes, np.uint8)
        item, done = int(np.searchsorted(starts, start, side="right")) - 1, start
        while done < stop:
            if done == starts[item + 1]:
                item += 1
                continue
            chunk, skip = divmod(done - int(starts[item]), layout.chunk_rows)
            count = min(layout.chunk_rows - skip, min(stop, int(starts[item + 1])) - done)
            low = (done - start) * layout.row_bytes
            part = target[low : low + count * layout.row_bytes]
            if len(part) == layout.chunk_bytes:
                self._shard(array, item).read_chunk(chunk, part)
            else:
                self._shard(array, item).read_chunk(chunk, scratch)
                part[:] = scratch[skip * layout.row_bytes :][: len(part)]
            done += count
        return rows

    def read_chunk_into(self, array: str, item: int, chunk: int, buffer: NDArray[Any]) -> int:
        """Reads a whole inner chunk into `buffer`; returns its valid rows, the rest is padding.

        Args:
            array: Hookpoint or sidecar.
            item: A committed item.
            chunk: Number of the chunk in its shard. Beyond the item's rows: reads nothing, gives 0.
            buffer: [chunk_rows, d_model] or [chunk_rows], of the array's dtype, C-contiguous.

        Raises:
            StoreConfigError: No such array or chunk, or a buffer of another size.
            IncompleteStoreError: The item is not committed.
            MissingDataError, DamagedDataError: naming the file and the chunk.
        """
        layout = self._layout(array)
        if not 0 <= chunk < layout.n_chunks:
            raise StoreConfigError("chunk", chunk, f"0 to {layout.n_chunks - 1}")
        target = as_bytes(buffer)
        if len(target) != layout.chunk_bytes:
            raise StoreConfigError("buffer", buffer.shape, f"{layout.chunk_rows} rows of {array}")
        return self._shard(array, item).read_chunk(chunk, target)

    def statistics(self, array: str) -> Statistics:
        """Moments of all committed rows of a hookpoint array."""
        if array not in self.header.arrays:
            raise StoreConfigError("array", array, f"one of {list(self.header.arrays)}")
        table = self._state.table[array]
        return Statistics(
            int(table["count"].sum()),
            float(table["sum"].sum()),
            float(table["sumsq"].sum()),
            float(table["absmax"].max(initial=0)),
            int(table["non_finite"].sum()),
        )

    def shard_path(self, array: str, item: int) -> Path:
        """The file of a shard."""
        return self.path / self.header.shard_file(array, item)

    def _layout(self, array: str) -> ShardLayout:
        layout = self._layouts.get(array)
        if layout is None:
            raise StoreConfigError("array", array, f"one of {list(self._layouts)}")
        return layout

    def _shard(self, array: str, item: int) -> OpenShard:
        key = (array, item)
        with self._lock:
            shard = self._shards.get(key)
            if shard is not None:
                self._shards.move_to_end(key)
                return shard
        table = self._state.table
        if not 0 <= item < len(table):
            raise IncompleteStoreError(f"item {item}: {self.path} has items 0 to {len(table) - 1}")
        row = table[item]
        shard = OpenShard(
            self.shard_path(array, item),
            self._layouts[array],
            int(row["rows"]),
            int(row[array]["bytes"]),
            int(row[array]["tail_crc32c"]),
        )
        with self._lock:
            self._shards[key] = shard
            if len(self._shards) > MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard


def _take_in(path: Path, header: StoreHeader, commits: CommitLog) -> _State:
    table = commits.contiguous()
    if header.finalised:
        table = table[: header.n_items]
        if len(table) < header.n_items:
            file = record_path(path, len(table))
            raise MissingDataError(f"{file} is missing; restore it from a backup")
    valid_rows = table["rows"].copy()
    valid_rows.flags.writeable = False
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(valid_rows)])
    if header.finalised and starts[-1] != header.n_tokens:
        raise DamagedDataError(
            f"{path}: the log has {starts[-1]} rows, the header {header.n_tokens}; restore the log"
        )
    return _State(header, table, valid_rows, starts)
