"""The fused update: from sorted pairs to the dictionary's new rows in one program per latent.

A latent's gradient exists in the registers of its program alone. Clipping takes two passes and is
exact: `square` sums every latent's gradient and keeps its squared norm, `apply` sums it again.
Holding a whole row, a program projects before it squares, so nothing cancels.
"""

# Triton has no types, and a kernel's arguments none that mypy knows.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_core.errors import ShapeError
from sae_core.kernels import rounding
from sae_core.kernels.interface import AdamStep, RowState, SparseGradient
from sae_core.kernels.triton_segments import (
    PIECE,
    Segments,
    segments,
    slot_sum,
    sort_by_latent,
    sum_shape,
)

_ROW, _COLUMN = tl.constexpr(rounding.ROW), tl.constexpr(rounding.COLUMN)
_MIX_1, _MIX_2 = tl.constexpr(rounding.MIX_1), tl.constexpr(rounding.MIX_2)
_SALT = tl.constexpr(rounding.SALT)


@triton.jit
def round_stochastically(value, row, columns, salt):
    """`rounding.round_stochastically_`, bit for bit: fp32 that bfloat16 can hold.

    row: int32 scalar, global; columns: int32; salt: int32 scalar of `salt_of`.
    """
    mixed = (row * _ROW + salt) ^ (columns * _COLUMN)
    mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * _MIX_1
    mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * _MIX_2
    bits = value.to(tl.int32, bitcast=True)
    rounded = bits + ((mixed >> 16) & 0xFFFF)
    bits = tl.where((bits & 0x7F800000) == 0x7F800000, bits, rounded)
    return (bits & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def salt_of(step, ARRAY: tl.constexpr):
    """`rounding.salt_of` of a fp32 step."""
    return (step.to(tl.int32) * 8 + ARRAY) * _SALT


@triton.jit
def _moments(m, v, g, lerp, beta2, weight2, FROM_GRAD: tl.constexpr):
    """Both moments after one step, operation by operation as torch's fused Adam."""
    base = m
    if FROM_GRAD:
        base = g
    return base + lerp * (g - m), v * beta2 + weight2 * g * g


@triton.jit
def _moved(w, m, v, step_size, root, eps):
    """A parameter after one step."""
    return w - tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)


@triton.jit
def _store_moment(moment, at, inside, value, row, columns, step, ARRAY: tl.constexpr):
    if moment.dtype.element_ty == tl.bfloat16:
        value = round_stochastically(value, row, columns, salt_of(step, ARRAY))
    tl.store(moment + at, value.to(moment.dtype.element_ty), mask=inside)


@triton.jit
def _adam_row(
    W, g, m_rows, v_rows, at, inside, row, columns, step, numbers, lerp, beta2, weight2, eps,
    ARRAY: tl.constexpr, FROM_GRAD: tl.constexpr,
):  # fmt: skip
    """A row after the step, not yet written; its moments are written."""
    g = tl.div_rn(g, tl.load(numbers + 2))
    m = tl.load(m_rows + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_rows + at, mask=inside, other=0.0).to(tl.float32)
    m, v = _moments(m, v, g, lerp, beta2, weight2, FROM_GRAD)
    _store_moment(m_rows, at, inside, m, row, columns, step, ARRAY)
    _store_moment(v_rows, at, inside, v, row, columns, step, ARRAY + 3)
    # Only now, for the second time or not: a row that stayed in registers would not fit them.
    w = tl.load(W + at, mask=inside, other=0.0)
    return _moved(w, m, v, tl.load(numbers), tl.load(numbers + 1), eps)


