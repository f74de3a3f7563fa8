"""Shuffled batches from a store, finished or still being written, from any position on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import IncompleteStoreError, StoreConfigError
from activation_store.shuffle import Block, Ints, Shuffle
from activation_store.store import Store

_POLL_S = 0.05


class StreamBatch(NamedTuple):
    """A replica's slice of one global batch."""

    arrays: dict[str, NDArray[Any]]
    """[hi - lo, d_model] of each array, [hi - lo] of each sidecar, in the store's data type."""
    first_row: int
    """position * batch_rows + lo: row of the endless stream, over all epochs."""
    epoch: int


@dataclass(frozen=True)
class _Loaded:
    block: Block
    order: Ints
    buffers: dict[str, NDArray[Any]]


class ShuffledStream:
    """An endless stream of batches; batch i is a pure function of (store, seed, i).

    All replicas agree on one global order; each takes its slice of every batch. Rows at the end of
    an epoch that fill no batch are dropped.

    Args:
        store: May still grow; then epoch 0 follows it, a window opening once it is committed.
        arrays: Hookpoints and sidecars to read.
        seed: Not negative.
        batch_rows: Rows of the global batch.
        window_items: Items shuffled together.
        buffer_rows: Rows permuted in memory together; two such blocks are held.
        rows: The slice [lo, hi) of each global batch that this replica gets; None is all.
        prefetch: Read the next block in a thread while this one is consumed.
        wait_timeout_s: How long to wait for a growing store.

    Raises:
        StoreConfigError: A value that cannot be.
    """

    def __init__(
        self,
        store: Store,
        arrays: Sequence[str],
        *,
        seed: int,
        batch_rows: int,
        window_items: int,
        buffer_rows: int,
        rows: tuple[int, int] | None = None,
        prefetch: bool = True,
        wait_timeout_s: float = 600.0,
    ) -> None:
        self.lo, self.hi = rows or (0, batch_rows)
        for key, value, valid, expected in (
            ("seed", seed, seed >= 0, "not negative"),
            ("batch_rows", batch_rows, batch_rows > 0, "at least 1"),
            ("window_items", window_items, window_items > 0, "at least 1"),
            ("buffer_rows", buffer_rows, buffer_rows > 0, "at least 1"),
            ("rows", rows, 0 <= self.lo < self.hi <= batch_rows, f"lo < hi <= {batch_rows}"),
            ("arrays", arrays, bool(arrays), "at least one"),
        ):
            if not valid:
                raise StoreConfigError(key, value, expected)
        for name in arrays:
            if name not in store.header.columns:
                raise StoreConfigError("arrays", name, f"one of {list(store.header.columns)}")
        self.store = store
        self.arrays = tuple(arrays)
        self.batch_rows = batch_rows
        self.shuffle = Shuffle(seed, store.header.chunk_rows, window_items, buffer_rows)
        self.position = 0
        """The batch that `next` gives."""
        self.wait_s = 0.0
        """Seconds spent in `next` waiting for data, in all."""
        self._prefetch = prefetch
        self._wait_timeout_s = wait_timeout_s
        self._stop = threading.Event()
        self._buffers = [self._allocate() for _ in range(2)]
        self._blocks: Iterator[_Loaded] | None = None
        self._current: _Loaded | None = None
        self._fetch: _Fetch | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass.

        Raises:
            IncompleteStoreError: The store may still grow.
            StoreConfigError: It has fewer rows than a batch.
        """
        if not self.store.finalised:
            self.store.refresh()
        if not self.store.finalised:
            raise IncompleteStoreError(
                f"{self.store.path} is not finalised: its rows are not known yet"
            )
        count = self.store.n_tokens // self.batch_rows
        if not count:
            raise StoreConfigError(
                "batch_rows", self.batch_rows, f"at most the store's {self.store.n_tokens} rows"
            )
        return count

    def seek(self, i: int) -> None:
        """Makes batch `i` the next one."""
        if i < 0:
            raise StoreConfigError("position", i, "not negative")
        if i != self.position:
            self._reset()
        self.position = i

    def next(self) -> StreamBatch:
        """The batch at `position`, which moves on.

        Raises:
            IncompleteStoreError: The store did not grow in time. `next` may be called again.
            MissingDataError, DamagedDataError: naming the file and the chunk.
        """
        try:
            epoch, row = self._locate()
            arrays = self._gather(epoch, row + self.lo, row + self.hi)
        except BaseException:
            self._reset()
            raise
        first_row = self.position * self.batch_rows + self.lo
        self.position += 1
        return StreamBatch(arrays, first_row, epoch)

    def close(self) -> None:
        """Ends the reading thread."""
        self._reset()
        self._buffers = []

    def _allocate(self) -> dict[str, NDArray[Any]]:
        columns = self.store.header.columns
        # A block overshoots by less than a chunk, and a chunk is read with its padding.
        rows = self.shuffle.buffer_rows + 2 * self.shuffle.chunk_rows
        return {name: np.empty((rows, *columns[name][1]), columns[name][0]) for name in self.arrays}

    def _locate(self) -> tuple[int, int]:
        """Epoch and first row of the batch at `position`."""
        row = self.position * self.batch_rows
        if not self.store.finalised:
            # All replicas must find the whole batch in epoch 0, not each its own slice of it.
            started = time.monotonic()
            stop = row + self.batch_rows
            self._wait(
                lambda: self.store.n_tokens >= stop,
                f"batch {self.position} needs {stop} rows",
            )
            self.wait_s += time.monotonic() - started
        if not self.store.finalised:
            return 0, row
        epoch, i = divmod(self.position, self.batches_per_epoch)
        return epoch, i * self.batch_rows

    def _gather(self, epoch: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        columns = self.store.header.columns
        out = {
            name: np.empty((stop - start, *columns[name][1]), columns[name][0])
            for name in self.arrays
        }
        row = start
        while row < stop:
            loaded = self._block_with(epoch, row)
            block = loaded.block
            end = min(stop, block.stop)
            picks = loaded.order[row - block.start : end - block.start]
            for name, target in out.items():
                # mode="clip" writes straight into `out`; the default goes through a copy of it.
                part = target[row - start : end - start]
                np.take(loaded.buffers[name], picks, axis=0, out=part, mode="clip")
            row = end
        return out

    def _block_with(self, epoch: int, row: int) -> _Loaded:
        """The block that holds a stream row; blocks before it are passed over."""
        if self._blocks is None:
            self._blocks = self._read_blocks(epoch, row)
        while True:
            current = self._current
            if current and current.block.epoch == epoch and row < current.block.stop:
                return current
            self._current = None  # its buffer is free from here on
            self._current = self._take()
            begin = (self._current.block.epoch, self._current.block.start)
            assert begin <= (epoch, row), "passed the row that is asked for"

    def _take(self) -> _Loaded:
        started = time.monotonic()
        assert self._blocks is not None
        fetch, self._fetch = self._fetch, None
        loaded = fetch.result() if fetch else next(self._blocks)
        self.wait_s += time.monotonic() - started
        if self._prefetch:
            self._fetch = _Fetch(self._blocks)
        return loaded

    def _reset(self) -> None:
        if self._fetch:
            self._stop.set()
            self._fetch.join()
        self._stop.clear()
        self._blocks = self._current = self._fetch = None

    def _read_blocks(self, epoch: int, row: int) -> Iterator[_Loaded]:
        """Without end, from the block that holds `row` on. Runs in the reading thread."""
        turn = 0
        while True:
            for block in self._plan(epoch, row):
                if block.stop > row:
                    yield self._read(block, self._buffers[turn])
                    turn = 1 - turn
            epoch, row = epoch + 1, 0

    def _plan(self, epoch: int, row: int) -> Iterator[Block]:
        """The blocks of an epoch from the window that holds `row` on."""
        if epoch > 0:
            self._wait(lambda: False, f"epoch {epoch} needs the finalised store")
        size, known, window = self.shuffle.window_items, -1, 0
        while True:
            final, n_items = self.store.finalised, self.store.n_items  # in this order: see Store
            if n_items != known:
                known = n_items
                order = self.shuffle.item_order(epoch, known)
                rows = self.store.valid_rows[order]
                starts = self.shuffle.window_starts(rows)
            n_windows = len(starts) - 1 if final else known // size
            window = max(window, int(np.searchsorted(starts[1 : n_windows + 1], row, side="right")))
            if window < n_windows:
                span = slice(window * size, (window + 1) * size)
                start = int(starts[window])
                yield from self.shuffle.blocks(epoch, window, start, order[span], rows[span])
                window += 1
            elif final:
                return
            else:
                self._wait_for_window(window)

    def _wait_for_window(self, window: int) -> None:
        stop = (window + 1) * self.shuffle.window_items
        self._wait(lambda: self.store.n_items >= stop, f"window {window} needs items to {stop - 1}")

    def _wait(self, ready: Callable[[], bool], why: str) -> None:
        """Returns when `ready` or when the store is finalised."""
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
            if self._stop.wait(_POLL_S):
                raise _Stopped

    def _read(self, block: Block, buffers: dict[str, NDArray[Any]]) -> _Loaded:
        for name, buffer in buffers.items():
            done = 0
            for item, chunk, rows in block.chunks.tolist():
                target = buffer[done : done + self.shuffle.chunk_rows]
                self.store.read_chunk_into(name, item, chunk, target)
                done += rows
        return _Loaded(block, self.shuffle.row_order(block), buffers)


class _Stopped(Exception):
    """The stream moved elsewhere; nobody is waiting for this block."""


class _Fetch(threading.Thread):
    """Reads one block. A daemon: a stream that was never closed does not keep the process alive."""

    def __init__(self, blocks: Iterator[_Loaded]) -> None:
        super().__init__(name="activation-reader", daemon=True)
        self._blocks = blocks
        self._loaded: _Loaded | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._loaded = next(self._blocks)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._error = error

    def result(self) -> _Loaded:
        self.join()
        if self._error is not None:
            raise self._error
        assert self._loaded is not None
        return self._loaded
