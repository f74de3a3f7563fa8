"""Kernels made of stock torch operations, which are fast on CPUs and run on any torch device.

Weight gradients are segment sums over pairs sorted by latent. They need no [B, K, D] tensor and no
atomic additions, so results are reproducible bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foundation.errors import ConfigError
from sae_core.kernels.interface import RowGradients, SparseLatents
from sae_core.kernels.prefilter import Prefilter, prefiltered_topk
from sae_core.kernels.stock.encode import streamed_topk
from sae_core.kernels.stock.prefilter_bfloat16 import Bfloat16Prefilter
from sae_core.kernels.torch_kernels import TorchKernels


class StockKernels(TorchKernels):
    """Implementation in stock torch operations; see `Kernels`.

    Args:
        compute_dtype: Dtype of the encoder product. With bfloat16, pre-activations are summed in
            float32 and then rounded to bfloat16, so nearly equal ones become ties.
        prefilter: Finds candidates in low precision before the exact selection, for CPU tensors
            only. If None, the full product is computed in `compute_dtype`.
    """

    name = "stock"

    def __init__(
        self, compute_dtype: torch.dtype = torch.float32, prefilter: Prefilter | None = None
    ) -> None:
        self.compute_dtype = compute_dtype
        self.prefilter = prefilter

    def use_prefilter(self, name: str) -> None:
        """Use `none`, `bfloat16` or `bfloat16x3`; see `PrefilteringKernels.use_prefilter`."""
        if name not in ("none", "bfloat16", "bfloat16x3"):
            expected = "none, bfloat16 or bfloat16x3 for kernels=stock"
            raise ConfigError("train.prefilter", name, expected)
        if name == "none":
            self.prefilter = None
            return
        if self.compute_dtype != torch.float32 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise ConfigError(
                "train.prefilter",
                name,
                "none",
                "for a bfloat16 prefilter, use compute_dtype=float32 on a CPU with AVX-512",
            )
        self.prefilter = Bfloat16Prefilter(split=name == "bfloat16x3")

    def select(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `encode_topk` on all latents."""
        if self.prefilter is not None:
            return prefiltered_topk(self.prefilter, self, x, W_enc, b_enc, k)
        return self.exact_topk(x, W_enc, b_enc, k)

    def exact_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `encode_topk` without a prefilter."""
        x = x.to(self.compute_dtype)

        def product(start: int, stop: int) -> torch.Tensor:
            return self._linear(x, W_enc[start:stop], b_enc[start:stop])

        return streamed_topk(product, x.shape[0], W_enc.shape[0], k, x.device)

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        """See `Kernels.decode`."""
        return F.embedding_bag(
            active.latents, W_dec, active.offsets, mode="sum", per_sample_weights=active.values
        )

    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels.decoder_dot`."""
        # The backward of embedding_bag computes these dot products without a [N, D] tensor.
        dot: torch.Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            vectors, matrix, active.latents, active.offsets, active.rows, 0
        )
        return dot

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, error: torch.Tensor
    ) -> RowGradients:
        """See `Kernels.row_gradients`."""
        # A stable sort keeps a latent's pairs in row order, so that sums round the same every time.
        by_latent, order = active.latents.sort(stable=True)
        latents, counts = by_latent.unique_consecutive(return_counts=True)
        offsets = counts.cumsum(0) - counts
        rows = active.rows[order]
        dvalues = dvalues[order]

        def segment_sum(weights: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
            matrix = matrix.to(weights.dtype)
            return F.embedding_bag(rows, matrix, offsets, mode="sum", per_sample_weights=weights)

        db_enc = torch.segment_reduce(dvalues, "sum", lengths=counts) if len(counts) else dvalues
        return RowGradients(
            latents, segment_sum(active.values[order], error), segment_sum(dvalues, x), db_enc
        )

    def _linear(self, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return `x @ W.T + b` in float32, with inputs in `compute_dtype`."""
        if self.compute_dtype != torch.float32:
            return F.linear(x, W.to(self.compute_dtype)).float() + b
        W, b = W.float(), b.float()  # inference may hold them in 16 bits
        if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
            # oneDNN's float32 product is up to twice as fast as the default one on AMD CPUs.
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
            return out
        return F.linear(x, W, b)


def build(compute_dtype: torch.dtype, tf32: bool, prefilter: str) -> StockKernels:
    """Build these kernels with the settings of training; see `get_kernels`."""
    if tf32:
        raise ConfigError("train.compute_dtype", "tf32", "float32 for kernels=stock")
    if compute_dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError("compute dtype", compute_dtype, "float32 or bfloat16 for kernels=stock")
    kernels = StockKernels(compute_dtype)
    kernels.use_prefilter(prefilter)
    return kernels
