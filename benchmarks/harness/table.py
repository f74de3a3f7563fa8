"""Format benchmark rows as an aligned text table and as JSON.

A row is `{"work": {...}, "system": "ours" | <package>, "op": ..., "median_s": ..., "ratio": ...,
"tokens_per_s": ..., "peak_bytes": ...}`. Other keys are kept in the JSON, but shown in the table
only if they are named as columns. A failed measurement has the row
`{"work": ..., "system": ..., "op": ..., "error": text}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.run_folder.environment import environment

COLUMNS = ("work", "system", "op", "median_s", "ratio", "tokens_per_s", "peak_bytes")

Row = Mapping[str, Any]


def format_table(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Format rows as aligned columns, with right-aligned numbers and `-` for missing values."""
    titles = [_title(column) for column in columns]
    cells = [[_cell(column, row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [titles, *cells]) for i in range(len(columns))]
    numeric = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]

    def line(values: Sequence[str]) -> str:
        parts = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(titles), line(["-" * width for width in widths]), *map(line, cells)])


def document(rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """Return the rows and `more` together with hardware, versions, commit and command."""
    return {"rows": [dict(row) for row in rows], **more, **environment()}


def write_json(path: str | Path, rows: Sequence[Row], **more: Any) -> None:
    """Write `document(rows, **more)` atomically: readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(document(rows, **more), indent=2) + "\n")
    temporary.replace(path)


def _title(column: str) -> str:
    if column.endswith("_per_s"):
        return column.removesuffix("_per_s") + "/s"
    if column.endswith("_s"):
        return column.removesuffix("_s") + " ms"
    if column.endswith("_bytes"):
        return column.removesuffix("_bytes") + " MiB"
    return column


def _cell(column: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items())
    if not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if column.endswith("_per_s"):
        return f"{value:,.0f}"
    if column.endswith("_s"):
        return f"{value * 1e3:.2f}"
    if column.endswith("_bytes"):
        return f"{value / 2**20:,.0f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
