"""The prefilter for GPUs that multiply float8 (e4m3) twice as fast as bfloat16.

Real activations have outlier channels ten times as large as the others, and rounding to 3 bits of
mantissa changes an element by up to 1/16 of its magnitude. So the eighth of the channels that
contribute most to the error are multiplied in bfloat16 and the rest in float8, into the same sums.

A worst-case bound would still certify no row, so the certificate is probabilistic. The rounding
errors of different channels are assumed to be independent with zero mean. The error of `x . w` then
has the variance `sum_j v_j w_j^2` with `v_j = dx_j^2 + r_j^2 x_j^2`. Here dx is the actual rounding
error of x, and r_j is the root mean square of the relative rounding error of w_j. By the
Cauchy-Schwarz inequality the variance is at most `|v / c| |c w^2|` for any channel weights c: a
factor of the row times a factor of the latent. To every pre-activation, two extra columns of the
bfloat16 product add `DEVIATIONS` times the root of this bound and an allowance for the precision
that float8 sums lose. Candidates are therefore chosen by their *upper bounds*. A latent with large
weights on channels with large rounding errors gets a higher bound, and does not raise any other
latent's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sae_core.kernels.prefilter import Candidates

DEVIATIONS = 6.0
"""Margin in standard deviations of the error.

Normally distributed errors exceed it with a probability of about 1e-9 per pre-activation.
"""
LARGEST = 448.0
"""Largest finite float8_e4m3fn number."""
SLOTS = 2
"""Columns of the bfloat16 product that carry bounds."""
_SIDE_SHARE = 8
"""The bfloat16 product has D / `_SIDE_SHARE` columns, rounded up to a multiple of `SIDE_STEP`."""
SIDE_STEP = 64
"""The number of columns of the bfloat16 product is a multiple of this."""
_FLOAT8 = 2.0**-4 / 3**0.5
"""Root mean square of the relative error of rounding to float8, where it is largest."""
_BFLOAT16 = 2.0**-8 / 3**0.5
"""Root mean square of the relative error of rounding to bfloat16, where it is largest."""
_SUM_WIDTH = 32
"""Number of products that Hopper's float8 units add at once (published for the H100)."""
_SUM_ROUNDING = 2.0**-13
"""Largest relative rounding error of a sum of float8 products (published, not measured here)."""
_SIDE_SUM_WIDTH = 16
"""Number of products that Hopper's bfloat16 units add at once."""
_SIDE_SUM_ROUNDING = 2.0**-22
"""Largest relative rounding error of a sum of bfloat16 products."""
UP = 1 + 2.0**-7
"""Factor to apply before rounding a bound to bfloat16, so that rounding never lowers it."""
TINY = 1e-30
"""Lower limit of scales and sizes, to avoid division by zero."""
SMALLEST = 2.0**-24
"""Smallest scale, relative to a row's largest element.

It prevents overflow in the bfloat16 part of a row whose float8 part is zero.
"""
_SAMPLE_ROWS = 8192
"""Dictionary rows sampled to choose the bfloat16 channels. The bounds hold for any choice."""


class SplitSpec(NamedTuple):
    """Rule for splitting the rows of one matrix and computing their error bounds.

    With `t_j = moved_j * rounding_error_j**2 + squares_j * element_j**2`, a row's first bound is
    `deviations * sqrt(|t|)`.
    """

    channels: torch.Tensor
    """[D] int64 permutation: the float8 channels, then the bfloat16 channels."""
    n_side: int
    """Number of bfloat16 channels."""
    moved: torch.Tensor
    """[D] float32, in the order of `channels`: weights of the squared rounding errors."""
    squares: torch.Tensor
    """[D] float32, in the order of `channels`: weights of the squared elements."""
    deviations: float
    """Factor of the first bound, which covers the rounding errors of the elements."""
    sums: float
    """Factor of the second bound, which covers the rounding of float8 sums. The bound is this
    factor times the norm of the float8 part."""


class SplitRows(NamedTuple):
    """A matrix in the format of the prefilter's product; row i is (low[i], side[i]) * scales[i]."""

    low: torch.Tensor
    """[n, at least D - n_side] float8_e4m3fn channels, zero-padded to a multiple of 16 columns."""
    side: torch.Tensor
    """[n, S] bfloat16: n_side channels, zeros, then the two bounds in the last two columns."""
    scales: torch.Tensor
    """[n] float32, powers of two."""


