"""Rank 0, the device of collectives, and actions that succeed or fail on all ranks together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from foundation.errors import FoundryError

T = TypeVar("T")


def is_rank_zero() -> bool:
    """Return True on rank 0 of the run.

    Before the process group is initialised, and after it is destroyed, the rank is read from the
    environment variable RANK.
    """
    return (dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])) == 0


def exchange_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return the device that tensors must be on for the collectives of a group."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return the result of `action()` once it has succeeded on every rank; collective.

    Without this vote, a rank whose action fails would leave the others waiting in the next
    collective until it times out. If all ranks succeed, the vote costs one all-reduce of a single
    number.

    Args:
        action: Function to run on this rank. If it fails, it must not leave other ranks waiting in
            a collective of its own.
        group: Ranks that take part; None means all ranks. Its timeout must cover the difference in
            duration between the fastest and the slowest rank's action.

    Returns:
        This rank's result.

    Raises:
        Exception: This rank's own error, unchanged, if it had one.
        FoundryError: If this rank succeeded and another rank raised this error. If several ranks
            failed, the error is that of the first.
        RuntimeError: If this rank succeeded and another rank raised an error of any other type. The
            message gives its type and text. As with a broken collective, this rank is not at fault.
    """
    try:
        result = action()
    except Exception as error:
        # Vote inside the `except` block, so that a failing vote shows this error as its context.
        _any_failed(True, group)
        _exchange(error, group)
        raise
    if _any_failed(False, group):
        raise _exchange(None, group)
    return result


def _any_failed(failed: bool, group: dist.ProcessGroup | None) -> bool:
    """Return True on all ranks if `failed` is True on any of them; collective."""
    vote = torch.tensor(int(failed), device=exchange_device(group))
    dist.all_reduce(vote, dist.ReduceOp.MAX, group)
    return bool(vote)


def _exchange(error: Exception | None, group: dist.ProcessGroup | None) -> Exception:
    """Send this rank's error to the other ranks; return the error of the first rank that failed."""
    # Only our own error types are known to survive pickling and to mean the same on all ranks.
    known = error is None or isinstance(error, FoundryError)
    sent = error if known else RuntimeError(f"{type(error).__name__}: {error}")
    errors: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, sent, group=group)
    index, first = next((index, one) for index, one in enumerate(errors) if one is not None)
    rank = index if group is None else dist.get_global_rank(group, index)
    first.add_note(f"Raised by rank {rank}.")
    return first
