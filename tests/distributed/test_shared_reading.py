"""Test that ranks read every chunk once between them, and get the same batches as one rank."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from activation_store import open_store
from activation_store.errors import StoreError
from activation_store.reading.shard_reader import OpenShard, Wanted
from activation_store.storage.atomic_files import Bytes
from cluster.training.batch_order import BatchOrder
from cluster.training.shared_reads import SharedReads
from cluster.training.store_source import StoreSource
from sae_core.distributed.mesh import Mesh
from tests.support.ranks import Ranks
from tests.support.store_cases import write_store

pytestmark = pytest.mark.distributed

BATCH = 48
ARRAY = "a"
N_CHUNKS = 48 * 4
Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a store whose blocks of 192 rows are 48 chunks, so no chunk spans two ranks' strips."""
    path = tmp_path_factory.mktemp("shared") / "s"
    options: dict[str, Any] = {"shard_tokens": 48, "chunk_bytes": 96, "dtype": "float32"}
    write_store(path, [48] * 16, arrays={ARRAY: 6}, **options)
    return path


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reports]:
    folder = tmp_path_factory.mktemp("alone") / "ranks"
    return folder, read_on_mesh(folder, store, 1, 1)


@pytest.mark.parametrize(("latent", "data"), [(2, 1), (1, 2), (2, 2), (3, 1)])
def test_every_mesh_reads_the_same_batches_and_every_chunk_once(
    store: Path, alone: tuple[Path, Reports], tmp_path: Path, latent: int, data: int
) -> None:
    folder = tmp_path / "ranks"
    reports = read_on_mesh(folder, store, latent, data)
    whole, report_alone = batches_of(alone[0], 0), alone[1][0]
    assert len(whole) == 768 // BATCH + 1
    reads: Counter[str] = Counter()
    for rank, one in enumerate(reports):
        replica, rows = rank // latent, BATCH // data
        mine = whole[:, replica * rows : (replica + 1) * rows]
        np.testing.assert_array_equal(batches_of(folder, rank), mine)
        assert one["first_rows"] == [first + replica * rows for first in report_alone["first_rows"]]
        assert one["sample"] == report_alone["sample"] and all(one["exchanged"])
        assert sum(count for _, count in one["reads"]) == N_CHUNKS // (latent * data)
        reads.update(dict(one["reads"]))
    assert len(reads) == N_CHUNKS and set(reads.values()) == {1}


def test_a_chunk_that_one_rank_cannot_read_fails_all_ranks(store: Path, tmp_path: Path) -> None:
    file = store / ARRAY / "c.6.0"
    original = file.read_bytes()
    try:
        file.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        reports = read_on_mesh(tmp_path / "ranks", store, 2, 1)
    finally:
        file.write_bytes(original)
    assert [one["error"] for one in reports] == ["DamagedDataError"] * 2
    assert all("c.6.0: chunk 0 fails its checksum" in one["text"] for one in reports)
    damaged, other = sorted(range(2), key=lambda rank: len(reports[rank]["notes"]))
    assert reports[damaged]["notes"] == []  # its own error
    assert reports[other]["notes"] == [f"Raised by rank {damaged}."]


def read_on_mesh(folder: Path, store: Path, latent: int, data: int) -> list[dict[str, Any]]:
    """Read one epoch, and a batch after a seek, on every rank.

    Args:
        folder: New folder for the results.
        store: Path of the store.
        latent: Ranks in each latent group.
        data: Number of replicas.

    Returns:
        The report of each rank: the chunks that it read, first rows, a sample, or its error.
    """
    ranks = Ranks(folder, latent * data, _read, str(folder), str(store), latent, data)
    assert not any(ranks.codes()), ranks.logs()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(latent * data)]


def batches_of(folder: Path, rank: int) -> np.ndarray:
    """Return the batches of a rank, [batches, rows, width]; the last one is after the seek."""
    return np.load(folder / f"{rank}.npy")


def _read(folder: str, store: str, latent: int, data: int) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = Mesh.create("cpu", latent, data)
    shared_reads = SharedReads.for_mesh(mesh, 60)
    opened = open_store(store)
    order = BatchOrder(7, BATCH, 4, 192, replica=mesh.data_rank, n_replicas=data)
    source = StoreSource(opened, ARRAY, order, shared_reads=shared_reads)
    source._stream._rows._prefetch = False  # or the next epoch's first block would count
    report: dict[str, Any] = {"exchanged": _exchange(shared_reads)}
    counted = _count_reads()
    try:
        epoch = source._stream.batches_per_epoch
        batches = [source.next() for _ in range(epoch)]
        report["reads"] = list(counted.items())
        source.seek(3)
        batches.append(source.next())
        report["first_rows"] = [batch.first_row for batch in batches]
        report["sample"] = source.sample(100).float().sum(1).tolist()
        np.save(f"{folder}/{rank}.npy", torch.stack([batch.x for batch in batches]).numpy())
    except (StoreError, RuntimeError) as error:
        report |= {"error": type(error).__name__, "text": str(error)}
        report["notes"] = getattr(error, "__notes__", [])
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    return 0


def _exchange(shared_reads: SharedReads) -> list[bool]:
    """Return, for every type of a store, whether ranks gather their parts of seven rows exactly."""
    lo, hi = shared_reads.part(0, 7)
    rows = torch.arange(21).reshape(7, 3)
    wholes = [rows.to(dtype) for dtype in (torch.bfloat16, torch.int8, torch.float32)]
    wholes.append(rows[:, 0].float())
    return [torch.equal(shared_reads.gather(whole[lo:hi], 7), whole) for whole in wholes]


def _count_reads() -> Counter[str]:
    """Count from now on how often each chunk is read, as `FILE/CHUNK`."""
    counted: Counter[str] = Counter()
    read_run = OpenShard.read_run

    def counting(shard: OpenShard, run: list[Wanted], targets: list[Bytes]) -> None:
        counted.update(f"{Path(shard.path).name}/{part.chunk}" for part in run)
        read_run(shard, run, targets)

    OpenShard.read_run = counting  # type: ignore[assignment, method-assign]
    return counted
