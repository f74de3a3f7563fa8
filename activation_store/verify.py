"""Reading a whole store to say what of it is damaged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from activation_store import log
from activation_store.errors import StoreError
from activation_store.header import METADATA, VALID_ROWS, StoreHeader
from activation_store.metadata import read_header
from activation_store.parallel import run_all
from activation_store.record import ItemRecord, from_row
from activation_store.shard import OpenShard
from activation_store.writer import encode_valid_rows


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was committed."""

    file: str
    """Path inside the store."""
    problem: str
    item: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        chunk = "" if self.chunk is None else f", chunk {self.chunk}"
        return f"{self.file}{chunk}: {self.problem}"


def verify_store(path: str | Path) -> list[Damage]:
    """Reads every file of a store, finalised or growing; an empty list means that all is well.

    Damage is never raised: it is what this function is for. Files that no commit record names
    (a dead writer's) are not looked at.
    """
    root = Path(path)
    try:
        header = read_header(root)
    except (StoreError, OSError) as error:
        return [Damage(METADATA, str(error))]
    damages: list[Damage] = []
    records = _records(root, header, damages)
    if header.finalised:
        damages += _valid_rows(root, header, records)
    shards = [
        partial(_shard, root, header, name, record)
        for record in records.values()
        for name in header.stored
    ]
    for found in [_counts(root, header, record) for record in records.values()] + run_all(shards):
        damages += found
    return damages


def _records(root: Path, header: StoreHeader, damages: list[Damage]) -> dict[int, ItemRecord]:
    """Every record that can be read, from snapshots and loose files, which must agree."""
    records: dict[int, ItemRecord] = {}
    if not (root / log.LOG).is_dir():
        damages.append(Damage(log.LOG, "is missing"))
    else:
        for segment in log.segments(root):
            records |= _segment(root, header, segment, damages)
    if header.finalised:
        segments = range(-(-header.n_items // log.SEGMENT_ITEMS))
        for path in (log.snapshot_path(root, segment) for segment in segments):
            if not path.exists():
                damages.append(Damage(str(path.relative_to(root)), "is missing"))
        for item in sorted(set(range(header.n_items)) - set(records)):
            damages.append(Damage(_name(root, item), "is missing", item))
    return records


def _segment(
    root: Path, header: StoreHeader, segment: int, damages: list[Damage]
) -> dict[int, ItemRecord]:
    records: dict[int, ItemRecord] = {}
    loose = log.loose_items(root, segment)
    snapshot = log.snapshot_path(root, segment)
    if snapshot.exists():
        try:
            table = log.read_snapshot(root, header, segment)
        except (StoreError, OSError) as error:
            damages.append(Damage(str(snapshot.relative_to(root)), str(error)))
        else:
            first = segment * log.SEGMENT_ITEMS
            records = {first + i: from_row(header, first + i, row) for i, row in enumerate(table)}
            for item in sorted(set(records) - set(loose)):
                damages.append(Damage(_name(root, item), "is missing", item))
    for item in loose:
        try:
            record = from_row(header, item, log.read_record(root, header, item)[0])
        except (StoreError, OSError) as error:
            damages.append(Damage(_name(root, item), str(error), item))
            continue
        if records.setdefault(item, record) != record:
            damages.append(Damage(_name(root, item), "differs from the segment's snapshot", item))
    return records


def _name(root: Path, item: int) -> str:
    return str(log.record_path(root, item).relative_to(root))


def _valid_rows(root: Path, header: StoreHeader, records: dict[int, ItemRecord]) -> list[Damage]:
    file = f"{VALID_ROWS}/c.0"
    try:
        found = (root / file).read_bytes()
    except OSError as error:
        return [Damage(file, f"cannot be read: {error}")]
    rows = np.array([records[i].rows if i in records else -1 for i in range(header.n_items)])
    if -1 in rows or found == encode_valid_rows(rows):
        return []
    return [Damage(file, "does not hold the rows of the commit log")]


def _shard(root: Path, header: StoreHeader, name: str, record: ItemRecord) -> list[Damage]:
    layout, committed = header.layout(name), record.arrays[name]
    file = header.shard_file(name, record.item)
    try:
        shard = OpenShard(root / file, layout, record.rows, committed.bytes, committed.tail_crc32c)
        damaged = shard.damaged_chunks()
    except (StoreError, OSError) as error:
        return [Damage(file, str(error), record.item)]
    return [Damage(file, "fails its checksum", record.item, chunk) for chunk in damaged]


def _counts(root: Path, header: StoreHeader, record: ItemRecord) -> list[Damage]:
    """That the moments are of as many numbers as the rows have."""
    wrong = []
    for name, width in header.arrays.items():
        moments = record.arrays[name].statistics
        if moments is None or moments.count + moments.non_finite != record.rows * width:
            wrong.append(name)
    problem = f"has moments of another count of numbers than its {record.rows} rows: {wrong}"
    return [Damage(_name(root, record.item), problem, record.item)] if wrong else []
