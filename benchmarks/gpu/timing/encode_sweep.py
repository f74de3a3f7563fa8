"""Part `encode`: the time of each candidate of the encoder relative to the bare product."""

from __future__ import annotations

from benchmarks.gpu.encoders import candidates, product_name, products, topk_call
from benchmarks.gpu.part import Context, Row, error_text, work_row
from benchmarks.harness.timing import interleaved
from benchmarks.step.memory import free_bytes, release
from benchmarks.step.work import Inputs, Work
from benchmarks.step.yardstick import encoder_gemms
from sae_core.kernels.triton.quantise import FP8

_FLOAT8_CANDIDATES = 3
"""Candidates per selected latent that the float8 prefilter asks for."""


def run(context: Context) -> str:
    """Time all candidates at A, and at the width of C where there is time."""
    shapes = {"A": context.shapes.steps["A"], "C at 131k": context.shapes.largest["C at 131k"]}
    said = []
    for name, work in shapes.items():
        rows = _sweep(context, name, work)
        if rows:
            best = min(rows, key=lambda row: float(row["ratio"]))
            which = f"{best['product']} {best['candidate']}"
            said.append(f"{name}: best {which} = {best['ratio']:.2f} x product")
    return "; ".join(said)


def _sweep(context: Context, name: str, work: Work) -> list[Row]:
    rows: list[Row] = []
    inputs = Inputs(work, context.setup)
    yardstick = encoder_gemms(inputs.x, inputs.W, inputs.bias)["gemm"]
    for dtype, precision in products(context.interpreted, context.setup.has_float8):
        free = free_bytes(context.setup.device)
        if dtype.itemsize == 4 and free is not None and free < 8 * work.L * work.D:
            continue
        count = min(_FLOAT8_CANDIDATES * work.k, work.L) if dtype == FP8 else work.k
        named = candidates(dtype, precision, context.interpreted)
        for place, (candidate, encoder) in enumerate(named.items()):
            if not context.budget.left_s():
                return rows
            row: Row = {"work": work_row(context, work), "product": product_name(dtype, precision)}
            row |= {"shape": name, "candidate": candidate, "default": place == 0, "count": count}
            try:
                call = topk_call(encoder, inputs.raw, inputs.W, inputs.bias.float(), count)
                timings = interleaved(
                    {"encode": call, "product": yardstick},
                    rounds=context.shapes.rounds,
                    warmup=context.shapes.warmup,
                    synchronize=context.setup.synchronize,
                )
            except Exception as error:  # one candidate that does not run must not hide the others
                context.report("encode", **row, error=error_text(error))
                continue
            encode_s, product_s = (timings[key].median_s for key in ("encode", "product"))
            ratio = encode_s / product_s
            row |= {"median_s": encode_s, "gemm_s": product_s, "ratio": ratio}
            rows.append(context.report("encode", **row))
            del call
            release(context.setup.device)
    return rows
