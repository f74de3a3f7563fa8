"""Test the shuffled order: complete, repeatable, seekable, unaffected by a growing store."""

from __future__ import annotations

import itertools
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import ShuffledStream, Store, StoreWriter, open_store
from activation_store.errors import IncompleteStoreError, MissingDataError
from activation_store.reading.shuffle_order import Shuffle, permutation
from foundation.errors import ConfigError
from tests.support.store_cases import expected, item_columns, write_store

ARRAYS = {"model.layers.9": 6}
ROWS = [16, 5, 0, 16, 9, 16, 1, 16, 16, 3]
OPTIONS: dict[str, Any] = {"seed": 3, "batch_rows": 7, "window_items": 3, "buffer_rows": 10}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("stream") / "s"
    write_store(path, ROWS)
    return open_store(path)


def stream(store: Store, **options: Any) -> ShuffledStream:
    return ShuffledStream(store, ["model.layers.9", "token_id"], **{**OPTIONS, **options})


def tokens(source: ShuffledStream, count: int) -> list[list[int]]:
    batches = [source.next().arrays["token_id"].tolist() for _ in range(count)]
    source.close()
    return batches


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**70),
    batch_rows=st.integers(1, 98),
    window_items=st.integers(1, 12),
    buffer_rows=st.integers(1, 120),
    prefetch=st.booleans(),
)
def test_every_row_comes_once_in_an_epoch(store: Store, **options: Any) -> None:
    whole = expected(ROWS, ARRAYS)
    rows_of = dict(zip(whole["token_id"].tolist(), whole["model.layers.9"], strict=True))
    source = stream(store, **options)
    per_epoch = source.batches_per_epoch
    assert per_epoch == 98 // options["batch_rows"]
    for epoch in range(2):
        seen: list[int] = []
        for i in range(per_epoch):
            batch = source.next()
            assert batch.epoch == epoch
            assert batch.first_row == (epoch * per_epoch + i) * options["batch_rows"]
            ids = batch.arrays["token_id"].tolist()
            seen += ids
            np.testing.assert_array_equal(
                batch.arrays["model.layers.9"], np.stack([rows_of[i] for i in ids])
            )
        assert len(seen) == len(set(seen)) == per_epoch * options["batch_rows"]
        assert set(seen) <= set(rows_of)
    assert source.position == 2 * per_epoch
    source.close()


@settings(max_examples=40, deadline=None)
@given(positions=st.lists(st.integers(0, 50), min_size=1, max_size=4), prefetch=st.booleans())
def test_seek_equals_reading_up_to_the_position(
    store: Store, positions: list[int], prefetch: bool
) -> None:
    sequence = tokens(stream(store), 54)
    source = stream(store, prefetch=prefetch)
    for position in positions:
        source.seek(position)
        for i in range(position, position + 3):
            batch = source.next()
            assert batch.arrays["token_id"].tolist() == sequence[i]
            assert batch.first_row == i * 7 and batch.epoch == i // 14
    source.close()


@given(cuts=st.sets(st.integers(1, 6), min_size=1))
@settings(max_examples=10, deadline=None)
def test_slices_of_replicas_make_the_global_batch(store: Store, cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), 7]
    whole = tokens(stream(store), 30)
    parts = []
    for lo, hi in itertools.pairwise(edges):
        source = stream(store, rows=(lo, hi))
        assert source.next().first_row == lo
        source.seek(0)
        parts.append(tokens(source, 30))
    for i, batch in enumerate(whole):
        assert [token for part in parts for token in part[i]] == batch


