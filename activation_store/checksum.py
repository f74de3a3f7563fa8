"""The crc32c checksum, computed without the GIL so that several threads can verify data at once."""

from __future__ import annotations

from typing import Any

import crc32c as _package


def crc32c(data: Any, before: int = 0) -> int:
    """Return the crc32c of `data`.

    Args:
        data: Bytes, or a flat C-contiguous array of uint8; not copied.
        before: The crc32c of the bytes that precede `data`; 0 if there are none.
    """
    return int(_package.crc32c(data, before))
