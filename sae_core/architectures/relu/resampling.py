"""Resampling of dead latents from inputs of high loss (Bricken et al. 2023).

A dead latent gets the direction of an input that is reconstructed badly: as its decoder row with
unit norm, and as its encoder row with a fifth of the mean norm of the other encoder rows. Its bias
is 0. Inputs are drawn from one global batch without replacement, with probabilities proportional to
their squared loss, because latents with the same row would stay the same. If there are more dead
latents than inputs, the others wait for the next time.

The draw depends on the seed, the token count and the losses only, and the i-th dead latent of the
whole dictionary takes the i-th input drawn, so that the result does not depend on the mesh.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from sae_core.architectures.base import SparseAutoencoder

ENCODER_SHARE = 0.2
"""Norm of a new encoder row, as a share of the mean norm of those that are not dead."""


@torch.no_grad()
def resample_dead(
    sae: SparseAutoencoder, x: torch.Tensor, row_losses: torch.Tensor, seed: str
) -> torch.Tensor:
    """Replace the rows of dead latents, and set their counters to 0; collective over all ranks.

    Args:
        sae: The shard.
        x: [B, D] normalised rows of this replica.
        row_losses: [B] squared error of each row.
        seed: Seed of the draw, the same on all ranks.

    Returns:
        [l] bool: the latents of this shard that were replaced.
    """
    dead = sae.dead()
    rank_of, n_dead = _numbered(sae, dead)
    chosen = _draw(_over_replicas(sae, row_losses), n_dead, seed)
    rows = _rows_at(sae, x - sae.b_dec, chosen)
    replaced = dead & (rank_of < len(rows))
    if not len(rows):
        return replaced
    new = torch.nn.functional.normalize(rows[rank_of[replaced]], dim=1)
    sae.W_enc[replaced] = new * (ENCODER_SHARE * _mean_norm(sae, ~dead))
    sae.W_dec[replaced] = new
    sae.b_enc[replaced] = 0.0
    sae.tokens_since_fired[replaced] = 0
    return replaced


def _numbered(sae: SparseAutoencoder, dead: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return each dead latent's number among those of all shards, [l], and how many there are."""
    counts = torch.zeros(sae.mesh.n_latent, dtype=torch.int64, device=dead.device)
    counts[sae.mesh.latent_rank] = dead.sum()
    if sae.latent_group is not None:
        dist.all_reduce(counts, group=sae.latent_group)
    before = counts[: sae.mesh.latent_rank].sum()
    return before + dead.cumsum(0) - 1, int(counts.sum())


def _over_replicas(sae: SparseAutoencoder, row_losses: torch.Tensor) -> torch.Tensor:
    """Return the losses of the global batch, [B * n_data] float64 on the CPU."""
    parts = [torch.empty_like(row_losses) for _ in range(sae.mesh.n_data)]
    if sae.mesh.n_data > 1:
        dist.all_gather(parts, row_losses.contiguous(), group=sae.mesh.data_group)
    else:
        parts = [row_losses]
    return torch.cat(parts).cpu().double()


def _draw(losses: torch.Tensor, n: int, seed: str) -> torch.Tensor:
    """Draw `n` rows, or all, without replacement, with probabilities of the squared losses.

    Args:
        losses: [N] float64.
        n: Number of rows to draw.
        seed: Seed of the draw.

    Returns:
        [min(n, N)] int64.
    """
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4])
    generator = torch.Generator().manual_seed(number)
    # The largest sums of log-weights and Gumbel noise are such a draw (Efraimidis and Spirakis).
    uniform = torch.rand(len(losses), dtype=torch.float64, generator=generator)
    keys = 2 * losses.clamp_min(1e-30).log() - (-uniform.clamp_min(1e-300).log()).log()
    return keys.topk(min(n, len(losses))).indices


def _rows_at(sae: SparseAutoencoder, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return rows of the global batch, [n, D], by their index in it.

    Args:
        sae: The shard.
        rows: [B, D] rows of this replica.
        chosen: [n] int64 on the CPU.
    """
    chosen = chosen.to(rows.device)
    local = chosen - sae.mesh.data_rank * len(rows)
    is_here = (local >= 0) & (local < len(rows))
    found = torch.where(is_here[:, None], rows[local.clamp(0, len(rows) - 1)], 0.0)
    if sae.mesh.n_data > 1:
        dist.all_reduce(found, group=sae.mesh.data_group)  # exact: all others are 0
    return found


def _mean_norm(sae: SparseAutoencoder, of: torch.Tensor) -> torch.Tensor:
    """Return the mean norm of some encoder rows of all shards, or 1 if there are none."""
    norms = sae.W_enc.norm(dim=1).double()
    totals = torch.stack([(norms * of).sum(), of.sum().double()])
    if sae.latent_group is not None:
        dist.all_reduce(totals, group=sae.latent_group)
    mean = torch.where(totals[1] > 0, totals[0] / totals[1].clamp_min(1), 1.0)
    return mean.float()
