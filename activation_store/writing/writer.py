"""Write a store from any number of processes, where each work item fills one shard of every array.

An item is committed in this order: write its shard files under temporary names, fsync the files,
move them to their final names, fsync the folders, and finally create the commit record exclusively.
In an object store, each file is a single put. A process may die at any point, because an item
without a record counts as missing and is written again.
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

from activation_store.checksum import crc32c
from activation_store.codecs.sharding import EncodedShard, encode_shard
from activation_store.errors import (
    CodecError,
    IncompleteStoreError,
    ItemError,
    MissingDataError,
    NonDeterministicItemError,
    StoreError,
    StoreMismatchError,
)
from activation_store.format import commit_log
from activation_store.format.calibration import Calibration
from activation_store.format.header import (
    METADATA,
    UNPLANNED_ITEMS,
    VALID_ROWS,
    StoreHeader,
)
from activation_store.format.item_record import (
    ItemRecord,
    ShardRecord,
    Statistics,
    from_row,
    measure,
)
from activation_store.format.zarr_json import (
    array_documents,
    dump,
    group_document,
    read_group,
    read_header,
    restore_documents,
    valid_rows_document,
)
from activation_store.reading.shard_reader import OpenShard
from activation_store.storage.open import open_storage
from activation_store.threads import run_all
from activation_store.writing.create import compare, create, plan_header, shorten

Columns = Mapping[str, NDArray[Any]]
Shards = Mapping[str, EncodedShard]


class StoreWriter:
    """Writer that creates a store, or opens an existing store that has the same settings.

    Many writers, in many processes, may write to one store concurrently. If `n_items`, `provenance`
    or `calibration` is None, it is not compared with the setting of an existing store.

    Args:
        path: Folder of the store, or s3://bucket/prefix.
        arrays: d_model of each hookpoint. If None, an existing store is opened and no settings are
            compared.
        dtype: Data type of the rows: bfloat16 or float32.
        shard_tokens: Maximum number of rows of an item.
        chunk_bytes: Maximum size in bytes of a chunk, unless a single row is larger.
        n_items: Number of items that will be written, or None if it is not known.
        provenance: Origin of the rows, as JSON values.
        calibration: Statistics of each hookpoint, which some codecs need.
        codec: A name in `CODECS`, such as none, blosc (lossless, smaller, slower) or int8 (half the
            size of bfloat16).

    Raises:
        ConfigError: If an argument is invalid.
        StoreMismatchError: If the existing store has different settings. The message lists them.
        StoreFormatError: If the folder holds files but no activation store.
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
        """Commit item `i`. The rows of the item are durable when this returns.

        Does nothing if the item is already committed with the same bytes. NumPy has no native
        bfloat16. To pass a bfloat16 torch tensor without copying it on the host, use
        `tensor.cpu().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)`.

        Args:
            i: Item number, below the planned number of items.
            rows: Rows of each hookpoint, [n, d_model] bfloat16 (ml_dtypes), float16 or float32 with
                n <= shard_tokens. They are rounded to the store's dtype. If the store has a single
                hookpoint, this may be the array itself.
            sidecars: token_id, document and position, [n] integers each. A missing sidecar is
                filled with -1.

        Returns:
            The commit record of the item.

        Raises:
            ItemError: If rows or sidecars have the wrong shape or dtype, or `i` is out of range.
            CodecError: If the codec does not encode rows as it declares.
            NonDeterministicItemError: If the item is already committed with different bytes.
            StoreMismatchError: If the store is finalised without this item.
        """
        columns = self._columns(i, rows, sidecars or {})
        n_rows = len(next(iter(columns.values())))
        shards = {
            name: encode_shard(self.header.layout(name), column)
            for name, column in self._encoded(columns).items()
        }
        if self.is_committed(i):
            return self._same(i, n_rows, shards)
        if self.header.finalised:
            raise StoreMismatchError(
                f"item {i} is out of range: {self.path} is finalised with {self.header.n_items} "
                "items, numbered from 0; write further items to a new store"
            )
        # Compute the statistics while the disk is writing.
        moments: dict[str, Statistics] = {}
        sums = [partial(_measure_into, moments, name, columns[name]) for name in self.header.arrays]
        with self._storage.lock(exclusive=False):
            run_all([partial(self._place, i, n_rows, shards), *sums])
            record = _record(i, n_rows, shards, moments)
            is_new = commit_log.append(self._storage, record)
        if not is_new:
            return self._same(i, n_rows, shards)
        commit_log.snapshot_if_full(self._storage, self.header, i // commit_log.SEGMENT_ITEMS)
        return record

    def _read_header(self) -> StoreHeader:
        """Read the header, after completing the metadata of a partially created store."""
        try:
            return read_header(self._storage)
        except MissingDataError:
            if self._storage.build_is_atomic:
                raise
        header, _ = read_group(self._storage)
        if not header.finalised:
            # In an object store, the group is created before the arrays. The process that creates
            # the store either has not finished yet or died. Write the missing metadata.
            restore_documents(self._storage, header)
        return read_header(self._storage)

    def is_committed(self, i: int) -> bool:
        """Return whether item `i` is committed, by this writer or any other."""
        return self._storage.exists(commit_log.record_name(i))

    def committed_items(self) -> set[int]:
        """Return all items that are committed now."""
        return commit_log.CommitLog(self._storage, self.header).items()

    def finalise(self) -> StoreHeader:
        """Trim the arrays to the committed items and close the store for writing.

        Does nothing if the store is already finalised.

        Raises:
            IncompleteStoreError: If a planned item is missing. If the number of items was not
                planned: if an item before the last committed item is missing.
        """
        self.header = read_header(self._storage)
        if self.header.finalised:
            return self.header
        commits = commit_log.CommitLog(self._storage, self.header)
        table = commits.contiguous()
        items = commits.items()
        planned = self.header.planned_items
        last = max(items, default=-1) if planned == UNPLANNED_ITEMS else planned - 1
        missing = sorted(set(range(last + 1)) - items)
        if missing:
            raise IncompleteStoreError(
                f"{self.path} needs items 0 to {last} but lacks {len(missing)}: "
                f"{shorten(missing)}; write them, then finalise again"
            )
        final = replace(
            self.header,
            finalised=True,
            n_items=len(table),
            n_tokens=int(table["rows"].sum()),
        )
        for segment in range(-(-final.n_items // commit_log.SEGMENT_ITEMS)):
            commit_log.snapshot_if_full(self._storage, final, segment)
        self._write_metadata(final, table["rows"])
        self._storage.remove_stale()
        self.header = final
        return final

    def _write_metadata(self, final: StoreHeader, rows: NDArray[np.int64]) -> None:
        """Write the trimmed metadata of a finalised store."""
        # Write the group's metadata last. Until it says "finalised", readers accept both trimmed
        # and untrimmed arrays, so a crash between two writes does no harm.
        storage = self._storage
        storage.make_folder(VALID_ROWS)
        storage.put(f"{VALID_ROWS}/c.0", [valid_rows_bytes(rows)])
        storage.put(f"{VALID_ROWS}/{METADATA}", [dump(valid_rows_document(final))])
        for name, document in array_documents(final, final.n_items).items():
            storage.put(f"{name}/{METADATA}", [dump(document)])
        storage.put(METADATA, [dump(group_document(final))])

    def _columns(self, i: int, rows: NDArray[Any] | Columns, sidecars: Columns) -> Columns:
        """Check the rows and sidecars of an item, and convert them to the store's data types."""
        header = self.header
        if not 0 <= i < header.planned_items:
            raise ItemError(f"item={i}: expected 0 to {header.planned_items - 1}")
        if isinstance(rows, np.ndarray):
            rows = (
                {next(iter(header.arrays)): rows}
                if len(header.arrays) == 1
                else {"(unnamed)": rows}
            )
        if set(rows) != set(header.arrays):
            raise ItemError(f"item {i} has rows of {list(rows)}: expected {list(header.arrays)}")
        unknown = set(sidecars) - set(header.sidecars)
        if unknown:
            raise ItemError(
                f"item {i} has unknown sidecars {sorted(unknown)}: expected only {header.sidecars}"
            )
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

    def _encoded(self, columns: Columns) -> Columns:
        """Return the columns as they are stored on disk, with the hookpoint arrays encoded."""
        stored = dict(columns)
        for name in self.header.arrays:
            row_codec = self.header.row_codec(name)
            if row_codec is not None:
                parts = [np.ascontiguousarray(part) for part in row_codec.encode(columns[name])]
                self._check_parts(name, len(columns[name]), parts)
                stored |= dict(zip(self.header.disk_names(name), parts, strict=True))
        return stored

    def _check_parts(self, name: str, n_rows: int, parts: list[NDArray[Any]]) -> None:
        """Check that a codec encoded rows to the arrays that it declares."""
        declared = [self.header.disk_arrays[part] for part in self.header.disk_names(name)]
        wanted = [(part.dtype, (n_rows, *part.row_shape)) for part in declared]
        found = [(part.dtype, part.shape) for part in parts]
        if found != wanted:
            raise CodecError(
                f"codec {self.header.codec} encoded {n_rows} rows of {name!r} as {found}: expected "
                f"{wanted}, as its disk_arrays() method declares"
            )

    def _same(self, i: int, n_rows: int, shards: Shards) -> ItemRecord:
        """Check that this attempt gave the same bytes as the first; return the first's record."""
        first = from_row(self.header, i, commit_log.read_record(self._storage, self.header, i)[0])
        if (first.rows, first.files()) != (n_rows, _files(shards)):
            raise NonDeterministicItemError(
                f"item {i} of {self.path} is already committed with different bytes by attempt "
                f"{first.attempt} (difference: {_differing(first, n_rows, shards)}); the first "
                "attempt is kept; make each item a pure function of its number"
            )
        return first

    def _place(self, i: int, n_rows: int, shards: Shards) -> None:
        """Write all shard files of an item to their final names, in parallel."""
        # Write in parallel, because a file system commits several files in the time it takes for
        # one.
        puts = [partial(self._place_one, i, n_rows, name, shard) for name, shard in shards.items()]
        run_all(puts, self._storage.n_threads)
        self._storage.sync(list(shards))

    def _place_one(self, i: int, n_rows: int, name: str, shard: EncodedShard) -> None:
        """Write one shard file, replacing any leftover file of a dead attempt."""
        file = self.header.shard_file(name, i)
        placed = self._storage.put_if_absent(file, shard.parts)
        if placed or self._same_file(file, n_rows, name, shard):
            return
        # A file with different bytes exists. A worker that was believed dead may return late, after
        # another attempt has committed its item, so never overwrite the files of a committed item.
        # If the item has no record, the file is left over from a dead attempt and may be replaced.
        if self.is_committed(i):
            raise NonDeterministicItemError(
                f"item {i} of {self.path} was committed by another attempt with different bytes of "
                f"{name}; make each item a pure function of its number"
            )
        self._storage.put(file, shard.parts)

    def _same_file(self, file: str, n_rows: int, name: str, shard: EncodedShard) -> bool:
        """Return whether the existing file has the same content as `shard`."""
        layout = self.header.layout(name)
        try:
            there = OpenShard(self._storage, file, layout, n_rows, shard.n_bytes, shard.tail_crc32c)
            return not there.damaged_chunks()
        except StoreError:
            return False


def valid_rows_bytes(rows: NDArray[Any]) -> bytes:
    """Return the only chunk of the unsharded array `valid_rows`: int32 values and a crc32c."""
    data = (rows if len(rows) else np.zeros(1)).astype("<i4").tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def _convert(i: int, name: str, given: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Check the data type and range of a column, and convert it to the store's data type."""
    if dtype.kind == "i":
        if given.dtype.kind not in "iu":
            raise ItemError(f"item {i}: {name} is {given.dtype}: expected an integer dtype")
        limits = np.iinfo(dtype)
        if len(given) and (int(given.min()) < limits.min or int(given.max()) > limits.max):
            raise ItemError(
                f"item {i}: {name} has values from {given.min()} to {given.max()}: expected values "
                f"that fit {dtype}"
            )
    elif given.dtype.name not in ("bfloat16", "float16", "float32"):
        raise ItemError(
            f"item {i}: {name} is {given.dtype}: expected bfloat16, float16 or float32; for raw "
            "bfloat16 bits, pass array.view(ml_dtypes.bfloat16)"
        )
    return np.ascontiguousarray(given.astype(dtype, copy=False))


def _measure_into(moments: dict[str, Statistics], name: str, rows: NDArray[Any]) -> None:
    moments[name] = measure(rows)


def _files(shards: Shards) -> dict[str, tuple[int, int]]:
    return {name: (shard.n_bytes, shard.tail_crc32c) for name, shard in shards.items()}


def _record(i: int, n_rows: int, shards: Shards, moments: Mapping[str, Statistics]) -> ItemRecord:
    """Build the commit record of an item, with a new attempt UUID."""
    arrays = {
        name: ShardRecord(shard.n_bytes, shard.tail_crc32c, moments.get(name))
        for name, shard in shards.items()
    }
    return ItemRecord(i, str(uuid.uuid4()), n_rows, arrays)


def _differing(first: ItemRecord, n_rows: int, shards: Shards) -> str:
    """Describe how this attempt differs from the committed attempt."""
    if first.rows != n_rows:
        return f"{first.rows} rows in the store, {n_rows} rows now"
    now = _files(shards)
    return f"arrays {[name for name, file in first.files().items() if file != now[name]]}"
