"""Read several stores as one stream in fixed proportions, with their rows interleaved evenly.

A table of `period` entries, repeated endlessly, states which store each row of the mixture comes
from. Store s has exactly `counts[s]` entries in the table, evenly spread. The proportions are
therefore exact over every period, and accurate to about one row at any point within a period. A
table lookup gives the number of rows of each store that precede a given row, so a seek is O(1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import IncompleteStoreError
from activation_store.reading.blocks import LoadedRows, ShuffledRows
from activation_store.reading.buffers import Allocate, Recycler, anonymous
from activation_store.reading.shuffle_order import Ints
from activation_store.reading.store import Store
from activation_store.reading.stream import StreamBatch, check_slice
from activation_store.storage.atomic_files import as_bytes
from foundation.errors import ConfigError

LONGEST_PERIOD = 1 << 16
"""Maximum number of entries in the table."""


class Shares:
    """Assignment of mixture rows to stores, which is a pure function of the weights.

    Args:
        weights: One number above 0 for each store. Only the ratios of the weights matter. Their
            decimal values are used exactly if the resulting period is at most `LONGEST_PERIOD`
            rows. Otherwise, the shares are rounded to multiples of 1 / `LONGEST_PERIOD`.

    Raises:
        ConfigError: If a weight is not a finite number above 0, or a share is too small.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError("weights", list(weights), "finite numbers above 0")
        self.counts = _counts([Fraction(str(weight)) for weight in weights])
        """Number of rows of each store in a period."""
        if min(self.counts) == 0:
            expected = f"shares of at least 1 in {LONGEST_PERIOD}"
            raise ConfigError("weights", list(weights), expected)
        self.period = sum(self.counts)
        # Place the k-th of a store's q rows at the fraction (k + 1/2) / q of the period.
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        self._table = owner[np.argsort(due, kind="stable")]
        ones = self._table[None, :] == np.arange(len(self.counts))[:, None]
        self._before = np.pad(np.cumsum(ones, axis=1), ((0, 0), (1, 0)))

    def rows_before(self, row: int) -> list[int]:
        """Return how many of the mixture's first `row` rows come from each store."""
        periods, rest = divmod(row, self.period)
        counts = zip(self.counts, self._before[:, rest].tolist(), strict=True)
        return [periods * count + before for count, before in counts]

    def sources(self, start: int, stop: int) -> Ints:
        """Return the store number of each of the rows [start, stop): [stop - start]."""
        return self._table[np.arange(start, stop) % self.period]


