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
        ValueError: it is longer than `max_bytes`, or what `parse_json` refuses.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, at most {max_bytes} expected")
    return parse_json(data)


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, nested beyond reason, or holds NaN or an infinity.
    """
    try:
        return json.loads(data, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("JSON nested beyond reason") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
