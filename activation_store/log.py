"""The commit log: one exclusively created record per item, and a snapshot per full segment.

    _log/000000/000000007.json   item 7; its name is the claim, so an item is committed once
    _log/000000.json             the columns of all records of segment 0, written when it is full

Opening reads the snapshots, and loose records only of segments that have none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store import files
from activation_store.errors import MissingDataError, StoreFormatError
from activation_store.header import StoreHeader
from activation_store.record import (
    SCHEMA_VERSION,
    ItemRecord,
    parse_columns,
    row_dtype,
)

SEGMENT_ITEMS = 1000
LOG = "_log"
_RECORD_BYTES = 8 << 20
_SNAPSHOT_BYTES = 1 << 30
_SEGMENT = re.compile(r"(\d{6})(\.json)?")
_RECORD = re.compile(r"(\d{9})\.json")


def segment_path(root: Path, segment: int) -> Path:
    """Folder of the loose records of a segment."""
    return root / LOG / f"{segment:06d}"


def snapshot_path(root: Path, segment: int) -> Path:
    """The columnar file of a whole segment."""
    return root / LOG / f"{segment:06d}.json"


def record_path(root: Path, item: int) -> Path:
    """The loose record of an item."""
    return segment_path(root, item // SEGMENT_ITEMS) / f"{item:09d}.json"


def read_record(root: Path, header: StoreHeader, item: int) -> NDArray[np.void]:
    """A table [1] of one loose record.

    Raises:
        MissingDataError: The item is not committed.
        DamagedDataError, StoreFormatError: naming the file.
    """
    path = record_path(root, item)
    document = files.read_sealed(path, _RECORD_BYTES)
    _check_version(path, document)
    if document.get("item") != item:
        raise StoreFormatError(f"{path} is the record of item {document.get('item')!r}")
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
        raise StoreFormatError(f"{path} cannot be a commit record: {error}") from error
    return parse_columns(header, path, columns)


def read_snapshot(root: Path, header: StoreHeader, segment: int) -> NDArray[np.void]:
    """A table [n] of the items of a segment.

    Raises:
        MissingDataError: There is no snapshot of it.
        DamagedDataError, StoreFormatError: naming the file.
    """
    path = snapshot_path(root, segment)
    document = files.read_sealed(path, _SNAPSHOT_BYTES)
    _check_version(path, document)
    first = segment * SEGMENT_ITEMS
    table = parse_columns(header, path, document)
    if document.get("first_item") != first or len(table) > SEGMENT_ITEMS:
        raise StoreFormatError(f"{path} does not hold the items from {first} on")
    return table


def _check_version(path: Path, document: dict[str, Any]) -> None:
    if document.get("schema_version") != SCHEMA_VERSION:
        raise StoreFormatError(
            f"{path} has schema_version={document.get('schema_version')!r}: "
            f"expected {SCHEMA_VERSION}; update latent-foundry to read a newer one"
        )


def write_snapshot(root: Path, segment: int, table: NDArray[np.void]) -> None:
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
    files.replace(root, snapshot_path(root, segment), files.seal(document))


def append(root: Path, record: ItemRecord) -> bool:
    """Commits an item, unless it is committed already: then False. Durable when it returns."""
    path = record_path(root, record.item)
    path.parent.mkdir(exist_ok=True)
    files.fsync_folder(path.parent.parent)  # even if another writer made the folder a moment ago
    temporary = files.write_temporary(root, [files.seal(record.to_json())])
    is_new = files.link_new(temporary, path)
    files.fsync_folder(path.parent)
    return is_new


def loose_items(root: Path, segment: int) -> list[int]:
    """Items that have a loose record, ascending."""
    try:
        names = os.listdir(segment_path(root, segment))
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in map(_RECORD.fullmatch, names) if match)


def segments(root: Path) -> list[int]:
    """Segments of which anything is there, ascending."""
    try:
        names = os.listdir(root / LOG)
    except FileNotFoundError as error:
        raise MissingDataError(f"{root / LOG} is missing: the store has lost its log") from error
    return sorted({int(match[1]) for match in map(_SEGMENT.fullmatch, names) if match})


class CommitLog:
    """What is committed, in memory; `refresh` reads only what is new."""

    def __init__(self, root: Path, header: StoreHeader) -> None:
        self.root = root
        self._tables: dict[int, NDArray[np.void]] = {}
        self.refresh(header)

    def refresh(self, header: StoreHeader) -> None:
        """Takes in what has been committed since.

        Args:
            header: Of the store as it is now; read before the log.

        Raises:
            DamagedDataError, StoreFormatError: A record cannot be read; names it.
        """
        self.header = header
        for segment in segments(self.root):
            known = self._tables.get(segment)
            if known is None or not known["present"].all():
                self._tables[segment] = self._load(segment, known)

    def _load(self, segment: int, known: NDArray[np.void] | None) -> NDArray[np.void]:
        # A new table takes the old one's place, so that other threads never see half a row.
        new = np.zeros(SEGMENT_ITEMS, row_dtype(self.header))
        if known is not None:
            new[:] = known
        first = segment * SEGMENT_ITEMS
        if snapshot_path(self.root, segment).exists():
            snapshot = read_snapshot(self.root, self.header, segment)
            new[: len(snapshot)] = snapshot
            if len(snapshot) == SEGMENT_ITEMS or self.header.finalised:
                return new
        for item in loose_items(self.root, segment):
            if item // SEGMENT_ITEMS != segment or item >= self.header.planned_items:
                raise StoreFormatError(f"{record_path(self.root, item)} is no item of this store")
            if not new["present"][item - first]:
                new[item - first] = read_record(self.root, self.header, item)[0]
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


def snapshot_if_full(root: Path, header: StoreHeader, segment: int) -> None:
    """Writes the snapshot of a segment once all its items are committed.

    The last segment of a finalised store ends with the store. Several writers may do so at once:
    each writes the same bytes.
    """
    first, stop = segment * SEGMENT_ITEMS, (segment + 1) * SEGMENT_ITEMS
    items = range(first, min(stop, header.n_items) if header.finalised else stop)
    if len(loose_items(root, segment)) >= len(items):
        tables = [read_record(root, header, item) for item in items]
        write_snapshot(root, segment, np.concatenate(tables))
