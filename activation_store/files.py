"""Files that are there whole or not at all."""

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

Bytes = NDArray[np.uint8]
"""A flat view of memory; checksums, os.preadv and os.writev take it without a copy."""

TMP = "_tmp"
STALE_S = 3600
_MAX_PARTS = 512  # of one call; Linux takes 1024


def as_bytes(array: NDArray[Any]) -> Bytes:
    """A flat view of the memory of a C-contiguous array; never copies."""
    if not array.flags.c_contiguous:
        raise AssertionError("a view of bytes needs a C-contiguous array")
    return array.reshape(-1).view(np.uint8)


def write_temporary(root: Path, parts: Iterable[bytes | Bytes]) -> Path:
    """Writes and fsyncs a file of the store's temporary folder; to be renamed or linked."""
    path = root / TMP / uuid.uuid4().hex
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
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
    """A file descriptor for `read_into`, to be closed by the caller."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read_into(fd: int, views: list[Bytes], offset: int) -> bool:
    """Fills `views` one after the other with the bytes from `offset` on; False if too few."""
    left = [view.data for view in views if len(view)]
    while left:
        read = os.preadv(fd, left[:_MAX_PARTS], offset)
        if read == 0:
            return False
        offset += read
        _drop(left, read)
    return True


def _drop(views: list[memoryview], n_bytes: int) -> None:
    """Takes the first `n_bytes` bytes away from `views`."""
    done = 0
    while done < len(views) and n_bytes >= len(views[done]):
        n_bytes -= len(views[done])
        done += 1
    del views[:done]
    if n_bytes:
        views[0] = views[0][n_bytes:]


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(root: Path, path: Path, parts: Iterable[bytes | Bytes]) -> None:
    """Puts `parts` at `path` in one step, whether or not something is there."""
    os.rename(write_temporary(root, parts), path)
    fsync_folder(path.parent)


def link_new(temporary: Path, path: Path) -> bool:
    """Gives a temporary file its place, unless something stands there: then False.

    The temporary name is gone either way. The folder is not yet fsynced.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def remove_stale(root: Path) -> list[str]:
    """Removes what dead writers left half written; young files may be a living one's."""
    removed = []
    (root / TMP).mkdir(exist_ok=True)  # copies of a store may lack an empty folder
    for file in (root / TMP).iterdir():
        with contextlib.suppress(FileNotFoundError):  # its writer, or another one's sweep
            if time.time() - file.stat().st_mtime > STALE_S:
                file.unlink()
                removed.append(f"{TMP}/{file.name}")
    return removed
