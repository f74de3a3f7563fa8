"""Deleting the shards that every consumer has passed: a run needs no room for all its rows.

Shards of items below `below` are deleted or are about to be, those below `swept` are gone. Records
stay for ever: numbers, checksums and moments of all rows are still told. `announced` is what a
deletion is about to raise `below` to: see `cursors.py` for why it says so first.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from activation_store import log
from activation_store.cursors import consumers
from activation_store.metadata import read_header
from activation_store.parallel import run_all
from activation_store.storage import Storage, open_storage
from activation_store.watermark import Watermark, read_watermark, write_watermark


def delete_consumed(path: str | Path) -> list[int]:
    """Deletes the shards that no registered consumer needs any more; returns the items.

    Does nothing without a consumer. What a call that was killed left half done, the next one ends.
    One process at a time may do so: the driver.

    Raises:
        DamagedDataError, StoreFormatError: A cursor file or the watermark cannot be read.
    """
    storage = open_storage(path)
    header = read_header(storage)
    mark = _advance(storage, read_watermark(storage))
    items = range(mark.swept, mark.below)
    if items:
        files = [header.shard_file(name, item) for item in items for name in header.stored]
        run_all([partial(storage.delete, file) for file in files], storage.n_threads)
        storage.sync(list(header.stored))
        write_watermark(storage, replace(mark, swept=mark.below))
    return list(items)


def _advance(storage: Storage, mark: Watermark) -> Watermark:
    """Raises the watermark to what the consumers allow; durable when it returns."""
    target = _allowed(storage, mark)
    if target.below > mark.below:
        write_watermark(storage, replace(mark, announced=target.below))
        # Whoever came before the announcement is seen now; whoever comes after it sees it.
        agreed = _allowed(storage, mark)
        below = min(target.below, agreed.below)
        mark = replace(mark, announced=below, below=below, consumers=agreed.consumers)
        write_watermark(storage, mark)
    elif mark.announced > mark.below:  # of a call that was killed
        mark = replace(mark, announced=mark.below)
        write_watermark(storage, mark)
    return mark


def _allowed(storage: Storage, mark: Watermark) -> Watermark:
    kept = {name: state.keep_from_item for name, state in consumers(storage).items()}
    below = min(*kept.values(), log.count(storage)) if kept else 0
    return replace(mark, below=max(mark.below, below), consumers=kept)
