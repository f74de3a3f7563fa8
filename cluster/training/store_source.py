"""Activation source that reads batches from one store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from activation_store import ShuffledStream, StagedBatch, StagedStream, Store
from activation_store.errors import IncompleteStoreError
from activation_store.reading.buffers import anonymous
from cluster.training.batch_order import BatchOrder, equal_batches, store_digest
from cluster.training.device_gather import DeviceRows, decodes_on_device, to_torch
from cluster.training.shared_reads import SharedReads
from cluster.training.spread_sample import has_random_order, read_spread
from sae_core.training.pinned_memory import pinned_on
from sae_core.training.source import Batch

T = TypeVar("T")

WAIT_TIMEOUT_S = 600.0
"""Default time limit for a growing store to get the rows that were requested."""
_POLL_S = 0.2
"""Seconds between two checks of a growing store."""


class StoreSource:
    """An `ActivationSource` of one data replica's batches, from one array of a store.

    If the store is still growing, batches and samples wait for their rows. `next` and `sample` are
    collective over the ranks that share the replica's rows.

    Args:
        store: An open store with at least one committed item.
        array: Name of the array to train on.
        order: Which rows a batch holds.
        device: CUDA device on which batches are gathered and returned. For any other device, or if
            the store's codec can be decoded only on the host, they are gathered on the host.
        wait_timeout_s: Time limit for a growing store to get the rows that were requested.
        shared_reads: Shared reads of this replica's ranks, each of which reads a part of the rows.
            If None, this rank reads all rows.
    """

    def __init__(
        self,
        store: Store,
        array: str,
        order: BatchOrder,
        device: torch.device | None = None,
        wait_timeout_s: float = WAIT_TIMEOUT_S,
        shared_reads: SharedReads | None = None,
    ) -> None:
        self.d_in = self.d_out = store.arrays[array]
        self.identity = f"{array}-{store_digest(store)}-{order.name}"
        self.before_next: Callable[[], None] = lambda: None
        """Called on this rank before it waits for a batch. If it raises, all ranks raise."""
        self._store = store
        self._array = array
        self._order = order
        self._wait_timeout_s = wait_timeout_s
        self._shared_reads = shared_reads or SharedReads()
        self._waiting = False
        self._device_rows: DeviceRows | None = None
        self._stream: ShuffledStream | StagedStream
        settings = self._stream_settings(order.batch_tokens, *order.rows)
        on_cuda = device is not None and device.type == "cuda"
        # Batches that are gathered on the host are uploaded, too.
        allocate = pinned_on(device) if on_cuda and device is not None else anonymous
        if on_cuda and decodes_on_device(store, array):
            assert device is not None
            self._device_rows = DeviceRows(store, array, device)
            self._stream = StagedStream(store, [array], allocate=allocate, **settings)
        else:
            self._stream = ShuffledStream(store, [array], allocate=allocate, **settings)

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
        if self._device_rows is None:
            x = self._gather(self._read_shared(self._read))
        else:
            staged = self._device_rows.pick(self._read_shared(self._read_staged))
            shared = {name: self._gather(rows) for name, rows in staged.items()}
            x = self._device_rows.decode(shared)
        return Batch(x, None, first_row)

    def sample(self, n: int) -> torch.Tensor:
        """Return `n` rows from all parts of the store, [n, d_in], the same on all ranks.

        A harvested store is in a random order, so its sample is the first `n` rows of the order of
        batches. If the store holds fewer rows, all rows are returned. The sample is read in equal
        batches, so it may lack the few rows that do not divide evenly among the batches.
        """
        if self._store.finalised and not has_random_order(self._store):
            seed = self._order.row_seed
            return read_spread(self._store, self._array, n, seed, self._shared_reads)
        with self._counted_as_waiting():
            return self._sample(n)

    def first_item_needed(self, position: int) -> int:
        """Return the first item of the store that batch `position` or any later batch may need."""
        return self._stream.first_item_needed(position)

    @property
    def waits(self) -> int:
        """A number that changes while the trainer waits for rows of a growing store.

        It is 0 while only the background reader waits, so that a hang of the trainer itself is
        still detected.
        """
        return self._store.refreshes if self._waiting else 0

    def close(self) -> None:
        """Stop the background reader."""
        self._stream.close()

    def _stream_settings(self, batch_rows: int, lo: int, hi: int) -> dict[str, Any]:
        """Return the settings of a stream of this rank's part of rows [lo, hi) of each batch."""
        return {
            "seed": self._order.row_seed,
            "batch_rows": batch_rows,
            "window_items": self._order.window_items,
            "buffer_rows": self._order.buffer_tokens,
            "rows": self._shared_reads.part(lo, hi),
            "wait_timeout_s": self._wait_timeout_s,
        }

    def _read(self) -> torch.Tensor:
        self.before_next()
        assert isinstance(self._stream, ShuffledStream)
        return to_torch(self._stream.next().arrays[self._array])

    def _read_staged(self) -> StagedBatch:
        self.before_next()
        assert isinstance(self._stream, StagedStream)
        return self._stream.next()

    def _read_shared(self, read: Callable[[], T]) -> T:
        with self._counted_as_waiting():
            return self._shared_reads.read(read)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        return self._shared_reads.gather(rows, self._order.n_rows)

    @contextmanager
    def _counted_as_waiting(self) -> Iterator[None]:
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _sample(self, n: int) -> torch.Tensor:
        self._shared_reads.read(lambda: self._wait_for_rows(n))
        n_batches, size = equal_batches(min(n, self._store.n_tokens))
        settings = self._stream_settings(size, 0, size)
        stream = ShuffledStream(self._store, [self._array], **settings)
        try:
            batches = [self._shared_reads.read(stream.next) for _ in range(n_batches)]
        finally:
            stream.close()
        parts = [to_torch(batch.arrays[self._array]) for batch in batches]
        return torch.cat([self._shared_reads.gather(part, size) for part in parts])

    def _wait_for_rows(self, n: int) -> None:
        deadline = time.monotonic() + self._wait_timeout_s
        while not self._store.finalised and self._store.n_tokens < n:
            if time.monotonic() > deadline:
                raise IncompleteStoreError(
                    f"{self._store.path} has {self._store.n_tokens} rows after waiting "
                    f"{self._wait_timeout_s:.0f} s, but a sample needs {n}; check that the harvest "
                    "writing the store is still running"
                )
            time.sleep(_POLL_S)
            self._store.refresh()
