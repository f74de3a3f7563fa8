"""Test that any damage to a file of a store is named and never read as wrong rows."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import ShuffledStream, Store, open_store, verify_store
from activation_store.codecs.sharding import ShardLayout
from activation_store.errors import (
    DamagedDataError,
    IncompleteStoreError,
    MissingDataError,
    StoreError,
    StoreFormatError,
)
from activation_store.storage import atomic_files as store_files
from activation_store.storage.checksummed_json import dump_checksummed, load_checksummed
from tests.support.store_cases import expected, item_columns, tree, write_store

ARRAYS = {"a": 6, "b": 3}
ROWS = [16, 5, 16, 9]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "s"
    write_store(path, ROWS, arrays=ARRAYS)
    return path


def read_all(path: Path) -> None:
    """Read everything in the store and compare it with what was written."""
    store = open_store(path)
    for name, rows in expected(ROWS, ARRAYS).items():
        np.testing.assert_array_equal(store.read(name, 0, store.n_tokens), rows)
    source = ShuffledStream(
        store, ["a", "b", "token_id"], seed=0, batch_rows=46, window_items=4, buffer_rows=99
    )
    assert sorted(source.next().arrays["token_id"].tolist()) == sorted(
        expected(ROWS, ARRAYS)["token_id"].tolist()
    )
    source.close()


def is_needed_to_read(name: str) -> bool:
    # Readers skip single records that a snapshot covers, and `valid_rows`, which others read.
    return not name.startswith(("_log/000000/", "valid_rows/c"))


def files(pristine: Path) -> list[str]:
    return list(tree(pristine))


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_named(pristine: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(files(pristine)))
    file = pristine / name
    good = file.read_bytes()
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bad)
    try:
        damages = verify_store(pristine)
        # In Zarr's own files, a flip that keeps the meaning of the JSON (1e-07, 1E-07) is harmless.
        if damages or not name.endswith("zarr.json"):
            assert {damage.file for damage in damages} & {name, "zarr.json"}, (name, damages)
        if damages and is_needed_to_read(name):
            check_read(pristine, name, bit // 8)
    finally:
        file.write_bytes(good)
    assert verify_store(pristine) == []


def check_read(path: Path, name: str, byte: int) -> None:
    try:
        read_all(path)
    except (DamagedDataError, StoreFormatError, MissingDataError) as error:
        assert name in str(error)
    else:
        # Only other readers use the checksums between chunks; ours are in a table.
        array, file = name.split("/")
        assert file.startswith("c."), (name, byte)
        chunk_bytes = open_store(path).header.layout(array).chunk_bytes
        assert byte % (chunk_bytes + 4) >= chunk_bytes, (name, byte)


DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "cut": lambda file, data: file.write_bytes(data[: len(data) // 2]),
    "empty": lambda file, data: file.write_bytes(b""),
    "grown": lambda file, data: file.write_bytes(data + b"\0"),
    "zeros": lambda file, data: file.write_bytes(bytes(len(data))),
    "gone": lambda file, data: file.unlink(),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_truncated_extended_or_missing_file_is_named(
    pristine: Path, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "s"
    shutil.copytree(pristine, path)
    for name, good in tree(pristine).items():
        DAMAGES[damage](path / name, good)
        damages = verify_store(path)
        assert name in str([(damage.file, damage.problem) for damage in damages])
        # A missing snapshot is harmless, because the single records say the same.
        if is_needed_to_read(name) and (damage, name) != ("gone", "_log/000000.json"):
            with pytest.raises(StoreError, match=name):
                read_all(path)
        else:
            read_all(path)
        (path / name).write_bytes(good)
    assert verify_store(path) == []


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("a/c.0.0", "a/c.2.0"),
        ("token_id/c.0", "token_id/c.2"),
        ("position/c.2", "token_id/c.2"),
        ("a/zarr.json", "b/zarr.json"),
        ("document/zarr.json", "position/zarr.json"),
    ],
)
def test_swapped_files_are_named(pristine: Path, tmp_path: Path, one: str, two: str) -> None:
    path = tmp_path / "s"
    shutil.copytree(pristine, path)
    first, second = (path / one).read_bytes(), (path / two).read_bytes()
    (path / one).write_bytes(second)
    (path / two).write_bytes(first)
    damages = verify_store(path)
    assert one in str(damages) and (one.endswith("zarr.json") or two in str(damages))
    with pytest.raises(StoreError, match=f"{one}|{two}"):
        read_all(path)


def test_swapped_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS, arrays=ARRAYS, finalise=False)
    log = path / "_log" / "000000"
    (log / "000000000.json").rename(log / "x")
    (log / "000000002.json").rename(log / "000000000.json")
    (log / "x").rename(log / "000000002.json")
    with pytest.raises(StoreFormatError, match=r"000000000\.json is the record of item 2"):
        open_store(path)
    assert {damage.item for damage in verify_store(path)} == {0, 2}


def test_a_header_that_was_edited_is_refused(pristine: Path, tmp_path: Path) -> None:
    """Change the header to valid values that differ from those written."""
    path = tmp_path / "s"
    shutil.copytree(pristine, path)
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(
        text.replace('"provenance": {}', '"provenance": {"model": "m"}')
    )
    with pytest.raises(DamagedDataError, match=r"zarr\.json: the header fails its checksum"):
        open_store(path)
    assert [damage.file for damage in verify_store(path)] == ["zarr.json"]


def test_a_record_that_contradicts_the_snapshot_is_named(pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    shutil.copytree(pristine, path)
    record = path / "_log" / "000000" / "000000001.json"
    record.write_bytes(
        dump_checksummed(
            {**load_checksummed(str(record), record.read_bytes()), "attempt": "another"}
        )
    )
    damages = verify_store(path)
    assert [(damage.file, damage.item) for damage in damages] == [("_log/000000/000000001.json", 1)]
    assert "differs" in damages[0].problem


def test_swapped_chunks_of_one_shard_are_named(pristine: Path, tmp_path: Path) -> None:
    """Each chunk matches its own checksum; only its place is wrong."""
    path = tmp_path / "s"
    shutil.copytree(pristine, path)
    size = open_store(path).header.layout("a").chunk_bytes + 4
    data = (path / "a" / "c.0.0").read_bytes()
    (path / "a" / "c.0.0").write_bytes(data[size : 2 * size] + data[:size] + data[2 * size :])
    with pytest.raises(DamagedDataError, match=r"c.0.0: chunk 0 fails its checksum"):
        read_all(path)
    assert [(d.file, d.item, d.chunk) for d in verify_store(path)] == [
        ("a/c.0.0", 0, 0),
        ("a/c.0.0", 0, 1),
    ]


def test_a_chunk_that_fails_does_not_hide_the_others(pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    shutil.copytree(pristine, path)
    data = bytearray((path / "a" / "c.0.0").read_bytes())
    data[0] ^= 1
    (path / "a" / "c.0.0").write_bytes(data)
    store = open_store(path)
    chunk_rows = store.header.chunk_rows
    buffer = np.zeros((chunk_rows, 6), store.read("a", 16, 17).dtype)
    with pytest.raises(DamagedDataError, match="chunk 0"):
        store.read_chunks("a", [(0, 0, 0)], buffer)
    store.read_chunks("a", [(0, 1, 0)], buffer)
    np.testing.assert_array_equal(buffer, expected(ROWS, ARRAYS)["a"][chunk_rows : 2 * chunk_rows])
    last = -(-5 // chunk_rows) - 1
    before = buffer.copy()
    store.read_chunks("a", [(1, last, 0), (1, last + 1, 0)], buffer)
    valid = 5 - last * chunk_rows
    np.testing.assert_array_equal(buffer[:valid], expected(ROWS, ARRAYS)["a"][21 - valid : 21])
    np.testing.assert_array_equal(
        buffer[valid:], before[valid:]
    )  # rows past the end are left as they were
    with pytest.raises(IncompleteStoreError, match="item 4"):
        store.read_chunks("a", [(4, 0, 0)], buffer)


def file_bytes(layout: ShardLayout, rows: int) -> int:
    """Return the bytes of an uncompressed shard with `rows` rows."""
    return layout.chunks_with_rows(rows) * layout.most_stored_bytes + layout.tail_bytes


def test_a_record_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    """Values are checked even if the checksum of the record is valid."""
    path = tmp_path / "s"
    write_store(path, [16], finalise=False)
    record = path / "_log" / "000000" / "000000000.json"
    good = load_checksummed(str(record), record.read_bytes())
    name = "model.layers.9"
    shard = good["arrays"][name]
    header = open_store(path).header

    def sized(rows: int) -> dict[str, object]:
        """Return the changes to a record whose sizes match its rows."""
        sizes = {key: file_bytes(header.layout(key), rows) for key in good["arrays"]}
        arrays = {key: {**good["arrays"][key], "bytes": size} for key, size in sizes.items()}
        return {"rows": rows, "arrays": arrays}

    changes: list[dict[str, object]] = [
        {"rows": 3},
        sized(17),
        sized(-1),
        sized(10**12),
        {"rows": True},
        {"rows": 15.0},
        {"rows": [16]},
        {"item": 1},
        {"schema_version": 2},
        {"attempt": "x" * 1000},
        {"attempt": 5},
        {"arrays": {}},
        {"arrays": {**good["arrays"], "../x": shard}},
        {"arrays": {**good["arrays"], name: {**shard, "bytes": 10**15}}},
        {"arrays": {**good["arrays"], name: {**shard, "tail_crc32c": 2**40}}},
        {"arrays": {**good["arrays"], name: {**shard, "sum": "much"}}},
        {"arrays": {**good["arrays"], name: {}}},
        {"arrays": 7},
    ]
    for change in changes:
        record.write_bytes(dump_checksummed({**good, **change}))
        with pytest.raises(StoreFormatError, match=r"000000000.json"):
            open_store(path)
        assert [damage.item for damage in verify_store(path)] == [0]
    record.write_bytes(dump_checksummed(good))
    assert verify_store(path) == []
    record.write_bytes(b" " * (9 << 20))
    with pytest.raises(StoreFormatError, match="expected at most"):
        open_store(path)


@pytest.mark.parametrize("calls", range(13))
def test_a_failing_disk_leaves_a_store_that_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    path = tmp_path / "s"
    writer = write_store(path, ROWS, arrays=ARRAYS, order=[0, 1], finalise=False)
    fsync, left = os.fsync, [calls]

    def full(fd: int) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, "no space left on device")
        left[0] -= 1
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        writer.write_item(2, *item_columns(2, 16, ARRAYS))
    monkeypatch.undo()
    # The last call syncs the folder, when the record is already in it.
    assert open_store(path).n_items == (2 if calls < 12 else 3) and verify_store(path) == []
    writer.write_item(2, *item_columns(2, 16, ARRAYS))
    writer.write_item(3, *item_columns(3, 9, ARRAYS))
    writer.finalise()
    read_all(path)
    assert verify_store(path) == [] and not list((path / "_tmp").iterdir())


def test_a_reader_of_a_file_that_is_replaced_sees_the_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "_tmp").mkdir()
    (tmp_path / "x").write_bytes(b"old")
    with (tmp_path / "x").open("rb") as file:
        store_files.replace(tmp_path, tmp_path / "x", [b"new and longer"])
        assert file.read() == b"old"
    assert tree(tmp_path) == {"x": b"new and longer"}


@pytest.mark.parametrize("survivors", range(9))
def test_a_finalise_that_is_killed_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    path = tmp_path / "s"
    writer = write_store(path, ROWS, arrays=ARRAYS, finalise=False)
    replace, left = store_files.replace, [survivors]

    def killed(root: Path, file: Path, parts: list[bytes]) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(root, file, parts)

    monkeypatch.setattr(store_files, "replace", killed)
    # Snapshot, valid_rows and its metadata, and five arrays come first; the group is the ninth.
    with pytest.raises(KeyboardInterrupt):
        writer.finalise()
    monkeypatch.undo()
    store: Store = open_store(path)
    assert not store.finalised and store.n_tokens == sum(ROWS) and verify_store(path) == []
    writer.write_item(4, *item_columns(4, 3, ARRAYS))
    assert writer.finalise().n_tokens == sum(ROWS) + 3
    assert verify_store(path) == [] and open_store(path).n_items == 5
