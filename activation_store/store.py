"""Reading a store: rows in logical order (item, row in item), every chunk against its checksum."""

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

from activation_store.errors import (
    DamagedDataError,
    IncompleteStoreError,
    MissingDataError,
    StoreConfigError,
)
from activation_store.files import as_bytes
from activation_store.header import METADATA, StoreHeader
from activation_store.log import CommitLog, record_name
from activation_store.metadata import read_header
from activation_store.parallel import run_all
from activation_store.quantise import Scaling, scaling
from activation_store.record import Statistics
from activation_store.shard import OpenShard, Wanted, scratch
from activation_store.storage import Storage, open_storage
from activation_store.watermark import Watermark, deleted, read_watermark

MAX_OPEN_SHARDS = 256
"""Files held open; well below the usual limit of 1024 for a process."""
Place = Callable[[int, NDArray[Any]], None]
_BYTES_PER_THREAD = 2 << 20  # less is read before another thread has woken up


def open_store(path: str | Path) -> Store:
    """Opens a store, finalised or still growing: a folder, or s3://bucket/prefix.

    Raises:
        StoreFormatError: No store of ours, or metadata that cannot be.
        MissingDataError, DamagedDataError: A file of the header or the log; names it.
    """
    return Store(open_storage(path))


def store_exists(path: str | Path) -> bool:
    """Whether there is a store; in an object store it may be that somebody is about to build it."""
    return open_storage(path).exists(METADATA)


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

    def __init__(self, storage: Storage) -> None:
        self.path = storage.path
        self.poll_s = storage.poll_s
        """Seconds between two looks at whether it has grown."""
        self.refreshes = 0
        """How often it has been looked at again."""
        self._storage = storage
        header = read_header(storage)
        self._columns, self._stored = header.columns, header.stored
        self._layouts = {name: header.layout(name) for name in header.stored}
        quantised = header.arrays if header.codec == "int8" else ()
        self._scaling = {name: scaling(header, name) for name in quantised}
        self._lock = threading.Lock()
        self._shards: OrderedDict[tuple[str, int], OpenShard] = OrderedDict()
        self._watermark = read_watermark(storage)
        self._commits = CommitLog(storage, header)
        self._state = _take_in(storage, header, self._commits)

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
            self.refreshes += 1
            self.read_watermark()
            if not self.finalised:
                # Before the log: a finalised store's is complete.
                header = read_header(self._storage)
                self._commits.refresh(header)
                self._state = _take_in(self._storage, header, self._commits)

    def read_watermark(self) -> Watermark:
        """How far the store's shards are deleted now, on disk."""
        self._watermark = read_watermark(self._storage)
        return self._watermark

    def require_all(self, what: str) -> None:
        """Raises: DeletedDataError: `what` needs every row, and some are deleted."""
        mark = self.read_watermark()
        if mark.below:
            raise deleted(self._storage, what, mark)

    def read(self, array: str, start: int, stop: int) -> NDArray[Any]:
        """Logical rows [start, stop) of an array [n, d_model] or a sidecar [n].

        Logical row r is the r-th valid row over all items in their order.

        Raises:
            StoreConfigError: No such array.
            IncompleteStoreError: Rows that nobody has committed.
            DeletedDataError: Rows that all consumers had passed.
            MissingDataError, DamagedDataError: naming the file and the chunk.
        """
        if array not in self._columns:
            raise StoreConfigError("array", array, f"one of {list(self._columns)}")
        starts = self._state.starts
        if not 0 <= start <= stop <= starts[-1]:
            raise IncompleteStoreError(
                f"rows [{start}, {stop}) of {array!r}: {self.path} has {self.n_tokens} rows"
                + ("" if self.finalised else " committed so far")
            )
        parts = [self._read_stored(name, start, stop) for name in self.header.stored_as(array)]
        if len(parts) == 1:
            return parts[0]
        dtype, shape = self._columns[array]
        rows = np.empty((stop - start, *shape), dtype)
        self.scaling(array).dequantise(parts[0], parts[1], rows)
        return rows

    def _read_stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Logical rows [start, stop) of an array on disk."""
        starts, chunk_rows = self._state.starts, self.header.chunk_rows
        dtype, shape = self._stored[name]
        rows = np.empty((stop - start, *shape), dtype)
        whole: list[tuple[int, int, int]] = []
        item, done = int(np.searchsorted(starts, start, side="right")) - 1, start
        while done < stop:
            if done == starts[item + 1]:
                item += 1
                continue
            chunk, skip = divmod(done - int(starts[item]), chunk_rows)
            valid = min(chunk_rows, int(starts[item + 1] - starts[item]) - chunk * chunk_rows)
            count = min(valid - skip, stop - done)
            if count == valid:
                whole.append((item, chunk, done - start))
            else:  # the first or the last chunk, cut by the range
                part = np.empty((valid, *shape), dtype)
                self.read_chunks(name, [(item, chunk, 0)], part)
                rows[done - start : done - start + count] = part[skip : skip + count]
            done += count
        self.read_chunks(name, whole, rows)
        return rows

    def read_chunks(
        self, name: str, wanted: Sequence[tuple[int, int, int]], rows: NDArray[Any]
    ) -> None:
        """Reads whole inner chunks as they are stored, in a few threads.

        Args:
            name: An array on disk: hookpoint (of codec int8 the quantised numbers), its scales
                (`<name>.scale`), or sidecar.
            wanted: Item, chunk in its shard, and the row of `rows` where its first row goes. Only
                valid rows are written, none where the chunk lies beyond the item's rows. No two
                chunks may overlap.
            rows: [n, ...] of the type stored, C-contiguous.

        Raises:
            StoreConfigError: No such array or chunk, or rows of another shape or type.
            IncompleteStoreError: The item is not committed.
            MissingDataError, DamagedDataError: naming the file and the chunk.
        """
        dtype, shape = self._stored.get(name, (None, ()))
        if dtype is None:
            raise StoreConfigError("array", name, f"one of {list(self._stored)}")
        if rows.dtype != dtype or rows.shape[1:] != shape:
            found = f"{rows.dtype} {rows.shape}"
            raise StoreConfigError("rows", found, f"{dtype} rows of shape {shape}")
        row_bytes, memory = self._layouts[name].row_bytes, as_bytes(rows)

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
        """Like `read_chunks`, but hands the rows of each chunk to `place` while they are in cache.

        Args:
            name: An array on disk.
            wanted: Item, chunk in its shard, and the number of its first row among `n_rows`.
            n_rows: What all numbers of rows are below.
            place: Called in several threads at once with the number of a chunk's first row and
                its valid rows [n, ...], which are gone when it returns.

        Raises:
            As `read_chunks`.
        """
        dtype, shape = self._stored[name]
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

    def scaling(self, array: str) -> Scaling:
        """How the rows of an array of codec int8 follow from what is stored."""
        return self._scaling[array]

    @property
    def n_bytes(self) -> int:
        """Bytes of all committed shards, deleted ones counted."""
        return int(sum(self._state.table[name]["bytes"].sum() for name in self._layouts))

    def checksums(self, item: int) -> dict[str, int]:
        """The checksum of each array's shard of a committed item: tells it from any other."""
        return {name: int(self._state.table[item][name]["tail_crc32c"]) for name in self._layouts}

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

    def non_finite_items(self, array: str) -> dict[int, int]:
        """Committed items whose rows of a hookpoint array hold NaN or infinities; how many."""
        counts = self._state.table[array]["non_finite"]
        return {int(item): int(counts[item]) for item in np.flatnonzero(counts)}

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
        shard = self._open(array, item, table[item])
        with self._lock:
            self._shards[key] = shard
            if len(self._shards) > MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

    def _open(self, array: str, item: int, row: np.void) -> OpenShard:
        if item >= self._watermark.below:
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
                if item >= self.read_watermark().below:
                    raise
        raise deleted(self._storage, f"item {item} of {array!r}", self._watermark) from None


