"""Identify a stream: its order of rows and its store."""

from __future__ import annotations

import hashlib
import json

from activation_store import Store
from activation_store.reading.shuffle_order import ORDER

SAMPLE_BATCH = 4096
"""Most rows of a batch in which a sample is read."""


def order_name(
    seed: int, order_seed: int | None, window_items: int, buffer_tokens: int
) -> tuple[int, str]:
    """Return the seed of the row order and a name for the order, for a source's identity.

    The name covers everything that determines the rows of batch i, except for the run's seed and
    the batch size: checkpoints record those two separately. An `order_seed`, which replaces the
    run's seed, is not recorded elsewhere and so is part of the name.
    """
    name = f"{ORDER}-w{window_items}-b{buffer_tokens}"
    return (seed, name) if order_seed is None else (order_seed, f"{name}-s{order_seed}")


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
