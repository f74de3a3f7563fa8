"""Small files and folders that are either wholly there or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON, atomically and durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def read_json(path: Path, max_bytes: int = 64 << 20) -> Any:
    """JSON of `path`.

    Raises:
        ValueError: it is longer than `max_bytes`, or no JSON.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path}: {size} bytes, at most {max_bytes} expected")
    return json.loads(path.read_text(encoding="utf-8"))
