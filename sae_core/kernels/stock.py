"""The body made of stock torch operations: fast on CPU, and it runs on any device torch has.

Weight gradients are segment sums over pairs sorted by latent, so no [B, K, D] tensor and no
atomic addition exists, and the same input gives the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sae_core.kernels.interface import (
    Decoded,
    RowGradients,
    RowUpdate,
    SparseGradient,
    SparseLatents,
)
from sae_core.kernels.prefilter import Prefilter, prefiltered_topk
from sae_core.kernels.stock_encode import streamed_topk
from sae_core.kernels.stock_update import StockRowUpdate


class StockKernels:
    """See `Kernels`.

    Args:
        compute_dtype: dtype of the encoder product; bfloat16 sums in float32 and then rounds the
            pre-activations to bfloat16, so that near-equal ones tie.
        prefilter: finds the candidates among which the largest are; None: the whole product in
            `compute_dtype`.
    """

    name = "stock"
    copy_dtype: torch.dtype | None = None
    gather_dtype: torch.dtype | None = None

    def __init__(
        self, compute_dtype: torch.dtype = torch.float32, prefilter: Prefilter | None = None
    ) -> None:
        self.compute_dtype = compute_dtype
        self.prefilter = prefilter

    def encode_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.prefilter is not None:
            return prefiltered_topk(self.prefilter, self, x, W_enc, b_enc, k)
        return self.exact_topk(x, W_enc, b_enc, k)

    def exact_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode_topk` without a prefilter."""
        x = x.to(self.compute_dtype)

        def product(start: int, stop: int) -> torch.Tensor:
            return self._linear(x, W_enc[start:stop], b_enc[start:stop])

        return streamed_topk(product, x.shape[0], W_enc.shape[0], k, x.device)

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(
            active.latents, W_dec, active.offsets, mode="sum", per_sample_weights=active.values
        )

    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        dot: torch.Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            vectors, matrix, active.latents, active.offsets, active.rows, 0
        )
        return dot

    def decode_error(
        self, target: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor
    ) -> Decoded:
        error = target - self.decode(active, W_dec)
        return Decoded(error, self.decoder_dot(error, active, W_dec))

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, error: torch.Tensor
    ) -> RowGradients:
        # Stable: within a latent the pairs stay in row order, so the sum's rounding is fixed.
        by_latent, order = active.latents.sort(stable=True)
        latents, counts = by_latent.unique_consecutive(return_counts=True)
        offsets = counts.cumsum(0) - counts
        rows, dvalues = active.rows[order], dvalues[order]

        def segment_sum(weights: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
            matrix = matrix.to(weights.dtype)
            return F.embedding_bag(rows, matrix, offsets, mode="sum", per_sample_weights=weights)

        db_enc = torch.segment_reduce(dvalues, "sum", lengths=counts) if len(counts) else dvalues
        return RowGradients(
            latents, segment_sum(active.values[order], error), segment_sum(dvalues, x), db_enc
        )

    def row_update(self, gradient: SparseGradient, W_dec: torch.Tensor) -> RowUpdate:
        return StockRowUpdate(self.row_gradients(*gradient), W_dec)

    def _linear(self, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.compute_dtype != torch.float32:
            return F.linear(x, W.to(self.compute_dtype)).float() + b
        if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
            # oneDNN's fp32 product is up to twice as fast as the default one on AMD.
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
            return out
        return F.linear(x, W, b)
