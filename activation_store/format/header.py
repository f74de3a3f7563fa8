"""The header of a store: array names and widths, shard sizes, codec and provenance."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from activation_store.checksum import crc32c
from activation_store.codecs.blosc import MOST_BYTES
from activation_store.codecs.sharding import ShardLayout
from foundation.errors import ConfigError

SCHEMA_VERSION = 1
METADATA = "zarr.json"
VALID_ROWS = "valid_rows"
UNPLANNED_ITEMS = 1_000_000
"""Number of items that the arrays are shaped for when the final number is not known in advance."""

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
}
SIDECARS: dict[str, np.dtype[Any]] = {
    "token_id": np.dtype("<i4"),
    "document": np.dtype("<i8"),
    "position": np.dtype("<i4"),
}

CODECS = ("none", "blosc", "int8")
"""Uncompressed; compressed losslessly with Blosc; quantised, see `quantise.py`."""
SCALE = ".scale"
"""Suffix that turns the name of an int8 array into the name of the array of its row scales."""

_MAX_ARRAYS = 1024
_MAX_D_MODEL = 1 << 20
_MAX_SHARD_TOKENS = 1 << 24
_MAX_SHARD_BYTES = 1 << 40
_MAX_CHUNKS = 1 << 16
_MAX_ITEMS = 100_000_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-@\[\]=,]{0,199}")
"""Names of arrays. Hookpoints such as `model.layers.9@input[head=3]` are valid names."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of one hookpoint's activations, measured on a sample before harvesting."""

    mean: NDArray[np.float64]
    """Mean of each channel, [d_model]."""
    std: NDArray[np.float64]
    """Standard deviation of each channel, [d_model]."""
    norm: float
    """Norm of the activations as the harvester defines it; stored but not used by this package."""

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as JSON numbers and lists."""
        mean = np.asarray(self.mean, np.float64).tolist()
        std = np.asarray(self.std, np.float64).tolist()
        return {"mean": mean, "std": std, "norm": float(self.norm)}


@dataclass(frozen=True)
class StoreHeader:
    """Description of a whole store; saved as attributes of its Zarr group.

    Raises:
        ConfigError: If a value is invalid; the message names it.
    """

    arrays: dict[str, int]
    """Hookpoint to d_model, in the order in which the store was created."""
    dtype: str
    """Data type of the rows that readers get: bfloat16 or float32."""
    shard_tokens: int
    """Rows per shard; item i has the Zarr rows [i * shard_tokens, (i + 1) * shard_tokens)."""
    chunk_rows: int
    """Rows per chunk, the same in every array; divides `shard_tokens`."""
    planned_items: int
    """Number of items that the arrays are shaped for; `UNPLANNED_ITEMS` if it is not known."""
    provenance: dict[str, Any]
    """Where the rows come from (model, dataset, ...), as JSON values."""
    calibration: dict[str, Calibration] | None = None
    """Hookpoint to its calibration; required for codec int8."""
    sidecars: tuple[str, ...] = tuple(SIDECARS)
    """Names of the per-row integer arrays that are stored next to the activations."""
    codec: str = "none"
    """How the hookpoint arrays are encoded: one of `CODECS`. Sidecars are never compressed."""
    finalised: bool = False
    """True once no more items can be added."""
    n_items: int = 0
    """Number of items of a finalised store; 0 before."""
    n_tokens: int = 0
    """Number of valid rows of a finalised store; 0 before."""
    schema_version: int = SCHEMA_VERSION
    """Version of the on-disk format."""

    def __post_init__(self) -> None:
        check_header(self)

    @property
    def columns(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Data type and row shape of every array and sidecar, as readers get them."""
        rows = {name: (DTYPES[self.dtype], (width,)) for name, width in self.arrays.items()}
        return {**rows, **{name: (SIDECARS[name], ()) for name in self.sidecars}}

    @property
    def stored(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Data type and row shape of every array on disk."""
        columns = self.columns
        if self.codec != "int8":
            return columns
        quantised = {name: (np.dtype(np.int8), columns[name][1]) for name in self.arrays}
        scales = {name + SCALE: (np.dtype("<f4"), ()) for name in self.arrays}
        return {**columns, **quantised, **scales}

    def disk_arrays_of(self, name: str) -> tuple[str, ...]:
        """Return the names of the arrays on disk that make up an array or sidecar."""
        quantised = self.codec == "int8" and name in self.arrays
        return (name, name + SCALE) if quantised else (name,)

    def layout(self, name: str) -> ShardLayout:
        """Return the sizes of a shard of an array on disk."""
        dtype, shape = self.stored[name]
        row_bytes = dtype.itemsize * math.prod(shape)
        compressed = self.codec == "blosc" and name in self.arrays
        return ShardLayout(
            self.shard_tokens, self.chunk_rows, row_bytes, dtype.itemsize, compressed
        )

    def shard_file(self, name: str, item: int) -> str:
        """Return the path of a shard, relative to the store."""
        return f"{name}/c.{item}.0" if name in self.arrays else f"{name}/c.{item}"

    def to_json(self) -> dict[str, Any]:
        """Return the header as JSON values, including a checksum of all of them."""
        document = {part.name: getattr(self, part.name) for part in fields(self)}
        document["arrays"] = {name: {"d_model": width} for name, width in self.arrays.items()}
        document["sidecars"] = list(self.sidecars)
        moments = {name: part.to_json() for name, part in (self.calibration or {}).items()}
        document["calibration"] = moments or None
        return {**document, "crc32c": header_checksum(document)}


def header_checksum(document: dict[str, Any]) -> int:
    """Return the checksum of a header document that has no `crc32c` key yet."""
    # Of the canonical form, not of the file: Zarr tools may rewrite zarr.json around the header.
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return crc32c(canonical.encode())


def largest_chunk_rows(
    arrays: Mapping[str, int], itemsize: int, shard_tokens: int, size: int
) -> int:
    """Rows of a chunk of at most `size` bytes: a power of two, lowered to divide `shard_tokens`."""
    row_bytes = max(arrays.values()) * itemsize
    rows = 1 << max(size // row_bytes, 1).bit_length() - 1
    return max(part for part in range(1, min(rows, shard_tokens) + 1) if shard_tokens % part == 0)


def check_header(header: StoreHeader) -> None:
    """Check every field of a header.

    Raises:
        ConfigError: If a value is invalid; the message names the first one.
    """

    def require(valid: bool, key: str, value: object, expected: str) -> None:
        if not valid:
            raise ConfigError(key, value, expected)

    require(header.dtype in DTYPES, "dtype", header.dtype, "bfloat16 or float32")
    require(header.codec in CODECS, "codec", header.codec, f"one of {CODECS}")
    require(0 < len(header.arrays) <= _MAX_ARRAYS, "arrays", len(header.arrays), "1 to 1024 names")
    reserved = {*SIDECARS, VALID_ROWS, METADATA}
    for name, width in header.arrays.items():
        named = bool(_NAME.fullmatch(name)) and ".." not in name and name not in reserved
        require(
            named, "arrays", name, "a name of letters, digits and any of _-.@[]=,, without '..'"
        )
        require(_in(width, 1, _MAX_D_MODEL), f"arrays[{name!r}]", width, "a d_model up to 2**20")
        scale = name + SCALE
        # With codec int8, the scales of `name` are stored in an array of this name.
        reason = f"another name: this one is reserved for the scales of {name!r}"
        require(scale not in header.arrays, "arrays", scale, reason)
    for key, value, largest in (
        ("shard_tokens", header.shard_tokens, _MAX_SHARD_TOKENS),
        ("planned_items", header.planned_items, _MAX_ITEMS),
        ("chunk_rows", header.chunk_rows, header.shard_tokens),
    ):
        require(_in(value, 1, largest), key, value, f"a whole number from 1 to {largest}")
    divides = header.shard_tokens % header.chunk_rows == 0
    require(divides, "chunk_rows", header.chunk_rows, f"a divisor of {header.shard_tokens}")
    n_chunks = header.shard_tokens // header.chunk_rows
    require(n_chunks <= _MAX_CHUNKS, "chunk_rows", header.chunk_rows, "at most 65536 chunks")
    n_bytes = header.shard_tokens * max(header.arrays.values()) * DTYPES[header.dtype].itemsize
    require(n_bytes <= _MAX_SHARD_BYTES, "shard_tokens", header.shard_tokens, "shards up to 1 TiB")
    fits = header.codec != "blosc" or n_bytes // n_chunks <= MOST_BYTES
    require(fits, "chunk_rows", header.chunk_rows, "chunks below 2 GiB, the limit of Blosc")
    require(header.sidecars == tuple(SIDECARS), "sidecars", header.sidecars, str(tuple(SIDECARS)))
    most = header.planned_items
    require(_in(header.n_items, 0, most), "n_items", header.n_items, f"0 to {most}")
    most = header.n_items * header.shard_tokens
    require(_in(header.n_tokens, 0, most), "n_tokens", header.n_tokens, f"0 to {most}")
    require(isinstance(header.provenance, dict), "provenance", header.provenance, "a dict")
    _check_calibration(header)


def _in(value: object, low: int, high: int) -> bool:
    """Return whether `value` is an int (not a bool) in [low, high]."""
    return type(value) is int and low <= value <= high


def _check_calibration(header: StoreHeader) -> None:
    """Check that the calibration matches the arrays, and that int8 has what it needs."""
    missing = sorted(set(header.arrays) - set(header.calibration or {}))
    if header.codec == "int8" and missing:
        raise ConfigError(
            "codec",
            "int8",
            f"a calibration of {missing}, whose mean and std int8 needs as scales",
            "pass calibration={name: Calibration(mean, std, norm)} to StoreWriter, or use codec "
            "none",
        )
    for name, part in (header.calibration or {}).items():
        key = f"calibration[{name!r}]"
        width = header.arrays.get(name)
        if width is None:
            raise ConfigError(key, name, f"one of {list(header.arrays)}")
        for column in ("mean", "std"):
            values = np.asarray(getattr(part, column), np.float64)
            if values.shape != (width,) or not np.isfinite(values).all():
                raise ConfigError(f"{key}.{column}", values, f"[{width}] finite numbers")
        if not math.isfinite(part.norm):
            raise ConfigError(f"{key}.norm", part.norm, "a finite number")
