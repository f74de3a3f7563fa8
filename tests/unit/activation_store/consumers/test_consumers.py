"""Test consumers' cursors, the producers' lead, and deleting items all consumers have passed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import (
    Consumer,
    ConsumerState,
    DeletedDataError,
    MixtureStream,
    ShuffledStream,
    Store,
    StoreWriter,
    delete_consumed,
    lead_items,
    list_consumers,
    open_store,
    remove_consumer,
    verify_store,
)
from activation_store.consumers import cursors, retention
from activation_store.consumers.deletion_mark import write_deletion_mark
from activation_store.errors import DamagedDataError, StoreFormatError
from foundation.errors import ConfigError
from tests.support.store_cases import expected, item_columns, tree, write_store

ARRAYS = {"a": 6}
ROWS = [16, 5, 0, 16, 9, 16, 1, 16, 16, 3]
OPTIONS: dict[str, Any] = {"seed": 3, "batch_rows": 7, "window_items": 3, "buffer_rows": 10}


def stream(store: Store, **options: Any) -> ShuffledStream:
    return ShuffledStream(store, ["a", "token_id"], **{**OPTIONS, "prefetch": False, **options})


def shards(path: Path) -> set[str]:
    return {name for name in tree(path) if name.split("/")[-1].startswith("c.")}


def publish(consumer: Consumer, item: int) -> None:
    consumer.publish(next_item=item, keep_from_item=item, position=0)


def test_a_cursor_gives_the_position_of_its_consumer(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ROWS, arrays=ARRAYS, finalise=False)
    assert list_consumers(tmp_path / "s") == {} and lead_items(tmp_path / "s") is None
    one, two = (Consumer(tmp_path / "s", name) for name in ("one", "two"))
    one.publish(next_item=6, keep_from_item=3, position=9)
    two.publish(epoch=1, next_item=10, keep_from_item=0, position=20)
    states = list_consumers(tmp_path / "s")
    assert states == {"one": one.state, "two": two.state}
    assert states["one"] == ConsumerState(0, 6, 3, 9, states["one"].updated)
    assert states["two"].epoch == 1 and states["one"].updated > 1.7e9
    assert lead_items(tmp_path / "s") == 10 - 6
    again = Consumer(tmp_path / "s", "one", keep_from_item=0)  # a restart
    assert again.state == states["one"] == list_consumers(tmp_path / "s")["one"]
    (tmp_path / "s" / "_consumers" / ".DS_Store").write_bytes(b"unrelated")
    one.close()
    one.close()
    assert lead_items(tmp_path / "s") == 0 and list(list_consumers(tmp_path / "s")) == ["two"]
    remove_consumer(tmp_path / "s", "two")
    assert list_consumers(tmp_path / "s") == {}
    with pytest.raises(ConfigError, match="consumer='two'"):
        remove_consumer(tmp_path / "s", "two")


def test_the_lead_counts_items_behind_a_gap(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ROWS, order=[0, 1, 2, 5, 7], arrays=ARRAYS, finalise=False)
    publish(Consumer(tmp_path / "s", "one"), 3)
    assert lead_items(tmp_path / "s") == 2


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 40), window_items=st.integers(1, 11), batch_rows=st.integers(1, 50))
def test_items_before_the_first_one_needed_are_not_read_again(
    tmp_path_factory: pytest.TempPathFactory, position: int, window_items: int, batch_rows: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "needed"
    if not path.exists():
        write_store(path, ROWS, arrays=ARRAYS)
    source = stream(open_store(path), window_items=window_items, batch_rows=batch_rows)
    per_epoch = source.batches_per_epoch
    first = source.first_item_needed(position)
    if position >= per_epoch:
        assert first == 0
        return
    assert first % window_items == 0
    source.seek(position)
    items = [source.next().arrays["token_id"] // 100_000 for _ in range(position, per_epoch)]
    assert min(batch.min() for batch in items) >= first
    if first + window_items <= len(ROWS) and any(ROWS[first : first + window_items]):
        # Not a window too early: the next batch begins in this window.
        window = range(first, first + window_items)
        assert int(items[0][0]) in window
    source.close()


def test_a_growing_store_needs_its_incomplete_windows(tmp_path: Path) -> None:
    """Rows 0 to 20 are window 0 (items 0 to 2), 21 to 61 window 1; window 2 has one item so far."""
    writer = write_store(tmp_path / "s", ROWS, order=range(7), arrays=ARRAYS, finalise=False)
    store = open_store(tmp_path / "s")
    source = stream(store)
    needed = [source.first_item_needed(position) for position in (0, 2, 3, 8, 9, 100)]
    assert needed == [0, 0, 3, 3, 6, 6]
    for item in (7, 8, 9):
        writer.write_item(item, *item_columns(item, ROWS[item], ARRAYS))
    writer.finalise()
    store.refresh()
    assert [source.first_item_needed(position) for position in (0, 2, 3, 8, 9, 13, 14)] == [
        *[0, 0, 3, 3, 6, 6],
        0,
    ]
    with pytest.raises(ConfigError, match="position=-1"):
        source.first_item_needed(-1)


def test_items_that_all_consumers_have_passed_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = write_store(path, ROWS, arrays=ARRAYS, finalise=False)
    store = open_store(path)
    moments = store.statistics("a")
    whole = shards(path)
    assert delete_consumed(path) == [] and shards(path) == whole, "no consumer is registered"
    fast, slow = Consumer(path, "fast"), Consumer(path, "slow")
    publish(fast, 6)
    assert delete_consumed(path) == [] and shards(path) == whole, "slow has not passed any item"
    publish(slow, 3)
    assert delete_consumed(path) == [0, 1, 2] and delete_consumed(path) == []
    gone = {
        f"{name}/c.{item}" for name in ("token_id", "document", "position") for item in range(3)
    }
    assert whole - shards(path) == gone | {f"a/c.{item}.0" for item in range(3)}
    slow.close()
    assert delete_consumed(path) == [3, 4, 5]
    fast.close()
    assert delete_consumed(path) == [], "no consumer is left"

    assert writer.finalise().n_items == 10
    for reader in (store, open_store(path)):
        reader.refresh()
        with pytest.raises(DeletedDataError, match=r"item 5 of 'token_id'.*below 6.*'fast'"):
            reader.read("token_id", 50, 62)
        rows = reader.read("token_id", 62, 98)
        np.testing.assert_array_equal(rows, expected(ROWS, ARRAYS)["token_id"][62:])
        assert reader.statistics("a") == moments
    assert verify_store(path) == []
    (path / "a" / "c.7.0").unlink()
    assert [damage.file for damage in verify_store(path)] == ["a/c.7.0"]


def test_a_stream_that_needs_deleted_items_raises(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = write_store(path, ROWS, arrays=ARRAYS, finalise=False)
    source = stream(open_store(path))
    batches = [source.next().arrays["token_id"].tolist() for _ in range(4)]
    consumer = Consumer(path, "trainer")
    consumer.publish(
        next_item=source.first_item_needed(source.position),
        keep_from_item=source.first_item_needed(3),
        position=source.position,
    )
    assert delete_consumed(path) == [0, 1, 2]
    resumed = stream(open_store(path))
    resumed.seek(3)
    assert resumed.next().arrays["token_id"].tolist() == batches[3]
    resumed.seek(2)
    with pytest.raises(DeletedDataError, match=r"below 3 were deleted.*'trainer'"):
        resumed.next()
    writer.finalise()
    whole_epoch = stream(open_store(path))
    whole_epoch.seek(13)
    whole_epoch.next()
    with pytest.raises(DeletedDataError, match="epoch 1 needs deleted rows"):
        whole_epoch.next()
    mixture = MixtureStream([open_store(path)], [1], ["token_id"], **OPTIONS)
    with pytest.raises(DeletedDataError):
        mixture.next()


def test_a_consumer_of_deleted_items_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS, arrays=ARRAYS)
    first = Consumer(path, "first")
    publish(first, 6)
    delete_consumed(path)
    with pytest.raises(DeletedDataError, match=r"'late' from item 3 on.*below 6.*'first'"):
        Consumer(path, "late", keep_from_item=3)
    assert list(list_consumers(path)) == ["first"]
    assert Consumer(path, "later", keep_from_item=6).state.next_item == 6
    with pytest.raises(DeletedDataError, match="'first' from item 5"):
        publish(first, 5)
    assert list_consumers(path)["first"].keep_from_item == 6


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_consumer_that_registers_during_a_deletion_is_counted_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Register before the deletion is announced, after it, or on both sides of it."""
    path = tmp_path / "s"
    write_store(path, ROWS, arrays=ARRAYS)
    publish(Consumer(path, "old"), 6)
    came: list[str] = []

    def announce(storage: Any, mark: Any) -> None:
        if not came:
            came.append(moment)
            if moment == "before":
                Consumer(path, "new")
            write_deletion_mark(storage, mark)
            if moment == "after":
                with pytest.raises(DeletedDataError, match="below 6 are being deleted"):
                    Consumer(path, "new")
            return
        if moment == "during":  # too late to be counted, so it must see the announcement
            with pytest.raises(DeletedDataError):
                Consumer(path, "new")
        write_deletion_mark(storage, mark)

    monkeypatch.setattr(retention, "write_deletion_mark", announce)
    assert delete_consumed(path) == ([] if moment == "before" else [0, 1, 2, 3, 4, 5])
    assert ("new" in list_consumers(path)) == (moment == "before")
    assert verify_store(path) == []
    if moment == "before":  # no announcement is left over
        Consumer(path, "another")


