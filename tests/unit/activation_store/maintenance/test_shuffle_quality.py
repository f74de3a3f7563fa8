"""Test the measure of shuffle quality on cases whose answer is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from activation_store import ShuffleQuality, Store, StoreWriter, open_store, shuffle_quality
from activation_store.errors import IncompleteStoreError
from foundation.errors import ConfigError


def documents_store(path: Path, document: np.ndarray, shard: int, chunk_rows: int) -> Store:
    writer = StoreWriter(path, {"a": 1}, shard_tokens=shard, chunk_bytes=2 * chunk_rows)
    for item in range(len(document) // shard):
        rows = slice(item * shard, (item + 1) * shard)
        sidecars = {"document": document[rows]}
        writer.write_item(item, np.zeros((shard, 1), np.float32), sidecars)
    writer.finalise()
    return open_store(path)


def test_a_whole_store_in_one_buffer_is_perfect(tmp_path: Path) -> None:
    document = np.repeat(np.arange(64), 64)
    store = documents_store(tmp_path / "s", document, 512, 64)
    found = shuffle_quality(store, 0, 8, 4096, 256)
    assert found.perfect == pytest.approx(255 * 63 / 4095)
    # A batch has one of every sixteen adjacent rows: exactly four of each document's 64.
    assert found.companions == 3 and found.batches == 16
    assert found.warning is None and "ratio" in str(found) and "warning" not in str(found)


def test_a_small_buffer_gives_a_warning(tmp_path: Path) -> None:
    document = np.repeat(np.arange(64), 64)
    store = documents_store(tmp_path / "s", document, 512, 64)
    found = shuffle_quality(store, 0, 1, 64, 64, max_batches=5)
    # A buffer of one chunk holds one document: the other 63 rows of a batch are companions.
    assert (found.companions, found.batches) == (63, 5)
    assert found.ratio == pytest.approx(65, rel=0.01)
    assert "store.buffer_tokens" in str(found)


def test_documents_of_one_token_have_no_companions(tmp_path: Path) -> None:
    store = documents_store(tmp_path / "s", np.arange(512), 128, 16)
    assert shuffle_quality(store, 0, 2, 64, 32) == ShuffleQuality(0.0, 0.0, 16)
    assert ShuffleQuality(0.0, 0.0, 16).ratio == 1.0
    assert ShuffleQuality(1.0, 0.0, 16).ratio == float("inf")


def test_invalid_settings_and_unfinished_stores_are_refused(tmp_path: Path) -> None:
    store = documents_store(tmp_path / "s", np.arange(128), 128, 16)
    with pytest.raises(ConfigError, match="batch_rows"):
        shuffle_quality(store, 0, 2, 64, 129)
    StoreWriter(tmp_path / "g", {"a": 1})
    with pytest.raises(IncompleteStoreError):
        shuffle_quality(open_store(tmp_path / "g"), 0, 2, 64, 32)


def test_the_command_prints_it(tmp_path: Path) -> None:
    documents_store(tmp_path / "s", np.repeat(np.arange(8), 64), 128, 16)
    command = [
        sys.executable,
        "-m",
        "activation_store.maintenance.shuffle_quality",
        str(tmp_path / "s"),
    ]
    done = subprocess.run(
        [*command, "--batch-tokens", "64", "--buffer-tokens", "64"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("same-document companions per token: ")
