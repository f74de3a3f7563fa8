"""The interface that every kernel implementation provides, and the types it uses.

Shape legend: B batch rows, D d_model, L latents of this shard, K selected per row,
N active (row, latent) pairs, U latents with at least one active pair.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class SparseLatents(NamedTuple):
    """Active (row, latent) pairs, sorted by row (CSR over batch rows)."""

    rows: torch.Tensor
    """[N] int64, ascending."""
    latents: torch.Tensor
    """[N] int64, local to the shard."""
    values: torch.Tensor
    """[N] activations, positive or NaN."""
    offsets: torch.Tensor
    """[B] int64: index of each row's first pair."""


class Decoded(NamedTuple):
    """Result of decoding: the error of each batch row and its dot products with decoder rows."""

    error: torch.Tensor
    """[B, D]: target minus the row's sum of `value * W_dec[latent]`."""
    dots: torch.Tensor
    """[N]: `error[row] . W_dec[latent]` of each pair.

    -2 times this is the gradient of the squared error with respect to the pair's value.
    """


class SparseGradient(NamedTuple):
    """The terms of the dictionary rows' gradient, before they are summed per row.

    The pairs of the main and auxiliary paths are concatenated. R counts the batch rows of all
    paths.
    """

    pairs: SparseLatents
    """Active pairs of all paths; `rows` index into `x` and `error`.

    `values` are the activations times -2 times the gradient of the loss with respect to the path's
    squared error, so that `values[n] * error[rows[n]]` is a term of W_dec's gradient.
    """
    dvalues: torch.Tensor
    """[N] gradient of the loss with respect to each pair's pre-activation."""
    x: torch.Tensor
    """[R, D] centred inputs of each path, in `Kernels.gather_dtype`."""
    error: torch.Tensor
    """[R, D] reconstruction errors of each path, in `Kernels.gather_dtype`."""


class RowGradients(NamedTuple):
    """Gradients of the dictionary rows with at least one active pair; all others are zero."""

    latents: torch.Tensor
    """[U] int64, ascending, local to the shard."""
    W_dec: torch.Tensor
    """[U, D]"""
    W_enc: torch.Tensor
    """[U, D]"""
    b_enc: torch.Tensor
    """[U]"""


class RowState(NamedTuple):
    """One shard's dictionary rows and their Adam moments; an update changes them in place."""

    W_enc: torch.Tensor
    """[L, D] float32."""
    W_dec: torch.Tensor
    """[L, D] float32, rows of unit norm."""
    b_enc: torch.Tensor
    """[L] float32."""
    exp_avg: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """First moments of W_enc, W_dec and b_enc, with the same shapes.

    The moments of the matrices are float32, or bfloat16 with stochastic rounding. The moment of the
    bias is float32.
    """
    exp_avg_sq: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Second moments, with the same shapes and dtypes."""
    copies: tuple[torch.Tensor, torch.Tensor] | None
    """Copies of W_enc and W_dec in `Kernels.copy_dtype`, updated with the rows, or None."""
    first_latent: int
    """Global index of row 0; stochastic rounding depends on the global index."""


class AdamStep(NamedTuple):
    """Hyperparameters and flags of one Adam update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: torch.Tensor
    """Scalar float32: number of updates, including this one; also salts stochastic rounding."""
    divisor: torch.Tensor | None
    """Scalar by which gradients are divided, for clipping; None means no clipping."""
    skip: torch.Tensor
    """Scalar: 1 to skip the update, else 0."""


class RowUpdate(Protocol):
    """An update of the dictionary rows from one sparse gradient."""

    def square(self) -> torch.Tensor:
        """Return the squared norm of the rows' gradient, a scalar, after projecting W_dec's part.

        See `project`.
        """
        ...

    def apply(self, state: RowState, adam: AdamStep) -> None:
        """Apply Adam to every row, used or not, then scale W_dec's rows to unit norm.

        No dense [L, D] gradient is built.
        """
        ...


