"""The order in which rows are read: a pure function of (valid rows, seed, epoch), no I/O.

An epoch visits all items, in their own order in epoch 0 (so that it can follow a store which is
still being written) and in a permuted one after. `window_items` items in a row are a window. All
inner chunks of a window are permuted and packed into blocks of at least `buffer_rows` rows, the
last one takes what is left. The stream of the epoch is its blocks one after the other; batch i is
rows [i * B, (i + 1) * B) of it.

The rows of a block, in the order of its chunks, are cut into B strips of equal length, to within a
row: row j of every batch is drawn from strip j, in random order. So each batch is spread evenly
over the block, and whoever wants a slice [lo, hi) of every batch reads only the chunks under its
strips: readers of other slices share no chunk with it but one where two strips meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ORDER = 2
"""Rises whenever the same store and settings give another order."""
_ITEMS, _CHUNKS, _ROWS = 1, 2, 3  # what a permutation is of: keeps their random streams apart


@dataclass(frozen=True)
class Block:
    """Chunks that are in memory, and permuted, together."""

    epoch: int
    start: int
    """Row of the epoch's stream with which the block begins."""
    chunks: Ints
    """[n, 3]: item, chunk, valid rows; in the order in which they lie in memory."""
    key: tuple[int, int, int]
    """Epoch, window, number in the window."""

    @property
    def n_rows(self) -> int:
        """Valid rows."""
        return int(self.chunks[:, 2].sum())

    @property
    def stop(self) -> int:
        """Row of the epoch's stream after the last one."""
        return self.start + self.n_rows


@dataclass(frozen=True)
class Shuffle:
    """All that the order depends on besides the store's rows."""

    seed: int
    chunk_rows: int
    window_items: int
    buffer_rows: int
    batch_rows: int
    """1 makes one strip of every block: then all its rows are permuted together."""

    def item_order(self, epoch: int, n_items: int) -> Ints:
        """[n_items]: the items in the order in which an epoch visits them."""
        if epoch == 0:
            return np.arange(n_items)
        return permutation(n_items, _ITEMS, epoch, 0, 0, self.seed)

    def window_starts(self, rows: Ints) -> Ints:
        """The first stream row of every window, and the end: [n_windows + 1].

        Args:
            rows: [n_items]: valid rows in the epoch's order of items.
        """
        if not len(rows):
            return np.zeros(1, np.int64)
        sums = np.add.reduceat(rows, np.arange(0, len(rows), self.window_items))
        return np.concatenate([[0], np.cumsum(sums)])

    def blocks(
        self, epoch: int, window: int, start: int, items: Ints, rows: Ints
    ) -> Iterator[Block]:
        """The blocks of a window whose first stream row is `start`.

        Args:
            epoch: Number of the pass.
            window: Number of the window in the pass.
            start: Row of the epoch's stream.
            items: [n] of the window.
            rows: [n] valid rows of them.
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
        """How many of the first `row` rows of an epoch's stream are of strips [lo, hi)."""
        batches, rest = divmod(row, self.batch_rows)
        return batches * (hi - lo) + min(max(rest - lo, 0), hi - lo)

    def memory(self, block: Block, lo: int, hi: int) -> tuple[int, int]:
        """[first, last) of the block's rows, in the order of its chunks, under strips [lo, hi)."""
        return (
            self.rows_before(block.stop, 0, lo) - self.rows_before(block.start, 0, lo),
            self.rows_before(block.stop, 0, hi) - self.rows_before(block.start, 0, hi),
        )

    def row_order(self, block: Block, lo: int, hi: int) -> Ints:
        """[n]: where each row of strips [lo, hi) lies, in the order of the stream.

        Counted from the first of `memory`.
        """
        first, last = self.memory(block, lo, hi)
        strips = np.arange(lo, hi)
        # Of a strip: how many batches have drawn from it before the block, and before its end.
        drawn = -((strips - block.start) // self.batch_rows)
        counts = -((strips - block.stop) // self.batch_rows) - drawn
        # Of the rows that all strips give here, one strip after the other: the one that a batch
        # draws from a strip. Taken in the order of the stream, which is batch by batch.
        starts = np.cumsum(counts) - counts
        begin, width = self.rows_before(block.start, lo, hi), hi - lo
        n_rows, batch = last - first, begin // width
        batches = np.arange(batch, -(-(begin + n_rows) // width))
        picks = (batches[:, None] + (starts - drawn)).reshape(-1)[begin - batch * width :][:n_rows]
        return self._drawn(block, first, strips, counts)[picks]

    def _drawn(self, block: Block, first: int, strips: Ints, counts: Ints) -> Ints:
        """[n]: rows `first` on, counted from it: `counts` of each of `strips`, permuted in each."""
        index_bits = np.uint64(max(block.n_rows - 1, 1).bit_length())
        strip_bits = np.uint64(max(self.batch_rows - 1, 1).bit_length())
        low = (np.uint64(1) << index_bits) - np.uint64(1)
        numbers = np.random.PCG64((_ROWS, *block.key, self.seed)).advance(first)
        # In place where it can be: a block's order is made while its rows are read.
        keys: NDArray[np.uint64] = numbers.random_raw(int(counts.sum()))
        keys >>= strip_bits
        keys &= ~low
        keys |= np.arange(len(keys), dtype=np.uint64)
        keys |= np.repeat(strips.astype(np.uint64) << (np.uint64(64) - strip_bits), counts)
        keys.sort()
        keys &= low
        return keys.view(np.int64)


def _chunks(items: Ints, rows: Ints, chunk_rows: int) -> Ints:
    counts = -(-rows // chunk_rows)
    item = np.repeat(items, counts)
    chunk = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    valid = np.minimum(np.repeat(rows, counts) - chunk * chunk_rows, chunk_rows)
    return np.stack([item, chunk, valid], axis=1)


def permutation(n: int, *key: int) -> Ints:
    """A permutation [n] that is the same for the same key, in every version of NumPy.

    `Generator.permutation` may change between versions (NEP 19), and a resumed run would then see
    other batches; the raw numbers of a bit generator may not. The seed goes last in a key, for a
    large one takes several words.
    """
    # The low bits make room for the index: whole numbers that all differ sort the same by any
    # method, so by the fastest.
    index_bits = np.uint64(max(n - 1, 0).bit_length())
    low = (np.uint64(1) << index_bits) - np.uint64(1)
    keys = np.random.PCG64(key).random_raw(n) & ~low | np.arange(n, dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)
