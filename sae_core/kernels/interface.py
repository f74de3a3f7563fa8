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


class Decoded(NamedTuple):
    """What one pass over a row's active pairs gives."""

    error: torch.Tensor
    """[B, D]: target minus the row's sum of `value * W_dec[latent]`."""
    dots: torch.Tensor
    """[N]: `error[row] . W_dec[latent]`; times -2, the gradient of a value of the squared error."""


class SparseGradient(NamedTuple):
    """All that the dictionary rows' gradient is made of, before it is summed per row."""

    pairs: SparseLatents
    """Active pairs of all paths; `rows` index into `x` and `error`. `values` are the activations
    times the weight of the path's error in the loss."""
    dvalues: torch.Tensor
    """[N] gradient of each pair's pre-activation."""
    x: torch.Tensor
    """[R, D] centred inputs, once per path, in `Kernels.gather_dtype`."""
    error: torch.Tensor
    """[R, D] what each path left unexplained, likewise."""


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


class RowState(NamedTuple):
    """The dictionary rows of one shard with Adam's moments; an update changes them in place."""

    W_enc: torch.Tensor
    """[L, D] float32."""
    W_dec: torch.Tensor
    """[L, D] float32, rows of unit norm."""
    b_enc: torch.Tensor
    """[L] float32."""
    exp_avg: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Of W_enc, W_dec, b_enc; matrices float32 or bfloat16 (rounded stochastically)."""
    exp_avg_sq: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Likewise."""
    copies: tuple[torch.Tensor, torch.Tensor] | None
    """W_enc and W_dec in `Kernels.copy_dtype`, written with the rows; None where it is None."""
    first_latent: int
    """Global index of row 0: rounding is a function of the global row."""


class AdamStep(NamedTuple):
    """One update's numbers."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: torch.Tensor
    """Scalar float32: updates made, this one included; also the salt of stochastic rounding."""
    divisor: torch.Tensor | None
    """Scalar: gradients are divided by it (clipping)."""
    skip: torch.Tensor
    """Scalar: 1 leaves everything as it is."""


class RowUpdate(Protocol):
    """A sparse gradient on its way into the dictionary."""

    def square(self) -> torch.Tensor:
        """Scalar: squared norm of the rows' gradient, that of W_dec projected."""
        ...

    def apply(self, state: RowState, adam: AdamStep) -> None:
        """Adam on every row, used or not, then unit norm for W_dec's. Without a [L, D] gradient."""
        ...


class Kernels(Protocol):
    """One body of the operations that a sparse step is made of."""

    name: str
    copy_dtype: torch.dtype | None
    """Dtype in which it wants the dictionary beside the float32 masters; None: no copies."""
    gather_dtype: torch.dtype | None
    """Dtype in which the rows' gradient gathers inputs and errors; None: as they are. A body that
    multiplies bfloat16 has the encoder see rounded inputs anyway. Rounding moves an element by at
    most 2**-8 of itself, hence a gradient by at most 2**-8 of its terms' magnitudes; sums, values,
    the loss and the bias' gradient stay float32."""

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
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        """[N]: `vectors[row] . matrix[latent]` of every pair: of an output's gradient and the
        decoder, the gradient of the pair's value.

        Args:
            vectors: [B, D].
            active: pairs of the B rows.
            matrix: [L, D].
        """
        ...

    def decode_error(
        self, target: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor
    ) -> Decoded:
        """Decoding, its error and the gradient of every value, for an unsharded dictionary.

        Args:
            target: [B, D] what the decoding is to explain.
            active: the pairs of the B rows.
            W_dec: [L, D].
        """
        ...

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, error: torch.Tensor
    ) -> RowGradients:
        """Sums over each latent's pairs, in row order, hence repeatable bit for bit.

        Args:
            active: the pairs; `rows` index into `x` and `error`.
            dvalues: [N] gradient of each pair's pre-activation.
            x: [R, D] centred inputs.
            error: [R, D] what `values` weight to give the gradient of W_dec.
        """
        ...

    def row_update(self, gradient: SparseGradient, W_dec: torch.Tensor) -> RowUpdate:
        """Prepares the fused update of the rows.

        Args:
            gradient: of the global batch, the same on all data replicas.
            W_dec: [L, D] masters, along whose rows the gradient is taken out.
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


def project(gradients: RowGradients, W_dec: torch.Tensor) -> RowGradients:
    """Takes out what would only change the length of the unit decoder rows."""
    rows = W_dec[gradients.latents]
    along = (gradients.W_dec * rows).sum(1, keepdim=True)
    return gradients._replace(W_dec=gradients.W_dec - along * rows)
