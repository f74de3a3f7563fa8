"""Heartbeats of trainer ranks, which are files in the run's folder that the driver reads.

Each rank rewrites its file about once a second (`cluster.training.watchdog`).
"""

from __future__ import annotations

import time
from pathlib import Path

from cluster.run_folder.files import rank_heartbeat
from cluster.training.watchdog import EXIT_DELAY_S, HUNG

_MARGIN_S = 3 * EXIT_DELAY_S
"""Seconds by which the driver waits longer than a rank's watchdog, so the rank can report first."""


class Heartbeats:
    """Heartbeats of one group of ranks. The files of an earlier group are removed.

    Args:
        run_dir: The run's folder.
        n_ranks: Number of ranks in the group.
        timeout_s: Seconds without a heartbeat, plus a margin, after which a rank counts as frozen.
    """

    def __init__(self, run_dir: Path, n_ranks: int, timeout_s: float) -> None:
        self._files = [rank_heartbeat(run_dir, rank) for rank in range(n_ranks)]
        for file in self._files:
            file.unlink(missing_ok=True)
        self._limit_s = timeout_s + _MARGIN_S
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> (mtime, when first seen)

    def frozen(self) -> list[int]:
        """Return the ranks whose heartbeat has stopped."""
        # Compare only times of this machine's clock, because the clocks of other machines may
        # differ.
        now = time.monotonic()
        return [rank for rank in range(len(self._files)) if self._is_frozen(rank, now)]

    def hung(self) -> list[int]:
        """Return the ranks that ended themselves because they made no progress."""
        return [rank for rank in range(len(self._files)) if self._text(rank) == HUNG]

    def steps_taken(self) -> int:
        """Return how many steps this group has trained, according to rank 0's last heartbeat."""
        text = self._text(0)
        return int(text) if text.isdigit() else 0

    def _is_frozen(self, rank: int, now: float) -> bool:
        try:
            changed = self._files[rank].stat().st_mtime_ns
        except FileNotFoundError:  # not started yet, or finished
            self._seen.pop(rank, None)
            return False
        if self._seen.get(rank, (None,))[0] != changed:
            self._seen[rank] = (changed, now)
        return now - self._seen[rank][1] > self._limit_s

    def _text(self, rank: int) -> str:
        try:
            return self._files[rank].read_text()
        except FileNotFoundError:
            return ""
