"""Stock kernels that round where the Triton kernels do in bfloat16, to measure what rounding costs.

Triton's kernels multiply 16-bit copies of the weights and keep centred inputs and errors in
bfloat16, including the errors that the auxiliary loss reconstructs. Sums, selected values, the loss
and dot products are float32 in both.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sae_core.kernels.interface import Affine, Centred, Decoded, Kernels, SparseLatents
from sae_core.kernels.registry import STOCK, KernelBody
from sae_core.kernels.stock.body import StockKernels


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values rounded to bfloat16 numbers."""
    return values.bfloat16().float()


class RoundedKernels(StockKernels):
    """The stock kernels with the rounding of `TritonKernels` in bfloat16."""

    name = "rounded"

    def centre(self, raw: torch.Tensor, affine: Affine) -> Centred:
        """See `Kernels.centre`."""
        centred = super().centre(raw, affine)
        return centred._replace(rows=_rounded(centred.rows))

    def select(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `encode_topk` on all latents."""
        return super().select(_rounded(x), _rounded(W_enc), b_enc, k)

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        """See `Kernels.decode`."""
        return super().decode(active, _rounded(W_dec))

    def decode_error(
        self, target: torch.Tensor | Centred, active: SparseLatents, W_dec: torch.Tensor
    ) -> Decoded:
        """See `Kernels.decode_error`."""
        if isinstance(target, Centred):
            mean, scale, bias = target.affine
            target = (target.raw.float() - mean) * scale - bias
        exact = self.subtract(target, self.decode(active, W_dec))
        dots = self.decoder_dot(exact.error, active, _rounded(W_dec))
        return exact._replace(error=_rounded(exact.error), dots=dots)


def build(compute_dtype: torch.dtype, tf32: bool, prefilter: str) -> Kernels:
    """Build these kernels; they take the options of the stock kernels without a prefilter."""
    return RoundedKernels(compute_dtype)


ROUNDED: KernelBody = replace(
    STOCK, build=f"{__name__}:build", prefilters=(), prefilter_dtypes=(), timed_prefilters=()
)
