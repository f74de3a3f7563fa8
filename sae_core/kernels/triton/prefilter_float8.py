"""The prefilter for GPUs that multiply float8 (e4m3) twice as fast as bfloat16.

Real activations have outlier channels ten times as large as the others, and rounding to 3 bits of
mantissa changes an element by up to 1/16 of its magnitude. So the eighth of the channels that
contribute most to the error are multiplied in bfloat16 and the rest in float8, into the same sums.

To every pre-activation, two extra columns of the bfloat16 product add a bound on its error.
Candidates are therefore chosen by their *upper bounds*. A latent with large weights on channels
with large rounding errors gets a higher bound, and does not raise any other latent's. Each bound is
a factor of the row times a factor of the latent.

**The certificate is probabilistic**: a worst-case bound on the rounding errors would certify no
row. Both bounds rest on an assumption about the bits that rounding removes.

*Elements.* With x and w rounded by dx and dw, the error is `dx . w + x . dw`. Rounding errors are
assumed to be independent and uniformly distributed over half a step of float8 (bfloat16) to either
side, so their standard deviations `sx` and `sw` are the steps at x and w, divided by sqrt(12). The
error then has the variance `sum_j sx_j^2 w_j^2 + x_j^2 sw_j^2`. By the Cauchy-Schwarz inequality,
this is at most `|(sx^2 / c, r^2 x^2 / c)| |(c w^2, c sw^2 / r^2)|` for any channel weights c and r.
The first column is `DEVIATIONS` times the root of this bound. On normally distributed rows, the
inequality overestimates the standard deviation by a factor of 1.8.

*Sums.* Published measurements of Hopper give the following model: a step of the float8 unit adds
the exact products of 32 columns to the running sum; all addends are aligned to the largest exponent
among them and truncated to 13 fraction bits, and so is the result. After `PROMOTED` columns, the
running sum is added to a float32 sum and starts again at zero. So a step loses at most
`SUM_ADDENDS` units of 2**-13 times its largest addend, which is a product or the running sum, and
one such unit of its result. By the Cauchy-Schwarz inequality, all steps together lose at most
2**-13 times a factor of x times the same factor of w, which for x is

    sqrt(sum_j (35 h_j + 1) x_j^2 + 34 sum_s max_{j in s} x_j^2).

Here h_j is the number of later steps before the next promotion, and s runs over the steps. That
much is proven for the model. The second column is `_TRUNCATED` = 1/2 of it: the bits cut off are
assumed to be uniformly distributed, so that an addend loses half a unit on average.
With `_TRUNCATED = 1` the bound on the sums would be strict. `benchmarks/float8_rates.py` measures
the share of certified rows for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sae_core.kernels.prefilter import Candidates, n_float8_candidates

DEVIATIONS = 5.0
"""Margin in standard deviations of the error.

Normally distributed errors exceed it with a probability of 3e-7 per selected latent, if the
Cauchy-Schwarz inequality is tight; usually it is not.
"""
LARGEST = 448.0
"""Largest finite float8_e4m3fn number."""
SLOTS = 2
"""Columns of the bfloat16 product that carry bounds."""
PROMOTED = 128
"""Number of columns after which float8 sums are added to float32 sums.

The kernels must promote at least this often (`max_num_imprecise_acc` of `tl.dot`), and each tile of
columns must start with a new sum.
"""
SUM_WIDTH = 32
"""Number of products that Hopper's float8 units add in one step (published for the H100)."""
SUM_ADDENDS = 34
"""Largest number of truncated addends in a step.

These are 32 products and one running sum, or two halves of 16 products, each with a running sum.
"""
SMALLEST_NORMAL = 2.0**-6
"""Smallest normal float8_e4m3fn number; all smaller ones have its exponent."""
FLOAT8_STEP = 2.0**-3
"""Distance of neighbouring float8_e4m3fn numbers, relative to the power of two below them."""
BFLOAT16_STEP = 2.0**-7
"""Distance of neighbouring bfloat16 numbers, relative to the power of two below them."""
SUM_UNIT = 2.0**-13
"""Truncated addends are multiples of this, relative to the power of two of the largest addend."""
_TRUNCATED = 0.5
"""Average loss of a truncated addend in units; a strict bound would need 1."""
_SIDE_SHARE = 8
"""The bfloat16 product has D / `_SIDE_SHARE` columns, rounded up to a multiple of `SIDE_STEP`."""
SIDE_STEP = 64
"""The number of columns of the bfloat16 product is a multiple of this."""
_FLOAT8 = 2.0**-4 / 3**0.5 * 0.74
"""Root mean square of the relative error of rounding to float8, for evenly spread mantissas."""
_BFLOAT16 = 2.0**-8 / 3**0.5 * 0.74
"""Root mean square of the relative error of rounding to bfloat16, for evenly spread mantissas."""
_SIDE_SUM_WIDTH = 16
"""Number of products that Hopper's bfloat16 units add at once."""
_SIDE_SUM_ROUNDING = 2.0**-22
"""Largest relative rounding error of a sum of bfloat16 products."""
UP = 1 + 1.01 * 2.0**-8
"""Factor to apply before rounding a bound to bfloat16, so that rounding never lowers it."""
TINY = 1e-30
"""Lower limit of scales and sizes, to avoid division by zero."""
SMALLEST = 2.0**-24
"""Smallest scale, relative to a row's largest element.

It prevents overflow in the bfloat16 part of a row whose float8 part is zero.
"""
_SAMPLE_ROWS = 8192
"""Dictionary rows sampled to choose the bfloat16 channels. The bounds hold for any choice."""
_LOG_RATIO = 10.0
"""Limit of the logarithm of a channel's weight relative to the median channel's.

It keeps fourth powers finite. The bounds hold for any weights.
"""