def _counts(weights: list[Fraction]) -> list[int]:
    """Return the number of rows of each store in a period."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    # The exact period is too long. Round the counts down, then give the remaining rows to the
    # stores with the largest remainders.
    counts = [int(share * LONGEST_PERIOD) for share in shares]
    rests = [share * LONGEST_PERIOD - count for share, count in zip(shares, counts, strict=True)]
    by_rest = sorted(range(len(shares)), key=lambda s: -rests[s])
    for s in by_rest[: LONGEST_PERIOD - sum(counts)]:
        counts[s] += 1
    return counts


class MixtureStream:
    """Endless stream of batches with rows of several stores.

    Batch i is a pure function of (stores, weights, seed, i). The rows of each store appear in its
    own shuffled order, each row once per epoch of its store. Replicas take disjoint slices of every
    batch. Unlike the readers of a `ShuffledStream`, replicas read whole blocks, because the rows
    that a slice takes from a store vary from batch to batch.

    Args:
        stores: Finalised stores in which `arrays` have the same widths and data types.
        weights: Shares of the stores; see `Shares`.
        arrays: Hookpoints and sidecars to read.
        seed: Seed of the row order, not negative. The seed of store s is derived from this seed and
            from s.
        batch_rows: Number of rows in a global batch.
        window_items: Number of items of a store that are shuffled together.
        buffer_rows: Number of rows of a store that are permuted together. Up to two such blocks per
            store are in memory.
        rows: The slice [lo, hi) of each global batch that this replica gets; None means all rows.
        prefetch: Read the next blocks in threads while the current blocks are in use.
        allocate: Allocator of the memory for blocks and batches.

    Raises:
        ConfigError: If an argument is invalid, or the stores differ in an array.
        IncompleteStoreError: If a store is not finalised.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        weights: Sequence[float],
        arrays: Sequence[str],
        *,
        seed: int,
        batch_rows: int,
        window_items: int,
        buffer_rows: int,
        rows: tuple[int, int] | None = None,
        prefetch: bool = True,
        allocate: Allocate = anonymous,
    ) -> None:
        check_mixture(stores, weights, arrays)
        self.lo, self.hi = check_slice(batch_rows, rows)
        self.shares = Shares(weights)
        self._parts = [
            ShuffledRows(
                store,
                arrays,
                seed=(seed << 16) + number,
                window_items=window_items,
                buffer_rows=buffer_rows,
                prefetch=prefetch,
                allocate=allocate,
            )
            for number, store in enumerate(stores)
        ]
        self.batch_rows = batch_rows
        self.position = 0
        """Number of the batch that `next` returns."""
        self._recycler = Recycler(allocate)

    @property
    def wait_s(self) -> float:
        """Total seconds that `next` spent waiting for data."""
        return sum(part.wait_s for part in self._parts)

    def seek(self, i: int) -> None:
        """Continue with batch `i`."""
        if i < 0:
            raise ConfigError("position", i, "at least 0")
        if i != self.position:
            self._reset()
        self.position = i

    def sources(self, i: int) -> Ints:
        """Return the store number of each row in this replica's slice of batch `i`: [hi - lo]."""
        start = i * self.batch_rows
        return self.shares.sources(start + self.lo, start + self.hi)

    def next(self) -> StreamBatch:
        """Return the batch at `position` and advance.

        The `epoch` of the batch is the epoch of the first store.

        Raises:
            DeletedDataError: If rows of a store were deleted.
            MissingDataError: If a shard file is missing; the message names the file.
            DamagedDataError: If a chunk fails its checksum; the message names the file and chunk.
        """
        first = self.position * self.batch_rows
        starts = self.shares.rows_before(first + self.lo)
        stops = self.shares.rows_before(first + self.hi)
        try:
            gathered = [
                part.join(_load_rows_forever(part, start, stop)) if start < stop else None
                for part, start, stop in zip(self._parts, starts, stops, strict=True)
            ]
        except BaseException:
            self._reset()
            raise
        # Each place in the batch takes the next row of its store. Thus a stable sort by store gives
        # the place in the batch of each gathered row.
        places = np.argsort(self.sources(self.position), kind="stable")
        names = self._parts[0].arrays
        given = [arrays for arrays in gathered if arrays is not None]
        arrays = {name: self._merge([part[name] for part in given], places) for name in names}
        self.position += 1
        return StreamBatch(arrays, first + self.lo, starts[0] // self._parts[0].store.n_tokens)

    def close(self) -> None:
        """Stop the reading threads."""
        for part in self._parts:
            part.close()

    def _reset(self) -> None:
        for part in self._parts:
            part.reset()

    def _merge(self, parts: list[NDArray[Any]], places: Ints) -> NDArray[Any]:
        """Concatenate the rows of `parts`, and put the k-th row at `places[k]` of the result."""
        out = self._recycler.empty((len(places), *parts[0].shape[1:]), parts[0].dtype)
        target = as_bytes(out).reshape(len(places), -1)
        start = 0
        for part in parts:
            stop = start + len(part)
            target[places[start:stop]] = as_bytes(part).reshape(len(part), -1)
            start = stop
        return out


def check_mixture(stores: Sequence[Store], weights: Sequence[float], arrays: Sequence[str]) -> None:
    """Check that the stores can be read as one `MixtureStream`.

    Raises:
        ConfigError: If an argument is invalid, or the stores differ in an array.
        IncompleteStoreError: If a store is not finalised.
    """
    if not stores or len(stores) != len(weights):
        raise ConfigError(
            "weights",
            list(weights),
            f"at least one store, and one weight for each of the {len(stores)} stores",
        )
    Shares(weights)
    for store in stores:
        _check_compatible(stores[0], store, arrays)


def _load_rows_forever(part: ShuffledRows, start: int, stop: int) -> list[LoadedRows]:
    """Load rows [start, stop) of the endless stream over all epochs of a store."""
    loaded: list[LoadedRows] = []
    n_tokens = part.store.n_tokens
    while start < stop:
        epoch, row = divmod(start, n_tokens)
        count = min(stop - start, n_tokens - row)
        loaded += part.parts(epoch, row, row + count)
        start += count
    return loaded


def _check_compatible(first: Store, store: Store, arrays: Sequence[str]) -> None:
    """Check that `store` is finalised and has the same arrays as `first`."""
    if not store.finalised:
        raise IncompleteStoreError(
            f"{store.path} is not finalised: a mixture needs finalised stores; finish its harvest "
            "first"
        )
    if not store.n_tokens:
        raise ConfigError("stores", str(store.path), "a store with at least one row")
    for name in arrays:
        if name not in store.header.columns:
            expected = f"an array of {store.path}: {list(store.header.columns)}"
            raise ConfigError("arrays", name, expected)
        one, other = first.header.columns[name], store.header.columns[name]
        if one != other:
            raise ConfigError(
                f"{store.path}: {name}",
                other,
                f"the same dtype and width as in {first.path}: {one}",
            )
