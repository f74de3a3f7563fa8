"""The sparse forward and backward of encoder and decoder over latent shards, as one autograd node.

Main path: the k largest latents of each token, over all shards. Auxiliary path: the `auxk` largest
of the *dead* latents, whose decoding is to explain what the main path left over (Gao et al. 2024,
arXiv 2406.04093, section 2.3). Both paths' gradients are summed per dictionary row in one pass, so
a backward makes one dense [L, D] gradient per matrix and nothing of size [B, L] or [B, K, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sae_core.kernels import Kernels, RowGradients, SparseLatents, compact
from sae_core.mesh import row_range
from sae_core.topk import select_global


class SparseGradient(NamedTuple):
    """All that the dictionary rows' gradient is made of, before it is summed per row."""

    pairs: SparseLatents
    """Active pairs of all paths; `rows` index into `x` and `grad`."""
    dvalues: torch.Tensor
    """[N] gradient of each pair's pre-activation."""
    x: torch.Tensor
    """[R, D] centred inputs, once per path."""
    grad: torch.Tensor
    """[R, D] gradient of each path's reconstruction."""


@dataclass(frozen=True)
class SparsePlan:
    """What a step is to select, and over which ranks."""

    kernels: Kernels
    n_latents: int
    """Global number of latents."""
    k: int
    auxk: int
    first_latent: int
    """Global index of this shard's first row."""
    group: dist.ProcessGroup | None
    """The latent group; None for an unsharded dictionary."""
    collect: Callable[[SparseGradient], None] | None = None
    """Takes the rows' gradient instead of autograd (the fused update); None: dense gradients."""

    @property
    def n_shards(self) -> int:
        """Ranks that share the dictionary."""
        return 1 if self.group is None else dist.get_world_size(self.group)


class SparseForward(NamedTuple):
    """What `sparse_autoencode` gives."""

    recon: torch.Tensor
    """[B, D] decoding of the k latents over all shards, without the decoder bias."""
    aux_recon: torch.Tensor | None
    """[B, D] decoding of the auxk dead latents over all shards; None without dead ones."""
    active: SparseLatents
    """The local pairs of the main path; carries no gradient."""


def encode_shard(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    k: int,
    plan: SparsePlan,
    rows: torch.Tensor | None = None,
) -> SparseLatents:
    """This shard's pairs among the global k largest of each token; a collective call.

    Args:
        x: [B, D] centred input, the same on every rank of the latent group.
        W_enc: [l, D] local rows.
        b_enc: [l].
        k: selected per token over all shards.
        plan: kernels, group and offsets.
        rows: only these local latents take part (ascending, int64); None: all.

    Returns:
        Pairs with a positive value; `latents` are local to the shard.
    """
    if rows is not None:
        W_enc, b_enc = W_enc[rows], b_enc[rows]
    # Every rank brings equally many slots, else the exchange has no common shape.
    width = min(k, row_range(plan.n_latents, 0, plan.n_shards)[1])
    taken = min(width, W_enc.shape[0])
    values, latents = plan.kernels.encode_topk(x, W_enc, b_enc, taken)
    if plan.group is not None and plan.n_shards > 1:
        slots = values.new_full((x.shape[0], width), float("-inf"))
        slots[:, :taken] = values
        indices = latents.new_zeros(x.shape[0], width)
        indices[:, :taken] = latents if rows is None else rows[latents]
        keep = select_global(slots, indices, k, plan.first_latent, plan.group)
        return compact(slots.masked_fill(~keep, 0.0), indices)
    return compact(values, latents if rows is None else rows[latents])


def sparse_autoencode(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    plan: SparsePlan,
    dead: torch.Tensor | None,
) -> SparseForward:
    """Encodes, selects and decodes over all shards; a collective call.

    The gradient of `W_dec` comes with its part along each decoder row taken out, because the rows
    are kept at unit norm. The auxiliary path gives no gradient to `b_dec`.

    Args:
        x: [B, D] normalised input, the same on every rank of the latent group; gets no gradient.
        W_enc: [l, D] local rows of the encoder.
        b_enc: [l].
        W_dec: [l, D] local rows of the decoder, unit norm.
        b_dec: [D], replicated.
        plan: what to select and over which ranks.
        dead: int64, local dead latents, ascending, possibly none; None when no rank of the latent
            group has a dead latent or the auxiliary loss is off. All ranks must agree on None.
    """
    box: list[SparseLatents] = []
    recon, aux_recon = _SparseAutoencode.apply(x, W_enc, b_enc, W_dec, b_dec, plan, dead, box)
    return SparseForward(recon, aux_recon, box[0])


