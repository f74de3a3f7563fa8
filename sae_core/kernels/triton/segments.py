"""Sums over the pairs of each dictionary row, in the order of the batch rows.

Pairs are sorted by slot. A slot is a latent, or a latent's position among the used ones. One
program sums the pairs of one slot and holds a whole row of d_model in registers. A hot slot, with
more than `PIECE` pairs, is summed in pieces by several programs, whose sums are then added in
order. There are no atomic additions, so results are reproducible bit for bit. Buffers are sized by
upper bounds that the host knows, so it need not wait for the device.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sae_core.kernels.interface import EMPTY, RowGradients, SparseLatents
from sae_core.kernels.triton.launch import COUNTS, contiguous_columns, row_shape

PIECE = 512
"""Maximum number of pairs that one program sums."""


class Segments(NamedTuple):
    """(row, slot) pairs sorted by slot, plus partial sums of the pieces of hot slots."""

    rows: torch.Tensor
    """[N] int64: row of `x` and `error` of each pair."""
    values: torch.Tensor
    """[N]: weights of `error`."""
    dvalues: torch.Tensor
    """[N]: weights of `x`."""
    edges: torch.Tensor
    """[S + 1] int64: slot s has the pairs [edges[s], edges[s + 1])."""
    piece_ends: torch.Tensor
    """[S] int64: cumulative number of hot-slot pieces, up to and including this slot."""
    dec: torch.Tensor
    """[P, D] float32: each piece's weighted sum of `error`. P is at least the number of pieces."""
    enc: torch.Tensor
    """[P, D] float32: each piece's weighted sum of `x`."""
    bias: torch.Tensor
    """[P] float32: each piece's sum of `dvalues`."""
    x: torch.Tensor
    """[R, D] centred inputs."""
    error: torch.Tensor
    """[R, D] reconstruction errors."""

    @property
    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        """Arguments that all kernels calling `slot_sum` take, in the order of their parameters."""
        return (*self, self.x.shape[1], self.x.stride(0), self.error.stride(0))


