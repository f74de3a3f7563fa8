"""The commit log: one record per committed item, and one snapshot per full segment of items.

    _log/000000/000000007.json   record of item 7
    _log/000000.json             snapshot of segment 0: all of its records as columns

A record is created exclusively (the operation fails if the file exists), so that an item is
committed at most once. A snapshot is written when its segment is full. When a store is opened, the
snapshots are read, and individual records are read only for segments without a snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import MissingDataError, StoreFormatError
from activation_store.format.header import StoreHeader
from activation_store.format.item_record import SCHEMA_VERSION, ItemRecord, parse_columns, row_dtype
from activation_store.storage.base import Storage
from activation_store.storage.checksummed_json import dump_checksummed, read_checksummed
from activation_store.threads import run_all

SEGMENT_ITEMS = 1000
LOG = "_log"
RECORD_BYTES = 8 << 20
_SNAPSHOT_BYTES = 1 << 30
_SEGMENT = re.compile(r"(\d{6})(\.json)?")
_RECORD = re.compile(r"(\d{9})\.json")


def segment_name(segment: int) -> str:
    """Return the path of the folder with the records of a segment, relative to the store."""
    return f"{LOG}/{segment:06d}"


def snapshot_name(segment: int) -> str:
    """Return the path of a segment's snapshot, relative to the store."""
    return f"{LOG}/{segment:06d}.json"


def record_name(item: int) -> str:
    """Return the path of an item's record, relative to the store."""
    return f"{segment_name(item // SEGMENT_ITEMS)}/{item:09d}.json"


def read_record(storage: Storage, header: StoreHeader, item: int) -> NDArray[np.void]:
    """Read the record of one item into a table [1].

    Raises:
        MissingDataError: If the item is not committed.
        DamagedDataError: If the record fails its checksum.
        StoreFormatError: If the record is invalid or belongs to another item.
    """
    name = record_name(item)
    where = storage.where(name)
    document = read_checksummed(storage, name, RECORD_BYTES)
    _check_version(where, document)
    if document.get("item") != item:
        raise StoreFormatError(
            f"{where} is the record of item {document.get('item')!r}: expected {item}"
        )
    try:
        columns = {
            "rows": [document["rows"]],
            "attempt": [document["attempt"]],
            "arrays": {
                name: {key: [value] for key, value in shard.items()}
                for name, shard in document["arrays"].items()
            },
        }
    except (KeyError, AttributeError) as error:
        raise StoreFormatError(
            f"{where} is not a valid commit record: {error}; repair the store with stage=repair"
        ) from error
    return parse_columns(header, where, columns)


def read_records(
    storage: Storage, header: StoreHeader, items: Sequence[int]
) -> list[NDArray[np.void]]:
    """Read several records in parallel, each into a table [1].

    Raises the same errors as `read_record`.
    """
    reads = [partial(read_record, storage, header, item) for item in items]
    return run_all(reads, storage.n_threads)


def read_snapshot(storage: Storage, header: StoreHeader, segment: int) -> NDArray[np.void]:
    """Read the snapshot of a segment into a table [n] with one row per item.

    Raises:
        MissingDataError: If the segment has no snapshot.
        DamagedDataError: If the snapshot fails its checksum.
        StoreFormatError: If the snapshot is invalid or belongs to another segment.
    """
    where = storage.where(snapshot_name(segment))
    document = read_checksummed(storage, snapshot_name(segment), _SNAPSHOT_BYTES)
    _check_version(where, document)
    first = segment * SEGMENT_ITEMS
    table = parse_columns(header, where, document)
    if document.get("first_item") != first or len(table) > SEGMENT_ITEMS:
        raise StoreFormatError(
            f"{where} has {len(table)} items starting at item {document.get('first_item')!r}: "
            f"expected at most {SEGMENT_ITEMS} items starting at item {first}"
        )
    return table


def _check_version(where: str, document: dict[str, Any]) -> None:
    if document.get("schema_version") != SCHEMA_VERSION:
        raise StoreFormatError(
            f"{where} has schema_version={document.get('schema_version')!r}: "
            f"expected {SCHEMA_VERSION}; update latent-foundry if the store is newer"
        )


def write_snapshot(storage: Storage, segment: int, table: NDArray[np.void]) -> None:
    """Write the snapshot of a segment. The same records give the same bytes in every writer."""
    names = [name for name in table.dtype.names or () if table.dtype[name].names]
    document = {
        "schema_version": SCHEMA_VERSION,
        "first_item": segment * SEGMENT_ITEMS,
        "rows": table["rows"].tolist(),
        "attempt": [name.decode() for name in table["attempt"].tolist()],
        "arrays": {
            name: {key: table[name][key].tolist() for key in table.dtype[name].names or ()}
            for name in names
        },
    }
    storage.put(snapshot_name(segment), [dump_checksummed(document)])