def test_seeds_and_epochs_differ_and_repeat(store: Store) -> None:
    first = tokens(stream(store), 28)
    assert first == tokens(stream(store), 28)
    assert first != tokens(stream(store, seed=4), 28)
    epochs = [[token for batch in part for token in batch] for part in (first[:14], first[14:])]
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run must see the order of the version that started it."""
    assert permutation(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]
    shuffle = Shuffle(seed=0, chunk_rows=4, window_items=2, buffer_rows=8, batch_rows=3)
    assert shuffle.item_order(0, 5).tolist() == [0, 1, 2, 3, 4]
    assert shuffle.item_order(1, 5).tolist() == [0, 4, 3, 2, 1]
    blocks = list(shuffle.blocks(1, 0, 0, np.array([3, 1]), np.array([10, 4])))
    assert [block.chunks.tolist() for block in blocks] == [
        [[3, 0, 4], [3, 2, 2], [1, 0, 4]],
        [[3, 1, 4]],
    ]
    assert [(block.start, block.stop) for block in blocks] == [(0, 10), (10, 14)]
    assert [shuffle.row_order(block, 0, 3).tolist() for block in blocks] == [
        [0, 4, 7, 2, 5, 9, 3, 6, 8, 1],
        [1, 3, 0, 2],
    ]
    whole = replace(shuffle, batch_rows=1)
    assert whole.row_order(blocks[0], 0, 1).tolist() == [4, 0, 2, 7, 3, 5, 6, 9, 1, 8]


def test_blocks_mix_items_and_stay_in_their_window() -> None:
    shuffle = Shuffle(seed=5, chunk_rows=4, window_items=8, buffer_rows=64, batch_rows=16)
    items, rows = np.arange(8, 16), np.full(8, 64)
    blocks = list(shuffle.blocks(0, 1, 512, items, rows))
    assert [block.n_rows for block in blocks] == [64] * 8
    assert all(len(set(block.chunks[:, 0].tolist())) >= 5 for block in blocks)
    chunks = np.concatenate([block.chunks for block in blocks])
    assert sorted(map(tuple, chunks[:, :2].tolist())) == [(i, c) for i in items for c in range(16)]


@pytest.mark.parametrize("planned", [None, len(ROWS)])
def test_a_growing_store_gives_the_batches_of_the_finished_one(
    store: Store, tmp_path: Path, planned: int | None
) -> None:
    """One writer commits out of order while four replicas read on into the next epoch."""
    wanted = tokens(stream(store), 30)
    writer = write_store(tmp_path / "s", [], finalise=False, n_items=planned)

    def write() -> None:
        for item in (2, 0, 1, 5, 9, 4, 3, 8, 6, 7):
            time.sleep(0.03)
            writer.write_item(item, *item_columns(item, ROWS[item], ARRAYS))
        time.sleep(0.1)
        writer.finalise()

    got: dict[tuple[int, int], list[list[int]]] = {}
    shared = open_store(tmp_path / "s")  # two streams share a store, as two evaluations may

    def read(lo: int, hi: int, mine: Store) -> None:
        got[lo, hi] = tokens(stream(mine, rows=(lo, hi), wait_timeout_s=20), 30)

    slices = [(0, 1), (1, 3), (3, 6), (6, 7)]
    stores = [shared, shared, open_store(tmp_path / "s"), open_store(tmp_path / "s")]
    threads = [threading.Thread(target=write, daemon=True)] + [
        threading.Thread(target=read, args=(*part, mine), daemon=True)
        for part, mine in zip(slices, stores, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[token for part in slices for token in got[part][i]] for i in range(30)] == wanted


def test_a_window_waits_for_all_its_items(tmp_path: Path) -> None:
    """Items 0, 1 and 3 have enough rows for a batch, but window 0 lacks item 2."""
    writer = write_store(tmp_path / "s", [16] * 6, order=[0, 1, 3], finalise=False)
    source = stream(open_store(tmp_path / "s"), wait_timeout_s=0.2)
    with pytest.raises(IncompleteStoreError, match=r"window 0 needs items up to 2; .* has 2 items"):
        source.next()
    assert source.position == 0 and source.wait_s >= 0
    with pytest.raises(IncompleteStoreError, match="not finalised"):
        _ = source.batches_per_epoch
    writer.write_item(2, *item_columns(2, 16, ARRAYS))
    assert source.next().first_row == 0, "the same stream continues once the item is committed"
    for _ in range(5):
        source.next()
    with pytest.raises(IncompleteStoreError):
        source.next()
    source.close()


def test_rows_that_fill_no_batch_wait_for_the_end_of_the_store(tmp_path: Path) -> None:
    """Ten rows are committed; only the next item decides whether rows 7 to 13 are a batch."""
    write_store(tmp_path / "s", [10], finalise=False)
    first = stream(open_store(tmp_path / "s"), window_items=1, rows=(0, 3), wait_timeout_s=0.2)
    first.next()
    with pytest.raises(IncompleteStoreError, match="batch 1 needs 14 rows"):
        first.next()
    StoreWriter(tmp_path / "s").finalise()
    batch = first.next()
    assert (batch.epoch, batch.first_row) == (1, 7)


def test_waiting_is_counted(tmp_path: Path, store: Store) -> None:
    writer = write_store(tmp_path / "s", ROWS[:2], finalise=False)
    before = set(threading.enumerate())
    source = stream(open_store(tmp_path / "s"))
    timer = threading.Timer(0.4, writer.write_item, (2, *item_columns(2, 16, ARRAYS)))
    timer.start()
    source.next()
    assert 0.3 < source.wait_s < 5
    source.close()
    started = set(threading.enumerate()) - before
    assert not [thread for thread in started if thread.name == "activation-reader"]


def test_errors_of_the_reading_thread_are_raised_at_the_affected_batch(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [16] * 6)
    (tmp_path / "s" / "model.layers.9" / "c.4.0").unlink()
    source = stream(open_store(tmp_path / "s"), buffer_rows=48)
    for _ in range(6):  # window 0 is complete; its 48 rows hold six batches
        source.next()
    for _ in range(2):
        with pytest.raises(MissingDataError, match=r"c.4.0"):
            source.next()
    assert source.position == 6
    source.seek(0)
    assert source.next().first_row == 0


def test_invalid_settings_are_refused(store: Store) -> None:
    for options in (
        {"seed": -1},
        {"batch_rows": 0},
        {"window_items": 0},
        {"buffer_rows": 0},
        {"rows": (3, 3)},
        {"rows": (0, 8)},
        {"rows": (-1, 3)},
    ):
        with pytest.raises(ConfigError):
            stream(store, **options)
    with pytest.raises(ConfigError, match="arrays='nothing'"):
        ShuffledStream(store, ["nothing"], **OPTIONS)
    with pytest.raises(ConfigError, match="at most the store's 98 rows"):
        stream(store, batch_rows=99).next()
    with pytest.raises(ConfigError, match="position"):
        stream(store).seek(-1)


def test_more_shards_than_files_that_may_be_open(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tokens(stream(store), 28)
    monkeypatch.setattr("activation_store.reading.store.MAX_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    crowded = open_store(store.path)
    assert tokens(stream(crowded), 28) == wanted
    assert len(os.listdir("/proc/self/fd")) <= before + 2
