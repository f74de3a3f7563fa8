"""Sparse forward and backward of encoder and decoder over latent shards, as one autograd node.

The main path uses the k largest latents of each token over all shards. The auxiliary path uses the
`auxk` largest *dead* latents to reconstruct the main path's error (Gao et al. 2024, arXiv
2406.04093, section 2.3). The node returns the squared errors of both paths. The gradients of both
are summed per dictionary row in one pass, so no [B, L] or [B, K, D] tensor exists.

Shape legend: B batch rows, D d_model, L latents, l latents of this shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sae_core.distributed.global_topk import select_global
from sae_core.distributed.mesh import row_range
from sae_core.kernels import (
    EMPTY,
    Affine,
    Centred,
    Decoded,
    Kernels,
    SparseGradient,
    SparseLatents,
    Subset,
    active_pairs,
    input_bias_gradient,
    project,
)


class Dictionary(NamedTuple):
    """One shard of an SAE's weights."""

    W_enc: torch.Tensor
    """[l, D]"""
    b_enc: torch.Tensor
    """[l]"""
    W_dec: torch.Tensor
    """[l, D], rows of unit norm."""
    b_dec: torch.Tensor
    """[D], replicated."""


@dataclass(frozen=True)
class SparsePlan:
    """Sizes and ranks that take part in the selection of latents in a step."""

    kernels: Kernels
    n_latents: int
    """Global number of latents."""
    k: int
    """Latents selected per token on the main path."""
    auxk: int
    """Dead latents selected per token on the auxiliary path."""
    first_latent: int
    """Global index of this shard's first row."""
    group: dist.ProcessGroup | None
    """The latent group; None for an unsharded dictionary."""
    collect: Callable[[SparseGradient], None] | None = None
    """Receives the rows' sparse gradient, for the fused update. If None, autograd gets dense
    gradients."""

    @property
    def n_shards(self) -> int:
        """Number of ranks that share the dictionary."""
        return 1 if self.group is None else dist.get_world_size(self.group)


class Normalisation(NamedTuple):
    """Maps raw activations to inputs of unit mean square, `(raw - mean) * scale`."""

    mean: torch.Tensor
    """[D] float32."""
    scale: torch.Tensor
    """Scalar float32."""


class AuxInput(NamedTuple):
    """Input of the auxiliary path of a step."""

    dead: Subset
    """Dead latents of this shard; there may be none."""
    rows: torch.Tensor | None
    """Batch rows used, int64, ascending; None means all rows."""


class SparseForward(NamedTuple):
    """Result of `sparse_autoencode`."""

    squared_error: torch.Tensor
    """Scalar: squared error of the main path, summed over all rows and dimensions."""
    aux_squared_error: torch.Tensor | None
    """Scalar: squared error of the auxiliary path, which reconstructs the main path's error.

    Summed over the auxiliary rows and all dimensions; None without an auxiliary path.
    """
    active: SparseLatents
    """Active pairs of the main path on this shard; they carry no gradient."""
    inputs: Centred
    """The centred inputs, with the moments of the normalised ones; they carry no gradient."""


def encode_shard(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    k: int,
    plan: SparsePlan,
    among: Subset | None = None,
) -> SparseLatents:
    """Return this shard's pairs among the k largest latents of each token; a collective call.

    Args:
        x: [B, D] centred input, the same on every rank of the latent group.
        W_enc: [l, D] local rows.
        b_enc: [l].
        k: Number of latents selected per token over all shards.
        plan: Kernels, latent group and offsets.
        among: Local latents to select from; None means all of them.

    Returns:
        Pairs with a positive value; `latents` are local to the shard.
    """
    # Every rank must contribute the same number of slots: the exchange requires equal shapes.
    width = min(k, row_range(plan.n_latents, 0, plan.n_shards)[1])
    taken = min(width, W_enc.shape[0])
    values, latents = plan.kernels.encode_topk(x, W_enc, b_enc, taken, among)
    if plan.group is not None and plan.n_shards > 1:
        slots = values.new_full((x.shape[0], width), float("-inf"))
        slots[:, :taken] = values
        indices = latents.new_zeros(x.shape[0], width)
        indices[:, :taken] = latents
        keep = select_global(slots, indices, k, plan.first_latent, plan.group)
        return active_pairs(plan.kernels, slots.masked_fill(~keep, 0.0), indices)
    return active_pairs(plan.kernels, values, latents)


