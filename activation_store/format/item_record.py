"""Commit records: number of rows of an item, and size, checksum and statistics of its shards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import StoreFormatError
from activation_store.format.header import StoreHeader

SCHEMA_VERSION = 1
_BLOCK_VALUES = 1 << 16  # statistics are summed in blocks that fit into the CPU cache


@dataclass(frozen=True)
class Statistics:
    """Statistics of all values of some rows, in the store's dtype and before encoding.

    NaN and infinite values are excluded from all fields except `non_finite`.
    """

    count: int = 0
    """Number of finite values."""
    sum: float = 0.0
    sumsq: float = 0.0
    """Sum of squares."""
    absmax: float = 0.0
    """Largest absolute value."""
    non_finite: int = 0
    """Number of NaN and infinite values."""

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.count + other.count,
            self.sum + other.sum,
            self.sumsq + other.sumsq,
            max(self.absmax, other.absmax),
            self.non_finite + other.non_finite,
        )


def measure(rows: NDArray[Any]) -> Statistics:
    """Return the statistics of `rows` [n, d_model], bfloat16 or float32, summed in float64."""
    values = rows.reshape(-1)
    total = Statistics()
    for start in range(0, len(values), _BLOCK_VALUES):
        total += _measure_block(values[start : start + _BLOCK_VALUES])
    return total


def _measure_block(values: NDArray[Any]) -> Statistics:
    """Return the statistics of a block of values [n]."""
    # Work on the bits, because NumPy holds the GIL while it computes with bfloat16 values.
    bits = values.view(f"<u{values.itemsize}")
    sign = bits.dtype.type(1 << 8 * values.itemsize - 1)
    largest = (bits & ~sign).max(initial=0)
    wide = bits if values.itemsize == 4 else np.left_shift(bits, 16, dtype=np.uint32)
    block = wide.view(np.float32)
    n_bad = 0
    if not np.isfinite(_widen(largest)):
        finite = np.isfinite(block)
        n_bad = len(block) - int(np.count_nonzero(finite))
        block = block[finite]
        largest = np.abs(block).max(initial=0).view(np.uint32)
    numbers = block.astype(np.float64)
    # Do not use `numbers @ numbers`: BLAS would split this short sum over several threads. On a
    # busy machine, these wait for each other twenty times longer than the sum takes.
    sumsq = float(np.einsum("i,i->", numbers, numbers))
    return Statistics(len(block), float(numbers.sum()), sumsq, float(_widen(largest)), n_bad)


def _widen(bits: np.unsignedinteger[Any]) -> np.float32:
    """Convert the bits of a bfloat16 or float32 number to float32."""
    whole = np.uint32(bits) << np.uint32(16 if bits.itemsize == 2 else 0)
    return whole.view(np.float32)


@dataclass(frozen=True)
class ShardRecord:
    """Commit record of one shard file."""

    bytes: int
    """Size of the file."""
    tail_crc32c: int
    """Checksum of the last `ShardLayout.tail_bytes` bytes, which hold the checksums of all chunks.
    """
    statistics: Statistics | None = None
    """Statistics of a hookpoint array; None for sidecars."""

    def to_json(self) -> dict[str, Any]:
        """Return a flat JSON object, with the fields of the statistics next to the other fields."""
        document = asdict(self)
        statistics = document.pop("statistics")
        return {**document, **(statistics or {})}


@dataclass(frozen=True)
class ItemRecord:
    """Commit record of one item. Data without a record counts as missing."""

    item: int
    attempt: str
    """UUID of the attempt that committed the item."""
    rows: int
    """Number of valid rows, 0 to shard_tokens."""
    arrays: dict[str, ShardRecord]
    """Record of the item's shard of each array on disk, by array name."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of the item's record file."""
        arrays = {name: shard.to_json() for name, shard in self.arrays.items()}
        head = {"schema_version": SCHEMA_VERSION, "item": self.item}
        return {**head, "attempt": self.attempt, "rows": self.rows, "arrays": arrays}

    def files(self) -> dict[str, tuple[int, int]]:
        """Return the size and checksum of each file, which together identify the file's bytes."""
        return {name: (shard.bytes, shard.tail_crc32c) for name, shard in self.arrays.items()}


