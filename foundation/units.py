"""Write byte counts for people."""

from __future__ import annotations

import math

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def bytes_text(count: float) -> str:
    """Format a byte count in binary units: `512 B`, `1.5 MiB`, `1020 GiB`."""
    power = min(int(math.log2(count) // 10), len(_UNITS) - 1) if count >= 1 else 0
    value = count / 1024**power
    # Three digits of 1000 to 1023 would be written as a power of ten.
    return f"{value:.3g} {_UNITS[power]}" if value < 999.5 else f"{value:.0f} {_UNITS[power]}"