def append(storage: Storage, record: ItemRecord) -> bool:
    """Commit an item. The record is durable when this returns.

    Returns:
        True if this call committed the item, False if it was already committed.
    """
    folder = segment_name(record.item // SEGMENT_ITEMS)
    storage.make_folder(folder)
    is_new = storage.put_if_absent(record_name(record.item), [dump_checksummed(record.to_json())])
    storage.sync([folder])
    return is_new


def record_items(storage: Storage, segment: int) -> list[int]:
    """Return the items of a segment that have a record file, in ascending order."""
    names = storage.names(segment_name(segment))
    return sorted(int(match[1]) for match in map(_RECORD.fullmatch, names) if match)


def segments(storage: Storage) -> list[int]:
    """Return the segments that have a folder or a snapshot, in ascending order."""
    names = storage.names(LOG)
    return sorted({int(match[1]) for match in map(_SEGMENT.fullmatch, names) if match})


def count(storage: Storage) -> int:
    """Return the number of committed items, including those after a missing item.

    The files of the log are only listed, not read.
    """
    return sum(len(record_items(storage, segment)) for segment in segments(storage))


class CommitLog:
    """In-memory copy of the commit log. `refresh` reads only new records."""

    def __init__(self, storage: Storage, header: StoreHeader) -> None:
        self._storage = storage
        self._tables: dict[int, NDArray[np.void]] = {}
        self.refresh(header)

    def refresh(self, header: StoreHeader) -> None:
        """Load the records that were committed since the last call.

        Args:
            header: Current header of the store, which must be read before this call. If it says
                that the store is finalised, the log is then complete.

        Raises:
            DamagedDataError: If a record fails its checksum. The message names the file.
            StoreFormatError: If a record is invalid. The message names the file.
            MissingDataError: If the log folder is missing.
        """
        self.header = header
        if not self._storage.is_folder(LOG):
            where = self._storage.where(LOG)
            raise MissingDataError(f"{where} is missing; restore the commit log from a backup")
        for segment in segments(self._storage):
            known = self._tables.get(segment)
            if known is None or not known["present"].all():
                self._tables[segment] = self._load(segment, known)

    def _load(self, segment: int, known: NDArray[np.void] | None) -> NDArray[np.void]:
        """Return a segment's table [SEGMENT_ITEMS], reading only records that `known` lacks."""
        # Build a new table instead of changing the old table, so that other threads never see a
        # partially written row.
        new = np.zeros(SEGMENT_ITEMS, row_dtype(self.header))
        if known is not None:
            new[:] = known
        first = segment * SEGMENT_ITEMS
        if self._storage.exists(snapshot_name(segment)):
            snapshot = read_snapshot(self._storage, self.header, segment)
            new[: len(snapshot)] = snapshot
            if len(snapshot) == SEGMENT_ITEMS or self.header.finalised:
                return new
        loose = record_items(self._storage, segment)
        for item in loose:
            if item // SEGMENT_ITEMS != segment or item >= self.header.planned_items:
                where = self._storage.where(record_name(item))
                raise StoreFormatError(
                    f"{where} does not belong to this store: expected the record of an item of "
                    f"segment {segment} with a number below {self.header.planned_items}"
                )
        unread = [item for item in loose if not new["present"][item - first]]
        for item, row in zip(unread, read_records(self._storage, self.header, unread), strict=True):
            new[item - first] = row[0]
        return new

    def items(self) -> set[int]:
        """Return all committed items."""
        found: set[int] = set()
        # Copy the items: another thread may add a segment in the meantime.
        for segment, table in list(self._tables.items()):
            rows = np.flatnonzero(table["present"]).tolist()
            found.update(segment * SEGMENT_ITEMS + row for row in rows)
        return found

    def contiguous(self) -> NDArray[np.void]:
        """Return a table [n] of the items 0 to n - 1, where n is the first uncommitted item."""
        parts = [np.zeros(0, row_dtype(self.header))]
        for segment in range(len(self._tables)):
            table = self._tables.get(segment)
            if table is None:
                break
            missing = np.flatnonzero(~table["present"])
            parts.append(table[: missing[0]] if len(missing) else table)
            if len(missing):
                break
        return np.concatenate(parts)


def snapshot_if_full(storage: Storage, header: StoreHeader, segment: int) -> None:
    """Write the snapshot of a segment if all of its items are committed.

    The last segment of a finalised store counts as full when all items up to the store's last item
    are committed. Several writers may call this concurrently, because they all write the same
    bytes.
    """
    first = segment * SEGMENT_ITEMS
    stop = first + SEGMENT_ITEMS
    items = range(first, min(stop, header.n_items) if header.finalised else stop)
    if len(record_items(storage, segment)) >= len(items):
        tables = read_records(storage, header, items)
        write_snapshot(storage, segment, np.concatenate(tables))
