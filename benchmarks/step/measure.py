"""Measure the cases of a workload side by side, within the memory and the time available."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import linear_regression
from typing import Any

from benchmarks.harness.timing import Timing, interleaved
from benchmarks.step.baselines import baseline_cases
from benchmarks.step.memory import free_bytes, peak_memory, release
from benchmarks.step.ours import our_cases
from benchmarks.step.work import Call, Case, Inputs, Setup, Work
from benchmarks.step.yardstick import encoder_gemms
from sae_core.training.step_metrics import mfu

Row = dict[str, Any]

OUT_OF_TIME = "budget"
"""The `error` of a row for which the time budget was too short."""
SLOPE_OP = "step + clip"
"""The operation whose scaling with L is measured."""
_MEMORY_SHARE = 0.6
"""Share of the free memory available to cases timed together. The rest is for temporaries."""
_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Budget:
    """A deadline for the benchmark."""

    until: float = math.inf
    """The deadline, in seconds of `time.monotonic`; inf means that there is none."""

    def left_s(self) -> float:
        """Return the seconds left, at least 0."""
        return max(0.0, self.until - time.monotonic())

    def share(self, parts: int) -> Budget:
        """Return the budget for one of `parts` equal parts of the time left."""
        return Budget(time.monotonic() + self.left_s() / parts)


def work_cases(inputs: Inputs) -> list[Case]:
    """Return all cases of a workload: the yardstick first, then ours, then the baselines."""
    return yardstick_cases(inputs) + our_cases(inputs) + baseline_cases(inputs)


def slope_cases(inputs: Inputs) -> list[Case]:
    """Return the yardstick and the step whose scaling with L is measured."""
    followed = [case for case in our_cases(inputs) if case.op == SLOPE_OP]
    return yardstick_cases(inputs)[:1] + followed


def yardstick_cases(inputs: Inputs) -> list[Case]:
    """Return the cases of system "torch": "gemm", and "linear" as well on a CPU."""

    def make(op: str) -> Call:
        return encoder_gemms(inputs.x, inputs.W, inputs.bias)[op]

    ops = ("gemm", "linear") if inputs.setup.device.type == "cpu" else ("gemm",)
    return [Case("torch", op, partial(make, op), 0) for op in ops]


def measure(
    work: Work,
    setup: Setup,
    cases_of: Callable[[Inputs], list[Case]],
    *,
    rounds: int,
    budget: Budget,
    share: Budget,
) -> list[Row]:
    """Measure all cases of a workload.

    Cases are timed in blocks, each as large as memory allows. Every block includes the yardstick
    (the bare GEMM), and a row's `gemm_s` and `ratio` come from its own block.

    Args:
        work: Sizes.
        setup: Device and dtype.
        cases_of: Returns the cases; the first one must be the yardstick.
        rounds: Number of samples of each case; fewer are taken if time is short.
        budget: Deadline after which no case is started.
        share: Time for this workload; the number of rounds is reduced to fit.

    Returns:
        One row per case, in their order; a case that cannot run has an `error` instead of figures.
    """
    inputs = Inputs(work, setup)
    yardstick, *others = cases_of(inputs)
    release(setup.device)  # memory of the previous workload
    free = free_bytes(setup.device)
    room = math.inf if free is None else max(0.0, free - inputs.needs_bytes)
    fitting = [case for case in others if case.needs_bytes <= room]
    rows = {
        case.op: _error_row(inputs, case, _too_large(case, room))
        for case in others
        if case.needs_bytes > room
    }
    blocks = _pack(fitting, _MEMORY_SHARE * room)
    for done, block in enumerate(blocks):
        part = share.share(len(blocks) - done)
        measured = _measure_block(inputs, [yardstick, *block], rounds, budget, part)
        if "median_s" in rows.get(yardstick.op, {}):
            del measured[yardstick.op]  # report the yardstick of the first block that measured it
        rows |= measured
        release(setup.device)
    return [rows[case.op] for case in (yardstick, *others)]


def slope_row(rows: Sequence[Row]) -> Row:
    """Fit log seconds against log L by least squares, using all rows of `SLOPE_OP`.

    Returns:
        A row with `slope` and, for the yardstick, `gemm_slope`. If a row of `SLOPE_OP` lacks either
        time, the result has an `error` instead.
    """
    followed = [row for row in rows if row["op"] == SLOPE_OP]
    work = {**followed[0]["work"], "L": [row["work"]["L"] for row in followed]}
    head = {"work": work, "system": "ours", "op": "slope", **_notes(followed[0])}
    if any("error" in row or row["gemm_s"] is None for row in followed):
        return {
            **head,
            "error": f"{SLOPE_OP!r} and the yardstick were not both measured at every L",
        }
    logs = [math.log(row["work"]["L"]) for row in followed]
    slopes = {
        name: linear_regression(logs, [math.log(row[key]) for row in followed]).slope
        for name, key in (("slope", "median_s"), ("gemm_slope", "gemm_s"))
    }
    return {**head, **slopes}


def _notes(row: Row) -> Row:
    return {"engine": row["engine"]} if "engine" in row else {}


def _pack(cases: Sequence[Case], room: float) -> list[list[Case]]:
    """Group consecutive cases into blocks that need at most `room` bytes, or hold a single case."""
    blocks: list[list[Case]] = [[]]
    taken = 0.0
    for case in cases:
        if blocks[-1] and taken + case.needs_bytes > room:
            blocks.append([])
            taken = 0.0
        blocks[-1].append(case)
        taken += case.needs_bytes
    return blocks


@dataclass(frozen=True)
class _Ready:
    """A case whose first two calls succeeded."""

    call: Call
    seconds: float
    """Duration of the second call."""
    peak_bytes: int | None
    """Peak memory of the first call; None if the system does not report it."""


def _measure_block(
    inputs: Inputs, cases: Sequence[Case], rounds: int, budget: Budget, share: Budget
) -> dict[str, Row]:
    """Time the given cases together, the yardstick first; return their rows by operation."""
    ready: dict[str, _Ready] = {}
    errors: dict[str, str] = {}
    for case in cases:
        if not budget.left_s():
            errors[case.op] = OUT_OF_TIME
            continue
        try:
            ready[case.op] = _try(case, inputs.setup)
        except Exception as error:  # a failure of any kind must cost only this row
            errors[case.op] = _text(error)
        if case.op in errors:
            release(inputs.setup.device)
    round_s = sum(one.seconds for one in ready.values())
    timings: dict[str, Timing] = {}
    if 2 * round_s > budget.left_s():  # too little time for one warm-up round and one timed round
        errors |= dict.fromkeys(ready, OUT_OF_TIME)
    elif ready:
        affordable = share.left_s() / round_s - 1
        try:
            timings = interleaved(
                {op: one.call for op, one in ready.items()},
                rounds=rounds if affordable > rounds else max(1, int(affordable)),
                warmup=1,
                synchronize=inputs.setup.synchronize,
            )
        except Exception as error:  # costs only the rows that run together
            errors |= dict.fromkeys(ready, _text(error))
    gemm_s = timings[cases[0].op].median_s if cases[0].op in timings else None
    return {
        case.op: _error_row(inputs, case, errors[case.op])
        if case.op in errors
        else _row(inputs, case, timings[case.op], gemm_s, ready[case.op].peak_bytes)
        for case in cases
    }


def _try(case: Case, setup: Setup) -> _Ready:
    """Call a case twice: the first call compiles and allocates, the second predicts its cost."""
    case.prepare()
    # A stateful case is created inside the block, so that its state counts as its memory.
    call = None if case.stateful else case.make()
    with peak_memory(setup.device) as peak:
        call = call or case.make()
        call()
        setup.synchronize()
    start = time.perf_counter()
    call()
    setup.synchronize()
    return _Ready(call, time.perf_counter() - start, peak.bytes)


def _row(
    inputs: Inputs, case: Case, timing: Timing, gemm_s: float | None, peak_bytes: int | None
) -> Row:
    tokens_per_s = inputs.work.B / timing.median_s
    on_gpu = inputs.setup.device.type == "cuda" and case.encodes
    return {
        "work": inputs.row(),
        "system": case.system,
        "op": case.op,
        "median_s": timing.median_s,
        "ratio": None if gemm_s is None else timing.median_s / gemm_s,
        "tokens_per_s": tokens_per_s,
        "peak_bytes": peak_bytes,
        "mfu": mfu(tokens_per_s, inputs.work.D, inputs.work.L, 1) if on_gpu else None,
        "gemm_s": gemm_s,
        "rounds": len(timing.samples_s),
        **case.notes,
    }


def _error_row(inputs: Inputs, case: Case, error: str) -> Row:
    row = {"work": inputs.row(), "system": case.system, "op": case.op}
    return {**row, "error": error, **case.notes}


def _too_large(case: Case, room: float) -> str:
    return f"needs {case.needs_bytes / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free"


def _text(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:_ERROR_CHARACTERS]
