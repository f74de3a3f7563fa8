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

from sae_core.kernels.interface import Decoded, SparseLatents
from sae_core.kernels.triton.launch import FP_FUSION, contiguous_columns, row_shape

PAIRS = 8
"""Number of pairs whose dictionary rows are loaded together, to keep several loads in flight."""


def column_block(D: int, most: int) -> int:
    """Return the number of columns of d_model per tile: a power of two, or `most`."""
    return min(most, triton.next_power_of_2(D))


@triton.jit
def _row_end(offsets, row, B, n_pairs):
    """Return the index past a row's last pair."""
    end = tl.zeros((), tl.int64) + n_pairs
    if row + 1 < B:
        end = tl.load(offsets + row + 1)
    return end


@triton.jit
def _dictionary_rows(latents, pairs, live, W, W_stride, columns, inside):
    """Load W's rows for some pairs as a float32 tile."""
    latent = tl.load(latents + pairs, mask=live, other=0)
    where = W + latent[:, None] * W_stride + columns[None, :]
    return tl.load(where, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def decode_kernel(
    latents, values, offsets, W, out, B, n_pairs, D, W_stride,
    PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute out[row] = sum of value * W[latent]; one program per (row, column block)."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    begin = tl.load(offsets + row)
    end = _row_end(offsets, row, B, n_pairs)
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
    grad, latents, offsets, W, out, B, n_pairs, D, grad_stride, W_stride,
    PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute out[pair] = grad[row] . W[latent]; one program per row, whose grad stays in L1."""
    row = tl.program_id(0)
    begin = tl.load(offsets + row)
    end = _row_end(offsets, row, B, n_pairs)
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


@triton.jit
def decode_error_kernel(
    target, latents, values, offsets, W, error, dots, B, n_pairs, D, target_stride, W_stride,
    PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute each row's error and its dot products with the row's decoder rows.

    error[row] = target[row] - sum of value * W[latent]; dots[pair] = error[row] . W[latent].
    One program per row. The error stays in registers. The decoder rows are read twice, the second
    time from a cache.
    """
    row = tl.program_id(0)
    columns = tl.arange(0, BD)
    inside = columns < D
    begin = tl.load(offsets + row)
    end = _row_end(offsets, row, B, n_pairs)
    recon = tl.zeros((BD,), tl.float32)
    for first in range(begin, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        live = pairs < end
        value = tl.load(values + pairs, mask=live, other=0.0).to(tl.float32)
        rows = _dictionary_rows(latents, pairs, live, W, W_stride, columns, inside)
        recon += tl.sum(value[:, None] * rows, 0)
    target_row = target + row.to(tl.int64) * target_stride
    left = tl.load(target_row + columns, mask=inside, other=0.0).to(tl.float32) - recon
    tl.store(error + row.to(tl.int64) * D + columns, left, mask=inside)
    for first in range(begin, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        live = pairs < end
        rows = _dictionary_rows(latents, pairs, live, W, W_stride, columns, inside)
        tl.store(dots + pairs, tl.sum(left[None, :] * rows, 1), mask=live)


def decode_shape(D: int) -> dict[str, int]:
    """Return the compile-time sizes of `decode_error_kernel`; see `row_shape`.

    Programs are large, so that few run on a multiprocessor: the decoder rows that each reads twice
    must fit in the L1 cache together.
    """
    return row_shape(D, per_thread=4, in_flight=64)


def decode(active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
    """See `Kernels.decode`. Sums are float32; the result has the dtype of the values."""
    W_dec = contiguous_columns(W_dec)
    B = len(active.offsets)
    D = W_dec.shape[1]
    out = torch.empty(B, D, dtype=active.values.dtype, device=W_dec.device)
    BD = column_block(D, 512)
    if B:
        decode_kernel[(B, triton.cdiv(D, BD))](
            active.latents, active.values, active.offsets, W_dec, out, B, len(active.latents), D,
            W_dec.stride(0), PAIRS=PAIRS, BD=BD, **FP_FUSION,
        )  # fmt: skip
    return out


def decoder_dot(grad: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
    """See `Kernels.decoder_dot`; the result has the dtype of `grad`, sums are float32."""
    grad = contiguous_columns(grad)
    W_dec = contiguous_columns(W_dec)
    B = len(active.offsets)
    n_pairs = len(active.latents)
    D = W_dec.shape[1]
    out = torch.empty(n_pairs, dtype=grad.dtype, device=grad.device)
    if n_pairs:
        decoder_dot_kernel[(B,)](
            grad, active.latents, active.offsets, W_dec, out, B, n_pairs, D, grad.stride(0),
            W_dec.stride(0), PAIRS=PAIRS, BD=column_block(D, 256), **FP_FUSION,
        )  # fmt: skip
    return out


def decode_error(target: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor) -> Decoded:
    """See `Kernels.decode_error`; the results are float32."""
    target = contiguous_columns(target)
    W_dec = contiguous_columns(W_dec)
    B = len(active.offsets)
    n_pairs = len(active.latents)
    D = W_dec.shape[1]
    error = torch.empty(B, D, device=target.device)
    dots = torch.empty(n_pairs, device=target.device)
    if B:
        decode_error_kernel[(B,)](
            target, active.latents, active.values, active.offsets, W_dec, error, dots, B, n_pairs,
            D, target.stride(0), W_dec.stride(0), **decode_shape(D),
        )  # fmt: skip
    return Decoded(error, dots)
