"""Measure the cost of each codec, its loss on real activations and the FVU of SAEs trained on them.

    python -m benchmarks.codecs --store runs/demo/store [--heldout-items N] [--rounds N]
        [--tokens N] [--n-latents N] [--json FILE]

The rows of a store, except those of the last items, are rewritten with every codec. Each row of
the table describes one codec:

- Size, and the speeds of writing and of shuffled reading, as ratios to codec `none` in the same
  run. A ratio above 1 means smaller or faster. "gathered": this CPU gathers and dequantises the
  rows. "staged": both steps are left to a device.
- The fraction of variance that the codec itself loses: mean and maximum over channels, and in
  total.
- The FVU of an SAE trained on that store, measured on the original rows of the held-out items. All
  SAEs have the same seed, initial dictionary and batches.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from activation_store import (
    CODECS,
    Calibration,
    ShuffledStream,
    StagedStream,
    Store,
    StoreWriter,
    open_store,
)
from benchmarks.harness.one_rank import start_one_rank
from benchmarks.harness.table import format_table, write_json
from benchmarks.harness.timing import interleaved
from benchmarks.quality import base_config, train
from cluster.training.device_gather import to_torch
from sae_core.training.malloc import keep_freed_memory
from sae_core.training.trainer import Trainer

COLUMNS = (
    *("system", "bytes_ratio", "write_ratio", "gathered_ratio", "staged_ratio"),
    *("channel_fvu", "most_channel_fvu", "row_fvu", "sae_fvu", "sae_fvu_ratio"),
)
BATCH_ROWS, BUFFER_ROWS, WINDOW_ITEMS = 2048, 65_536, 16
VARIANT = "stock, fused update"


def main() -> None:
    """Run the benchmark: print the table, and write it as JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="a finalised store with codec none")
    parser.add_argument(
        "--heldout-items", type=int, default=5, help="number of last items to evaluate on"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each kind and codec")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of each SAE")
    parser.add_argument("--n-latents", type=int, default=4096, help="latents of each SAE")
    parser.add_argument("--folder", help="folder for the stores; default: a temporary folder")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    options = parser.parse_args()
    keep_freed_memory()
    source = open_store(options.store)
    n_items = source.n_items - options.heldout_items
    if not source.finalised or n_items < 1:
        parser.error(
            f"{source.path} has {source.n_items} items: expected a finalised store with more than "
            f"{options.heldout_items} items; finish the store or lower --heldout-items"
        )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(source, n_items, Path(folder), options.rounds)
        print(format_table(rows, COLUMNS), flush=True)
        start_one_rank()
        heldout = _rows(source, n_items, source.n_items)
        for row in rows:
            row.update(trained(open_store(Path(folder) / row["op"]), heldout, options))
            row["sae_fvu_ratio"] = row["sae_fvu"] / rows[0]["sae_fvu"]
            print(format_table(rows, COLUMNS), flush=True)
        dist.destroy_process_group()
    if options.json:
        write_json(options.json, rows)


