"""Writing a store: any number of processes, each item a whole shard of every array.

An item is committed in this order: shard files under temporary names, fsync, their place, fsync of
the folders, then the exclusively created record. A process may die anywhere in between: what has
no record does not exist, and the item is written again.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from activation_store import files, log
from activation_store.codec import EncodedShard, encode_shard
from activation_store.errors import (
    IncompleteStoreError,
    ItemError,
    MissingDataError,
    NonDeterministicItemError,
    StoreConfigError,
    StoreFormatError,
    StoreMismatchError,
)
from activation_store.header import (
    METADATA,
    UNPLANNED_ITEMS,
    VALID_ROWS,
    Calibration,
    StoreHeader,
    largest_chunk_rows,
)
from activation_store.metadata import (
    array_documents,
    dump,
    group_document,
    read_header,
    valid_rows_document,
)
from activation_store.record import ItemRecord, ShardRecord, from_row, measure

Columns = Mapping[str, NDArray[Any]]


class StoreWriter:
    """Creates a store, or opens the one that is there if it holds the same things.

    Many writers, in many processes, may hold one store at once.

    Args:
        path: Folder of the store.
        arrays: Hookpoint to d_model. None opens the store that exists, whatever it holds.
        dtype: bfloat16 or float32.
        shard_tokens: Rows of a full item.
        chunk_bytes: Most bytes of an inner chunk, unless a single row is larger.
        n_items: How many items there will be, if known. None does not compare.
        provenance: Where the rows come from: JSON values. None does not compare.
        calibration: Moments of each hookpoint. None does not compare.

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
    ) -> None:
        self.path = Path(path)
        if arrays is not None:
            wanted = _header(arrays, dtype, shard_tokens, chunk_bytes, n_items)
            wanted = replace(
                wanted,
                provenance=_as_json(provenance),
                calibration=dict(calibration) if calibration else None,
            )
            if not (self.path / METADATA).exists():
                _create(self.path, wanted)
        self.header = read_header(self.path)
        if arrays is not None:
            options = {"n_items": n_items, "provenance": provenance, "calibration": calibration}
            given = {key for key, value in options.items() if value is not None}
            _compare(self.path, self.header, wanted, given)

    def write_item(
        self, i: int, rows: NDArray[Any] | Columns, sidecars: Columns | None = None
    ) -> ItemRecord:
        """Commits item `i`; durable when it returns. The same bytes again do nothing.

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
        shards = {
            name: encode_shard(self.header.layout(name), column) for name, column in columns.items()
        }
        record = self._record(i, columns, shards)
        if self.is_committed(i):
            return self._same(record)
        if self.header.finalised:
            raise StoreMismatchError(
                f"{self.path} is finalised with items 0 to {self.header.n_items - 1}: "
                f"item {i} cannot be added; write to a new store"
            )
        self._place(i, shards)
        if not log.append(self.path, record):
            return self._same(record)
        log.snapshot_if_full(self.path, self.header, i // log.SEGMENT_ITEMS)
        return record

    def is_committed(self, i: int) -> bool:
        """Whether item `i` is durable, whoever wrote it."""
        return log.record_path(self.path, i).exists()

    def committed_items(self) -> set[int]:
        """All items that are durable now."""
        return log.CommitLog(self.path, self.header).items()

    def finalise(self) -> StoreHeader:
        """Trims the arrays to what was committed; nothing can be added after. May be repeated.

        Raises:
            IncompleteStoreError: An item below the last one (or the planned number) is missing.
        """
        self.header = read_header(self.path)
        if self.header.finalised:
            return self.header
        commits = log.CommitLog(self.path, self.header)
        table = commits.contiguous()
        items = commits.items()
        planned = self.header.planned_items
        last = max(items, default=-1) if planned == UNPLANNED_ITEMS else planned - 1
        missing = sorted(set(range(last + 1)) - items)
        if missing:
            raise IncompleteStoreError(
                f"{self.path} has {len(items)} of the items up to {last} but lacks "
                f"{len(missing)}: {_shorten(missing)}; write them, then finalise again"
            )
        final = replace(
            self.header,
            finalised=True,
            n_items=len(table),
            n_tokens=int(table["rows"].sum()),
        )
        for segment in range(-(-final.n_items // log.SEGMENT_ITEMS)):
            log.snapshot_if_full(self.path, final, segment)
        self._write_metadata(final, table["rows"])
        files.remove_stale(self.path)
        self.header = final
        return final

    def _write_metadata(self, final: StoreHeader, rows: NDArray[np.int64]) -> None:
        # The group goes last: until it says "finalised", readers accept trimmed and untrimmed.
        folder = self.path / VALID_ROWS
        folder.mkdir(exist_ok=True)
        files.fsync_folder(self.path)
        files.replace(self.path, folder / "c.0", encode_valid_rows(rows))
        files.replace(self.path, folder / METADATA, dump(valid_rows_document(final)))
        for name, document in array_documents(final, final.n_items).items():
            files.replace(self.path, self.path / name / METADATA, dump(document))
        files.replace(self.path, self.path / METADATA, dump(group_document(final)))

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

    def _record(self, i: int, columns: Columns, shards: Mapping[str, EncodedShard]) -> ItemRecord:
        arrays = {}
        for name, shard in shards.items():
            moments = measure(columns[name]) if name in self.header.arrays else None
            arrays[name] = ShardRecord(shard.n_bytes, shard.crc32c, shard.tail_crc32c, moments)
        n_rows = len(next(iter(columns.values())))
        return ItemRecord(i, str(uuid.uuid4()), n_rows, arrays)

    def _same(self, record: ItemRecord) -> ItemRecord:
        """The record of the attempt that was first, if this one gave the same bytes."""
        table = log.read_record(self.path, self.header, record.item)
        first = from_row(self.header, record.item, table[0])
        if not record.same_bytes(first):
            raise NonDeterministicItemError(
                f"item {record.item} of {self.path} is committed by attempt {first.attempt} with "
                f"other bytes: {_differing(first, record)}; items must be pure functions of their "
                "number (the first attempt's rows stay)"
            )
        return first

    def _place(self, i: int, shards: Mapping[str, EncodedShard]) -> None:
        for name, shard in shards.items():
            path = self.path / self.header.shard_file(name, i)
            temporary = files.write_temporary(self.path, shard.parts)
            if files.link_new(temporary, path) or _same_file(path, shard):
                continue
            # A worker taken for dead may come back late with other bytes. Its item may have been
            # committed meanwhile: those files are never touched. Without a record, what stands
            # here is a dead attempt's.
            if self.is_committed(i):
                raise NonDeterministicItemError(
                    f"item {i} of {self.path} was committed meanwhile, with other bytes of {name}"
                )
            os.rename(files.write_temporary(self.path, shard.parts), path)
        for name in shards:
            files.fsync_folder(self.path / name)


def encode_valid_rows(rows: NDArray[Any]) -> bytes:
    """The only chunk of the plain array `valid_rows`: int32 and its crc32c."""
    data = (rows if len(rows) else np.zeros(1)).astype("<i4").tobytes()
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def _header(
    arrays: Mapping[str, int], dtype: str, shard_tokens: int, chunk_bytes: int, n_items: int | None
) -> StoreHeader:
    if chunk_bytes < 1:
        raise StoreConfigError("chunk_bytes", chunk_bytes, "at least 1")
    planned = UNPLANNED_ITEMS if n_items is None else n_items
    widths = {name: int(width) for name, width in arrays.items()}
    header = StoreHeader(widths, dtype, shard_tokens, shard_tokens, planned, {})
    return replace(header, chunk_rows=largest_chunk_rows(arrays, dtype, shard_tokens, chunk_bytes))


def _as_json(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(provenance or {}), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise StoreConfigError("provenance", provenance, f"JSON values: {error}") from error


def _create(path: Path, header: StoreHeader) -> None:
    """Builds the empty store beside its place and moves it there: others see all of it or none."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if (path / METADATA).exists():
            return  # somebody else was faster
        raise StoreFormatError(
            f"{path} holds files but is no activation store; choose an empty or a new folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        for name in (files.TMP, log.LOG, *header.columns):
            (building / name).mkdir(parents=True)
        for name, document in array_documents(header, header.planned_items).items():
            files.replace(building, building / name / METADATA, dump(document))
        files.replace(building, building / METADATA, dump(group_document(header)))
        os.rename(building, path)
        files.fsync_folder(path.parent)
    except OSError:
        if not (path / METADATA).exists():  # else somebody else was faster
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _compare(path: Path, there: StoreHeader, wanted: StoreHeader, given: set[str]) -> None:
    found, asked = there.to_json(), wanted.to_json()
    keys = ["arrays", "dtype", "shard_tokens", "chunk_rows", "sidecars"]
    keys += ["planned_items"] * ("n_items" in given) + ["calibration"] * ("calibration" in given)
    pairs = [(key, found[key], asked[key]) for key in keys]
    if "provenance" in given:
        pairs += [
            (f"provenance.{key}", there.provenance.get(key), wanted.provenance.get(key))
            for key in sorted({*there.provenance, *wanted.provenance})
        ]
    lines = [
        f"  {key}: the store has {_shorten(old)}, wanted {_shorten(new)}"
        for key, old, new in pairs
        if old != new
    ]
    if lines:
        raise StoreMismatchError(
            f"{path} exists and differs:\n" + "\n".join(lines) + "\nchoose a new folder for a "
            "new store, or the values that this one was made with"
        )


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


def _same_file(path: Path, shard: EncodedShard) -> bool:
    crc32c = n_bytes = 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                crc32c, n_bytes = google_crc32c.extend(crc32c, block), n_bytes + len(block)
    except FileNotFoundError as error:
        raise MissingDataError(f"{path} was removed while it was being written") from error
    return (n_bytes, crc32c) == (shard.n_bytes, shard.crc32c)


def _differing(first: ItemRecord, second: ItemRecord) -> str:
    if first.rows != second.rows:
        return f"{first.rows} rows, now {second.rows}"
    names = [
        name
        for name, shard in first.arrays.items()
        if (shard.bytes, shard.crc32c) != (second.arrays[name].bytes, second.arrays[name].crc32c)
    ]
    return f"arrays {names}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
