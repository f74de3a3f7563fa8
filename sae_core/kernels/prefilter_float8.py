"""The prefilter of GPUs that multiply float8 (e4m3) twice as fast as bfloat16.

Real activations have channels of ten times the usual size, and rounding to 3 bits of mantissa moves
an element by up to 1/16 of itself. So an eighth of the channels, those that add most to the error,
are multiplied in bfloat16 and the rest in float8, into the same sums.

A bound that holds in the worst case would still certify nothing. The certificate is a statement
about chance: rounding errors of different channels are taken as independent with zero mean, so the
error of `x . w` has the variance `sum_j v_j w_j^2`, `v_j = dx_j^2 + r_j^2 x_j^2`, where dx is by
how much rounding moved x and r_j w_j the root mean square of what it moves w by. By Cauchy and
Schwarz that is at most `|v / c| |c w^2|` with any weights c per channel: a number of the row times
a number of the latent. Two more columns of the bfloat16 product add `DEVIATIONS` times its root,
and what float8 sums lose, to every pre-activation: candidates are chosen by their *upper bounds*.
A latent that leans on a channel that is rounded much has a higher bound, and raises no other's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sae_core.kernels.prefilter import Candidates

DEVIATIONS = 6.0
"""Standard deviations of margin: 1e-9 for one pair under a normal law."""
LARGEST = 448.0
"""Of float8_e4m3fn."""
SLOTS = 2
"""Columns of the bfloat16 product that carry bounds."""
_SIDE_SHARE, SIDE_STEP = 8, 64
"""Columns of the bfloat16 product: D over the one, up to a multiple of the other."""
_FLOAT8, _BFLOAT16 = 2.0**-4 / 3**0.5, 2.0**-8 / 3**0.5
"""Root mean square of an element's relative error, where it is largest."""
_SUM_WIDTH, _SUM_ROUNDING = 32, 2.0**-13
"""Products that Hopper's float8 units add up at once, and what a rounding of such a sum may move;
as published for the H100, never measured here."""
_SIDE_SUM_WIDTH, _SIDE_SUM_ROUNDING = 16, 2.0**-22
"""The same of bfloat16."""
UP = 1 + 2.0**-7
"""Times a number: rounded to bfloat16 it is no less than the number."""
TINY = 1e-30
SMALLEST = 2.0**-24
"""Scale over the largest element of a row, so that a row without float8 part does not overflow."""
_SAMPLE_ROWS = 8192
"""Dictionary rows that settle which channels go where. A bound holds whichever they are."""


class RowWeights(NamedTuple):
    """How rows of one of both matrices are split and what their bounds are made of."""

    channels: torch.Tensor
    """[D] int64: those for float8, then those for bfloat16."""
    n_side: int
    """Channels for bfloat16."""
    moved: torch.Tensor
    """[D] float32, in the order of `channels`: weight of `rounding error ** 2`."""
    squares: torch.Tensor
    """[D] float32, likewise of `element ** 2`."""
    deviations: float
    """Times the fourth root of the summed squares of both: the first bound."""
    sums: float
    """Times the norm of the float8 part: the second bound."""


class SplitRows(NamedTuple):
    """A matrix as the prefilter's product takes it; rows are `scales` times what stands here."""

    low: torch.Tensor
    """[n, at least D - n_side] float8_e4m3fn, zeros to a multiple of 16 columns."""
    side: torch.Tensor
    """[n, S] bfloat16: channels, zeros, both bounds."""
    scales: torch.Tensor
    """[n] float32, powers of two."""


