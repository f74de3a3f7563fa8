"""Exchange of sparse gradients between data replicas, instead of an all-reduce of dense ones.

A replica sends its centred inputs, errors and active pairs, B (2 D + 4 k) numbers. An all-reduce of
both matrices' gradients would send 4 L D. All replicas then sum the same pairs in the same order,
so they stay identical bit for bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from sae_core.kernels import SparseGradient, SparseLatents


def gather_over_replicas(
    gradient: SparseGradient, group: dist.ProcessGroup, asynchronous: bool
) -> SparseGradient:
    """Return the mean of all replicas' gradients; collective over the data group.

    Each replica's loss is a mean over its own rows, and all replicas have the same number of rows.

    Args:
        gradient: Sparse gradient of this replica's loss.
        group: The data group.
        asynchronous: True if all replicas have the same number of slots (see `Kernels`). The host
            then does not wait for the device; otherwise it waits for the numbers of pairs.

    Returns:
        The sparse gradient of the global batch, the same on every replica.
    """
    n_replicas = dist.get_world_size(group)
    # The loss of the global batch is the mean of the replicas' losses.
    real = torch.stack((gradient.pairs.values, gradient.dvalues)) / n_replicas
    gather = _gather_slots if asynchronous else _gather_pairs
    pairs, dvalues = gather(gradient, real, group)
    return SparseGradient(
        pairs,
        dvalues,
        _gather(gradient.x, group),
        _gather(gradient.error, group),
        gradient.n_main,
        n_replicas,
    )


def _gather_slots(
    gradient: SparseGradient, real: torch.Tensor, group: dist.ProcessGroup
) -> tuple[SparseLatents, torch.Tensor]:
    """Gather pairs of which every replica has the same number of slots, empty ones included."""
    pairs = gradient.pairs
    n_slots = len(pairs.rows)
    R = gradient.x.shape[0]
    n_replicas = dist.get_world_size(group)
    # All replicas have the same layout, so rows and offsets need not be sent.
    replicas = torch.arange(n_replicas, device=pairs.rows.device)[:, None]
    latents = _gather(pairs.latents.to(torch.int32), group).long()
    values, dvalues = _gather(real, group).view(n_replicas, 2, n_slots).unbind(1)
    ends = _gather(pairs.ends - pairs.offsets, group).view(n_replicas, R) + pairs.offsets
    merged = SparseLatents(
        (pairs.rows + replicas * R).reshape(-1),
        latents,
        values.reshape(-1),
        (pairs.offsets + replicas * n_slots).reshape(-1),
        (ends + replicas * n_slots).reshape(-1),
    )
    return merged, dvalues.reshape(-1)


def _gather_pairs(
    gradient: SparseGradient, real: torch.Tensor, group: dist.ProcessGroup
) -> tuple[SparseLatents, torch.Tensor]:
    """Gather compact pairs, of which each replica has its own number."""
    pairs = gradient.pairs
    n_replicas = dist.get_world_size(group)
    counts = _gather_counts(len(pairs.rows), pairs.rows.device, group)
    rows, latents = _gather_ragged(torch.stack((pairs.rows, pairs.latents)), counts, group)
    values, dvalues = _gather_ragged(real, counts, group)
    R = gradient.x.shape[0]
    rows += R * torch.repeat_interleave(torch.arange(n_replicas, device=rows.device), counts)
    per_row = torch.bincount(rows, minlength=n_replicas * R)
    ends = per_row.cumsum(0)
    return SparseLatents(rows, latents, values, ends - per_row, ends), dvalues


def _gather_counts(n: int, device: torch.device, group: dist.ProcessGroup) -> torch.Tensor:
    """Return every replica's number of pairs, [n_replicas] int64."""
    counts = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([n], device=device), group=group)
    return counts


def _gather(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather [R, ...] tensors from all replicas as [n_replicas * R, ...], in replica order."""
    out = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
    return out


def _gather_ragged(
    columns: torch.Tensor, counts: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Gather [2, own count] tensors from all replicas as [2, sum of counts].

    Tensors are padded to the largest count, because the all-gather requires equal shapes.
    """
    longest = int(counts.max())
    padded = columns.new_zeros(columns.shape[0], longest)
    padded[:, : columns.shape[1]] = columns
    gathered = _gather(padded, group).view(len(counts), columns.shape[0], longest)
    parts = [part[:, :count] for part, count in zip(gathered, counts.tolist(), strict=True)]
    return torch.cat(parts, 1)
