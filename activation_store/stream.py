"""Shuffled batches from a store, finished or still being written, from any position on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from activation_store.errors import IncompleteStoreError, StoreConfigError
from activation_store.memory import Allocate, anonymous
from activation_store.rows import LoadedRows, ShuffledRows
from activation_store.store import Store


class StreamBatch(NamedTuple):
    """A reader's slice of one global batch."""

    arrays: dict[str, NDArray[Any]]
    """[hi - lo, d_model] of each array, [hi - lo] of each sidecar, in the store's data type."""
    first_row: int
    """position * batch_rows + lo: row of the endless stream, over all epochs."""
    epoch: int


class StagedBatch(NamedTuple):
    """A reader's slice of one global batch as blocks in memory, for a device to gather from."""

    parts: list[LoadedRows]
    """The batch is the picked rows of each, one after the other. Many batches share a block: it
    goes to the device once, whole; `part.block` is the same object each time."""
    first_row: int
    """As in `StreamBatch`."""
    epoch: int


class _Stream:
    """What both kinds of stream have: a position, and the rows there. Arguments as there."""

    _staged = False

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
        allocate: Allocate = anonymous,
    ) -> None:
        self.lo, self.hi = check_slice(batch_rows, rows)
        self._rows = ShuffledRows(
            store,
            arrays,
            seed=seed,
            window_items=window_items,
            buffer_rows=buffer_rows,
            batch_rows=batch_rows,
            rows=(self.lo, self.hi),
            prefetch=prefetch,
            wait_timeout_s=wait_timeout_s,
            allocate=allocate,
            staged=self._staged,
        )
        self.store = store
        self.arrays = self._rows.arrays
        self.batch_rows = batch_rows
        self.position = 0
        """The batch that `next` gives."""

    @property
    def wait_s(self) -> float:
        """Seconds spent in `next` waiting for data, in all."""
        return self._rows.wait_s

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
            self._rows.reset()
        self.position = i

    def first_item_needed(self, position: int) -> int:
        """First item that batches from `position` on may need; a pure function of the store's rows.

        In epoch 0 windows are opened whole, so it is the beginning of one, and everything before
        it has been passed. 0 in later epochs, which need all items in another order. While the
        store grows, at most the first item of the first window that is not yet whole.

        Raises:
            StoreConfigError: A negative position.
        """
        if position < 0:
            raise StoreConfigError("position", position, "not negative")
        if self.store.finalised and position >= self.batches_per_epoch:
            return 0
        return self._rows.first_item_needed(position * self.batch_rows)

    def settle(self) -> None:
        """Returns once nothing is being read in advance: the machine is quiet, the block ready."""
        self._rows.settle()

    def close(self) -> None:
        """Ends the reading thread."""
        self._rows.close()

    def _locate(self) -> tuple[int, int]:
        """Epoch and first row of the batch at `position`."""
        row = self.position * self.batch_rows
        if not self.store.finalised:
            # All readers must find the whole batch in epoch 0, not each its own slice of it.
            started = time.monotonic()
            stop = row + self.batch_rows
            self._rows.wait(
                lambda: self.store.n_tokens >= stop,
                f"batch {self.position} needs {stop} rows",
            )
            self._rows.wait_s += time.monotonic() - started
        if not self.store.finalised:
            return 0, row
        epoch, i = divmod(self.position, self.batches_per_epoch)
        return epoch, i * self.batch_rows

    def _next(self) -> tuple[list[LoadedRows], int, int]:
        """The rows at `position`, which moves on; the number of the first; the epoch."""
        try:
            epoch, row = self._locate()
            parts = self._rows.parts(epoch, row + self.lo, row + self.hi)
        except BaseException:
            self._rows.reset()
            raise
        first_row = self.position * self.batch_rows + self.lo
        self.position += 1
        return parts, first_row, epoch


class ShuffledStream(_Stream):
    """An endless stream of batches; batch i is a pure function of (store, seed, i).

    All readers agree on one global order; each takes its slice of every batch, and reads and holds
    only its part of every block. Rows at the end of an epoch that fill no batch are dropped. Memory
    that nobody holds any more is used again; what somebody holds is never written again, but keeps
    the whole block around it.

    Args:
        store: May still grow; then epoch 0 follows it, a window opening once it is committed.
        arrays: Hookpoints and sidecars to read.
        seed: Not negative.
        batch_rows: Rows of the global batch.
        window_items: Items shuffled together.
        buffer_rows: Rows permuted together; a reader's parts of two such blocks are held.
        rows: The slice [lo, hi) of each global batch that this reader gets; None is all.
        prefetch: Read the next block in a thread while this one is consumed.
        wait_timeout_s: How long to wait for a growing store.
        allocate: Where blocks lie: pinned memory, for a GPU.

    Raises:
        StoreConfigError: A value that cannot be.
    """

    def next(self) -> StreamBatch:
        """The batch at `position`, which moves on.

        Raises:
            IncompleteStoreError: The store did not grow in time. `next` may be called again.
            DeletedDataError: It needs items that are deleted, as every epoch after the first does.
            MissingDataError, DamagedDataError: naming the file and the chunk.
        """
        parts, first_row, epoch = self._next()
        return StreamBatch(self._rows.join(parts), first_row, epoch)


class StagedStream(_Stream):
    """The batches of a `ShuffledStream` with the same arguments, for a device to gather.

    The rows of a block stay in the order of its chunks, as they are stored: no row is copied or
    dequantised on this side.
    """

    _staged = True

    def next(self) -> StagedBatch:
        """The batch at `position`, which moves on. Raises as `ShuffledStream.next`."""
        return StagedBatch(*self._next())


def check_slice(batch_rows: int, rows: tuple[int, int] | None) -> tuple[int, int]:
    """The slice of a batch that a reader gets; None is all.

    Raises:
        StoreConfigError: A batch without rows, or a slice that is not in it.
    """
    if batch_rows < 1:
        raise StoreConfigError("batch_rows", batch_rows, "at least 1")
    lo, hi = rows or (0, batch_rows)
    if not 0 <= lo < hi <= batch_rows:
        raise StoreConfigError("rows", rows, f"lo < hi <= {batch_rows}")
    return lo, hi
