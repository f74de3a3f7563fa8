"""Test the time and memory of opening a store of many shards from its snapshots."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from activation_store import open_store
from benchmarks.store.opening import N_SHARDS, large_log, peak_bytes


@pytest.mark.slow
def test_a_store_of_100_000_shards_opens_in_two_seconds_and_little_memory(tmp_path: Path) -> None:
    large_log(tmp_path / "s")
    started = time.process_time()  # CPU time: the machine may be busy
    store = open_store(tmp_path / "s")
    assert time.process_time() - started < 2
    assert store.n_items == N_SHARDS and store.n_tokens == 16 * N_SHARDS
    started = time.process_time()
    store.refresh()
    assert time.process_time() - started < 0.2
    assert peak_bytes(tmp_path / "s") < 120 << 20
