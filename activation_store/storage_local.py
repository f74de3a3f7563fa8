"""A store in a folder of a local disk, or of a file system that all machines share."""

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

from activation_store import files
from activation_store.errors import MissingDataError, StoreBusyError, StoreFormatError
from activation_store.files import Bytes
from activation_store.parallel import N_THREADS, run_all
from activation_store.storage import Held, Parts, ReadHandle, Storage

LOCK = "_lock"
CLAIM = "_claim"
_POLL_S = 0.02


class LocalStorage(Storage):
    """Files: written under a temporary name, fsynced, then linked or renamed to their place.

    Args:
        path: Folder of the store.
    """

    # So many bytes are still in a core's cache when they are checked and placed; larger reads were
    # no faster, cold or warm.
    run_bytes = 1 << 20
    gap_bytes = 0
    n_threads = N_THREADS
    poll_s = 0.05
    build_is_atomic = True

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def read(self, name: str, limit_bytes: int) -> bytes:
        path = self.path / name
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

    def open(self, name: str) -> ReadHandle:
        try:
            return _File(files.open_to_read(self.path / name))
        except FileNotFoundError as error:
            raise MissingDataError(
                f"{self.where(name)} is committed but missing; restore it"
            ) from error

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def names(self, folder: str) -> list[str]:
        try:
            return os.listdir(self.path / folder)
        except FileNotFoundError:
            return []

    def is_folder(self, name: str) -> bool:
        return (self.path / name).is_dir()

    def build(
        self, folders: Sequence[str], objects: Mapping[str, bytes], last: tuple[str, bytes]
    ) -> None:
        """Beside its place, and then moves it there."""
        path, (marker, content) = self.path, last
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if (path / marker).exists():
                return  # somebody else was faster
            raise StoreFormatError(
                f"{path} holds files but is no activation store; choose an empty or a new folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        try:
            for name in (files.TMP, *folders):
                (building / name).mkdir(parents=True)
            for name, data in {**objects, marker: content}.items():
                files.replace(building, building / name, [data])
            os.rename(building, path)
            files.fsync_folder(path.parent)
        except OSError:
            if not (path / marker).exists():  # else somebody else was faster
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def put(self, name: str, parts: Parts) -> None:
        files.replace(self.path, self.path / name, parts)

    def put_if_absent(self, name: str, parts: Parts) -> bool:
        return files.link_new(files.write_temporary(self.path, parts), self.path / name)

    def make_folder(self, name: str) -> None:
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        files.fsync_folder(folder.parent)  # even if another writer made it a moment ago

    def sync(self, folders: Sequence[str]) -> None:
        # Side by side: a file system commits several folders in the time it takes for one.
        run_all([partial(files.fsync_folder, self.path / folder) for folder in folders])

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def is_stale(self, name: str) -> bool:
        return True  # writers hold the lock from the first shard to the record

    def remove_stale(self) -> list[str]:
        return files.remove_stale(self.path)

    @contextlib.contextmanager
    def lock(self, exclusive: bool, timeout_s: float | None = None) -> Iterator[None]:
        # Each has a file description of its own: threads of one process shut each other out too.
        fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, timeout_s)
            yield
        finally:
            os.close(fd)  # which lets go of it, as a death does

    def _flock(self, fd: int, kind: int, timeout_s: float | None) -> None:
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
                        f"{self.path} was locked by another process for {timeout_s:g} s: expected "
                        "no writer and no repair at work; end them, then try again"
                    ) from None
            time.sleep(_POLL_S)

    def claim(self, run: str, who: str) -> Held:
        fd = os.open(self.path / CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 1 << 12, 0).decode(errors="replace") or "another process"
            os.close(fd)
            raise StoreBusyError(
                f"{self.path} is being filled by {holder}: expected nobody; wait for it or end it"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, who.encode(), 0)
        return _Flocked(fd)


class _Flocked(Held):
    """The kernel's lock: nobody can take it over, and a death lets go of it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def check(self) -> None:
        pass

    def release(self) -> None:
        os.close(self._fd)


class _File(ReadHandle):
    def __init__(self, fd: int) -> None:
        self._fd = fd
        # Closed with the last reader's reference, so that dropping it from a cache is safe.
        weakref.finalize(self, os.close, fd)
        self.size = os.fstat(fd).st_size

    def read_into(self, views: list[Bytes], offset: int) -> bool:
        return files.read_into(self._fd, views, offset)