class SplitSpec(NamedTuple):
    """Rule for splitting the rows of one matrix and computing their error bounds."""

    channels: torch.Tensor
    """[D] int64 permutation: the float8 channels, then the bfloat16 channels."""
    n_side: int
    """Number of bfloat16 channels."""
    moved: torch.Tensor
    """[D] float32, in the order of `channels`: weights of the variances of the rounding errors."""
    squares: torch.Tensor
    """[D] float32, in the order of `channels`: weights of the squared elements."""
    deviations: float
    """Factor of the first bound, which covers the rounding errors of the elements."""
    sums: float
    """Factor of the second bound, which covers the truncation of float8 sums."""


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
        values, indices = self._topk(low_x, low_W, b_enc, n_float8_candidates(D, L, k))
        # The margin covers the rounding of the float32 sums. Partial sums may cancel, so it is
        # relative to |x| |w|, not to the result. It is not finite when an input is not, even where
        # the product turned that input into a finite number.
        largest = torch.linalg.vector_norm(W_enc, dim=1, dtype=torch.float32).max()
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        turns = side_width(D) / _SIDE_SUM_WIDTH + D / PROMOTED + 4
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
    log_ratio = (x_size / w_size).log()[channels]
    ratio = (log_ratio - log_ratio.median()).clamp(-_LOG_RATIO, _LOG_RATIO).exp()
    c = rounding * ratio
    r_squared = rounding.square()
    return (
        SplitSpec(channels, n_side, 1 / c, r_squared / c, DEVIATIONS, _TRUNCATED * SUM_UNIT),
        SplitSpec(channels, n_side, c / r_squared, c, 1.0, 1.0),
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
    # In units of the scale, neither the fourth powers nor their sums leave the range of float32.
    scaled = values / scales[:, None]
    variances = rounding_variances(scaled, rounded, n_side)
    moved = (weights.moved * variances).square()
    squares = (weights.squares * scaled.square()).square()
    out.side[:, -2] = weights.deviations * (moved + squares).sum(1).sqrt().sqrt() * UP
    out.side[:, -1] = weights.sums * sum_weights(rounded[:, : D - n_side]).sqrt() * UP
    return out


def rounding_variances(scaled: torch.Tensor, rounded: torch.Tensor, n_side: int) -> torch.Tensor:
    """Return the variances of rounding errors that are uniform over a step, [n, D].

    Args:
        scaled: [n, D] elements in units of the row's scale: float8 channels, then bfloat16 ones.
        rounded: [n, D] the same, rounded.
        n_side: Number of bfloat16 channels.
    """
    powers = (scaled.view(torch.int32) & 0x7F800000).view(torch.float32)
    low, side = powers.split([scaled.shape[1] - n_side, n_side], dim=1)
    steps = torch.cat((low.clamp_min(SMALLEST_NORMAL) * FLOAT8_STEP, side * BFLOAT16_STEP), 1)
    # bfloat16 inputs are not rounded in bfloat16 channels.
    unchanged = scaled == rounded
    unchanged[:, : scaled.shape[1] - n_side] = False
    return (steps.square() / 12).masked_fill(unchanged, 0)


def sum_weights(low: torch.Tensor, promoted: int = PROMOTED) -> torch.Tensor:
    """Return the square of a row's factor in the bound on the truncation of float8 sums, [n].

    Args:
        low: [n, D - n_side] float32: the float8 channels as they are multiplied.
        promoted: Number of columns after which sums are promoted to float32.
    """
    n, width = low.shape
    n_steps = -(-width // SUM_WIDTH)
    padded = torch.nn.functional.pad(low, (0, n_steps * SUM_WIDTH - width))
    steps = padded.view(n, n_steps, SUM_WIDTH)
    # h of each step: the number of later steps before the next promotion.
    place = torch.arange(n_steps, device=low.device) % (promoted // SUM_WIDTH)
    later = promoted // SUM_WIDTH - 1 - place
    running = ((SUM_ADDENDS + 1) * later + 1) * steps.square().sum(2)
    largest = steps.abs().amax(2).clamp_min(SMALLEST_NORMAL).square()
    return (running + SUM_ADDENDS * largest).sum(1)


def dequantise(rows: SplitRows) -> torch.Tensor:
    """Return the rows as the product sees them, [n, low and side columns] float32."""
    columns = torch.cat((rows.low.float(), rows.side.float()), 1)
    return columns * rows.scales[:, None]