@triton.jit
def square_kernel(
    squares, W_dec,
    rows, values, dvalues, edges, piece_ends, dec, enc, bias, x, error, D, x_stride, error_stride,
    PIECE: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """squares[latent] = squared norm of its gradient, that of W_dec projected; 0 if unused."""
    slot = tl.program_id(0).to(tl.int64)
    square = tl.zeros((), tl.float32)
    if tl.load(edges + slot) < tl.load(edges + slot + 1):
        columns = tl.arange(0, BD)
        inside = columns < D
        g, _ = slot_sum(
            rows, values, error, error_stride, edges, piece_ends, dec, bias, slot, D,
            columns, inside, PIECE, PAIRS, BD,
        )  # fmt: skip
        w = tl.load(W_dec + slot * D + columns, mask=inside, other=0.0)
        g = g - tl.sum(g * w, 0) * w
        square += tl.sum(g * g, 0)
        g, b = slot_sum(
            rows, dvalues, x, x_stride, edges, piece_ends, enc, bias, slot, D,
            columns, inside, PIECE, PAIRS, BD,
        )  # fmt: skip
        square += tl.sum(g * g, 0) + b * b
    tl.store(squares + slot, square)


@triton.jit
def update_kernel(
    W_enc, W_dec, b_enc, m_enc, m_dec, m_b, v_enc, v_dec, v_b, copy_enc, copy_dec,
    numbers, step, skip, first_latent, lerp, beta2, weight2, eps,
    rows, values, dvalues, edges, piece_ends, dec, enc, bias, x, error, D, x_stride, error_stride,
    COPIES: tl.constexpr, FROM_GRAD: tl.constexpr,
    PIECE: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Adam on one latent's rows and bias, used or not, then unit norm for its row of W_dec.

    numbers: fp32 [3], lr over the first bias correction, root of the second, divisor.
    """
    if tl.load(skip) > 0:
        return
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    at = slot * D + columns
    row = (slot + first_latent).to(tl.int32)
    count = tl.load(step)
    g, _ = slot_sum(
        rows, values, error, error_stride, edges, piece_ends, dec, bias, slot, D,
        columns, inside, PIECE, PAIRS, BD,
    )  # fmt: skip
    w = tl.load(W_dec + at, mask=inside, other=0.0)
    g = g - tl.sum(g * w, 0) * w
    w = _adam_row(
        W_dec, g, m_dec, v_dec, at, inside, row, columns, count, numbers, lerp, beta2, weight2, eps,
        1, FROM_GRAD,
    )  # fmt: skip
    w = tl.where(inside, w, 0.0)  # with an eps of 0 it is NaN outside
    w = w * tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), 1e-12))
    tl.store(W_dec + at, w, mask=inside)
    if COPIES:
        tl.store(copy_dec + at, w.to(copy_dec.dtype.element_ty), mask=inside)
    g, b = slot_sum(
        rows, dvalues, x, x_stride, edges, piece_ends, enc, bias, slot, D,
        columns, inside, PIECE, PAIRS, BD,
    )  # fmt: skip
    w = _adam_row(
        W_enc, g, m_enc, v_enc, at, inside, row, columns, count, numbers, lerp, beta2, weight2, eps,
        0, FROM_GRAD,
    )  # fmt: skip
    tl.store(W_enc + at, w, mask=inside)
    if COPIES:
        tl.store(copy_enc + at, w.to(copy_enc.dtype.element_ty), mask=inside)
    b = tl.div_rn(b, tl.load(numbers + 2))
    m, v = _moments(
        tl.load(m_b + slot), tl.load(v_b + slot), b, lerp, beta2, weight2, FROM_GRAD
    )  # fmt: skip
    w = _moved(tl.load(b_enc + slot), m, v, tl.load(numbers), tl.load(numbers + 1), eps)
    tl.store(b_enc + slot, w)
    tl.store(m_b + slot, m)
    tl.store(v_b + slot, v)


class TritonRowUpdate:
    """See `RowUpdate`. Neither [L, D] nor [U, D] gradients exist, and nothing waits for the device.

    Held until the update: the sorted pairs, and sums of hot latents' pieces, at most
    2 N / 512 rows of both matrices.

    Args:
        gradient: of the rows; x and error in any float dtype the kernels take.
        W_dec: [L, D] float32 masters.
    """

    def __init__(self, gradient: SparseGradient, W_dec: torch.Tensor) -> None:
        pairs, dvalues, x, error = gradient
        by_latent, order = sort_by_latent(pairs.latents)
        slots = torch.arange(W_dec.shape[0] + 1, dtype=torch.int32, device=W_dec.device)
        edges = torch.searchsorted(by_latent, slots)
        self.W_dec = _whole(W_dec)
        self.segments: Segments = segments(pairs, dvalues, x, error, order, edges)

    def square(self) -> torch.Tensor:
        L, D = self.W_dec.shape
        squares = torch.empty(L, device=self.W_dec.device)
        if L:
            square_kernel[(L,)](
                squares, self.W_dec, *self.segments.arguments, PIECE=PIECE,
                **sum_shape(D),
            )  # fmt: skip
        return squares.sum()

    def apply(self, state: RowState, adam: AdamStep) -> None:
        L, D = state.W_dec.shape
        if not L:
            return
        masters = (state.W_enc, state.W_dec, state.b_enc)
        written = (*masters, *state.exp_avg, *state.exp_avg_sq, *(state.copies or masters[:2]))
        # torch's lerp starts from the nearer end.
        from_grad = 1 - adam.beta1 >= 0.5
        lerp = -adam.beta1 if from_grad else 1 - adam.beta1
        update_kernel[(L,)](
            *map(_whole, written), _numbers(adam), adam.step, adam.skip, state.first_latent,
            lerp, adam.beta2, 1 - adam.beta2, adam.eps, *self.segments.arguments,
            COPIES=state.copies is not None, FROM_GRAD=from_grad, PIECE=PIECE,
            **sum_shape(D),
        )  # fmt: skip


def _numbers(adam: AdamStep) -> torch.Tensor:
    """[3] float32 on the device, computed in float64 as torch's fused Adam does."""
    step = adam.step.double()
    step_size = adam.lr / (1 - adam.beta1**step)
    root = (1 - adam.beta2**step).sqrt()
    divisor = torch.ones_like(step) if adam.divisor is None else adam.divisor.double()
    return torch.stack([step_size, root, divisor.reshape(())]).float()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous():
        raise ShapeError(
            f"a dictionary or its moments with shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}: the fused update takes contiguous tensors; call .contiguous()"
        )
    return tensor
