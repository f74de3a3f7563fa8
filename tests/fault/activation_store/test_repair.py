"""Test that repair drops uncommitted files and lists the items to harvest again."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import (
    Consumer,
    RepairReport,
    StoreWriter,
    delete_consumed,
    open_store,
    repair_store,
    verify_store,
)
from activation_store.errors import DamagedDataError, StoreBusyError, StoreError
from activation_store.storage import atomic_files, local
from activation_store.storage.checksummed_json import dump_checksummed, load_checksummed
from tests.support.store_cases import expected, item_columns, tree, write_store

ARRAYS = {"a": 6, "b": 3}
ROWS = [16, 5, 0, 16, 9, 16, 1]


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("activation_store.format.commit_log.SEGMENT_ITEMS", 3)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("activation_store.format.commit_log.SEGMENT_ITEMS", 3)
        write_store(path, ROWS, arrays=ARRAYS, n_items=len(ROWS))
    return path


@pytest.fixture
def path(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "s")
    return tmp_path / "s"


def redo(path: Path, items: list[int]) -> None:
    """Write the missing items and finalise, like the next harvest."""
    writer = StoreWriter(path)
    assert set(range(len(ROWS))) - writer.committed_items() == set(items)
    for item in items:
        writer.write_item(item, *item_columns(item, ROWS[item], ARRAYS))
    writer.finalise()


def check_whole(path: Path, pristine: Path) -> None:
    """Check that all files equal those before the damage, except for _log and _repaired."""
    assert verify_store(path) == []
    found, wanted = tree(path), tree(pristine)
    kept = {name for name in found if not name.startswith("_repaired/")}
    assert kept == set(wanted)
    assert all(found[name] == data for name, data in wanted.items() if not name.startswith("_log"))
    store = open_store(path)
    for name, rows in expected(ROWS, ARRAYS).items():
        np.testing.assert_array_equal(store.read(name, 0, store.n_tokens), rows)


def test_repair_leaves_an_undamaged_store_unchanged(path: Path) -> None:
    before = tree(path)
    assert repair_store(path) == RepairReport() and tree(path) == before


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "gone": lambda file: file.unlink(),
    "grown": lambda file: file.write_bytes(file.read_bytes() + b"x" * 99),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_items_are_redone_and_the_store_is_what_it_was(
    path: Path, pristine: Path, damage: str
) -> None:
    for name in ("a/c.3.0", "b/c.3.0", "token_id/c.6"):
        DAMAGES[damage](path / name)
    report = repair_store(path)
    assert report.redo == [3, 6] and "items to redo: [3, 6]" in str(report)
    assert verify_store(path) == [] and repair_store(path) == RepairReport()
    store = open_store(path)
    assert not store.finalised and store.n_items == 3
    assert len(list((path / "_repaired").iterdir())) == 2
    with pytest.raises(StoreError, match=r"lacks 2: \[3, 6\]"):
        StoreWriter(path).finalise()
    redo(path, [3, 6])
    check_whole(path, pristine)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_few_files_may_be_damaged(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = [name for name in tree(pristine) if name != "zarr.json"]
    path = tmp_path_factory.mktemp("damaged") / "s"
    shutil.copytree(pristine, path)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True)):
        DAMAGES[data.draw(st.sampled_from(list(DAMAGES)))](path / name)
    report = repair_store(path)
    assert verify_store(path) == []
    redo(path, report.redo)
    check_whole(path, pristine)
    shutil.rmtree(path)


def test_redundant_files_are_restored(path: Path, pristine: Path) -> None:
    """No shard is damaged, so the store stays finalised and no item is redone."""
    names = ["a/zarr.json", "valid_rows/zarr.json", "valid_rows/c.0", "_log/000001.json"]
    names += ["_log/000000/000000001.json"]
    for name in names:
        (path / name).unlink()
    flip(path / "_log" / "000002" / "000000006.json")
    report = repair_store(path)
    assert report.redo == [] and set(names) <= set(report.restored)
    assert tree(path) == tree(pristine)


def test_the_header_cannot_be_repaired(path: Path) -> None:
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"n_tokens": 63', '"n_tokens": 62'))
    with pytest.raises(DamagedDataError, match=r"zarr\.json"):
        repair_store(path)


def test_the_record_that_matches_the_shards_wins(path: Path, pristine: Path) -> None:
    """Snapshot and single record are both undamaged, but of different attempts."""
    record = path / "_log" / "000000" / "000000001.json"
    good = record.read_bytes()
    wrong = load_checksummed("", good)
    wrong["arrays"]["a"]["tail_crc32c"] ^= 1
    record.write_bytes(dump_checksummed(wrong))
    report = repair_store(path)
    assert report.redo == [] and report.restored == ["_log/000000/000000001.json"]
    assert tree(path) == tree(pristine)


def test_uncommitted_files_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS[:2], arrays=ARRAYS, finalise=False)
    for name in ("a/c.5.0", "token_id/c.5"):
        (path / name).write_bytes(b"of a dead writer")
    (path / "a" / "notes.txt").write_text("a person's")
    report = repair_store(path)
    assert report == RepairReport([], [], ["a/c.5.0", "token_id/c.5"])
    assert (path / "a" / "notes.txt").exists()
    flip(path / "a" / "c.0.0")
    assert repair_store(path).redo == [0]
    writer = StoreWriter(path)
    writer.write_item(0, *item_columns(0, 16, ARRAYS))
    assert writer.finalise().n_items == 2 and verify_store(path) == []


def test_a_store_without_a_plan_is_not_finished_without_its_last_item(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS, arrays=ARRAYS)
    (path / "a" / "c.6.0").unlink()
    assert repair_store(path).redo == [6]
    with pytest.raises(StoreError, match=r"lacks 1: \[6\]"):
        StoreWriter(path).finalise()
    redo(path, [6])
    assert verify_store(path) == [] and open_store(path).n_items == len(ROWS)


def test_deleted_items_do_not_count_as_damage(path: Path) -> None:
    Consumer(path, "one").publish(next_item=3, keep_from_item=3, position=0)
    delete_consumed(path)
    (path / "a" / "c.4.0").unlink()
    assert repair_store(path).redo == [4]


def test_read_errors_do_not_count_as_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(path)

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic_files, "read_into", fails)
    with pytest.raises(OSError, match="Input/output error"):
        repair_store(path)
    assert verify_store(path)[0].item is not None
    monkeypatch.undo()
    assert tree(path) == before


def test_repair_waits_for_the_item_that_is_being_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The item's shards have no record yet, but their writer is alive."""
    path = tmp_path / "s"
    writer = write_store(path, [], arrays=ARRAYS, finalise=False)
    placed, go_on = threading.Event(), threading.Event()
    append = local.LocalStorage.make_folder

    def slow(self: local.LocalStorage, name: str) -> None:
        placed.set()
        assert go_on.wait(20)
        append(self, name)

    monkeypatch.setattr(local.LocalStorage, "make_folder", slow)
    thread = threading.Thread(target=writer.write_item, args=(0, *item_columns(0, 16, ARRAYS)))
    thread.start()
    assert placed.wait(20)
    with pytest.raises(StoreBusyError, match="locked by another process"):
        repair_store(path, wait_s=0.1)
    go_on.set()
    thread.join()
    assert repair_store(path) == RepairReport() and verify_store(path) == []


@pytest.mark.parametrize("survivors", range(0, 24, 2))
def test_a_repair_that_is_killed_can_be_run_again(
    path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    for name in ("a/c.3.0", "_log/000000/000000000.json", "document/c.2", "b/zarr.json"):
        (path / name).unlink()
    left = [survivors]
    for method in ("put", "delete"):
        original = getattr(local.LocalStorage, method)

        def step(*arguments: object, original: Callable[..., None] = original) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            original(*arguments)

        monkeypatch.setattr(local.LocalStorage, method, step)
    try:
        repair_store(path)
    except KeyboardInterrupt:
        assert survivors < 20
    monkeypatch.undo()
    monkeypatch.setattr("activation_store.format.commit_log.SEGMENT_ITEMS", 3)
    repair_store(path)
    assert verify_store(path) == []
    redo(path, sorted(set(range(len(ROWS))) - StoreWriter(path).committed_items()))
    check_whole(path, pristine)
