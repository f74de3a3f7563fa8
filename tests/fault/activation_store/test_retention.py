"""Test that a killed deletion is completed by the next one, and readers see no damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from activation_store import Consumer, DeletedDataError, delete_consumed, open_store, verify_store
from activation_store.storage import local
from tests.support.store_cases import tree, write_store

ARRAYS = {"a": 6}
ROWS = [16, 5, 16, 9]


@pytest.mark.parametrize("survivors", range(7))
def test_a_killed_deletion_is_completed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    """Steps: announcement, deletion mark, four shards of item 0, of item 1, the mark again."""
    path, left = tmp_path / "s", [survivors]
    write_store(path, ROWS, arrays=ARRAYS)
    Consumer(path, "one").publish(next_item=2, keep_from_item=2, position=0)

    def dying(method: str) -> None:
        original = getattr(local.LocalStorage, method)

        def step(*arguments: object) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            original(*arguments)

        monkeypatch.setattr(local.LocalStorage, method, step)

    dying("put")
    dying("delete")
    with pytest.raises(KeyboardInterrupt):
        delete_consumed(path)
    monkeypatch.undo()
    assert verify_store(path) == [], "no damage: the deletion mark was written first"
    store = open_store(path)
    if survivors >= 2:
        with pytest.raises(DeletedDataError, match="item 0"):
            store.read("a", 0, 3)
    else:
        store.read("a", 0, 3)
    store.read("a", 21, 46)
    assert delete_consumed(path) == [0, 1]
    assert not [
        name
        for name in tree(path)
        if name.endswith(("c.0", "c.1", "c.0.0", "c.1.0")) and not name.startswith("valid_rows")
    ]
    assert verify_store(path) == [] and delete_consumed(path) == []
