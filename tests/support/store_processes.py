"""Bodies of processes that tests kill; cheap to import, so that each starts in milliseconds."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from activation_store import ShuffledStream, StoreWriter, open_store, store_exists
from activation_store.format import commit_log
from tests.support.store_cases import item_columns

ARRAYS = {"a": 16}
N_ITEMS = 220
ROWS = [(item * 37) % 65 for item in range(N_ITEMS)]
LAYOUT: dict[str, Any] = {"shard_tokens": 64, "chunk_bytes": 300}
STREAM: dict[str, Any] = {"seed": 5, "batch_rows": 64, "window_items": 8, "buffer_rows": 150}
SEGMENT_ITEMS = 25
DIGEST_BYTES = 32


@contextmanager
def small_segments() -> Iterator[None]:
    """Shorten the log's segments in the block, so that snapshots are also written and read."""
    before = commit_log.SEGMENT_ITEMS
    commit_log.SEGMENT_ITEMS = SEGMENT_ITEMS
    try:
        yield
    finally:
        commit_log.SEGMENT_ITEMS = before


def open_stream(path: Path) -> ShuffledStream:
    return ShuffledStream(open_store(path), ["a", "token_id"], wait_timeout_s=200, **STREAM)


def next_digest(stream: ShuffledStream) -> bytes:
    """Return the digest of the next batch's bytes, in order."""
    batch = stream.next()
    parts = (batch.arrays[name].tobytes() for name in ("a", "token_id"))
    return hashlib.sha256(b"".join(parts)).digest()


def write_items(path: Path, begun: Path, most: int | None) -> None:
    """Write missing items in a random order that differs between processes.

    Args:
        path: Path of the store.
        begun: File to which one byte is added for each item that is started.
        most: After this many items, sleep until killed. If None, write all items.
    """
    with small_segments(), begun.open("ab", buffering=0) as progress:
        writer = StoreWriter(path, ARRAYS, **LAYOUT)
        rng = random.Random(os.getpid())
        items = sorted(range(N_ITEMS), key=lambda item: item + rng.uniform(0, 12))
        for item in items:
            if writer.is_committed(item):
                continue
            if most == 0:
                time.sleep(1000)
            most = None if most is None else most - 1
            progress.write(b".")
            writer.write_item(item, *item_columns(item, ROWS[item], ARRAYS))


def read_batches(path: Path, seen: Path, stop: int, most: int | None) -> None:
    """Read batches up to `stop`, continuing after those recorded in `seen`.

    Args:
        path: Path of the store; it may not exist yet.
        seen: File to which the digest of each batch is added.
        stop: Number of the batch to stop before.
        most: After this many batches, sleep until killed. If None, read all batches.
    """
    with small_segments(), seen.open("ab", buffering=0) as progress:
        while not store_exists(path):
            time.sleep(0.005)
        stream = open_stream(path)
        stream.seek(seen.stat().st_size // DIGEST_BYTES)
        while stream.position < stop:
            if most == 0:
                time.sleep(1000)
            most = None if most is None else most - 1
            progress.write(next_digest(stream))
