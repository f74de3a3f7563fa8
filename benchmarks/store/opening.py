"""Time the opening of a store with very many shards, whose log is read from snapshots."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from activation_store import StoreWriter, open_store
from activation_store.format import commit_log
from activation_store.format.item_record import (
    ItemRecord,
    ShardRecord,
    Statistics,
    row_dtype,
    to_row,
)
from activation_store.storage.local import LocalStorage
from benchmarks.harness.timing import interleaved
from cluster.run_folder.environment import ROOT

N_SHARDS = 100_000
_ROWS, _WIDTH = 16, 6
_PEAK = """
import resource, sys
from activation_store import open_store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = open_store(sys.argv[1])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def large_log(path: Path) -> None:
    """Create a growing store whose log lists `N_SHARDS` items.

    Only the first shard's file exists, because opening a store reads no shards.
    """
    writer = StoreWriter(path, {"a": _WIDTH}, shard_tokens=_ROWS, chunk_bytes=48)
    record = writer.write_item(0, np.ones((_ROWS, _WIDTH), np.float32))
    table = np.zeros(commit_log.SEGMENT_ITEMS, row_dtype(writer.header))
    for place in range(len(table)):
        arrays = {
            name: ShardRecord(shard.bytes, (2**31 + place * 7919) % 2**32, shard.statistics)
            for name, shard in record.arrays.items()
        }
        moments = Statistics(_ROWS * _WIDTH, 0.1 * place - 7, 96.123456789, 3.25, 0)
        arrays["a"] = ShardRecord(record.arrays["a"].bytes, place, moments)
        attempt = f"{place:08d}-1234-1234-1234-123456789012"
        table[place] = to_row(ItemRecord(place, attempt, _ROWS, arrays), table.dtype)
    for segment in range(N_SHARDS // commit_log.SEGMENT_ITEMS):
        commit_log.write_snapshot(LocalStorage(path), segment, table)


def peak_bytes(path: Path) -> int:
    """Return the peak memory that opening a store adds to a new process, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return int(done.stdout)


def opening_rows(folder: str | None, rounds: int) -> list[dict[str, Any]]:
    """Time opening a store of `N_SHARDS` shards, and compare with reading the bytes of its log."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = Path(made) / "many"
        large_log(path)
        snapshots = sorted((path / commit_log.LOG).glob("*.json"))
        calls: dict[str, Callable[[], object]] = {
            "log, its bytes alone": lambda: [file.read_bytes() for file in snapshots],
            "open": lambda: open_store(path),
        }
        timings = interleaved(calls, rounds=rounds, warmup=1)
        base_s, timing = (timings[name].median_s for name in calls)
        return [
            {
                "work": {"shards": N_SHARDS},
                "system": "ours",
                "op": "open",
                "median_s": timing,
                "best_s": timings["open"].best_s,
                "ratio": base_s / timing,
                "yardstick": "the bytes of the log alone",
                "log_bytes": sum(file.stat().st_size for file in snapshots),
                "peak_bytes": peak_bytes(path),
                "load": os.getloadavg()[0],
            }
        ]
