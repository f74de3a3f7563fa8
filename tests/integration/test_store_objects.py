"""Test the store on a real S3 server, directly and over a link with injected faults."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import zarr
from obstore.store import S3Store

from activation_store import (
    Consumer,
    DeletedDataError,
    HarvestLock,
    MixtureStream,
    RepairReport,
    ShuffledStream,
    StoreWriter,
    delete_consumed,
    lead_items,
    list_consumers,
    open_store,
    repair_store,
    verify_store,
)
from activation_store.errors import (
    DamagedDataError,
    MissingDataError,
    NonDeterministicItemError,
    StorageError,
    StoreBusyError,
    StoreFormatError,
    StoreMismatchError,
)
from activation_store.storage import lease, object_store
from activation_store.storage.open import open_storage
from foundation.errors import ConfigError
from tests.support.object_server import Fault, Proxy, make_bucket, s3_server
from tests.support.store_cases import calibration, expected, item_columns, tree, write_store

ARRAYS = {"a": 6, "b": 3}
ROWS = [16, 5, 0, 16, 9, 16, 1]
OPTIONS: dict[str, Any] = {"seed": 3, "batch_rows": 7, "window_items": 3, "buffer_rows": 20}
SECRET = "a-very-secret-key"


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        make_bucket(port, "bucket")
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(object_store, "_BACKOFF_S", 0.01)
    yield proxy
    proxy.close()


@pytest.fixture
def url(proxy: Proxy) -> str:
    return f"s3://bucket/{uuid.uuid4().hex}/s"


def bucket(url: str) -> S3Store:
    """Return a separate client for the objects of the store."""
    return S3Store(
        "bucket", prefix=url.removeprefix("s3://bucket/"), client_options={"allow_http": True}
    )


def objects(url: str) -> dict[str, bytes]:
    store = bucket(url)
    names = [part["path"] for page in obstore.list(store) for part in page]
    return {name: bytes(obstore.get(store, name).bytes()) for name in names}


def batches(path: str | Path, count: int) -> list[dict[str, Any]]:
    source = ShuffledStream(open_store(path), ["a", "b", "token_id"], **OPTIONS)
    found = [source.next().arrays for _ in range(count)]
    source.close()
    return found


def check_rows(path: str | Path, rows: list[int] = ROWS) -> None:
    store = open_store(path)
    for name, column in expected(rows, ARRAYS).items():
        np.testing.assert_array_equal(store.read(name, 0, store.n_tokens), column)


def nth(number: int, fault: Fault, method: str, part: str) -> Callable[[str, str], Fault]:
    """Return a rule that gives the first `number` matching requests the fault."""
    left = [number]

    def rule(this: str, path: str) -> Fault:
        if this == method and part in path and left[0]:
            left[0] -= 1
            return fault
        return None

    return rule


@pytest.mark.parametrize("kind", ["folder", "objects"])
def test_both_kinds_of_storage_behave_the_same(url: str, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s" if kind == "folder" else url
    storage = open_storage(path)
    storage.build(["x"], {"x/one": b"1"}, ("zarr.json", b"{}"))
    storage.build(["x"], {"x/one": b"2"}, ("zarr.json", b"[]"))  # a later attempt changes nothing
    assert storage.read("zarr.json", 2) == b"{}" and storage.read("x/one", 9) == b"1"
    storage.make_folder("x/deep")
    assert storage.put_if_absent("x/deep/two", [b"ab", np.arange(3, dtype=np.uint8)])
    assert not storage.put_if_absent("x/deep/two", [b"something else"])
    storage.sync(["x", "x/deep"])
    storage.put("x/three", [])
    assert sorted(storage.names("x")) == ["deep", "one", "three"]
    assert storage.names("nowhere") == [] and storage.names("x/deep") == ["two"]
    assert storage.exists("x/three") and not storage.exists("x/four")
    file = storage.open("x/deep/two")
    one, none, two = (np.zeros(size, np.uint8) for size in (1, 0, 3))
    assert file.size == 5 and file.read_into([one, none, two], 1)
    assert [*one, *two] == [ord("b"), 0, 1, 2]
    assert not file.read_into([two], 3) and file.read_into([none], 5)
    with pytest.raises(StoreFormatError, match="two has 5 bytes: expected at most 4"):
        storage.read("x/deep/two", 4)
    for ask in (lambda: storage.read("x/four", 9), lambda: storage.open("x/four")):
        with pytest.raises(MissingDataError, match=f"{path}/x/four is"):
            ask()
    storage.put("x/deep/two", [b"new"])
    assert storage.read("x/deep/two", 9) == b"new"
    storage.delete("x/deep/two")
    storage.delete("x/deep/two")
    assert not storage.exists("x/deep/two") and storage.remove_stale() == []
    with storage.lock(exclusive=True, timeout_s=1):
        assert storage.where("x") == f"{path}/x"


@pytest.mark.parametrize("codec", ["none", "blosc", "int8"])
def test_a_store_of_objects_is_the_local_one_bit_for_bit(
    url: str, tmp_path: Path, codec: str
) -> None:
    order, moments = [3, 1, 6, 0, 2, 5, 4], calibration(ARRAYS)
    for path in (url, tmp_path / "s"):
        writer = write_store(path, ROWS, order, ARRAYS, codec=codec, calibration=moments)
        assert writer.header.finalised and verify_store(path) == []
    found, wanted = objects(url), tree(tmp_path / "s")
    assert set(found) == set(wanted)
    assert all(found[name] == data for name, data in wanted.items() if not name.startswith("_log"))
    for one, other in zip(batches(url, 22), batches(tmp_path / "s", 22), strict=True):
        for name, rows in one.items():
            np.testing.assert_array_equal(rows, other[name])
    assert open_store(url).statistics("a") == open_store(tmp_path / "s").statistics("a")
    if codec == "none":
        remote = zarr.storage.ObjectStore(bucket(url), read_only=True)
        array = zarr.open_group(remote, mode="r")["a"]
        local = zarr.open_group(tmp_path / "s", mode="r")["a"]
        np.testing.assert_array_equal(array[:], local[:])
    mixed = MixtureStream([open_store(url), open_store(tmp_path / "s")], [1, 2], ["a"], **OPTIONS)
    assert mixed.next().arrays["a"].shape == (7, 6)
    mixed.close()


def test_writers_at_once_and_a_reader_that_follows(url: str, tmp_path: Path) -> None:
    write_store(tmp_path / "s", ROWS, arrays=ARRAYS)
    wanted = batches(tmp_path / "s", 12)
    errors: list[BaseException] = []

    def write(seed: int) -> None:
        try:
            writer = StoreWriter(url, ARRAYS, shard_tokens=16, chunk_bytes=48)
            items = list(range(len(ROWS)))
            random.Random(seed).shuffle(items)
            for item in items:
                writer.write_item(item, *item_columns(item, ROWS[item], ARRAYS))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    store = open_store(url)
    store.poll_s = 0.05
    source = ShuffledStream(store, ["a", "b", "token_id"], **OPTIONS)
    timer = threading.Timer(0.3, lambda: StoreWriter(url).finalise())
    timer.start()
    for batch in wanted:
        np.testing.assert_array_equal(source.next().arrays["a"], batch["a"])
    source.close()
    timer.join()
    assert verify_store(url) == [] and objects(url).keys() == tree(tmp_path / "s").keys()


WRITER = f"""
import os, random, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.support.store_cases import item_columns
from activation_store import StoreWriter
writer = StoreWriter(sys.argv[1], {ARRAYS!r}, shard_tokens=16, chunk_bytes=48)
items = list(range(80))
random.Random(os.getpid()).shuffle(items)
for item in items:
    writer.write_item(item, *item_columns(item, item % 17, {ARRAYS!r}))
