"""Read SAELens' cached activations. Runs inside `.venv-peers`; `benchmarks.store.peers` calls it.

The data set is written as `CacheActivationsRunner` writes it (one Array2D per context) and read as
`ActivationsStore` reads it: slices of contexts in torch format, through the package's own
`mixing_buffer`. The files do not support bfloat16, so float16, which has the same size, is used.
Only some of the rows are read, because only the speed per row matters. The yardstick copies the
same number of bytes from a raw file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.timing import interleaved

CONTEXT = 128
N_CONTEXTS = 256
CONTEXTS_PER_READ = 16
BATCH_ROWS = 4096
BUFFER_ROWS = 16_384
HOOK = "activations"


def make_dataset(rows: np.ndarray[Any, Any], folder: Path) -> Any:
    """Save `rows` [n * CONTEXT, d_model] float16 like SAELens, and return the data set."""
    datasets: Any = import_module("datasets")  # installed only in the peers' environment
    features = datasets.Features(
        {HOOK: datasets.Array2D(shape=(CONTEXT, rows.shape[1]), dtype="float16")}
    )
    contexts = list(rows.reshape(-1, CONTEXT, rows.shape[1]))
    datasets.Dataset.from_dict({HOOK: contexts}, features=features).save_to_disk(
        str(folder / "arrow")
    )
    dataset: Any = datasets.load_from_disk(str(folder / "arrow"))
    dataset.set_format(type="torch", columns=[HOOK], dtype=torch.float16)
    return dataset


def loader(dataset: Any) -> Iterator[torch.Tensor]:
    """Yield the rows of a few contexts at a time, in order: [n * CONTEXT, d_model] float16."""
    for start in range(0, len(dataset), CONTEXTS_PER_READ):
        acts = dataset[start : start + CONTEXTS_PER_READ][HOOK]
        yield acts.reshape(-1, acts.shape[-1])


def main() -> None:
    """Measure SAELens and write its rows as JSON to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", help="raw file that the yardstick copies")
    parser.add_argument("d_model", type=int, help="width of the activations")
    parser.add_argument("--folder", required=True, help="folder for the data set")
    parser.add_argument("--out", required=True, help="file to write the rows to")
    options = parser.parse_args()
    from sae_lens.training.mixing_buffer import mixing_buffer

    n_rows = CONTEXT * N_CONTEXTS
    raw = np.memmap(options.raw, np.uint8, "r")[: n_rows * options.d_model * 2]
    n_rows = len(raw) // (options.d_model * 2) // CONTEXT * CONTEXT
    raw = raw[: n_rows * options.d_model * 2]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n_rows, options.d_model), np.float32).astype(np.float16)
    dataset = make_dataset(rows, Path(options.folder))
    buffer = np.ones(len(raw), np.uint8)

    def copy() -> None:
        buffer[:] = raw

    def shuffled() -> None:
        for _ in mixing_buffer(BUFFER_ROWS, BATCH_ROWS, loader(dataset)):
            pass

    calls: dict[str, Callable[[], object]] = {
        "memmap copy": copy,
        "cached, sequential": lambda: [None for _ in loader(dataset)],
        "cached, shuffled": shuffled,
    }
    timings = interleaved(calls, rounds=3, warmup=1)
    base_s = timings["memmap copy"].median_s
    found = [
        {
            "work": {"D": options.d_model, "rows": n_rows, "dtype": "float16"},
            "system": f"sae-lens {version('sae-lens')}",
            "op": name,
            "median_s": timing.median_s,
            "best_s": timing.best_s,
            "ratio": base_s / timing.median_s,
            "yardstick": "memmap copy in the same process",
            "tokens_per_s": n_rows / timing.median_s,
            "mb_per_s": n_rows * options.d_model * 2 / timing.median_s / 1e6,
            "load": os.getloadavg()[0],
        }
        for name, timing in timings.items()
        if name != "memmap copy"
    ]
    Path(options.out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