class _SparseAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        plan: SparsePlan,
        dead: torch.Tensor | None,
        box: list[SparseLatents],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        centred = x - b_dec
        active = encode_shard(centred, W_enc, b_enc, plan.k, plan)
        paths = [active]
        if dead is not None:
            paths.append(encode_shard(centred, W_enc, b_enc, plan.auxk, plan, dead))
        recons = torch.stack([plan.kernels.decode(path, W_dec) for path in paths])
        if plan.n_shards > 1:
            dist.all_reduce(recons, group=plan.group)
        ctx.save_for_backward(centred, W_enc, W_dec)
        ctx.plan, ctx.paths = plan, paths
        box.append(active)
        return recons[0], recons[1] if dead is not None else None

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, aux_grad: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        centred, W_enc, W_dec = ctx.saved_tensors
        kernels = ctx.plan.kernels
        grads = [grad] if aux_grad is None else [grad, aux_grad]
        grads = [g.contiguous() for g in grads]
        dvalues = [
            kernels.decoder_dot(g, path, W_dec) for g, path in zip(grads, ctx.paths, strict=True)
        ]
        gradient = SparseGradient(
            _concatenate(ctx.paths, centred.shape[0]),
            torch.cat(dvalues),
            centred.repeat(len(grads), 1),
            torch.cat(grads),
        )
        db_dec = _encoder_bias_gradient(ctx.paths[0], dvalues[0], W_enc, ctx.plan)
        if ctx.plan.collect is not None:
            ctx.plan.collect(gradient)
            return None, None, None, None, db_dec, None, None, None
        by_row = project(kernels.row_gradients(*gradient), W_dec)
        dW_dec = _scatter(by_row.latents, by_row.W_dec, W_dec)
        dW_enc = _scatter(by_row.latents, by_row.W_enc, W_enc)
        db_enc = W_enc.new_zeros(W_enc.shape[0]).index_copy_(0, by_row.latents, by_row.b_enc)
        return None, dW_enc, db_enc, dW_dec, db_dec, None, None, None


def project(gradients: RowGradients, W_dec: torch.Tensor) -> RowGradients:
    """Takes out what would only change the length of the unit decoder rows."""
    rows = W_dec[gradients.latents]
    along = (gradients.W_dec * rows).sum(1, keepdim=True)
    return gradients._replace(W_dec=gradients.W_dec - along * rows)


def _concatenate(paths: list[SparseLatents], B: int) -> SparseLatents:
    """The paths' pairs as one list whose rows index into the stacked inputs [paths * B, D]."""
    rows = torch.cat([path.rows + i * B for i, path in enumerate(paths)])
    latents = torch.cat([path.latents for path in paths])
    values = torch.cat([path.values for path in paths])
    starts = [0]
    for path in paths[:-1]:
        starts.append(starts[-1] + len(path.rows))
    offsets = torch.cat([path.offsets + s for path, s in zip(paths, starts, strict=True)])
    return SparseLatents(rows, latents, values, offsets)


def _scatter(latents: torch.Tensor, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like).index_copy_(0, latents, rows)


def _encoder_bias_gradient(
    active: SparseLatents,
    dvalues: torch.Tensor,
    W_enc: torch.Tensor,
    plan: SparsePlan,
) -> torch.Tensor:
    """[D] gradient that reaches `b_dec` through the centred input, over all shards."""
    per_latent = W_enc.new_zeros(W_enc.shape[0]).index_add_(0, active.latents, dvalues)
    through_encoder = -(per_latent @ W_enc)
    if plan.n_shards > 1:
        dist.all_reduce(through_encoder, group=plan.group)
    return through_encoder
