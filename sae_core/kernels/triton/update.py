"""The fused row update in Triton: one program per latent turns sorted pairs into updated rows.

A latent's gradient exists only in the registers of its program. Clipping is exact and takes two
passes: `square` sums every latent's gradient and keeps its squared norm, and `apply` sums it again.
A program holds a whole row, so it can project the gradient before squaring it, which avoids
cancellation.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_core.errors import ShapeError
from sae_core.kernels import rounding
from sae_core.kernels.interface import AdamStep, RowState, SparseGradient
from sae_core.kernels.triton.launch import COUNTS, contiguous_columns
from sae_core.kernels.triton.segments import (
    PIECE,
    Segments,
    segments,
    slot_sum,
    sort_by_latent,
    sum_shape,
)

BIAS_SLOTS = 128
"""Latents per program of `input_bias_kernel`."""
_ROW = tl.constexpr(rounding.ROW)
_COLUMN = tl.constexpr(rounding.COLUMN)
_MIX_1 = tl.constexpr(rounding.MIX_1)
_MIX_2 = tl.constexpr(rounding.MIX_2)
_SALT = tl.constexpr(rounding.SALT)


@triton.jit
def round_stochastically(value, row, columns, salt):
    """Round a float32 to a bfloat16 number, with the bits of `rounding.round_stochastically_`.

    The result is float32. row: int32 scalar, global index; columns: int32; salt: int32 scalar from
    `salt_of`.
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
    """Return `rounding.salt_of` for a float32 step."""
    return (step.to(tl.int32) * 8 + ARRAY) * _SALT


@triton.jit
def _moments(m, v, g, lerp, beta2, weight2, FROM_GRAD: tl.constexpr):
    """Return both moments after one step, with the same operations as torch's fused Adam."""
    base = m
    if FROM_GRAD:
        base = g
    return base + lerp * (g - m), v * beta2 + weight2 * g * g


@triton.jit
def _moved(w, m, v, step_size, root, eps):
    """Return a parameter after one step."""
    return w - tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)


@triton.jit
def _store_moment(moment, at, inside, value, row, columns, step, ARRAY: tl.constexpr):
    """Store a moment of array ARRAY, rounded stochastically if it is kept in bfloat16.

    step: pointer to a float32.
    """
    if moment.dtype.element_ty == tl.bfloat16:
        value = round_stochastically(value, row, columns, salt_of(tl.load(step), ARRAY))
    tl.store(moment + at, value.to(moment.dtype.element_ty), mask=inside)


@triton.jit
def _adam_row(
    W, g, m_rows, v_rows, at, inside, row, columns, step, numbers, lerp, beta2, weight2, eps,
    ARRAY: tl.constexpr, FROM_GRAD: tl.constexpr,
):  # fmt: skip
    """Store a row's moments after one step, and return the row without storing it."""
    g = tl.div_rn(g, tl.load(numbers + 2))
    m = tl.load(m_rows + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_rows + at, mask=inside, other=0.0).to(tl.float32)
    m, v = _moments(m, v, g, lerp, beta2, weight2, FROM_GRAD)
    _store_moment(m_rows, at, inside, m, row, columns, step, ARRAY)
    _store_moment(v_rows, at, inside, v, row, columns, step, ARRAY + 3)
    # Load the row only now, even if it was loaded before: keeping it would need too many registers.
    w = tl.load(W + at, mask=inside, other=0.0)
    return _moved(w, m, v, tl.load(numbers), tl.load(numbers + 1), eps)


