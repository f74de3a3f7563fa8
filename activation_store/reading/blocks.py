"""Read the rows of a store in shuffled order, block by block, with read-ahead."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import IncompleteStoreError
from activation_store.reading.buffers import Allocate, Recycler, anonymous
from activation_store.reading.shard_reader import scratch
from activation_store.reading.shuffle_order import Block, Ints, Shuffle
from activation_store.reading.store import Store
from activation_store.storage.atomic_files import as_bytes
from activation_store.threads import run_all
from foundation.errors import ConfigError

Chunks = list[tuple[int, int, int]]
Column = tuple[np.dtype[Any], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class LoadedBlock:
    """Rows of one block in memory, which is reused once no array of the block is referenced.

    A *gathered* block holds the reader's rows in stream order. A *staged* block holds them in chunk
    order and in the stored data type, together with the permutation into stream order.
    """

    block: Block
    arrays: dict[str, NDArray[Any]]
    """Rows of each array, [n, ...]. In a gathered block: the requested arrays and sidecars, as
    readers get them. In a staged block: the arrays on disk that they are made of (for codec int8,
    the quantised values, and the row scales under the name `<name>.scale`)."""
    order: Ints | None = None
    """For each row in stream order, the row of `arrays` that holds it: [n]. Staged blocks only."""


@dataclass(frozen=True, eq=False)
class LoadedRows:
    """Consecutive stream rows that belong to one block."""

    block: LoadedBlock
    place: slice
    """Position of the rows among the reader's rows of the block, in stream order."""

    @property
    def picks(self) -> Ints:
        """Rows to pick from the block's arrays, in stream order. Staged blocks only."""
        assert self.block.order is not None, "only a staged block has an order"
        return self.block.order[self.place]


@dataclass(frozen=True)
class _Span:
    """The chunks of a block that overlap the strips of one reader; see `shuffle_order.py`."""

    wanted: Chunks
    """For each chunk: its item, its chunk number, and the position of its first row in the span."""
    n_rows: int
    """Total number of rows of these chunks."""
    own: slice
    """The rows of the span that belong to the reader's strips."""


