"""Storage in a folder, on a local disk or on a file system shared by all machines."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from activation_store.errors import MissingDataError, StoreBusyError, StoreFormatError
from activation_store.storage import atomic_files
from activation_store.storage.atomic_files import Bytes
from activation_store.storage.base import HeldLock, Parts, ReadHandle, Storage
from activation_store.threads import N_THREADS, run_all

COMMIT_LOCK = "_lock"
HARVEST_LOCK = "_claim"
_POLL_S = 0.02


class LocalStorage(Storage):
    """Storage in a folder. Files are written under a temporary name, fsynced, and then moved.

    Args:
        path: Folder of the store.
    """

    # This size is small enough that data are still in the CPU cache when they are verified and
    # copied. Larger reads were no faster, with either a cold or a warm page cache.
    run_bytes = 1 << 20
    gap_bytes = 0
    n_threads = N_THREADS
    poll_s = 0.05
    build_is_atomic = True

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Read a whole file."""
        path = self.path / name
        try:
            with path.open("rb") as file:
                data = file.read(limit_bytes + 1)
        except FileNotFoundError as error:
            raise MissingDataError(f"{path} is missing; restore it from a backup") from error
        if len(data) > limit_bytes:
            raise StoreFormatError(
                f"{path} has {path.stat().st_size} bytes: expected at most {limit_bytes}; "
                "this file was not written by activation_store"
            )
        return data

    def open(self, name: str) -> ReadHandle:
        """Open a file for reading ranges of its bytes."""
        try:
            return _File(atomic_files.open_to_read(self.path / name))
        except FileNotFoundError as error:
            raise MissingDataError(
                f"{self.where(name)} is committed but missing; repair the store with "
                "stage=repair, or restore the file from a backup"
            ) from error

    def exists(self, name: str) -> bool:
        """Return whether the file exists."""
        return (self.path / name).exists()

    def names(self, folder: str) -> list[str]:
        """List the names in a folder."""
        try:
            return os.listdir(self.path / folder)
        except FileNotFoundError:
            return []

    def is_folder(self, name: str) -> bool:
        """Return whether the folder exists."""
        return (self.path / name).is_dir()

    def build(
        self, folders: Sequence[str], objects: Mapping[str, bytes], last: tuple[str, bytes]
    ) -> None:
        """Create the store in a temporary folder next to its final path, and rename the folder."""
        path = self.path
        marker, content = last
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if (path / marker).exists():
                return  # another process has created the store
            raise StoreFormatError(
                f"{path} exists but is not an activation store; use an empty or a new folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        try:
            for name in (atomic_files.TMP, *folders):
                (building / name).mkdir(parents=True)
            for name, data in {**objects, marker: content}.items():
                atomic_files.replace(building, building / name, [data])
            os.rename(building, path)
            atomic_files.fsync_folder(path.parent)
        except OSError:
            # Ignore the error if another process has created the store, which also makes the rename
            # fail.
            if not (path / marker).exists():
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def put(self, name: str, parts: Parts) -> None:
        """Write a file, replacing any existing file of this name."""
        atomic_files.replace(self.path, self.path / name, parts)

    def put_if_absent(self, name: str, parts: Parts) -> bool:
        """Write a file unless a file of this name exists."""
        return atomic_files.link_new(
            atomic_files.write_temporary(self.path, parts), self.path / name
        )

    def make_folder(self, name: str) -> None:
        """Create a folder durably if it does not exist."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        # Sync the parent even if the folder existed, because its creator may not have done so yet.
        atomic_files.fsync_folder(folder.parent)

    def sync(self, folders: Sequence[str]) -> None:
        """Make the entries of these folders durable."""
        # Sync in parallel, because a file system commits several folders in the time it takes for
        # one.
        run_all([partial(atomic_files.fsync_folder, self.path / folder) for folder in folders])

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    def is_stale(self, name: str) -> bool:
        """Return True, because no writer can be about to commit the shard.

        Writers hold the commit lock from an item's first shard to its record, and the caller holds
        the lock exclusively.
        """
        return True

    def remove_stale(self) -> list[str]:
        """Remove old temporary files and return their names."""
        return atomic_files.remove_stale(self.path)

    @contextlib.contextmanager
    def lock(self, exclusive: bool, timeout_s: float | None = None) -> Iterator[None]:
        """Hold the commit lock, a kernel lock on the file `_lock`."""
        # Open the file in each call. A flock belongs to the open file, so that threads of one
        # process also exclude each other.
        fd = os.open(self.path / COMMIT_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, timeout_s)
            yield
        finally:
            os.close(fd)  # releases the lock, which the kernel also does if the process dies

    def _flock(self, fd: int, kind: int, timeout_s: float | None) -> None:
        """Take a file lock of this kind, waiting at most `timeout_s` seconds."""
        if timeout_s is None:
            fcntl.flock(fd, kind)
            return
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreBusyError(
                        f"{self.path} was locked by another process for {timeout_s:g} s; wait for "
                        "writers and repairs to finish, or stop them, then try again"
                    ) from None
            time.sleep(_POLL_S)

    def harvest_lock(self, run: str, who: str) -> HeldLock:
        """Take the harvest lock, a kernel lock on the file `_claim`."""
        fd = os.open(self.path / HARVEST_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 1 << 12, 0).decode(errors="replace") or "another process"
            os.close(fd)
            raise StoreBusyError(
                f"{self.path} is being written by {holder}; wait for it to finish, or stop it"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, who.encode(), 0)
        return _Flocked(fd)


class _Flocked(HeldLock):
    """Kernel file lock, which cannot be taken over and is released if the process dies."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def check(self) -> None:
        """Do nothing, because a kernel lock cannot be lost."""

    def release(self) -> None:
        """Release the lock."""
        os.close(self._fd)


class _File(ReadHandle):
    """An open file, closed when it is no longer referenced."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # Close the file only when the last reference is dropped, so that other threads can continue
        # reading after the file has been removed from the cache of open shards.
        weakref.finalize(self, os.close, fd)
        self.size = os.fstat(fd).st_size

    def read_into(self, views: list[Bytes], offset: int) -> bool:
        """Read the bytes from `offset` onwards into `views`."""
        return atomic_files.read_into(self._fd, views, offset)
