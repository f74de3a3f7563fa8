"""Layouts of active pairs, and subsets of indices whose size only the device knows."""

from __future__ import annotations

import torch

from sae_core.kernels.interface import EMPTY, Kernels, SparseLatents, Subset


def active_pairs(kernels: Kernels, values: torch.Tensor, latents: torch.Tensor) -> SparseLatents:
    """Apply the ReLU to selected pre-activations, and return the pairs in the kernels' layout.

    Args:
        kernels: Kernels that will use the pairs.
        values: [B, K] pre-activations as returned by `Kernels.encode_topk`; NaN is kept, so that it
            reaches the loss. Candidates that lost to candidates of other shards are 0 or less.
        latents: [B, K] int64.
    """
    return in_slots(values, latents) if kernels.asynchronous else compact(values, latents)


def compact(values: torch.Tensor, latents: torch.Tensor) -> SparseLatents:
    """Keep only the pairs whose value is positive or NaN; the host waits for the device.

    Args:
        values: [B, K] pre-activations, in any order.
        latents: [B, K] int64.
    """
    _, K = values.shape
    keep = _is_active(values)
    ends = keep.sum(1).cumsum(0)
    flat = keep.reshape(-1).nonzero().squeeze(1)
    rows = torch.div(flat, K, rounding_mode="floor")
    offsets = torch.cat((ends.new_zeros(1), ends))[:-1]
    return SparseLatents(rows, latents.reshape(-1)[flat], values.reshape(-1)[flat], offsets, ends)


def in_slots(values: torch.Tensor, latents: torch.Tensor) -> SparseLatents:
    """Give every row K slots, and empty those whose value is zero or negative.

    Args:
        values: [B, K] pre-activations that descend within a row, NaN first.
        latents: [B, K] int64.
    """
    B, K = values.shape
    keep = _is_active(values)
    offsets = torch.arange(B, device=values.device) * K
    rows = torch.arange(B, device=values.device)[:, None].expand(B, K)
    return SparseLatents(
        rows.reshape(-1),
        torch.where(keep, latents, EMPTY).reshape(-1),
        torch.where(keep, values, 0.0).reshape(-1),
        offsets,
        offsets + keep.sum(1),
    )


def _is_active(values: torch.Tensor) -> torch.Tensor:
    # Not "values > 0", which would drop NaN.
    return ~(values <= 0)


def subset_of(mask: torch.Tensor) -> Subset:
    """Return the indices at which a mask [N] is True, without waiting for the device."""
    before = mask.cumsum(0)
    count = mask.sum()
    numbers = torch.arange(len(mask), device=mask.device)
    # Members go to their rank among the members, the others to their rank among the others.
    places = torch.where(mask, before - 1, count + numbers - before)
    return Subset(torch.empty_like(numbers).scatter_(0, places, numbers), count)
