"""Writing a store: any number of processes, each item a whole shard of every array.

An item is committed in this order: shard files under temporary names, fsync, their place, fsync of
the folders, then the exclusively created record; in an object store each of them with one put. A
process may die anywhere in between: what has no record does not exist, and the item is written
again.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store import log
from activation_store.checksum import crc32c
from activation_store.codec import EncodedShard, encode_shard
from activation_store.creation import compare, create, plan_header, shorten
from activation_store.errors import (
    IncompleteStoreError,
    ItemError,
    MissingDataError,
    NonDeterministicItemError,
    StoreError,
    StoreMismatchError,
)
from activation_store.header import (
    METADATA,
    UNPLANNED_ITEMS,
    VALID_ROWS,
    Calibration,
    StoreHeader,
)
from activation_store.metadata import (
    array_documents,
    dump,
    group_document,
    read_group,
    read_header,
    restore_documents,
    valid_rows_document,
)
from activation_store.parallel import run_all
from activation_store.quantise import scaling
from activation_store.record import ItemRecord, ShardRecord, Statistics, from_row, measure
from activation_store.shard import OpenShard
from activation_store.storage import open_storage

Columns = Mapping[str, NDArray[Any]]
Shards = Mapping[str, EncodedShard]


class StoreWriter:
    """Creates a store, or opens the one that is there if it holds the same things.

    Many writers, in many processes, may hold one store at once.

    Args:
        path: Folder of the store, or s3://bucket/prefix.
        arrays: Hookpoint to d_model. None opens the store that exists, whatever it holds.
        dtype: bfloat16 or float32.
        shard_tokens: Rows of a full item.
        chunk_bytes: Most bytes of an inner chunk, unless a single row is larger.
        n_items: How many items there will be, if known. None does not compare.
        provenance: Where the rows come from: JSON values. None does not compare.
        calibration: Moments of each hookpoint. None does not compare.
        codec: none; blosc (lossless, smaller, slower); int8 (half of bfloat16, needs calibration).

    Raises:
        StoreConfigError: A value that cannot be.
        StoreMismatchError: The store that exists was made with other values; lists them.
        StoreFormatError: The folder holds something that is no store.
    """

    def __init__(
        self,
        path: str | Path,
        arrays: Mapping[str, int] | None = None,
        dtype: str = "bfloat16",
        shard_tokens: int = 8192,
        *,
        chunk_bytes: int = 1 << 20,
        n_items: int | None = None,
        provenance: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Calibration] | None = None,
        codec: str = "none",
    ) -> None:
        self._storage = open_storage(path)
        self.path = self._storage.path
        if arrays is not None:
            wanted = plan_header(
                dict(arrays),
                dtype,
                shard_tokens,
                chunk_bytes,
                n_items,
                codec,
                calibration,
                provenance,
            )
            if not self._storage.exists(METADATA):
                create(self._storage, wanted)
        self.header = self._read_header()
        if arrays is not None:
            options = {"n_items": n_items, "provenance": provenance, "calibration": calibration}
            given = {key for key, value in options.items() if value is not None}
            compare(self.path, self.header, wanted, given)

    def write_item(
        self, i: int, rows: NDArray[Any] | Columns, sidecars: Columns | None = None
    ) -> ItemRecord:
        """Commits item `i`; durable when it returns. The same bytes again do nothing.

        NumPy knows no bfloat16 of its own; a torch tensor of it goes without a copy of its numbers:
        `tensor.cpu().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)`.

        Args:
            i: Item number, below the planned number of items.
            rows: [n, d_model] bfloat16 (ml_dtypes), float16 or float32 for each hookpoint, or the
                array alone where there is one; n <= shard_tokens. Rounded to the store's dtype.
            sidecars: [n] integers of token_id, document, position; -1 where one is not given.

        Raises:
            ItemError: Rows or sidecars of another shape or type, or an item out of range.
            NonDeterministicItemError: The item is committed with other bytes.
            StoreMismatchError: The store is finalised and has no such item.
        """
        columns = self._columns(i, rows, sidecars or {})
        n_rows = len(next(iter(columns.values())))
        shards = {
            name: encode_shard(self.header.layout(name), column)
            for name, column in self._stored(columns).items()
        }
        if self.is_committed(i):
            return self._same(i, n_rows, shards)
        if self.header.finalised:
            raise StoreMismatchError(
                f"{self.path} is finalised with items 0 to {self.header.n_items - 1}: "
                f"item {i} cannot be added; write to a new store"
            )
        # The moments are summed while the disk works.
        moments: dict[str, Statistics] = {}
        sums = [partial(_measure_into, moments, name, columns[name]) for name in self.header.arrays]
        with self._storage.lock(exclusive=False):
            run_all([partial(self._place, i, n_rows, shards), *sums])
            record = _record(i, n_rows, shards, moments)
            is_new = log.append(self._storage, record)
        if not is_new:
            return self._same(i, n_rows, shards)
        log.snapshot_if_full(self._storage, self.header, i // log.SEGMENT_ITEMS)
        return record

    def _read_header(self) -> StoreHeader:
        try:
            return read_header(self._storage)
        except MissingDataError:
            if self._storage.build_is_atomic:
                raise
        header, _ = read_group(self._storage)
        if not header.finalised:  # whoever made the store is not done, or never will be
            restore_documents(self._storage, header)
        return read_header(self._storage)

    def is_committed(self, i: int) -> bool:
        """Whether item `i` is durable, whoever wrote it."""
        return self._storage.exists(log.record_name(i))

    def committed_items(self) -> set[int]:
        """All items that are durable now."""
        return log.CommitLog(self._storage, self.header).items()

    def finalise(self) -> StoreHeader:
        """Trims the arrays to what was committed; nothing can be added after. May be repeated.

        Raises:
            IncompleteStoreError: An item below the last one (or the planned number) is missing.
        """
        self.header = read_header(self._storage)
        if self.header.finalised:
            return self.header
        commits = log.CommitLog(self._storage, self.header)
        table = commits.contiguous()
        items = commits.items()
        planned = self.header.planned_items
        last = max(items, default=-1) if planned == UNPLANNED_ITEMS else planned - 1
        missing = sorted(set(range(last + 1)) - items)
        if missing:
            raise IncompleteStoreError(
                f"{self.path} has {len(items)} of the items up to {last} but lacks "
                f"{len(missing)}: {shorten(missing)}; write them, then finalise again"
            )
        final = replace(
            self.header,
            finalised=True,
            n_items=len(table),
            n_tokens=int(table["rows"].sum()),
        )
        for segment in range(-(-final.n_items // log.SEGMENT_ITEMS)):
            log.snapshot_if_full(self._storage, final, segment)
        self._write_metadata(final, table["rows"])
        self._storage.remove_stale()
        self.header = final
        return final

    def _write_metadata(self, final: StoreHeader, rows: NDArray[np.int64]) -> None:
        # The group goes last: until it says "finalised", readers accept trimmed and untrimmed.
        storage = self._storage
        storage.make_folder(VALID_ROWS)
        storage.put(f"{VALID_ROWS}/c.0", [valid_rows_bytes(rows)])
        storage.put(f"{VALID_ROWS}/{METADATA}", [dump(valid_rows_document(final))])
        for name, document in array_documents(final, final.n_items).items():
            storage.put(f"{name}/{METADATA}", [dump(document)])
        storage.put(METADATA, [dump(group_document(final))])

    def _columns(self, i: int, rows: NDArray[Any] | Columns, sidecars: Columns) -> Columns:
        header = self.header
        if not 0 <= i < header.planned_items:
            raise ItemError(f"item={i}: expected 0 to {header.planned_items - 1}")
        if isinstance(rows, np.ndarray):
            rows = {next(iter(header.arrays)): rows} if len(header.arrays) == 1 else {"?": rows}
        if set(rows) != set(header.arrays):
            raise ItemError(f"item {i} has rows of {list(rows)}: expected {list(header.arrays)}")
        unknown = set(sidecars) - set(header.sidecars)
        if unknown:
            raise ItemError(f"item {i} has sidecars {sorted(unknown)}: know {header.sidecars}")
        n_rows = len(next(iter(rows.values())))
        if n_rows > header.shard_tokens:
            raise ItemError(
                f"item {i} has {n_rows} rows: expected at most shard_tokens={header.shard_tokens}"
            )
        columns = {}
        for name, (dtype, shape) in header.columns.items():
            given = rows.get(name) if name in header.arrays else sidecars.get(name)
            if given is None:
                given = np.full((n_rows, *shape), -1, dtype)
            if given.shape != (n_rows, *shape):
                raise ItemError(
                    f"item {i}: {name} has shape {given.shape}: expected {(n_rows, *shape)}"
                )
            columns[name] = _convert(i, name, given, dtype)
        return columns

    def _stored(self, columns: Columns) -> Columns:
        """The columns as they lie on disk."""
        if self.header.codec != "int8":
            return columns
        stored = dict(columns)
        for name in self.header.arrays:
            pair = scaling(self.header, name).quantise(columns[name])
            stored |= dict(zip(self.header.stored_as(name), pair, strict=True))
        return stored

    def _same(self, i: int, n_rows: int, shards: Shards) -> ItemRecord:
        """The record of the attempt that was first, if this one gave the same bytes."""
        first = from_row(self.header, i, log.read_record(self._storage, self.header, i)[0])
        if (first.rows, first.files()) != (n_rows, _files(shards)):
            raise NonDeterministicItemError(
                f"item {i} of {self.path} is committed by attempt {first.attempt} with other "
                f"bytes: {_differing(first, n_rows, shards)}; items must be pure functions of "
                "their number (the first attempt's rows stay)"
            )
        return first

    def _place(self, i: int, n_rows: int, shards: Shards) -> None:
        # Side by side: a file system commits several files in the time it takes for one.
        puts = [partial(self._place_one, i, n_rows, name, shard) for name, shard in shards.items()]
        run_all(puts, self._storage.n_threads)
        self._storage.sync(list(shards))

    def _place_one(self, i: int, n_rows: int, name: str, shard: EncodedShard) -> None:
        file = self.header.shard_file(name, i)
        placed = self._storage.put_if_absent(file, shard.parts)
        if placed or self._same_file(file, n_rows, name, shard):
            return
        # A worker taken for dead may come back late with other bytes. Its item may have been
        # committed meanwhile: those files are never touched. Without a record, what stands
        # here is a dead attempt's.
        if self.is_committed(i):
            raise NonDeterministicItemError(
                f"item {i} of {self.path} was committed meanwhile, with other bytes of {name}"
            )
        self._storage.put(file, shard.parts)

    def _same_file(self, file: str, n_rows: int, name: str, shard: EncodedShard) -> bool:
        layout = self.header.layout(name)
        try:
            there = OpenShard(self._storage, file, layout, n_rows, shard.n_bytes, shard.tail_crc32c)
            return not there.damaged_chunks()
        except StoreError:
            return False


def valid_rows_bytes(rows: NDArray[Any]) -> bytes:
    """The only chunk of the plain array `valid_rows`: int32 and its crc32c."""
    data = (rows if len(rows) else np.zeros(1)).astype("<i4").tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def _convert(i: int, name: str, given: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind == "i":
        if given.dtype.kind not in "iu":
            raise ItemError(f"item {i}: {name} is {given.dtype}: expected whole numbers")
        limits = np.iinfo(dtype)
        if len(given) and (int(given.min()) < limits.min or int(given.max()) > limits.max):
            raise ItemError(
                f"item {i}: {name} spans {given.min()} to {given.max()}: expected {dtype}"
            )
    elif given.dtype.name not in ("bfloat16", "float16", "float32"):
        raise ItemError(
            f"item {i}: {name} is {given.dtype}: expected bfloat16, float16 or float32 "
            "(bit patterns are told apart by .view(ml_dtypes.bfloat16))"
        )
    return np.ascontiguousarray(given.astype(dtype, copy=False))


def _measure_into(moments: dict[str, Statistics], name: str, rows: NDArray[Any]) -> None:
    moments[name] = measure(rows)


def _files(shards: Shards) -> dict[str, tuple[int, int]]:
    return {name: (shard.n_bytes, shard.tail_crc32c) for name, shard in shards.items()}


def _record(i: int, n_rows: int, shards: Shards, moments: Mapping[str, Statistics]) -> ItemRecord:
    arrays = {
        name: ShardRecord(shard.n_bytes, shard.tail_crc32c, moments.get(name))
        for name, shard in shards.items()
    }
    return ItemRecord(i, str(uuid.uuid4()), n_rows, arrays)


def _differing(first: ItemRecord, n_rows: int, shards: Shards) -> str:
    if first.rows != n_rows:
        return f"{first.rows} rows, now {n_rows}"
    now = _files(shards)
    return f"arrays {[name for name, file in first.files().items() if file != now[name]]}"
