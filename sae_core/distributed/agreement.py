"""Decisions that all ranks take together during training: save, stop, handle a failed save.

Each rank sees only its own signals, clock and background save. A rank that acted on those alone
would leave the others waiting in a collective. So the ranks exchange a few integers between their
hosts, at steps that all of them know in advance. The device is not involved, and the steps in
between cost nothing.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from sae_core.distributed.ranks import is_rank_zero

_EVERY_S = 1.0
"""Target time between two exchanges, in seconds."""
_MOST_STEPS = 100
"""Maximum number of steps between two exchanges.

A limit is needed because steps that have been fast so far may soon have to wait for data.
"""


class Flags(NamedTuple):
    """Requests of this rank; after an exchange, requests of any rank."""

    stop: bool = False
    """Stop training after a checkpoint."""
    save: bool = False
    """Save a checkpoint now."""
    save_failed: bool = False
    """A background save has failed."""


class Agreement:
    """Periodic exchange of flags between all ranks, about once a second.

    Each exchange also decides at which step the next one takes place, based on rank 0's clock.

    Args:
        timeout_s: Time limit for one exchange, in seconds. Exceeding it fails the run.
    """

    def __init__(self, timeout_s: float) -> None:
        # Use a separate gloo group: the default group uses NCCL on CUDA, and the checkpoint thread
        # runs its own collectives concurrently.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._steps_left = 1
        self._interval = 1
        self._began = time.monotonic()

    def is_due_after_step(self) -> bool:
        """Count a step and return whether an exchange is due; the same result on all ranks."""
        self._steps_left -= 1
        return self._steps_left <= 0

    def exchange(self, own: Flags) -> Flags:
        """Return the flags that any rank has set; collective, with the same result on all ranks."""
        # Only rank 0 proposes an interval. The others send 0, so the maximum is rank 0's proposal.
        interval = self._next_interval() if is_rank_zero() else 0
        numbers = torch.tensor([*own, interval], dtype=torch.int64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group)
        *flags, self._interval = numbers.tolist()
        self._steps_left = self._interval
        return Flags(*map(bool, flags))

    def _next_interval(self) -> int:
        now = time.monotonic()
        step_s = max((now - self._began) / self._interval, 1e-6)
        self._began = now
        return max(1, min(_MOST_STEPS, int(_EVERY_S / step_s)))
