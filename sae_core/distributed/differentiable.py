"""Sums over a process group that autograd differentiates.

They are a pair. Each rank of the group computes a part of a result from an input that all ranks
share: `shared_by_group` marks the input, `sum_over_group` adds the parts. The loss, which every
rank computes from the sum, is counted once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def sum_over_group(part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the sum of all ranks' parts, the same on all ranks; collective.

    The gradient of each part is that of the sum, without communication.

    Args:
        part: This rank's part, of the same shape on all ranks.
        group: The ranks; None if this rank holds the whole.
    """
    if group is None:
        return part
    total: torch.Tensor = _Sum.apply(part, group)
    return total


def shared_by_group(shared: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return a tensor that is the same on all ranks and from which each computes a part.

    Its gradient is the sum of the gradients that the ranks' parts give; the backward pass is
    collective.

    Args:
        shared: The tensor.
        group: The ranks; None if this rank computes the whole.
    """
    if group is None:
        return shared
    out: torch.Tensor = _Shared.apply(shared, group)
    return out


class _Sum(torch.autograd.Function):
    """See `sum_over_group`."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = part.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Shared(torch.autograd.Function):
    """See `shared_by_group`."""

    @staticmethod
    def forward(ctx: Any, shared: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