def fired_latents(active: SparseLatents, n_latents: int) -> torch.Tensor:
    """Return which of a shard's latents have an active pair, [n_latents] bool.

    Args:
        active: Pairs of the shard.
        n_latents: l.
    """
    # Empty slots mark one more latent, which is then dropped.
    fired = torch.zeros(n_latents + 1, dtype=torch.bool, device=active.latents.device)
    fired.index_fill_(0, torch.where(active.latents == EMPTY, n_latents, active.latents), True)
    return fired[:n_latents]


def sparse_autoencode(
    raw: torch.Tensor,
    weights: Dictionary,
    plan: SparsePlan,
    aux: AuxInput | None,
    copies: tuple[torch.Tensor, torch.Tensor] | None = None,
    normalisation: Normalisation | None = None,
) -> SparseForward:
    """Encode, select and decode over all shards; a collective call.

    The component of `W_dec`'s gradient along each decoder row is removed, because the rows are kept
    at unit norm. The auxiliary path treats the main path's error as a constant, and gives `b_dec`
    no gradient.

    Args:
        raw: [B, D] raw activations, the same on every rank of the latent group. They receive no
            gradient.
        weights: Weights of this shard.
        plan: What to select and over which ranks.
        aux: Input of the auxiliary path; None if no rank of the latent group has a dead latent, or
            the auxiliary loss is off. All ranks must agree on whether it is None, and on the rows.
        copies: W_enc and W_dec in `Kernels.copy_dtype`. If None, the weights themselves are used.
        normalisation: Normalisation of the activations; None if they are normalised.
    """
    if normalisation is None:
        b_dec = weights.b_dec
        normalisation = Normalisation(torch.zeros_like(b_dec), b_dec.new_ones(()))
    # These carry no gradient, so they are returned in this list, not as outputs of the node.
    box: list[tuple[SparseLatents, Centred]] = []
    error, aux_error = _SparseAutoencode.apply(raw, *weights, normalisation, plan, aux, copies, box)
    return SparseForward(error, aux_error, *box[0])


