"""The rows of a store in their shuffled order: blocks of them in memory, the next one under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import IncompleteStoreError, StoreConfigError
from activation_store.files import as_bytes
from activation_store.memory import Allocate, Recycler, anonymous
from activation_store.parallel import run_all
from activation_store.shard import scratch
from activation_store.shuffle import Block, Ints, Shuffle
from activation_store.store import Store

Chunks = list[tuple[int, int, int]]
Column = tuple[np.dtype[Any], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class LoadedBlock:
    """Rows that are in memory together. The memory is used again once nobody holds the arrays."""

    block: Block
    arrays: dict[str, NDArray[Any]]
    """[n, ...]. Gathered: every array and sidecar, the reader's rows in the order of the stream.
    Staged: every array on disk that was asked for (of codec int8 the quantised numbers and, as
    `<name>.scale`, the rows' scales), in the order in which the chunks came."""
    order: Ints | None = None
    """Staged: [n], the row of the arrays at each place of the reader's stream."""


@dataclass(frozen=True, eq=False)
class LoadedRows:
    """Rows of the stream that lie in one block."""

    block: LoadedBlock
    place: slice
    """Where among the reader's rows of the block."""

    @property
    def picks(self) -> Ints:
        """Of a staged block: which rows of its arrays these are, in the order of the stream."""
        assert self.block.order is not None, "only a staged block has an order"
        return self.block.order[self.place]


@dataclass(frozen=True)
class _Span:
    """What a reader needs of a block: the chunks under its strips."""

    wanted: Chunks
    """Item, chunk, number of its first row among the rows of these chunks."""
    n_rows: int
    """Rows of these chunks."""
    own: slice
    """The reader's among them."""


class ShuffledRows:
    """The stream of rows of every epoch, from any row on. For `ShuffledStream` and mixtures.

    Args:
        batch_rows: Rows of a batch; see `shuffle.py`.
        rows: The slice [lo, hi) of each batch that is read.
        staged: Leave the rows of a block in the order in which its chunks came.
        others: As of `ShuffledStream`.
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
            ("seed", seed, seed >= 0, "not negative"),
            ("window_items", window_items, window_items > 0, "at least 1"),
            ("buffer_rows", buffer_rows, buffer_rows > 0, "at least 1"),
            ("arrays", arrays, bool(arrays), "at least one"),
        ):
            if not valid:
                raise StoreConfigError(key, value, expected)
        for name in arrays:
            if name not in store.header.columns:
                raise StoreConfigError("arrays", name, f"one of {list(store.header.columns)}")
        self.store = store
        self.arrays = tuple(arrays)
        self.wait_s = 0.0
        """Seconds spent waiting for data, in all."""
        self._shuffle = Shuffle(
            seed, store.header.chunk_rows, window_items, buffer_rows, batch_rows
        )
        self._slice = rows
        self._prefetch, self._staged = prefetch, staged
        self._wait_timeout_s = wait_timeout_s
        self._stop = threading.Event()
        self._recycler = Recycler(allocate)
        self._blocks: Iterator[LoadedBlock] | None = None
        self._current: LoadedBlock | None = None
        self._fetch: _Fetch | None = None

    def parts(self, epoch: int, start: int, stop: int) -> list[LoadedRows]:
        """Where rows [start, stop) of an epoch lie; they follow on from those asked for before.

        All of them must be of the slice that is read.

        Raises:
            IncompleteStoreError: The store did not grow in time.
            MissingDataError, DamagedDataError: naming the file and the chunk.
        """
        # Only now, for the batch before this one may have held the block before the current one.
        if self._prefetch and self._current and not self._fetch:
            assert self._blocks is not None
            self._fetch = _Fetch(self._blocks)
        parts, row = [], start
        while row < stop:
            current = self._block_with(epoch, row)
            block = current.block
            end = min(stop, block.stop)
            first, here, there = (
                self._shuffle.rows_before(at, *self._slice) for at in (block.start, row, end)
            )
            parts.append(LoadedRows(current, slice(here - first, there - first)))
            row = end
        return parts

    def first_item_needed(self, row: int) -> int:
        """First item of the window of epoch 0 that holds a stream row; see `ShuffledStream`."""
        final, n_items = self.store.finalised, self.store.n_items  # in this order: see Store
        size = self._shuffle.window_items
        whole = n_items if final else n_items // size * size
        ends = self._shuffle.window_starts(self.store.valid_rows[:whole])[1:]
        return min(int(np.searchsorted(ends, row, side="right")) * size, whole)

    def join(self, parts: list[LoadedRows]) -> dict[str, NDArray[Any]]:
        """The rows of gathered `parts`: [n, d_model] of each array, [n] of each sidecar.

        Rows of one block are a view of it; only a batch that lies in several is copied.
        """
        joined = {}
        for name in self.arrays:
            pieces = [part.block.arrays[name][part.place] for part in parts]
            joined[name] = pieces[0] if len(pieces) == 1 else self._concatenate(name, pieces)
        return joined

    def _concatenate(self, name: str, pieces: list[NDArray[Any]]) -> NDArray[Any]:
        dtype, shape = self.store.header.columns[name]
        out = self._recycler.empty((sum(map(len, pieces)), *shape), dtype)
        start = 0
        for piece in pieces:
            out[start : start + len(piece)] = piece
            start += len(piece)
        return out

    def reset(self) -> None:
        """The next rows may be any."""
        if self._fetch:
            self._stop.set()
            self._fetch.join()
        self._stop.clear()
        self._blocks = self._current = self._fetch = None

    def settle(self) -> None:
        """Returns once no block is being read in advance; the one that was is kept."""
        if self._fetch:
            self._fetch.join()

    def close(self) -> None:
        """Ends the reading thread and gives the memory back."""
        self.reset()
        self._recycler = Recycler()

    def wait(self, ready: Callable[[], bool], why: str) -> None:
        """Returns when `ready` or when the store is finalised.

        Raises:
            IncompleteStoreError: with `why`, after `wait_timeout_s`.
        """
        deadline = time.monotonic() + self._wait_timeout_s
        while not ready() and not self.store.finalised:
            self.store.refresh()
            if ready() or self.store.finalised:
                return
            if time.monotonic() > deadline:
                raise IncompleteStoreError(
                    f"{why}; {self.store.path} has {self.store.n_items} items and is not "
                    f"finalised after {self._wait_timeout_s:g} s: is its writer still alive?"
                )
            if self._stop.wait(self.store.poll_s):
                raise _Stopped

    def _block_with(self, epoch: int, row: int) -> LoadedBlock:
        """The block that holds a stream row; blocks before it are passed over."""
        if self._blocks is None:
            self._blocks = self._read_blocks(epoch, row)
        while True:
            current = self._current
            if current and current.block.epoch == epoch and row < current.block.stop:
                return current
            self._current = current = None  # its memory is free from here on
            self._current = self._take_block()
            begin = (self._current.block.epoch, self._current.block.start)
            assert begin <= (epoch, row), "passed the row that is asked for"

    def _take_block(self) -> LoadedBlock:
        started = time.monotonic()
        assert self._blocks is not None
        fetch, self._fetch = self._fetch, None
        staged = fetch.result() if fetch else next(self._blocks)
        self.wait_s += time.monotonic() - started
        return staged

    def _read_blocks(self, epoch: int, row: int) -> Iterator[LoadedBlock]:
        """Without end, from the block that holds `row` on. Runs in the reading thread."""
        while True:
            for block in self._plan(epoch, row):
                first, last = self._shuffle.memory(block, *self._slice)
                if block.stop > row and first < last:
                    yield self._read(block)
            epoch, row = epoch + 1, 0

    def _plan(self, epoch: int, row: int) -> Iterator[Block]:
        """The blocks of an epoch from the window that holds `row` on."""
        if epoch > 0:
            self.wait(lambda: False, f"epoch {epoch} needs the finalised store")
            self.store.require_all(f"epoch {epoch}")
        size, known, window = self._shuffle.window_items, -1, 0
        while True:
            final, n_items = self.store.finalised, self.store.n_items  # in this order: see Store
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
        stop = (window + 1) * self._shuffle.window_items
        self.wait(lambda: self.store.n_items >= stop, f"window {window} needs items to {stop - 1}")

    def _read(self, block: Block) -> LoadedBlock:
        span = self._span(block)
        if self._staged:
            return self._read_staged(block, span)
        order = self._shuffle.row_order(block, *self._slice)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return LoadedBlock(block, {name: self._gather(name, span, places) for name in self.arrays})

    def _read_staged(self, block: Block, span: _Span) -> LoadedBlock:
        names = [part for name in self.arrays for part in self.store.header.stored_as(name)]
        # The order beside the reads, which wait for memory more than they compute.
        tasks: list[Callable[[], NDArray[Any]]] = [
            partial(self._shuffle.row_order, block, *self._slice),
            *(partial(self._read_stored, name, span) for name in names),
        ]
        order, *arrays = run_all(tasks)
        return LoadedBlock(block, dict(zip(names, arrays, strict=True)), order + span.own.start)

    def _span(self, block: Block) -> _Span:
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
        # Every block of a stream fits, so that memory of one size goes round.
        shuffle, (lo, hi) = self._shuffle, self._slice
        most = shuffle.buffer_rows + shuffle.chunk_rows
        own = -(-most // shuffle.batch_rows) * (hi - lo) + 2 * shuffle.chunk_rows
        return self._recycler.empty((min(most, own), *column[1]), column[0])[:n_rows]

    def _read_stored(self, name: str, span: _Span) -> NDArray[Any]:
        rows = self._empty(span.n_rows, self.store.header.stored[name])
        self.store.read_chunks(name, span.wanted, rows)
        return rows

    def _gather(self, name: str, span: _Span, places: Ints) -> NDArray[Any]:
        """The reader's rows in the order of the stream, put there while they are in cache."""
        out = self._empty(len(places), self.store.header.columns[name])
        # As bytes: over bfloat16 numbers NumPy would hold the interpreter's lock.
        target = as_bytes(out).reshape(len(out), -1)
        numbers, *scales = self.store.header.stored_as(name)
        scale = self._read_stored(scales[0], span) if scales else None
        own = span.own

        def place(first: int, rows: NDArray[Any]) -> None:
            part = slice(max(first, own.start), min(first + len(rows), own.stop))
            rows = rows[part.start - first : part.stop - first]
            if scale is not None:
                decoded = scratch("decoded", out.itemsize * rows.size).view(out.dtype)
                decoded = decoded.reshape(rows.shape)
                self.store.scaling(name).dequantise(rows, scale[part], decoded)
                rows = decoded
            there = places[part.start - own.start : part.stop - own.start]
            target[there] = as_bytes(rows).reshape(len(rows), -1)

        self.store.place_chunks(numbers, span.wanted, span.n_rows, place)
        return out


class _Stopped(Exception):
    """The stream moved elsewhere; nobody is waiting for this block."""


class _Fetch(threading.Thread):
    """Reads one block. A daemon: a stream that was never closed does not keep the process alive."""

    def __init__(self, blocks: Iterator[LoadedBlock]) -> None:
        super().__init__(name="activation-reader", daemon=True)
        self._blocks = blocks
        self._staged: LoadedBlock | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._staged = next(self._blocks)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._error = error

    def result(self) -> LoadedBlock:
        self.join()
        if self._error is not None:
            raise self._error
        assert self._staged is not None
        return self._staged
