"""Rows in float8 with a scale each, the input of the prefilter's product."""

# Triton has no types, and a kernel's arguments none that mypy knows.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_core.kernels.triton_launch import plain_rows, row_shape

FP8 = torch.float8_e4m3fn
_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-30)
_STEP_MAGIC = tl.constexpr(1.5 * 2**20)


@triton.jit
def _round_to_float8(value):
    """fp32 up to 448 to the nearest that float8_e4m3fn holds, ties to even.

    The cast is exact after it: that of Triton's interpreter forgets to carry into the exponent.
    """
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # A sum of this size has no room for less than power / 8; below 2**-6 float8 is subnormal.
    large = tl.maximum(power, 2.0**-6) * _STEP_MAGIC
    return (value + large) - large


@triton.jit
def quantise_kernel(
    matrix, out, scales, n_rows, D, stride, PAIRS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """PAIRS rows per program, read once."""
    rows = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.arange(0, BD)
    inside = (rows < n_rows)[:, None] & (columns < D)[None, :]
    where = matrix + rows[:, None] * stride + columns[None, :]
    tile = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    # A row of zeros divides by a number all the same; NaN is no maximum and stays NaN.
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(tile), 1), _TINY), _MAX)
    tile = tl.div_rn(tile, tl.broadcast_to(scale[:, None], (PAIRS, BD)))
    where = out + rows[:, None] * D + columns[None, :]
    tl.store(where, _round_to_float8(tile).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + rows, scale, mask=rows < n_rows)


def quantise_shape(D: int) -> dict[str, int]:
    """Of a program that rounds rows, each read once."""
    return row_shape(D, per_thread=8, in_flight=64)


def quantise_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [n, D], scales [n] float32): a row times its scale is the row, rounded.

    The scale is the row's largest magnitude over 448. Relative to that magnitude the rounding is at
    most 2**-5; zero rows stay zero. A row with a NaN or an infinity gives NaN where it stood.

    Args:
        matrix: [n, D] bfloat16, float16 or float32.

    Raises:
        ShapeError: D does not fit a program's registers.
    """
    n, D = matrix.shape
    out = torch.empty(n, D, dtype=FP8, device=matrix.device)
    scales = torch.empty(n, device=matrix.device)
    shape = quantise_shape(D)
    if n:
        rows = plain_rows(matrix)
        quantise_kernel[(triton.cdiv(n, shape["PAIRS"]),)](
            rows, out, scales, n, D, rows.stride(0), **shape
        )
    return out, scales
