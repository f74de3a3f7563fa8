"""Decoder, its error and its gradient over active pairs only.

Each sum is computed in float32 by one program in a fixed order. There are no atomic additions, so
results are reproducible bit for bit, and no [B, K, D] tensor exists.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_core.kernels.interface import Centred, Decoded, SparseLatents
from sae_core.kernels.triton.dense import (
    ROWS,
    empty_sums,
    store_sums,
    target_arguments,
    target_row,
)
from sae_core.kernels.triton.launch import COUNTS, FP_FUSION, contiguous_columns, row_shape

PAIRS = 8
"""Number of pairs whose dictionary rows are loaded together, to keep several loads in flight."""


def column_block(D: int, most: int) -> int:
    """Return the number of columns of d_model per tile: a power of two, or `most`."""
    return min(most, triton.next_power_of_2(D))


@triton.jit
def _dictionary_rows(latents, pairs, live, W, W_stride, columns, inside):
    """Load W's rows for some pairs as a float32 tile."""
    latent = tl.load(latents + pairs, mask=live, other=0)
    where = W + latent[:, None] * W_stride + columns[None, :]
    return tl.load(where, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def decode_kernel(
    latents, values, offsets, ends, W, out, D, W_stride,
    PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute out[row] = sum of value * W[latent]; one program per (row, column block)."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    begin = tl.load(offsets + row)
    end = tl.load(ends + row)
    acc = tl.zeros((PAIRS, BD), tl.float32)
    for first in range(begin, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        live = pairs < end
        value = tl.load(values + pairs, mask=live, other=0.0).to(tl.float32)
        acc += value[:, None] * _dictionary_rows(latents, pairs, live, W, W_stride, columns, inside)
    total = tl.sum(acc, 0)
    tl.store(out + row.to(tl.int64) * D + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decoder_dot_kernel(
    grad, latents, offsets, ends, W, out, D, grad_stride, W_stride,
    PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute out[pair] = grad[row] . W[latent]; one program per row, whose grad stays in L1."""
    row = tl.program_id(0)
    begin = tl.load(offsets + row)
    end = tl.load(ends + row)
    grad_row = grad + row.to(tl.int64) * grad_stride
    for first in range(begin, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        live = pairs < end
        acc = tl.zeros((PAIRS, BD), tl.float32)
        for start in range(0, D, BD):
            columns = start + tl.arange(0, BD)
            inside = columns < D
            g = tl.load(grad_row + columns, mask=inside, other=0.0).to(tl.float32)
            rows = _dictionary_rows(latents, pairs, live, W, W_stride, columns, inside)
            acc += g[None, :] * rows
        tl.store(out + pairs, tl.sum(acc, 1).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=COUNTS)
def decode_error_kernel(
    target, mean, scale, shift, latents, values, offsets, ends, W, error, dots, totals, squares, B,
    D, target_stride, W_stride, ROWS: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows' errors and their dot products with the rows' decoder rows.

    error[row] = target[row] - sum of value * W[latent]; dots[pair] = error[row] . W[latent]. The
    error stays in registers for the dot products. The decoder rows are read twice, the second time
    from a cache. Each program also stores the sum of its errors, [BD], and their squares' sum.
    """
    columns = tl.arange(0, BD)
    inside = columns < D
    total = tl.zeros((BD,), tl.float32)
    square = tl.zeros((BD,), tl.float32)
    start = tl.program_id(0).to(tl.int64) * ROWS
    for number in range(start, tl.minimum(start + ROWS, B)):
        row = tl.zeros((), tl.int64) + number  # int64 under the interpreter, too
        begin = tl.load(offsets + row)
        end = tl.load(ends + row)
        recon = tl.zeros((BD,), tl.float32)
        for first in range(begin, end, PAIRS):
            pairs = first + tl.arange(0, PAIRS)
            live = pairs < end
            value = tl.load(values + pairs, mask=live, other=0.0).to(tl.float32)
            rows = _dictionary_rows(latents, pairs, live, W, W_stride, columns, inside)
            recon += tl.sum(value[:, None] * rows, 0)
        left = target_row(target, row, target_stride, mean, scale, shift, columns, inside) - recon
        total += left
        square += left * left
        tl.store(error + row * D + columns, left.to(error.dtype.element_ty), mask=inside)
        for first in range(begin, end, PAIRS):
            pairs = first + tl.arange(0, PAIRS)
            live = pairs < end
            rows = _dictionary_rows(latents, pairs, live, W, W_stride, columns, inside)
            tl.store(dots + pairs, tl.sum(left[None, :] * rows, 1), mask=live)
    store_sums(totals, squares, total, square, D, columns, inside)


def decode_shape(D: int) -> dict[str, int]:
    """Return the compile-time sizes of `decode_error_kernel`; see `row_shape`.

    Programs are large, so that few run on a multiprocessor: the decoder rows that each reads twice
    must fit in the L1 cache together.
    """
    return {"ROWS": ROWS, **row_shape(D, per_thread=4, in_flight=64)}


def decode(active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
    """See `Kernels.decode`. Sums are float32; the result has the dtype of the values."""
    W_dec = contiguous_columns(W_dec)
    B = len(active.offsets)
    D = W_dec.shape[1]
    out = torch.empty(B, D, dtype=active.values.dtype, device=W_dec.device)
    BD = column_block(D, 512)
    if B:
        decode_kernel[(B, triton.cdiv(D, BD))](
            active.latents, active.values, active.offsets, active.ends, W_dec, out, D,
            W_dec.stride(0), PAIRS=PAIRS, BD=BD, **FP_FUSION,
        )  # fmt: skip
    return out


def decoder_dot(grad: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
    """See `Kernels.decoder_dot`; the result is float32."""
    grad = contiguous_columns(grad)
    W_dec = contiguous_columns(W_dec)
    B = len(active.offsets)
    D = W_dec.shape[1]
    # Zeros, because no program writes to empty slots.
    out = torch.zeros(len(active.latents), device=grad.device)
    if B:
        decoder_dot_kernel[(B,)](
            grad, active.latents, active.offsets, active.ends, W_dec, out, D, grad.stride(0),
            W_dec.stride(0), PAIRS=PAIRS, BD=column_block(D, 256), **FP_FUSION,
        )  # fmt: skip
    return out


def decode_error(
    target: torch.Tensor | Centred,
    active: SparseLatents,
    W_dec: torch.Tensor,
    dtype: torch.dtype | None,
) -> Decoded:
    """See `Kernels.decode_error`.

    Args:
        target: [B, D].
        active: Pairs of the B rows.
        W_dec: [L, D].
        dtype: Dtype of the error; None means float32. All other results are float32.
    """
    rows, *affine = target_arguments(target)
    W_dec = contiguous_columns(W_dec)
    B, D = rows.shape
    device = rows.device
    error = torch.empty(B, D, dtype=dtype or torch.float32, device=device)
    # Zeros, because no program writes to empty slots.
    dots = torch.zeros(len(active.latents), device=device)
    totals, squares = empty_sums(rows)
    if B:
        decode_error_kernel[squares.shape](
            rows, *affine, active.latents, active.values, active.offsets, active.ends, W_dec,
            error, dots, totals, squares, B, D, rows.stride(0), W_dec.stride(0),
            **decode_shape(D),
        )  # fmt: skip
    return Decoded(error, dots, squares.sum(), totals.sum(0))
