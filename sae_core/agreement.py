"""What the ranks decide together while they train: to save, to stop, that a save has failed.

Each rank sees only its own signals, clock and background save, and acting on those alone would
leave the others waiting in a collective. So at steps that all know in advance they exchange a few
integers between their hosts. The device is not involved, and steps in between cost nothing.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

_EVERY_S = 1.0
_MOST_STEPS = 100
"""Between two exchanges, however fast the steps were: the next ones may have to wait for data."""


class Agreed(NamedTuple):
    """True where any rank said so; the same on all ranks."""

    stop: bool
    save: bool
    failed: bool


NOTHING = Agreed(False, False, False)


class Agreement:
    """Exchanges about once a second, at steps that rank 0's clock fixed the time before.

    Args:
        timeout_s: an exchange that takes longer fails the run.
    """

    def __init__(self, timeout_s: float) -> None:
        # Of its own: the default group is NCCL's on CUDA, and checkpoints vote from a thread.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._steps_left = 1
        self._interval = 1
        self._began = time.monotonic()

    def after_step(self) -> bool:
        """Counts a step; True on all ranks when the exchange is due."""
        self._steps_left -= 1
        return self._steps_left <= 0

    def exchange(self, stop: bool, save: bool, failed: bool) -> Agreed:
        """What any rank wants; collective over all ranks."""
        interval = self._next_interval() if dist.get_rank() == 0 else 0
        said = torch.tensor([stop, save, failed, interval], dtype=torch.int64)
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._group)
        *wanted, self._interval = said.tolist()
        self._steps_left = self._interval
        return Agreed(*map(bool, wanted))

    def _next_interval(self) -> int:
        now = time.monotonic()
        step_s = max((now - self._began) / self._interval, 1e-6)
        self._began = now
        return max(1, min(_MOST_STEPS, int(_EVERY_S / step_s)))
