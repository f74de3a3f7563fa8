"""Size of the store, and bytes that are read from it."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.planning.work import stored_row_bytes
from conf.schema.run import RunConfig

_SIDECAR_BYTES_PER_TOKEN = 4 + 8 + 4
"""Bytes per token of the store's sidecar arrays, in addition to the activations."""


def store_bytes_total(config: RunConfig, widths: Sequence[int]) -> int:
    """Return the largest size, in bytes, that the store reaches, with all arrays and sidecars.

    Compressed chunks are counted as uncompressed, which is an upper bound.

    If consumed items are deleted, the store holds only the harvest's lead over training, the
    windows in use, and the rows read since the oldest checkpoint kept. Only
    `checkpoint.every_tokens` is taken into account, because `checkpoint.every_minutes` can only
    make checkpoints more frequent.

    Args:
        config: Config of the run.
        widths: Width of each hookpoint's rows.
    """
    tokens = config.data.tokens
    cluster = config.cluster
    checkpoint = config.checkpoint
    # The first milestone is kept permanently, so no item after it is ever deleted.
    milestones = checkpoint.keep_every_tokens is not None
    if cluster.retention == "consumed" and cluster.max_lead_items is not None and not milestones:
        items = cluster.max_lead_items + 2 * config.store.window_items
        held = (checkpoint.keep + 1) * checkpoint.every_tokens
        tokens = min(tokens, items * config.store.shard_tokens + held)
    row_bytes = sum(stored_row_bytes(config, width) for width in widths)
    return tokens * (row_bytes + _SIDECAR_BYTES_PER_TOKEN)


def read_bytes_per_rank(config: RunConfig, d_model: int) -> int:
    """Return the number of bytes that each rank reads in the whole run.

    The ranks share the reads, so that each row is read once. In a mixture, every rank reads every
    row. A chunk at the border between two ranks' parts is read by both ranks, but counted once.
    """
    parts = 1 if config.store.mixture else config.parallel.n_ranks
    return config.train.tokens * stored_row_bytes(config, d_model) // parts
