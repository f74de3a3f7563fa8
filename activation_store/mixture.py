"""Several stores read as one stream, in fixed shares: rows of each batch interleaved evenly.

Which store row r of the mixture comes from is written in a table of `period` entries that repeats.
In it, store s has exactly `counts[s]` entries, spread evenly: so the shares hold exactly over every
period and to within a row or so in between, and how many rows of each store come before any row
is a look-up, not a loop: seek is O(1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import IncompleteStoreError, StoreConfigError
from activation_store.files import as_bytes
from activation_store.memory import Allocate, Recycler, anonymous
from activation_store.rows import LoadedRows, ShuffledRows
from activation_store.shuffle import Ints
from activation_store.store import Store
from activation_store.stream import StreamBatch, check_slice

LONGEST_PERIOD = 1 << 16


class Shares:
    """Which store each row of a mixture comes from: a pure function of the weights.

    Args:
        weights: One above 0 for each store; only their ratios matter. Taken as the decimal numbers
            that they are written as, exactly, unless that needs a period above `LONGEST_PERIOD`
            rows: then to within a row in as many.

    Raises:
        StoreConfigError: A weight that is not a finite number above 0, or too small a share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise StoreConfigError("weights", list(weights), "finite numbers above 0")
        self.counts = _counts([Fraction(str(weight)) for weight in weights])
        """Rows of each store in a period."""
        if min(self.counts) == 0:
            expected = f"shares of at least 1 in {LONGEST_PERIOD}"
            raise StoreConfigError("weights", list(weights), expected)
        self.period = sum(self.counts)
        # The k-th of q rows is due at (k + 1/2) / q of the period.
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        self._table = owner[np.argsort(due, kind="stable")]
        ones = self._table[None, :] == np.arange(len(self.counts))[:, None]
        self._before = np.pad(np.cumsum(ones, axis=1), ((0, 0), (1, 0)))

    def rows_before(self, row: int) -> list[int]:
        """How many of the mixture's first `row` rows come from each store."""
        periods, rest = divmod(row, self.period)
        counts = zip(self.counts, self._before[:, rest].tolist(), strict=True)
        return [periods * count + before for count, before in counts]

    def sources(self, start: int, stop: int) -> Ints:
        """[stop - start]: the store of each of the rows [start, stop)."""
        return self._table[np.arange(start, stop) % self.period]


