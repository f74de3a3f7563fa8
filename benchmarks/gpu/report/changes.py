"""Rules that turn results into advice: which file, constant or setting to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.gpu.part import Row
from benchmarks.gpu.report.compare import rows_of
from benchmarks.gpu.run import Outcome

_FASTER = 0.98
"""A candidate is worth taking if it needs at most this share of the default's time."""
_SLOWER = 1.25
"""A time is worth a look if it is this much above its prediction."""
_MORE_MEMORY = 1.1
"""A peak is worth a look if it is this much above the plan's."""


def changes(outcomes: Sequence[Outcome], compared: Sequence[Row], interpreted: bool) -> list[str]:
    """Return what to change, most urgent first: wrong results, then memory, then time.

    Args:
        outcomes: The parts so far.
        compared: Rows of the table of predictions and measurements.
        interpreted: True if the CPU interpreted the kernels, so that times are meaningless.
    """
    rules = _RESULTS if interpreted else (*_RESULTS, *_COSTS)
    return [text for rule in rules for text in rule(outcomes, compared)]


def _failed_parts(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    for outcome in outcomes:
        if outcome.status == "failed":
            yield f"part {outcome.part} failed: {outcome.error} (see its traceback in the JSON)"


def _kernel_cases(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    for row in rows_of(outcomes, "cases"):
        if row["op"] == "kernel case":
            last = str(row["text"]).strip().splitlines()[-1:] or ["no output"]
            yield f"kernel case {row['case']} failed: {last[0]}"


def _many_elements(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    for row in rows_of(outcomes, "many"):
        if row.get("passed") is False:
            yield (
                f"{row['op']} is wrong at {row['elements']:,} elements: compute it in pieces "
                "below 2**31 elements (sae_core/architectures/sparse_autoencode.py)"
            )


def _encoder_results(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    for row in rows_of(outcomes, "exact"):
        if row.get("passed") is not False:
            continue
        where = f"{row['product']}, {row['candidate']}, D {row['work']['D']}"
        if row["op"] == "candidate runs":
            yield f"encoder {where} does not run: {row['error']}"
        elif row["op"] == "equal bits":
            yield (
                f"encoder {where}: {row['differing']} selected pairs differ from those of "
                f"{row['reference']}: do not choose between them by time "
                "(sae_core/kernels/triton/encoder/filter.py)"
            )
        else:
            yield (
                f"encoder {where}: selects different latents from float64 (error "
                f"{row['error_ratio']} of the allowed): sae_core/kernels/triton/encoder/filter.py"
            )


def _float8_bound(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    worst = {"error_ratio": 0.0, "sum_error_ratio": 0.0}
    for row in rows_of(outcomes, "float8"):
        worst = {name: max(most, float(row.get(name, 0.0))) for name, most in worst.items()}
    names = {"error_ratio": "DEVIATIONS", "sum_error_ratio": "_TRUNCATED"}
    for name, ratio in worst.items():
        if ratio > 1:
            yield (
                f"an error of float8 products is {ratio:.2g} times its bound: raise {names[name]} "
                f"by that factor (sae_core/kernels/triton/prefilter_float8.py)"
            )


def _runs(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    for row in rows_of(outcomes, "resume"):
        if row.get("passed") is False and "differing" in row:
            names = ", ".join(f"{name} ({count})" for name, count in row["differing"].items())
            what = "equal seeds do not repeat" if row["op"] == "equal seeds" else "resume differs"
            yield f"{what} ({row['variant']}, {row['path']}): elements that differ: {names}"
        elif row.get("passed") is False:
            yield f"{row['variant']}: the weights are not finite, or do not move"


def _sanitizer(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    for row in rows_of(outcomes, "sanitizer"):
        if row.get("passed") is False:
            yield f"compute-sanitizer {row['op']}: {row['errors']} errors (output in the JSON)"


def _waits(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    for row in rows_of(outcomes, "waits"):
        if row.get("passed") is False:
            places = ", ".join(f"{place} ({count})" for place, count in row["places"].items())
            yield f"{row['variant']}: the host waits {row['count']} times a step: {places}"


def _graph(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    for row in rows_of(outcomes, "graph"):
        if row.get("captured") is False:
            yield f"the step has no CUDA graph: {row['reason']}"
        elif row.get("passed") is False:
            yield f"a replayed graph differs from eager steps in {', '.join(row['differing'])}"


def _memory(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    for row in compared:
        plan, peak = row.get("plan_bytes"), row.get("peak_bytes")
        if plan and peak and peak > _MORE_MEMORY * plan:
            yield (
                f"{row['shape']}, {row['op']}: peak {peak / 2**30:.1f} GiB, planned "
                f"{plan / 2**30:.1f}: count the rest in cluster/planning/memory.py"
            )


def _encoder_candidates(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    rows = [row for row in rows_of(outcomes, "encode") if "ratio" in row]
    for shape, product in dict.fromkeys((row["shape"], row["product"]) for row in rows):
        same = [row for row in rows if (row["shape"], row["product"]) == (shape, product)]
        default = next((row for row in same if row["default"]), None)
        best = min(same, key=lambda row: float(row["ratio"]))
        if default is not None and best["ratio"] < _FASTER * default["ratio"]:
            yield (
                f"encoder {product} at {shape}: take {best['candidate']} ({best['ratio']:.2f} x "
                f"product) instead of {default['candidate']} ({default['ratio']:.2f}): "
                "sae_core/kernels/triton/encoder/encode.py"
            )


def _slow_operations(outcomes: Sequence[Outcome], compared: Sequence[Row]) -> Iterator[str]:
    slow = [row for row in compared if row.get("off", 0.0) > _SLOWER]
    for row in sorted(slow, key=lambda row: row["predicted_s"] - row["measured_s"]):
        yield (
            f"{row['shape']}, {row['op']}: {1e3 * row['measured_s']:.2f} ms, predicted "
            f"{1e3 * row['predicted_s']:.2f}: find the part in the profile, or correct its count "
            "(benchmarks/gpu/report/predictions.py)"
        )


_Rule = Callable[[Sequence[Outcome], Sequence[Row]], Iterator[str]]
_RESULTS: tuple[_Rule, ...] = (
    _failed_parts,
    _kernel_cases,
    _many_elements,
    _encoder_results,
    _float8_bound,
    _runs,
    _sanitizer,
    _waits,
    _graph,
)
"""Rules for wrong results and for what keeps the step from running ahead of the host."""
_COSTS: tuple[_Rule, ...] = (_memory, _encoder_candidates, _slow_operations)
"""Rules for memory and time."""
