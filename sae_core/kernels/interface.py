"""What every body of the kernels takes and gives.

Shape legend: B batch rows, D d_model, L latents of this shard, K selected per row,
N active (row, latent) pairs, U latents with at least one active pair.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class SparseLatents(NamedTuple):
    """Active pairs in row order (CSR over batch rows)."""

    rows: torch.Tensor
    """[N] int64, ascending."""
    latents: torch.Tensor
    """[N] int64, local to the shard."""
    values: torch.Tensor
    """[N] positive activations."""
    offsets: torch.Tensor
    """[B] int64: where each row's pairs begin."""


class RowGradients(NamedTuple):
    """Gradients of the dictionary rows that were used; all other rows have none."""

    latents: torch.Tensor
    """[U] int64, ascending, local to the shard."""
    W_dec: torch.Tensor
    """[U, D]"""
    W_enc: torch.Tensor
    """[U, D]"""
    b_enc: torch.Tensor
    """[U]"""


class Kernels(Protocol):
    """One body of the four operations that a sparse step is made of."""

    name: str

    def encode_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest of `x @ W_enc.T + b_enc` in every row, ties to the lowest latent.

        Args:
            x: [B, D], already centred.
            W_enc: [L, D].
            b_enc: [L].
            k: at most L.

        Returns:
            values [B, k] in the accumulation dtype, before the ReLU, and latents [B, k] int64;
            the order within a row is unspecified. A NaN pre-activation is always selected, so
            that it reaches the loss instead of being dropped.
        """
        ...

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        """[B, D]: each row's sum of `value * W_dec[latent]`."""
        ...

    def decoder_dot(
        self, grad: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor
    ) -> torch.Tensor:
        """[N]: `grad[row] . W_dec[latent]` of every active pair, the gradient of its value."""
        ...

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
    ) -> RowGradients:
        """Sums over each latent's pairs, in row order, hence repeatable bit for bit.

        Args:
            active: the pairs; `rows` index into `x` and `grad`.
            dvalues: [N] gradient of each pair's pre-activation.
            x: [R, D] centred inputs.
            grad: [R, D] gradient of the reconstruction.
        """
        ...


def compact(values: torch.Tensor, latents: torch.Tensor) -> SparseLatents:
    """Keeps the pairs whose value is not zero or below: the ReLU, and the slots of other shards.

    Args:
        values: [B, K] selected pre-activations; NaN stays, so that it reaches the loss.
        latents: [B, K] int64.
    """
    B, K = values.shape
    keep = ~(values <= 0)
    counts = keep.sum(1)
    offsets = counts.cumsum(0) - counts
    flat = keep.reshape(-1).nonzero().squeeze(1)
    rows = torch.div(flat, K, rounding_mode="floor")
    return SparseLatents(rows, latents.reshape(-1)[flat], values.reshape(-1)[flat], offsets)
