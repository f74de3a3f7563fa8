"""Small stores for tests, and the rows that reading them must return."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from activation_store import Calibration, StoreWriter
from activation_store.storage.local import COMMIT_LOCK, HARVEST_LOCK

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
Columns = dict[str, NDArray[Any]]


def item_columns(item: int, n_rows: int, arrays: dict[str, int]) -> tuple[Columns, Columns]:
    """Return an item's rows and sidecars, a pure function of its number, as in a harvest.

    Args:
        item: Number of the item.
        n_rows: Number of rows in the item.
        arrays: Array name -> width.

    Returns:
        (arrays [n_rows, width] float32, sidecars [n_rows]), each by name.
    """
    rng = np.random.default_rng([7, item])
    rows = {
        name: rng.standard_normal((n_rows, width)).astype(np.float32)
        for name, width in arrays.items()
    }
    sidecars = {
        "token_id": item * 100_000 + np.arange(n_rows),  # different for every row of a store
        "document": np.full(n_rows, item) + 2**40,
        "position": np.arange(n_rows, dtype=np.int32),
    }
    return rows, sidecars


def calibration(arrays: dict[str, int]) -> dict[str, Calibration]:
    """Return a calibration that roughly fits `item_columns`."""
    return {
        name: Calibration(np.linspace(-0.1, 0.1, width), np.linspace(0.9, 1.1, width), 1.0)
        for name, width in arrays.items()
    }


def write_store(
    path: Path | str,
    valid_rows: Sequence[int],
    order: Sequence[int] | None = None,
    arrays: dict[str, int] | None = None,
    finalise: bool = True,
    **options: Any,
) -> StoreWriter:
    """Write a store whose item i has valid_rows[i] rows.

    Args:
        path: Path or URL of the store.
        valid_rows: Number of rows in each item.
        order: Order in which items are committed. If None, by number. Items that are left out stay
            missing.
        arrays: Array name -> width. If None, one array of width 6.
        finalise: Whether to finalise the store.
        options: Arguments of `StoreWriter`.
    """
    arrays = arrays or {"model.layers.9": 6}
    writer = StoreWriter(path, arrays, **{"shard_tokens": 16, "chunk_bytes": 48, **options})
    for item in range(len(valid_rows)) if order is None else order:
        writer.write_item(item, *item_columns(item, valid_rows[item], arrays))
    if finalise:
        writer.finalise()
    return writer


def expected(valid_rows: Sequence[int], arrays: dict[str, int], dtype: str = "bfloat16") -> Columns:
    """Return, by name, all columns that must be read from a store that `write_store` wrote."""
    parts = [item_columns(item, n_rows, arrays) for item, n_rows in enumerate(valid_rows)]
    names = {**arrays, "token_id": 0, "document": 0, "position": 0}
    merged = {
        name: np.concatenate([{**rows, **sidecars}[name] for rows, sidecars in parts])
        for name in names
    }
    return {
        name: column.astype(DTYPES[dtype]) if name in arrays else column
        for name, column in merged.items()
    }


def tree(path: Path) -> dict[str, bytes]:
    """Return the contents of every file of a store, except its lock files."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (HARVEST_LOCK, COMMIT_LOCK)
    }
