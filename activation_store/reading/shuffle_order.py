"""The order in which rows are read: a pure function of (valid rows, settings, epoch), without I/O.

An epoch visits all items. Epoch 0 visits them in ascending order, so that it can follow a store
that is still being written. Later epochs visit them in a permuted order. Each `window_items`
successive items form a window. All chunks of a window are permuted and packed into blocks of at
least `buffer_rows` rows; the last block takes the remaining chunks. The stream of an epoch is the
concatenation of its blocks. Batch i consists of rows [i * B, (i + 1) * B) of the stream, where B is
`batch_rows`.

The rows of a block, in the order of its chunks, are cut into B strips whose lengths differ by at
most one row. Row j of every batch is drawn from strip j, in random order. So each batch is spread
evenly over the block, and a reader of a slice [lo, hi) of every batch reads only the chunks that
overlap strips lo to hi - 1. Two readers share at most the chunk in which their strips meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ORDER = 2
"""Version of the order. Increase it when a change gives a new order for the same settings."""
# The first word of a permutation's key states what is permuted, so that permutations of different
# kinds use independent random streams.
_ITEMS, _CHUNKS, _ROWS = 1, 2, 3


@dataclass(frozen=True)
class Block:
    """Chunks that are held in memory together and whose rows are permuted together."""

    epoch: int
    start: int
    """First row of the block in the epoch's stream."""
    chunks: Ints
    """Item, chunk number and number of valid rows of each chunk, in memory order: [n, 3]."""
    key: tuple[int, int, int]
    """Epoch, window, and number of the block within the window."""

    @property
    def n_rows(self) -> int:
        """Number of valid rows."""
        return int(self.chunks[:, 2].sum())

    @property
    def stop(self) -> int:
        """End of the block (exclusive) in the epoch's stream."""
        return self.start + self.n_rows


