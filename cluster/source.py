"""The store as the trainer's source."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from activation_store import ShuffledStream, StagedStream, Store
from activation_store.errors import IncompleteStoreError
from cluster.device_rows import DeviceRows, pinned
from cluster.tensors import to_torch
from sae_core.source import Batch

SAMPLE_BATCH = 4096
WAIT_TIMEOUT_S = 600.0
"""How long a growing store may not have the rows that are asked for."""
_POLL_S = 0.2


class StoreSource:
    """One data replica's batches of one array of a store; an `ActivationSource`.

    The store may still be growing: then batches and samples wait for their rows.

    Args:
        store: open, with at least one committed item.
        array: whose rows to train on.
        seed: fixes the order, the same on all ranks.
        batch_tokens: rows of the global batch.
        replica: index of this data replica.
        n_replicas: replicas that share a global batch; divides `batch_tokens`.
        window_items: work items shuffled together.
        buffer_tokens: rows permuted together in memory.
        device: where batches are to be; on cuda they are gathered there.
        wait_timeout_s: how long a growing store may lack the rows that are asked for.
    """

    def __init__(
        self,
        store: Store,
        array: str,
        seed: int,
        batch_tokens: int,
        replica: int,
        n_replicas: int,
        window_items: int,
        buffer_tokens: int,
        device: torch.device | None = None,
        wait_timeout_s: float = WAIT_TIMEOUT_S,
    ) -> None:
        self.d_in = self.d_out = store.arrays[array]
        self.identity = f"{array}-{store_digest(store)}"
        self._store, self._array, self._seed = store, array, seed
        self._wait_timeout_s = wait_timeout_s
        self._window_items, self._buffer_tokens = window_items, buffer_tokens
        share = batch_tokens // n_replicas
        order: dict[str, Any] = {
            "seed": seed,
            "batch_rows": batch_tokens,
            "window_items": window_items,
            "buffer_rows": buffer_tokens,
            "rows": (replica * share, (replica + 1) * share),
            "wait_timeout_s": wait_timeout_s,
        }
        self.before_next: Callable[[], None] = lambda: None
        """Called before every batch is waited for."""
        self._waiting = False
        self._device_rows: DeviceRows | None = None
        self._stream: ShuffledStream | StagedStream
        if device is not None and device.type == "cuda":
            self._device_rows = DeviceRows(store, array, device)
            self._stream = StagedStream(store, [array], allocate=pinned, **order)
        else:
            self._stream = ShuffledStream(store, [array], **order)

    @property
    def position(self) -> int:
        """Index of the next batch."""
        return self._stream.position

    def seek(self, position: int) -> None:
        """Makes batch `position` the next one."""
        self._stream.seek(position)

    def next(self) -> Batch:
        """This replica's rows of the batch at `position`, [batch_tokens / n_replicas, d_in]."""
        self.before_next()
        with self._wait():
            return self._next()

    @property
    def waits(self) -> int:
        """A number that moves on while the trainer waits for rows of a growing store.

        Not while only the background reader waits: the trainer may hang meanwhile.
        """
        return self._store.refreshes if self._waiting else 0

    @contextmanager
    def _wait(self) -> Iterator[None]:
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _next(self) -> Batch:
        if isinstance(self._stream, StagedStream):
            assert self._device_rows is not None
            staged = self._stream.next()
            return Batch(self._device_rows.gather(staged), None, staged.first_row)
        batch = self._stream.next()
        return Batch(to_torch(batch.arrays[self._array]), None, batch.first_row)

    def sample(self, n: int) -> torch.Tensor:
        """The first `n` rows of the stream, or all of a smaller store; the same on all ranks.

        In equal batches of at most `SAMPLE_BATCH`: fewer rows than batches are left out at the end.
        """
        with self._wait():
            return self._sample(n)

    def _sample(self, n: int) -> torch.Tensor:
        self._wait_for_rows(n)
        wanted = min(n, self._store.n_tokens)
        n_batches = -(-wanted // SAMPLE_BATCH)
        size = wanted // n_batches
        stream = ShuffledStream(
            self._store,
            [self._array],
            seed=self._seed,
            batch_rows=size,
            window_items=self._window_items,
            buffer_rows=self._buffer_tokens,
            wait_timeout_s=self._wait_timeout_s,
        )
        try:
            batches = [stream.next().arrays[self._array] for _ in range(n_batches)]
        finally:
            stream.close()
        return torch.cat([to_torch(batch) for batch in batches])

    def first_item_needed(self, position: int) -> int:
        """First item of the store that batches from `position` on may need."""
        return self._stream.first_item_needed(position)

    def _wait_for_rows(self, n: int) -> None:
        deadline = time.monotonic() + self._wait_timeout_s
        while not self._store.finalised and self._store.n_tokens < n:
            if time.monotonic() > deadline:
                raise IncompleteStoreError(
                    f"{self._store.path} has {self._store.n_tokens} rows after "
                    f"{self._wait_timeout_s:.0f} s: a sample needs {n}; is its writer still alive?"
                )
            time.sleep(_POLL_S)
            self._store.refresh()

    def close(self) -> None:
        """Ends the background reader."""
        self._stream.close()


def store_digest(store: Store) -> str:
    """Sixteen hex digits of what a store was made to hold, wherever it lies and however full.

    Of the header's fixed part, provenance among it, and the checksums of item 0.
    """
    header = store.header
    content = [header.arrays, header.dtype, header.codec, header.shard_tokens, header.provenance]
    text = json.dumps([content, store.checksums(0)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
