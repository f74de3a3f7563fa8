"""Prefilters of processors that multiply bfloat16 several times as fast as float32.

`bfloat16x3` splits both inputs in a high and a low bfloat16 part, x = x1 + x2, w = w1 + w2, and
multiplies x1 w1 + x2 w1 + x1 w2 as one product of three times the depth. Its certificate is proven:
a part's rounding moves an element by at most 2**-8 of itself, so by Cauchy and Schwarz what is left
out, x2 w2 and twice a rest, is at most 3 * 2**-16 |x| |w|. To this come the float32 sums of either
product, D 2**-24 |x| |w| for each time the depth, and the rounding of the result to bfloat16.

`bfloat16` multiplies the high parts alone. A bound that holds in the worst case would leave many
rows of real activations uncertified, so its certificate is a statement about chance, as that of
`float8`: see `error_deviation`.
"""

from __future__ import annotations

import torch

from sae_core.kernels.prefilter import Candidates
from sae_core.kernels.stock_encode import streamed_topk

DEVIATIONS = 8.0
"""Standard deviations of margin of the single product: 1e-15 for one pair under a normal law."""
_HALF_ULP = 2.0**-8
_LEFT_OUT = 3 * 2.0**-16
_SUMS = 4 * 2.0**-23
"""Roundings of both products' float32 sums per element of D, with room to spare."""
_BLOCK_BYTES = 384 << 10
"""Dictionary rows that are split at once: they, what is left of them and their parts stay in the
nearest cache that holds a few of these."""


def bfloat16_is_fast() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


class Bfloat16Prefilter:
    """See `Prefilter`; CPU tensors.

    Args:
        split: multiply high and low parts, for a margin that is proven.
    """

    def __init__(self, split: bool) -> None:
        self.name = "bfloat16x3" if split else "bfloat16"
        self._split = split

    def candidates(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> Candidates:
        L, D = W_enc.shape
        high = x.bfloat16()
        low_x = high
        if self._split:
            low_x = torch.cat((high, (x - high).bfloat16(), high), 1)
        norms = W_enc.new_empty(L)

        def product(start: int, stop: int) -> torch.Tensor:
            W = W_enc[start:stop]
            # Adds the bias in float32 and rounds once, which the margin counts on.
            low: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                low_x,
                weight_parts(W, norms[start:stop]) if self._split else W.bfloat16(),
                b_enc[start:stop],
                "none",
                [],
                "",
            )
            return low

        # The proven margin is next to nothing: a few candidates suffice.
        count = min(k + (k + 1) // 2 if self._split else 2 * k, L)
        values, latents = streamed_topk(product, len(x), L, count, x.device)
        if self._split:
            x_norm = torch.linalg.vector_norm(x, dim=1)
            margin = (_LEFT_OUT + _SUMS * D) * x_norm * norms.max()
        else:
            margin = DEVIATIONS * error_deviation(x, x - high, W_enc, _HALF_ULP / 3**0.5)
        # Of a bias that is not finite no rounding is known.
        rounding = 1.01 * _HALF_ULP * values[:, -1].abs() + 0 * b_enc.sum()
        return Candidates(values, latents, margin + rounding)


def weight_parts(W: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """[n, 3 D] bfloat16: high, high and low part, to go with high, low and high of the input.

    Args:
        W: [n, D].
        norms: [n] gets the rows' norms, while they are in the cache.
    """
    W = W.detach()  # `out=` below does not go with autograd
    n, D = W.shape
    out = torch.empty(n, 3, D, dtype=torch.bfloat16)
    size = max(1, _BLOCK_BYTES // (4 * D))
    rest = torch.empty(min(size, n), D)
    for rows, part, norm in zip(W.split(size), out.split(size), norms.split(size), strict=True):
        torch.linalg.vector_norm(rows, dim=1, out=norm)
        part[:, 0].copy_(rows)
        part[:, 1].copy_(part[:, 0])
        low = rest[: len(rows)].copy_(part[:, 0])  # in float32: mixed types subtract slowly
        part[:, 2].copy_(torch.sub(rows, low, out=low))
    return out.view(n, 3 * D)


def error_deviation(
    x: torch.Tensor, moved: torch.Tensor, W_enc: torch.Tensor, rounding: float
) -> torch.Tensor:
    """[B] bound over all latents on the standard deviation of a low-precision product's error.

    Rounding errors of different channels are taken as independent with zero mean, so the error of
    `x . w` has the variance `sum_j v_j w_j^2` with `v_j = dx_j^2 + rounding^2 x_j^2`. A latent may
    lean on the very channels that are rounded most, so the sum is bounded by the smallest of
    `max_j v_j * max |w|^2`, `sum_j v_j max_l w_lj^2` and, by Cauchy and Schwarz, `|v| max |w^2|`.
    Not finite when an argument is not.

    Args:
        x: [B, D].
        moved: [B, D] by how much rounding moved x; its outlier channels count as they are.
        W_enc: [L, D].
        rounding: root mean square of an element's relative error.
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
