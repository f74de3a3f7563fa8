"""Predicted times of kernels and steps, from counted operations, bytes and launches.

The counts are in `counts.py`. This module has the rates, the options of each operation and the
table of what a step is predicted to take:

    python -m benchmarks.gpu.report.predictions
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.gpu.report.counts import (
    BEST,
    EXPECTED,
    Assumptions,
    Count,
    Options,
    Rates,
    decoding,
    encode_counts,
    sorting,
    step_counts,
    updating,
)
from benchmarks.gpu.shapes import GPU
from benchmarks.step.work import Work
from sae_core.architectures.topk.settings import default_auxk, default_auxk_rows

H200 = Rates("H200", 790e12, 4.3e12, 9.66e11, 3e-6)
"""FLOP/s and bytes/s were measured by others on such a GPU. Issue slots: 132 multiprocessors of 4
schedulers at the 1.83 GHz of the data sheet's peak. The time of a launch is an assumption."""
H100 = replace(H200, name="H100", bytes_per_s=4.3e12 * 3.35 / 4.8)
"""The same multiprocessors as the H200, and memory as much slower as in the data sheets."""

OPTIONS = {
    "step": Options(),
    "step + clip": Options(clip=True),
    "step + clip + auxk": Options(clip=True, auxk_share=1.0),
    "step + clip + auxk on 1/8 rows": Options(clip=True, auxk_share=1 / 8),
    "step, bfloat16 moments": Options(moment_bytes=2),
    "step, float8 prefilter": Options(float8=True),
}
"""Options of the steps in the step table, by operation."""


def rates_of(device: str) -> Rates | None:
    """Return the rates of a device by its name; None if there are none for it."""
    return next((rates for rates in (H200, H100) if rates.name in device), None)


def counts_of(op: str, work: Work, assumed: Assumptions = EXPECTED) -> list[Count] | None:
    """Return the counts of an operation of the step table; None if it has none.

    Args:
        op: Name of the operation.
        work: Sizes.
        assumed: What cannot be counted.
    """
    if op in OPTIONS:
        return step_counts(work, OPTIONS[op], assumed)
    rows, slots = float(work.B), float(work.B * work.k)
    encode = "encode + topk"
    if op in (encode, f"{encode}, float8 prefilter"):
        return encode_counts(work, assumed, float8=op != encode)
    kernels = {
        "gemm": [Count("product", 2 * work.B * work.L * work.D, launches=1)],
        "decode + error + dots": [decoding(work, work.k, rows, 4)],
        # The benchmark's gradient has the error in bfloat16 and the inputs in float32.
        "row update": [*sorting(work, slots), updating(work, slots, Options(), x_bytes=4)],
    }
    return kernels.get(op)


def predict(op: str, work: Work, rates: Rates, assumed: Assumptions = EXPECTED) -> float | None:
    """Return the predicted seconds of an operation; None if it is not counted."""
    counts = counts_of(op, work, assumed)
    return None if counts is None else seconds(counts, rates)


def seconds(counts: list[Count], rates: Rates) -> float:
    """Return the predicted seconds of parts that follow each other."""
    return sum(count.seconds(rates) for count in counts)


def step_ratio(work: Work, options: Options, assumed: Assumptions, rates: Rates = H200) -> float:
    """Return the predicted time of a step divided by that of the bare product."""
    bare = predict("gemm", work, rates)
    assert bare is not None
    return seconds(step_counts(work, options, assumed), rates) / bare


def auxk_share(work: Work) -> float:
    """Return the share of the rows with the auxiliary loss at `sae.auxk_rows=null`."""
    return default_auxk_rows(default_auxk(work.D), work.B)


def summary_table() -> Iterator[str]:
    """Yield the lines of the Markdown table of predicted step ÷ bare product."""
    shapes = {**GPU.steps, "C": GPU.largest["C"]}
    plain = Options()
    rows = {
        "no clipping": plain,
        "clipping": replace(plain, clip=True),
        "no clipping, bf16 moments": replace(plain, moment_bytes=2),
        "clipping, bf16 moments": replace(plain, clip=True, moment_bytes=2),
        "clipping, AuxK by the rule": replace(plain, clip=True, auxk_share=-1),
        "no clipping, float8": replace(plain, float8=True),
        "no clipping, float8, bf16 moments": replace(plain, float8=True, moment_bytes=2),
        "clipping, float8": replace(plain, clip=True, float8=True),
    }
    yield f"| | {' | '.join(shapes)} |"
    yield f"|---|{'---|' * len(shapes)}"
    for name, options in rows.items():
        cells = []
        for work in shapes.values():
            own = options
            if options.auxk_share < 0:
                own = replace(options, auxk_share=auxk_share(work))
            found = [step_ratio(work, own, assumed) for assumed in (EXPECTED, BEST)]
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in found))
        yield f"| {name} | {' | '.join(cells)} |"


def parts_table(options: Options) -> Iterator[str]:
    """Yield the lines of the Markdown table of milliseconds by part, expected and best."""
    shapes = {**GPU.steps, "C": GPU.largest["C"]}
    found: dict[str, dict[str, list[float]]] = {}
    for name, work in shapes.items():
        for assumed in (EXPECTED, BEST):
            for count in step_counts(work, options, assumed):
                cells = found.setdefault(count.part, {}).setdefault(name, [])
                cells.append(1e3 * count.seconds(H200))
    yield f"| ms | {' | '.join(shapes)} |"
    yield f"|---|{'---|' * len(shapes)}"
    for part, by_shape in found.items():
        row = (dict.fromkeys(by_shape.get(name, [0.0])) for name in shapes)
        texts = (" / ".join(f"{value:.2f}" for value in values) for values in row)
        yield f"| {part} | {' | '.join(texts)} |"


def main() -> None:
    """Print the tables of `benchmarks/notes/kernels.md`."""
    print("\n".join(summary_table()))
    for options in (Options(clip=True), Options(float8=True)):
        print(f"\n{options}")
        print("\n".join(parts_table(options)))


if __name__ == "__main__":
    main()
