"""Format values for a page: numbers, byte counts, nested settings."""

from __future__ import annotations

import math
from typing import Any


def tree(value: Any) -> Any:
    """Convert a nested config for the template: lists of (key, subtree | text)."""
    if isinstance(value, dict):
        return [(str(key), tree(item)) for key, item in value.items()]
    return value_text(value)


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested dicts into rows of (dotted key, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value_text(value, str(key))))
    return rows


def value_text(value: Any, key: str = "") -> str:
    """Format a value for the page; a number whose key ends in `_bytes` gets a binary unit."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(value_text(item) for item in value) or "none"
    if not isinstance(value, int | float):
        return str(value) or '""'
    if key.endswith("_bytes"):
        return bytes_text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def bytes_text(count: float) -> str:
    """Format a byte count in binary units: `512 B`, `1.5 MiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log2(count) // 10), len(units) - 1) if count >= 1 else 0
    return f"{count / 1024**power:.3g} {units[power]}"
