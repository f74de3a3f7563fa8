"""Compare SAEs that each train on their own stream with the same SAEs on one shared stream.

    python -m benchmarks.sweep --store runs/demo/store --json FILE

Measures the bytes read and the time spent on steps. Both sides pass once over the store. They
alternate in rounds of a few steps, so that other load on the machine affects both equally. Bytes
are counted at the store's file handles, except those read for calibration. A stream reads one block
(`store.buffer_tokens`) ahead, even past the end of the pass, so each stream reads slightly more
than one pass. At the end, the weights of both sides must agree bit for bit. No checkpoints are
written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from activation_store import Store
from activation_store.storage.atomic_files import Bytes
from activation_store.storage.base import ReadHandle
from activation_store.storage.local import LocalStorage
from benchmarks.harness.one_rank import start_one_rank
from benchmarks.harness.table import format_table, write_json
from cluster.training.batch_order import BatchOrder
from cluster.training.store_source import StoreSource
from sae_core.config import CheckpointConfig, OptimConfig, TopKConfig, TrainConfig, TrainerConfig
from sae_core.distributed.mesh import Mesh
from sae_core.training.malloc import keep_freed_memory
from sae_core.training.shared_source import SharedSource
from sae_core.training.trainer import Trainer

BATCH_TOKENS = 2048
ROUND_STEPS = 5
CPU = torch.device("cpu")


class CountingStorage(LocalStorage):
    """Local storage that counts the bytes read through its open files."""

    n_bytes = 0
    """Bytes read so far."""

    def open(self, name: str) -> ReadHandle:
        """Open a file whose reads are counted."""
        return _Counted(self, super().open(name))


class _Counted(ReadHandle):
    def __init__(self, storage: CountingStorage, file: ReadHandle) -> None:
        self._storage = storage
        self._file = file
        self.size = file.size

    def read_into(self, views: list[Bytes], offset: int) -> bool:
        self._storage.n_bytes += sum(len(view) for view in views)
        return self._file.read_into(views, offset)


class Side:
    """One or more trainers on one stream.

    Args:
        path: Path of the store.
        configs: Configs of the trainers, which step in lockstep.
        folder: Checkpoint folder, which stays empty.
    """

    def __init__(self, path: Path, configs: list[TrainerConfig], folder: Path) -> None:
        self.storage = CountingStorage(path)
        store = Store(self.storage)
        array = next(iter(store.arrays))
        order = BatchOrder(0, BATCH_TOKENS, window_items=16, buffer_tokens=65_536)
        self.source = StoreSource(store, array, order)
        shared_source = SharedSource(self.source, CPU)
        mesh = Mesh.create("cpu", 1, 1)
        self.trainers = [
            Trainer(config, mesh, shared_source.view(), folder, 0, lambda row: None, 10**9)
            for config in configs
        ]
        for trainer in self.trainers:
            trainer.calibrate()
        shared_source.clear_sample()
        self.sampled_bytes = self.storage.n_bytes

    def steps(self, n: int) -> None:
        """Take `n` steps with all trainers, in the order of `train_in_lockstep`."""
        for _ in range(n):
            for trainer in self.trainers:
                trainer.take_step()


def measure(path: Path, configs: list[TrainerConfig]) -> list[dict[str, Any]]:
    """Train all SAEs in both ways and return the rows "alone" and "together".

    Raises:
        RuntimeError: If the weights of the two sides differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        alone = [Side(path, [config], Path(folder)) for config in configs]
        together = Side(path, configs, Path(folder))
        n_steps = configs[0].train.n_steps
        taken: dict[str, list[float]] = {"alone": [], "together": []}
        for done in range(0, n_steps, ROUND_STEPS):
            n = min(ROUND_STEPS, n_steps - done)
            calls: list[tuple[str, list[Side]]] = [("alone", alone), ("together", [together])]
            # Swap the order every round, so that neither side always runs with the other's caches.
            for name, sides in calls if done // ROUND_STEPS % 2 else reversed(calls):
                taken[name].append(_seconds(sides, n))
        _require_same(alone, together)
        for side in (*alone, together):
            side.source.close()
    ratios = [t / a for a, t in zip(taken["alone"], taken["together"], strict=True)]
    work = {
        "L": [config.sae.n_latents for config in configs],
        "k": [config.sae.active_latents() for config in configs],
        "B": BATCH_TOKENS,
        "steps": n_steps,
    }
    store_bytes = _stored_bytes(Store(LocalStorage(path)))
    rows = []
    for name, sides in (("alone", alone), ("together", [together])):
        read = sum(side.storage.n_bytes for side in sides)
        sampled = sum(side.sampled_bytes for side in sides)
        rows.append(
            {
                "work": work,
                "system": "ours",
                "op": name,
                "saes": len(configs),
                "seconds": sum(taken[name]),
                "median_s": statistics.median(taken[name]) / ROUND_STEPS,
                "ratio": 1.0 if name == "alone" else statistics.median(ratios),
                "ratio_of_sums": sum(taken[name]) / sum(taken["alone"]),
                "read_bytes": read - sampled,
                "passes": (read - sampled) / store_bytes,
                "sampled_bytes": sampled,
                "tokens_per_s": n_steps * BATCH_TOKENS * len(configs) / sum(taken[name]),
            }
        )
    return rows