def _counts(weights: list[Fraction]) -> list[int]:
    total = sum(weights)
    shares = [weight / total for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    counts = [int(share * LONGEST_PERIOD) for share in shares]
    rests = [share * LONGEST_PERIOD - count for share, count in zip(shares, counts, strict=True)]
    by_rest = sorted(range(len(shares)), key=lambda s: -rests[s])
    for s in by_rest[: LONGEST_PERIOD - sum(counts)]:
        counts[s] += 1
    return counts


class MixtureStream:
    """Batches of several stores' rows; batch i is a pure function of (stores, weights, seed, i).

    Each store gives its rows in its own shuffled order, each once in an epoch of its own, without
    end. Replicas take disjoint slices of every batch; unlike those of a `ShuffledStream` they read
    whole blocks, for the rows of a store that a slice holds move from batch to batch.

    Args:
        stores: Finalised; `arrays` must have the same width and type in all of them.
        weights: The stores' shares of the rows; see `Shares`.
        arrays: Hookpoints and sidecars to read.
        seed: Not negative; store s is read with a seed made of it and s.
        batch_rows: Rows of the global batch.
        window_items: Items of a store shuffled together.
        buffer_rows: Rows of a store permuted in memory together; two such blocks of each are held.
        rows: The slice [lo, hi) of each global batch that this replica gets; None is all.
        prefetch: Read the next blocks in threads while these are consumed.
        allocate: Where blocks and batches lie.

    Raises:
        StoreConfigError: A value that cannot be, or stores that differ in an array.
        IncompleteStoreError: A store is not finalised.
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
        """The batch that `next` gives."""
        self._recycler = Recycler(allocate)

    @property
    def wait_s(self) -> float:
        """Seconds spent in `next` waiting for data, in all."""
        return sum(part.wait_s for part in self._parts)

    def seek(self, i: int) -> None:
        """Makes batch `i` the next one."""
        if i < 0:
            raise StoreConfigError("position", i, "not negative")
        if i != self.position:
            self._reset()
        self.position = i

    def sources(self, i: int) -> Ints:
        """[hi - lo]: the number of the store that each row of this replica's batch `i` is of."""
        start = i * self.batch_rows
        return self.shares.sources(start + self.lo, start + self.hi)

    def next(self) -> StreamBatch:
        """The batch at `position`, which moves on; its `epoch` is that of the first store.

        Raises:
            MissingDataError, DamagedDataError: naming the file and the chunk.
        """
        first = self.position * self.batch_rows
        starts = self.shares.rows_before(first + self.lo)
        stops = self.shares.rows_before(first + self.hi)
        try:
            gathered = [
                part.join(_endless(part, start, stop)) if start < stop else None
                for part, start, stop in zip(self._parts, starts, stops, strict=True)
            ]
        except BaseException:
            self._reset()
            raise
        # Row j of the batch is the next one of its store.
        places = np.argsort(self.sources(self.position), kind="stable")
        names = self._parts[0].arrays
        given = [arrays for arrays in gathered if arrays is not None]
        arrays = {name: self._merge([part[name] for part in given], places) for name in names}
        self.position += 1
        return StreamBatch(arrays, first + self.lo, starts[0] // self._parts[0].store.n_tokens)

    def close(self) -> None:
        """Ends the reading threads."""
        for part in self._parts:
            part.close()

    def _reset(self) -> None:
        for part in self._parts:
            part.reset()

    def _merge(self, parts: list[NDArray[Any]], places: Ints) -> NDArray[Any]:
        """The rows of all `parts`, one after the other, each put in its place."""
        out = self._recycler.empty((len(places), *parts[0].shape[1:]), parts[0].dtype)
        target, start = as_bytes(out).reshape(len(places), -1), 0
        for part in parts:
            stop = start + len(part)
            target[places[start:stop]] = as_bytes(part).reshape(len(part), -1)
            start = stop
        return out


def check_mixture(stores: Sequence[Store], weights: Sequence[float], arrays: Sequence[str]) -> None:
    """That a `MixtureStream` can be made of them.

    Raises:
        StoreConfigError: A value that cannot be, or stores that differ in an array.
        IncompleteStoreError: A store is not finalised.
    """
    if not stores or len(stores) != len(weights):
        raise StoreConfigError("weights", list(weights), f"one for each of {len(stores)}")
    Shares(weights)
    for store in stores:
        _check_alike(stores[0], store, arrays)


def _endless(part: ShuffledRows, start: int, stop: int) -> list[LoadedRows]:
    """Rows [start, stop) over all epochs of a store."""
    staged: list[LoadedRows] = []
    n_tokens = part.store.n_tokens
    while start < stop:
        epoch, row = divmod(start, n_tokens)
        count = min(stop - start, n_tokens - row)
        staged += part.parts(epoch, row, row + count)
        start += count
    return staged


def _check_alike(first: Store, store: Store, arrays: Sequence[str]) -> None:
    if not store.finalised:
        raise IncompleteStoreError(
            f"{store.path} is not finalised: a mixture needs stores that no longer grow"
        )
    if not store.n_tokens:
        raise StoreConfigError("stores", str(store.path), "a store with rows")
    for name in arrays:
        if name not in store.header.columns:
            expected = f"an array of {store.path}: {list(store.header.columns)}"
            raise StoreConfigError("arrays", name, expected)
        one, other = first.header.columns[name], store.header.columns[name]
        if one != other:
            raise StoreConfigError(
                f"{store.path}: {name}", other, f"{one} as in {first.path}: rows of one width, type"
            )
