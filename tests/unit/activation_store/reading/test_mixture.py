"""Test mixtures of stores: exact shares, one order for all replicas, seeking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import MixtureStream, Store, open_store
from activation_store.errors import DamagedDataError, IncompleteStoreError
from activation_store.reading.mixture import LONGEST_PERIOD, Shares
from foundation.errors import ConfigError
from tests.support.store_cases import calibration, expected, write_store

ARRAYS = {"a": 6}
ROWS = ([16, 5, 0, 16, 9], [16, 16, 2], [7])
OPTIONS: dict[str, Any] = {"seed": 3, "batch_rows": 9, "window_items": 3, "buffer_rows": 20}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    folder = tmp_path_factory.mktemp("mixture")
    for number, rows in enumerate(ROWS):
        write_store(folder / str(number), rows, arrays=ARRAYS)
    return [open_store(folder / str(number)) for number in range(len(ROWS))]


def mixture(stores: list[Store], weights: Sequence[float], **options: Any) -> MixtureStream:
    return MixtureStream(stores, weights, ["a", "token_id"], **{**OPTIONS, **options})


def batches(source: MixtureStream, count: int) -> list[list[int]]:
    got = [source.next().arrays["token_id"].tolist() for _ in range(count)]
    source.close()
    return got


@given(
    weights=st.lists(st.sampled_from([0.5, 1, 0.3, 7, 0.05, 1 / 3]), min_size=1, max_size=4),
    row=st.integers(0, 10**12),
    n=st.integers(0, 300),
)
@settings(max_examples=40, deadline=None)
def test_shares_are_exact_everywhere(weights: list[float], row: int, n: int) -> None:
    shares = Shares(weights)
    before, after = shares.rows_before(row), shares.rows_before(row + n)
    assert sum(before) == row
    sources = np.bincount(shares.sources(row, row + n), minlength=len(weights))
    assert (np.array(after) - before == sources).all()
    for count, weight in zip(before, weights, strict=True):
        wanted = row * weight / sum(weights)
        rounding = row / LONGEST_PERIOD if 1 / 3 in weights else 0
        assert abs(count - wanted) < 2 + rounding


def test_weights_are_taken_as_written() -> None:
    shares = Shares([0.7, 0.2, 0.1])
    assert shares.counts == [7, 2, 1]
    assert np.bincount(shares.sources(5, 25)).tolist() == [14, 4, 2]
    assert Shares([1, 1]).sources(0, 4).tolist() == [0, 1, 0, 1]
    assert sum(Shares([1 / 3, 1, 0.7]).counts) == LONGEST_PERIOD


@pytest.mark.parametrize("prefetch", [False, True])
def test_every_store_gives_each_row_once_an_epoch(stores: list[Store], prefetch: bool) -> None:
    truth = [
        dict(zip(e["token_id"].tolist(), e["a"], strict=True))
        for e in (expected(rows, ARRAYS) for rows in ROWS)
    ]
    source = mixture(stores, [3, 2, 1], prefetch=prefetch)
    seen: list[list[int]] = [[], [], []]
    for i in range(40):
        places = source.sources(i)
        batch = source.next()
        assert batch.first_row == i * 9
        for place, token, row in zip(
            places.tolist(), batch.arrays["token_id"].tolist(), batch.arrays["a"], strict=True
        ):
            seen[place].append(token)
            np.testing.assert_array_equal(row, truth[place][token])
    source.close()
    assert [len(tokens) for tokens in seen] == [180, 120, 60]
    for tokens, rows in zip(seen, ROWS, strict=True):
        n = sum(rows)
        for epoch in range(len(tokens) // n):
            assert len(set(tokens[epoch * n : (epoch + 1) * n])) == n
    assert seen[0][:46] != seen[0][46:92] and seen[0][:46] != sorted(seen[0][:46])


@settings(max_examples=20, deadline=None)
@given(positions=st.lists(st.integers(0, 50), min_size=1, max_size=4))
def test_seek_equals_reading_up_to_the_position(stores: list[Store], positions: list[int]) -> None:
    sequence = batches(mixture(stores, [0.5, 0.4, 0.1]), 54)
    source = mixture(stores, [0.5, 0.4, 0.1])
    for position in positions:
        source.seek(position)
        assert [source.next().arrays["token_id"].tolist() for _ in range(3)] == sequence[
            position : position + 3
        ]
        assert source.position == position + 3
    source.close()


def test_slices_of_replicas_make_the_global_batch(stores: list[Store]) -> None:
    whole = batches(mixture(stores, [5, 3, 1]), 30)
    parts = [
        batches(mixture(stores, [5, 3, 1], rows=rows), 30) for rows in ((0, 1), (1, 5), (5, 9))
    ]
    assert [[token for part in parts for token in part[i]] for i in range(30)] == whole


def test_codecs_may_differ_but_not_rows(stores: list[Store], tmp_path: Path) -> None:
    write_store(tmp_path / "q", [16], arrays=ARRAYS, codec="int8", calibration=calibration(ARRAYS))
    write_store(tmp_path / "w", [16], arrays={"a": 7})
    write_store(tmp_path / "f", [16], arrays=ARRAYS, dtype="float32")
    write_store(tmp_path / "b", [16], arrays={"b": 6})
    write_store(tmp_path / "g", [16], arrays=ARRAYS, finalise=False)
    write_store(tmp_path / "e", [], arrays=ARRAYS)
    source = mixture([stores[0], open_store(tmp_path / "q")], [1, 1])
    assert source.next().arrays["a"].shape == (9, 6)
    source.close()
    for name, error, words in (
        ("w", ConfigError, "w: a=.*7"),
        ("f", ConfigError, "f: a=.*float32"),
        ("b", ConfigError, "arrays='a'"),
        ("g", IncompleteStoreError, "g is not finalised"),
        ("e", ConfigError, "a store with at least one row"),
    ):
        with pytest.raises(error, match=words):
            mixture([stores[0], open_store(tmp_path / name)], [1, 1])


def test_invalid_settings_are_refused(stores: list[Store]) -> None:
    for weights in ([1, 1], [1, 1, 0], [1, 1, -1], [1, 1, float("nan")], [1, 1, 1e-9]):
        with pytest.raises(ConfigError, match="weights"):
            mixture(stores, weights)
    for options in ({"batch_rows": 0}, {"rows": (3, 3)}, {"rows": (0, 10)}, {"seed": -1}):
        with pytest.raises(ConfigError):
            mixture(stores, [1, 1, 1], **options)
    with pytest.raises(ConfigError, match="weights"):
        mixture([], [])
    with pytest.raises(ConfigError, match="position"):
        mixture(stores, [1, 1, 1]).seek(-1)


def test_damage_is_reported_and_keeps_the_position(stores: list[Store], tmp_path: Path) -> None:
    write_store(tmp_path / "s", [16], arrays=ARRAYS)
    file = tmp_path / "s" / "a" / "c.0.0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    source = mixture([stores[0], open_store(tmp_path / "s")], [1, 1])
    for _ in range(2):
        with pytest.raises(DamagedDataError, match=r"c.0.0: chunk 0"):
            source.next()
    assert source.position == 0
    source.close()
