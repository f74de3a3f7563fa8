"""crc32c of memory; lets go of the interpreter's lock, so that threads check side by side."""

from __future__ import annotations

from typing import Any

import crc32c as _package


def crc32c(data: Any, before: int = 0) -> int:
    """The crc32c of `data` (bytes, or a flat C-contiguous array of uint8).

    Args:
        data: Never copied.
        before: The crc32c of what stands before `data`, to go on from.
    """
    return int(_package.crc32c(data, before))
