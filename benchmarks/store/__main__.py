"""Time reading and writing of activations, ours and the peers', against a raw file.

    python -m benchmarks.store [--d-model 768 4096] [--mib 512] [--no-peers] [--json FILE]

Every row for a read times a whole pass over the same data, round by round in one process. SAELens
runs in a separate process, with its own yardstick. Our checksums are always on, and `verify`
reads every file of the store. Ratios are speeds relative to a yardstick:

- reads: a memmap of a raw file, copied into a reused buffer;
- cold reads, after the page cache is emptied: plain reads into that buffer;
- writes: one raw file with an fsync;
- opening a store of 100,000 shards: reading the bytes of its log.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.table import format_table, write_json
from benchmarks.harness.timing import Timing, interleaved
from benchmarks.store.data import Data, make_data
from benchmarks.store.opening import opening_rows
from benchmarks.store.ours import cold_calls, read_calls, write_calls
from benchmarks.store.peers import peer_calls, saelens_rows

COLUMNS = ("work", "system", "op", "median_s", "ratio", "tokens_per_s", "mb_per_s")
Key = tuple[str, str]


def main() -> None:
    """Run the benchmark, print the table and write it as JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--d-model", type=int, nargs="+", default=[768, 4096], help="widths of the activations"
    )
    parser.add_argument(
        "--mib", type=int, default=512, help="size of the data in MiB; each format stores it once"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each row")
    parser.add_argument("--folder", help="folder for the data; default: a temporary folder")
    parser.add_argument(
        "--no-peers", action="store_true", help="do not measure the peers' packages"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
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
    """Time reads of data in the page cache, ours and, if `peers`, other packages'."""
    calls = read_calls(data)
    yardstick = next(iter(calls))
    rows = as_rows(data, interleaved(_named(calls), rounds=rounds, warmup=2), yardstick)
    if peers:  # the peers are slow: fewer rounds, next to a yardstick timed again
        theirs = {yardstick: calls[yardstick], **peer_calls(data)}
        rows += as_rows(data, interleaved(_named(theirs), rounds=3, warmup=1), yardstick)[1:]
    return rows


def cold_rows(data: Data, rounds: int) -> list[dict[str, Any]]:
    """Time reads of data that is not in the page cache."""
    calls = cold_calls(data)
    timings = interleaved(_named(calls), rounds=rounds, warmup=1, prepare=data.drop_cache)
    return as_rows(data, timings, next(iter(calls)))


def write_rows(data: Data, rounds: int) -> list[dict[str, Any]]:
    """Time writes of one item, each of which is durable when it returns.

    The page cache is emptied before each write, so that free pages are available. In a virtual
    machine, getting new pages from the host costs several times as much as the write.
    """
    calls = write_calls(data)
    timings = interleaved(_named(calls), rounds=rounds, warmup=1, prepare=data.drop_cache)
    return as_rows(data, timings, next(iter(calls)), n_rows=data.shard_rows)


def as_rows(
    data: Data, timings: dict[str, Timing], yardstick: Key, n_rows: int | None = None
) -> list[dict[str, Any]]:
    """Convert timings to benchmark rows.

    Args:
        data: Sizes of the data.
        timings: Timings, keyed by the names that `_named` returns.
        yardstick: The timing that ratios are relative to.
        n_rows: Number of rows that each call handles. If None, all rows of the data.
    """
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
