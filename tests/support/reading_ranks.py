"""Start real gloo ranks that read one store with shared reads, without training."""

from __future__ import annotations

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from activation_store import open_store
from activation_store.errors import StoreError
from activation_store.reading.shard_reader import OpenShard, Wanted
from activation_store.storage.atomic_files import Bytes
from cluster.training.batch_order import BatchOrder
from cluster.training.shared_reads import SharedReads
from cluster.training.store_source import StoreSource
from sae_core.distributed.mesh import Mesh

BATCH = 48
ARRAY = "a"


def read_on_mesh(folder: Path, store: Path, latent: int, data: int) -> list[dict[str, Any]]:
    """Read one epoch, and a batch after a seek, on every rank.

    Args:
        folder: new folder for the results.
        store: path of the store.
        latent: ranks in each latent group.
        data: number of replicas.

    Returns:
        What each rank recorded: the chunks that it read, first rows, a sample, or its error.
    """
    folder.mkdir()
    ranks = latent * data
    mp.spawn(_read, (str(folder), str(store), latent, data), nprocs=ranks)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def batches_of(folder: Path, rank: int) -> np.ndarray:
    """Return the batches of a rank, [batches, rows, width]; the last one is after the seek."""
    return np.load(folder / f"{rank}.npy")


def _read(rank: int, folder: str, store: str, latent: int, data: int) -> None:
    torch.set_num_threads(1)
    ranks = latent * data
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    mesh = Mesh.create("cpu", latent, data)
    shared_reads = SharedReads.for_mesh(mesh, 60)
    opened = open_store(store)
    order = BatchOrder(7, BATCH, 4, 192, replica=mesh.data_rank, n_replicas=data)
    source = StoreSource(opened, ARRAY, order, shared_reads=shared_reads)
    source._stream._rows._prefetch = False  # else the next epoch's first block is counted as well
    told: dict[str, Any] = {"exchanged": _exchange(shared_reads)}
    counted = _count_reads()
    try:
        epoch = source._stream.batches_per_epoch
        batches = [source.next() for _ in range(epoch)]
        told["reads"] = list(counted.items())
        source.seek(3)
        batches.append(source.next())
        told["first_rows"] = [batch.first_row for batch in batches]
        told["sample"] = source.sample(100).float().sum(1).tolist()
        np.save(f"{folder}/{rank}.npy", torch.stack([batch.x for batch in batches]).numpy())
    except (StoreError, RuntimeError) as error:
        told |= {"error": type(error).__name__, "text": str(error)}
        told["notes"] = getattr(error, "__notes__", [])
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    # An error's traceback is a reference cycle that keeps process groups alive. A group that is
    # still alive when the interpreter ends aborts the process.
    del shared_reads, source
    gc.collect()
    dist.destroy_process_group()


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

    OpenShard.read_run = counting  # type: ignore[method-assign]
    return counted