@triton.jit
def square_kernel(
    squares, W_dec,
    rows, values, dvalues, edges, piece_ends, dec, enc, bias, x, error, D, x_stride, error_stride,
    PIECE: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute each latent's squared gradient norm, with W_dec's part projected; 0 if unused."""
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


@triton.jit(do_not_specialize=COUNTS)
def input_bias_kernel(
    partial, W, rows, dvalues, edges, n_slots, n_main, period, D, W_stride,
    SLOTS: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sum dvalue * W[slot] over the main path's pairs of SLOTS slots; one row of partial, [., D].

    A pair is on the main path if its row modulo `period` is below `n_main`.
    """
    columns = tl.arange(0, BD)
    inside = columns < D
    total = tl.zeros((BD,), tl.float32)
    # int64, because a row begins past element 2**31 in a dictionary of a million latents.
    first = tl.program_id(0).to(tl.int64) * SLOTS
    for number in range(first, tl.minimum(first + SLOTS, n_slots)):
        slot = tl.zeros((), tl.int64) + number  # int64 under the interpreter, too
        begin, end = tl.load(edges + slot), tl.load(edges + slot + 1)
        if begin < end:
            weights = tl.zeros((PAIRS,), tl.float32)
            for start in range(begin, end, PAIRS):
                pairs = start + tl.arange(0, PAIRS)
                row = tl.load(rows + pairs, mask=pairs < end, other=0)
                live = (pairs < end) & (row % period < n_main)
                weights += tl.load(dvalues + pairs, mask=live, other=0.0)
            w = tl.load(W + slot * W_stride + columns, mask=inside, other=0.0)
            total += tl.sum(weights, 0) * w.to(tl.float32)
    tl.store(partial + tl.program_id(0).to(tl.int64) * D + columns, total, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def update_kernel(
    W_enc, W_dec, b_enc, m_enc, m_dec, m_b, v_enc, v_dec, v_b, copy_enc, copy_dec, squares,
    numbers, step, skip, first_latent, lerp, beta2, weight2, eps,
    rows, values, dvalues, edges, piece_ends, dec, enc, bias, x, error, D, x_stride, error_stride,
    COPIES: tl.constexpr, FROM_GRAD: tl.constexpr,
    PIECE: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Apply Adam to one latent's rows and bias, used or not, and normalise its row of W_dec.

    Stores the squared norm of the latent's gradient. A row whose gradient is not finite stays
    unchanged. numbers: [3] float32, see `_numbers`.
    """
    if tl.load(skip) > 0:
        return
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    at = slot * D + columns
    row = (slot + first_latent).to(tl.int32)
    g, _ = slot_sum(
        rows, values, error, error_stride, edges, piece_ends, dec, bias, slot, D,
        columns, inside, PIECE, PAIRS, BD,
    )  # fmt: skip
    w = tl.load(W_dec + at, mask=inside, other=0.0)
    g = g - tl.sum(g * w, 0) * w
    square = tl.sum(g * g, 0)
    finite = columns < tl.where(square < float("inf"), D, 0)
    w = _adam_row(
        W_dec, g, m_dec, v_dec, at, finite, row, columns, step, numbers, lerp, beta2, weight2, eps,
        1, FROM_GRAD,
    )  # fmt: skip
    w = tl.where(inside, w, 0.0)  # columns past D are NaN if eps is 0
    w = w * tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), 1e-12))
    tl.store(W_dec + at, w, mask=finite)
    if COPIES:
        tl.store(copy_dec + at, w.to(copy_dec.dtype.element_ty), mask=finite)
    g, b = slot_sum(
        rows, dvalues, x, x_stride, edges, piece_ends, enc, bias, slot, D,
        columns, inside, PIECE, PAIRS, BD,
    )  # fmt: skip
    square_enc = tl.sum(g * g, 0) + b * b
    tl.store(squares + slot, square + square_enc)
    is_finite = square_enc < float("inf")
    finite = columns < tl.where(is_finite, D, 0)
    w = _adam_row(
        W_enc, g, m_enc, v_enc, at, finite, row, columns, step, numbers, lerp, beta2, weight2, eps,
        0, FROM_GRAD,
    )  # fmt: skip
    tl.store(W_enc + at, w, mask=finite)
    if COPIES:
        tl.store(copy_enc + at, w.to(copy_enc.dtype.element_ty), mask=finite)
    b = tl.div_rn(b, tl.load(numbers + 2))
    m, v = _moments(
        tl.load(m_b + slot), tl.load(v_b + slot), b, lerp, beta2, weight2, FROM_GRAD
    )  # fmt: skip
    w = _moved(tl.load(b_enc + slot), m, v, tl.load(numbers), tl.load(numbers + 1), eps)
    tl.store(b_enc + slot, w, mask=is_finite)
    tl.store(m_b + slot, m, mask=is_finite)
    tl.store(v_b + slot, v, mask=is_finite)


class TritonRowUpdate:
    """Update of dictionary rows in Triton; see `RowUpdate`.

    It builds neither [L, D] nor [U, D] gradients, and the host never waits for the device. It keeps
    the sorted pairs and the sums of hot latents' pieces (see `segments.py`) until the update. These
    sums have at most 2 N / 512 rows for each of the two matrices.

    Args:
        gradient: Sparse gradient of the rows; x and error in any float dtype the kernels take.
        W_dec: [L, D] float32 master rows.
    """

    def __init__(self, gradient: SparseGradient, W_dec: torch.Tensor) -> None:
        pairs, dvalues, x, error = gradient.terms
        by_latent, order = sort_by_latent(pairs.latents)
        slots = torch.arange(W_dec.shape[0] + 1, dtype=torch.int32, device=W_dec.device)
        # Empty slots come first, so the first edge is past them.
        edges = torch.searchsorted(by_latent, slots)
        self.n_main = gradient.n_main
        self.period = len(x) // gradient.n_replicas
        self.W_dec = _whole(W_dec)
        self.segments: Segments = segments(pairs, dvalues, x, error, order, edges)

    def input_bias_gradient(self, W_enc: torch.Tensor) -> torch.Tensor:
        """See `RowUpdate.input_bias_gradient`."""
        W_enc = contiguous_columns(W_enc)
        L, D = W_enc.shape
        n_programs = triton.cdiv(L, BIAS_SLOTS)
        partial = torch.empty(n_programs, D, device=W_enc.device)
        made = self.segments
        if L:
            input_bias_kernel[(n_programs,)](
                partial, W_enc, made.rows, made.dvalues, made.edges, L, self.n_main, self.period,
                D, W_enc.stride(0), SLOTS=BIAS_SLOTS, **input_bias_shape(D),
            )  # fmt: skip
        return -partial.sum(0)

    def square(self) -> torch.Tensor:
        """See `RowUpdate.square`."""
        L, D = self.W_dec.shape
        squares = torch.empty(L, device=self.W_dec.device)
        if L:
            square_kernel[(L,)](
                squares, self.W_dec, *self.segments.arguments, PIECE=PIECE,
                **sum_shape(D),
            )  # fmt: skip
        return squares.sum()

    def apply(self, state: RowState, adam: AdamStep) -> torch.Tensor:
        """See `RowUpdate.apply`."""
        L, D = state.W_dec.shape
        # Zeros, because a skipped update stores nothing.
        squares = torch.zeros(L, device=state.W_dec.device)
        if not L:
            return squares.sum()
        masters = (state.W_enc, state.W_dec, state.b_enc)
        # If there are no copies, the masters are passed in their place, and the kernel ignores
        # these arguments.
        written = (*masters, *state.exp_avg, *state.exp_avg_sq, *(state.copies or masters[:2]))
        # torch's lerp computes from whichever end is nearer, which affects rounding.
        from_grad = 1 - adam.beta1 >= 0.5
        lerp = -adam.beta1 if from_grad else 1 - adam.beta1
        update_kernel[(L,)](
            *map(_whole, written), squares, _numbers(adam), adam.step, adam.skip,
            state.first_latent, lerp, adam.beta2, 1 - adam.beta2, adam.eps,
            *self.segments.arguments, COPIES=state.copies is not None, FROM_GRAD=from_grad,
            PIECE=PIECE, **sum_shape(D),
        )  # fmt: skip
        return squares.sum()


def input_bias_shape(D: int) -> dict[str, int]:
    """Return the compile-time sizes and launch options of `input_bias_kernel`, except SLOTS."""
    shape = sum_shape(D)
    return {**shape, "PAIRS": 32 * shape["num_warps"]}


def _numbers(adam: AdamStep) -> torch.Tensor:
    """Return the step size, the root of the second bias correction, and the divisor, [3] float32.

    The step size is lr over the first bias correction. All are computed on the device in float64,
    as in torch's fused Adam.
    """
    step = adam.step.double()
    lr = adam.lr.double() if isinstance(adam.lr, torch.Tensor) else adam.lr
    step_size = lr / (1 - adam.beta1**step)
    root = (1 - adam.beta2**step).sqrt()
    divisor = torch.ones_like(step) if adam.divisor is None else adam.divisor.double()
    return torch.stack([step_size, root, divisor.reshape(())]).float()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor if it is contiguous, else raise `ShapeError`."""
    if not tensor.is_contiguous():
        raise ShapeError(
            f"dictionary tensor has shape {tuple(tensor.shape)} and strides {tensor.stride()}: "
            "the fused update needs contiguous tensors; call .contiguous()"
        )
    return tensor
