"""Parts `step` and `largest`: kernels and whole steps next to the bare product of the same run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.gpu.part import Context, Row
from benchmarks.step.measure import Budget, measure, yardstick_cases
from benchmarks.step.ours import FLOAT8_VARIANT, our_cases
from benchmarks.step.work import Case, Inputs, Work

_FIRST = ("step + clip", "encode + topk", "decode + error + dots", "row update", "step")
"""Operations measured first, in case that time is short."""
_LARGEST = ("step + clip", "step, bfloat16 moments", FLOAT8_VARIANT.op, "encode + topk")
"""Operations measured at the largest workload."""


def run(context: Context) -> str:
    """Measure all operations at every workload of the step table."""
    shapes = context.shapes.steps
    said = []
    for place, (name, work) in enumerate(shapes.items()):
        operations = _operations(context, work)
        operations.sort(key=lambda op: _FIRST.index(op) if op in _FIRST else len(_FIRST))
        share = context.budget.share(len(shapes) - place)
        said.append(_summary(name, measure_all(context, name, work, operations, share)))
    return "; ".join(said)


def run_largest(context: Context) -> str:
    """Measure the step and its peak memory at the largest workload that fits."""
    said = []
    for name, work in context.shapes.largest.items():
        known = _operations(context, work)
        operations = [op for op in _LARGEST if op in known]
        rows = measure_all(context, name, work, operations, context.budget)
        said.append(_summary(name, rows))
        if any("median_s" in row for row in rows if row["op"] == _LARGEST[0]):
            break
    return "; ".join(said)


def measure_all(
    context: Context, name: str, work: Work, operations: Sequence[str], share: Budget
) -> list[Row]:
    """Measure operations one by one, each next to the bare product, and report each at once.

    Args:
        context: Device and time.
        name: Name of the workload.
        work: Its sizes.
        operations: Names of operations of `benchmarks.step.ours.our_cases`.
        share: Time for all of them.

    Returns:
        The rows of the step benchmark, with `shape`: that of the bare product, then one per
        operation.
    """
    rows: list[Row] = []
    for place, op in enumerate(operations):
        bare, row = measure(
            work,
            context.setup,
            partial(_beside_product, op),
            rounds=context.shapes.rounds,
            budget=context.budget,
            share=share.share(len(operations) - place),
        )
        for one in (bare, row) if not rows else (row,):
            rows.append(context.report(**{**one, "shape": name}))
    return rows


def _operations(context: Context, work: Work) -> list[str]:
    return [case.op for case in our_cases(Inputs(work, context.setup))]


def _beside_product(op: str, inputs: Inputs) -> list[Case]:
    """Return the cases of the bare product and of one operation."""
    (case,) = (case for case in our_cases(inputs) if case.op == op)
    return [yardstick_cases(inputs)[0], case]


def _summary(name: str, rows: Sequence[Row]) -> str:
    """Return the step's time and its ratio to the bare product, in a few words."""
    row = next(row for row in rows if row["op"].startswith("step"))
    if "median_s" not in row:
        return f"{name}: {row['error']}"
    return f"{name}: {row['op']} {1e3 * row['median_s']:.1f} ms = {row['ratio']:.2f} x product"