@triton.jit
def _pair_sum(
    rows, weights, matrix, stride, begin, end, columns, inside,
    PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sum weight * matrix[row], [BD], and the weights, over the sorted pairs [begin, end)."""
    acc = tl.zeros((BD,), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(begin, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        live = pairs < end
        row = tl.load(rows + pairs, mask=live, other=0)
        weight = tl.load(weights + pairs, mask=live, other=0.0).to(tl.float32)
        where = matrix + row[:, None] * stride + columns[None, :]
        tile = tl.load(where, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(weight[:, None] * tile, 0)
        total += tl.sum(weight, 0)
    return acc, total


@triton.jit
def slot_sum(
    rows, weights, matrix, stride, edges, piece_ends, piece_sums, piece_bias, slot, D,
    columns, inside, PIECE: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sum weight * matrix[row], [BD], and the weights, over a slot's pairs, hot or not.

    For a hot slot the second sum is that of `piece_bias`, so it is correct only if the weights are
    dvalues.
    """
    begin, end = tl.load(edges + slot), tl.load(edges + slot + 1)
    hot = end - begin > PIECE
    # One of the two loops below is empty: the first for a hot slot, the second for any other.
    stop = tl.where(hot, begin, end)
    acc, total = _pair_sum(
        rows, weights, matrix, stride, begin, stop, columns, inside, PAIRS, BD
    )  # fmt: skip
    pieces = tl.where(hot, tl.cdiv(end - begin, PIECE), 0)
    last = tl.load(piece_ends + slot)
    for piece in range(last - pieces, last):
        acc += tl.load(piece_sums + piece * D + columns, mask=inside, other=0.0)
        total += tl.load(piece_bias + piece)
    return acc, total


@triton.jit(do_not_specialize=COUNTS)
def piece_kernel(
    owners, n_slots,
    rows, values, dvalues, edges, piece_ends, dec, enc, bias, x, error, D, x_stride, error_stride,
    PIECE: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sum one piece of a hot slot; programs past the last piece have no owner and do nothing."""
    piece = tl.program_id(0).to(tl.int64)
    slot = tl.load(owners + piece)
    if slot < n_slots:
        columns = tl.arange(0, BD)
        inside = columns < D
        begin, end = tl.load(edges + slot), tl.load(edges + slot + 1)
        nth = piece - (tl.load(piece_ends + slot) - tl.cdiv(end - begin, PIECE))
        begin += nth * PIECE
        end = tl.minimum(begin + PIECE, end)
        total, _ = _pair_sum(
            rows, values, error, error_stride, begin, end, columns, inside, PAIRS, BD
        )
        tl.store(dec + piece * D + columns, total, mask=inside)
        total, weight = _pair_sum(
            rows, dvalues, x, x_stride, begin, end, columns, inside, PAIRS, BD
        )
        tl.store(enc + piece * D + columns, total, mask=inside)
        tl.store(bias + piece, weight)


@triton.jit
def sum_kernel(
    dW_dec, dW_enc, db_enc,
    rows, values, dvalues, edges, piece_ends, dec, enc, bias, x, error, D, x_stride, error_stride,
    PIECE: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write a slot's sums to dW_dec and dW_enc, [S, D] float32, and db_enc, [S] float32."""
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    total, _ = slot_sum(
        rows, values, error, error_stride, edges, piece_ends, dec, bias, slot, D,
        columns, inside, PIECE, PAIRS, BD,
    )  # fmt: skip
    tl.store(dW_dec + slot * D + columns, total, mask=inside)
    total, weight = slot_sum(
        rows, dvalues, x, x_stride, edges, piece_ends, enc, bias, slot, D,
        columns, inside, PIECE, PAIRS, BD,
    )  # fmt: skip
    tl.store(dW_enc + slot * D + columns, total, mask=inside)
    tl.store(db_enc + slot, weight)


def sum_shape(D: int) -> dict[str, int]:
    """Return the compile-time sizes of a program that sums pairs; see `row_shape`.

    Each row is read once. With more elements in flight, the update kernel would spill registers.
    """
    return row_shape(D, per_thread=8, in_flight=32)


def sort_by_latent(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort pairs by latent, empty slots first; a latent's pairs stay in row order.

    Args:
        latents: [N] int64, below 2**31.

    Returns:
        The latents in ascending order, [N] int32, and the indices that sort them, [N] int64.
    """
    # int32 needs half as many passes of the device's radix sort as int64.
    by_latent, order = latents.to(torch.int32).sort(stable=True)
    return by_latent, order


def segments(
    pairs: SparseLatents,
    dvalues: torch.Tensor,
    x: torch.Tensor,
    error: torch.Tensor,
    order: torch.Tensor,
    edges: torch.Tensor,
) -> Segments:
    """Sort the pairs by slot and sum the pieces of hot slots, without waiting for the device.

    Args:
        pairs: N active pairs.
        dvalues: [N] gradients of their pre-activations.
        x: [R, D] centred inputs, in any float dtype that the kernels take.
        error: [R, D] reconstruction errors, in any float dtype that the kernels take.
        order: [N] int64, indices that sort the pairs by slot.
        edges: [S + 1] int64, start of each slot's pairs in that order, and the end of the last.
    """
    N = len(order)
    D = x.shape[1]
    device = x.device
    counts = edges.diff()
    per_slot = torch.where(counts > PIECE, (counts + PIECE - 1) // PIECE, 0)
    # Upper bound: a hot slot has at most count / PIECE + 1 pieces, and there are at most
    # N / (PIECE + 1) hot slots, because each has more than PIECE pairs.
    n_pieces = N // PIECE + N // (PIECE + 1) if N > PIECE else 0
    made = Segments(
        pairs.rows[order],
        pairs.values[order],
        dvalues[order],
        edges,
        per_slot.cumsum(0),
        torch.empty(n_pieces, D, device=device),
        torch.empty(n_pieces, D, device=device),
        torch.empty(n_pieces, device=device),
        contiguous_columns(x),
        contiguous_columns(error),
    )
    if n_pieces:
        numbers = torch.arange(n_pieces, device=device)
        owners = torch.searchsorted(made.piece_ends, numbers, right=True)
        piece_kernel[(n_pieces,)](owners, len(counts), *made.arguments, PIECE=PIECE, **sum_shape(D))
    return made


def row_gradients(
    active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, error: torch.Tensor
) -> RowGradients:
    """See `Kernels.row_gradients`; float32. The host waits for the number of used latents."""
    used = (active.latents != EMPTY).nonzero().squeeze(1)
    active = active._replace(
        rows=active.rows[used], latents=active.latents[used], values=active.values[used]
    )
    dvalues = dvalues[used]
    by_latent, order = sort_by_latent(active.latents)
    latents, counts = by_latent.unique_consecutive(return_counts=True)
    U = len(latents)
    D = x.shape[1]
    dW_dec = torch.empty(U, D, device=x.device)
    dW_enc = torch.empty(U, D, device=x.device)
    db_enc = torch.empty(U, device=x.device)
    if U:
        edges = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        made = segments(active, dvalues, x, error, order, edges)
        sum_kernel[(U,)](dW_dec, dW_enc, db_enc, *made.arguments, PIECE=PIECE, **sum_shape(D))
    return RowGradients(latents.long(), dW_dec, dW_enc, db_enc)
