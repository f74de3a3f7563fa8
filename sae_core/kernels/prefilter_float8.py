"""The prefilter of GPUs that multiply float8 (e4m3) twice as fast as bfloat16.

Rounding to 3 bits of mantissa moves an element by up to 1/16 of itself, so a bound that holds in
the worst case would certify nothing. The certificate is a statement about chance instead: the
margin is `DEVIATIONS` times the standard deviation of a product's error, see `error_deviation`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sae_core.kernels.prefilter import Candidates, error_deviation

DEVIATIONS = 6.0
"""Standard deviations of margin: 1e-9 for one pair under a normal law."""
LARGEST = 448.0
"""Of float8_e4m3fn."""
_ROUNDING = 2.0**-4 / 3**0.5
"""Root mean square of an element's relative error, where it is largest."""
_SUM_WIDTH, _SUM_ROUNDING = 32, 2.0**-13
"""Products that Hopper's float8 units add up at once, and what a rounding of such a sum may move;
as published for the H100, never measured here."""

ApproximateTopK = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]
]
"""(x, W_enc, b_enc, count) -> values [B, count] float32 descending, latents [B, count] int64."""


class Float8Prefilter:
    """See `Prefilter`.

    Args:
        approximate_topk: TopK of the product of the inputs as `quantise_rows` rounds them.
    """

    name = "float8"

    def __init__(self, approximate_topk: ApproximateTopK) -> None:
        self._topk = approximate_topk

    def candidates(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> Candidates:
        L, D = W_enc.shape
        values, latents = self._topk(x, W_enc, b_enc, min(3 * k, L))
        # Of the partial sums, which may cancel: not of their end.
        largest = torch.linalg.vector_norm(W_enc, dim=1, dtype=torch.float32).max()
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        sums = norms * largest * (_SUM_ROUNDING * D / _SUM_WIDTH)
        return Candidates(values, latents, error_margin(x, W_enc) + sums)


def error_margin(x: torch.Tensor, W_enc: torch.Tensor) -> torch.Tensor:
    """[B] `DEVIATIONS` standard deviations of a float8 product's error, for the longest latent.

    Args:
        x: [B, D].
        W_enc: [L, D].
    """
    x = x.float()
    rounded, scales = quantise_rows(x)
    return DEVIATIONS * error_deviation(x, x - rounded.float() * scales[:, None], W_enc, _ROUNDING)


def quantise_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as float8_e4m3fn times a scale each, so that a row's largest element is exact.

    Args:
        matrix: [n, D], any float dtype.

    Returns:
        [n, D] float8_e4m3fn and [n] float32 scales; a row of zeros has scale 1.
    """
    matrix = matrix.float()
    largest = matrix.abs().amax(1)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (matrix / scales[:, None]).to(torch.float8_e4m3fn), scales
