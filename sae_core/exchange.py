"""Data replicas exchange what a sparse gradient is made of, instead of all-reducing dense ones.

A replica sends its centred inputs, errors and active pairs: B (2 D + 4 k) numbers,
where an all-reduce of both matrices' gradients would move 4 L D. Every replica then sums the same
pairs in the same order, so replicas stay equal bit for bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from sae_core.kernels import SparseGradient, SparseLatents


def over_replicas(gradient: SparseGradient, group: dist.ProcessGroup) -> SparseGradient:
    """The mean gradient of all replicas, whose losses are means over their own rows.

    Collective over the data group; every replica has the same number of rows.

    Args:
        gradient: this replica's.
        group: the data group.
    """
    n_replicas = dist.get_world_size(group)
    pairs = gradient.pairs
    counts = _gather_counts(len(pairs.rows), pairs.rows.device, group)
    whole = torch.stack((pairs.rows, pairs.latents))
    real = torch.stack((pairs.values, gradient.dvalues)) / n_replicas
    rows, latents = _gather_ragged(whole, counts, group)
    values, dvalues = _gather_ragged(real, counts, group)
    R = gradient.x.shape[0]
    replica = torch.repeat_interleave(torch.arange(n_replicas, device=rows.device), counts)
    per_row = torch.bincount(rows + replica * R, minlength=n_replicas * R)
    return SparseGradient(
        SparseLatents(rows + replica * R, latents, values, per_row.cumsum(0) - per_row),
        dvalues,
        _gather(gradient.x, group),
        _gather(gradient.error, group),
    )


def _gather_counts(n: int, device: torch.device, group: dist.ProcessGroup) -> torch.Tensor:
    counts = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([n], device=device), group=group)
    return counts


def _gather(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[n_replicas * R, D] of [R, D], in the replicas' order."""
    out = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
    return out


def _gather_ragged(
    columns: torch.Tensor, counts: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """[2, sum of counts] of [2, own count]; padded to the longest on the way."""
    longest = int(counts.max())
    padded = columns.new_zeros(columns.shape[0], longest)
    padded[:, : columns.shape[1]] = columns
    gathered = _gather(padded, group).view(len(counts), columns.shape[0], longest)
    parts = [part[:, :count] for part, count in zip(gathered, counts.tolist(), strict=True)]
    return torch.cat(parts, 1)
