"""What the driver reads from the pulses that ranks leave in the run's folder once a second."""

from __future__ import annotations

import time
from pathlib import Path

from cluster.watchdog import HUNG, LAST_WORDS_S

_MARGIN_S = 3 * LAST_WORDS_S
"""How much longer than a rank's own watchdog the driver waits: the ranks shall tell first."""


def pulse_file(run_dir: Path, rank: int) -> Path:
    """Where a rank leaves its pulse."""
    return run_dir / "logs" / f"rank-{rank}.pulse"


class Pulses:
    """The pulses of one group of ranks; those of an earlier group are removed.

    Args:
        run_dir: the run's folder.
        n_ranks: ranks in the group.
        timeout_s: a rank whose pulse stands still for longer, and a margin, is frozen.
    """

    def __init__(self, run_dir: Path, n_ranks: int, timeout_s: float) -> None:
        self._files = [pulse_file(run_dir, rank) for rank in range(n_ranks)]
        for file in self._files:
            file.unlink(missing_ok=True)
        self._limit_s = timeout_s + _MARGIN_S
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> (mtime, when it was new)

    def frozen(self) -> list[int]:
        """Ranks whose pulse stands still. By this machine's clock: others' may differ."""
        now = time.monotonic()
        return [rank for rank in range(len(self._files)) if self._stands_still(rank, now)]

    def hung(self) -> list[int]:
        """Ranks that ended themselves for want of progress."""
        return [rank for rank in range(len(self._files)) if self._text(rank) == HUNG]

    def steps_taken(self) -> int:
        """Training steps of this group, as rank 0 said last."""
        text = self._text(0)
        return int(text) if text.isdigit() else 0

    def _stands_still(self, rank: int, now: float) -> bool:
        try:
            changed = self._files[rank].stat().st_mtime_ns
        except FileNotFoundError:  # not begun, or done
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