def test_a_removed_consumer_that_is_alive_gets_an_error(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS, arrays=ARRAYS)
    alive, other = Consumer(path, "alive"), Consumer(path, "other")
    publish(other, 6)
    remove_consumer(path, "alive")
    delete_consumed(path)
    with pytest.raises(DeletedDataError, match="'alive' from item 3"):
        publish(alive, 3)
    assert list(list_consumers(path)) == ["other"]


def test_small_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS, arrays=ARRAYS)
    publish(Consumer(path, "one"), 3)
    delete_consumed(path)
    for name in ("_deleted.json", "_consumers/one.json"):
        good = (path / name).read_bytes()
        (path / name).write_bytes(good.replace(b"3", b"4", 1))
        with pytest.raises((DamagedDataError, StoreFormatError), match=name):
            delete_consumed(path)
        assert name in {damage.file for damage in verify_store(path)}
        (path / name).write_bytes(good)
    assert verify_store(path) == []


def test_invalid_cursors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS, arrays=ARRAYS)
    for name in ("", "../x", "a/b", ".hidden", "a..b", "x" * 300):
        with pytest.raises(ConfigError, match="consumer="):
            Consumer(path, name)
    with pytest.raises(ConfigError, match="next_item=-1"):
        publish(Consumer(path, "one"), -1)
    publish(Consumer(path, "one"), 10**9)
    assert delete_consumed(path) == list(range(10)), "only items that exist"
    assert cursors.CONSUMERS == "_consumers" and StoreWriter(path).header.finalised
