"""Write and read `metrics.jsonl`, the log of training metrics: one JSON object per line.

If the writer is killed in the middle of a write, the last line is incomplete. The next writer ends
that line, and every reader skips it. A resumed run logs again the steps that followed its
checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.run_folder.files import METRICS
from foundation.atomic_files import naming

Row = dict[str, Any]
"""Metrics of one SAE at one step: `sae`, `step`, `tokens` and further keys."""
_TAIL_BYTES = 1 << 16
"""Number of bytes at the end of the log that `last_row` reads. A row has less than 2 KiB."""


class MetricsWriter:
    """Append rows to the log of a run.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        path = self._path = run_dir / METRICS
        torn = _has_torn_end(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - `close` closes it
        if torn:
            self._file.write("\n")

    def write(self, row: Row) -> Row:
        """Append one row and flush it. Return the row as written."""
        # JSON has no NaN or infinity, but parsers in every language accept null.
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with naming(self._path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        return clean

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True)
class TrainingLog:
    """The whole log, grouped by SAE."""

    rows: dict[str, list[Row]]
    """Rows of each SAE by name, in order of step, with one row per logged step."""
    unreadable_lines: int
    """Number of lines that are not valid rows."""

    def __bool__(self) -> bool:
        return any(self.rows.values())


def read_training_log(run_dir: Path) -> TrainingLog:
    """Read the log of a run. The result is empty if training has not started.

    If a step of an SAE was logged several times, the last row is used.
    """
    by_sae: dict[str, dict[int, Row]] = defaultdict(dict)
    unreadable = 0
    for row in _rows_or_none(run_dir):
        if row is None:
            unreadable += 1
        else:
            by_sae[str(row.get("sae", "sae"))][row["step"]] = row
    rows = {name: [steps[step] for step in sorted(steps)] for name, steps in by_sae.items()}
    return TrainingLog(rows, unreadable)


def logged_rows(run_dir: Path) -> Iterator[Row]:
    """Yield all rows in the order in which they were written, repeated steps included."""
    return (row for row in _rows_or_none(run_dir) if row is not None)


def last_row(run_dir: Path) -> Row | None:
    """Return the last row written, or None if there is none. Reads only the end of the file."""
    try:
        with open(run_dir / METRICS, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    # The first of these lines may be only the end of a line, which is not a valid row.
    rows = (_parse(line) for line in reversed(lines))
    return next((row for row in rows if row is not None), None)


class NewRows:
    """Reader of the rows that a run adds after this object is created.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS
        self._offset = self._path.stat().st_size if self._path.exists() else 0

    def read(self) -> list[Row]:
        """Return the rows added since the last call."""
        rows: list[Row] = []
        if not self._path.exists():
            return rows
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # rank 0 is still writing this line
                self._offset += len(line)
                row = _parse(line)
                if row is not None:
                    rows.append(row)
        return rows


def _rows_or_none(run_dir: Path) -> Iterator[Row | None]:
    """Yield each line that is not blank as a row, or as None if it is not a valid row."""
    path = run_dir / METRICS
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    yield _parse(line)


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


def _has_torn_end(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            if not file.seek(0, os.SEEK_END):
                return False
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except FileNotFoundError:
        return False
