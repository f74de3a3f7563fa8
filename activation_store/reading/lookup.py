"""Random access to rows by row number or by document, as needed for feature pages.

The rows of a document are scattered over the store, because the harvest permutes rows before
writing them. Finding documents therefore reads the whole `document` sidecar once, regardless of the
number of documents. The sidecar has eight bytes per row, about a hundredth of the size of the
activations. Only the sidecars of a few items and the rows found are held in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from activation_store.reading.store import Store
from activation_store.threads import run_all
from foundation.errors import ConfigError

Ints = NDArray[np.int64]


class DocumentRows(NamedTuple):
    """Row numbers of some documents, ordered by document and position."""

    rows: Ints
    """Logical row numbers for `Store.read` and `take_rows`, [n]."""
    document: Ints
    """Document number of each row, [n]."""
    position: Ints
    """Position of each row in tokens from the start of the context, [n]."""


def find_documents(store: Store, documents: ArrayLike) -> DocumentRows:
    """Find all stored rows of some documents, ignoring documents that are not in the store.

    Args:
        store: Store to search, with the sidecars `document` and `position`. In a growing store,
            only committed rows are found.
        documents: [m] document numbers, as in the `document` sidecar.

    Raises:
        ConfigError: If the store lacks one of the two sidecars.
        DeletedDataError: If rows of the store were deleted.
        MissingDataError: If a shard file is missing; the message names the file.
        DamagedDataError: If a chunk fails its checksum; the message names the file and chunk.
    """
    for name in ("document", "position"):
        if name not in store.header.sidecars:
            raise ConfigError("sidecar", name, f"one of {list(store.header.sidecars)}")
    wanted = np.unique(np.asarray(documents, np.int64))
    ends = [0, *np.cumsum(store.valid_rows).tolist()]
    searches = [
        partial(_find_in, store, wanted, start, stop)
        for start, stop in pairwise(ends)
        if start < stop
    ]
    found = np.concatenate([np.zeros((3, 0), np.int64), *run_all(searches)], axis=1)
    rows, document, position = found[:, np.lexsort((found[2], found[1]))]
    return DocumentRows(rows, document, position)


def find_rows(store: Store, documents: Sequence[int], positions: Sequence[int]) -> Ints:
    """Find the logical row of each (document, position) pair.

    Raises the same errors as `find_documents`.

    Returns:
        [m] row numbers, with -1 for each pair that is not in the store, for example because the
        harvest drops the position or the text ends before it.
    """
    there = find_documents(store, documents)
    rows = dict(
        zip(
            zip(there.document.tolist(), there.position.tolist(), strict=True),
            there.rows.tolist(),
            strict=True,
        )
    )
    pairs = zip(map(int, documents), map(int, positions), strict=True)
    return np.array([rows.get(pair, -1) for pair in pairs], np.int64)


def take_rows(store: Store, array: str, rows: ArrayLike) -> NDArray[Any]:
    """Read arbitrary logical rows, reading each of the chunks that hold them only once.

    Args:
        store: Store to read from.
        array: Hookpoint or sidecar.
        rows: [n] row numbers in any order; repeated numbers are allowed.

    Returns:
        [n, d_model] for a hookpoint or [n] for a sidecar, in the order of `rows`.

    Raises:
        ConfigError: If the store has no such array, or a row number is out of range.
        DeletedDataError: If some of the rows were deleted.
        MissingDataError: If a shard file is missing; the message names the file.
        DamagedDataError: If a chunk fails its checksum; the message names the file and chunk.
    """
    if array not in store.header.columns:
        raise ConfigError("array", array, f"one of {list(store.header.columns)}")
    wanted = np.asarray(rows, np.int64)
    outside = wanted[(wanted < 0) | (wanted >= store.n_tokens)]
    if len(outside):
        raise ConfigError("rows", int(outside[0]), f"at least 0 and below {store.n_tokens}")
    dtype, shape = store.header.columns[array]
    out = np.empty((len(wanted), *shape), dtype)
    starts = np.concatenate([[0], np.cumsum(store.valid_rows)])
    item = np.searchsorted(starts, wanted, side="right") - 1
    chunk_rows = store.header.chunk_rows
    first = starts[item] + (wanted - starts[item]) // chunk_rows * chunk_rows
    last = np.minimum(first + chunk_rows, starts[item + 1])
    # Group the rows by the chunk [first, last) that holds them.
    order = np.argsort(first, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(first[order])) + 1) if len(order) else []

    def take(places: Ints) -> None:
        start, stop = int(first[places[0]]), int(last[places[0]])
        out[places] = store.read(array, start, stop)[wanted[places] - start]

    run_all([partial(take, places) for places in groups])
    return out


def _find_in(store: Store, wanted: Ints, start: int, stop: int) -> Ints:
    """Return an item's rows that belong to the wanted documents.

    Returns:
        [3, n]: logical row number, document and position of each row.
    """
    documents = store.read("document", start, stop)
    there = np.flatnonzero(np.isin(documents, wanted))
    if not len(there):
        return np.zeros((3, 0), np.int64)
    positions = store.read("position", start, stop)[there]
    return np.stack([start + there, documents[there], positions.astype(np.int64)])
