"""Opening a store of very many shards: seconds and memory, from its snapshots alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from activation_store import StoreWriter, log, open_store
from activation_store.record import ItemRecord, ShardRecord, Statistics, row_dtype, to_row
from activation_store.storage_local import LocalStorage
from tests.store_cases import item_columns

N_SHARDS = 100_000


def large_log(path: Path) -> None:
    """A growing store whose log names 100,000 items; no shard is there, for opening reads none."""
    writer = StoreWriter(path, {"a": 6}, shard_tokens=16, chunk_bytes=48)
    record = writer.write_item(0, *item_columns(0, 16, {"a": 6}))
    header = writer.header
    table = np.zeros(log.SEGMENT_ITEMS, row_dtype(header))
    for place in range(len(table)):
        arrays = {
            name: ShardRecord(shard.bytes, (2**31 + place * 7919) % 2**32, shard.statistics)
            for name, shard in record.arrays.items()
        }
        moments = Statistics(96, 0.1 * place - 7, 96.123456789, 3.25, 0)
        arrays["a"] = ShardRecord(record.arrays["a"].bytes, place, moments)
        attempt = f"{place:08d}-1234-1234-1234-123456789012"
        table[place] = to_row(ItemRecord(place, attempt, 16, arrays), table.dtype)
    for segment in range(N_SHARDS // log.SEGMENT_ITEMS):
        log.write_snapshot(LocalStorage(path), segment, table)


@pytest.mark.slow
def test_a_store_of_100_000_shards_opens_in_two_seconds(tmp_path: Path) -> None:
    large_log(tmp_path / "s")
    started = time.process_time()  # of this process alone: others may keep the machine busy
    store = open_store(tmp_path / "s")
    assert time.process_time() - started < 2
    assert store.n_items == N_SHARDS and store.n_tokens == 16 * N_SHARDS
    started = time.process_time()
    store.refresh()
    assert time.process_time() - started < 0.2


@pytest.mark.slow
def test_opening_it_takes_little_memory(tmp_path: Path) -> None:
    large_log(tmp_path / "s")
    script = f"""
import resource
from activation_store import open_store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = open_store({str(tmp_path / "s")!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 120 << 20
