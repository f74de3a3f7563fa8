"""The table that compares predicted with measured times and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.part import Row
from benchmarks.gpu.report.counts import Rates
from benchmarks.gpu.report.planned import planned
from benchmarks.gpu.report.predictions import H200, predict, rates_of
from benchmarks.gpu.run import Outcome
from benchmarks.step.work import Work

COLUMNS = (
    "shape",
    "op",
    "predicted_s",
    "plan_s",
    "measured_s",
    "off",
    "predicted_ratio",
    "ratio",
    "plan_bytes",
    "peak_bytes",
    "error",
)
"""`off` is measured divided by predicted time; ratios are relative to the bare product."""
_MEASURED = ("step", "largest")
"""Parts whose rows are compared."""


def rows_of(outcomes: Sequence[Outcome], *parts: str) -> list[Row]:
    """Return the rows of some parts, in order."""
    return [row for outcome in outcomes if outcome.part in parts for row in outcome.rows]


def device_of(outcomes: Sequence[Outcome], interpreted: bool) -> str:
    """Return the name of the GPU whose predictions are shown; "?" if it is not known."""
    rates = _rates(outcomes, interpreted)
    return "?" if rates is None else rates.name


def comparison(outcomes: Sequence[Outcome], interpreted: bool) -> list[Row]:
    """Return one row per operation of the step table, with predictions and measurements.

    Args:
        outcomes: The parts so far.
        interpreted: True if the CPU interpreted the kernels; the predictions are then for the H200.
    """
    rates = _rates(outcomes, interpreted)
    return [_compared(row, rates) for row in rows_of(outcomes, *_MEASURED)]


def _rates(outcomes: Sequence[Outcome], interpreted: bool) -> Rates | None:
    if interpreted:
        return H200
    names = [str(row["name"]) for row in rows_of(outcomes, "device") if row["op"] == "device"]
    if not names:
        import torch  # the part `device` was not run or died

        names = [torch.cuda.get_device_name()]
    return rates_of(names[0])


def _compared(row: Row, rates: Rates | None) -> Row:
    work = Work(**{name: row["work"][name] for name in ("L", "D", "B", "k")})
    found: dict[str, Any] = {
        "shape": row["shape"],
        "op": row["op"],
        "work": row["work"],
        "measured_s": row.get("median_s"),
        "ratio": row.get("ratio"),
        "peak_bytes": row.get("peak_bytes"),
        "error": row.get("error"),
        "engine": row.get("engine"),
    }
    if rates is None:
        return found
    seconds = predict(row["op"], work, rates)
    plan = planned(row["op"], work, rates)
    if plan is not None:
        found |= {"plan_s": plan.step_s, "plan_bytes": plan.peak_bytes}
    if seconds is None:
        return found
    bare = predict("gemm", work, rates)
    assert bare is not None
    found |= {"predicted_s": seconds, "predicted_ratio": seconds / bare}
    if found["measured_s"] is not None:
        found["off"] = found["measured_s"] / seconds
    return found
