"""Test that ranks read every chunk once between them, and get the same batches as one rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.reading_ranks import BATCH, batches_of, read_on_mesh
from tests.support.store_cases import write_store

pytestmark = pytest.mark.distributed

N_CHUNKS = 48 * 4
Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a store whose blocks of 192 rows are 48 chunks, so no chunk spans two ranks' strips."""
    path = tmp_path_factory.mktemp("shared") / "s"
    options: dict[str, Any] = {"shard_tokens": 48, "chunk_bytes": 96, "dtype": "float32"}
    write_store(path, [48] * 16, arrays={"a": 6}, **options)
    return path


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    folder = tmp_path_factory.mktemp("alone") / "ranks"
    return folder, read_on_mesh(folder, store, 1, 1)


@pytest.mark.parametrize(("latent", "data"), [(2, 1), (1, 2), (2, 2), (3, 1)])
def test_every_mesh_reads_the_same_batches_and_every_chunk_once(
    store: Path, alone: tuple[Path, Told], tmp_path: Path, latent: int, data: int
) -> None:
    folder = tmp_path / "ranks"
    told = read_on_mesh(folder, store, latent, data)
    whole, told_alone = batches_of(alone[0], 0), alone[1][0]
    assert len(whole) == 768 // BATCH + 1
    reads: Counter[str] = Counter()
    for rank, one in enumerate(told):
        replica, rows = rank // latent, BATCH // data
        mine = whole[:, replica * rows : (replica + 1) * rows]
        np.testing.assert_array_equal(batches_of(folder, rank), mine)
        assert one["first_rows"] == [first + replica * rows for first in told_alone["first_rows"]]
        assert one["sample"] == told_alone["sample"] and all(one["exchanged"])
        assert sum(count for _, count in one["reads"]) == N_CHUNKS // (latent * data)
        reads.update(dict(one["reads"]))
    assert len(reads) == N_CHUNKS and set(reads.values()) == {1}


def test_a_chunk_that_one_rank_cannot_read_fails_all_ranks(store: Path, tmp_path: Path) -> None:
    file = store / "a" / "c.6.0"
    original = file.read_bytes()
    try:
        file.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        told = read_on_mesh(tmp_path / "ranks", store, 2, 1)
    finally:
        file.write_bytes(original)
    assert [one["error"] for one in told] == ["DamagedDataError"] * 2
    assert all("c.6.0: chunk 0 fails its checksum" in one["text"] for one in told)
    damaged, other = sorted(range(2), key=lambda rank: len(told[rank]["notes"]))
    assert told[damaged]["notes"] == []  # its own error
    assert told[other]["notes"] == [f"Raised by rank {damaged}."]
