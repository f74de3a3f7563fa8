"""The log of a process that runs kernel cases: one line of JSON per event."""

from __future__ import annotations

import json
import time
from pathlib import Path

STARTED, CRASHED = "started", "crashed"
LOST = 3
"""Exit code after an error that makes the device unusable for its process."""
_TEXT = 3000


class CaseLog:
    """Appends outcomes to a file, and knows which cases an earlier process has logged there.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = 0.0
        self.seen: set[str] = set()
        """Cases that were started before, which must not run again."""
        lines = []
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.seen |= {line["case"] for line in lines if "case" in line}
        self._is_counted = any("selected" in line for line in lines)

    def selected(self, count: int, runner: str) -> None:
        """Log the number of cases of this share, and what runs them, unless it is logged."""
        if not self._is_counted:
            self._append({"selected": count, "runner": runner})

    def started(self, case: str) -> None:
        """Log that a case begins. If the process dies, this is its last line."""
        self._began = time.monotonic()
        self._append({"case": case, "outcome": STARTED})

    def ended(self, case: str, outcome: str, text: str = "") -> None:
        """Log how a case ended: passed, failed or skipped, and why."""
        seconds = time.monotonic() - self._began
        entry = {"case": case, "outcome": outcome, "seconds": seconds, "text": text[-_TEXT:]}
        self._append(entry)

    def _append(self, entry: dict[str, object]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def share_of(cases: list[str], share: str, stride: int) -> list[str]:
    """Return a process's share of the cases.

    Args:
        cases: All cases, in order.
        share: "i/n": the cases i, i + n, ...
        stride: Take only every `stride`-th of all cases.
    """
    place, count = (int(number) for number in share.split("/"))
    return cases[::stride][place::count]


def device_is_lost(text: str) -> bool:
    """Return True if an error makes all later CUDA calls of its process fail."""
    return "CUDA error" in text and "out of memory" not in text
