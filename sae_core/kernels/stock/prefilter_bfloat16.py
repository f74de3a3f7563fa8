"""Prefilters for CPUs that multiply bfloat16 several times as fast as float32, as AMX does.

`bfloat16x3` splits both inputs into a high and a low bfloat16 part, x = x1 + x2, w = w1 + w2, and
computes x1 w1 + x2 w1 + x1 w2 as one product of depth 3 D. Its certificate is proven. Rounding to
bfloat16 changes an element by at most 2**-8 of its magnitude. So, by the Cauchy-Schwarz inequality,
the terms left out (x2 w2, and the rounding of x2 and of w2) add up to at most 3 * 2**-16 |x| |w|.
The margin also covers the rounding of the float32 sums of this product and of the exact one,
2**-24 |x| |w| per column of depth, and the rounding of the result to bfloat16.

`bfloat16` multiplies the high parts only. A worst-case bound would leave many rows of real
activations uncertified, so its certificate is probabilistic, like that of `float8`: see
`error_deviation`.
"""

from __future__ import annotations

import torch

from sae_core.errors import ShapeError
from sae_core.kernels.prefilter import Candidates
from sae_core.kernels.stock.encode import streamed_topk

DEVIATIONS = 8.0
"""Margin of `bfloat16` in standard deviations of the error.

Normally distributed errors exceed it with a probability of about 1e-15 per pre-activation.
"""
_HALF_ULP = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
_LEFT_OUT = 3 * 2.0**-16
"""Bound on the terms that `bfloat16x3` leaves out, relative to |x| |w|."""
_SUMS = 4 * 2.0**-23
"""Bound on the rounding of both products' float32 sums, relative to |x| |w|, per column of D.

It includes a safety margin.
"""
_BLOCK_BYTES = 384 << 10
"""Bytes of float32 dictionary rows to split at once.

The rows, their remainders and their bfloat16 parts should stay in the L2 cache.
"""


class Bfloat16Prefilter:
    """A prefilter that multiplies in bfloat16; see `Prefilter`. Takes CPU tensors.

    Args:
        split: True for `bfloat16x3`, which multiplies high and low parts and has a proven margin;
            False for `bfloat16`.
    """

    def __init__(self, split: bool) -> None:
        self.name = "bfloat16x3" if split else "bfloat16"
        self._split = split

    def candidates(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> Candidates:
        """See `Prefilter.candidates`.

        Raises:
            ShapeError: If a tensor is not on the CPU.
        """
        if x.device.type != "cpu" or W_enc.device.type != "cpu":
            raise ShapeError(
                f"rows on {x.device}, weights on {W_enc.device}: the {self.name} prefilter needs "
                "CPU tensors; use train.prefilter=none on this device"
            )
        L, D = W_enc.shape
        high = x.bfloat16()
        low_x = high
        if self._split:
            low_x = torch.cat((high, (x - high).bfloat16(), high), 1)
        norms = W_enc.new_empty(L)

        def product(start: int, stop: int) -> torch.Tensor:
            W = W_enc[start:stop]
            # oneDNN adds the bias in float32 and rounds once; the margin relies on this.
            low: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                low_x,
                weight_parts(W, norms[start:stop]) if self._split else W.bfloat16(),
                b_enc[start:stop],
                "none",
                [],
                "",
            )
            return low

        # The proven margin is very small, so a few extra candidates are enough.
        count = min(k + (k + 1) // 2 if self._split else 2 * k, L)
        values, latents = streamed_topk(product, len(x), L, count, x.device)
        if self._split:
            x_norm = torch.linalg.vector_norm(x, dim=1)
            margin = (_LEFT_OUT + _SUMS * D) * x_norm * norms.max()
        else:
            margin = DEVIATIONS * error_deviation(x, x - high, W_enc, _HALF_ULP / 3**0.5)
        # 0 * b_enc.sum() is NaN if a bias is not finite: the rounding of such a bias has no bound.
        rounding = 1.01 * _HALF_ULP * values[:, -1].abs() + 0 * b_enc.sum()
        return Candidates(values, latents, margin + rounding)


def weight_parts(W: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return rows as their high, high and low parts side by side, [n, 3 D] bfloat16.

    These are multiplied with the high, low and high parts of the inputs.

    Args:
        W: [n, D] float32 rows.
        norms: [n] output: the rows' norms, computed here because the rows are in the cache.
    """
    W = W.detach()  # autograd does not support `out=`
    n, D = W.shape
    out = torch.empty(n, 3, D, dtype=torch.bfloat16)
    size = max(1, _BLOCK_BYTES // (4 * D))
    rest = torch.empty(min(size, n), D)
    for rows, part, norm in zip(W.split(size), out.split(size), norms.split(size), strict=True):
        torch.linalg.vector_norm(rows, dim=1, out=norm)
        part[:, 0].copy_(rows)
        part[:, 1].copy_(part[:, 0])
        low = rest[: len(rows)].copy_(part[:, 0])  # float32: mixed dtypes subtract slowly
        part[:, 2].copy_(torch.sub(rows, low, out=low))
    return out.view(n, 3 * D)


def error_deviation(
    x: torch.Tensor, moved: torch.Tensor, W_enc: torch.Tensor, rounding: float
) -> torch.Tensor:
    """Bound the standard deviation of a low-precision product's error, over all latents, [B].

    The rounding errors of different channels are assumed to be independent with zero mean. The
    error of `x . w` then has the variance `sum_j v_j w_j^2` with `v_j = dx_j^2 + rounding^2 x_j^2`.
    A latent may have its large weights on the channels with the largest rounding errors, so the
    sum is bounded by the smallest of `max_j v_j * max |w|^2`, `sum_j v_j max_l w_lj^2` and, by the
    Cauchy-Schwarz inequality, `|v| max |w^2|`. The result is not finite if an argument is not.

    Args:
        x: [B, D] inputs.
        moved: [B, D] actual rounding errors of x, so outlier channels count with their true error.
        W_enc: [L, D].
        rounding: Root mean square of the relative rounding error of a weight.
    """
    variances = moved.square() + rounding**2 * x.square()
    longest = torch.linalg.vector_norm(W_enc, dim=1, dtype=torch.float32).max().square()
    largest = torch.maximum(W_enc.amax(0), -W_enc.amin(0)).float().square()
    fourth = torch.linalg.vector_norm(W_enc, ord=4, dim=1, dtype=torch.float32).max().square()
    bounds = (
        variances.amax(1) * longest,
        variances @ largest,
        torch.linalg.vector_norm(variances, dim=1) * fourth,
    )
    return torch.stack(bounds).amin(0).sqrt()
