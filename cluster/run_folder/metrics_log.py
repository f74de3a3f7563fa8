"""Write and read `metrics.jsonl`."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.run_folder.files import METRICS


@dataclass(frozen=True)
class TrainingLog:
    """Contents of `metrics.jsonl`, grouped by SAE."""

    rows: dict[str, list[dict[str, Any]]]
    """SAE name -> rows in order of step, one row per logged step."""
    unreadable_lines: int
    """Number of lines that are not valid rows. A kill in the middle of a write leaves one."""

    def __bool__(self) -> bool:
        return any(self.rows.values())


def read_training_log(path: Path) -> TrainingLog:
    """Read a run's `metrics.jsonl`; the result is empty if training has not started.

    A resumed run logs the steps after its checkpoint again. The last row of each step is used.
    """
    by_sae: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    unreadable = 0
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                row = _row(line)
                if row is None:
                    unreadable += 1
                else:
                    # A later row of the same step replaces the earlier one.
                    by_sae[str(row.get("sae", "sae"))][row["step"]] = row
    rows = {name: [steps[step] for step in sorted(steps)] for name, steps in by_sae.items()}
    return TrainingLog(rows, unreadable)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


class MetricRows:
    """Reader of the metric rows that a run adds from now on."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS
        self._offset = self._path.stat().st_size if self._path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Return the rows added since the last call."""
        rows: list[dict[str, Any]] = []
        if not self._path.exists():
            return rows
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break  # rank 0 is still writing this line
                if raw.strip():  # skip blank lines, which a restart may leave
                    rows.append(json.loads(raw))
                self._offset += len(raw)
        return rows
