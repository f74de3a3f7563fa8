"""Gradients in stock torch operations: the input bias through the encoder, and the projection."""

from __future__ import annotations

import torch

from sae_core.kernels.interface import EMPTY, RowGradients, SparseGradient

_LARGEST_PRODUCT = 1 << 30
"""Maximum number of matrix elements in one matrix-vector product."""


def input_bias_gradient(gradient: SparseGradient, W_enc: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `b_dec` through the centred inputs, [D], of this shard.

    Stock torch operations. See `RowUpdate.input_bias_gradient`.

    Args:
        gradient: Gradient of the dictionary rows; only the main path's pairs count.
        W_enc: [L, D] rows with which the inputs were encoded.
    """
    latents = gradient.pairs.latents
    counted = gradient.on_main_path & (latents != EMPTY)
    weights = torch.where(counted, gradient.dvalues, 0.0)
    per_latent = weights.new_zeros(W_enc.shape[0])
    # index_put_ sorts on CUDA, so its sums are reproducible; index_add_ uses atomics there.
    per_latent.index_put_((latents.clamp_min(0),), weights, accumulate=True)
    # Split the product, because cuBLAS has had faults in matrices with more than 2**31 elements.
    size = max(1, _LARGEST_PRODUCT // W_enc.shape[1])
    parts = zip(per_latent.split(size), W_enc.split(size), strict=True)
    return -torch.stack([weight @ rows for weight, rows in parts]).sum(0)


def project(gradients: RowGradients, W_dec: torch.Tensor) -> RowGradients:
    """Remove the component along each decoder row from W_dec's gradient.

    That component would only change the length of the rows, which are kept at unit norm.
    """
    rows = W_dec[gradients.latents]
    along = (gradients.W_dec * rows).sum(1, keepdim=True)
    return gradients._replace(W_dec=gradients.W_dec - along * rows)
