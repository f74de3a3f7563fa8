"""Write and check the `zarr.json` files of a store, in the same form as zarr-python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from activation_store.codecs.registry import CODECS
from activation_store.errors import (
    DamagedDataError,
    MissingDataError,
    StoreFormatError,
    UnknownCodecError,
)
from activation_store.format.calibration import Calibration
from activation_store.format.header import (
    METADATA,
    SCHEMA_VERSION,
    VALID_ROWS,
    StoreHeader,
    header_checksum,
)
from activation_store.storage.base import Storage
from activation_store.storage.checksummed_json import parse_json

KEY = "activation_store"
_MAX_BYTES = 256 << 20
_ZARR_CODECS: list[dict[str, Any]] = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
_PLAIN = {"name": "bytes"}  # one-byte numbers have no byte order


def array_documents(header: StoreHeader, n_items: int) -> dict[str, dict[str, Any]]:
    """Return the `zarr.json` of every array on disk, shaped for `n_items` items."""
    return {name: _array_document(header, name, n_items) for name in header.disk_arrays}


def _array_document(header: StoreHeader, name: str, n_items: int) -> dict[str, Any]:
    part = header.disk_arrays[name]
    itemsize = part.dtype.itemsize
    packing = [part.compressor.metadata(itemsize)] if part.compressor else []
    sharding: dict[str, Any] = {
        "chunk_shape": [header.chunk_rows, *part.row_shape],
        "codecs": [_PLAIN if itemsize == 1 else _ZARR_CODECS[0], *packing, _ZARR_CODECS[1]],
        "index_codecs": _ZARR_CODECS,
        "index_location": "end",
    }
    document = array_document(
        part.dtype,
        [n_items * header.shard_tokens, *part.row_shape],
        [header.shard_tokens, *part.row_shape],
        [{"name": "sharding_indexed", "configuration": sharding}],
    )
    row_codec = header.row_codec(name) if name in header.arrays else None
    if row_codec is not None:
        document["attributes"] = row_codec.attributes(name)
    return document


def valid_rows_document(header: StoreHeader) -> dict[str, Any]:
    """Return the `zarr.json` of the unsharded array `valid_rows`: int32 [n_items] in one chunk."""
    return array_document(np.dtype("<i4"), [header.n_items], [max(header.n_items, 1)], _ZARR_CODECS)


def group_document(header: StoreHeader) -> dict[str, Any]:
    """Return the `zarr.json` of the group.

    If the store is finalised, the document includes consolidated metadata, which `zarr.open`
    prefers.
    """
    document: dict[str, Any] = {
        "attributes": {KEY: header.to_json()},
        "zarr_format": 3,
        "node_type": "group",
    }
    if header.finalised:
        metadata = array_documents(header, header.n_items)
        metadata[VALID_ROWS] = valid_rows_document(header)
        document["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": metadata,
        }
    return document


def array_document(
    dtype: np.dtype[Any], shape: list[int], chunks: list[int], codecs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return Zarr v3 array metadata with the keys that zarr-python writes."""
    return {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0 if dtype.kind in "iu" else 0.0,
        "codecs": codecs,
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def dump(document: Mapping[str, Any]) -> bytes:
    """Serialise a document to the bytes of a `zarr.json`."""
    return json.dumps(document, indent=1, allow_nan=False).encode()


def read_header(storage: Storage) -> StoreHeader:
    """Read the header of a store and check the Zarr metadata of all arrays against it.

    Raises:
        StoreFormatError: If `storage` does not hold an activation store, or if the store has
            another schema version, or invalid or contradictory metadata.
        UnknownCodecError: If the codec is not installed on this machine.
        MissingDataError: If the `zarr.json` of an array is missing.
        DamagedDataError: If the header fails its checksum.
    """
    header, group = read_group(storage)
    _agree(storage.where(METADATA), group_document(header), group, skip=("attributes",))
    for name, document in _expected(header).items():
        _check_document(storage, header, name, document)
    return header


def read_group(storage: Storage) -> tuple[StoreHeader, dict[str, Any]]:
    """Read the header and the group's `zarr.json`; raises the same errors as `read_header`."""
    where = storage.where(METADATA)
    try:
        data = storage.read(METADATA, _MAX_BYTES)
    except MissingDataError as error:
        raise StoreFormatError(
            f"{storage.path} is not an activation store: {where} not found; check the path, or "
            "create a store with StoreWriter"
        ) from error
    group = parse_json(where, data)
    attributes = group.get("attributes")
    document = attributes.get(KEY) if isinstance(attributes, dict) else None
    if not isinstance(document, dict):
        raise StoreFormatError(
            f"{where} has no attribute {KEY!r}: expected a Zarr group written by activation_store"
        )
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreFormatError(
            f"{where} has schema_version={version!r}: expected {SCHEMA_VERSION}; "
            "update latent-foundry if the store is newer"
        )
    try:
        crc32c = header_checksum({k: v for k, v in document.items() if k != "crc32c"})
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(f"{where} has an invalid header: {error}") from error
    if crc32c != document.get("crc32c"):
        raise DamagedDataError(
            f"{where}: the header fails its checksum; restore the file from a backup"
        )
    return _parse(where, document), group


def _parse(where: str, document: dict[str, Any]) -> StoreHeader:
    """Build the header from its JSON document."""
    codec = document.get("codec")
    if codec not in CODECS:
        raise UnknownCodecError(
            f"{where} has codec={codec!r}: expected one of: {', '.join(CODECS.names())}; install "
            f"the package that provides this codec, with an entry point in the group {CODECS.group}"
        )
    try:
        fields = {key: value for key, value in document.items() if key != "crc32c"}
        fields["arrays"] = {name: part["d_model"] for name, part in document["arrays"].items()}
        fields["sidecars"] = tuple(document["sidecars"])
        if fields["calibration"] is not None:
            fields["calibration"] = {
                name: Calibration(np.array(part["mean"]), np.array(part["std"]), part["norm"])
                for name, part in document["calibration"].items()
            }
        return StoreHeader(**fields)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreFormatError(f"{where} has an invalid header: {error}") from error


def _expected(header: StoreHeader) -> dict[str, dict[str, Any]]:
    """Return the expected `zarr.json` of every array in the current state of the store."""
    expected = array_documents(header, header.n_items)
    if header.finalised:
        expected[VALID_ROWS] = valid_rows_document(header)
    return expected


def _check_document(
    storage: Storage, header: StoreHeader, name: str, expected: dict[str, Any]
) -> None:
    """Check that the `zarr.json` of an array agrees with what the header implies.

    Raises:
        MissingDataError: If the file is missing.
        StoreFormatError: If the file is invalid or differs from `expected`.
    """
    file = f"{name}/{METADATA}"
    where = storage.where(file)
    found = parse_json(where, storage.read(file, _MAX_BYTES))
    if not header.finalised:  # an interrupted finalise may have trimmed some arrays already
        rows = _growing_rows(where, header, found.get("shape"))
        expected = {**expected, "shape": [rows, *expected["shape"][1:]]}
    _agree(where, expected, found)


def restore_documents(storage: Storage, header: StoreHeader) -> list[str]:
    """Rewrite each array's `zarr.json` if it is missing or damaged; return the names rewritten."""
    restored = []
    shaped = array_documents(header, header.n_items if header.finalised else header.planned_items)
    for name, document in _expected(header).items():
        try:
            _check_document(storage, header, name, document)
        except (MissingDataError, StoreFormatError):
            storage.make_folder(name)
            storage.put(f"{name}/{METADATA}", [dump(shaped.get(name, document))])
            restored.append(f"{name}/{METADATA}")
    return restored


def _growing_rows(where: str, header: StoreHeader, shape: Any) -> int:
    """Check the shape of an array in a growing store, and return its number of rows."""
    rows = shape[0] if isinstance(shape, list) and shape else None
    most = header.planned_items * header.shard_tokens
    if type(rows) is not int or not 0 <= rows <= most or rows % header.shard_tokens:
        raise StoreFormatError(
            f"{where} has shape={shape!r}: expected at most {most} rows, a multiple "
            f"of {header.shard_tokens}; repair the store with stage=repair, or restore the file "
            "from a backup"
        )
    return rows


def _agree(
    where: str, expected: dict[str, Any], found: dict[str, Any], skip: tuple[str, ...] = ()
) -> None:
    """Check that the file `where` has the expected values, except for the keys in `skip`."""
    for key, value in expected.items():
        if key not in skip and found.get(key) != value:
            there, wanted = (repr(part)[:300] for part in (found.get(key), value))
            raise StoreFormatError(
                f"{where} has {key}={there}: expected {wanted}; repair the store with "
                "stage=repair, or restore the file from a backup"
            )
