"""Create a new store, or compare an existing store with the requested settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from activation_store.errors import StoreMismatchError
from activation_store.format import commit_log
from activation_store.format.calibration import Calibration
from activation_store.format.header import (
    METADATA,
    UNPLANNED_ITEMS,
    StoreHeader,
    largest_chunk_rows,
)
from activation_store.format.zarr_json import array_documents, dump, group_document
from activation_store.storage.base import Storage
from foundation.errors import ConfigError


def plan_header(
    arrays: dict[str, int],
    dtype: str,
    shard_tokens: int,
    chunk_bytes: int,
    n_items: int | None,
    codec: str,
    calibration: Mapping[str, Calibration] | None,
    provenance: Mapping[str, Any] | None,
) -> StoreHeader:
    """Return the header of a new store. The arguments are the same as those of `StoreWriter`.

    Raises:
        ConfigError: If an argument is invalid.
    """
    if chunk_bytes < 1:
        raise ConfigError("chunk_bytes", chunk_bytes, "at least 1")
    header = StoreHeader(
        arrays={name: int(width) for name, width in arrays.items()},
        dtype=dtype,
        shard_tokens=shard_tokens,
        chunk_rows=shard_tokens,
        planned_items=UNPLANNED_ITEMS if n_items is None else n_items,
        provenance=_as_json(provenance),
        calibration=dict(calibration) if calibration else None,
        codec=codec,
    )
    row_bytes = max(header.disk_arrays[name].row_bytes for name in arrays)
    rows = largest_chunk_rows(row_bytes, shard_tokens, chunk_bytes)
    return replace(header, chunk_rows=rows)


def _as_json(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Convert provenance to the JSON values that readers will get; tuples become lists."""
    try:
        return dict(json.loads(json.dumps(dict(provenance or {}), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ConfigError("provenance", provenance, f"JSON values: {error}") from error


def create(storage: Storage, header: StoreHeader) -> None:
    """Create an empty store; do nothing if another process creates the store first.

    Raises:
        StoreFormatError: If the path holds files but no activation store.
    """
    documents = array_documents(header, header.planned_items)
    metadata = {f"{name}/{METADATA}": dump(document) for name, document in documents.items()}
    storage.build([commit_log.LOG, *documents], metadata, (METADATA, dump(group_document(header))))


def compare(path: object, there: StoreHeader, wanted: StoreHeader, given: set[str]) -> None:
    """Check that an existing store has the requested settings.

    Args:
        path: Path of the store, for the error message.
        there: Header of the existing store.
        wanted: Header that a new store would get.
        given: Those of n_items, calibration and provenance that the caller gave. The others are not
            compared.

    Raises:
        StoreMismatchError: If a setting differs. The message lists all differences.
    """
    found = there.to_json()
    asked = wanted.to_json()
    keys = ["arrays", "dtype", "codec", "shard_tokens", "chunk_rows", "sidecars"]
    keys += ["planned_items"] * ("n_items" in given) + ["calibration"] * ("calibration" in given)
    pairs = [(key, found[key], asked[key]) for key in keys]
    if "provenance" in given:
        pairs += [
            (f"provenance.{key}", there.provenance.get(key), wanted.provenance.get(key))
            for key in sorted({*there.provenance, *wanted.provenance})
        ]
    lines = [
        f"  {key}: the store has {shorten(old)}, requested {shorten(new)}"
        for key, old, new in pairs
        if old != new
    ]
    if lines:
        raise StoreMismatchError(
            f"{path} already exists with different settings:\n" + "\n".join(lines) + "\nuse a new "
            "folder, or the settings with which the existing store was created"
        )


def shorten(value: object) -> str:
    """Return the `repr` of a value, truncated to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
