"""Format numbers, byte counts and other plain values for display."""

from __future__ import annotations

from typing import Any

from foundation.units import bytes_text


def value_text(value: Any, key: str = "") -> str:
    """Format a value. A number whose key ends in `_bytes` is given a binary unit."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(value_text(item) for item in value) or "none"
    if not isinstance(value, int | float):
        return str(value) or '""'
    if key.endswith("_bytes"):
        return bytes_text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def number(value: float, digits: int = 3) -> str:
    """Format a value briefly: 12k, 3.5M, 0.02, 1e-6."""
    if value == 0:
        return "0"
    size = abs(value)
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.{digits}g}{suffix}"
    return f"{value:.2g}".replace("e-0", "e-") if size < 1e-3 else f"{value:.{digits}g}"
