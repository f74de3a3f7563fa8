"""Reading and writing activations, ours and the peers', against a raw file in the page cache.

    python -m benchmarks.store [--d-model 768 4096] [--mib 512] [--no-peers] [--json FILE]

Every row is a whole pass over the same rows, round by round in one process (SAELens in its own,
beside its own yardstick); checksums are always on, and `verify` reads every file of the store.
Ratios are speeds: 1 is the yardstick, which for reads is a raw memmap copied into a buffer that is
used again, for cold reads (the page cache emptied) plain reads into that buffer, for writes one raw
file with an fsync, and for opening a store of 100,000 shards reading the bytes of its log.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.store_data import Data, make_data
from benchmarks.store_opening import opening_rows
from benchmarks.store_ours import cold_calls, read_calls, write_calls
from benchmarks.store_peers import peer_calls, saelens_rows
from benchmarks.table import format_table, write_json
from benchmarks.timing import Timing, interleaved

COLUMNS = ("work", "system", "op", "median_s", "ratio", "tokens_per_s", "mb_per_s")
Key = tuple[str, str]


def main() -> None:
    """Measures, prints the table, writes it when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, nargs="+", default=[768, 4096])
    parser.add_argument("--mib", type=int, default=512, help="size of the data, once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where to put the data; default: a temporary folder")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for d_model in options.d_model:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            data = make_data(Path(folder), d_model, options.mib << 20)
            rows += warm_rows(data, options.rounds, not options.no_peers)
            rows += cold_rows(data, options.rounds)
            rows += write_rows(data, options.rounds)
            if not options.no_peers:
                rows += saelens_rows(data)
    rows += opening_rows(options.folder, options.rounds)
    print(format_table(rows, COLUMNS))
    if options.json:
        write_json(options.json, rows)


def warm_rows(data: Data, rounds: int, peers: bool) -> list[dict[str, Any]]:
    """Reads of data that lies in the page cache."""
    calls = read_calls(data)
    yardstick = next(iter(calls))
    rows = as_rows(data, interleaved(_named(calls), rounds=rounds, warmup=2), yardstick)
    if peers:  # fewer rounds: they are slow, and beside a yardstick of their own
        theirs = {yardstick: calls[yardstick], **peer_calls(data)}
        rows += as_rows(data, interleaved(_named(theirs), rounds=3, warmup=1), yardstick)[1:]
    return rows


def cold_rows(data: Data, rounds: int) -> list[dict[str, Any]]:
    """Reads of data that the page cache has let go of."""
    calls = cold_calls(data)
    timings = interleaved(_named(calls), rounds=rounds, warmup=1, prepare=data.drop_cache)
    return as_rows(data, timings, next(iter(calls)))


def write_rows(data: Data, rounds: int) -> list[dict[str, Any]]:
    """Writes of one item, durable when they return.

    Into pages that the page cache has just let go of: in a virtual machine, pages that the host has
    yet to give cost several times what the write does.
    """
    calls = write_calls(data)
    timings = interleaved(_named(calls), rounds=rounds, warmup=1, prepare=data.drop_cache)
    return as_rows(data, timings, next(iter(calls)), n_rows=data.shard_rows)


def as_rows(
    data: Data, timings: dict[str, Timing], yardstick: Key, n_rows: int | None = None
) -> list[dict[str, Any]]:
    """Benchmark rows of timings named by `_named`, against one of them."""
    n_rows = n_rows or data.n_rows
    base_s = timings[_name(yardstick)].median_s
    load = os.getloadavg()[0]
    rows = []
    for name, timing in timings.items():
        system, op = name.split(": ", 1)
        seconds = timing.median_s
        rows.append(
            {
                "work": {"D": data.d_model, "rows": n_rows, "dtype": "bfloat16"},
                "system": system,
                "op": op,
                "median_s": seconds,
                "best_s": timing.best_s,
                "ratio": base_s / seconds,
                "yardstick": _name(yardstick),
                "tokens_per_s": n_rows / seconds,
                "mb_per_s": n_rows * data.row_bytes / seconds / 1e6,
                "load": load,
            }
        )
    return rows


def _name(key: Key) -> str:
    return f"{key[0]}: {key[1]}"


def _named(calls: dict[Key, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    return {_name(key): call for key, call in calls.items()}


if __name__ == "__main__":
    main()
