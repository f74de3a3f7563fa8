"""Test looking up rows by number, and by document and position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from activation_store import Store, StoreWriter, find_documents, find_rows, open_store, take_rows
from activation_store.reading import store
from foundation.errors import ConfigError
from tests.support.store_cases import calibration

N_DOCUMENTS, N_POSITIONS, WIDTH = 9, 11, 5


@pytest.fixture(params=["none", "blosc", "int8"])
def scattered(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Scatter documents over items of unequal size, without position 3 of document 4."""
    document, position = (part.ravel() for part in np.indices((N_DOCUMENTS, N_POSITIONS)))
    kept = ~((document == 4) & (position == 3))
    order = np.random.default_rng(0).permutation(np.flatnonzero(kept))
    writer = StoreWriter(
        tmp_path / "s",
        {"a": WIDTH},
        "float32",
        shard_tokens=16,
        chunk_bytes=4 * 4 * WIDTH,
        codec=request.param,
        calibration=calibration({"a": WIDTH}),
    )
    sizes = [16, 7, 0, 16, 16, 16, 16, 11]
    for item, part in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
        columns = {"document": document[part], "position": position[part], "token_id": part}
        writer.write_item(item, rows_of(part), columns)
    writer.finalise()
    return open_store(tmp_path / "s")


def rows_of(number: np.ndarray) -> np.ndarray:
    return np.repeat((number % 7 - 3.0)[:, None], WIDTH, 1).astype(np.float32)


def test_the_rows_of_documents_are_found_in_order(scattered: Store) -> None:
    found = find_documents(scattered, [7, 4, 4, 99])
    pairs = list(zip(found.document.tolist(), found.position.tolist(), strict=True))
    wanted = [(d, p) for d in (4, 7) for p in range(N_POSITIONS) if (d, p) != (4, 3)]
    assert pairs == wanted
    numbers = take_rows(scattered, "token_id", found.rows)
    assert numbers.tolist() == [d * N_POSITIONS + p for d, p in wanted]
    rows = take_rows(scattered, "a", found.rows)
    np.testing.assert_allclose(rows, rows_of(numbers), atol=0.05)
    for i, row in enumerate(found.rows.tolist()):
        np.testing.assert_array_equal(rows[i], scattered.read("a", row, row + 1)[0])
    assert len(find_documents(scattered, [99]).rows) == len(find_documents(scattered, []).rows) == 0


def test_a_document_and_position_is_a_row(scattered: Store) -> None:
    rows = find_rows(scattered, [4, 8, 4, 8, 50], [3, 10, 2, 10, 0])
    assert rows[0] == rows[4] == -1 and rows[1] == rows[3]
    assert take_rows(scattered, "token_id", rows[1:4]).tolist() == [98, 46, 98]


def test_each_chunk_is_read_once(scattered: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = Store.read, []

    def note(self: Store, array: str, start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return read(self, array, start, stop)

    monkeypatch.setattr(store.Store, "read", note)
    numbers = np.random.default_rng(1).integers(0, scattered.n_tokens, 1000)
    rows = take_rows(scattered, "a", numbers)
    chunk = scattered.header.chunk_rows
    assert len(asked) == len(set(asked)) and max(b - a for a, b in asked) <= chunk
    np.testing.assert_array_equal(rows, read(scattered, "a", 0, scattered.n_tokens)[numbers])


def test_missing_rows_and_arrays_are_named(scattered: Store) -> None:
    with pytest.raises(ConfigError, match="rows=98: expected at least 0 and below 98"):
        take_rows(scattered, "a", [0, 98])
    with pytest.raises(ConfigError, match="rows=-1"):
        take_rows(scattered, "a", [-1])
    with pytest.raises(ConfigError, match="array='b'"):
        take_rows(scattered, "b", [0])
    assert take_rows(scattered, "a", []).shape == (0, WIDTH)
