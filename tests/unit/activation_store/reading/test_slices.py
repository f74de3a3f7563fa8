"""Test that readers of different slices of every batch read different chunks."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import ShuffledStream, Store, open_store
from activation_store.reading.shard_reader import OpenShard, Wanted
from activation_store.reading.shuffle_order import Block, Shuffle
from activation_store.storage.atomic_files import Bytes
from tests.support.store_cases import write_store

ROWS_OF_A_BLOCK = 64
OPTIONS: dict[str, Any] = {"seed": 3, "batch_rows": 16, "window_items": 4}


@pytest.fixture(scope="module")
def whole_chunks(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Write sixteen items of sixteen rows in chunks of four."""
    path = tmp_path_factory.mktemp("slices") / "s"
    write_store(path, [16] * 16, arrays={"a": 6})
    return open_store(path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Count the reads of each chunk, keyed by (file, chunk)."""
    counted: Counter[tuple[str, int]] = Counter()
    read_run = OpenShard.read_run

    def counting(shard: OpenShard, run: list[Wanted], targets: list[Bytes]) -> None:
        counted.update((shard.path, part.chunk) for part in run)
        read_run(shard, run, targets)

    monkeypatch.setattr(OpenShard, "read_run", counting)
    return counted


def read_epoch(store: Store, rows: tuple[int, int], **options: Any) -> None:
    options = {**OPTIONS, "buffer_rows": ROWS_OF_A_BLOCK, "prefetch": False, **options}
    stream = ShuffledStream(store, ["a"], rows=rows, **options)
    for _ in range(stream.batches_per_epoch):
        stream.next()
    stream.close()


@pytest.mark.parametrize("readers", [1, 2, 4, 8, 16])
def test_every_chunk_is_read_by_one_reader(
    whole_chunks: Store, reads: Counter[tuple[str, int]], readers: int
) -> None:
    share = 16 // readers
    for reader in range(readers):
        before = reads.total()
        read_epoch(whole_chunks, (reader * share, (reader + 1) * share))
        assert reads.total() - before == 64 // readers
    assert len(reads) == 64 and set(reads.values()) == {1}


@pytest.mark.parametrize("cuts", [(0, 5, 10, 16), (0, 16), (0, 1, 16)])
def test_only_a_chunk_where_strips_meet_is_read_twice(
    tmp_path: Path, reads: Counter[tuple[str, int]], cuts: tuple[int, ...]
) -> None:
    """With items of any length, the edges of chunks and strips do not coincide."""
    n_rows = np.random.default_rng(0).integers(1, 17, 24)
    write_store(tmp_path / "s", n_rows.tolist(), arrays={"a": 6})
    store = open_store(tmp_path / "s")
    n_chunks, n_blocks = int((-(-n_rows // 4)).sum()), -(-int(n_rows.sum()) // ROWS_OF_A_BLOCK) + 6
    for rows in itertools.pairwise(cuts):
        read_epoch(store, rows)
    assert len(reads) == n_chunks
    assert reads.total() <= n_chunks + (len(cuts) - 2) * n_blocks


@given(
    start=st.integers(0, 300),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    batch_rows=st.integers(1, 60),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_strips_are_equal_and_slices_of_one_order(
    start: int, chunks: list[int], batch_rows: int, data: st.DataObject
) -> None:
    rows = np.array([(0, number, size) for number, size in enumerate(chunks)], np.int64)
    block = Block(0, start, rows, (0, 0, 0))
    shuffle = Shuffle(5, 9, 1, 100, batch_rows)
    order = shuffle.row_order(block, 0, batch_rows)
    assert sorted(order.tolist()) == list(range(block.n_rows))
    strip = np.arange(block.start, block.stop) % batch_rows
    for j in range(batch_rows):
        first, last = shuffle.memory(block, j, j + 1)
        assert block.n_rows // batch_rows <= last - first <= -(-block.n_rows // batch_rows)
        assert sorted(order[strip == j].tolist()) == list(range(first, last))
    lo = data.draw(st.integers(0, batch_rows - 1))
    hi = data.draw(st.integers(lo + 1, batch_rows))
    mine = (lo <= strip) & (strip < hi)
    part = shuffle.row_order(block, lo, hi) + shuffle.memory(block, lo, hi)[0]
    assert part.tolist() == order[mine].tolist()


def test_a_strip_comes_in_random_order() -> None:
    """Each of the eight rows of a strip is drawn first about as often as any other."""
    chunks = np.array([[0, chunk, 8] for chunk in range(1000)], np.int64)
    order = Shuffle(0, 8, 1, 8000, 1000).row_order(Block(0, 0, chunks, (0, 0, 0)), 0, 1000)
    drawn = np.bincount(order[:1000] % 8, minlength=8)
    assert drawn.min() > 85 and drawn.max() < 170
    assert len({tuple((order[j::1000] % 8).tolist()) for j in range(1000)}) > 900


def test_a_reader_holds_only_its_part(whole_chunks: Store) -> None:
    options = {**OPTIONS, "buffer_rows": ROWS_OF_A_BLOCK, "prefetch": False}
    stream = ShuffledStream(whole_chunks, ["a"], rows=(4, 8), **options)
    held = stream.next().arrays["a"]
    while isinstance(held.base, np.ndarray):
        held = held.base
    assert held.nbytes <= (ROWS_OF_A_BLOCK // 4 + 3 * 4) * 12
    stream.close()
