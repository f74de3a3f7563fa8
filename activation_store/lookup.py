"""Random access: rows by their number, and the rows of documents, as feature pages need them.

Rows of a document lie scattered over the items, for pools are permuted before they are written.
Finding them reads the sidecar `document` once, however many documents are asked for: eight bytes a
row, about a hundredth of the activations; memory holds a few items' sidecars and what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from activation_store.errors import StoreConfigError
from activation_store.parallel import run_all
from activation_store.store import Store

Ints = NDArray[np.int64]


class DocumentRows(NamedTuple):
    """Where the rows of some documents are, ordered by document and position."""

    rows: Ints
    """[n]: logical rows, as `Store.read` and `take_rows` count them."""
    document: Ints
    """[n]."""
    position: Ints
    """[n]: tokens from the beginning of the context."""


def find_documents(store: Store, documents: ArrayLike) -> DocumentRows:
    """All stored rows of some documents; none of a document that the store does not hold.

    Args:
        store: With the sidecars `document` and `position`; of a growing one, what is committed.
        documents: [m] numbers as the sidecar has them.

    Raises:
        StoreConfigError: The store lacks a sidecar.
        DeletedDataError, MissingDataError, DamagedDataError: naming the file.
    """
    for name in ("document", "position"):
        if name not in store.header.sidecars:
            raise StoreConfigError("sidecar", name, f"one of {list(store.header.sidecars)}")
    wanted = np.unique(np.asarray(documents, np.int64))
    ends = [0, *np.cumsum(store.valid_rows).tolist()]
    searches = [
        partial(_find_in, store, wanted, start, stop)
        for start, stop in zip(ends[:-1], ends[1:], strict=True)
        if start < stop
    ]
    found = np.concatenate([np.zeros((3, 0), np.int64), *run_all(searches)], axis=1)
    rows, document, position = found[:, np.lexsort((found[2], found[1]))]
    return DocumentRows(rows, document, position)


def find_rows(store: Store, documents: Sequence[int], positions: Sequence[int]) -> Ints:
    """[m]: the logical row of each (document, position), -1 where the store holds none.

    A position may be missing because the harvest drops it, or because the text was cut there.
    Raises as `find_documents`.
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
    """Any logical rows of an array [n, d_model] or a sidecar [n], in the order asked for.

    Reads the chunks that hold them, each once, in groups of bounded size.

    Args:
        store: To read from.
        array: Hookpoint or sidecar.
        rows: [n], repeated ones allowed.

    Raises:
        StoreConfigError: No such array, or a row that the store does not have.
        DeletedDataError, MissingDataError, DamagedDataError: naming the file and the chunk.
    """
    if array not in store.header.columns:
        raise StoreConfigError("array", array, f"one of {list(store.header.columns)}")
    wanted = np.asarray(rows, np.int64)
    outside = wanted[(wanted < 0) | (wanted >= store.n_tokens)]
    if len(outside):
        raise StoreConfigError("rows", int(outside[0]), f"0 to {store.n_tokens - 1}")
    dtype, shape = store.header.columns[array]
    out = np.empty((len(wanted), *shape), dtype)
    starts = np.concatenate([[0], np.cumsum(store.valid_rows)])
    item = np.searchsorted(starts, wanted, side="right") - 1
    chunk_rows = store.header.chunk_rows
    first = starts[item] + (wanted - starts[item]) // chunk_rows * chunk_rows
    last = np.minimum(first + chunk_rows, starts[item + 1])
    order = np.argsort(first, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(first[order])) + 1) if len(order) else []

    def take(places: Ints) -> None:
        start, stop = int(first[places[0]]), int(last[places[0]])
        out[places] = store.read(array, start, stop)[wanted[places] - start]

    run_all([partial(take, places) for places in groups])
    return out


def _find_in(store: Store, wanted: Ints, start: int, stop: int) -> Ints:
    """[3, n]: row, document, position of those rows of an item whose document is wanted."""
    documents = store.read("document", start, stop)
    there = np.flatnonzero(np.isin(documents, wanted))
    if not len(there):
        return np.zeros((3, 0), np.int64)
    positions = store.read("position", start, stop)[there]
    return np.stack([start + there, documents[there], positions.astype(np.int64)])
