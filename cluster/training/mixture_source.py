"""Activation source that mixes batches from several finished stores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from activation_store import MixtureStream, Store
from activation_store.reading.buffers import anonymous
from cluster.training.device_gather import pinned, to_torch
from cluster.training.shared_reads import SharedReads
from cluster.training.stream_identity import equal_batches, order_name, store_digest
from sae_core.training.source import Batch


class MixtureSource:
    """One data replica's batches of one array of several stores; an `ActivationSource`.

    Rows are gathered and decoded on the host. `next` and `sample` are collective over the ranks
    that share the replica's rows.

    Args:
        stores: finished stores; `array` has the same width and dtype in all of them.
        weights: each store's share of every batch; see `MixtureStream`.
        array: name of the array to train on.
        seed: seed of the row order; the same on all ranks.
        batch_tokens: rows of the global batch.
        replica: index of this data replica.
        n_replicas: replicas that share a global batch; divides `batch_tokens`.
        window_items: work items of a store that are shuffled together.
        buffer_tokens: rows permuted together in memory, divided among the stores.
        device: device on which batches are returned; None: the CPU.
        share: shared reads of this replica's ranks, each of which gathers a part of the rows.
        order_seed: seed of the row order instead of `seed`; it becomes part of the identity.
    """

    waits = 0
    """Constant, because finished stores are never waited for; see `StoreSource.waits`."""

    def __init__(
        self,
        stores: Sequence[Store],
        weights: Sequence[float],
        array: str,
        seed: int,
        batch_tokens: int,
        replica: int,
        n_replicas: int,
        window_items: int,
        buffer_tokens: int,
        device: torch.device | None = None,
        share: SharedReads | None = None,
        order_seed: int | None = None,
    ) -> None:
        self.d_in = self.d_out = stores[0].arrays[array]
        seed, order_of = order_name(seed, order_seed, window_items, buffer_tokens)
        self._stores = list(stores)
        self._weights = list(weights)
        self._array = array
        self._share = share or SharedReads()
        self._device = device or torch.device("cpu")
        self._batch_tokens = batch_tokens
        self._n_rows = batch_tokens // n_replicas
        self._first = replica * self._n_rows
        self._order: dict[str, Any] = {
            "seed": seed,
            "window_items": window_items,
            "buffer_rows": max(1, buffer_tokens // len(stores)),
            "allocate": pinned if self._device.type == "cuda" else anonymous,
        }
        self._stream = self._open(batch_tokens, self._first, self._first + self._n_rows)
        parts = [
            f"{store_digest(store)} {store.n_tokens} {n}"
            for store, n in zip(stores, self._stream.shares.counts, strict=True)
        ]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        self.identity = f"{array}-{digest}-{order_of}"

    @property
    def position(self) -> int:
        """Index of the next batch."""
        return self._stream.position

    def seek(self, position: int) -> None:
        """Make batch `position` the next one."""
        self._stream.seek(position)

    def next(self) -> Batch:
        """Return this replica's rows of the next batch, [batch_tokens / n_replicas, d_in]."""
        first_row = self.position * self._batch_tokens + self._first
        return Batch(self._read(self._stream, self._n_rows), None, first_row)

    def sample(self, n: int) -> torch.Tensor:
        """Return the first `n` rows of the order, [n, d_in], the same on all ranks.

        If the stores hold fewer rows, all of them are returned. The sample is read in equal
        batches, so it may lack the few rows that do not divide evenly among them.
        """
        n_batches, size = equal_batches(min(n, sum(store.n_tokens for store in self._stores)))
        stream = self._open(size, 0, size)
        try:
            return torch.cat([self._read(stream, size) for _ in range(n_batches)])
        finally:
            stream.close()

    def close(self) -> None:
        """Stop the background readers."""
        self._stream.close()

    def _open(self, batch_rows: int, lo: int, hi: int) -> MixtureStream:
        rows = self._share.part(lo, hi)
        return MixtureStream(
            self._stores,
            self._weights,
            [self._array],
            batch_rows=batch_rows,
            rows=rows,
            **self._order,
        )

    def _read(self, stream: MixtureStream, n_rows: int) -> torch.Tensor:
        """Return all of the replica's rows of the next batch, [n_rows, d_in] on the device."""
        batch = self._share.read(stream.next)
        return self._share.gather(to_torch(batch.arrays[self._array]).to(self._device), n_rows)