class ShuffledRows:
    """The shuffled rows of every epoch, readable from any row onwards; see `ShuffledStream`.

    Args:
        store: Store to read from; it may still be growing.
        arrays: Hookpoints and sidecars to read.
        seed: Seed of the row order, not negative.
        window_items: Number of items that are shuffled together.
        buffer_rows: Number of rows that are permuted together.
        batch_rows: Number of rows in a global batch; see `shuffle_order.py`.
        rows: The slice [lo, hi) of each global batch that this reader gets.
        prefetch: Read the next block in a thread while the current block is in use.
        wait_timeout_s: Seconds to wait for a growing store before raising an error.
        allocate: Allocator of the memory for blocks.
        staged: Keep the rows of a block in chunk order and in the stored data type.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(
        self,
        store: Store,
        arrays: Sequence[str],
        *,
        seed: int,
        window_items: int,
        buffer_rows: int,
        batch_rows: int = 1,
        rows: tuple[int, int] = (0, 1),
        prefetch: bool = True,
        wait_timeout_s: float = 600.0,
        allocate: Allocate = anonymous,
        staged: bool = False,
    ) -> None:
        for key, value, valid, expected in (
            ("seed", seed, seed >= 0, "at least 0"),
            ("window_items", window_items, window_items > 0, "at least 1"),
            ("buffer_rows", buffer_rows, buffer_rows > 0, "at least 1"),
            ("arrays", arrays, bool(arrays), "at least one name"),
        ):
            if not valid:
                raise ConfigError(key, value, expected)
        for name in arrays:
            if name not in store.header.columns:
                raise ConfigError("arrays", name, f"one of {list(store.header.columns)}")
        self.store = store
        self.arrays = tuple(arrays)
        self.wait_s = 0.0
        """Total seconds spent waiting for data."""
        self._shuffle = Shuffle(
            seed, store.header.chunk_rows, window_items, buffer_rows, batch_rows
        )
        self._slice = rows
        self._prefetch = prefetch
        self._staged = staged
        self._wait_timeout_s = wait_timeout_s
        self._stop = threading.Event()
        self._recycler = Recycler(allocate)
        self._blocks: Iterator[LoadedBlock] | None = None
        self._current: LoadedBlock | None = None
        self._fetch: _Fetch | None = None

    def parts(self, epoch: int, start: int, stop: int) -> list[LoadedRows]:
        """Load stream rows [start, stop) of an epoch, and return them as parts of blocks.

        Successive calls must request increasing rows; call `reset` before requesting any others.
        All rows must belong to the slice of this reader.

        Raises:
            IncompleteStoreError: If the store did not grow within `wait_timeout_s`.
            DeletedDataError: If some of the rows were deleted.
            MissingDataError: If a shard file is missing; the message names the file.
            DamagedDataError: If a chunk fails its checksum; the message names the file and chunk.
        """
        # Start reading ahead now, and not when the current block was taken. The previous batch may
        # have contained rows of the preceding block, whose memory is therefore free only now.
        if self._prefetch and self._current and not self._fetch:
            assert self._blocks is not None
            self._fetch = _Fetch(self._blocks)
        parts = []
        row = start
        while row < stop:
            current = self._block_with(epoch, row)
            block = current.block
            end = min(stop, block.stop)
            first = self._shuffle.rows_before(block.start, *self._slice)
            low = self._shuffle.rows_before(row, *self._slice)
            high = self._shuffle.rows_before(end, *self._slice)
            parts.append(LoadedRows(current, slice(low - first, high - first)))
            row = end
        return parts

    def first_item_needed(self, row: int) -> int:
        """Return the first item of the epoch-0 window that contains a row; see `stream.py`."""
        # Read `finalised` first; `Store` explains why.
        final = self.store.finalised
        n_items = self.store.n_items
        size = self._shuffle.window_items
        whole = n_items if final else n_items // size * size
        ends = self._shuffle.window_starts(self.store.valid_rows[:whole])[1:]
        return min(int(np.searchsorted(ends, row, side="right")) * size, whole)

    def join(self, parts: list[LoadedRows]) -> dict[str, NDArray[Any]]:
        """Concatenate the rows of gathered parts: [n, d_model] per array and [n] per sidecar.

        If there is only one part, views of its rows are returned. Otherwise, the rows are copied.
        """
        joined = {}
        for name in self.arrays:
            pieces = [part.block.arrays[name][part.place] for part in parts]
            joined[name] = pieces[0] if len(pieces) == 1 else self._concatenate(name, pieces)
        return joined

    def _concatenate(self, name: str, pieces: list[NDArray[Any]]) -> NDArray[Any]:
        """Copy the pieces one after the other into new memory."""
        dtype, shape = self.store.header.columns[name]
        out = self._recycler.empty((sum(map(len, pieces)), *shape), dtype)
        start = 0
        for piece in pieces:
            out[start : start + len(piece)] = piece
            start += len(piece)
        return out

    def reset(self) -> None:
        """Discard the current block and the read-ahead, so that any rows may be requested next."""
        if self._fetch:
            self._stop.set()
            self._fetch.join()
        self._stop.clear()
        self._blocks = self._current = self._fetch = None

    def settle(self) -> None:
        """Wait until the read-ahead, if any, is complete, and keep its block."""
        if self._fetch:
            self._fetch.join()

    def close(self) -> None:
        """Stop the reading thread and release the memory."""
        self.reset()
        self._recycler = Recycler()

    def wait(self, ready: Callable[[], bool], why: str) -> None:
        """Wait until `ready()` is true or the store is finalised.

        Args:
            ready: Condition, which is checked after each refresh of the store.
            why: What the caller needs, for the error message.

        Raises:
            IncompleteStoreError: If the wait takes longer than `wait_timeout_s`.
        """
        deadline = time.monotonic() + self._wait_timeout_s
        while not ready() and not self.store.finalised:
            self.store.refresh()
            if ready() or self.store.finalised:
                return
            if time.monotonic() > deadline:
                raise IncompleteStoreError(
                    f"{why}; after waiting {self._wait_timeout_s:g} s, {self.store.path} has "
                    f"{self.store.n_items} items and is still not finalised; check that the "
                    "harvest writing it is still running"
                )
            if self._stop.wait(self.store.poll_s):
                raise _Stopped

    def _block_with(self, epoch: int, row: int) -> LoadedBlock:
        """Return the block that holds a stream row, skipping the blocks before it."""
        if self._blocks is None:
            self._blocks = self._read_blocks(epoch, row)
        while True:
            current = self._current
            if current and current.block.epoch == epoch and row < current.block.stop:
                return current
            self._current = current = None  # release its memory before taking the next block
            self._current = self._take_block()
            begin = (self._current.block.epoch, self._current.block.start)
            assert begin <= (epoch, row), "rows must be requested in increasing order"

    def _take_block(self) -> LoadedBlock:
        """Return the next block, from the read-ahead if there is one."""
        started = time.monotonic()
        assert self._blocks is not None
        fetch = self._fetch
        self._fetch = None
        block = fetch.result() if fetch else next(self._blocks)
        self.wait_s += time.monotonic() - started
        return block

    def _read_blocks(self, epoch: int, row: int) -> Iterator[LoadedBlock]:
        """Yield blocks endlessly, starting with the block that holds `row`.

        With `prefetch`, this usually runs in the read-ahead thread.
        """
        while True:
            for block in self._plan(epoch, row):
                first, last = self._shuffle.memory(block, *self._slice)
                if block.stop > row and first < last:
                    yield self._read(block)
            epoch, row = epoch + 1, 0

    def _plan(self, epoch: int, row: int) -> Iterator[Block]:
        """Yield the blocks of an epoch, starting with the window that holds `row`."""
        if epoch > 0:
            # Later epochs permute all items, so they need the complete store.
            self.wait(lambda: False, f"epoch {epoch} needs the finalised store")
            self.store.require_all(f"epoch {epoch}")
        size = self._shuffle.window_items
        known = -1
        window = 0
        while True:
            # Read `finalised` first; `Store` explains why.
            final = self.store.finalised
            n_items = self.store.n_items
            if n_items != known:
                known = n_items
                order = self._shuffle.item_order(epoch, known)
                rows = self.store.valid_rows[order]
                starts = self._shuffle.window_starts(rows)
            n_windows = len(starts) - 1 if final else known // size
            window = max(window, int(np.searchsorted(starts[1 : n_windows + 1], row, side="right")))
            if window < n_windows:
                span = slice(window * size, (window + 1) * size)
                start = int(starts[window])
                yield from self._shuffle.blocks(epoch, window, start, order[span], rows[span])
                window += 1
            elif final:
                return
            else:
                self._wait_for_window(window)

    def _wait_for_window(self, window: int) -> None:
        """Wait until all items of a window are committed."""
        stop = (window + 1) * self._shuffle.window_items
        self.wait(
            lambda: self.store.n_items >= stop, f"window {window} needs items up to {stop - 1}"
        )

    def _read(self, block: Block) -> LoadedBlock:
        """Read a block as a gathered or a staged block."""
        span = self._span(block)
        if self._staged:
            return self._read_staged(block, span)
        order = self._shuffle.row_order(block, *self._slice)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return LoadedBlock(block, {name: self._gather(name, span, places) for name in self.arrays})

    def _read_staged(self, block: Block, span: _Span) -> LoadedBlock:
        """Read a block in chunk order, together with its permutation into stream order."""
        names = [part for name in self.arrays for part in self.store.header.disk_names(name)]
        # Compute the order in parallel with the reads, which mostly wait for memory.
        tasks: list[Callable[[], NDArray[Any]]] = [
            partial(self._shuffle.row_order, block, *self._slice),
            *(partial(self._read_stored, name, span) for name in names),
        ]
        order, *arrays = run_all(tasks)
        # The order is uploaded with the rows, so it needs the same kind of memory.
        picks = self._empty(len(order), (order.dtype, ()))
        np.add(order, span.own.start, out=picks)
        return LoadedBlock(block, dict(zip(names, arrays, strict=True)), picks)

    def _span(self, block: Block) -> _Span:
        """Find the chunks of a block that overlap this reader's strips."""
        ends = np.cumsum(block.chunks[:, 2])
        first, last = self._shuffle.memory(block, *self._slice)
        span = slice(
            int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, last)) + 1
        )
        starts = ends[span] - block.chunks[span, 2]
        begin = int(starts[0])
        wanted = np.column_stack([block.chunks[span, :2], starts - begin]).tolist()
        return _Span(wanted, int(ends[span][-1]) - begin, slice(first - begin, last - begin))

    def _empty(self, n_rows: int, column: Column) -> NDArray[Any]:
        """Return uninitialised memory for `n_rows` rows of a block."""
        # Always allocate enough for the largest block of the stream, so that memory can be reused.
        shuffle = self._shuffle
        lo, hi = self._slice
        most = shuffle.buffer_rows + shuffle.chunk_rows
        own = -(-most // shuffle.batch_rows) * (hi - lo) + 2 * shuffle.chunk_rows
        return self._recycler.empty((min(most, own), *column[1]), column[0])[:n_rows]

    def _read_stored(self, name: str, span: _Span) -> NDArray[Any]:
        """Read all rows of a span in chunk order, in the stored data type."""
        part = self.store.header.disk_arrays[name]
        rows = self._empty(span.n_rows, (part.dtype, part.row_shape))
        self.store.read_chunks(name, span.wanted, rows)
        return rows

    def _gather(self, name: str, span: _Span, places: Ints) -> NDArray[Any]:
        """Read the reader's rows, and move each to its place in stream order while it is in cache.

        Args:
            name: Hookpoint or sidecar.
            span: Chunks to read.
            places: For each of the reader's rows in chunk order, its place in stream order: [n].
        """
        out = self._empty(len(places), self.store.header.columns[name])
        # Copy the rows as bytes, because NumPy would hold the GIL while copying bfloat16 values.
        target = as_bytes(out).reshape(len(out), -1)
        main, *others = self.store.header.disk_names(name)
        beside = [self._read_stored(other, span) for other in others]
        row_codec = self.store.row_codec(name)
        own = span.own

        def place(first: int, rows: NDArray[Any]) -> None:
            # Keep only rows of the reader's strips; the first and last chunks may also hold others.
            part = slice(max(first, own.start), min(first + len(rows), own.stop))
            rows = rows[part.start - first : part.stop - first]
            if row_codec is not None:
                shape = (len(rows), *out.shape[1:])
                n_bytes = out.itemsize * math.prod(shape)
                decoded = scratch("decoded", n_bytes).view(out.dtype).reshape(shape)
                row_codec.decode([rows, *(stored[part] for stored in beside)], decoded)
                rows = decoded
            there = places[part.start - own.start : part.stop - own.start]
            target[there] = as_bytes(rows).reshape(len(rows), -1)

        self.store.place_chunks(main, span.wanted, span.n_rows, place)
        return out


class _Stopped(Exception):
    """Signal to the reading thread that the stream was reset, so its block is no longer needed."""


class _Fetch(threading.Thread):
    """Thread that reads one block.

    It is a daemon thread, so that a stream that was not closed does not keep the process alive.
    """

    def __init__(self, blocks: Iterator[LoadedBlock]) -> None:
        super().__init__(name="activation-reader", daemon=True)
        self._blocks = blocks
        self._block: LoadedBlock | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Read the block, and keep the block or the error for `result`."""
        try:
            self._block = next(self._blocks)
        except BaseException as error:  # `result` raises it in the thread that waits
            self._error = error

    def result(self) -> LoadedBlock:
        """Wait for the block and return it, or raise the error if reading failed."""
        self.join()
        if self._error is not None:
            raise self._error
        assert self._block is not None
        return self._block
