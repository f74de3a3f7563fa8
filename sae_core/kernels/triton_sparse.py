"""Decoder, its gradient and the dictionary rows' gradients over active pairs only.

All sums run in a fixed order inside one program, in fp32: no atomic addition and nothing of size
[B, K, D], so the same input gives the same bits.
"""

# Triton has no types, and a kernel's arguments none that mypy knows.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_core.kernels.interface import RowGradients, SparseLatents

_PIECE = 512
"""Pairs that one program sums. A latent with more is summed in pieces, and these in order."""
PAIRS = 8
"""Pairs whose rows are loaded together, so that several loads are in flight."""


def column_block(D: int, most: int) -> int:
    """Columns of d_model that one program works on."""
    return min(most, triton.next_power_of_2(D))


@triton.jit
def _row_end(offsets, row, B, n_pairs):
    end = tl.zeros((), tl.int64) + n_pairs
    if row + 1 < B:
        end = tl.load(offsets + row + 1)
    return end


@triton.jit
def decode_kernel(
    latents, values, offsets, W, out, B, n_pairs, D, W_stride,
    PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[row] = sum of value * W[latent]; one program per (row, column block)."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    begin = tl.load(offsets + row)
    end = _row_end(offsets, row, B, n_pairs)
    acc = tl.zeros((PAIRS, BD), tl.float32)
    for first in range(begin, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        live = pairs < end
        latent = tl.load(latents + pairs, mask=live, other=0)
        value = tl.load(values + pairs, mask=live, other=0.0).to(tl.float32)
        where = W + latent[:, None] * W_stride + columns[None, :]
        rows = tl.load(where, mask=live[:, None] & inside[None, :], other=0.0)
        acc += value[:, None] * rows.to(tl.float32)
    total = tl.sum(acc, 0)
    tl.store(out + row.to(tl.int64) * D + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decoder_dot_kernel(
    grad, latents, offsets, W, out, B, n_pairs, D, grad_stride, W_stride,
    PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[pair] = grad[row] . W[latent]; one program per row, whose gradient stays in L1."""
    row = tl.program_id(0)
    begin = tl.load(offsets + row)
    end = _row_end(offsets, row, B, n_pairs)
    grad_row = grad + row.to(tl.int64) * grad_stride
    for first in range(begin, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        live = pairs < end
        latent = tl.load(latents + pairs, mask=live, other=0)
        acc = tl.zeros((PAIRS, BD), tl.float32)
        for start in range(0, D, BD):
            columns = start + tl.arange(0, BD)
            inside = columns < D
            g = tl.load(grad_row + columns, mask=inside, other=0.0).to(tl.float32)
            where = W + latent[:, None] * W_stride + columns[None, :]
            rows = tl.load(where, mask=live[:, None] & inside[None, :], other=0.0)
            acc += g[None, :] * rows.to(tl.float32)
        tl.store(out + pairs, tl.sum(acc, 1).to(out.dtype.element_ty), mask=live)


@triton.jit
def segment_kernel(
    order, rows, acts, dpre, begins, ends, slots, x, grad, dW_dec, dW_enc, db_enc,
    D, x_stride, grad_stride, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums one piece of one latent's pairs; one program per (piece, column block).

    order: [N] pairs sorted by latent; rows, acts, dpre: [N] in pair order; begins, ends, slots:
    one per piece; dW_dec, dW_enc: fp32, row `slot` of them is written.
    """
    piece = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    begin, end = tl.load(begins + piece), tl.load(ends + piece)
    dec = tl.zeros((PAIRS, BD), tl.float32)
    enc = tl.zeros((PAIRS, BD), tl.float32)
    bias = tl.zeros((PAIRS,), tl.float32)
    for first in range(begin, end, PAIRS):
        places = first + tl.arange(0, PAIRS)
        live = places < end
        pairs = tl.load(order + places, mask=live, other=0)
        row = tl.load(rows + pairs, mask=live, other=0)
        act = tl.load(acts + pairs, mask=live, other=0.0).to(tl.float32)
        dp = tl.load(dpre + pairs, mask=live, other=0.0).to(tl.float32)
        mask = live[:, None] & inside[None, :]
        g = tl.load(grad + row[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0)
        inputs = tl.load(x + row[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
        dec += act[:, None] * g.to(tl.float32)
        enc += dp[:, None] * inputs.to(tl.float32)
        bias += dp
    slot = tl.load(slots + piece)
    tl.store(dW_dec + slot * D + columns, tl.sum(dec, 0), mask=inside)
    tl.store(dW_enc + slot * D + columns, tl.sum(enc, 0), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(db_enc + slot, tl.sum(bias, 0))


@triton.jit
def fold_kernel(targets, firsts, counts, dW_dec, dW_enc, db_enc, D, BD: tl.constexpr):
    """Row `target` becomes the sum of `count` rows from `first` on, in order."""
    i = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    target, first, count = tl.load(targets + i), tl.load(firsts + i), tl.load(counts + i)
    dec = tl.zeros((BD,), tl.float32)
    enc = tl.zeros((BD,), tl.float32)
    bias = tl.zeros((), tl.float32)
    for j in range(0, count):
        dec += tl.load(dW_dec + (first + j) * D + columns, mask=inside, other=0.0)
        enc += tl.load(dW_enc + (first + j) * D + columns, mask=inside, other=0.0)
        bias += tl.load(db_enc + first + j)
    tl.store(dW_dec + target * D + columns, dec, mask=inside)
    tl.store(dW_enc + target * D + columns, enc, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(db_enc + target, bias)


def decode(active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
    """See `Kernels.decode`; dtype of W_dec, sums in fp32."""
    B, D = len(active.offsets), W_dec.shape[1]
    out = torch.empty(B, D, dtype=W_dec.dtype, device=W_dec.device)
    BD = column_block(D, 512)
    if B:
        decode_kernel[(B, triton.cdiv(D, BD))](
            active.latents, active.values, active.offsets, W_dec, out, B, len(active.latents), D,
            W_dec.stride(0), PAIRS=PAIRS, BD=BD,
        )  # fmt: skip
    return out


def decoder_dot(grad: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
    """See `Kernels.decoder_dot`; dtype of grad, sums in fp32."""
    B, n_pairs, D = len(active.offsets), len(active.latents), W_dec.shape[1]
    out = torch.empty(n_pairs, dtype=grad.dtype, device=grad.device)
    if n_pairs:
        decoder_dot_kernel[(B,)](
            grad, active.latents, active.offsets, W_dec, out, B, n_pairs, D, grad.stride(0),
            W_dec.stride(0), PAIRS=PAIRS, BD=column_block(D, 256),
        )  # fmt: skip
    return out


def row_gradients(
    active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
) -> RowGradients:
    """See `Kernels.row_gradients`; float32."""
    # Stable: within a latent the pairs stay in row order, so the sum's rounding is fixed.
    by_latent, order = active.latents.sort(stable=True)
    latents, counts = by_latent.unique_consecutive(return_counts=True)
    U, D, device = len(latents), x.shape[1], x.device
    if not U:
        none = torch.zeros(0, D, device=device)
        return RowGradients(latents, none, none, none[:, 0])
    ends = counts.cumsum(0)
    pieces = (counts + _PIECE - 1) // _PIECE
    latent_of = torch.arange(U, device=device).repeat_interleave(pieces)
    nth = torch.arange(len(latent_of), device=device) - (pieces.cumsum(0) - pieces)[latent_of]
    begin = (ends - counts)[latent_of] + nth * _PIECE
    end = torch.minimum(begin + _PIECE, ends[latent_of])
    # A latent of one piece is summed in place; the others' pieces lie behind all latents.
    split = (pieces > 1)[latent_of]
    slot = torch.where(split, U - 1 + split.cumsum(0), latent_of)
    n_slots = U + int(split.sum())
    dW_dec, dW_enc = (torch.empty(n_slots, D, device=device) for _ in range(2))
    db_enc = torch.empty(n_slots, device=device)
    BD = column_block(D, 128)
    segment_kernel[(len(latent_of), triton.cdiv(D, BD))](
        order, active.rows, active.values, dvalues, begin, end, slot, x, grad,
        dW_dec, dW_enc, db_enc, D, x.stride(0), grad.stride(0), PAIRS=PAIRS, BD=BD,
    )  # fmt: skip
    if n_slots > U:
        targets = (pieces > 1).nonzero().squeeze(1)
        firsts = slot[split & (nth == 0)]
        fold_kernel[(len(targets), triton.cdiv(D, BD))](
            targets, firsts, pieces[targets], dW_dec, dW_enc, db_enc, D, BD=BD
        )
    return RowGradients(latents, dW_dec[:U], dW_enc[:U], db_enc[:U])
