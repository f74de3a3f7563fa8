"""Delete shards that every consumer has passed, so that the disk need not hold all rows at once.

The deletion mark (see `deletion_mark.py`) records the progress. Shards of items below `below` are
deleted or about to be deleted, and shards of items below `swept` are deleted. `announced` is the
value to which a deletion is about to raise `below`; `cursors.py` explains why it must be written
first. Commit records are never deleted, so row numbers, checksums and statistics remain available.

`cluster.retention` determines whether a run deletes shards at all.
`cluster/training/store_cursor.py` decides what a training run still needs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from activation_store.consumers.cursors import list_consumers
from activation_store.consumers.deletion_mark import (
    DeletionMark,
    read_deletion_mark,
    write_deletion_mark,
)
from activation_store.format import commit_log
from activation_store.format.zarr_json import read_header
from activation_store.storage.base import Storage
from activation_store.storage.open import open_storage
from activation_store.threads import run_all


def delete_consumed(path: str | Path) -> list[int]:
    """Delete the shards that no registered consumer needs any more.

    Does nothing if no consumer is registered. Completes any deletion that was interrupted. Only one
    process at a time may call this function: the driver, which holds the harvest lock.

    Returns:
        The items whose shards were deleted.

    Raises:
        DamagedDataError: If a cursor file or the deletion mark fails its checksum.
        StoreFormatError: If a cursor file or the deletion mark is invalid.
    """
    storage = open_storage(path)
    header = read_header(storage)
    mark = _advance(storage, read_deletion_mark(storage))
    items = range(mark.swept, mark.below)
    if items:
        files = [header.shard_file(name, item) for item in items for name in header.disk_arrays]
        run_all([partial(storage.delete, file) for file in files], storage.n_threads)
        storage.sync(list(header.disk_arrays))
        write_deletion_mark(storage, replace(mark, swept=mark.below))
    return list(items)


def _advance(storage: Storage, mark: DeletionMark) -> DeletionMark:
    """Advance the deletion mark as far as the consumers allow, durably."""
    target = _allowed(storage, mark)
    if target.below > mark.below:
        write_deletion_mark(storage, replace(mark, announced=target.below))
        # This second check finds any consumer that registered before the announcement. A consumer
        # that registers after the announcement sees it.
        agreed = _allowed(storage, mark)
        below = min(target.below, agreed.below)
        mark = replace(mark, announced=below, below=below, consumers=agreed.consumers)
        write_deletion_mark(storage, mark)
    elif mark.announced > mark.below:  # a previous call was killed after its announcement
        mark = replace(mark, announced=mark.below)
        write_deletion_mark(storage, mark)
    return mark


def _allowed(storage: Storage, mark: DeletionMark) -> DeletionMark:
    """Return `mark` with `below` raised to the first item that a consumer still needs."""
    kept = {name: state.keep_from_item for name, state in list_consumers(storage).items()}
    below = min(*kept.values(), commit_log.count(storage)) if kept else 0
    return replace(mark, below=max(mark.below, below), consumers=kept)
