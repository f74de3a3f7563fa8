"""SAEs trained one after the other beside the same ones on one stream: bytes read, time of steps.

    python -m benchmarks.sweep --store runs/demo/store --json FILE

Both sides go once over the store, in rounds of a few steps that alternate, so that what else the
machine does falls on both alike. Bytes are those that the store's file handles have given, without
the calibration's; a stream reads a block (`store.buffer_tokens`) ahead, at the end of the pass into
the next one, so that each reads a little more than one pass. At the end the weights of both sides
must be the same bits. Checkpoints are not written.
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
from activation_store.files import Bytes
from activation_store.storage import ReadHandle
from activation_store.storage_local import LocalStorage
from benchmarks.one_rank import start_one_rank
from benchmarks.table import format_table, write_json
from cluster.source import StoreSource
from sae_core.config import CheckpointConfig, OptimConfig, SAEConfig, TrainConfig, TrainerConfig
from sae_core.fan_out import FanOut
from sae_core.memory import keep_freed_memory
from sae_core.mesh import Mesh
from sae_core.trainer import Trainer

BATCH_TOKENS = 2048
ROUND_STEPS = 5
CPU = torch.device("cpu")


class CountingStorage(LocalStorage):
    """A store's folder that knows how many bytes its open files have given."""

    n_bytes = 0

    def open(self, name: str) -> ReadHandle:
        """As `LocalStorage`, and counts."""
        return _Counted(self, super().open(name))


class _Counted(ReadHandle):
    def __init__(self, storage: CountingStorage, file: ReadHandle) -> None:
        self._storage, self._file, self.size = storage, file, file.size

    def read_into(self, views: list[Bytes], offset: int) -> bool:
        self._storage.n_bytes += sum(len(view) for view in views)
        return self._file.read_into(views, offset)


class Side:
    """Some trainers on one stream.

    Args:
        path: of the store.
        configs: a trainer each, in lockstep.
        folder: for checkpoints, which are not written.
    """

    def __init__(self, path: Path, configs: list[TrainerConfig], folder: Path) -> None:
        self.storage = CountingStorage(path)
        store = Store(self.storage)
        array = next(iter(store.arrays))
        self.source = StoreSource(
            store, array, 0, BATCH_TOKENS, 0, 1, window_items=16, buffer_tokens=65_536
        )
        fan_out, mesh = FanOut(self.source, CPU), Mesh.create("cpu", 1, 1)
        self.trainers = [
            Trainer(config, mesh, fan_out.view(), folder, 0, lambda row: None, 10**9)
            for config in configs
        ]
        for trainer in self.trainers:
            trainer.calibrate()
        fan_out.forget_sample()
        self.sampled_bytes = self.storage.n_bytes

    def steps(self, n: int) -> None:
        """Steps of all trainers, as `train_together` takes them."""
        for _ in range(n):
            for trainer in self.trainers:
                trainer.take_step()


def measure(path: Path, configs: list[TrainerConfig]) -> list[dict[str, Any]]:
    """The rows: alone, and together."""
    with tempfile.TemporaryDirectory() as folder:
        alone = [Side(path, [config], Path(folder)) for config in configs]
        together = Side(path, configs, Path(folder))
        n_steps = configs[0].train.n_steps
        taken: dict[str, list[float]] = {"alone": [], "together": []}
        for done in range(0, n_steps, ROUND_STEPS):
            n = min(ROUND_STEPS, n_steps - done)
            calls: list[tuple[str, list[Side]]] = [("alone", alone), ("together", [together])]
            for name, sides in calls if done // ROUND_STEPS % 2 else reversed(calls):
                taken[name].append(_seconds(sides, n))
        _require_same(alone, together)
        for side in (*alone, together):
            side.source.close()
    ratios = [t / a for a, t in zip(taken["alone"], taken["together"], strict=True)]
    work = {
        "L": [config.sae.n_latents for config in configs],
        "k": [config.sae.k for config in configs],
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
    """Of the one array's rows."""
    array, width = next(iter(store.arrays.items()))
    return int(store.n_tokens * width * store.read(array, 0, 1).dtype.itemsize)


def _seconds(sides: list[Side], n_steps: int) -> float:
    began = time.perf_counter()
    for side in sides:
        side.steps(n_steps)
    return time.perf_counter() - began


def _require_same(alone: list[Side], together: Side) -> None:
    for index, (side, trainer) in enumerate(zip(alone, together.trainers, strict=True)):
        other = dict(side.trainers[0].engines[0].sae.named_parameters())
        for name, tensor in trainer.engines[0].sae.named_parameters():
            if not torch.equal(tensor, other[name]):
                raise RuntimeError(f"SAE {index}: {name} differs between alone and together")


def configs_of(n_latents: list[int], ks: list[int], tokens: int) -> list[TrainerConfig]:
    """A config for every size and k."""
    return [
        TrainerConfig(
            SAEConfig(n_latents=n, k=k, dead_after_tokens=100_000),
            OptimConfig(lr_at_16k=1e-3, warmup_tokens=tokens // 20),
            TrainConfig(tokens, BATCH_TOKENS),
            checkpoint=CheckpointConfig(every_tokens=10**12),
        )
        for n in n_latents
        for k in ks
    ]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument("--n-latents", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--tokens", type=int, help="of each; one pass over the store")
    parser.add_argument("--json", type=Path)
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