def _with_rows(shard: OpenShard, chunks: list[tuple[int, int]], n_rows: int) -> list[Wanted]:
    """Those chunks of a shard that hold rows, checked."""
    wanted = []
    for chunk, first in chunks:
        if not 0 <= chunk < shard.layout.n_chunks:
            raise StoreConfigError("chunk", chunk, f"0 to {shard.layout.n_chunks - 1}")
        count = shard.rows_of(chunk)
        if not 0 <= first <= n_rows - count:
            raise StoreConfigError("first row", first, f"room for {count} of {n_rows} rows")
        if count:
            wanted.append(Wanted(chunk, count, first))
    return wanted


def _take_in(storage: Storage, header: StoreHeader, commits: CommitLog) -> _State:
    table = commits.contiguous()
    if header.finalised:
        table = table[: header.n_items]
        if len(table) < header.n_items:
            file = storage.where(record_name(len(table)))
            raise MissingDataError(f"{file} is missing; restore it from a backup")
    valid_rows = table["rows"].copy()
    valid_rows.flags.writeable = False
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(valid_rows)])
    if header.finalised and starts[-1] != header.n_tokens:
        raise DamagedDataError(
            f"{storage.path}: the log has {starts[-1]} rows, the header {header.n_tokens}; "
            "restore the log"
        )
    return _State(header, table, valid_rows, starts)
