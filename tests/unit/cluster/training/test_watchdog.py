"""Test that only a rank without progress writes its stacks and ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from activation_store import StoreWriter, open_store
from cluster.run_folder.files import rank_heartbeat
from cluster.training import heartbeats
from cluster.training.batch_order import BatchOrder
from cluster.training.heartbeats import Heartbeats
from cluster.training.store_source import StoreSource
from cluster.training.watchdog import HUNG
from tests.support.store_cases import item_columns

RANK = """
import re, sys, time
from pathlib import Path
from cluster.training import watchdog
watchdog.EXIT_DELAY_S = 0.3

def progress_nowhere():
    time.sleep(60)

def hold_the_interpreter():
    re.match(r"(a+)+$", "a" * 60 + "b")

step, looks = 0, 0
with watchdog.Watchdog(Path(sys.argv[1]), timeout_s=1.0, startup_timeout_s=4.0) as dog:
    dog.waits = lambda: looks
    time.sleep(2)  # compilation
    dog.start_training(lambda: step)
    time.sleep(1)  # a slow first step
    for _ in range(20):
        step += 1
        time.sleep(0.1)
    for _ in range(20):  # waiting for rows
        looks += 1
        time.sleep(0.1)
    print("all is well", flush=True)
    eval(sys.argv[2])
"""


def run(heartbeat: Path, end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RANK, str(heartbeat), end],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_steps_waits_and_a_slow_start_do_not_count_as_a_hang(tmp_path):
    done = run(tmp_path / "heartbeat", "None")
    assert (done.returncode, done.stdout) == (0, "all is well\n"), done.stderr
    assert not (tmp_path / "heartbeat").exists()


@pytest.mark.parametrize("where", ["progress_nowhere", "hold_the_interpreter"])
def test_a_hang_is_reported_with_its_stack(tmp_path, where):
    done = run(tmp_path / "heartbeat", f"{where}()")
    assert (done.returncode, done.stdout) == (1, "all is well\n"), done.stderr
    assert f"in {where}" in done.stderr
    if where == "progress_nowhere":
        assert "no progress for 1 s" in done.stderr
        assert (tmp_path / "heartbeat").read_text() == HUNG


def test_only_a_trainer_that_waits_for_rows_is_excused(tmp_path):
    writer = StoreWriter(tmp_path / "s", {"a": 6}, dtype="float32", shard_tokens=16)
    for item in range(2):
        writer.write_item(item, *item_columns(item, 16, {"a": 6}))
    source = StoreSource(open_store(tmp_path / "s"), "a", BatchOrder(0, 8, 1, 16))
    store = source._store
    for _ in range(4):  # all batches of both items
        source.next()
    looks = store.refreshes
    wait_until(lambda: store.refreshes > looks)  # reading ahead, for the third item
    assert source.waits == 0
    waiting = threading.Thread(target=source.next, daemon=True)
    waiting.start()
    wait_until(lambda: source.waits > 0)
    seen = source.waits
    wait_until(lambda: source.waits > seen)
    writer.write_item(2, *item_columns(2, 16, {"a": 6}))
    waiting.join(30)
    assert not waiting.is_alive() and source.waits == 0
    source.close()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_driver_sees_heartbeats_that_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "_MARGIN_S", 0.2)
    (tmp_path / "logs").mkdir()
    rank_heartbeat(tmp_path, 1).write_text(HUNG)  # from an earlier group of ranks
    seen = Heartbeats(tmp_path, 3, timeout_s=0.3)
    assert seen.frozen() == seen.hung() == []
    for rank, text in enumerate(("7", "3")):
        rank_heartbeat(tmp_path, rank).write_text(text)
    assert seen.frozen() == [] and seen.steps_taken() == 7
    time.sleep(0.6)
    os.utime(rank_heartbeat(tmp_path, 1))
    assert seen.frozen() == [0]
    rank_heartbeat(tmp_path, 0).write_text(HUNG)
    assert seen.frozen() == [] and seen.hung() == [0] and seen.steps_taken() == 0
