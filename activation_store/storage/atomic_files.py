"""Atomic, durable file writes and vectored reads on a local file system."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.atomic_files import naming

Bytes = NDArray[np.uint8]
"""A flat view of memory, which crc32c, os.preadv and os.writev use without copying it."""

TMP = "_tmp"
"""Folder of a store for files that are being written."""
STALE_S = 3600
"""Age in seconds from which an unfinished file is assumed to be left over from a dead writer."""
_MAX_PARTS = 512  # maximum number of buffers per system call; Linux allows 1024


def as_bytes(array: NDArray[Any]) -> Bytes:
    """Return a flat uint8 view of the memory of a C-contiguous array, without copying."""
    if not array.flags.c_contiguous:
        raise AssertionError("the array must be C-contiguous")
    return array.reshape(-1).view(np.uint8)


def write_temporary(root: Path, parts: Iterable[bytes | Bytes]) -> Path:
    """Write and fsync a file in the store's temporary folder, for the caller to rename or link."""
    path = root / TMP / uuid.uuid4().hex
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with naming(path):
            _write_all(fd, list(parts))
            os.fsync(fd)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(fd)
    return path


def _write_all(fd: int, parts: list[bytes | Bytes]) -> None:
    views = [
        part.data if isinstance(part, np.ndarray) else memoryview(part)
        for part in parts
        if len(part)
    ]
    while views:
        _drop(views, os.writev(fd, views[:_MAX_PARTS]))


def open_to_read(path: Path) -> int:
    """Open a file for `read_into`, and return its descriptor, which the caller must close."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read_into(fd: int, views: list[Bytes], offset: int) -> bool:
    """Read the bytes from `offset` onwards into `views`, one view after the other.

    Returns:
        False if the file ends before all views are full.
    """
    left = [view.data for view in views if len(view)]
    while left:
        read = os.preadv(fd, left[:_MAX_PARTS], offset)
        if read == 0:
            return False
        offset += read
        _drop(left, read)
    return True


def _drop(views: list[memoryview], n_bytes: int) -> None:
    """Remove the first `n_bytes` bytes from `views`, in place."""
    done = 0
    while done < len(views) and n_bytes >= len(views[done]):
        n_bytes -= len(views[done])
        done += 1
    del views[:done]
    if n_bytes:
        views[0] = views[0][n_bytes:]


def fsync_folder(path: Path) -> None:
    """Flush a folder to disk, so that the names in it survive a power failure."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(root: Path, path: Path, parts: Iterable[bytes | Bytes]) -> None:
    """Write `parts` to `path` atomically, replacing any existing file."""
    os.rename(write_temporary(root, parts), path)
    fsync_folder(path.parent)


def link_new(temporary: Path, path: Path) -> bool:
    """Move a temporary file to `path` unless `path` already exists.

    The temporary file is removed in either case. The folder of `path` is not fsynced.

    Returns:
        False if `path` already existed.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def remove_stale(root: Path) -> list[str]:
    """Remove temporary files older than `STALE_S`. Newer files may belong to a live writer.

    Returns:
        The removed files, relative to `root`.
    """
    removed = []
    (root / TMP).mkdir(exist_ok=True)  # a copy of a store may lack this folder, because it is empty
    for file in (root / TMP).iterdir():
        # The file's writer, or another process that cleans up, may remove the file in the meantime.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > STALE_S:
                file.unlink()
                removed.append(f"{TMP}/{file.name}")
    return removed
