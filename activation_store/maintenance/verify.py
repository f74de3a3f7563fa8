"""Verify a store: read every file and list all damage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from activation_store.consumers.cursors import CONSUMERS, consumer_names, read_state
from activation_store.consumers.deletion_mark import DELETION_MARK, read_deletion_mark
from activation_store.errors import DAMAGE, MissingDataError
from activation_store.format import commit_log
from activation_store.format.header import METADATA, VALID_ROWS, StoreHeader
from activation_store.format.item_record import ItemRecord, from_row
from activation_store.format.zarr_json import read_header
from activation_store.reading.shard_reader import OpenShard
from activation_store.storage.base import Storage
from activation_store.storage.open import open_storage
from activation_store.threads import run_all
from activation_store.writing.writer import valid_rows_bytes
from foundation.errors import FoundryError

_VALID_ROWS_BYTES = 1 << 30


@dataclass(frozen=True)
class Damage:
    """One difference between a store's files and what was committed."""

    file: str
    """Path of the file, relative to the store."""
    problem: str
    """Description of the damage, as a phrase that follows the file's name."""
    item: int | None = None
    """Item that the file belongs to, if any."""
    chunk: int | None = None
    """Damaged chunk within the shard, if known."""

    def __str__(self) -> str:
        chunk = "" if self.chunk is None else f", chunk {self.chunk}"
        return f"{self.file}{chunk}: {self.problem}"


def verify_store(path: str | Path) -> list[Damage]:
    """Read every committed file of a finalised or growing store, and return all damage found.

    Damage is returned, not raised as an error. An empty list means that the store is intact.
    Uncommitted files, such as those of a writer that died, are ignored.
    """
    storage = open_storage(path)
    try:
        header = read_header(storage)
    except (FoundryError, OSError) as error:
        return [Damage(METADATA, str(error))]
    damages: list[Damage] = []
    deleted = _deleted(storage, damages)
    records = _records(storage, header, damages)
    if header.finalised:
        damages += _valid_rows(storage, header, records)
    checks = [
        partial(_item, storage, header, record, record.item >= deleted)
        for record in records.values()
    ]
    return damages + [damage for found in run_all(checks, storage.n_threads) for damage in found]


def item_damages(
    storage: Storage, header: StoreHeader, record: ItemRecord, with_shards: bool
) -> list[Damage]:
    """Return the damage of one committed item.

    Args:
        storage: Storage of the store.
        header: Header of the store.
        record: Commit record of the item.
        with_shards: True to check the record and the item's shards, False to check only the record.

    Raises:
        StorageError: If an object store cannot be reached. The data may be intact.
        OSError: If a file is unreadable for a reason other than damage.
    """
    damages = _counts(header, record)
    for name in header.disk_arrays if with_shards else ():
        damages += _shard(storage, header, name, record)
    return damages


def _item(
    storage: Storage, header: StoreHeader, record: ItemRecord, with_shards: bool
) -> list[Damage]:
    """Return the damage of one item, counting an unreadable item as damaged."""
    try:
        return item_damages(storage, header, record, with_shards)
    except (FoundryError, OSError) as error:
        return [
            Damage(commit_log.record_name(record.item), f"cannot be read: {error}", record.item)
        ]


def _deleted(storage: Storage, damages: list[Damage]) -> int:
    """Check the cursor files, and return the item below which shards are deleted on purpose."""
    for name in consumer_names(storage):
        try:
            read_state(storage, name)
        except MissingDataError:
            continue  # unregistered since the files were listed
        except (FoundryError, OSError) as error:
            damages.append(Damage(f"{CONSUMERS}/{name}.json", str(error)))
    try:
        return read_deletion_mark(storage).below
    except (FoundryError, OSError) as error:
        damages.append(Damage(DELETION_MARK, str(error)))
        return 0


def _records(storage: Storage, header: StoreHeader, damages: list[Damage]) -> dict[int, ItemRecord]:
    """Return all readable records, and check that snapshots and record files agree."""
    records: dict[int, ItemRecord] = {}
    if not storage.is_folder(commit_log.LOG):
        damages.append(Damage(commit_log.LOG, "is missing"))
    else:
        for segment in commit_log.segments(storage):
            records |= _segment(storage, header, segment, damages)
    if header.finalised:
        segments = range(-(-header.n_items // commit_log.SEGMENT_ITEMS))
        for name in map(commit_log.snapshot_name, segments):
            if not storage.exists(name):
                damages.append(Damage(name, "is missing"))
        for item in sorted(set(range(header.n_items)) - set(records)):
            damages.append(Damage(commit_log.record_name(item), "is missing", item))
    return records


def _segment(
    storage: Storage, header: StoreHeader, segment: int, damages: list[Damage]
) -> dict[int, ItemRecord]:
    """Read the records of one segment, and check the record files against the snapshot."""
    records: dict[int, ItemRecord] = {}
    loose = commit_log.record_items(storage, segment)
    snapshot = commit_log.snapshot_name(segment)
    if storage.exists(snapshot):
        try:
            table = commit_log.read_snapshot(storage, header, segment)
        except (FoundryError, OSError) as error:
            damages.append(Damage(snapshot, str(error)))
        else:
            first = segment * commit_log.SEGMENT_ITEMS
            records = {first + i: from_row(header, first + i, row) for i, row in enumerate(table)}
            for item in sorted(set(records) - set(loose)):
                damages.append(Damage(commit_log.record_name(item), "is missing", item))
    for item in loose:
        try:
            record = from_row(header, item, commit_log.read_record(storage, header, item)[0])
        except (FoundryError, OSError) as error:
            damages.append(Damage(commit_log.record_name(item), str(error), item))
            continue
        if records.setdefault(item, record) != record:
            damages.append(
                Damage(commit_log.record_name(item), "differs from the segment's snapshot", item)
            )
    return records


def _valid_rows(
    storage: Storage, header: StoreHeader, records: dict[int, ItemRecord]
) -> list[Damage]:
    """Compare the array `valid_rows` with the commit log."""
    file = f"{VALID_ROWS}/c.0"
    try:
        found = storage.read(file, _VALID_ROWS_BYTES)
    except (FoundryError, OSError) as error:
        return [Damage(file, f"cannot be read: {error}")]
    rows = np.array([records[i].rows if i in records else -1 for i in range(header.n_items)])
    if -1 in rows or found == valid_rows_bytes(rows):
        return []
    return [Damage(file, "differs from the rows in the commit log")]


def _shard(storage: Storage, header: StoreHeader, name: str, record: ItemRecord) -> list[Damage]:
    """Check one shard file of an item."""
    layout = header.layout(name)
    committed = record.arrays[name]
    file = header.shard_file(name, record.item)
    try:
        shard = OpenShard(
            storage, file, layout, record.rows, committed.bytes, committed.tail_crc32c
        )
        damaged = shard.damaged_chunks()
    except DAMAGE as error:
        return [Damage(file, str(error), record.item)]
    return [Damage(file, "fails its checksum", record.item, chunk) for chunk in damaged]


def _counts(header: StoreHeader, record: ItemRecord) -> list[Damage]:
    """Check that the statistics of each hookpoint array cover rows × d_model values."""
    wrong = []
    for name, width in header.arrays.items():
        moments = record.arrays[name].statistics
        if moments is None or moments.count + moments.non_finite != record.rows * width:
            wrong.append(name)
    problem = f"has statistics of {wrong} that do not cover its {record.rows} rows"
    return [Damage(commit_log.record_name(record.item), problem, record.item)] if wrong else []