SplitFunction = Callable[[torch.Tensor, SplitSpec], SplitRows]
BoundedTopK = Callable[[SplitRows, SplitRows, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(x, W_enc, b_enc, count) -> values [B, count] float32, descending, and latents [B, count] int64.

The values are those of the product over all columns, bounds included, plus the bias.
"""


class Float8Prefilter:
    """A prefilter that multiplies in float8 and bfloat16; see `Prefilter`.

    Args:
        topk: Selects the largest values of the product of split rows.
        split: `split_rows`, or an equivalent function for another device.
    """

    name = "float8"

    def __init__(self, topk: BoundedTopK, split: SplitFunction) -> None:
        self._topk = topk
        self._split = split

    def candidates(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> Candidates:
        """See `Prefilter.candidates`."""
        L, D = W_enc.shape
        inputs, latents = split_spec(x, W_enc)
        low_x = self._split(x, inputs)
        low_W = self._split(W_enc, latents)
        values, indices = self._topk(low_x, low_W, b_enc, min(3 * k, L))
        # The margin covers the rounding of the bfloat16 sums. Partial sums may cancel, so it is
        # relative to |x| |w|, not to the result. It is not finite when an input is not, even where
        # the product turned that input into a finite number.
        largest = torch.linalg.vector_norm(W_enc, dim=1, dtype=torch.float32).max()
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        turns = side_width(D) / _SIDE_SUM_WIDTH + 4
        return Candidates(values, indices, norms * largest * (turns * _SIDE_SUM_ROUNDING))


def side_width(D: int) -> int:
    """Return S, the number of columns of the bfloat16 product."""
    return -(-D // (_SIDE_SHARE * SIDE_STEP)) * SIDE_STEP


def split_spec(x: torch.Tensor, W_enc: torch.Tensor) -> tuple[SplitSpec, SplitSpec]:
    """Choose how to split the rows of x and those of W_enc.

    The Cauchy-Schwarz bound is tightest where both of its factors have the same profile over
    channels, so the channel weights c are the ratio of the channels' sizes in x and in W_enc, times
    the rounding error. The channels with the largest product of both sizes go to bfloat16.

    Args:
        x: [B, D].
        W_enc: [L, D].

    Returns:
        The rule for x and the rule for W_enc.
    """
    D = x.shape[1]
    n_side = min(side_width(D) - SLOTS, D // 2)
    sample = W_enc[:: max(1, len(W_enc) // _SAMPLE_ROWS)]
    x_size = torch.linalg.vector_norm(x, ord=4, dim=0, dtype=torch.float32).nan_to_num() + TINY
    w_size = torch.linalg.vector_norm(sample, ord=4, dim=0, dtype=torch.float32).nan_to_num() + TINY
    order = (x_size.log() + w_size.log()).argsort(descending=True, stable=True)
    channels = torch.cat((order[n_side:].sort().values, order[:n_side].sort().values))
    rounding = torch.full_like(x_size, _FLOAT8)
    rounding[D - n_side :] = _BFLOAT16
    c = rounding * (x_size / w_size)[channels]
    sums = _SUM_ROUNDING * (D - n_side) / _SUM_WIDTH
    return (
        SplitSpec(channels, n_side, 1 / c, rounding.square() / c, DEVIATIONS, sums),
        SplitSpec(channels, n_side, torch.zeros_like(c), c, 1.0, 1.0),
    )


def split_rows(matrix: torch.Tensor, weights: SplitSpec) -> SplitRows:
    """Split rows into float8 and bfloat16 channels, a power-of-two scale and two error bounds.

    Args:
        matrix: [n, D], any float dtype.
        weights: As returned by `split_spec` for this matrix.
    """
    n, D = matrix.shape
    n_side = weights.n_side
    values = matrix.float()[:, weights.channels]
    low, side = values.split([D - n_side, n_side], dim=1)
    largest = torch.maximum(low.abs().amax(1) / LARGEST, values.abs().amax(1) * SMALLEST)
    # Dividing by a power of two is exact, so bfloat16 inputs stay unchanged.
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


def dequantise(rows: SplitRows) -> torch.Tensor:
    """Return the rows as the product sees them, [n, low and side columns] float32."""
    columns = torch.cat((rows.low.float(), rows.side.float()), 1)
    return columns * rows.scales[:, None]
