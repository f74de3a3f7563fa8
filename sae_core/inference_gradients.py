"""Gradients through a trained SAE: with respect to activations, latents and weights.

Shape legend: N rows, D d_model, L latents, K active latents per row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_CHUNK_ELEMENTS = 1 << 24
"""Maximum number of elements that are gathered or converted at a time."""


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Return True if autograd records operations on any of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def weighted_rows(
    values: torch.Tensor, indices: torch.Tensor, matrix: torch.Tensor
) -> torch.Tensor:
    """Return each row's sum of `value * matrix[index]`, [N, D] float32; differentiable.

    Args:
        values: [N, K] float32.
        indices: [N, K] int64.
        matrix: [L, D] in any float dtype; products and sums are float32.
    """
    if matrix.dtype == torch.float32:
        return F.embedding_bag(indices, matrix, mode="sum", per_sample_weights=values)
    step = max(1, _CHUNK_ELEMENTS // max(1, indices.shape[1] * matrix.shape[1]))
    parts = [
        (own[..., None] * matrix[at].float()).sum(1)
        for own, at in zip(values.split(step), indices.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else values.new_zeros(0, matrix.shape[1])


def product(latents: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return `latents @ matrix`, [..., D] float32; differentiable.

    Args:
        latents: [..., L] float32.
        matrix: [L, D] in any float dtype; it is converted to float32 in blocks of rows.
    """
    if matrix.dtype == torch.float32:
        return latents @ matrix
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    out = latents.new_zeros(*latents.shape[:-1], matrix.shape[1])
    for start in range(0, len(matrix), step):
        out = out + latents[..., start : start + step] @ matrix[start : start + step].float()
    return out


def active_values(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """Return `values` with their gradient: that of `x[row] . W_enc[index] + b_enc[index]`.

    Values of 0 have no gradient, and neither has the selection.

    Args:
        x: [N, D] float32 centred activations.
        W_enc: [L, D] in any float dtype.
        b_enc: [L].
        values: [N, K] float32 values of the active latents, computed without gradient.
        indices: [N, K] int64 their indices.
    """
    out: torch.Tensor = _ActiveValues.apply(x, W_enc, b_enc, values, indices)
    return out


class _ActiveValues(torch.autograd.Function):
    """See `active_values`; the forward pass computes nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, W_enc, b_enc, values > 0, indices)
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, W_enc, b_enc, is_active, indices = ctx.saved_tensors
        gradient = gradient.masked_fill(~is_active, 0.0)
        dx = dW_enc = db_enc = None
        if ctx.needs_input_grad[0]:
            dx = weighted_rows(gradient, indices, W_enc)
        if ctx.needs_input_grad[1]:
            dW_enc = torch.zeros_like(W_enc, dtype=torch.float32)
            step = max(1, _CHUNK_ELEMENTS // max(1, indices.shape[1] * x.shape[1]))
            for start in range(0, len(x), step):
                rows = slice(start, start + step)
                terms = gradient[rows, :, None] * x[rows, None]
                dW_enc.index_add_(0, indices[rows].flatten(), terms.flatten(0, 1))
            dW_enc = dW_enc.to(W_enc.dtype)
        if ctx.needs_input_grad[2]:
            flat = gradient.flatten().to(b_enc.dtype)
            db_enc = torch.zeros_like(b_enc).index_add_(0, indices.flatten(), flat)
        return dx, dW_enc, db_enc, None, None
