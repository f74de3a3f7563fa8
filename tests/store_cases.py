"""Small stores for tests, and what must be read from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from activation_store import Calibration, StoreWriter
from activation_store.storage_local import CLAIM, LOCK

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
Columns = dict[str, NDArray[Any]]


def item_columns(item: int, n_rows: int, arrays: dict[str, int]) -> tuple[Columns, Columns]:
    """Rows and sidecars of one item: a pure function of its number, as a harvester's are."""
    rng = np.random.default_rng([7, item])
    rows = {
        name: rng.standard_normal((n_rows, width)).astype(np.float32)
        for name, width in arrays.items()
    }
    sidecars = {
        "token_id": item * 100_000 + np.arange(n_rows),  # tells every row of a store apart
        "document": np.full(n_rows, item) + 2**40,
        "position": np.arange(n_rows, dtype=np.int32),
    }
    return rows, sidecars


def calibration(arrays: dict[str, int]) -> dict[str, Calibration]:
    """About right for `item_columns`."""
    return {
        name: Calibration(np.linspace(-0.1, 0.1, width), np.linspace(0.9, 1.1, width), 1.0)
        for name, width in arrays.items()
    }


def write_store(
    path: Path,
    valid_rows: Sequence[int],
    order: Sequence[int] | None = None,
    arrays: dict[str, int] | None = None,
    finalise: bool = True,
    **options: Any,
) -> StoreWriter:
    """A store whose item i has valid_rows[i] rows, committed in `order`."""
    arrays = arrays or {"model.layers.9": 6}
    writer = StoreWriter(path, arrays, **{"shard_tokens": 16, "chunk_bytes": 48, **options})
    for item in range(len(valid_rows)) if order is None else order:
        writer.write_item(item, *item_columns(item, valid_rows[item], arrays))
    if finalise:
        writer.finalise()
    return writer


def expected(valid_rows: Sequence[int], arrays: dict[str, int], dtype: str = "bfloat16") -> Columns:
    """All logical rows of such a store, by array."""
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
    """Every file of a store but those that are only there to be locked."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (CLAIM, LOCK)
    }