def measure(source: Store, n_items: int, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Write the first items of `source` with every codec and return one row per codec.

    Args:
        source: Store to copy rows from.
        n_items: Number of items to copy.
        folder: Folder for the new stores, each named after its codec.
        rounds: Number of timed epochs for each codec and kind of reading.

    Returns:
        One row per codec, `none` first.
    """
    items = [_rows(source, item, item + 1) for item in range(n_items)]
    write_s = _write(source, items, folder)
    stores = {codec: open_store(folder / codec) for codec in CODECS.names()}
    gathered, staged = (
        interleaved({codec: _epoch(kind, store) for codec, store in stores.items()}, rounds=rounds)
        for kind in (ShuffledStream, StagedStream)
    )
    rows = []
    for codec, store in stores.items():
        work = {"D": items[0].shape[1], "rows": store.n_tokens, "dtype": source.dtype}
        rows.append(
            {
                "work": work,
                "system": f"codec {codec}",
                "op": codec,
                "bytes": store.n_bytes,
                "bytes_ratio": stores["none"].n_bytes / store.n_bytes,
                "write_s": write_s[codec],
                "write_ratio": write_s["none"] / write_s[codec],
                "gathered_s": gathered[codec].median_s,
                "gathered_ratio": gathered["none"].median_s / gathered[codec].median_s,
                "staged_s": staged[codec].median_s,
                "staged_ratio": staged["none"].median_s / staged[codec].median_s,
                "load": os.getloadavg()[0],
                **lost_variance(items, store),
            }
        )
    return rows


def lost_variance(items: list[NDArray[Any]], store: Store) -> dict[str, float]:
    """Return the fraction of variance that a codec loses, per channel and in total, in float64.

    Args:
        items: Original rows, [n, d_model] each.
        store: The same rows, written with the codec.
    """
    width = items[0].shape[1]
    total, square, error = (np.zeros(width) for _ in range(3))
    first = 0
    for item in items:
        rows = item.astype(np.float64)
        stored = store.read(_array(store), first, first + len(rows)).astype(np.float64)
        first += len(rows)
        total += rows.sum(0)
        square += np.square(rows).sum(0)
        error += np.square(rows - stored).sum(0)
    variance = square - total**2 / first
    channels = error / np.maximum(variance, np.finfo(np.float64).tiny)
    return {
        "channel_fvu": float(channels.mean()),
        "most_channel_fvu": float(channels.max()),
        "row_fvu": float(error.sum() / variance.sum()),
    }


def trained(store: Store, heldout: NDArray[Any], options: argparse.Namespace) -> dict[str, float]:
    """Train an SAE on `store`; return training metrics and its FVU on `heldout` [n, d_model]."""
    base = base_config(options.n_latents, options.tokens, dead_after_tokens=200_000)
    trainer, row = train(store, base, VARIANT)
    return {
        "sae_fvu": heldout_fvu(trainer, to_torch(heldout)),
        "train_fvu": row["fvu"],
        "dead_fraction": row["dead_fraction"],
    }


@torch.no_grad()
def heldout_fvu(trainer: Trainer, rows: torch.Tensor) -> float:
    """Return sum |x - recon|^2 / sum |x - mean|^2 over unquantised `rows` [n, d_model].

    The FVU is computed on normalised rows. Normalisation shifts and scales all rows equally, so the
    FVU is the same as in raw units.
    """
    sae = trainer.engine.sae
    error = sum(float(sae(part).squared_error) for part in rows.split(BATCH_ROWS))
    x = sae.normalise(rows).double()
    return error / float((x - x.mean(0)).square().sum())


def _write(source: Store, items: list[NDArray[Any]], folder: Path) -> dict[str, float]:
    """Write all items with every codec and return each codec's median seconds per item."""
    array, header = _array(source), source.header
    names, width = CODECS.names(), header.arrays[array]
    seconds: dict[str, list[float]] = {codec: [] for codec in names}
    writers = {
        codec: StoreWriter(
            folder / codec,
            {array: width},
            dtype=header.dtype,
            codec=codec,
            shard_tokens=header.shard_tokens,
            # The shuffle permutes chunks. Equal rows per chunk give every codec the same batches.
            chunk_bytes=header.chunk_rows
            * CODECS[codec].disk_arrays(items[0].dtype, width)[""].row_bytes,
            calibration=header.calibration or {array: _moments(items[0])},
        )
        for codec in names
    }
    for number, rows in enumerate(items):
        # Start each item with a different codec. No codec then always follows the same neighbour.
        first = number % len(names)
        for codec in names[first:] + names[:first]:
            start = time.perf_counter()
            writers[codec].write_item(number, rows)
            seconds[codec].append(time.perf_counter() - start)
    for writer in writers.values():
        writer.finalise()
    return {codec: statistics.median(taken) for codec, taken in seconds.items()}


def _moments(rows: NDArray[Any]) -> Calibration:
    values = rows.astype(np.float64)
    return Calibration(values.mean(0), values.std(0), 1.0)


def _epoch(kind: type[ShuffledStream | StagedStream], store: Store) -> Callable[[], None]:
    stream = kind(
        store,
        [_array(store)],
        seed=0,
        batch_rows=BATCH_ROWS,
        window_items=WINDOW_ITEMS,
        buffer_rows=BUFFER_ROWS,
    )

    def call() -> None:
        for _ in range(stream.batches_per_epoch):
            stream.next()
        stream.settle()  # finish the read-ahead here, so that it does not slow the next codec

    return call


def _array(store: Store) -> str:
    return next(iter(store.arrays))


def _rows(store: Store, first_item: int, stop_item: int) -> NDArray[Any]:
    """Return the rows of items [first_item, stop_item) as [n, d_model]."""
    ends = np.concatenate([[0], np.cumsum(store.valid_rows)]).tolist()
    return store.read(_array(store), ends[first_item], ends[stop_item])


if __name__ == "__main__":
    main()