def _stored_bytes(store: Store) -> int:
    """Return the bytes of all rows of the store's first array, uncompressed."""
    array, width = next(iter(store.arrays.items()))
    return int(store.n_tokens * width * store.read(array, 0, 1).dtype.itemsize)


def _seconds(sides: list[Side], n_steps: int) -> float:
    began = time.perf_counter()
    for side in sides:
        side.steps(n_steps)
    return time.perf_counter() - began


def _require_same(alone: list[Side], together: Side) -> None:
    """Raise RuntimeError if a weight differs between the two sides."""
    for index, (side, trainer) in enumerate(zip(alone, together.trainers, strict=True)):
        other = dict(side.trainers[0].engine.sae.named_parameters())
        for name, tensor in trainer.engine.sae.named_parameters():
            if not torch.equal(tensor, other[name]):
                raise RuntimeError(
                    f"SAE {index}: {name} differs between training alone and together"
                )


def configs_of(n_latents: list[int], ks: list[int], tokens: int) -> list[TrainerConfig]:
    """Return a config for every combination of size and k, each for `tokens` training tokens."""
    return [
        TrainerConfig(
            TopKConfig(n_latents=n, k=k, dead_after_tokens=100_000),
            OptimConfig(lr_at_16k=1e-3, warmup_tokens=tokens // 20),
            TrainConfig(tokens, BATCH_TOKENS),
            checkpoint=CheckpointConfig(every_tokens=10**12),
        )
        for n in n_latents
        for k in ks
    ]


def main() -> None:
    """Run the benchmark, print the table and write it as JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--store", type=Path, default=Path("runs/demo/store"), help="path of the store"
    )
    parser.add_argument(
        "--n-latents",
        type=int,
        nargs="+",
        default=[256, 512, 1024, 2048],
        help="sizes of the SAEs",
    )
    parser.add_argument(
        "--k", type=int, nargs="+", default=[16, 32], help="active latents; each with every size"
    )
    parser.add_argument(
        "--tokens", type=int, help="training tokens of each SAE; default: one pass over the store"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    keep_freed_memory()
    start_one_rank()
    tokens = options.tokens or Store(LocalStorage(options.store)).n_tokens
    rows = measure(options.store, configs_of(options.n_latents, options.k, tokens))
    columns = (
        "system",
        "op",
        "saes",
        "seconds",
        "median_s",
        "ratio",
        "ratio_of_sums",
        "read_bytes",
    )
    print(format_table(rows, (*columns, "passes", "tokens_per_s")))
    if options.json:
        write_json(options.json, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
