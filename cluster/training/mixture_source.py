"""Activation source that mixes batches from several finished stores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from activation_store import MixtureStream, Store
from activation_store.reading.buffers import Allocate, anonymous
from cluster.training.batch_order import BatchOrder, equal_batches, store_digest
from cluster.training.device_gather import to_torch
from cluster.training.shared_reads import SharedReads
from cluster.training.spread_sample import has_random_order, read_spread
from sae_core.training.pinned_memory import pinned_on
from sae_core.training.source import Batch


class MixtureSource:
    """An `ActivationSource` of one data replica's batches, from one array in several stores.

    Rows are gathered and decoded on the host. `next` and `sample` are collective over the ranks
    that share the replica's rows.

    Args:
        stores: Finished stores. `array` has the same width and dtype in all of them.
        weights: Each store's share of every batch; see `MixtureStream`.
        array: Name of the array to train on.
        order: Which rows of the mixture a batch holds.
        device: Device that batches are copied to. For a GPU, batches are read into page-locked
            memory, from which it can copy asynchronously.
        shared_reads: Shared reads of this replica's ranks, each of which gathers a part of the
            rows. If None, this rank reads all rows.
    """

    waits = 0
    """Constant, because a finished store never makes the trainer wait; see `StoreSource.waits`."""

    def __init__(
        self,
        stores: Sequence[Store],
        weights: Sequence[float],
        array: str,
        order: BatchOrder,
        device: torch.device | None = None,
        shared_reads: SharedReads | None = None,
    ) -> None:
        self.d_in = self.d_out = stores[0].arrays[array]
        self._stores = list(stores)
        self._weights = list(weights)
        self._array = array
        self._order = order
        self._shared_reads = shared_reads or SharedReads()
        allocate: Allocate = anonymous
        if device is not None and device.type == "cuda":
            allocate = pinned_on(device)
        self._stream = self._open(order.batch_tokens, *order.rows, allocate)
        parts = [
            f"{store_digest(store)} {store.n_tokens} {n}"
            for store, n in zip(stores, self._stream.shares.counts, strict=True)
        ]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        self.identity = f"{array}-{digest}-{order.name}"

    @property
    def position(self) -> int:
        """Index of the next batch."""
        return self._stream.position

    def seek(self, position: int) -> None:
        """Make batch `position` the next one."""
        self._stream.seek(position)

    def next(self) -> Batch:
        """Return this replica's rows of the next batch, [batch_tokens / n_replicas, d_in]."""
        first_row = self._order.first_row(self.position)
        return Batch(self._read(self._stream, self._order.n_rows), None, first_row)

    def sample(self, n: int) -> torch.Tensor:
        """Return `n` rows from all parts of all stores, [n, d_in], the same on all ranks.

        Harvested stores are in a random order, so their sample is the first `n` rows of the order
        of batches. If the stores hold fewer rows, all are returned. The sample is read in equal
        batches, so it may lack the few rows that do not divide evenly among the batches.
        """
        if not all(map(has_random_order, self._stores)):
            return self._spread_sample(n)
        n_batches, size = equal_batches(min(n, sum(store.n_tokens for store in self._stores)))
        # Do not use page-locked memory, because all batches of the sample are in memory at once.
        stream = self._open(size, 0, size, anonymous)
        try:
            return torch.cat([self._read(stream, size) for _ in range(n_batches)])
        finally:
            stream.close()

    def _spread_sample(self, n: int) -> torch.Tensor:
        n = min(n, sum(store.n_tokens for store in self._stores))
        seed, total = self._order.row_seed, sum(self._weights)
        parts = [
            read_spread(
                store, self._array, max(1, round(n * weight / total)), seed, self._shared_reads
            )
            for store, weight in zip(self._stores, self._weights, strict=True)
        ]
        sample = torch.cat(parts)
        generator = torch.Generator().manual_seed(seed)
        return sample[torch.randperm(len(sample), generator=generator).to(sample.device)]

    def close(self) -> None:
        """Stop the background readers."""
        self._stream.close()

    def _open(self, batch_rows: int, lo: int, hi: int, allocate: Allocate) -> MixtureStream:
        """Open a stream of this rank's part of rows [lo, hi) of each batch."""
        return MixtureStream(
            self._stores,
            self._weights,
            [self._array],
            seed=self._order.row_seed,
            batch_rows=batch_rows,
            window_items=self._order.window_items,
            buffer_rows=max(1, self._order.buffer_tokens // len(self._stores)),
            rows=self._shared_reads.part(lo, hi),
            allocate=allocate,
        )

    def _read(self, stream: MixtureStream, n_rows: int) -> torch.Tensor:
        """Return all of the replica's rows of the next batch, [n_rows, d_in]."""
        batch = self._shared_reads.read(stream.next)
        return self._shared_reads.gather(to_torch(batch.arrays[self._array]), n_rows)