"""


@pytest.mark.slow
def test_killed_writers_lose_and_repeat_nothing(
    url: str, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WRITER, url], stderr=subprocess.PIPE)

    rng, kills, writers = random.Random(1), 0, [start() for _ in range(2)]
    for victim in (0, 1, 0, 1):
        time.sleep(rng.uniform(0.4, 0.8))
        kills += writers[victim].poll() is None
        writers[victim].kill()
        writers[victim].wait()
        writers[victim] = start()
    for writer in writers:
        assert writer.wait(100) == 0, writer.stderr and writer.stderr.read()
    assert kills >= 2
    assert StoreWriter(url).finalise().n_items == 80
    assert verify_store(url) == []
    check_rows(url, [item % 17 for item in range(80)])


def test_other_bytes_and_other_stores_are_refused(url: str) -> None:
    writer = write_store(url, ROWS[:2], arrays=ARRAYS, finalise=False)
    before = objects(url)
    with pytest.raises(NonDeterministicItemError, match="item 0"):
        writer.write_item(0, *item_columns(99, 16, ARRAYS))
    with pytest.raises(StoreMismatchError, match="shard_tokens: the store has 16, requested 32"):
        write_store(url, [], arrays=ARRAYS, finalise=False, shard_tokens=32)
    with pytest.raises(StoreFormatError, match="holds objects but is not an activation store"):
        StoreWriter(url.rpartition("/")[0], ARRAYS)
    assert objects(url) == before


def test_a_half_created_store_is_completed(url: str, proxy: Proxy) -> None:
    proxy.rule = lambda method, path: "403" if method == "PUT" and "/b/zarr" in path else None
    with pytest.raises(StorageError, match=r"b/zarr\.json: put failed: HTTP 403"):
        write_store(url, [], arrays=ARRAYS, finalise=False)
    proxy.rule = lambda method, path: None
    with pytest.raises(MissingDataError, match=r"b/zarr\.json"):
        open_store(url)
    write_store(url, ROWS, arrays=ARRAYS)
    check_rows(url)


def test_consumers_retention_and_repair(url: str) -> None:
    writer = write_store(url, ROWS, arrays=ARRAYS, finalise=False)
    consumer = Consumer(url, "one")
    consumer.publish(next_item=3, keep_from_item=3, position=2)
    assert lead_items(url) == 4 and list_consumers(url) == {"one": consumer.state}
    assert delete_consumed(url) == [0, 1, 2]
    writer.finalise()
    with pytest.raises(DeletedDataError, match="item 0"):
        open_store(url).read("a", 0, 5)
    with pytest.raises(DeletedDataError):
        Consumer(url, "late")
    consumer.close()
    assert list_consumers(url) == {} and verify_store(url) == []
    assert repair_store(url) == RepairReport()
    obstore.delete(bucket(url), "a/c.4.0")
    obstore.put(bucket(url), "a/c.9.0", b"of a writer that may still be at it")
    assert repair_store(url).redo == [4] and "a/c.9.0" in objects(url)
    again = StoreWriter(url)
    again.write_item(4, *item_columns(4, ROWS[4], ARRAYS))
    again.finalise()
    store = open_store(url)
    rows = store.read("a", 21, store.n_tokens)
    np.testing.assert_array_equal(rows, expected(ROWS, ARRAYS)["a"][21:])


def test_missing_and_damaged_objects_are_named(url: str) -> None:
    write_store(url, ROWS, arrays=ARRAYS)
    store = bucket(url)
    for name, error in (
        ("a/c.3.0", DamagedDataError),
        ("token_id/c.0", DamagedDataError),
        ("_log/000000.json", DamagedDataError),
        ("zarr.json", StoreFormatError),
    ):
        good = bytes(obstore.get(store, name).bytes())
        for bad in (None, b"", good[:-3], good[:9] + bytes([good[9] ^ 1]) + good[10:]):
            if bad is None:
                obstore.delete(store, name)
            else:
                obstore.put(store, name, bad)
            assert name in str(verify_store(url)), (name, bad)
            if bad is not None or not name.startswith("_log"):  # single records say the same
                with pytest.raises((MissingDataError, error, StoreFormatError), match=name):
                    check_rows(url)
        obstore.put(store, name, good)
    assert verify_store(url) == []
    check_rows(url)


@pytest.mark.parametrize("fault", ["drop", "500", "lost", "cut", "slow"])
def test_a_link_that_fails_now_and_then(url: str, proxy: Proxy, fault: str) -> None:
    """Every third request of each kind fails; nothing is lost or repeated."""
    counts: dict[str, int] = {}

    def rule(method: str, path: str) -> Fault:
        counts[method] = counts.get(method, 0) + 1
        return fault if counts[method] % 3 == 1 else None

    proxy.rule = rule
    write_store(url, ROWS[:4], arrays=ARRAYS)
    assert verify_store(url) == []
    check_rows(url, ROWS[:4])
    proxy.rule = lambda method, path: None
    records = [name for name in objects(url) if name.startswith("_log/000000/")]
    assert len(records) == 4 and open_store(url).n_tokens == sum(ROWS[:4])


def test_a_storm_of_faults(url: str, proxy: Proxy, tmp_path: Path) -> None:
    rng = random.Random(5)
    faults = ["drop", "500", "lost", "cut", "slow"]
    proxy.rule = lambda method, path: rng.choice(faults) if rng.random() < 0.3 else None
    write_store(url, ROWS, arrays=ARRAYS)
    found = batches(url, 22)
    proxy.rule = lambda method, path: None
    write_store(tmp_path / "s", ROWS, arrays=ARRAYS)
    for one, other in zip(found, batches(tmp_path / "s", 22), strict=True):
        np.testing.assert_array_equal(one["token_id"], other["token_id"])
        np.testing.assert_array_equal(one["a"], other["a"])
    assert objects(url).keys() == tree(tmp_path / "s").keys() and verify_store(url) == []


def test_a_commit_whose_answer_is_lost_succeeds(url: str, proxy: Proxy) -> None:
    writer = write_store(url, [], arrays=ARRAYS, finalise=False)
    storage = open_storage(url)
    proxy.rule = nth(1, "lost", "PUT", "/thing")
    assert storage.put_if_absent("thing", [b"of this ", b"attempt"]), (
        "the retry must recognise its own object"
    )
    proxy.rule = nth(1, "drop", "PUT", "/thing")
    assert not storage.put_if_absent("thing", [b"of another one"])
    assert storage.read("thing", 99) == b"of this attempt"
    storage.delete("thing")
    proxy.rule = nth(1, "lost", "PUT", "/_log/")
    record = writer.write_item(0, *item_columns(0, 16, ARRAYS))
    assert StoreWriter(url).write_item(0, *item_columns(0, 16, ARRAYS)) == record
    name = "_log/000000/000000000.json"
    assert record.attempt in objects(url)[name].decode()
    assert [path for _, path in proxy.requests if "/_log/" in path and path.endswith(name)]


def test_a_shard_is_read_in_few_requests(url: str, proxy: Proxy) -> None:
    arrays = {"a": 64}
    write_store(url, [256] * 3, arrays=arrays, shard_tokens=256, chunk_bytes=1024)
    store = open_store(url)
    store.read("token_id", 0, 1)
    proxy.requests.clear()
    store.read("a", 0, 3 * 256)  # 32 chunks in each shard
    kinds = [method for method, path in proxy.requests if "/a/c." in path]
    assert sorted(kinds) == ["GET"] * 6 + ["HEAD"] * 3, (
        "one HEAD and two GETs (tail, chunks) a shard"
    )
    proxy.requests.clear()
    store.read("a", 0, 3 * 256)
    assert len(proxy.requests) == 3, "tails must be cached"
    proxy.requests.clear()
    out = np.empty((16, 64), store.read("a", 0, 1).dtype)
    proxy.requests.clear()
    store.read_chunks("a", [(1, 2, 0), (1, 9, 8)], out)  # a gap small enough to read through
    assert len(proxy.requests) == 1
    rows = expected([256] * 3, arrays)["a"][256:]
    np.testing.assert_array_equal(out, np.concatenate([rows[16:24], rows[72:80]]))


def test_a_server_that_does_not_answer_is_reported_soon_and_without_secrets(
    url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(url, ROWS, arrays=ARRAYS)
    for fault, problem in (("drop", "no answer"), ("500", "HTTP 500"), ("403", "HTTP 403")):
        proxy.rule = lambda method, path, fault=fault: fault  # type: ignore[misc]
        proxy.requests.clear()
        started = time.monotonic()
        with pytest.raises(StorageError, match=rf"zarr\.json: get failed: {problem}.*AWS_ACCESS"):
            open_store(url)
        assert time.monotonic() - started < 20
        assert len(proxy.requests) <= (1 if fault == "403" else 50)
    proxy.rule = lambda method, path: None
    with pytest.raises(StorageError, match="NoSuchBucket"):
        open_store("s3://no-bucket/s")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:swordfish@127.0.0.1:9")
    with pytest.raises(StorageError) as error:
        open_store(url)
    assert "swordfish" not in str(error.value) and SECRET not in str(error.value)
    assert error.value.__context__ is None and error.value.__cause__ is None
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="MissingSecretAccessKey"):
        open_store(url)


def test_read_errors_are_reported_and_repair_changes_nothing(url: str, proxy: Proxy) -> None:
    write_store(url, ROWS[:2], arrays=ARRAYS)
    before = objects(url)
    proxy.rule = lambda method, path: "403" if "/a/c.1" in path else None
    assert "cannot be read" in str(verify_store(url)[0])
    with pytest.raises(StorageError):
        repair_store(url)
    proxy.rule = lambda method, path: None
    assert objects(url) == before


def test_a_server_that_ignores_conditions_is_refused(url: str, proxy: Proxy) -> None:
    proxy.rule = lambda method, path: "strip"
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        write_store(url, [], arrays=ARRAYS, finalise=False)


@pytest.mark.parametrize(
    "address", ["s3://bucket", "s3://", "s3://b/", "s3://bucket/../x", "s3://id:swordfish@b/s"]
)
def test_invalid_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix") as error:
        open_store(address)
    assert "swordfish" not in str(error.value)


@pytest.fixture
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 2.0)


def stop_heartbeat(harvest_lock: HarvestLock) -> None:
    """Stop the heartbeat of the lease, as if its process were frozen."""
    assert isinstance(harvest_lock._held, lease.Lease)
    harvest_lock._held._stop.set()
    harvest_lock._held._thread.join()


def test_a_run_keeps_its_lease_while_its_heartbeat_continues(url: str, quick_leases: None) -> None:
    write_store(url, [16], arrays=ARRAYS, finalise=False)
    one, two = HarvestLock(url, "one"), HarvestLock(url, "two")
    one.acquire()
    for _ in range(2):
        with pytest.raises(StoreBusyError, match="is being written by run one, process"):
            two.acquire()
    again = HarvestLock(url, "one")  # a restarted driver of the same run
    again.acquire()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            one.check()
        except StoreBusyError as error:
            assert "was taken over by run one" in str(error)
            break
        time.sleep(0.05)
    else:
        pytest.fail("the old holder did not notice")
    one.release()  # must not release the new holder's lease
    with pytest.raises(StoreBusyError):
        two.acquire()
    again.release()
    started = time.monotonic()
    two.acquire()
    assert time.monotonic() - started < lease.STALE_S
    assert [name for name in objects(url) if "_claim" in name] == ["_claim/000000003.json"]
    two.release()


def test_a_lease_without_heartbeat_goes_to_exactly_one_taker(url: str, quick_leases: None) -> None:
    write_store(url, [16], arrays=ARRAYS, finalise=False)
    dead = HarvestLock(url, "dead")
    dead.acquire()
    stop_heartbeat(dead)
    takers = [HarvestLock(url, f"taker-{number}") for number in range(3)]
    busy: list[StoreBusyError] = []

    def take(harvest_lock: HarvestLock) -> None:
        try:
            harvest_lock.acquire()
        except StoreBusyError as error:
            busy.append(error)

    threads = [threading.Thread(target=take, args=(harvest_lock,)) for harvest_lock in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(harvest_lock.is_held for harvest_lock in takers) == 1 and len(busy) == 2
    for harvest_lock in takers:
        harvest_lock.check()
        harvest_lock.release()
