"""The header of a store: array names and widths, shard sizes, codec and provenance."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from activation_store.checksum import crc32c
from activation_store.codecs.base import SCALE, DiskArray, RowCodec
from activation_store.codecs.registry import CODECS
from activation_store.codecs.sharding import ShardLayout
from activation_store.format.calibration import Calibration
from foundation.errors import ConfigError

SCHEMA_VERSION = 1
METADATA = "zarr.json"
VALID_ROWS = "valid_rows"
UNPLANNED_ITEMS = 1_000_000
"""Number of items for which the arrays are shaped if the final number is not known in advance."""

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
}
SIDECARS: dict[str, np.dtype[Any]] = {
    "token_id": np.dtype("<i4"),
    "document": np.dtype("<i8"),
    "position": np.dtype("<i4"),
}

_MAX_ARRAYS = 1024
_MAX_D_MODEL = 1 << 20
_MAX_SHARD_TOKENS = 1 << 24
_MAX_SHARD_BYTES = 1 << 40
_MAX_CHUNKS = 1 << 16
_MAX_ITEMS = 100_000_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-@\[\]=,]{0,199}")
"""Pattern of array names. Hookpoints such as `model.layers.9@input[head=3]` are valid names."""


@dataclass(frozen=True)
class StoreHeader:
    """Description of a whole store, saved in the attributes of its Zarr group.

    Raises:
        ConfigError: If a value is invalid. The message names the field.
    """

    arrays: dict[str, int]
    """d_model of each hookpoint, in the order given when the store was created."""
    dtype: str
    """Data type of the rows that readers get: bfloat16 or float32."""
    shard_tokens: int
    """Rows per shard. Item i has the Zarr rows [i * shard_tokens, (i + 1) * shard_tokens)."""
    chunk_rows: int
    """Rows per chunk, the same in every array. Divides `shard_tokens`."""
    planned_items: int
    """Number of items for which the arrays are shaped; `UNPLANNED_ITEMS` if it is not known."""
    provenance: dict[str, Any]
    """Origin of the rows (model, dataset, ...), as JSON values."""
    calibration: dict[str, Calibration] | None = None
    """Calibration of each hookpoint. Some codecs, such as int8, need it."""
    sidecars: tuple[str, ...] = tuple(SIDECARS)
    """Names of the per-row integer arrays that are stored next to the activations."""
    codec: str = "none"
    """Name in `CODECS` of the codec of the hookpoint arrays. Sidecars are stored unchanged."""
    finalised: bool = False
    """True once no more items can be added."""
    n_items: int = 0
    """Number of items; 0 until the store is finalised."""
    n_tokens: int = 0
    """Number of valid rows; 0 until the store is finalised."""
    schema_version: int = SCHEMA_VERSION
    """Version of the on-disk format."""

    def __post_init__(self) -> None:
        check_header(self)

    @property
    def columns(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Data type and row shape of every array and sidecar, as readers get them."""
        rows = {name: (DTYPES[self.dtype], (width,)) for name, width in self.arrays.items()}
        return {**rows, **{name: (SIDECARS[name], ()) for name in self.sidecars}}

    @cached_property
    def disk_arrays(self) -> dict[str, DiskArray]:
        """All arrays on disk by name: hookpoints, then sidecars, then other arrays of the codec."""
        parts: dict[str, DiskArray] = {}
        for name in self.arrays:
            parts |= self._parts(name)
        hookpoints = {name: parts.pop(name) for name in self.arrays}
        sidecars = {name: DiskArray(SIDECARS[name], ()) for name in self.sidecars}
        return {**hookpoints, **sidecars, **parts}

    def disk_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the arrays on disk that make up a hookpoint array or sidecar."""
        return tuple(self._parts(name)) if name in self.arrays else (name,)

    def _parts(self, name: str) -> dict[str, DiskArray]:
        """Return the arrays on disk that make up a hookpoint array, its namesake first."""
        parts = CODECS[self.codec].disk_arrays(DTYPES[self.dtype], self.arrays[name])
        return {name + suffix: part for suffix, part in parts.items()}

    def row_codec(self, name: str) -> RowCodec | None:
        """Return the conversion of a hookpoint's rows, or None if they are stored unchanged."""
        calibration = (self.calibration or {}).get(name)
        return CODECS[self.codec].row_codec(DTYPES[self.dtype], self.arrays[name], calibration)

    def layout(self, name: str) -> ShardLayout:
        """Return the shard layout of an array on disk."""
        part = self.disk_arrays[name]
        return ShardLayout(
            self.shard_tokens, self.chunk_rows, part.row_bytes, part.dtype.itemsize, part.compressor
        )

    def shard_file(self, name: str, item: int) -> str:
        """Return the path of a shard, relative to the store."""
        return f"{name}/c.{item}" + ".0" * len(self.disk_arrays[name].row_shape)

    def to_json(self) -> dict[str, Any]:
        """Return the header as JSON values, including a checksum of all other values."""
        document = {part.name: getattr(self, part.name) for part in fields(self)}
        document["arrays"] = {name: {"d_model": width} for name, width in self.arrays.items()}
        document["sidecars"] = list(self.sidecars)
        moments = {name: part.to_json() for name, part in (self.calibration or {}).items()}
        document["calibration"] = moments or None
        return {**document, "crc32c": header_checksum(document)}


