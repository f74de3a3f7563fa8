"""Time training steps, ours and other trainers', against the encoder GEMM of the same shape.

    python -m benchmarks.step [--device cpu|cuda] [--work L,D,B,k ...] [--rounds N]
        [--slope L1,L2,L3] [--slope-work D,B,k] [--budget-s S] [--no-peers] [--json FILE]

Measures the given workloads and slope, or the device's defaults if neither is given. The slope is
the power of L with which the time of a step grows. Needs torch and NumPy, and triton on cuda. Steps
run through DeepSpeed if it is installed, otherwise through the optimiser alone; `engine` in a
step's row says which.

Our steps and the baselines are measured in this process. Each peer package is measured in a process
of its own, on the CPU only and only if `.venv-peers` exists. Every process times both the GEMM and
the step in each round, and a ratio always compares times from the same process. On a CPU, this
process keeps the memory that it frees, like a training run. This saves the GEMM more page faults
than the step, which makes our ratios larger. The peers' allocator settings are not changed, so
their ratios are not affected.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness.errors import BenchmarkError, PeerError
from benchmarks.harness.one_rank import start_one_rank
from benchmarks.harness.peers import PEERS, peer_rows, peers_available
from benchmarks.harness.table import COLUMNS, format_table, write_json
from benchmarks.step.measure import (
    OUT_OF_TIME,
    Budget,
    Row,
    measure,
    slope_cases,
    slope_row,
    work_cases,
)
from benchmarks.step.work import Case, Inputs, Setup, Work, parse_sizes
from sae_core.training.malloc import keep_freed_memory

_OPTIONAL_COLUMNS = ("prefilter", "mfu", "slope", "error")
_PEER_TIMEOUT_S = 900.0
_RESERVE = 0.05
"""Share of the time budget kept for the work after the last measurement."""


@dataclass(frozen=True)
class Defaults:
    """The measurements on a device if neither workloads nor a slope are given."""

    works: tuple[str, ...]
    slope: str | None
    slope_work: str
    budget_s: float


DEFAULTS = {
    "cpu": Defaults(("16384,256,1024,32",), None, "256,1024,32", math.inf),
    "cuda": Defaults(
        ("131072,768,32768,32", "1048576,768,131072,32", "1048576,4096,32768,64"),
        "131072,262144,524288",
        "768,8192,32",
        420.0,
    ),
}


def main() -> int:
    """Run the benchmark, print the table and write it as JSON with `--json`.

    Returns:
        Exit code: 0, or 2 if an option is invalid or the device is not available.
    """
    options = _options()
    try:
        works, slope = plan(options)
    except BenchmarkError as error:
        print(f"benchmarks.step: {error}", file=sys.stderr)
        return 2
    setup = Setup.of(options.device)
    budget_s = options.budget_s or DEFAULTS[options.device].budget_s
    budget = Budget(time.monotonic() + (1 - _RESERVE) * budget_s)
    if options.device == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    start_one_rank(options.device)
    rows = _measure_all(works, slope, setup, options, budget)
    shown = [key for key in _OPTIONAL_COLUMNS if any(row.get(key) is not None for row in rows)]
    print(format_table(rows, (*COLUMNS, *shown)))
    dist.destroy_process_group()
    return 0


def plan(options: argparse.Namespace) -> tuple[list[Work], list[Work]]:
    """Return the workloads to measure, and those of the slope.

    Args:
        options: The parsed command line.

    Raises:
        BenchmarkError: If an option is invalid or this machine lacks the device.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: torch found no CUDA device; use --device cpu")
    if options.rounds < 1:
        raise BenchmarkError(f"--rounds {options.rounds}: expected at least 1")
    if options.budget_s is not None and options.budget_s <= 0:
        raise BenchmarkError(f"--budget-s {options.budget_s}: expected more than 0")
    default = DEFAULTS[options.device]
    works, slope = options.work, options.slope
    if works is None and slope is None:
        works, slope = default.works, default.slope
    tail = options.slope_work or default.slope_work
    return [Work.parse(text) for text in works or ()], _slope_works(slope, tail)


def _slope_works(slope: str | None, tail: str) -> list[Work]:
    if slope is None:
        return []
    latents = parse_sizes(slope, slope.count(",") + 1, "L1,L2,L3")
    if len(set(latents)) < 2:
        raise BenchmarkError(f"--slope {slope}: expected at least two different L values")
    parse_sizes(tail, 3, "D,B,k")
    return [Work.parse(f"{L},{tail}") for L in latents]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=sorted(DEFAULTS), default="cpu")
    parser.add_argument(
        "--work", nargs="+", metavar="L,D,B,k", help="latents, width, batch rows, active latents"
    )
    parser.add_argument(
        "--slope", metavar="L1,L2,L3", help="measure the log-log slope of step time over these L"
    )
    parser.add_argument(
        "--slope-work", metavar="D,B,k", help="width, batch rows and active latents of the slope"
    )
    parser.add_argument("--rounds", type=int, default=15, help="samples of each row")
    parser.add_argument(
        "--budget-s", type=float, help="run fewer rounds to finish within this many seconds"
    )
    parser.add_argument(
        "--no-peers", action="store_true", help="do not measure the peers' packages"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the rows to this file, and rewrite it after each workload",
    )
    return parser.parse_args()


def _measure_all(
    works: list[Work], slope: list[Work], setup: Setup, options: argparse.Namespace, budget: Budget
) -> list[Row]:
    rows: list[Row] = []
    parts = len(works) + len(slope)

    def add(work: Work, cases_of: Callable[[Inputs], list[Case]]) -> None:
        nonlocal parts
        share = budget.share(parts)
        parts -= 1
        print(f"measuring {work}", file=sys.stderr)
        rows.extend(
            measure(work, setup, cases_of, rounds=options.rounds, budget=budget, share=share)
        )

    def keep() -> None:
        # Write after every workload, so that an interrupted run keeps what it has measured.
        if options.json:
            write_json(options.json, rows)

    for work in works:
        add(work, work_cases)
        if options.device == "cpu" and not options.no_peers:
            rows += _peer_rows({**vars(work), "dtype": "float32"}, options.rounds, budget)
        keep()
    if slope:
        first = len(rows)
        for work in slope:
            add(work, slope_cases)
        rows.append(slope_row(rows[first:]))
        keep()
    return rows


def _peer_rows(work: dict[str, Any], rounds: int, budget: Budget) -> list[Row]:
    if not peers_available():
        return peer_rows(work)  # prints why there are none
    found: list[Row] = []
    for peer in PEERS:
        head = {"work": work, "system": peer, "op": "train_step"}
        timeout_s = min(_PEER_TIMEOUT_S, budget.left_s())
        if not timeout_s:
            found.append({**head, "error": OUT_OF_TIME})
            continue
        try:
            found += peer_rows(work, peers=[peer], rounds=rounds, timeout_s=timeout_s)
        except PeerError as error:
            first, *others = str(error).splitlines()
            found.append({**head, "error": " ".join([first, *others[-1:]])})
    return found


if __name__ == "__main__":
    sys.exit(main())
