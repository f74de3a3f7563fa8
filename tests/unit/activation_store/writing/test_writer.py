"""Test committing items: order, repeated attempts, snapshots, invalid items."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_store import Calibration, StoreWriter, open_store, verify_store
from activation_store.errors import (
    IncompleteStoreError,
    ItemError,
    NonDeterministicItemError,
    StoreFormatError,
    StoreMismatchError,
)
from activation_store.storage.local import LocalStorage
from activation_store.writing.create import create
from tests.support.store_cases import expected, item_columns, tree, write_store

ARRAYS = {"model.layers.9": 6}
ROWS = [16, 5, 0, 16, 9, 16, 1]


def shards(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(path).items() if "_log" not in name}


def test_files_do_not_depend_on_the_order_of_commits(tmp_path: Path) -> None:
    write_store(tmp_path / "a", ROWS)
    write_store(tmp_path / "b", ROWS, order=[4, 6, 0, 2, 5, 1, 3])
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


def test_a_growing_store_shows_items_up_to_the_first_gap(tmp_path: Path) -> None:
    writer = write_store(tmp_path / "s", ROWS, order=[0, 1, 3], finalise=False)
    store = open_store(tmp_path / "s")
    assert (store.n_items, store.n_tokens, store.finalised) == (2, 21, False)
    with pytest.raises(IncompleteStoreError, match="has 21 rows committed so far"):
        store.read("token_id", 0, 22)
    with pytest.raises(IncompleteStoreError, match=r"lacks 1: \[2\]"):
        writer.finalise()
    writer.write_item(2, *item_columns(2, 0, ARRAYS))
    assert store.n_items == 2
    store.refresh()
    assert (store.n_items, store.n_tokens) == (4, 37)
    assert writer.committed_items() == {0, 1, 2, 3} and writer.is_committed(2)
    writer.finalise()
    store.refresh()
    assert store.finalised and store.header.n_items == 4
    with pytest.raises(StoreMismatchError, match="finalised with 4 items, numbered from 0"):
        writer.write_item(4, *item_columns(4, 9, ARRAYS))


def test_a_second_attempt_with_the_same_bytes_changes_nothing(tmp_path: Path) -> None:
    writer = write_store(tmp_path / "s", ROWS, finalise=False)
    before = tree(tmp_path / "s")
    inode = (tmp_path / "s" / "model.layers.9" / "c.0.0").stat().st_ino
    record = StoreWriter(tmp_path / "s").write_item(0, *item_columns(0, 16, ARRAYS))
    assert tree(tmp_path / "s") == before
    assert (tmp_path / "s" / "model.layers.9" / "c.0.0").stat().st_ino == inode
    header = writer.finalise()
    before = tree(tmp_path / "s")
    assert writer.finalise() == header and tree(tmp_path / "s") == before
    assert StoreWriter(tmp_path / "s").write_item(0, *item_columns(0, 16, ARRAYS)) == record


@pytest.mark.parametrize("rows", [15, 16])
def test_a_second_attempt_with_other_bytes_is_refused(tmp_path: Path, rows: int) -> None:
    writer = write_store(tmp_path / "s", ROWS, finalise=False)
    before = tree(tmp_path / "s")
    with pytest.raises(NonDeterministicItemError, match="item 0"):
        writer.write_item(0, *item_columns(99, rows, ARRAYS))
    assert tree(tmp_path / "s") == before


@pytest.mark.parametrize("same", [True, False])
def test_a_late_attempt_never_touches_what_is_committed(tmp_path: Path, same: bool) -> None:
    """The second attempt at an item checks for a commit before the first has committed."""
    path = tmp_path / "s"
    write_store(path, [], finalise=False)
    answers = iter([False])  # not committed when it looks first
    late = StoreWriter(path)
    late.is_committed = lambda i: next(answers, True)  # type: ignore[method-assign]
    record = StoreWriter(path).write_item(0, *item_columns(0, 16, ARRAYS))
    before = tree(path)
    if same:
        assert late.write_item(0, *item_columns(0, 16, ARRAYS)) == record
    else:
        with pytest.raises(NonDeterministicItemError, match="item 0"):
            late.write_item(0, *item_columns(99, 16, ARRAYS))
    assert tree(path) == before


def test_files_without_a_record_are_ignored(tmp_path: Path) -> None:
    """A writer that died before its record leaves shards, which may be overwritten."""
    path = tmp_path / "s"
    writer = write_store(path, ROWS, order=[0, 1, 2], finalise=False)
    (path / "model.layers.9" / "c.3.0").write_bytes(b"half a sh")
    for name, age_s in (("old", 7200), ("young", 0)):
        (path / "_tmp" / name).write_bytes(b"over")
        os.utime(path / "_tmp" / name, (time.time() - age_s,) * 2)
    assert open_store(path).n_items == 3 and verify_store(path) == []
    writer.write_item(3, *item_columns(3, 16, ARRAYS))
    writer.finalise()
    assert verify_store(path) == [] and os.listdir(path / "_tmp") == ["young"]
    rows = open_store(path).read("model.layers.9", 0, 37)
    np.testing.assert_array_equal(rows, expected(ROWS[:4], ARRAYS)["model.layers.9"])


def test_opening_another_store_shows_what_differs(tmp_path: Path) -> None:
    moments = Calibration(np.zeros(6), np.ones(6), 2.5)
    options: dict[str, Any] = {"n_items": 9, "provenance": {"model": "a", "positions": (0,)}}
    write_store(
        tmp_path / "s", ROWS, finalise=False, calibration={"model.layers.9": moments}, **options
    )
    # Open the same store again without a calibration.
    write_store(tmp_path / "s", ROWS, finalise=False, **options)
    calibration = open_store(tmp_path / "s").header.calibration
    assert calibration is not None and calibration["model.layers.9"].norm == 2.5
    before = tree(tmp_path / "s")
    for change, line in (
        (
            {"dtype": "float32", "chunk_bytes": 96},
            "dtype: the store has 'bfloat16', requested 'float32'",
        ),
        ({"shard_tokens": 32}, "shard_tokens: the store has 16, requested 32"),
        ({"chunk_bytes": 100}, "chunk_rows: the store has 4, requested 8"),
        ({"n_items": 10}, "planned_items: the store has 9, requested 10"),
        ({"arrays": {"x": 6}}, "arrays: the store has"),
        ({"provenance": {"model": "b", "positions": [0]}}, "provenance.model: the store has 'a'"),
        ({"calibration": {"model.layers.9": Calibration(np.ones(6), np.ones(6), 2.5)}}, "calib"),
    ):
        with pytest.raises(
            StoreMismatchError, match="already exists with different settings"
        ) as error:
            write_store(tmp_path / "s", [], finalise=False, **{**options, **change})
        assert line in str(error.value)
        assert len(str(error.value).splitlines()) == 3, "only what differs is listed"
    assert tree(tmp_path / "s") == before


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreFormatError, match="not an activation store"):
        StoreWriter(tmp_path, ARRAYS)
    assert list(tree(tmp_path)) == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert write_store(tmp_path / "empty", [3]).header.n_tokens == 3


def test_many_writers_may_create_one_store(tmp_path: Path) -> None:
    barrier, done = threading.Barrier(8), []

    def create_and_write(number: int) -> None:
        barrier.wait()
        writer = StoreWriter(tmp_path / "s", ARRAYS, shard_tokens=16)
        writer.write_item(number, *item_columns(number, 4, ARRAYS))
        done.append(number)

    threads = [threading.Thread(target=create_and_write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(8)) and os.listdir(tmp_path) == ["s"]
    StoreWriter(tmp_path / "s").finalise()
    assert verify_store(tmp_path / "s") == []
    store = open_store(tmp_path / "s")
    assert store.n_tokens == 32
    # A writer that looked just before the others had created the store.
    create(LocalStorage(tmp_path / "s"), store.header)
    assert os.listdir(tmp_path) == ["s"]


def test_invalid_items_are_refused(tmp_path: Path) -> None:
    writer = write_store(tmp_path / "s", [], finalise=False, n_items=4)
    good = np.zeros((3, 6), np.float32)
    writer.write_item(0, good)
    cases = [
        (4, good, {}, "item=4: expected 0 to 3"),
        (-1, good, {}, "item=-1"),
        (1, np.zeros((17, 6), np.float32), {}, "17 rows: expected at most shard_tokens=16"),
        (1, np.zeros((3, 5), np.float32), {}, r"shape \(3, 5\): expected \(3, 6\)"),
        (1, np.zeros((3, 6), np.uint16), {}, "uint16: expected bfloat16"),
        (1, np.zeros((3, 6), np.float64), {}, "float64: expected bfloat16"),
        (1, {"other": good}, {}, "rows of"),
        (1, good, {"tokens": np.zeros(3, int)}, "sidecars"),
        (1, good, {"token_id": np.zeros(4, int)}, r"shape \(4,\): expected \(3,\)"),
        (1, good, {"token_id": np.zeros(3)}, "float64: expected an integer dtype"),
        (1, good, {"token_id": np.full(3, 2**31)}, "expected values that fit int32"),
    ]
    for item, rows, sidecars, message in cases:
        with pytest.raises(ItemError, match=message):
            writer.write_item(item, rows, sidecars)  # type: ignore[arg-type]
    assert writer.committed_items() == {0}
    assert open_store(tmp_path / "s").read("document", 0, 3).tolist() == [-1, -1, -1]


def test_statistics_are_those_of_the_stored_numbers(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32) * 100
    rows[3, 2], rows[4, 0], rows[5, 5] = np.nan, np.inf, -1e4
    for dtype in ("bfloat16", "float32"):
        writer = write_store(tmp_path / dtype, [], dtype=dtype, finalise=False)
        writer.write_item(0, rows)
        writer.write_item(1, rows[:5])
        store = open_store(tmp_path / dtype)
        stored = store.read("model.layers.9", 0, 21).astype(np.float64).ravel()
        finite = stored[np.isfinite(stored)]
        found = store.statistics("model.layers.9")
        assert (found.count, found.non_finite) == (21 * 6 - 4, 4)
        assert found.absmax == np.abs(finite).max() > 9000
        np.testing.assert_allclose(found.sum, finite.sum(), rtol=1e-9)
        np.testing.assert_allclose(found.sumsq, (finite**2).sum(), rtol=1e-9)


def test_snapshots_hold_what_the_records_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activation_store.format.commit_log.SEGMENT_ITEMS", 3)
    path = tmp_path / "s"
    writer = write_store(path, ROWS, order=[3, 5, 4, 6, 0, 1], finalise=False)
    log = path / "_log"
    assert sorted(os.listdir(log)) == ["000000", "000001", "000001.json", "000002"]
    store = open_store(path)
    writer.write_item(2, *item_columns(2, 0, ARRAYS))
    store.refresh()
    assert store.valid_rows.tolist() == ROWS and verify_store(path) == []
    writer.finalise()
    whole = open_store(path)
    for folder in log.iterdir():  # only snapshots, no records
        if folder.is_dir():
            folder.rename(tmp_path / folder.name)
    alone = open_store(path)
    for folder in tmp_path.glob("0*"):
        folder.rename(log / folder.name)
    for snapshot in log.glob("*.json"):
        snapshot.unlink()
    loose = open_store(path)
    for other in (alone, loose):
        assert other.valid_rows.tolist() == ROWS
        assert other.statistics("model.layers.9") == whole.statistics("model.layers.9")
        assert other.read("token_id", 0, 63).tolist() == whole.read("token_id", 0, 63).tolist()
    assert {damage.file for damage in verify_store(path)} == {
        f"_log/{segment:06d}.json" for segment in range(3)
    }


def test_a_planned_store_is_finished_only_when_all_items_are_there(tmp_path: Path) -> None:
    with pytest.raises(IncompleteStoreError, match="lacks 2: "):
        write_store(tmp_path / "s", ROWS, n_items=len(ROWS) + 2)
    assert not open_store(tmp_path / "s").finalised
