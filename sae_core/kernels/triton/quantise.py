"""Split rows for the float8 prefilter: float8 and bfloat16 parts, scales and error bounds."""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_core.kernels.triton import prefilter_float8
from sae_core.kernels.triton.launch import COUNTS, contiguous_columns, row_shape
from sae_core.kernels.triton.prefilter_float8 import SplitRows, SplitSpec, side_width

FP8 = torch.float8_e4m3fn
_MAX = tl.constexpr(prefilter_float8.LARGEST)
_TINY = tl.constexpr(prefilter_float8.TINY)
_UP = tl.constexpr(prefilter_float8.UP)
_SMALLEST = tl.constexpr(prefilter_float8.SMALLEST)
_STEP_MAGIC = tl.constexpr(1.5 * 2**20)
_STEP = tl.constexpr(prefilter_float8.SUM_WIDTH)
_STEPS = tl.constexpr(prefilter_float8.PROMOTED // prefilter_float8.SUM_WIDTH)
_ADDENDS = tl.constexpr(prefilter_float8.SUM_ADDENDS)
_FLOAT8_STEP = tl.constexpr(prefilter_float8.FLOAT8_STEP)
_BFLOAT16_STEP = tl.constexpr(prefilter_float8.BFLOAT16_STEP)
_SMALLEST_NORMAL = tl.constexpr(prefilter_float8.SMALLEST_NORMAL)


@triton.jit
def _power_of(value):
    """Return the largest power of two that is at most the magnitude of a float32."""
    return (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _round_to_float8(value):
    """Round a float32 up to 448 to the nearest float8_e4m3fn number, ties to even.

    The result is a float32, whose cast to float8 is exact. Triton's interpreter cannot do the
    rounding in the cast, because its cast does not carry into the exponent.
    """
    # Adding a number this large rounds the sum to a multiple of power / 8, float8's resolution.
    # Below 2**-6 float8 is subnormal and its resolution constant.
    large = tl.maximum(_power_of(value), 2.0**-6) * _STEP_MAGIC
    return (value + large) - large


@triton.jit
def _round_to_bfloat16(value):
    """Round a float32 to the nearest bfloat16 number, ties to even, as a float32.

    The cast of Triton's interpreter would truncate. An infinity may become NaN; this is harmless,
    as both make the row's bounds useless.
    """
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _sum_weights(low, n_low, PAIRS: tl.constexpr, BD: tl.constexpr):
    """Compute `prefilter_float8.sum_weights` of rounded rows that are zero from column n_low on."""
    columns = tl.arange(0, BD)
    later = ((columns // _STEP) % _STEPS - _STEPS + 1) * -1
    weights = (later * (_ADDENDS + 1) + 1).to(tl.float32)
    running = tl.sum(weights[None, :] * low * low, 1)
    N: tl.constexpr = BD // _STEP
    largest = tl.max(tl.reshape(tl.abs(low), (PAIRS, N, _STEP)), 2)
    largest = tl.maximum(largest, _SMALLEST_NORMAL)
    largest = tl.where((tl.arange(0, N) * _STEP < n_low)[None, :], largest, 0.0)
    return running + tl.sum(largest * largest, 1) * _ADDENDS


@triton.jit(do_not_specialize=COUNTS)
def split_kernel(
    matrix, channels, moved, squares, low, side, scales, deviations, sums, n_rows, D, n_side,
    width, side_columns, stride, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Split PAIRS rows per program; see `prefilter_float8.split_rows`. Each row is read once.

    low: [n_rows, width]; side: [n_rows, side_columns], initialised to zeros.
    """
    rows = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.arange(0, BD)
    live, is_low = rows < n_rows, columns < D - n_side
    channel = tl.load(channels + columns, mask=columns < D, other=0)
    inside = live[:, None] & (columns < D)[None, :]
    where = matrix + rows[:, None] * stride + channel[None, :]
    tile = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    part = tl.where(is_low[None, :], tile, 0.0)
    largest = tl.maximum(tl.div_rn(tl.max(tl.abs(part), 1), _MAX), _TINY)
    scale = 2 * _power_of(tl.maximum(largest, tl.max(tl.abs(tile), 1) * _SMALLEST))
    scaled = tile * tl.div_rn(1.0, scale)[:, None]
    rounded = tl.where(is_low[None, :], _round_to_float8(scaled), _round_to_bfloat16(scaled))
    # As in `prefilter_float8.rounding_variances`.
    power = _power_of(scaled)
    side_step = tl.where(scaled == rounded, 0.0, power * _BFLOAT16_STEP)
    low_step = tl.maximum(power, _SMALLEST_NORMAL) * _FLOAT8_STEP
    step = tl.where(is_low[None, :], low_step, side_step)
    away = tl.load(moved + columns, mask=columns < D, other=0.0)[None, :] * (step * step / 12)
    size = tl.load(squares + columns, mask=columns < D, other=0.0)[None, :] * scaled * scaled
    bound = deviations * tl.sqrt_rn(tl.sqrt_rn(tl.sum(away * away + size * size, 1))) * _UP
    part = tl.where(is_low[None, :], rounded, 0.0)
    lost = sums * tl.sqrt_rn(_sum_weights(part, D - n_side, PAIRS, BD)) * _UP
    where = low + rows[:, None] * width + columns[None, :]
    # Columns after the last float8 channel, up to the width, become zeros.
    tl.store(
        where,
        part.to(low.dtype.element_ty),
        mask=live[:, None] & (columns < width)[None, :],
    )
    base = side + rows * side_columns
    where = base[:, None] + (columns - (D - n_side))[None, :]
    outlier = inside & (columns >= D - n_side)[None, :]
    tl.store(where, rounded.to(side.dtype.element_ty), mask=outlier)
    tl.store(
        base + side_columns - 2, _round_to_bfloat16(bound).to(side.dtype.element_ty), mask=live
    )
    tl.store(base + side_columns - 1, _round_to_bfloat16(lost).to(side.dtype.element_ty), mask=live)
    tl.store(scales + rows, scale, mask=live)


def split_shape(D: int) -> dict[str, int]:
    """Return the compile-time sizes of `split_kernel`; see `row_shape`."""
    shape = row_shape(D, per_thread=8, in_flight=32)
    return {**shape, "BD": max(shape["BD"], prefilter_float8.SUM_WIDTH)}


def split_rows(matrix: torch.Tensor, weights: SplitSpec) -> SplitRows:
    """Run `prefilter_float8.split_rows` on the device.

    The bounds differ from those of that function only in the order in which float32 terms are
    added.

    Args:
        matrix: [n, D] bfloat16, float16 or float32.
        weights: As returned by `split_spec` for this matrix.

    Raises:
        ShapeError: If a row does not fit in a program's registers.
    """
    n, D = matrix.shape
    n_side = weights.n_side
    width = -(-(D - n_side) // 16) * 16
    side_columns = side_width(D)
    out = SplitRows(
        torch.empty(n, width, dtype=FP8, device=matrix.device),
        torch.zeros(n, side_columns, dtype=torch.bfloat16, device=matrix.device),
        torch.empty(n, device=matrix.device),
    )
    shape = split_shape(D)
    if n:
        rows = contiguous_columns(matrix)
        split_kernel[(triton.cdiv(n, shape["PAIRS"]),)](
            rows, weights.channels.int(), weights.moved, weights.squares, *out,
            weights.deviations, weights.sums, n, D, n_side, width, side_columns, rows.stride(0),
            **shape,
        )  # fmt: skip
    return out
