"""Test the parts of the fast read path: threads, recycled memory, coalesced reads, blocks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from activation_store import ShuffledStream, StagedStream, open_store, verify_store
from activation_store import threads as parallel
from activation_store.checksum import crc32c
from activation_store.errors import DamagedDataError, IncompleteStoreError
from activation_store.reading import store as store_module
from activation_store.reading.buffers import Recycler
from activation_store.storage import atomic_files
from activation_store.storage.checksummed_json import dump_checksummed, load_checksummed
from activation_store.storage.local import LocalStorage
from activation_store.threads import run_all
from foundation.errors import ConfigError
from tests.support.store_cases import calibration, expected, item_columns, write_store

ARRAYS = {"a": 6}
ROWS = [16, 5, 0, 16, 9, 16, 1, 16, 16, 3]
OPTIONS: dict[str, Any] = {"seed": 3, "batch_rows": 7, "window_items": 3, "buffer_rows": 10}


@given(parts=st.lists(st.binary(max_size=100), max_size=5))
def test_checksums_continue_from_part_to_part(parts: list[bytes]) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the published check value of CRC-32C
    found = 0
    for part in parts:
        found = crc32c(np.frombuffer(part, np.uint8), found)
    assert found == crc32c(b"".join(parts))


def test_tasks_run_in_parallel_and_return_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "N_THREADS", 3)
    barrier = threading.Barrier(3, timeout=20)
    assert run_all([partial(lambda i: (barrier.wait(), i)[1], i) for i in range(6)]) == [*range(6)]
    assert run_all([]) == []
    nested = [lambda: run_all([lambda: 1, lambda: 2]) for _ in range(50)]
    assert run_all(nested) == [[1, 2]] * 50


def test_the_first_failing_task_is_raised_and_the_rest_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "N_THREADS", 2)
    ran: list[int] = []

    def task(i: int) -> None:
        ran.append(i)
        if i in (3, 4):
            time.sleep(0.05 if i == 3 else 0)
            raise KeyError(i)

    with pytest.raises(KeyError, match="3"):
        run_all([partial(task, i) for i in range(1000)])
    assert len(ran) < 20


def _in_child(queue: Any) -> None:
    barrier = threading.Barrier(2, timeout=10)  # a single thread would time out
    queue.put(run_all([lambda: (barrier.wait(), os.getpid())[1]] * 2))


def test_threads_come_back_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "N_THREADS", 2)
    run_all([lambda: time.sleep(0.01)] * 4)  # starts the pool
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=20) == [child.pid] * 2
    child.join()


def test_memory_is_reused_once_nothing_refers_to_it() -> None:
    made: list[int] = []

    def allocate(n_bytes: int) -> bytearray:
        made.append(n_bytes)
        return bytearray(n_bytes)

    recycler = Recycler(allocate)
    first = recycler.empty((4, 2), "<f4")
    tensor = torch.from_numpy(first[1:3])
    tensor.fill_(7)
    del first
    gc.collect()
    second = recycler.empty((8,), "<f4")
    second[:] = 1
    assert made == [32, 32] and (tensor == 7).all(), "a tensor of a slice still refers to it"
    del tensor
    third = recycler.empty((2, 4), "<f4")
    assert made == [32, 32] and (third == 7).sum() == 4, "the memory of the first array is reused"
    assert recycler.empty((3,), "<i8").shape == (3,) and made == [32, 32, 24]
    assert recycler.empty((0, 3), "<i8").shape == (0, 3)


def test_steady_reading_allocates_nothing(tmp_path: Path) -> None:
    made: list[int] = []

    def allocate(n_bytes: int) -> bytearray:
        made.append(n_bytes)
        return bytearray(n_bytes)

    write_store(tmp_path / "s", ROWS, arrays=ARRAYS)
    source = ShuffledStream(
        open_store(tmp_path / "s"), ["a", "token_id"], allocate=allocate, **OPTIONS
    )
    for _ in range(20):
        source.next()
    before = len(made)
    kept = [source.next() for _ in range(2)]
    copies = [batch.arrays["a"].copy() for batch in kept]
    for _ in range(200):
        source.next()
    assert len(made) <= before + 6, "two batches of two arrays are kept, and a block may be"
    for batch, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(batch.arrays["a"], copy)
    source.close()


def test_all_that_a_device_reads_of_a_block_is_in_the_given_memory(tmp_path: Path) -> None:
    memory: list[NDArray[np.uint8]] = []

    def allocate(n_bytes: int) -> NDArray[np.uint8]:
        memory.append(np.empty(n_bytes, np.uint8))
        return memory[-1]

    write_store(tmp_path / "s", ROWS, arrays=ARRAYS)
    staged = StagedStream(open_store(tmp_path / "s"), ["a"], allocate=allocate, **OPTIONS)
    (part, *_) = staged.next().parts
    assert part.block.order is not None
    for array in (part.block.order, *part.block.arrays.values()):
        assert any(np.shares_memory(array, one) for one in memory)
    staged.close()


@pytest.mark.parametrize("codec", ["none", "blosc", "int8"])
def test_a_device_gathers_the_same_batches(tmp_path: Path, codec: str) -> None:
    write_store(tmp_path / "s", ROWS, arrays=ARRAYS, codec=codec, calibration=calibration(ARRAYS))
    store = open_store(tmp_path / "s")
    plain = ShuffledStream(store, ["a", "token_id"], rows=(2, 7), **OPTIONS)
    staged = StagedStream(store, ["a", "token_id"], rows=(2, 7), **OPTIONS)
    held = []
    for i in range(30):
        if i == 20:
            plain.seek(5)
            staged.seek(5)
        batch, blocks = plain.next(), staged.next()
        assert (batch.first_row, batch.epoch) == (blocks.first_row, blocks.epoch)
        held.append((batch, blocks))
    for batch, blocks in held:  # batches still in use are never overwritten
        ids = [part.block.arrays["token_id"][part.picks] for part in blocks.parts]
        np.testing.assert_array_equal(np.concatenate(ids), batch.arrays["token_id"])
        rows = []
        for part in blocks.parts:
            assert len({len(rows) for rows in part.block.arrays.values()}) == 1
            assert len(part.block.arrays["a"]) <= part.block.block.n_rows
            numbers = part.block.arrays["a"][part.picks].astype(np.float32)
            if codec == "int8":
                row_codec = store.row_codec("a")
                assert row_codec is not None and row_codec.scale_offset is not None
                formula = row_codec.scale_offset
                scale = part.block.arrays["a" + formula.scale][part.picks]
                numbers = formula.offset + scale[:, None] * (formula.factor * numbers)
            rows.append(numbers.astype(batch.arrays["a"].dtype))
        np.testing.assert_array_equal(np.concatenate(rows), batch.arrays["a"])
    assert len({id(part.block) for _, blocks in held for part in blocks.parts}) < 30
    plain.close()
    staged.close()


@settings(max_examples=40, deadline=None)
@given(
    codec=st.sampled_from(["none", "blosc"]),
    run_bytes=st.integers(1, 400),
    threads=st.integers(1, 4),
    data=st.data(),
)
def test_chunks_are_written_only_where_requested(
    tmp_path_factory: pytest.TempPathFactory,
    codec: str,
    run_bytes: int,
    threads: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    write_store(path, ROWS, arrays=ARRAYS, codec=codec)
    store, rows = open_store(path), expected(ROWS, ARRAYS)["a"]
    size = store.header.chunk_rows
    chunks = [(item, chunk) for item, n in enumerate(ROWS) for chunk in range(-(-n // size))]
    chosen = data.draw(st.permutations(chunks))[: data.draw(st.integers(0, len(chunks)))]
    wanted, out = [], np.full((len(chosen) * size + 3, 6), -9, rows.dtype)
    truth = out.copy()
    for number, (item, chunk) in enumerate(chosen):
        wanted.append((item, chunk, 3 + number * size))
        first = sum(ROWS[:item]) + chunk * size
        part = rows[first : min(first + size, sum(ROWS[: item + 1]))]
        truth[3 + number * size :][: len(part)] = part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "run_bytes", run_bytes)
        patch.setattr(store_module, "_BYTES_PER_THREAD", 1)
        patch.setattr(parallel, "N_THREADS", threads)
        store.read_chunks("a", wanted, out)
    np.testing.assert_array_equal(out, truth)


def test_adjacent_chunks_are_read_in_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path / "s", [16], arrays=ARRAYS)
    store, calls = open_store(tmp_path / "s"), [0]
    store.read("a", 0, 16)
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        calls[0] += 1
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", counted)
    store.read("a", 0, 16)
    assert store.header.layout("a").n_chunks == 4 and calls == [1]


def test_partial_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(range(200)))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    one, none, two = (np.zeros(size, np.uint8) for size in (30, 0, 70))
    fd = atomic_files.open_to_read(tmp_path / "x")
    assert atomic_files.read_into(fd, [one, none, two], 5)
    assert [*one, *two] == list(range(5, 105))
    assert not atomic_files.read_into(fd, [one], 180)
    os.close(fd)


def test_invalid_requests_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ROWS, arrays=ARRAYS)
    store = open_store(tmp_path / "s")
    rows = np.zeros((8, 6), store.read("a", 0, 1).dtype)
    for wanted in ([(0, -1, 0)], [(0, 99, 0)], [(0, 0, -1)], [(0, 0, 7)]):
        with pytest.raises(ConfigError):
            store.read_chunks("a", wanted, rows)
    with pytest.raises(ConfigError, match="array='b'"):
        store.read_chunks("b", [], rows)
    for wrong in (np.zeros((8, 6), np.float32), np.zeros((8, 5), rows.dtype)):
        with pytest.raises(ConfigError, match="rows="):
            store.read_chunks("a", [], wrong)
    with pytest.raises(IncompleteStoreError, match="item 10"):
        store.read_chunks("a", [(10, 0, 0)], rows)


def test_damage_is_found_by_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "N_THREADS", 4)
    monkeypatch.setattr(store_module, "_BYTES_PER_THREAD", 1)
    write_store(tmp_path / "s", ROWS, arrays=ARRAYS)
    for item in (5, 8):
        file = tmp_path / "s" / "a" / f"c.{item}.0"
        data = bytearray(file.read_bytes())
        data[0] ^= 1
        file.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"c.5.0: chunk 0"):
        open_store(tmp_path / "s").read("a", 0, sum(ROWS))
    assert [(damage.file, damage.chunk) for damage in verify_store(tmp_path / "s")] == [
        ("a/c.5.0", 0),
        ("a/c.8.0", 0),
    ]


def test_moments_with_a_wrong_count_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, [16, 9], arrays=ARRAYS, finalise=False)
    record = path / "_log" / "000000" / "000000001.json"
    document = load_checksummed(str(record), record.read_bytes())
    document["arrays"]["a"]["count"] -= 1
    record.write_bytes(dump_checksummed(document))
    (damage,) = verify_store(path)
    assert damage.item == 1 and "statistics of ['a'] that do not cover" in damage.problem


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_moments_are_those_of_the_rows(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "t"
    writer = write_store(path, [], None, {"a": 512}, finalise=False, dtype=dtype, shard_tokens=400)
    rows = item_columns(0, 400, {"a": 512})[0]["a"] * 100
    rows[3, 4], rows[5, 6], rows[399, 511], rows[7, 7] = np.nan, -np.inf, np.inf, -9e4
    writer.write_item(0, rows)
    stored = open_store(path).read("a", 0, 400).astype(np.float64)
    finite = stored[np.isfinite(stored)]
    found = open_store(path).statistics("a")
    assert (found.count, found.non_finite) == (400 * 512 - 3, 3)
    assert found.absmax == np.abs(finite).max()
    np.testing.assert_allclose([found.sum, found.sumsq], [finite.sum(), (finite**2).sum()])
