"""Writers that are killed at any moment, and started again, lose no row and double none."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from activation_store import StoreWriter, open_store, verify_store
from tests.store_cases import expected, tree, write_store

N_ITEMS, ARRAYS = 80, {"a": 64}
ROWS = [(item * 37) % 257 for item in range(N_ITEMS)]

WRITER = f"""
import os, random, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.store_cases import item_columns
from activation_store import StoreWriter, log
log.SEGMENT_ITEMS = 25
writer = StoreWriter(Path(sys.argv[1]), {ARRAYS!r}, shard_tokens=256, chunk_bytes=1000)
rows = {ROWS!r}
items = list(range({N_ITEMS}))
random.Random(os.getpid()).shuffle(items)
for item in items:
    writer.write_item(item, *item_columns(item, rows[item], {ARRAYS!r}))
"""


def start(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_writers_lose_and_double_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activation_store.log.SEGMENT_ITEMS", 25)
    path, rng = tmp_path / "s", random.Random(0)
    kills, writers = 0, [start(path) for _ in range(2)]
    deadline = time.monotonic() + 6
    while kills < 8 and time.monotonic() < deadline:
        time.sleep(rng.uniform(0.1, 0.4))
        victim = rng.randrange(2)
        if writers[victim].poll() is None:
            os.kill(writers[victim].pid, signal.SIGKILL)
            kills += 1
        writers[victim].wait()
        assert writers[victim].returncode in (0, -signal.SIGKILL), writers[victim].stderr
        if (path / "zarr.json").exists():
            store = open_store(path)  # at every moment a store that can be read
            store.read("a", 0, store.n_tokens)
        writers[victim] = start(path)
    for writer in writers:
        assert writer.wait(60) == 0, writer.stderr and writer.stderr.read()
    assert kills >= 4
    assert StoreWriter(path).finalise().n_items == N_ITEMS
    assert verify_store(path) == []
    store = open_store(path)
    for name, rows in expected(ROWS, ARRAYS).items():
        np.testing.assert_array_equal(store.read(name, 0, store.n_tokens), rows)

    # The same files as a writer that nobody disturbed, but for who was first and what was left.
    write_store(tmp_path / "calm", ROWS, arrays=ARRAYS, shard_tokens=256, chunk_bytes=1000)
    calm, found = tree(tmp_path / "calm"), tree(path)
    assert {name for name in found if not name.startswith("_tmp/")} == set(calm)
    assert all(found[name] == data for name, data in calm.items() if not name.startswith("_log"))
