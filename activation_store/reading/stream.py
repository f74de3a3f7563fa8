"""Shuffled batches of a finalised or growing store, starting at any position."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from activation_store.errors import IncompleteStoreError
from activation_store.reading.blocks import LoadedRows, ShuffledRows
from activation_store.reading.buffers import Allocate, anonymous
from activation_store.reading.store import Store
from foundation.errors import ConfigError


class StreamBatch(NamedTuple):
    """A reader's slice of one global batch."""

    arrays: dict[str, NDArray[Any]]
    """[hi - lo, d_model] for each array, [hi - lo] for each sidecar, in the store's data type."""
    first_row: int
    """Number of the first row in the endless stream over all epochs: position * batch_rows + lo."""
    epoch: int
    """Epoch of the batch."""


class StagedBatch(NamedTuple):
    """A reader's slice of one global batch, as rows of blocks that a device is to gather."""

    parts: list[LoadedRows]
    """Parts of blocks. The batch is the concatenation of the picked rows of each part. Many batches
    share a block, so copy each block to the device only once; `part.block` is the same object each
    time."""
    first_row: int
    """Number of the first row in the endless stream, as in `StreamBatch`."""
    epoch: int
    """Epoch of the batch."""


class _Stream:
    """Common base class of both streams; see `ShuffledStream` for the arguments."""

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
        """Number of the batch that `next` returns."""

    @property
    def wait_s(self) -> float:
        """Total seconds that `next` spent waiting for data."""
        return self._rows.wait_s

    @property
    def batches_per_epoch(self) -> int:
        """Number of full batches in one epoch.

        Raises:
            IncompleteStoreError: If the store is not finalised.
            ConfigError: If the store has fewer rows than a batch.
        """
        if not self.store.finalised:
            self.store.refresh()
        if not self.store.finalised:
            raise IncompleteStoreError(
                f"{self.store.path} is not finalised, so its number of rows is not known yet; "
                "finish its harvest first"
            )
        count = self.store.n_tokens // self.batch_rows
        if not count:
            raise ConfigError(
                "batch_rows", self.batch_rows, f"at most the store's {self.store.n_tokens} rows"
            )
        return count

    def seek(self, i: int) -> None:
        """Continue with batch `i`."""
        if i < 0:
            raise ConfigError("position", i, "at least 0")
        if i != self.position:
            self._rows.reset()
        self.position = i

    def first_item_needed(self, position: int) -> int:
        """Return the first item that the batches from `position` onwards may need.

        The result depends only on the store's rows. In epoch 0, it is the first item of the window
        that holds the batch, since windows are read as a whole. In later epochs, which visit all
        items in a different order, it is 0. While the store grows, the result is at most the first
        item of the first incomplete window.

        Raises:
            ConfigError: If `position` is negative.
        """
        if position < 0:
            raise ConfigError("position", position, "at least 0")
        if self.store.finalised and position >= self.batches_per_epoch:
            return 0
        return self._rows.first_item_needed(position * self.batch_rows)

    def settle(self) -> None:
        """Wait until the read-ahead, if any, is complete, so that no thread is reading."""
        self._rows.settle()

    def close(self) -> None:
        """Stop the reading thread and release the memory."""
        self._rows.close()

    def _locate(self) -> tuple[int, int]:
        """Return the epoch of the batch at `position`, and its first row in that epoch."""
        row = self.position * self.batch_rows
        if not self.store.finalised:
            # Wait for the whole batch, not just for this reader's slice, so that all readers agree
            # on whether the batch is still in epoch 0.
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
        """Return the rows at `position`, the first row's number, and the epoch; then advance."""
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

    All readers share one global order. Each reader takes its slice of every batch, and reads and
    holds only its part of every block. If the last rows of an epoch do not fill a batch, they are
    dropped. The memory of a block is reused once no batch from the block is referenced. A batch
    that is still referenced is never overwritten, but keeps the memory of its whole block alive.

    Args:
        store: Store to read from. If it is still growing, epoch 0 follows its growth: a window is
            read once all of its items are committed.
        arrays: Hookpoints and sidecars to read.
        seed: Seed of the row order, not negative.
        batch_rows: Number of rows in a global batch.
        window_items: Number of items that are shuffled together.
        buffer_rows: Number of rows that are permuted together. Up to two such blocks, or a reader's
            parts of them, are in memory.
        rows: The slice [lo, hi) of each global batch that this reader gets; None means all rows.
        prefetch: Read the next block in a thread while the current block is in use.
        wait_timeout_s: Seconds to wait for a growing store before raising an error.
        allocate: Allocator of the memory for blocks, for example of pinned memory for a GPU.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def next(self) -> StreamBatch:
        """Return the batch at `position` and advance.

        Raises:
            IncompleteStoreError: If the store did not grow in time; `next` may be called again.
            DeletedDataError: If the batch needs rows that were deleted. Every epoch after the first
                needs all rows.
            MissingDataError: If a shard file is missing; the message names the file.
            DamagedDataError: If a chunk fails its checksum; the message names the file and chunk.
        """
        parts, first_row, epoch = self._next()
        return StreamBatch(self._rows.join(parts), first_row, epoch)


class StagedStream(_Stream):
    """The batches of a `ShuffledStream` with the same arguments, to be gathered on a device.

    The rows of a block remain in chunk order and in the stored data type, because the host neither
    permutes nor decodes them.
    """

    _staged = True

    def next(self) -> StagedBatch:
        """Return the batch at `position` and advance.

        Raises the same errors as `ShuffledStream.next`.
        """
        return StagedBatch(*self._next())


def check_slice(batch_rows: int, rows: tuple[int, int] | None) -> tuple[int, int]:
    """Check the slice [lo, hi) of a batch that a reader gets, and return it.

    Args:
        batch_rows: Number of rows in a global batch.
        rows: The slice; None means the whole batch.

    Raises:
        ConfigError: If `batch_rows` is below 1, or the slice is empty or not within the batch.
    """
    if batch_rows < 1:
        raise ConfigError("batch_rows", batch_rows, "at least 1")
    lo, hi = rows or (0, batch_rows)
    if not 0 <= lo < hi <= batch_rows:
        raise ConfigError("rows", rows, f"(lo, hi) with 0 <= lo < hi <= {batch_rows}")
    return lo, hi
