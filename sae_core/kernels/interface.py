"""The interface that every kernel implementation provides, and the types it uses.

Shape legend: B batch rows, D d_model, L latents of this shard, K selected per row,
N active (row, latent) pairs, U latents with at least one active pair.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch

EMPTY = -1
"""Latent of an empty slot."""


class SparseLatents(NamedTuple):
    """Active (row, latent) pairs in N slots, sorted by row (CSR over batch rows).

    The pairs of row b are in the slots [offsets[b], ends[b]). The slots from there to the next
    row's offset are empty. `compact` leaves no slot empty. `in_slots` gives every row the same
    number of slots, so that N is known without waiting for the device.
    """

    rows: torch.Tensor
    """[N] int64, ascending; also set in empty slots."""
    latents: torch.Tensor
    """[N] int64, local to the shard; `EMPTY` in empty slots."""
    values: torch.Tensor
    """[N] activations, positive or NaN; 0 in empty slots."""
    offsets: torch.Tensor
    """[B] int64: index of each row's first slot."""
    ends: torch.Tensor
    """[B] int64: index past each row's last pair."""


class Subset(NamedTuple):
    """Some of N indices, of which the host does not know how many."""

    indices: torch.Tensor
    """[N] int64: the members in ascending order, then the others."""
    size: torch.Tensor
    """Scalar int64 on the device: number of members."""


class Affine(NamedTuple):
    """The normalisation of raw activations, and the bias to subtract from the result."""

    mean: torch.Tensor
    """[D] float32."""
    scale: torch.Tensor
    """Scalar float32."""
    bias: torch.Tensor
    """[D] float32: `b_dec`."""


class Centred(NamedTuple):
    """Centred inputs, `(raw - mean) * scale - bias`, of B batch rows."""

    rows: torch.Tensor
    """[B, D] in `Kernels.gather_dtype`, or float32 where that is None."""
    raw: torch.Tensor
    """[B, D] raw activations, any float dtype."""
    affine: Affine
    total: torch.Tensor
    """[D] float32: sum over the rows of the normalised inputs, `(raw - mean) * scale`."""
    square: torch.Tensor
    """Scalar float32: sum of squares of the normalised inputs."""


class Decoded(NamedTuple):
    """Result of decoding: the error of each batch row and its dot products with decoder rows."""

    error: torch.Tensor
    """[B, D] in `Kernels.gather_dtype`, or the target's dtype where that is None: target minus the
    row's sum of `value * W_dec[latent]`. The other fields are computed from the unrounded error,
    except `dots` of a sharded dictionary."""
    dots: torch.Tensor
    """[N]: `error[row] . W_dec[latent]` of each pair.

    -2 times this is the gradient of the squared error with respect to the pair's value.
    """
    square: torch.Tensor
    """Scalar: sum of squares of the error."""
    total: torch.Tensor
    """[D]: sum of the error over the rows."""


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
    n_main: int
    """Rows of the main path. In each replica's part of the R rows, they come first."""
    n_replicas: int = 1
    """Number of replicas whose rows are stacked, all with the same number of rows."""

    @property
    def terms(self) -> tuple[SparseLatents, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments of `Kernels.row_gradients`."""
        return self.pairs, self.dvalues, self.x, self.error

    @property
    def on_main_path(self) -> torch.Tensor:
        """True for pairs of the main path, [N] bool."""
        return self.pairs.rows % (self.x.shape[0] // self.n_replicas) < self.n_main


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

    lr: float | torch.Tensor
    """Learning rate: a number, or a scalar on the device."""
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

    def input_bias_gradient(self, W_enc: torch.Tensor) -> torch.Tensor:
        """Return the gradient of `b_dec` through the centred inputs, [D] float32.

        This is minus the sum of `dvalue * W_enc[latent]` over the pairs of the main path on this
        shard.

        Args:
            W_enc: [L, D] rows with which the inputs were encoded: masters or copies.
        """
        ...

    def square(self) -> torch.Tensor:
        """Return the squared norm of the rows' gradient, a scalar, after projecting W_dec's part.

        See `project`.
        """
        ...

    def apply(self, state: RowState, adam: AdamStep) -> torch.Tensor:
        """Apply Adam to every row, used or not, then scale W_dec's rows to unit norm.

        No dense [L, D] gradient is built. Rows whose gradient is not finite stay unchanged.

        Returns:
            The squared norm of the rows' gradient, as from `square`; 0 if `adam.skip` is set.
        """
        ...


class Kernels(Protocol):
    """The operations of a sparse training step."""

    name: str
    asynchronous: bool
    """True if the host must not wait for the device within a step.

    Pairs then have a fixed number of slots, and the auxiliary path runs even if no latent is dead.
    """
    copy_dtype: torch.dtype | None
    """Dtype of the dictionary copies kept along with the float32 masters; None means no copies."""
    gather_dtype: torch.dtype | None
    """Dtype of the inputs and errors gathered for the row gradients; None leaves it unchanged.

    An implementation that multiplies in bfloat16 already rounds the encoder's inputs. Rounding
    changes an element by at most 2**-8 of its magnitude, so it changes a gradient by at most 2**-8
    of the sum of its terms' magnitudes. Sums, values, the loss and the bias gradient stay float32.
    """

    def centre(self, raw: torch.Tensor, affine: Affine) -> Centred:
        """Normalise and centre raw activations, [B, D] of any float dtype."""
        ...

    def encode_topk(
        self,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        k: int,
        among: Subset | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Select the k largest of `x @ W_enc.T + b_enc` in every row.

        Ties go to the lowest latent. NaN sorts above every number, so that it reaches the loss
        instead of being dropped.

        Args:
            x: [B, D] centred inputs.
            W_enc: [L, D].
            b_enc: [L].
            k: Number to select; at most L.
            among: Latents to select from; None means all of them.

        Returns:
            values [B, k] in the accumulation dtype, before the ReLU, and latents [B, k] int64.
            Values descend within a row, and tied latents ascend. If `among` has fewer than k
            members, the remaining values are -inf and the remaining latents are 0.
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
        self, target: torch.Tensor | Centred, active: SparseLatents, W_dec: torch.Tensor
    ) -> Decoded:
        """Decode, and return the error and every pair's dot product with its row's error.

        For an unsharded dictionary only: the error of a sharded one needs all shards' decodings.

        Args:
            target: [B, D] vectors to reconstruct; of centred inputs, the unrounded ones.
            active: Pairs of the B rows.
            W_dec: [L, D].
        """
        ...

    def subtract(self, target: torch.Tensor | Centred, recon: torch.Tensor) -> Decoded:
        """Return the error of a reconstruction that is known, with empty `dots`.

        Args:
            target: [B, D] vectors to reconstruct; of centred inputs, the unrounded ones.
            recon: [B, D] reconstructions.
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


@runtime_checkable
class Prepared(Protocol):
    """Optional part of `Kernels`: kernels that choose among variants before training."""

    def prepare(self, n_rows: int, n_latents: int, d_model: int, k: int) -> None:
        """Choose variants for these shapes; called once, before the first training step.

        It may take up to a minute and wait for the device. It changes no state of training.

        Args:
            n_rows: B, batch rows of this data replica.
            n_latents: L, latents of this shard.
            d_model: D.
            k: Number of latents to select per row.
        """
        ...
