"""Repair a damaged store, and list the work items that have to be harvested again.

Files that can be derived from others are restored: metadata from the header, item records from
snapshots, and snapshots from item records. Files that are not committed are removed. An item with a
damaged shard or without a valid record is un-committed: its record is moved to `_repaired/` and its
shards are deleted. A store that was finalised then becomes a growing store, until the next harvest
redoes the item and finalises the store. Items are pure functions of their number, so the rows and
their order are then the same as before.

A repair takes the store's commit lock exclusively. Writers share this lock while they write and
commit an item, so they wait for the repair. A repair may be killed at any step and run again. An
object store has no such lock, so a repair removes uncommitted objects only if they are older than
an hour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from activation_store.checksum import crc32c
from activation_store.consumers.deletion_mark import read_deletion_mark
from activation_store.errors import DAMAGE, MissingDataError
from activation_store.format import commit_log
from activation_store.format.header import METADATA, VALID_ROWS
from activation_store.format.item_record import ItemRecord, from_row
from activation_store.format.zarr_json import dump, group_document, read_group, restore_documents
from activation_store.maintenance.verify import item_damages
from activation_store.storage.base import Storage
from activation_store.storage.checksummed_json import dump_checksummed
from activation_store.storage.open import open_storage
from activation_store.threads import run_all
from activation_store.writing.writer import valid_rows_bytes

REPAIRED = "_repaired"
_SHARD = re.compile(r"c\.(\d+)(\.0)*")


@dataclass(frozen=True)
class RepairReport:
    """Result of a repair. All lists are empty if the store was intact."""

    redo: list[int] = field(default_factory=list)
    """Committed items that have to be harvested again, in ascending order."""
    restored: list[str] = field(default_factory=list)
    """Files that were restored from other files."""
    dropped: list[str] = field(default_factory=list)
    """Files that were removed because they were not committed or could not be repaired."""

    def __str__(self) -> str:
        items = f"items to redo: {self.redo}" if self.redo else "no items to redo"
        return f"{len(self.restored)} files restored, {len(self.dropped)} dropped, {items}"


def repair_store(path: str | Path, wait_s: float = 30.0) -> RepairReport:
    """Repair a finalised or growing store. The next harvest redoes the items in `report.redo`.

    Args:
        path: Path of the store.
        wait_s: Seconds to wait for writers and other repairs to release the commit lock.

    Raises:
        StoreBusyError: If the lock was not released in time.
        DamagedDataError: If the header (`zarr.json`) or the deletion mark fails its checksum.
            Neither can be derived from other files.
        StoreFormatError: If the header or the deletion mark is invalid.
    """
    storage = open_storage(path)
    with storage.lock(exclusive=True, timeout_s=wait_s):
        return _Repair(storage).run()


class _Repair:
    """One run of a repair."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.header, self._group = read_group(storage)
        self._deleted_below = read_deletion_mark(storage).below
        self._report = RepairReport()

    def run(self) -> RepairReport:
        """Repair everything and return the report."""
        self._metadata()
        records: dict[int, ItemRecord] = {}
        broken: set[int] = set()
        segments = set(commit_log.segments(self.storage))
        if self.header.finalised:
            segments |= set(range(-(-self.header.n_items // commit_log.SEGMENT_ITEMS)))
        for segment in sorted(segments):
            for item, record in self._segment(segment):
                if record is None:
                    broken.add(item)
                else:
                    records[item] = record
        if broken:
            self._uncommit(sorted(broken))
        self._drop_uncommitted(set(records) - broken)
        for segment in sorted(segments):
            self._snapshot(segment)
        self._valid_rows(records)
        self._report.redo.extend(sorted(broken))
        return self._report

    def _metadata(self) -> None:
        """Restore the group's and the arrays' `zarr.json` from the header."""
        expected = group_document(self.header)
        expected["attributes"] = self._group["attributes"]
        if {key: self._group.get(key) for key in expected} != expected:
            self._put(METADATA, dump(expected))
        self._report.restored.extend(restore_documents(self.storage, self.header))

    def _segment(self, segment: int) -> Iterator[tuple[int, ItemRecord | None]]:
        """Yield each item of a segment with its valid record, or with None if it must be redone."""
        first = segment * commit_log.SEGMENT_ITEMS
        snapshot = self._read_snapshot(segment)
        loose = set(commit_log.record_items(self.storage, segment))
        items = loose | set(snapshot)
        if self.header.finalised:
            stop = min(first + commit_log.SEGMENT_ITEMS, self.header.n_items)
            items |= set(range(first, stop))
        choices = [partial(self._choose, item, snapshot.get(item)) for item in items]
        chosen = run_all(choices, self.storage.n_threads)
        for item, (record, agrees) in zip(items, chosen, strict=True):
            if record is not None and not agrees:
                self._put(commit_log.record_name(item), dump_checksummed(record.to_json()))
            # Drop a snapshot with a missing or wrong record; `_snapshot` restores it later.
            if snapshot and (record is None or snapshot.get(item) != record):
                self._drop(commit_log.snapshot_name(segment))
                snapshot = {}
            yield item, record

    def _read_snapshot(self, segment: int) -> dict[int, ItemRecord]:
        """Return the records in a snapshot as {item: record}; drop a damaged snapshot."""
        name = commit_log.snapshot_name(segment)
        first = segment * commit_log.SEGMENT_ITEMS
        if not self.storage.exists(name):
            return {}
        try:
            table = commit_log.read_snapshot(self.storage, self.header, segment)
        except DAMAGE:
            self._drop(name)
            return {}
        return {first + i: from_row(self.header, first + i, row) for i, row in enumerate(table)}

    def _choose(self, item: int, other: ItemRecord | None) -> tuple[ItemRecord | None, bool]:
        """Choose between the record file of an item and its record in the snapshot.

        Args:
            item: Number of the item.
            other: The record in the snapshot, if any.

        Returns:
            The record that matches the shards, or None if neither does; and whether this record
            equals the one in the record file.
        """
        try:
            loose = from_row(
                self.header, item, commit_log.read_record(self.storage, self.header, item)[0]
            )
        except DAMAGE:
            loose = None
        for record in (loose, other):
            if record is not None and not self._damaged(record):
                return record, record == loose
        return None, False

    def _damaged(self, record: ItemRecord) -> bool:
        """Return whether a record or its shards are damaged."""
        deleted = record.item < self._deleted_below
        return bool(item_damages(self.storage, self.header, record, with_shards=not deleted))

    def _uncommit(self, items: list[int]) -> None:
        """Un-commit items: keep a copy of their records and delete their shards."""
        # This order ensures that another repair can continue if this repair is killed. The
        # snapshots that contain records of these items have already been removed.
        if self.header.finalised:
            self.header = replace(
                self.header,
                finalised=False,
                n_items=0,
                n_tokens=0,
                planned_items=self.header.n_items,  # finalising again requires all of them
            )
            self._put(METADATA, dump(group_document(self.header)))
        self.storage.make_folder(REPAIRED)
        for item in items:
            self._move_record(item)
            for name in self.header.disk_arrays:
                self._drop(self.header.shard_file(name, item))

    def _move_record(self, item: int) -> None:
        """Move the record file of an item to the folder of repaired items."""
        name = commit_log.record_name(item)
        try:
            data = self.storage.read(name, commit_log.RECORD_BYTES)
        except MissingDataError:
            return
        except DAMAGE:
            data = b""  # the file is too large to be a record, so it is not worth keeping
        if data:
            self.storage.put(f"{REPAIRED}/{item:09d}-{crc32c(data):08x}.json", [data])
        self._drop(name)
        self.storage.sync([name.rpartition("/")[0]])

    def _drop_uncommitted(self, committed: set[int]) -> None:
        """Remove leftover temporary files and the shards of items that are not committed."""
        self._report.dropped.extend(self.storage.remove_stale())
        for array in self.header.disk_arrays:
            for file in self.storage.names(array):
                match = _SHARD.fullmatch(file)
                name = f"{array}/{file}"
                if match and int(match[1]) not in committed and self.storage.is_stale(name):
                    self._drop(name)

    def _snapshot(self, segment: int) -> None:
        """Restore the snapshot of a full segment if it is missing."""
        name = commit_log.snapshot_name(segment)
        if not self.storage.exists(name):
            commit_log.snapshot_if_full(self.storage, self.header, segment)
            if self.storage.exists(name):
                self._report.restored.append(name)

    def _valid_rows(self, records: dict[int, ItemRecord]) -> None:
        """Restore the array `valid_rows` of a finalised store."""
        if not self.header.finalised:
            return
        name = f"{VALID_ROWS}/c.0"
        rows = np.array([records[item].rows for item in range(self.header.n_items)])
        wanted = valid_rows_bytes(rows)
        try:
            found = self.storage.read(name, len(wanted))
        except DAMAGE:
            found = b""
        if found != wanted:
            self._put(name, wanted)

    def _put(self, name: str, data: bytes) -> None:
        self.storage.make_folder(name.rpartition("/")[0])
        self.storage.put(name, [data])
        self._report.restored.append(name)

    def _drop(self, name: str) -> None:
        if self.storage.exists(name):
            self.storage.delete(name)
            self._report.dropped.append(name)
