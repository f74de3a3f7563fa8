"""Files that are there whole or not at all, and JSON whose every byte is under a checksum."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.checksum import crc32c
from activation_store.errors import DamagedDataError, MissingDataError, StoreFormatError

Bytes = NDArray[np.uint8]
"""A flat view of memory; checksums, os.preadv and os.writev take it without a copy."""

TMP = "_tmp"
_SEAL = b'{"crc32c":"%08x",'
_SEAL_BYTES = len(_SEAL % 0)
_STALE_S = 3600
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


def replace(root: Path, path: Path, data: bytes) -> None:
    """Puts `data` at `path` in one step, whether or not something is there."""
    os.rename(write_temporary(root, [data]), path)
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


def remove_stale(root: Path) -> None:
    """Removes what dead writers left half written; young files may be a living one's."""
    for file in (root / TMP).iterdir():
        with contextlib.suppress(FileNotFoundError):  # its writer, or another one's sweep
            if time.time() - file.stat().st_mtime > _STALE_S:
                file.unlink()


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """A small file, whole.

    Raises:
        MissingDataError: It is not there.
        StoreFormatError: It is larger than anything this package writes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except FileNotFoundError as error:
        raise MissingDataError(f"{path} is missing; restore it from a backup") from error
    if len(data) > limit_bytes:
        raise StoreFormatError(
            f"{path} has {path.stat().st_size} bytes: expected at most {limit_bytes}; "
            "this is no metadata that activation_store wrote"
        )
    return data


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """Raises: StoreFormatError: not a JSON object, or one nested beyond reason."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(document, dict):
        raise StoreFormatError(f"{path} holds a {type(document).__name__}: expected an object")
    return document


def seal(document: dict[str, Any]) -> bytes:
    """JSON whose first key is the crc32c (hexadecimal) of all the bytes after it."""
    rest = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()[1:]
    return _SEAL % crc32c(rest) + rest


def read_sealed(path: Path, limit_bytes: int) -> dict[str, Any]:
    """What `seal` wrote.

    Raises:
        MissingDataError: The file is not there.
        DamagedDataError: A byte of it is not what was written.
        StoreFormatError: It is larger than `limit_bytes`, or no JSON object.
    """
    data = read_bounded(path, limit_bytes)
    rest = data[_SEAL_BYTES:]
    if data[:_SEAL_BYTES] != _SEAL % crc32c(rest):
        raise DamagedDataError(f"{path} fails its checksum; restore it from a backup")
    return parse_json(path, b"{" + rest)
