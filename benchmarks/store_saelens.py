"""Read SAELens' cached activations. Runs inside `.venv-peers`; `benchmarks.store_peers` calls it.

The data set is made as `CacheActivationsRunner` makes it (an Array2D of each context) and read as
`ActivationsStore` reads it: slices of contexts in torch format, through the package's own
`mixing_buffer`. Its files know no bfloat16: float16, which has as many bytes. A part of the rows is
enough, for the speed is that of a row; the yardstick beside it copies the same part.
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

from benchmarks.timing import interleaved

CONTEXT = 128
N_CONTEXTS = 256
CONTEXTS_PER_READ = 16
BATCH_ROWS = 4096
BUFFER_ROWS = 16_384
HOOK = "activations"


def make_dataset(rows: np.ndarray[Any, Any], folder: Path) -> Any:
    """`rows` [n * CONTEXT, d_model] float16 as SAELens keeps them."""
    datasets: Any = import_module("datasets")  # only the peers' environment has it
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
    """Rows of a few contexts at a time, in order."""
    for start in range(0, len(dataset), CONTEXTS_PER_READ):
        acts = dataset[start : start + CONTEXTS_PER_READ][HOOK]
        yield acts.reshape(-1, acts.shape[-1])


def main() -> None:
    """Measures and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw")
    parser.add_argument("d_model", type=int)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--out", required=True)
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
