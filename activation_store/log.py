"""The commit log: one exclusively created record per item, and a snapshot per full segment.

    _log/000000/000000007.json   item 7; its name is the claim, so an item is committed once
    _log/000000.json             the columns of all records of segment 0, written when it is full

Opening reads the snapshots, and loose records only of segments that have none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import MissingDataError, StoreFormatError
from activation_store.header import StoreHeader
from activation_store.parallel import run_all
from activation_store.record import (
    SCHEMA_VERSION,
    ItemRecord,
    parse_columns,
    row_dtype,
)
from activation_store.sealed import read_sealed, seal
from activation_store.storage import Storage

SEGMENT_ITEMS = 1000
LOG = "_log"
RECORD_BYTES = 8 << 20
_SNAPSHOT_BYTES = 1 << 30
_SEGMENT = re.compile(r"(\d{6})(\.json)?")
_RECORD = re.compile(r"(\d{9})\.json")


def segment_name(segment: int) -> str:
    """Folder of the loose records of a segment, inside the store."""
    return f"{LOG}/{segment:06d}"


def snapshot_name(segment: int) -> str:
    """The columnar file of a whole segment, inside the store."""
    return f"{LOG}/{segment:06d}.json"


def record_name(item: int) -> str:
    """The loose record of an item, inside the store."""
    return f"{segment_name(item // SEGMENT_ITEMS)}/{item:09d}.json"


def read_record(storage: Storage, header: StoreHeader, item: int) -> NDArray[np.void]:
    """A table [1] of one loose record.

    Raises:
        MissingDataError: The item is not committed.
        DamagedDataError, StoreFormatError: naming the file.
    """
    name, where = record_name(item), storage.where(record_name(item))
    document = read_sealed(storage, name, RECORD_BYTES)
    _check_version(where, document)
    if document.get("item") != item:
        raise StoreFormatError(f"{where} is the record of item {document.get('item')!r}")
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
        raise StoreFormatError(f"{where} cannot be a commit record: {error}") from error
    return parse_columns(header, where, columns)


def read_records(
    storage: Storage, header: StoreHeader, items: Sequence[int]
) -> list[NDArray[np.void]]:
    """A table [1] of each loose record. Raises as `read_record`."""
    reads = [partial(read_record, storage, header, item) for item in items]
    return run_all(reads, storage.n_threads)


def read_snapshot(storage: Storage, header: StoreHeader, segment: int) -> NDArray[np.void]:
    """A table [n] of the items of a segment.

    Raises:
        MissingDataError: There is no snapshot of it.
        DamagedDataError, StoreFormatError: naming the file.
    """
    where = storage.where(snapshot_name(segment))
    document = read_sealed(storage, snapshot_name(segment), _SNAPSHOT_BYTES)
    _check_version(where, document)
    first = segment * SEGMENT_ITEMS
    table = parse_columns(header, where, document)
    if document.get("first_item") != first or len(table) > SEGMENT_ITEMS:
        raise StoreFormatError(f"{where} does not hold the items from {first} on")
    return table


def _check_version(where: str, document: dict[str, Any]) -> None:
    if document.get("schema_version") != SCHEMA_VERSION:
        raise StoreFormatError(
            f"{where} has schema_version={document.get('schema_version')!r}: "
            f"expected {SCHEMA_VERSION}; update latent-foundry to read a newer one"
        )


def write_snapshot(storage: Storage, segment: int, table: NDArray[np.void]) -> None:
    """Writes the records of a segment as columns; the same bytes whoever writes them."""
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
    storage.put(snapshot_name(segment), [seal(document)])


def append(storage: Storage, record: ItemRecord) -> bool:
    """Commits an item, unless it is committed already: then False. Durable when it returns."""
    folder = segment_name(record.item // SEGMENT_ITEMS)
    storage.make_folder(folder)
    is_new = storage.put_if_absent(record_name(record.item), [seal(record.to_json())])
    storage.sync([folder])
    return is_new


def loose_items(storage: Storage, segment: int) -> list[int]:
    """Items that have a loose record, ascending."""
    names = storage.names(segment_name(segment))
    return sorted(int(match[1]) for match in map(_RECORD.fullmatch, names) if match)


def segments(storage: Storage) -> list[int]:
    """Segments of which anything is there, ascending."""
    names = storage.names(LOG)
    return sorted({int(match[1]) for match in map(_SEGMENT.fullmatch, names) if match})


def count(storage: Storage) -> int:
    """Committed items, with or without gaps between them; lists the log and reads none of it."""
    return sum(len(loose_items(storage, segment)) for segment in segments(storage))


class CommitLog:
    """What is committed, in memory; `refresh` reads only what is new."""

    def __init__(self, storage: Storage, header: StoreHeader) -> None:
        self._storage = storage
        self._tables: dict[int, NDArray[np.void]] = {}
        self.refresh(header)

    def refresh(self, header: StoreHeader) -> None:
        """Takes in what has been committed since.

        Args:
            header: Of the store as it is now; read before the log.

        Raises:
            DamagedDataError, StoreFormatError: A record cannot be read; names it.
            MissingDataError: The log is gone.
        """
        self.header = header
        if not self._storage.is_folder(LOG):
            where = self._storage.where(LOG)
            raise MissingDataError(f"{where} is missing: the store has lost its log")
        for segment in segments(self._storage):
            known = self._tables.get(segment)
            if known is None or not known["present"].all():
                self._tables[segment] = self._load(segment, known)

    def _load(self, segment: int, known: NDArray[np.void] | None) -> NDArray[np.void]:
        # A new table takes the old one's place, so that other threads never see half a row.
        new = np.zeros(SEGMENT_ITEMS, row_dtype(self.header))
        if known is not None:
            new[:] = known
        first = segment * SEGMENT_ITEMS
        if self._storage.exists(snapshot_name(segment)):
            snapshot = read_snapshot(self._storage, self.header, segment)
            new[: len(snapshot)] = snapshot
            if len(snapshot) == SEGMENT_ITEMS or self.header.finalised:
                return new
        loose = loose_items(self._storage, segment)
        for item in loose:
            if item // SEGMENT_ITEMS != segment or item >= self.header.planned_items:
                where = self._storage.where(record_name(item))
                raise StoreFormatError(f"{where} is no item of this store")
        unread = [item for item in loose if not new["present"][item - first]]
        for item, row in zip(unread, read_records(self._storage, self.header, unread), strict=True):
            new[item - first] = row[0]
        return new

    def items(self) -> set[int]:
        """All committed items."""
        return {
            segment * SEGMENT_ITEMS + int(row)
            for segment, table in list(self._tables.items())
            for row in np.flatnonzero(table["present"])
        }

    def contiguous(self) -> NDArray[np.void]:
        """Records of the items 0, 1, ... up to the first one that is not committed: a table [n]."""
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
    """Writes the snapshot of a segment once all its items are committed.

    The last segment of a finalised store ends with the store. Several writers may do so at once:
    each writes the same bytes.
    """
    first, stop = segment * SEGMENT_ITEMS, (segment + 1) * SEGMENT_ITEMS
    items = range(first, min(stop, header.n_items) if header.finalised else stop)
    if len(loose_items(storage, segment)) >= len(items):
        tables = read_records(storage, header, items)
        write_snapshot(storage, segment, np.concatenate(tables))
