"""The order of batches: which rows of a store each batch holds, and the identity of a stream."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from activation_store import Store
from activation_store.reading.shuffle_order import ORDER

SAMPLE_BATCH = 4096
"""Maximum number of rows of a batch in which a sample is read."""


@dataclass(frozen=True)
class BatchOrder:
    """The settings that determine which rows batch i of one data replica holds."""

    seed: int
    """The run's seed; the same on all ranks."""
    batch_tokens: int
    """Rows of the global batch."""
    window_items: int
    """Work items of a store that are shuffled together."""
    buffer_tokens: int
    """Rows permuted together in memory; a mixture divides them among its stores."""
    order_seed: int | None = None
    """Seed of the order of rows instead of `seed`."""
    replica: int = 0
    """Index of this data replica."""
    n_replicas: int = 1
    """Replicas that share a global batch; divides `batch_tokens`."""

    @property
    def row_seed(self) -> int:
        """Seed of the order of rows."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def name(self) -> str:
        """Name of the order, for the identity of a source.

        It covers everything that determines the rows of batch i, except for the run's seed and the
        batch size: checkpoints record those two separately. An `order_seed` is not recorded
        elsewhere.
        """
        name = f"{ORDER}-w{self.window_items}-b{self.buffer_tokens}"
        return name if self.order_seed is None else f"{name}-s{self.order_seed}"

    @property
    def n_rows(self) -> int:
        """Rows of a global batch that this replica gets."""
        return self.batch_tokens // self.n_replicas

    @property
    def rows(self) -> tuple[int, int]:
        """Bounds of this replica's rows in every global batch."""
        return self.replica * self.n_rows, (self.replica + 1) * self.n_rows

    def first_row(self, position: int) -> int:
        """Return the index in the stream of this replica's first row of batch `position`."""
        return position * self.batch_tokens + self.rows[0]


def equal_batches(n_rows: int) -> tuple[int, int]:
    """Return the number and size of the batches in which a sample of `n_rows` rows is read.

    A batch has at most `SAMPLE_BATCH` rows.
    """
    n_batches = -(-n_rows // SAMPLE_BATCH)
    return n_batches, n_rows // n_batches


def store_digest(store: Store) -> str:
    """Return 16 hex digits that identify a store's content, whatever its path and fill level.

    The digest covers the fixed part of the header, including provenance, and the checksums of
    item 0.
    """
    header = store.header
    content = [header.arrays, header.dtype, header.codec, header.shard_tokens, header.provenance]
    text = json.dumps([content, store.checksums(0)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