class _SparseAutoencode(torch.autograd.Function):
    """Autograd node of `sparse_autoencode`."""

    @staticmethod
    def forward(
        ctx: Any,
        raw: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        normalisation: Normalisation,
        plan: SparsePlan,
        aux: AuxInput | None,
        copies: tuple[torch.Tensor, torch.Tensor] | None,
        box: list[tuple[SparseLatents, Centred]],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoder, decoder = copies or (W_enc, W_dec)
        centred = plan.kernels.centre(raw, Affine(*normalisation, b_dec))
        inputs = centred.rows
        active = encode_shard(inputs, encoder, b_enc, plan.k, plan)
        paths = [_Path(inputs, active, _decode_error(centred, active, decoder, plan))]
        if aux is not None:
            residual = paths[0].decoded.error
            if aux.rows is not None:
                inputs = inputs[aux.rows]
                residual = residual[aux.rows]
            chosen = encode_shard(inputs, encoder, b_enc, plan.auxk, plan, aux.dead)
            paths.append(_Path(inputs, chosen, _decode_error(residual, chosen, decoder, plan)))
        ctx.save_for_backward(W_enc, W_dec)
        ctx.plan = plan
        # The outputs must not be kept: they refer to this node, and such a cycle is never freed.
        nothing = W_dec.new_empty(0)
        ctx.paths = [p._replace(decoded=p.decoded._replace(square=nothing)) for p in paths]
        box.append((active, centred))
        errors = [path.decoded.square for path in paths]
        return errors[0], errors[1] if aux is not None else None

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, aux_grad: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        W_enc, W_dec = ctx.saved_tensors
        plan = ctx.plan
        paths = ctx.paths
        # d/dy |t - y|^2 = -2 (t - y), so the gradients are the errors times these weights.
        weights = [-2.0 * weight for weight in (grad, aux_grad) if weight is not None]
        gradient = _weigh(paths, weights, plan.kernels.gather_dtype)
        db_dec = weights[0] * paths[0].decoded.total
        if plan.collect is not None:
            # The receiver adds the part of `b_dec`'s gradient that comes through the encoder.
            plan.collect(gradient)
            return None, None, None, None, db_dec, None, None, None, None, None
        through_encoder = input_bias_gradient(gradient, W_enc)
        if plan.n_shards > 1:
            dist.all_reduce(through_encoder, group=plan.group)
        db_dec += through_encoder
        by_row = project(plan.kernels.row_gradients(*gradient.terms), W_dec)
        dW_dec = _scatter(by_row.latents, by_row.W_dec, W_dec)
        dW_enc = _scatter(by_row.latents, by_row.W_enc, W_enc)
        db_enc = W_enc.new_zeros(W_enc.shape[0]).index_copy_(0, by_row.latents, by_row.b_enc)
        return None, dW_enc, db_enc, dW_dec, db_dec, None, None, None, None, None


class _Path(NamedTuple):
    """Selected latents of one path and the error of their decoding."""

    x: torch.Tensor
    """[R, D] centred inputs."""
    active: SparseLatents
    decoded: Decoded


def _decode_error(
    target: torch.Tensor | Centred, active: SparseLatents, W_dec: torch.Tensor, plan: SparsePlan
) -> Decoded:
    """Run `Kernels.decode_error` over all shards; collective over the latent group."""
    if plan.n_shards == 1:
        return plan.kernels.decode_error(target, active, W_dec)
    recon = plan.kernels.decode(active, W_dec)
    dist.all_reduce(recon, group=plan.group)
    decoded = plan.kernels.subtract(target, recon)
    return decoded._replace(dots=plan.kernels.decoder_dot(decoded.error, active, W_dec))


def _weigh(
    paths: list[_Path], weights: list[torch.Tensor], dtype: torch.dtype | None
) -> SparseGradient:
    """Concatenate the weighted pairs of all paths; `rows` index into the stacked inputs and errors.

    Args:
        paths: The main path, and the auxiliary path if there is one.
        weights: One scalar per path: -2 times the gradient of the loss with respect to the path's
            squared error.
        dtype: Dtype of the stacked inputs and errors; None leaves it unchanged.
    """
    rows = []
    offsets = []
    ends = []
    first_row = 0
    first_pair = 0
    for path in paths:
        rows.append(path.active.rows + first_row)
        offsets.append(path.active.offsets + first_pair)
        ends.append(path.active.ends + first_pair)
        first_row += path.x.shape[0]
        first_pair += len(path.active.rows)
    values = [w * path.active.values for path, w in zip(paths, weights, strict=True)]
    dots = [w * path.decoded.dots for path, w in zip(paths, weights, strict=True)]
    return SparseGradient(
        SparseLatents(
            _joined(rows),
            _joined([path.active.latents for path in paths]),
            _joined(values),
            _joined(offsets),
            _joined(ends),
        ),
        _joined(dots),
        _joined([path.x.to(dtype or path.x.dtype) for path in paths]),
        _joined([path.decoded.error.to(dtype or path.decoded.error.dtype) for path in paths]),
        paths[0].x.shape[0],
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors along the first dimension; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scatter(latents: torch.Tensor, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor with the shape of `like`: `rows` at `latents`, and zeros elsewhere."""
    return torch.zeros_like(like).index_copy_(0, latents, rows)
