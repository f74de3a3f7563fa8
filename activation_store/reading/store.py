"""Read rows from a store by logical row number, verifying the checksum of every chunk.

Logical row r is the r-th valid row of the store, counting from 0 and in the order of the items.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.codecs.base import RowCodec
from activation_store.consumers.deletion_mark import DeletionMark, deleted_error, read_deletion_mark
from activation_store.errors import DamagedDataError, IncompleteStoreError, MissingDataError
from activation_store.format.commit_log import CommitLog, record_name
from activation_store.format.header import METADATA, StoreHeader
from activation_store.format.item_record import Statistics
from activation_store.format.zarr_json import read_header
from activation_store.reading.shard_reader import OpenShard, Wanted, scratch
from activation_store.storage.atomic_files import as_bytes
from activation_store.storage.base import Storage
from activation_store.storage.open import open_storage
from activation_store.threads import run_all
from foundation.errors import ConfigError

MAX_OPEN_SHARDS = 256
"""Maximum number of shard files kept open, well below the usual limit of 1024 per process."""
Place = Callable[[int, NDArray[Any]], None]
_BYTES_PER_THREAD = 2 << 20  # smaller reads finish before another thread wakes up


def open_store(path: str | Path) -> Store:
    """Open a store for reading, whether it is finalised or still growing.

    Args:
        path: Folder of the store, or s3://bucket/prefix.

    Raises:
        StoreFormatError: If there is no activation store at `path`, or its metadata is invalid.
        UnknownCodecError: If the store's codec is not installed on this machine.
        MissingDataError: If a file of the header or the commit log is missing.
        DamagedDataError: If a file of the header or the commit log fails its checksum.
    """
    return Store(open_storage(path))


def store_exists(path: str | Path) -> bool:
    """Return whether a store exists at `path`.

    In an object store, the result may be True while another process is still creating the store.
    """
    return open_storage(path).exists(METADATA)


@dataclass(frozen=True)
class _State:
    """State of the store at the last refresh, replaced as a whole for thread safety."""

    header: StoreHeader
    table: NDArray[np.void]
    """Commit records, [n_items]."""
    valid_rows: NDArray[np.int64]
    """Number of valid rows of each item, [n_items]."""
    starts: NDArray[np.int64]
    """First logical row of each item, followed by the total number of rows: [n_items + 1]."""


class Store:
    """A store opened for reading with `open_store`, safe to share between threads.

    Read `finalised` before `n_items` or `n_tokens`. If `finalised` was True, the values read
    afterwards are final.
    """

    def __init__(self, storage: Storage) -> None:
        self.path = storage.path
        self.poll_s = storage.poll_s
        """Seconds to wait between two refreshes of a growing store."""
        self.refreshes = 0
        """Number of calls to `refresh` so far."""
        self._storage = storage
        header = read_header(storage)
        self._columns = header.columns
        self._disk_arrays = header.disk_arrays
        self._disk_names = {name: header.disk_names(name) for name in header.columns}
        self._layouts = {name: header.layout(name) for name in header.disk_arrays}
        self._row_codecs = {name: header.row_codec(name) for name in header.arrays}
        self._lock = threading.Lock()
        self._shards: OrderedDict[tuple[str, int], OpenShard] = OrderedDict()
        self._deletion_mark = read_deletion_mark(storage)
        self._commits = CommitLog(storage, header)
        self._state = _build_state(storage, header, self._commits)

    @property
    def header(self) -> StoreHeader:
        """Header as of the last refresh."""
        return self._state.header

    @property
    def arrays(self) -> dict[str, int]:
        """d_model of each hookpoint."""
        return dict(self.header.arrays)

    @property
    def dtype(self) -> str:
        """Data type of the rows: bfloat16 or float32."""
        return self.header.dtype

    @property
    def finalised(self) -> bool:
        """Whether the store was finalised at the last refresh, so that no rows can be added."""
        return self.header.finalised

    @property
    def n_items(self) -> int:
        """Number of items committed without a gap, starting at item 0, as of the last refresh."""
        return len(self._state.table)

    @property
    def n_tokens(self) -> int:
        """Number of valid rows in the first `n_items` items."""
        return int(self._state.starts[-1])

    @property
    def valid_rows(self) -> NDArray[np.int64]:
        """Number of valid rows of each item: [n_items], read-only."""
        return self._state.valid_rows

    def refresh(self) -> None:
        """Load what was committed or deleted since the last refresh.

        Raises:
            StoreFormatError: If a metadata or log file is invalid; the message names the file.
            MissingDataError: If a metadata or log file is missing; the message names the file.
            DamagedDataError: If a metadata or log file fails its checksum; the message names the
            file.
        """
        with self._lock:
            self.refreshes += 1
            self.read_deletion_mark()
            if not self.finalised:
                # Read the header before the log. If the header says that the store is finalised,
                # the log is then complete.
                header = read_header(self._storage)
                self._commits.refresh(header)
                self._state = _build_state(self._storage, header, self._commits)

    def read_deletion_mark(self) -> DeletionMark:
        """Read the deletion mark from disk, remember it, and return it."""
        self._deletion_mark = read_deletion_mark(self._storage)
        return self._deletion_mark

    def require_all(self, what: str) -> None:
        """Check that no rows are deleted, for an operation that needs all of them.

        Args:
            what: Name of the operation, for the error message.

        Raises:
            DeletedDataError: If any rows are deleted.
        """
        mark = self.read_deletion_mark()
        if mark.below:
            raise deleted_error(self._storage, what, mark)

    def read(self, array: str, start: int, stop: int) -> NDArray[Any]:
        """Read logical rows [start, stop) of an array or sidecar.

        Returns:
            [stop - start, d_model] for an array or [stop - start] for a sidecar, in the data type
            given by `StoreHeader.columns`.

        Raises:
            ConfigError: If the store has no such array.
            IncompleteStoreError: If some of the rows are not committed yet.
            DeletedDataError: If some of the rows were deleted.
            MissingDataError: If a shard file is missing; the message names the file.
            DamagedDataError: If a chunk fails its checksum; the message names the file and chunk.
        """
        if array not in self._columns:
            raise ConfigError("array", array, f"one of {list(self._columns)}")
        starts = self._state.starts
        if not 0 <= start <= stop <= starts[-1]:
            raise IncompleteStoreError(
                f"rows [{start}, {stop}) of {array!r}: expected 0 <= start <= stop <= "
                f"{self.n_tokens}, because {self.path} has {self.n_tokens} rows"
                + ("" if self.finalised else " committed so far")
            )
        parts = [self._read_stored(name, start, stop) for name in self._disk_names[array]]
        row_codec = self.row_codec(array)
        if row_codec is None:
            return parts[0]
        dtype, shape = self._columns[array]
        rows = np.empty((stop - start, *shape), dtype)
        row_codec.decode(parts, rows)
        return rows

    def _read_stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read logical rows [start, stop) of an array on disk, without decoding them."""
        starts = self._state.starts
        chunk_rows = self.header.chunk_rows
        dtype, shape = self._disk_arrays[name].dtype, self._disk_arrays[name].row_shape
        rows = np.empty((stop - start, *shape), dtype)
        whole: list[tuple[int, int, int]] = []
        item = int(np.searchsorted(starts, start, side="right")) - 1
        done = start
        while done < stop:
            if done == starts[item + 1]:  # the item ends here, or has no rows
                item += 1
                continue
            chunk, skip = divmod(done - int(starts[item]), chunk_rows)
            valid = min(chunk_rows, int(starts[item + 1] - starts[item]) - chunk * chunk_rows)
            count = min(valid - skip, stop - done)
            if count == valid:
                whole.append((item, chunk, done - start))
            else:  # only part of this chunk is in the range, but chunks can only be read as a whole
                part = np.empty((valid, *shape), dtype)
                self.read_chunks(name, [(item, chunk, 0)], part)
                rows[done - start : done - start + count] = part[skip : skip + count]
            done += count
        self.read_chunks(name, whole, rows)
        return rows

    def read_chunks(
        self, name: str, wanted: Sequence[tuple[int, int, int]], rows: NDArray[Any]
    ) -> None:
        """Read whole chunks into the caller's memory in the stored data type, in several threads.

        Args:
            name: An array on disk: a hookpoint, a sidecar, or another array that the codec stores.
                (With int8, the array `<name>` holds the quantised values of a hookpoint, and
                `<name>.scale` holds their scales.)
            wanted: For each chunk: its item, its number within the shard, and the row of `rows` to
                which its first row is written. Only valid rows are written, so nothing is written
                for a chunk beyond the item's rows. The targets of two chunks must not overlap.
            rows: Output, [n, ...] in the stored data type, C-contiguous.

        Raises:
            ConfigError: If there is no such array or chunk, or if `rows` has the wrong shape or
                data type.
            IncompleteStoreError: If an item is not committed.
            DeletedDataError: If the shards of an item were deleted.
            MissingDataError: If a shard file is missing; the message names the file.
            DamagedDataError: If a chunk fails its checksum; the message names the file and chunk.
        """
        part = self._disk_arrays.get(name)
        if part is None:
            raise ConfigError("array", name, f"one of {list(self._disk_arrays)}")
        if rows.dtype != part.dtype or rows.shape[1:] != part.row_shape:
            found = f"{rows.dtype} {rows.shape}"
            raise ConfigError("rows", found, f"{part.dtype} rows of shape {part.row_shape}")
        row_bytes = self._layouts[name].row_bytes
        memory = as_bytes(rows)

        def read(shard: OpenShard, run: list[Wanted]) -> None:
            targets = [
                memory[part.first * row_bytes : (part.first + part.rows) * row_bytes]
                for part in run
            ]
            shard.read_run(run, targets)

        self._read_runs(name, wanted, len(rows), read)

    def place_chunks(
        self, name: str, wanted: Sequence[tuple[int, int, int]], n_rows: int, place: Place
    ) -> None:
        """Read whole chunks, and pass each chunk's rows to `place` while they are in the CPU cache.

        Raises the same errors as `read_chunks`.

        Args:
            name: An array on disk.
            wanted: For each chunk: its item, its number within the shard, and the row number of its
                first row, which is passed to `place`.
            n_rows: Upper bound (exclusive) of all row numbers.
            place: Function called with the row number of a chunk's first row and the chunk's valid
                rows [n, ...]. Several threads call it concurrently. The rows are overwritten after
                it returns.
        """
        dtype, shape = self._disk_arrays[name].dtype, self._disk_arrays[name].row_shape
        row_bytes = self._layouts[name].row_bytes

        def read(shard: OpenShard, run: list[Wanted]) -> None:
            ends = [0, *accumulate(part.rows * row_bytes for part in run)]
            memory = scratch("rows", ends[-1])
            targets = [memory[low:high] for low, high in pairwise(ends)]
            shard.read_run(run, targets)
            for part, target in zip(run, targets, strict=True):
                place(part.first, target.view(dtype).reshape(part.rows, *shape))

        self._read_runs(name, wanted, n_rows, read)

    def _read_runs(
        self,
        name: str,
        wanted: Sequence[tuple[int, int, int]],
        n_rows: int,
        read: Callable[[OpenShard, list[Wanted]], None],
    ) -> None:
        """Group chunks into coalesced reads, and run the reads in the thread pool."""
        by_item: dict[int, list[tuple[int, int]]] = {}
        for item, chunk, first in wanted:
            by_item.setdefault(item, []).append((chunk, first))
        reads: list[Callable[[], None]] = []
        for item, chunks in by_item.items():
            shard = self._shard(name, item)
            parts = _with_rows(shard, chunks, n_rows)
            reads += [partial(read, shard, run) for run in shard.runs(parts)]
        n_bytes = len(wanted) * self._layouts[name].chunk_bytes
        run_all(reads, min(1 + n_bytes // _BYTES_PER_THREAD, self._storage.n_threads + 1))

    def row_codec(self, array: str) -> RowCodec | None:
        """Return the codec of an array's rows, or None if they are stored unchanged."""
        return self._row_codecs.get(array)

    @property
    def n_bytes(self) -> int:
        """Total size in bytes of all committed shards, including deleted shards."""
        return int(sum(self._state.table[name]["bytes"].sum() for name in self._layouts))

    def checksums(self, item: int) -> dict[str, int]:
        """Return the shard checksum of each array for a committed item, to identify its content."""
        return {name: int(self._state.table[item][name]["tail_crc32c"]) for name in self._layouts}

    def statistics(self, array: str) -> Statistics:
        """Return the statistics of all committed values of a hookpoint array."""
        if array not in self.header.arrays:
            raise ConfigError("array", array, f"one of {list(self.header.arrays)}")
        table = self._state.table[array]
        return Statistics(
            int(table["count"].sum()),
            float(table["sum"].sum()),
            float(table["sumsq"].sum()),
            float(table["absmax"].max(initial=0)),
            int(table["non_finite"].sum()),
        )

    def non_finite_items(self, array: str) -> dict[int, int]:
        """Return the number of NaN and infinite values of each item that has any, by item."""
        counts = self._state.table[array]["non_finite"]
        return {int(item): int(counts[item]) for item in np.flatnonzero(counts)}

    def _shard(self, array: str, item: int) -> OpenShard:
        """Return an open shard, from the cache if possible."""
        key = (array, item)
        with self._lock:
            shard = self._shards.get(key)
            if shard is not None:
                self._shards.move_to_end(key)
                return shard
        table = self._state.table
        if not 0 <= item < len(table):
            raise IncompleteStoreError(
                f"item {item} is not committed: {self.path} has {len(table)} items, numbered from 0"
            )
        shard = self._open(array, item, table[item])
        with self._lock:
            self._shards[key] = shard
            if len(self._shards) > MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

    def _open(self, array: str, item: int, row: np.void) -> OpenShard:
        """Open a shard, unless it is deleted."""
        if item >= self._deletion_mark.below:
            committed = row[array]
            try:
                return OpenShard(
                    self._storage,
                    self.header.shard_file(array, item),
                    self._layouts[array],
                    int(row["rows"]),
                    int(committed["bytes"]),
                    int(committed["tail_crc32c"]),
                )
            except MissingDataError:
                # The shard may have been deleted since the deletion mark was last read.
                if item >= self.read_deletion_mark().below:
                    raise
        raise deleted_error(
            self._storage, f"item {item} of {array!r}", self._deletion_mark
        ) from None


def _with_rows(shard: OpenShard, chunks: list[tuple[int, int]], n_rows: int) -> list[Wanted]:
    """Check the requested chunks of a shard and return those that hold valid rows."""
    wanted = []
    for chunk, first in chunks:
        if not 0 <= chunk < shard.layout.n_chunks:
            raise ConfigError("chunk", chunk, f"0 to {shard.layout.n_chunks - 1}")
        count = shard.rows_of(chunk)
        if not 0 <= first <= n_rows - count:
            raise ConfigError(
                "first row",
                first,
                f"a row number that places the chunk's {count} rows within rows 0 to {n_rows - 1}",
            )
        if count:
            wanted.append(Wanted(chunk, count, first))
    return wanted


def _build_state(storage: Storage, header: StoreHeader, commits: CommitLog) -> _State:
    """Build the state from the header and the commit log."""
    table = commits.contiguous()
    if header.finalised:
        table = table[: header.n_items]
        if len(table) < header.n_items:
            file = storage.where(record_name(len(table)))
            raise MissingDataError(
                f"{file} is missing; repair the store with stage=repair, or restore the file from "
                "a backup"
            )
    valid_rows = table["rows"].copy()
    valid_rows.flags.writeable = False
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(valid_rows)])
    if header.finalised and starts[-1] != header.n_tokens:
        raise DamagedDataError(
            f"{storage.path}: the commit log has {starts[-1]} rows: expected {header.n_tokens} as "
            "in the header; restore the log from a backup"
        )
    return _State(header, table, valid_rows, starts)
