"""Read JSON safely, and write small files atomically and durably."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError from the block that names no file.

    Python names files when it opens them, but not when it writes to them, for example to a full
    disk.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`, atomically and durably, replacing any existing file."""
    # Flush the file before the rename, and the folder after it. Then a reader finds either the
    # complete old content or the complete new content, even after a crash of the machine.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path), open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def read_json(path: Path, max_bytes: int = 64 << 20) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: If the file is longer than `max_bytes`, or `parse_json` rejects its content.
        OSError: If the file is missing or unreadable.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {max_bytes}")
    return parse_json(data)


def parse_json(data: bytes | str) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: If the text is not valid JSON, is nested too deeply, or contains NaN or an
            infinity.
    """
    try:
        return json.loads(data, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not valid JSON; numbers must be finite")


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` when the block ends without an error.

    If the block raises, `path` is left unchanged. A process that is killed may leave an incomplete
    folder named `.<name>.new.tmp`. If the process is killed between the two renames, `path` is
    missing: the previous folder is then named `.<name>.old.tmp`, and the complete new folder is
    named `.<name>.new.tmp`. The next call removes both.

    Args:
        path: The folder to replace; does not need to exist.

    Yields:
        The empty folder to fill.
    """
    new = path.with_name(f".{path.name}.new.tmp")
    old = path.with_name(f".{path.name}.old.tmp")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with naming(new):
            yield new
        _fsync_tree(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    # A rename cannot replace a folder that is not empty, so move the old folder out of the way
    # first.
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for item in [*folder.rglob("*"), folder]:
        fsync_path(item)