_STATISTICS = [(part.name, "<i8" if part.type == "int" else "<f8") for part in fields(Statistics)]
_FILE = [("bytes", "<i8"), ("tail_crc32c", "<u4")]


def row_dtype(header: StoreHeader) -> np.dtype[Any]:
    """Return the structured dtype of a table with one record per row.

    The rows are compact, so that a million records fit in memory.
    """
    shards = [
        (name, _FILE + _STATISTICS if name in header.arrays else _FILE)
        for name in header.disk_arrays
    ]
    return np.dtype([("present", "?"), ("attempt", "S36"), ("rows", "<i8"), *shards])


def to_row(record: ItemRecord, dtype: np.dtype[Any]) -> NDArray[np.void]:
    """Convert a record to one row [] of a table with data type `dtype`."""
    row = np.zeros((), dtype)
    row["present"] = True
    row["attempt"] = record.attempt.encode()
    row["rows"] = record.rows
    for name, shard in record.arrays.items():
        for key, value in shard.to_json().items():
            row[name][key] = value
    return row


def from_row(header: StoreHeader, item: int, row: Any) -> ItemRecord:
    """Convert a row of a table to a record. This is the inverse of `to_row`."""
    arrays = {}
    for name in header.disk_arrays:
        values = {key: row[name][key].item() for key in row.dtype[name].names}
        file = {key: values.pop(key) for key, _ in _FILE}
        arrays[name] = ShardRecord(**file, statistics=Statistics(**values) if values else None)
    return ItemRecord(item, row["attempt"].decode(), int(row["rows"]), arrays)


def parse_columns(header: StoreHeader, where: str, document: dict[str, Any]) -> NDArray[np.void]:
    """Convert {"rows": [n], "attempt": [n], "arrays": {name: {key: [n]}}} to a table [n].

    Args:
        header: Header of the store.
        where: Name of the file, for error messages.
        document: The columns.

    Raises:
        StoreFormatError: If a column is missing, has the wrong length or type, or holds impossible
            values, such as more rows than fit in a shard or a file size that does not match the
            number of rows.
    """
    try:
        rows = _integers(document["rows"])
        table = np.zeros(len(rows), row_dtype(header))
        table["present"] = True
        table["rows"] = rows
        if not ((rows >= 0) & (rows <= header.shard_tokens)).all():
            raise ValueError(f"rows={rows.tolist()}: expected 0 to {header.shard_tokens}")
        attempts = document["attempt"]
        if any(type(name) is not str or len(name) > 36 for name in attempts):
            raise ValueError("attempt must be a list of UUID strings")
        table["attempt"] = [name.encode("ascii") for name in attempts]
        if set(document["arrays"]) != set(header.disk_arrays):
            raise ValueError(
                f"arrays={list(document['arrays'])}: expected {list(header.disk_arrays)}"
            )
        for name in header.disk_arrays:
            _fill(header, name, table, document["arrays"][name])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StoreFormatError(
            f"{where} does not hold valid commit records: {error}; repair the store with "
            "stage=repair"
        ) from error
    return table


def _fill(header: StoreHeader, name: str, table: NDArray[np.void], columns: Any) -> None:
    """Check the types and values of one array's columns, and copy them into the table."""
    target = table[name]
    for key in target.dtype.names or ():
        integer = target.dtype[key].kind in "iu"
        values = _integers(columns[key]) if integer else np.array(columns[key], np.float64)
        if values.shape != table.shape or not np.isfinite(values).all():
            raise ValueError(
                f"{name}.{key} has shape {values.shape}: expected {table.shape} finite numbers"
            )
        if integer and not ((values >= 0) & (values <= np.iinfo(target.dtype[key]).max)).all():
            raise ValueError(f"{name}.{key} is out of range")
        target[key] = values
    layout = header.layout(name)
    pairs = zip(table["rows"].tolist(), target["bytes"].tolist(), strict=True)
    if not all(layout.is_valid_size(rows, n_bytes) for rows, n_bytes in pairs):
        raise ValueError(
            f"{name}.bytes={target['bytes'].tolist()} does not match the number of rows"
        )


def _integers(values: Any) -> NDArray[np.int64]:
    """Convert a JSON list of integers to an array, rejecting bools and floats."""
    if type(values) is not list or any(type(value) is not int for value in values):
        raise ValueError("expected a list of integers")
    return np.array(values, np.int64)
