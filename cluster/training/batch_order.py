"""The order of batches: which rows of a store each batch holds, and the identity of the order."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from activation_store import Store
from activation_store.reading.shuffle_order import ORDER

SAMPLE_BATCH = 4096
"""Maximum number of rows in the batches with which a sample is read."""


@dataclass(frozen=True)
class BatchOrder:
    """The settings that determine which rows batch i of one data replica holds."""

    seed: int
    """The run's seed, which is the same on all ranks."""
    batch_tokens: int
    """Number of rows in the global batch."""
    window_items: int
    """Number of a store's work items that are shuffled together."""
    buffer_tokens: int
    """Number of rows permuted together in memory. A mixture divides them among its stores."""
    order_seed: int | None = None
    """Seed of the order of rows. If None, `seed` is used."""
    replica: int = 0
    """Index of this data replica."""
    n_replicas: int = 1
    """Number of replicas that share a global batch. It divides `batch_tokens`."""

    @property
    def row_seed(self) -> int:
        """Seed of the order of rows."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def name(self) -> str:
        """Name of the order, used in the identity of a source.

        The name covers everything that determines the rows of batch i, except for the run's seed
        and the batch size, which checkpoints record separately. An `order_seed` is not recorded
        elsewhere.
        """
        name = f"{ORDER}-w{self.window_items}-b{self.buffer_tokens}"
        return name if self.order_seed is None else f"{name}-s{self.order_seed}"

    @property
    def n_rows(self) -> int:
        """Number of rows of a global batch that this replica receives."""
        return self.batch_tokens // self.n_replicas

    @property
    def rows(self) -> tuple[int, int]:
        """Bounds of this replica's rows in every global batch."""
        return self.replica * self.n_rows, (self.replica + 1) * self.n_rows

    def first_row(self, position: int) -> int:
        """Return the index in the stream of this replica's first row of batch `position`."""
        return position * self.batch_tokens + self.rows[0]


def equal_batches(n_rows: int) -> tuple[int, int]:
    """Return the number and size of the batches with which a sample of `n_rows` rows is read.

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
