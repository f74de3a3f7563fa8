"""The store as the trainer's source: the only place where activations become torch tensors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from activation_store import ShuffledStream, Store
from sae_core.source import Batch

SAMPLE_BATCH = 4096


class StoreSource:
    """One data replica's batches of one array of a store; an `ActivationSource`.

    Args:
        store: open, with at least one committed window.
        array: whose rows to train on.
        seed: fixes the order, the same on all ranks.
        batch_tokens: rows of the global batch.
        replica: index of this data replica.
        n_replicas: replicas that share a global batch; divides `batch_tokens`.
        window_items: work items shuffled together.
        buffer_tokens: rows permuted together in memory.
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
    ) -> None:
        self.d_in = self.d_out = store.arrays[array]
        self.identity = f"{array}-{store_digest(store)}"
        self._store, self._array, self._seed = store, array, seed
        self._window_items, self._buffer_tokens = window_items, buffer_tokens
        share = batch_tokens // n_replicas
        self._stream = ShuffledStream(
            store,
            [array],
            seed=seed,
            batch_rows=batch_tokens,
            window_items=window_items,
            buffer_rows=buffer_tokens,
            rows=(replica * share, (replica + 1) * share),
        )

    @property
    def position(self) -> int:
        """Index of the next batch."""
        return self._stream.position

    def seek(self, position: int) -> None:
        """Makes batch `position` the next one."""
        self._stream.seek(position)

    def next(self) -> Batch:
        """This replica's rows of the batch at `position`, [batch_tokens / n_replicas, d_in]."""
        batch = self._stream.next()
        return Batch(to_torch(batch.arrays[self._array]), None, batch.first_row)

    def sample(self, n: int) -> torch.Tensor:
        """The first `n` rows of the stream, or all of a smaller store; the same on all ranks."""
        wanted = min(n, self._store.n_tokens)
        size = min(SAMPLE_BATCH, wanted)
        stream = ShuffledStream(
            self._store,
            [self._array],
            seed=self._seed,
            batch_rows=size,
            window_items=self._window_items,
            buffer_rows=self._buffer_tokens,
        )
        try:
            batches = [stream.next().arrays[self._array] for _ in range(wanted // size)]
        finally:
            stream.close()
        return torch.cat([to_torch(batch) for batch in batches])

    def close(self) -> None:
        """Ends the background reader."""
        self._stream.close()


def store_digest(store: Store) -> str:
    """Sixteen hex digits of what a finalised store holds, wherever it lies."""
    header = store.header
    content = [header.arrays, header.dtype, header.provenance, header.n_items, header.n_tokens]
    rows = [asdict(store.statistics(name)) for name in header.arrays]
    text = json.dumps([content, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_torch(rows: NDArray[np.generic]) -> torch.Tensor:
    """float32 or bfloat16 rows as a tensor; torch does not know NumPy's bfloat16, only its bits."""
    if rows.dtype.name == "bfloat16":
        return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(rows)