@dataclass(frozen=True)
class Shuffle:
    """The settings that determine the order, together with the store's numbers of valid rows."""

    seed: int
    """Seed of the order, not negative."""
    chunk_rows: int
    """Rows per chunk of the store."""
    window_items: int
    """Items per window."""
    buffer_rows: int
    """Minimum number of rows of a block, except for the last block of a window."""
    batch_rows: int
    """Rows of a global batch. With 1, a block is a single strip, whose rows are all permuted."""

    def item_order(self, epoch: int, n_items: int) -> Ints:
        """Return the items in the order in which an epoch visits them: [n_items]."""
        if epoch == 0:
            return np.arange(n_items)
        return permutation(n_items, _ITEMS, epoch, 0, 0, self.seed)

    def window_starts(self, rows: Ints) -> Ints:
        """Return the first stream row of every window, followed by the total: [n_windows + 1].

        Args:
            rows: Number of valid rows of each item, in the epoch's order of items: [n_items].
        """
        if not len(rows):
            return np.zeros(1, np.int64)
        sums = np.add.reduceat(rows, np.arange(0, len(rows), self.window_items))
        return np.concatenate([[0], np.cumsum(sums)])

    def blocks(
        self, epoch: int, window: int, start: int, items: Ints, rows: Ints
    ) -> Iterator[Block]:
        """Yield the blocks of a window.

        Args:
            epoch: Number of the epoch.
            window: Number of the window within the epoch.
            start: First row of the window in the epoch's stream.
            items: Items of the window, [n].
            rows: Number of valid rows of each of these items, [n].
        """
        chunks = _chunks(items, rows, self.chunk_rows)
        chunks = chunks[permutation(len(chunks), _CHUNKS, epoch, window, 0, self.seed)]
        ends = np.cumsum(chunks[:, 2])
        first = number = begin = 0
        while first < len(chunks):
            last = int(np.searchsorted(ends, begin + self.buffer_rows)) + 1
            yield Block(epoch, start + begin, chunks[first:last], (epoch, window, number))
            first, number = last, number + 1
            begin = int(ends[min(last, len(chunks)) - 1])

    def rows_before(self, row: int, lo: int, hi: int) -> int:
        """Return how many of the first `row` rows of an epoch's stream are from strips [lo, hi)."""
        batches, rest = divmod(row, self.batch_rows)
        return batches * (hi - lo) + min(max(rest - lo, 0), hi - lo)

    def memory(self, block: Block, lo: int, hi: int) -> tuple[int, int]:
        """Return the range of a block's rows, in chunk order, covered by strips [lo, hi)."""
        return (
            self.rows_before(block.stop, 0, lo) - self.rows_before(block.start, 0, lo),
            self.rows_before(block.stop, 0, hi) - self.rows_before(block.start, 0, hi),
        )

    def row_order(self, block: Block, lo: int, hi: int) -> Ints:
        """Return the memory positions of the rows of strips [lo, hi), in stream order: [n].

        Position 0 is the start of the range that `memory` returns.
        """
        first, last = self.memory(block, lo, hi)
        strips = np.arange(lo, hi)
        # For each strip: the number of batches that drew from the strip before this block, and the
        # number of rows that batches draw from the strip within this block.
        drawn = -((strips - block.start) // self.batch_rows)
        counts = -((strips - block.stop) // self.batch_rows) - drawn
        # List the rows of the block strip by strip. From each strip, batch b draws row
        # `starts + b - drawn` of the list. Collect these rows batch by batch, which gives stream
        # order.
        starts = np.cumsum(counts) - counts
        begin = self.rows_before(block.start, lo, hi)
        width = hi - lo
        n_rows = last - first
        batch = begin // width
        batches = np.arange(batch, -(-(begin + n_rows) // width))
        picks = (batches[:, None] + (starts - drawn)).reshape(-1)[begin - batch * width :][:n_rows]
        return self._drawn(block, first, strips, counts)[picks]

    def _drawn(self, block: Block, first: int, strips: Ints, counts: Ints) -> Ints:
        """Return a permutation [n] of rows, counted from `first`, that shuffles within each strip.

        Args:
            block: The block, whose key determines the permutation.
            first: First row of the block, in chunk order, to include.
            strips: Numbers of the strips.
            counts: Number of rows of each strip.
        """
        # Sort 64-bit keys that consist of the strip number (high bits), random bits, and the row
        # number (low bits). The low bits of the sorted keys are the permutation.
        index_bits = np.uint64(max(block.n_rows - 1, 1).bit_length())
        strip_bits = np.uint64(max(self.batch_rows - 1, 1).bit_length())
        low = (np.uint64(1) << index_bits) - np.uint64(1)
        numbers = np.random.PCG64((_ROWS, *block.key, self.seed)).advance(first)
        # Work in place: this code runs during the reads of the block, and should use little memory.
        keys: NDArray[np.uint64] = numbers.random_raw(int(counts.sum()))
        keys >>= strip_bits
        keys &= ~low
        keys |= np.arange(len(keys), dtype=np.uint64)
        keys |= np.repeat(strips.astype(np.uint64) << (np.uint64(64) - strip_bits), counts)
        keys.sort()
        keys &= low
        return keys.view(np.int64)


def _chunks(items: Ints, rows: Ints, chunk_rows: int) -> Ints:
    """Return item, chunk number and number of valid rows of all chunks of some items: [n, 3]."""
    counts = -(-rows // chunk_rows)
    item = np.repeat(items, counts)
    chunk = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    valid = np.minimum(np.repeat(rows, counts) - chunk * chunk_rows, chunk_rows)
    return np.stack([item, chunk, valid], axis=1)


def permutation(n: int, *key: int) -> Ints:
    """Return a permutation [n] that depends only on the key, in every version of NumPy.

    `Generator.permutation` may change between NumPy versions (NEP 19), so a resumed run could see
    different batches. The raw output of a bit generator never changes. The seed comes last in a
    key, because a large seed takes up several words.
    """
    # The index in the low bits makes all sort keys different. Every sorting algorithm then gives
    # the same order, so the fastest algorithm can be used.
    index_bits = np.uint64(max(n - 1, 0).bit_length())
    low = (np.uint64(1) << index_bits) - np.uint64(1)
    keys = np.random.PCG64(key).random_raw(n) & ~low | np.arange(n, dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)
