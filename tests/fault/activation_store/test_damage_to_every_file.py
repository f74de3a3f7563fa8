"""Test that damage of any kind to any file of a store is named and never read as rows.

`test_damage.py` tests single mechanisms. This file checks that no damage to any file goes
unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from activation_store import (
    Consumer,
    ShuffledStream,
    StoreWriter,
    delete_consumed,
    list_consumers,
    open_store,
    verify_store,
)
from activation_store.errors import StoreError
from tests.support.store_cases import calibration, item_columns, tree, write_store

ARRAYS = {"a": 6}
ROWS = [16, 5, 16, 9]
KINDS = ("none", "blosc", "int8", "growing", "deleted")


def flipped(place: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = int(place * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    **{f"flipped at {place}": flipped(place) for place in (0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0)},
    "without its first byte": lambda data: data[1:],
    "without its last byte": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "a byte longer": lambda data: data + b"\0",
    "doubled": lambda data: data * 2,
    "gone": lambda data: None,
}


def make(path: Path, kind: str) -> None:
    codec = kind if kind in ("blosc", "int8") else "none"
    write_store(
        path,
        ROWS,
        arrays=ARRAYS,
        codec=codec,
        calibration=calibration(ARRAYS),
        finalise=kind != "growing",
    )
    if kind == "deleted":
        consumer = Consumer(path, "one")
        consumer.publish(next_item=2, keep_from_item=1, position=3)
        delete_consumed(path)


def read_all(path: Path) -> dict[str, NDArray[Any]]:
    """Read everything from a store, directly and through a stream."""
    store = open_store(path)
    first = int(store.valid_rows[: store.read_deletion_mark().below].sum())
    found = {name: store.read(name, first, store.n_tokens) for name in store.header.columns}
    found["consumers"] = np.array(sorted(map(str, list_consumers(path).items())))
    if store.finalised and not first:
        names = ["a", "token_id"]
        stream = ShuffledStream(
            store, names, seed=0, batch_rows=23, window_items=4, buffer_rows=30, prefetch=False
        )
        batches = [stream.next() for _ in range(2)]
        found |= {f"shuffled {n}": np.concatenate([b.arrays[n] for b in batches]) for n in names}
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(kind: str, tmp_path: Path) -> Path:
    make(tmp_path / "s", kind)
    assert verify_store(tmp_path / "s") == []
    return tmp_path / "s"


def is_named(file: str, problem: str, kind: str, damage: str) -> bool:
    if file in problem:
        return True
    # Without the deletion mark, deleted items count as missing.
    return (file, damage) == ("_deleted.json", "gone") and "c.0" in problem


def is_harmless(file: str, damage: str, good: bytes, bad: bytes | None) -> bool:
    """Return True if the change leaves a valid store."""
    if bad == good or (file.startswith("_consumers/") and damage == "gone"):
        return True  # a consumer may unregister at any time
    try:  # Zarr's own JSON has no checksum: only its meaning counts
        return file.endswith("zarr.json") and bool(json.loads(bad or b"") == json.loads(good))
    except ValueError:
        return False


def damaged(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Damage each file in each way, one at a time; yield its name, the damage, and if harmless."""
    pristine = tree(path)
    for name, good in pristine.items():
        for damage, change in DAMAGES.items():
            bad = change(good)
            (path / name).unlink()
            if bad is not None:
                (path / name).write_bytes(bad)
            yield name, damage, is_harmless(name, damage, good, bad)
            (path / name).write_bytes(good)


def check(path: Path, name: str, damage: str, kind: str, baseline: dict[str, Any]) -> bool:
    """Check that damage is named by verify and readers; return whether it stopped a reader."""
    problems = str([str(damage) for damage in verify_store(path)])
    assert is_named(name, problems, kind, damage), (name, damage, problems)
    try:
        found = read_all(path)
    except StoreError as error:
        assert is_named(name, str(error), kind, damage), (name, damage, str(error))
        return True
    assert found.keys() == baseline.keys(), (name, damage)
    for key, rows in baseline.items():
        np.testing.assert_array_equal(found[key], rows, err_msg=f"{name} {damage}")
    return False


def check_redone(path: Path, name: str, baseline: dict[str, Any]) -> None:
    """Check that the harvest redoes an item of a growing store whose record is missing."""
    item = int(name[-len("000000000.json") : -len(".json")])
    assert open_store(path).n_items == item
    writer = StoreWriter(path)
    assert writer.committed_items() == set(range(len(ROWS))) - {item}
    writer.write_item(item, *item_columns(item, ROWS[item], ARRAYS))
    for key, rows in read_all(path).items():
        np.testing.assert_array_equal(rows, baseline[key])
    assert verify_store(path) == []


@pytest.mark.slow
def test_no_damage_to_any_file_goes_unnoticed(path: Path, kind: str) -> None:
    baseline, stopped, n_damaged = read_all(path), set(), 0
    for name, damage, harmless in damaged(path):
        if kind == "growing" and damage == "gone" and name.startswith("_log/"):
            check_redone(path, name, baseline)
        elif not harmless:
            n_damaged += 1
            if check(path, name, damage, kind, baseline):
                stopped.add(name.split("/")[0])
    assert n_damaged > 200
    # Damage to every kind of file stopped a reader, except `valid_rows`, which only others read.
    everything = {name.split("/")[0] for name in tree(path)}
    assert stopped >= everything - {"valid_rows"}, everything - stopped
    assert verify_store(path) == []


@pytest.mark.slow
def test_no_two_files_can_be_swapped_unnoticed(path: Path, kind: str) -> None:
    baseline, files = read_all(path), tree(path)
    names = list(files)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            if files[one] == files[two]:
                continue
            (path / one).write_bytes(files[two])
            (path / two).write_bytes(files[one])
            problems = str([str(damage) for damage in verify_store(path)])
            assert one in problems or two in problems, (one, two, problems)
            try:
                found = read_all(path)
            except StoreError as error:
                assert one in str(error) or two in str(error), (one, two, str(error))
            else:
                for key, rows in baseline.items():
                    np.testing.assert_array_equal(found[key], rows, err_msg=f"{one} {two}")
            (path / one).write_bytes(files[one])
            (path / two).write_bytes(files[two])