class Kernels(Protocol):
    """The operations of a sparse training step."""

    name: str
    copy_dtype: torch.dtype | None
    """Dtype of the dictionary copies kept along with the float32 masters; None means no copies."""
    gather_dtype: torch.dtype | None
    """Dtype of the inputs and errors gathered for the row gradients; None leaves it unchanged.

    An implementation that multiplies in bfloat16 already rounds the encoder's inputs. Rounding
    changes an element by at most 2**-8 of its magnitude, so it changes a gradient by at most 2**-8
    of the sum of its terms' magnitudes. Sums, values, the loss and the bias gradient stay float32.
    """

    def encode_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Select the k largest of `x @ W_enc.T + b_enc` in every row.

        Ties go to the lowest latent. NaN sorts above every number, so that it reaches the loss
        instead of being dropped.

        Args:
            x: [B, D] centred inputs.
            W_enc: [L, D].
            b_enc: [L].
            k: Number to select; at most L.

        Returns:
            values [B, k] in the accumulation dtype, before the ReLU, and latents [B, k] int64.
            The order within a row is unspecified.
        """
        ...

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        """Return each row's sum of `value * W_dec[latent]`, [B, D]."""
        ...

    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        """Return `vectors[row] . matrix[latent]` of every pair, [N].

        With the gradient with respect to the decoder's output as `vectors` and the decoder as
        `matrix`, this is the gradient with respect to each pair's value.

        Args:
            vectors: [B, D].
            active: Pairs of the B rows.
            matrix: [L, D].
        """
        ...

    def decode_error(
        self, target: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor
    ) -> Decoded:
        """Decode, and return the error and every pair's dot product with its row's error.

        For an unsharded dictionary only: the error of a sharded one needs all shards' decodings.

        Args:
            target: [B, D] vectors to reconstruct.
            active: Pairs of the B rows.
            W_dec: [L, D].
        """
        ...

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, error: torch.Tensor
    ) -> RowGradients:
        """Sum the gradient terms of each latent's pairs.

        Terms are added in row order, so the result is reproducible bit for bit.

        Args:
            active: Active pairs; `rows` index into `x` and `error`.
            dvalues: [N] gradient of the loss with respect to each pair's pre-activation; these are
                the weights of `x` in the gradient of W_enc.
            x: [R, D] centred inputs.
            error: [R, D] reconstruction errors; `active.values` are their weights in the gradient
                of W_dec.
        """
        ...

    def row_update(self, gradient: SparseGradient, W_dec: torch.Tensor) -> RowUpdate:
        """Prepare the fused update of the dictionary rows.

        Args:
            gradient: Gradient of the global batch, the same on all data replicas.
            W_dec: [L, D] master rows, used to project W_dec's gradient (see `project`).
        """
        ...


def compact(values: torch.Tensor, latents: torch.Tensor) -> SparseLatents:
    """Drop the pairs whose value is zero or negative.

    This applies the ReLU. It also drops candidates that lost to candidates of other shards; the
    caller has set their values to 0.

    Args:
        values: [B, K] selected pre-activations; NaN is kept, so that it reaches the loss.
        latents: [B, K] int64.
    """
    _, K = values.shape
    # Not "values > 0", which would drop NaN.
    keep = ~(values <= 0)
    counts = keep.sum(1)
    offsets = counts.cumsum(0) - counts
    flat = keep.reshape(-1).nonzero().squeeze(1)
    rows = torch.div(flat, K, rounding_mode="floor")
    return SparseLatents(rows, latents.reshape(-1)[flat], values.reshape(-1)[flat], offsets)


def project(gradients: RowGradients, W_dec: torch.Tensor) -> RowGradients:
    """Remove the component along each decoder row from W_dec's gradient.

    That component would only change the length of the rows, which are kept at unit norm.
    """
    rows = W_dec[gradients.latents]
    along = (gradients.W_dec * rows).sum(1, keepdim=True)
    return gradients._replace(W_dec=gradients.W_dec - along * rows)
