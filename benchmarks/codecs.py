"""What each codec costs and what it does to real activations, and to an SAE trained on them.

    python -m benchmarks.codecs --store runs/demo/store [--heldout-items N] [--rounds N]
        [--tokens N] [--n-latents N] [--json FILE]

The rows of a store are written anew with every codec, all but those of its last items, which are
held out. A row tells of one codec: bytes, and the speed of writing and of reading in shuffled order
(gathered by this CPU, or staged: gathering and dequantising are left to a device), as ratios to
`none` in the same run, above 1 where it is smaller or faster; the fraction of variance that the
codec itself loses in each channel (mean and largest over channels) and in all; and the FVU, on the
held-out rows as they were before any codec, of an SAE trained on that store: same seed, same first
dictionary, same batches.
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
    Calibration,
    ShuffledStream,
    StagedStream,
    Store,
    StoreWriter,
    open_store,
)
from activation_store.header import CODECS
from benchmarks.one_rank import start_one_rank
from benchmarks.quality import base_config, train
from benchmarks.table import format_table, write_json
from benchmarks.timing import interleaved
from cluster.tensors import to_torch
from sae_core.memory import keep_freed_memory
from sae_core.trainer import Trainer

COLUMNS = (
    *("system", "bytes_ratio", "write_ratio", "gathered_ratio", "staged_ratio"),
    *("channel_fvu", "most_channel_fvu", "row_fvu", "sae_fvu", "sae_fvu_ratio"),
)
BATCH_ROWS, BUFFER_ROWS, WINDOW_ITEMS = 2048, 65_536, 16
VARIANT = "stock, fused, prefilter"


def main() -> None:
    """Measures, trains, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="of codec none")
    parser.add_argument("--heldout-items", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--n-latents", type=int, default=4096)
    parser.add_argument("--folder", help="where to put the stores; default: a temporary folder")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    keep_freed_memory()
    source = open_store(options.store)
    n_items = source.n_items - options.heldout_items
    if not source.finalised or n_items < 1:
        parser.error(
            f"{source.path} has {source.n_items} items: expected a finalised store of more"
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
    """Writes the first items of `source` with every codec; a row of each, `none` first."""
    items = [_rows(source, item, item + 1) for item in range(n_items)]
    write_s = _write(source, items, folder)
    stores = {codec: open_store(folder / codec) for codec in CODECS}
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
    """How much of the variance of the rows a codec loses, by channel and in all, in float64."""
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
    """The FVU on held-out rows of an SAE trained on `store`, and what training itself saw."""
    base = base_config(options.n_latents, options.tokens, dead_after_tokens=200_000)
    trainer, row = train(store, base, VARIANT)
    return {
        "sae_fvu": heldout_fvu(trainer, to_torch(heldout)),
        "train_fvu": row["fvu"],
        "dead_fraction": row["dead_fraction"],
    }


@torch.no_grad()
def heldout_fvu(trainer: Trainer, rows: torch.Tensor) -> float:
    """Sum |x - recon|^2 / sum |x - mean|^2 of `rows` [n, d_model], which have not been quantised.

    In the units of training: those are the raw ones but for a shift and one factor.
    """
    sae = trainer.engines[0].sae
    error = sum(float(sae(part).squared_error) for part in rows.split(BATCH_ROWS))
    x = sae.normalise(rows).double()
    return error / float((x - x.mean(0)).square().sum())


def _write(source: Store, items: list[NDArray[Any]], folder: Path) -> dict[str, float]:
    """Writes all items in every codec; seconds of the median item."""
    array, header = _array(source), source.header
    seconds: dict[str, list[float]] = {codec: [] for codec in CODECS}
    itemsize = items[0].dtype.itemsize
    writers = {
        codec: StoreWriter(
            folder / codec,
            {array: header.arrays[array]},
            dtype=header.dtype,
            codec=codec,
            shard_tokens=header.shard_tokens,
            # Chunks of the same rows, for the order of the batches to be the same.
            chunk_bytes=header.chunk_rows
            * header.arrays[array]
            * (1 if codec == "int8" else itemsize),
            calibration=header.calibration or {array: _moments(items[0])},
        )
        for codec in CODECS
    }
    for number, rows in enumerate(items):
        first = number % len(CODECS)
        for codec in CODECS[first:] + CODECS[:first]:
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
        stream.settle()  # so that nobody's reading ahead disturbs the others

    return call


def _array(store: Store) -> str:
    return next(iter(store.arrays))


def _rows(store: Store, first_item: int, stop_item: int) -> NDArray[Any]:
    """Rows of items [first, stop): [n, d_model]."""
    ends = np.concatenate([[0], np.cumsum(store.valid_rows)]).tolist()
    return store.read(_array(store), ends[first_item], ends[stop_item])


if __name__ == "__main__":
    main()