SplitFunction = Callable[[torch.Tensor, RowWeights], SplitRows]
BoundedTopK = Callable[[SplitRows, SplitRows, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(x, W_enc, b_enc, count) -> values [B, count] float32 descending, latents [B, count] int64, of
the product of all columns and the bias."""


class Float8Prefilter:
    """See `Prefilter`.

    Args:
        topk: of the product of split rows.
        split: `split_rows`, or what gives the same on another device.
    """

    name = "float8"

    def __init__(self, topk: BoundedTopK, split: SplitFunction) -> None:
        self._topk, self._split = topk, split

    def candidates(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> Candidates:
        L, D = W_enc.shape
        inputs, latents = row_weights(x, W_enc)
        low_x, low_W = self._split(x, inputs), self._split(W_enc, latents)
        values, indices = self._topk(low_x, low_W, b_enc, min(3 * k, L))
        # What the sums after the float8 ones lose; of partial sums, which may cancel. Not finite
        # when an input is not, even where the product made a number of it.
        largest = torch.linalg.vector_norm(W_enc, dim=1, dtype=torch.float32).max()
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        turns = side_width(D) / _SIDE_SUM_WIDTH + 4
        return Candidates(values, indices, norms * largest * (turns * _SIDE_SUM_ROUNDING))


def side_width(D: int) -> int:
    """S, the columns of the bfloat16 product."""
    return -(-D // (_SIDE_SHARE * SIDE_STEP)) * SIDE_STEP


def row_weights(x: torch.Tensor, W_enc: torch.Tensor) -> tuple[RowWeights, RowWeights]:
    """How to split the rows of x and those of W_enc.

    The bound's loss is least where both sides have the same profile over channels, so c is the
    square root of the ratio of their mean squares; the channels with the largest product of both
    go to bfloat16.

    Args:
        x: [B, D].
        W_enc: [L, D].
    """
    D = x.shape[1]
    n_side = min(side_width(D) - SLOTS, D // 2)
    sample = W_enc[:: max(1, len(W_enc) // _SAMPLE_ROWS)]
    x_size, w_size = (
        torch.linalg.vector_norm(part, ord=4, dim=0, dtype=torch.float32).nan_to_num() + TINY
        for part in (x, sample)
    )
    order = (x_size.log() + w_size.log()).argsort(descending=True, stable=True)
    channels = torch.cat((order[n_side:].sort().values, order[:n_side].sort().values))
    rounding = torch.full_like(x_size, _FLOAT8)
    rounding[D - n_side :] = _BFLOAT16
    c = rounding * (x_size / w_size)[channels]
    sums = _SUM_ROUNDING * (D - n_side) / _SUM_WIDTH
    return (
        RowWeights(channels, n_side, 1 / c, rounding.square() / c, DEVIATIONS, sums),
        RowWeights(channels, n_side, torch.zeros_like(c), c, 1.0, 1.0),
    )


def split_rows(matrix: torch.Tensor, weights: RowWeights) -> SplitRows:
    """Rows in float8 and bfloat16, with a power of two as scale and both bounds of each.

    Args:
        matrix: [n, D], any float dtype.
        weights: of `row_weights`.
    """
    (n, D), n_side = matrix.shape, weights.n_side
    values = matrix.float()[:, weights.channels]
    low, side = values.split([D - n_side, n_side], dim=1)
    largest = torch.maximum(low.abs().amax(1) / LARGEST, values.abs().amax(1) * SMALLEST)
    # The next power of two: dividing by it rounds nothing, and bfloat16 inputs stay as they are.
    exponents = largest.clamp_min(TINY).view(torch.int32) & 0x7F800000
    scales = 2 * exponents.view(torch.float32)
    width = -(-(D - n_side) // 16) * 16
    out = SplitRows(
        torch.zeros(n, width, device=matrix.device).to(torch.float8_e4m3fn),
        torch.zeros(n, side_width(D), dtype=torch.bfloat16, device=matrix.device),
        scales,
    )
    out.low[:, : D - n_side] = (low / scales[:, None]).to(torch.float8_e4m3fn)
    out.side[:, :n_side] = side / scales[:, None]
    rounded = torch.cat((out.low[:, : D - n_side].float(), out.side[:, :n_side].float()), 1)
    moved = values - rounded * scales[:, None]
    terms = weights.moved * moved.square() + weights.squares * values.square()
    out.side[:, -2] = weights.deviations * terms.norm(dim=1).sqrt() / scales * UP
    out.side[:, -1] = weights.sums * low.norm(dim=1) / scales * UP
    return out


def joined(rows: SplitRows) -> torch.Tensor:
    """[n, low and side columns] float32: rows as the product sees them."""
    columns = torch.cat((rows.low.float(), rows.side.float()), 1)
    return columns * rows.scales[:, None]