def header_checksum(document: dict[str, Any]) -> int:
    """Return the checksum of a header document that has no `crc32c` key yet."""
    # Hash the canonical form of the header and not the file, because Zarr tools may rewrite the
    # rest of zarr.json.
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return crc32c(canonical.encode())


def largest_chunk_rows(row_bytes: int, shard_tokens: int, size: int) -> int:
    """Return the number of rows per chunk.

    Let p be the largest power of two such that p rows fit in `size` bytes, or 1 if no row fits. The
    result is the largest divisor of `shard_tokens` that is at most p.
    """
    rows = 1 << max(size // row_bytes, 1).bit_length() - 1
    return max(part for part in range(1, min(rows, shard_tokens) + 1) if shard_tokens % part == 0)


def check_header(header: StoreHeader) -> None:
    """Check every field of a header.

    Raises:
        ConfigError: If a value is invalid. The message names the first invalid field.
    """
    _require(header.dtype in DTYPES, "dtype", header.dtype, "bfloat16 or float32")
    CODECS.check(header.codec, "codec")
    _require(0 < len(header.arrays) <= _MAX_ARRAYS, "arrays", len(header.arrays), "1 to 1024 names")
    reserved = {*SIDECARS, VALID_ROWS, METADATA}
    for name, width in header.arrays.items():
        named = bool(_NAME.fullmatch(name)) and ".." not in name and name not in reserved
        _require(
            named,
            "arrays",
            name,
            "a name of at most 200 letters, digits and '_-.@[]=,', starting with a letter or digit "
            f"and without '..', other than {sorted(reserved)}",
        )
        _require(
            _in(width, 1, _MAX_D_MODEL), f"arrays[{name!r}]", width, "a d_model from 1 to 2**20"
        )
    _check_disk_names(header, reserved)
    for key, value, largest in (
        ("shard_tokens", header.shard_tokens, _MAX_SHARD_TOKENS),
        ("planned_items", header.planned_items, _MAX_ITEMS),
        ("chunk_rows", header.chunk_rows, header.shard_tokens),
    ):
        _require(_in(value, 1, largest), key, value, f"a whole number from 1 to {largest}")
    divides = header.shard_tokens % header.chunk_rows == 0
    _require(divides, "chunk_rows", header.chunk_rows, f"a divisor of {header.shard_tokens}")
    n_chunks = header.shard_tokens // header.chunk_rows
    _require(
        n_chunks <= _MAX_CHUNKS,
        "chunk_rows",
        header.chunk_rows,
        "a size that gives at most 65536 chunks per shard",
    )
    n_bytes = header.shard_tokens * max(header.arrays.values()) * DTYPES[header.dtype].itemsize
    _require(
        n_bytes <= _MAX_SHARD_BYTES,
        "shard_tokens",
        header.shard_tokens,
        "a number of rows that gives shards of at most 1 TiB",
    )
    _require(header.sidecars == tuple(SIDECARS), "sidecars", header.sidecars, str(tuple(SIDECARS)))
    _check_chunk_sizes(header)
    most = header.planned_items
    _require(_in(header.n_items, 0, most), "n_items", header.n_items, f"0 to {most}")
    most = header.n_items * header.shard_tokens
    _require(_in(header.n_tokens, 0, most), "n_tokens", header.n_tokens, f"0 to {most}")
    _require(isinstance(header.provenance, dict), "provenance", header.provenance, "a dict")
    _check_calibration(header)


def _require(valid: bool, key: str, value: object, expected: str) -> None:
    """Raise a ConfigError unless `valid`."""
    if not valid:
        raise ConfigError(key, value, expected)


def _in(value: object, low: int, high: int) -> bool:
    """Return whether `value` is an int (not a bool) in [low, high]."""
    return type(value) is int and low <= value <= high


def _check_disk_names(header: StoreHeader, reserved: set[str]) -> None:
    """Check that all arrays on disk have different names."""
    taken = {*reserved, *header.arrays}
    for name in header.arrays:
        for part in dict.fromkeys([*header.disk_names(name)[1:], name + SCALE]):
            reason = f"another name: this one is reserved for arrays that codecs add to {name!r}"
            _require(part not in taken, "arrays", part, reason)
            taken.add(part)


def _check_chunk_sizes(header: StoreHeader) -> None:
    """Check that the codec can compress chunks of the header's size."""
    for part in header.disk_arrays.values():
        if part.compressor is not None:
            most = part.compressor.most_chunk_bytes
            expected = f"chunks of at most {most} bytes, the limit of codec {header.codec}"
            fits = header.chunk_rows * part.row_bytes <= most
            _require(fits, "chunk_rows", header.chunk_rows, expected)


def _check_calibration(header: StoreHeader) -> None:
    """Check that the calibration matches the arrays and contains what the codec needs."""
    missing = sorted(set(header.arrays) - set(header.calibration or {}))
    if CODECS[header.codec].needs_calibration and missing:
        raise ConfigError(
            "codec",
            header.codec,
            f"a calibration of {missing}, because {header.codec} scales by its mean and std",
            "pass calibration={name: Calibration(mean, std, norm)} to StoreWriter, or use codec "
            "none",
        )
    for name, part in (header.calibration or {}).items():
        key = f"calibration[{name!r}]"
        width = header.arrays.get(name)
        if width is None:
            raise ConfigError(key, name, f"one of {list(header.arrays)}")
        part.check(key, width)
